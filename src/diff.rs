//! The steps from what is in the kernel to what should be, ordered so that no prefix of them leaks.
//!
//! Pure. The agent may die after any step, and packets flow between any two: so what protects a pod comes
//! before what depends on it, and goes after it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::state::{
    Accepted, ConnectionStep, Family, FamilyState, FirewallState, FirewallStep, KernelState,
    Landmark, NetSet, PodSet, PodState, RouteState, RouteStep, RuleAction, Skeleton, Step, Table,
    TableId,
};

/// When a step has its turn. The order of the variants is the order of the steps; between two steps of one
/// phase the order does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// Before packets take them: until then they are dropped.
    Ways,
    /// A table without it is open: the lookup falls through to `main`.
    Fallbacks,
    /// What is excluded already goes past a new table from its beginning.
    Throws,
    Gateways,
    LookupRules,

    Skeletons,
    Landmarks,
    /// Before any pod: else its traffic inside the cluster would be translated.
    Exclusions,
    /// After the NAT chains leave it alone: a marked packet keeps its own source there, and must not go elsewhere than to
    /// its gateway with it.
    NewThrows,
    /// To tables that do not leave alone yet what is excluded.
    NewLookupRules,
    Vips,
    /// Closing comes before any change that opens.
    Blocks,
    /// Before a pod is an egress pod: one that passes our NAT without a VIP would fall through to the CNI's masquerade.
    Translations,
    /// Before marks: a marked packet that our NAT does not see is masqueraded to the node's address.
    Classification,
    Marks,
    /// After the new translation or mark is there: in between a pod has two, never none.
    OldTranslations,
    /// Before the NAT chains look at it again, for the same reason.
    OldThrows,
    /// Before the connections are forgotten: one that is opened while its destination is still excluded is
    /// translated by others, and would stay so.
    OldExclusions,
    /// After the pods are classified: else packets of egress pods of other nodes, and of all pods of this one, would
    /// be dropped.
    PodNetworks,
    /// When all guards stand: where others drop what is forwarded, nothing comes by before.
    Accepts,
    /// After everything that decides how connections are translated, and before a pod that is none any more
    /// loses the guard that drops its untranslated packets (25 packets leaked without, in an experiment).
    Connections,
    /// After the connections are forgotten: until then it is the reason to forget them, for a run that died.
    GatewaysHere,
    Unblocks,
    /// Before pods are no longer classified, for the same reason.
    OldPodNetworks,
    OldClassification,
    OldVips,
    OldAccepts,
    OldLandmarks,
    OldSkeletons,
    /// As soon as packets go where they are to go. What is cleared away after that takes longer than all before.
    Challenges,
    /// When ours does all of the work. Chains of a backend come before their sets.
    Remnants,

    /// From here on nothing is marked for what goes away.
    OldRules,
    OldGateways,
    /// Last of a table, for the reason that it is the first.
    OldFallbacks,
}

/// The ordered steps that turn `observed` into `desired`; none when they are equal.
#[must_use]
pub fn diff(observed: &KernelState, desired: &KernelState) -> Vec<Step> {
    let mut steps = Steps::default();
    let nothing = FamilyState::default();
    let mut wrong_sources = observed.doubt && !desired.doubt;
    let mut rerouted = BTreeSet::new();
    for family in Family::ALL {
        let from = observed.families.get(&family).unwrap_or(&nothing);
        let to = desired.families.get(&family).unwrap_or(&nothing);
        let (old, new) = (&from.firewall, &to.firewall);
        routes(family, &from.routes, &to.routes, &old.excluded, &mut steps);
        firewall(family, old, new, observed.doubt, &mut steps);
        // What was opened to a destination that is egress again has the source that others gave it.
        wrong_sources |= becomes_egress(old, new);
        newly_excluded(old, new, &mut steps);
        accepted(family, observed, desired, &mut steps);
        let (before, after) = (from.next_hops(), to.next_hops());
        let is_rerouted = |pod, hop| before.of(pod).is_none_or(|(_, old)| old != hop);
        let pods = after.pods().filter(|(pod, hop)| is_rerouted(*pod, *hop));
        rerouted.extend(pods.map(|(pod, _)| pod));
    }
    if wrong_sources {
        steps.add(Phase::Connections, forget_wrong_sources(observed, desired));
    }
    for remnant in observed.remnants.difference(&desired.remnants) {
        steps.add(Phase::Remnants, Step::RemoveRemnant(*remnant));
    }
    challenges(rerouted, desired, &mut steps);
    steps.in_order()
}

/// Steps with their turns.
#[derive(Default)]
struct Steps(Vec<(Phase, Step)>);

impl Steps {
    fn add(&mut self, phase: Phase, step: impl Into<Step>) {
        self.0.push((phase, step.into()));
    }

    /// Stable: both families go through the phases together, so that a backend can batch them.
    fn in_order(mut self) -> Vec<Step> {
        self.0.sort_by_key(|(phase, _)| *phase);
        self.0.into_iter().map(|(_, step)| step).collect()
    }
}

fn accepted(family: Family, observed: &KernelState, desired: &KernelState, steps: &mut Steps) {
    let (old, new) = (
        observed.accepted.get(&family),
        desired.accepted.get(&family),
    );
    match new {
        _ if old == new => {}
        Some(Accepted::Sources(sources)) => {
            steps.add(Phase::Accepts, Step::Accept(family, sources.clone()));
        }
        Some(Accepted::Damaged) | None => {
            steps.add(Phase::OldAccepts, Step::Accept(family, BTreeSet::new()));
        }
    }
}

fn forget_wrong_sources(observed: &KernelState, desired: &KernelState) -> ConnectionStep {
    let firewalls = || desired.families.values().map(|family| &family.firewall);
    let pods = firewalls().flat_map(|firewall| &firewall.pods);
    let sources = pods.filter_map(|(pod, state)| Some((*pod, source(*pod, state)?)));
    let sources: BTreeMap<IpAddr, IpAddr> = sources.collect();
    let vips = firewalls().flat_map(|firewall| &firewall.vips).copied();
    let is_unguarded = |pod: &&IpAddr| {
        let family = observed.families.get(&Family::of(**pod));
        family.is_some_and(has_lost_its_guard)
    };
    ConnectionStep::ForgetWrongSource {
        unguarded: sources.keys().filter(is_unguarded).copied().collect(),
        sources,
        vips: vips.collect(),
    }
}

/// Whether a guard that had been there was not whole. Not where this is the first one: what is inbound there is what it
/// seems to be.
fn has_lost_its_guard(family: &FamilyState) -> bool {
    match family.firewall.skeleton {
        Skeleton::Intact => false,
        Skeleton::Damaged(_) => true,
        Skeleton::Absent => {
            family.routes != RouteState::default() || family.firewall != FirewallState::default()
        }
    }
}

/// Pods whose connections take another path, or begin anew, are to send something on them. Only egress pods: what others
/// say of a connection that has ended meanwhile is INVALID, skips NAT, and is not guarded.
fn challenges(rerouted: BTreeSet<IpAddr>, desired: &KernelState, steps: &mut Steps) {
    let is_egress_pod = |address: &IpAddr| {
        let family = desired.families.get(&Family::of(*address));
        let pod = family.and_then(|family| family.firewall.pods.get(address));
        pod.is_some_and(|pod| pod.egress && opens_connections_here(pod))
    };
    let forgotten = steps.0.iter().filter_map(|(_, step)| match step {
        Step::Connection(ConnectionStep::Forget(pod)) => Some(*pod),
        _ => None,
    });
    let mut pods = rerouted;
    pods.extend(forgotten.filter(is_egress_pod));
    for pod in pods {
        steps.add(Phase::Challenges, ConnectionStep::ElicitAck(pod));
    }
}

fn routes(
    family: Family,
    from: &RouteState,
    to: &RouteState,
    excluded: &BTreeSet<IpNet>,
    steps: &mut Steps,
) {
    let is_excluded = |net: &IpNet| excluded.iter().any(|wider| wider.contains(net));
    let none = Table::default();
    // Whether a table is still to learn of something that is to go past it. Not only a new one: a run may have died over it.
    let is_incomplete = |id: TableId| {
        let old = from.tables.get(&id).unwrap_or(&none);
        let new = to.tables.get(&id).unwrap_or(&none);
        let mut missing = new.throws.difference(&old.throws);
        missing.any(|net| !is_excluded(net))
    };
    for rule in to.rules.difference(&from.rules) {
        let phase = match rule.action {
            RuleAction::Lookup(id) if is_incomplete(id) => Phase::NewLookupRules,
            _ => Phase::LookupRules,
        };
        steps.add(phase, RouteStep::AddRule(family, *rule));
    }
    for rule in from.rules.difference(&to.rules) {
        steps.add(Phase::OldRules, RouteStep::RemoveRule(family, *rule));
    }
    let ids: BTreeSet<_> = from.tables.keys().chain(to.tables.keys()).collect();
    for id in ids {
        let old = from.tables.get(id).unwrap_or(&none);
        let new = to.tables.get(id).unwrap_or(&none);
        match (old.fallback, new.fallback) {
            (false, true) => steps.add(Phase::Fallbacks, RouteStep::AddFallback(family, *id)),
            (true, false) => steps.add(Phase::OldFallbacks, RouteStep::RemoveFallback(family, *id)),
            (false, false) | (true, true) => {}
        }
        match (&old.gateway, &new.gateway) {
            (old, Some(hop)) if old.as_ref() != Some(hop) => {
                steps.add(Phase::Gateways, RouteStep::SetGateway(*id, hop.clone()));
            }
            (Some(hop), None) => {
                let step = RouteStep::RemoveGateway(*id, hop.clone());
                steps.add(Phase::OldGateways, step);
            }
            (_, Some(_)) | (None, None) => {}
        }
        for net in new.throws.difference(&old.throws) {
            let phase = if is_excluded(net) {
                Phase::Throws
            } else {
                Phase::NewThrows
            };
            steps.add(phase, RouteStep::AddThrow(*id, *net));
        }
        let goes = *new == none;
        for net in old.throws.difference(&new.throws) {
            let phase = if goes {
                Phase::OldGateways
            } else {
                Phase::OldThrows
            };
            steps.add(phase, RouteStep::RemoveThrow(*id, *net));
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
                let leaves = doubt && state.egress;
                pod(*address, state, &PodState::default(), leaves, steps);
            }
            for set in [NetSet::RemotePods, NetSet::LocalPods] {
                for net in from.nets(set) {
                    let step = FirewallStep::RemoveNet(set, *net);
                    steps.add(Phase::OldPodNetworks, step);
                }
            }
            steps.add(Phase::OldSkeletons, FirewallStep::Remove(family));
        }
        return;
    }
    let mut present = from.vips.clone();
    if from.skeleton != Skeleton::Intact {
        // Keeps the translations that are in use: they are removed in their turn.
        present.extend(from.pods.values().flat_map(|pod| pod.vips.iter().copied()));
        present.extend(to.vips.iter().copied());
        let step = FirewallStep::Install(family, present.clone());
        steps.add(Phase::Skeletons, step);
    }
    for vip in to.vips.difference(&present) {
        steps.add(Phase::Vips, FirewallStep::AddVip(*vip));
    }
    for vip in present.difference(&to.vips) {
        steps.add(Phase::OldVips, FirewallStep::RemoveVip(*vip));
    }
    for landmark in to.landmarks.difference(&from.landmarks) {
        let phase = match landmark {
            Landmark::Way(_) if from.skeleton == Skeleton::Intact => Phase::Ways,
            Landmark::Way(_) | Landmark::Node(_) | Landmark::Lan(_) => Phase::Landmarks,
        };
        let step = FirewallStep::AddLandmark(family, landmark.clone());
        steps.add(phase, step);
    }
    for landmark in from.landmarks.difference(&to.landmarks) {
        let step = FirewallStep::RemoveLandmark(family, landmark.clone());
        steps.add(Phase::OldLandmarks, step);
    }
    for set in NetSet::ALL {
        let (add, remove) = match set {
            NetSet::Excluded => (Phase::Exclusions, Phase::OldExclusions),
            NetSet::RemotePods | NetSet::LocalPods => (Phase::PodNetworks, Phase::OldPodNetworks),
        };
        for net in to.nets(set).difference(from.nets(set)) {
            steps.add(add, FirewallStep::AddNet(set, *net));
        }
        for net in from.nets(set).difference(to.nets(set)) {
            steps.add(remove, FirewallStep::RemoveNet(set, *net));
        }
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

fn pod(pod: IpAddr, from: &PodState, to: &PodState, must_forget: bool, steps: &mut Steps) {
    let becomes_gateway = to.gateway_here && (!from.gateway_here || from.interrupted);
    for set in PodSet::ALL {
        let (add, remove) = match set {
            PodSet::Egress | PodSet::Ordinary => (Phase::Classification, Phase::OldClassification),
            PodSet::GatewayHere => (Phase::GatewaysHere, Phase::GatewaysHere),
            PodSet::Blocked => (Phase::Blocks, Phase::Unblocks),
        };
        match (from.is_in(set), to.is_in(set)) {
            (false, true) => steps.add(add, FirewallStep::AddPod(set, pod)),
            (true, false) => steps.add(remove, FirewallStep::RemovePod(set, pod)),
            // Said again: the interruption ends with it.
            (true, true) if set == PodSet::GatewayHere && becomes_gateway => {
                steps.add(add, FirewallStep::AddPod(set, pod));
            }
            (true, true) | (false, false) => {}
        }
    }
    for &vip in to.vips.difference(&from.vips) {
        let step = FirewallStep::Translate { pod, vip };
        steps.add(Phase::Translations, step);
    }
    for &vip in from.vips.difference(&to.vips) {
        let step = FirewallStep::Untranslate { pod, vip };
        steps.add(Phase::OldTranslations, step);
    }
    match (from.mark, to.mark) {
        (old, Some(mark)) if old != Some(mark) => {
            steps.add(Phase::Marks, FirewallStep::Mark { pod, mark });
        }
        (Some(_), None) => steps.add(Phase::Marks, FirewallStep::Unmark(pod)),
        (_, Some(_)) | (None, None) => {}
    }
    // An established connection keeps the translation that it was born with: with the node's address it would
    // keep it for ever, with identity it would leak. And a gateway that is none any more has no use for them.
    let changed = translation(from) != translation(to);
    let uses_this_node = opens_connections_here(from) || opens_connections_here(to);
    let loses_another_nodes_pod = from.gateway_here && !to.gateway_here && to.mark.is_none();
    if must_forget || (uses_this_node && changed) || loses_another_nodes_pod {
        steps.add(Phase::Connections, ConnectionStep::Forget(pod));
    } else if let (true, Some(&source)) = (becomes_gateway, to.vips.first()) {
        // Entries of a node that becomes gateway again have outdated TCP windows. Deleting them heals connections on
        // which the pod sends next, not those on which only the server does: so windows are not looked at from now on.
        steps.add(Phase::Connections, ConnectionStep::Resume { pod, source });
    }
}

/// What ends when destinations are excluded: egress connections to them would go on past their gateway, and show the
/// pod's own address.
fn newly_excluded(from: &FirewallState, to: &FirewallState, steps: &mut Steps) {
    let nets = to.excluded.iter();
    let nets: BTreeSet<IpNet> = nets.flat_map(|net| without(*net, &from.excluded)).collect();
    let pods = from.pods.iter().filter(|(_, pod)| pod.egress);
    let pods: BTreeSet<IpAddr> = pods.map(|(address, _)| *address).collect();
    if !pods.is_empty() && !nets.is_empty() {
        let step = ConnectionStep::ForgetNewlyExcluded { pods, nets };
        steps.add(Phase::Connections, step);
    }
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

#[cfg(test)]
mod tests;
