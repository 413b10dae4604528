//! The steps from what is in the kernel to what should be, ordered so that no prefix of them leaks.
//!
//! Pure. The agent may die after any step, and packets flow between any two: so what protects a pod comes
//! before what depends on it, and goes after it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::state::{
    Family, FamilyState, FirewallState, KernelState, Mark, NextHop, PodState, RouteState, Rule,
    RuleAction, Skeleton, Step,
};

/// When a step has its turn. The order of the variants is the order of the steps; between two steps of one
/// phase the order does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// A `goto` to a rule that does not exist yet matches nothing.
    RuleTargets,
    /// A table without it is open: the lookup falls through to `main`.
    Fallbacks,
    Gateways,
    LookupRules,
    OtherRules,

    Skeletons,
    /// Before any pod: else its traffic inside the cluster would be translated.
    Exclusions,
    /// After the NAT chains leave it alone: a marked packet keeps its own source there, and must not go elsewhere than to
    /// its gateway with it.
    ExclusionRules,
    Vips,
    /// Closing comes before any change that opens.
    Blocks,
    /// Before `Know`: a pod that passes our NAT without a VIP would fall through to the CNI's masquerade.
    Translations,
    /// Before marks: a marked packet that our NAT does not see is masqueraded to the node's address.
    Knowledge,
    Marks,
    /// After the new translation or mark is there: in between a pod has two, never none.
    OldTranslations,
    /// Before the NAT chains look at it again, for the same reason.
    OldExclusionRules,
    /// Before the connections are forgotten: one that is opened while its destination is still excluded is
    /// translated by others, and would stay so.
    OldExclusions,
    /// After the pods are known or free: else packets of egress pods of other nodes, and of all pods of this one, would
    /// be dropped.
    PodNetworks,
    /// After everything that decides how connections are translated, and before a pod that is none any more
    /// loses the guard that drops its untranslated packets (25 packets leaked without, in an experiment).
    Connections,
    /// After the connections are forgotten: until then it is the reason to forget them, for a run that died.
    Gatewayships,
    Unblocks,
    /// Before pods are no longer known or free, for the same reason.
    OldPodNetworks,
    Unknowledge,
    OldVips,
    OldSkeletons,
    /// When ours does all of the work. Chains of a backend come before their sets.
    Remnants,

    /// From here on nothing is marked for what goes away.
    OldLookupRules,
    OldOtherRules,
    OldRuleTargets,
    OldGateways,
    /// Last of a table, for the reason that it is the first.
    OldFallbacks,

    /// When everything is as it will be.
    Wakes,
}

/// The ordered steps that turn `observed` into `desired`; none when they are equal.
#[must_use]
pub fn diff(observed: &KernelState, desired: &KernelState) -> Vec<Step> {
    let mut steps = Vec::new();
    let nothing = FamilyState::default();
    let mut strays = observed.doubt && !desired.doubt;
    let mut wakes = BTreeSet::new();
    for family in Family::ALL {
        let from = observed.families.get(&family).unwrap_or(&nothing);
        let to = desired.families.get(&family).unwrap_or(&nothing);
        routes(family, &from.routes, &to.routes, &mut steps);
        firewall(
            family,
            &from.firewall,
            &to.firewall,
            observed.doubt,
            &mut steps,
        );
        // What was opened to a destination that is egress again has the source that others gave it.
        strays |= becomes_egress(&from.firewall, &to.firewall);
        steps.extend(newly_excluded(&from.firewall, &to.firewall));
        let (old, new) = (Ways::of(from), Ways::of(to));
        wakes.extend(
            new.pods()
                .filter(|pod| new.of_pod(*pod) != old.of_pod(*pod)),
        );
    }
    if strays {
        let firewalls = || desired.families.values().map(|family| &family.firewall);
        let pods = firewalls().flat_map(|firewall| &firewall.pods);
        let sources = pods.filter_map(|(pod, state)| Some((*pod, source(*pod, state)?)));
        let vips = firewalls().flat_map(|firewall| &firewall.vips).copied();
        let step = Step::ForgetWrongSource {
            sources: sources.collect(),
            vips: vips.collect(),
        };
        steps.push((Phase::Connections, step));
    }
    for remnant in observed.remnants.difference(&desired.remnants) {
        steps.push((Phase::Remnants, Step::RemoveRemnant(*remnant)));
    }
    // Only egress pods: what they say of a connection that has ended meanwhile is INVALID, skips NAT, and is guarded.
    let is_egress_pod = |address: &IpAddr| {
        let family = desired.families.get(&Family::of(*address));
        let pod = family.and_then(|family| family.firewall.pods.get(address));
        pod.is_some_and(|pod| pod.egress && opens_connections_here(pod))
    };
    let forgotten = steps.iter().filter_map(|(_, step)| match step {
        Step::ForgetConnections(pod) => Some(*pod),
        _ => None,
    });
    wakes.extend(forgotten.filter(is_egress_pod));
    steps.extend(wakes.into_iter().map(|pod| (Phase::Wakes, Step::Wake(pod))));
    // Stable: both families go through the phases together, so that a backend can batch them.
    steps.sort_by_key(|(phase, _)| *phase);
    steps.into_iter().map(|(_, step)| step).collect()
}

type Steps = Vec<(Phase, Step)>;

fn routes(family: Family, from: &RouteState, to: &RouteState, steps: &mut Steps) {
    for rule in to.rules.difference(&from.rules) {
        let phase = match rule.action {
            RuleAction::Nop => Phase::RuleTargets,
            RuleAction::Lookup(_) => Phase::LookupRules,
            RuleAction::Goto(_) if rule.to.is_some() => Phase::ExclusionRules,
            RuleAction::Unreachable | RuleAction::Goto(_) => Phase::OtherRules,
        };
        steps.push((phase, Step::AddRule(family, *rule)));
    }
    for rule in from.rules.difference(&to.rules) {
        let phase = match rule.action {
            RuleAction::Nop => Phase::OldRuleTargets,
            RuleAction::Lookup(_) => Phase::OldLookupRules,
            RuleAction::Goto(_) if rule.to.is_some() => Phase::OldExclusionRules,
            RuleAction::Unreachable | RuleAction::Goto(_) => Phase::OldOtherRules,
        };
        steps.push((phase, Step::RemoveRule(family, *rule)));
    }
    let ids: BTreeSet<_> = from.tables.keys().chain(to.tables.keys()).collect();
    for id in ids {
        let (old, new) = (from.tables.get(id), to.tables.get(id));
        let fallback = |table: Option<&crate::state::Table>| table.is_some_and(|t| t.fallback);
        match (fallback(old), fallback(new)) {
            (false, true) => steps.push((Phase::Fallbacks, Step::AddFallback(family, *id))),
            (true, false) => steps.push((Phase::OldFallbacks, Step::RemoveFallback(family, *id))),
            _ => {}
        }
        let old = old.and_then(|table| table.gateway.as_ref());
        let new = new.and_then(|table| table.gateway.as_ref());
        match (old, new) {
            (old, Some(hop)) if old != Some(hop) => {
                steps.push((Phase::Gateways, Step::SetGateway(*id, hop.clone())));
            }
            (Some(hop), None) => {
                steps.push((Phase::OldGateways, Step::RemoveGateway(*id, hop.clone())));
            }
            _ => {}
        }
    }
}

fn firewall(
    family: Family,
    from: &FirewallState,
    to: &FirewallState,
    doubt: bool,
    steps: &mut Steps,
) {
    if to.skeleton == Skeleton::Absent {
        if *from != FirewallState::default() {
            // Pods are let go one step after the other, as always: with everything gone at once, connections
            // would go on with the pod's own address.
            for (address, state) in &from.pods {
                pod(*address, state, &PodState::default(), doubt, steps);
            }
            steps.push((Phase::OldSkeletons, Step::RemoveFirewall(family)));
        }
        return;
    }
    let mut present = from.vips.clone();
    if from.skeleton != Skeleton::Intact {
        // Keeps the translations that are in use: they are removed in their turn.
        present.extend(from.pods.values().flat_map(|pod| pod.vips.iter().copied()));
        present.extend(to.vips.iter().copied());
        let step = Step::InstallFirewall(family, present.clone());
        steps.push((Phase::Skeletons, step));
    }
    let vip_steps = changes(&present, &to.vips, Step::AddVip, Step::RemoveVip);
    push(steps, Phase::Vips, Phase::OldVips, vip_steps);
    let net_steps = changes(&from.excluded, &to.excluded, Step::Exclude, Step::Include);
    push(steps, Phase::Exclusions, Phase::OldExclusions, net_steps);
    let remote_steps = changes(
        &from.remote_pods,
        &to.remote_pods,
        Step::AddRemotePods,
        Step::RemoveRemotePods,
    );
    let local_steps = changes(
        &from.local_pods,
        &to.local_pods,
        Step::AddLocalPods,
        Step::RemoveLocalPods,
    );
    for pod_steps in [remote_steps, local_steps] {
        push(steps, Phase::PodNetworks, Phase::OldPodNetworks, pod_steps);
    }
    let none = PodState::default();
    let addresses: BTreeSet<_> = from.pods.keys().chain(to.pods.keys()).collect();
    for address in addresses {
        let old = from.pods.get(address).unwrap_or(&none);
        let new = to.pods.get(address).unwrap_or(&none);
        // A run that died may have unmarked a pod and not come to forget its connections.
        let leaves = doubt && old.egress && !new.egress;
        pod(*address, old, new, leaves, steps);
    }
}

fn pod(address: IpAddr, from: &PodState, to: &PodState, must_forget: bool, steps: &mut Steps) {
    match (from.egress, to.egress) {
        (false, true) => steps.push((Phase::Knowledge, Step::Know(address))),
        (true, false) => steps.push((Phase::Unknowledge, Step::Unknow(address))),
        _ => {}
    }
    match (from.ordinary, to.ordinary) {
        (false, true) => steps.push((Phase::Knowledge, Step::Free(address))),
        (true, false) => steps.push((Phase::Unknowledge, Step::Unfree(address))),
        _ => {}
    }
    for vip in to.vips.difference(&from.vips) {
        let (pod, vip) = (address, *vip);
        steps.push((Phase::Translations, Step::Translate { pod, vip }));
    }
    for vip in from.vips.difference(&to.vips) {
        let (pod, vip) = (address, *vip);
        steps.push((Phase::OldTranslations, Step::Untranslate { pod, vip }));
    }
    match (from.mark, to.mark) {
        (old, Some(mark)) if old != Some(mark) => {
            let pod = address;
            steps.push((Phase::Marks, Step::Mark { pod, mark }));
        }
        (Some(_), None) => steps.push((Phase::Marks, Step::Unmark(address))),
        _ => {}
    }
    let becomes_gateway = to.gateway_here && (!from.gateway_here || from.interrupted);
    match (from.gateway_here, to.gateway_here) {
        (_, true) if becomes_gateway => steps.push((Phase::Gatewayships, Step::Gateway(address))),
        (true, false) => steps.push((Phase::Gatewayships, Step::Ungateway(address))),
        _ => {}
    }
    match (from.blocked, to.blocked) {
        (false, true) => steps.push((Phase::Blocks, Step::Block(address))),
        (true, false) => steps.push((Phase::Unblocks, Step::Unblock(address))),
        _ => {}
    }
    // An established connection keeps the translation that it was born with: with the node's address it would
    // keep it for ever, with identity it would leak. And a gateway that is none any more has no use for them.
    let changed = translation(from) != translation(to);
    let uses_this_node = opens_connections_here(from) || opens_connections_here(to);
    let loses_another_nodes_pod = from.gateway_here && !to.gateway_here && to.mark.is_none();
    if must_forget || (uses_this_node && changed) || loses_another_nodes_pod {
        steps.push((Phase::Connections, Step::ForgetConnections(address)));
    } else if let (true, Some(source)) = (becomes_gateway, to.vips.first()) {
        // What a node knows that is gateway again is old: by its windows, packets are INVALID. Forgetting it would do,
        // but for connections on which only the server has something to say.
        let (pod, source) = (address, *source);
        let step = Step::ResumeConnections { pod, source };
        steps.push((Phase::Connections, step));
    }
}

/// Where marked pods are routed to.
struct Ways<'a> {
    state: &'a FamilyState,
    hops: BTreeMap<(Mark, Option<IpAddr>), &'a NextHop>,
}

impl<'a> Ways<'a> {
    fn of(state: &'a FamilyState) -> Ways<'a> {
        let hop = |rule: &Rule| match rule.action {
            RuleAction::Lookup(table) => state.routes.tables.get(&table)?.gateway.as_ref(),
            _ => None,
        };
        let rules = state.routes.rules.iter();
        let hops = rules.filter_map(|rule| Some(((rule.mark?, rule.from), hop(rule)?)));
        Ways {
            state,
            hops: hops.collect(),
        }
    }

    /// The pods that are routed to a gateway.
    fn pods(&self) -> impl Iterator<Item = IpAddr> {
        let pods = self.state.firewall.pods.keys().copied();
        pods.filter(|pod| self.of_pod(*pod).is_some())
    }

    fn of_pod(&self, pod: IpAddr) -> Option<&'a NextHop> {
        let mark = self.state.firewall.pods.get(&pod)?.mark?;
        let of_all = || self.hops.get(&(mark, None));
        self.hops.get(&(mark, Some(pod))).or_else(of_all).copied()
    }
}

/// What ends when destinations are excluded: egress connections to them would go on past their gateway, and show the
/// pod's own address.
fn newly_excluded(from: &FirewallState, to: &FirewallState) -> Option<(Phase, Step)> {
    let nets = to
        .excluded
        .iter()
        .flat_map(|net| without(*net, &from.excluded));
    let nets: BTreeSet<IpNet> = nets.collect();
    let pods = from.pods.iter().filter(|(_, pod)| pod.egress);
    let pods: BTreeSet<IpAddr> = pods.map(|(address, _)| *address).collect();
    let is_needed = !pods.is_empty() && !nets.is_empty();
    is_needed.then_some((Phase::Connections, Step::ForgetNewlyExcluded { pods, nets }))
}

/// The parts of a network that are in none of the others.
fn without(net: IpNet, others: &BTreeSet<IpNet>) -> Vec<IpNet> {
    if others.iter().any(|other| other.contains(&net)) {
        return Vec::new();
    }
    let halves = net.subnets(net.prefix_len() + 1);
    match halves {
        Ok(halves) if others.iter().any(|other| net.contains(other)) => {
            halves.flat_map(|half| without(half, others)).collect()
        }
        _ => vec![net],
    }
}

/// Whether a destination is not excluded any more. Networks that are only written in another way, as neighbours that
/// became one, are not.
fn becomes_egress(from: &FirewallState, to: &FirewallState) -> bool {
    let is_covered = |net: &IpNet| to.excluded.iter().any(|wider| wider.contains(net));
    to.skeleton != Skeleton::Absent && !from.excluded.iter().all(is_covered)
}

/// How new connections of a pod are translated on this node.
#[derive(PartialEq, Eq)]
enum Translation<'a> {
    None,
    Identity,
    Vips(&'a BTreeSet<IpAddr>),
}

fn translation(pod: &PodState) -> Translation<'_> {
    if !pod.egress {
        Translation::None
    } else if pod.mark.is_some() {
        Translation::Identity
    } else {
        Translation::Vips(&pod.vips)
    }
}

/// The source of the packets that a pod sends to outside, as they leave this node; `None` for a pod that does not
/// send through here, or may not.
fn source(address: IpAddr, pod: &PodState) -> Option<IpAddr> {
    if pod.mark.is_some() {
        Some(address)
    } else if pod.gateway_here {
        pod.vips.first().copied()
    } else {
        None
    }
}

/// Whether connections of the pod pass this node: it is here, or its gateway is.
fn opens_connections_here(pod: &PodState) -> bool {
    pod.mark.is_some() || pod.gateway_here || pod.blocked
}

fn changes<T: Ord + Copy>(
    from: &BTreeSet<T>,
    to: &BTreeSet<T>,
    add: fn(T) -> Step,
    remove: fn(T) -> Step,
) -> (Vec<Step>, Vec<Step>) {
    (
        to.difference(from).copied().map(add).collect(),
        from.difference(to).copied().map(remove).collect(),
    )
}

fn push(steps: &mut Steps, add: Phase, remove: Phase, (adds, removes): (Vec<Step>, Vec<Step>)) {
    steps.extend(adds.into_iter().map(|step| (add, step)));
    steps.extend(removes.into_iter().map(|step| (remove, step)));
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod moves;
#[cfg(test)]
mod tests;
