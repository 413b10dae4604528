//! Goes through histories step by step, and judges what every packet experiences between any two steps.
//!
//! Connections that were opened on the way keep the source address that they were born with, until they are forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use metaleg::cluster::View;
use metaleg::diff::diff;
use metaleg::names::ObjectKey;
use metaleg::plan::Verdict;
use metaleg::plan::slots::Slots;
use metaleg::settings::Settings;
use metaleg::state::{
    ConnectionStep, Family, FamilyState, KernelState, Landmark, PodState, Skeleton, Step,
};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use crate::data_path::{Backend, Fate, Packet, Tracking, fate, masquerade, without_us};
use crate::fixtures::worlds::{name_of, node_address};
use crate::fixtures::{
    With, cluster, endpoint, ip, net, node, nth_node, service, settings_on, slice,
};
use crate::histories::{
    History, Moment, all_pods, any_damage, any_history, destinations, nothing, pairs,
};
use crate::truth::{Truth, Way, packet};

/// A connection in the table of connection tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Connection {
    pod: IpAddr,
    destination: IpAddr,
    /// The source that it leaves with.
    bound: IpAddr,
}

/// A node between two steps.
#[derive(Clone, Debug)]
struct Host {
    by: Backend,
    kernel: KernelState,
    connections: BTreeSet<Connection>,
    /// Pods whose connections were forgotten on the way to the present goal.
    forgotten: BTreeSet<IpAddr>,
    /// So were those to destinations of these families that are inside from now on.
    inside_forgotten: BTreeSet<Family>,
    /// An agent has died on the way there.
    died: bool,
    /// All VIPs that a pod ever had.
    had: BTreeMap<IpAddr, BTreeSet<IpAddr>>,
}

impl Host {
    fn new(by: Backend, kernel: KernelState) -> Host {
        let mut host = Host {
            by,
            kernel,
            connections: BTreeSet::new(),
            forgotten: BTreeSet::new(),
            inside_forgotten: BTreeSet::new(),
            died: false,
            had: BTreeMap::new(),
        };
        host.open_connections(&Family::ALL);
        host
    }

    fn state(&self, family: Family) -> &FamilyState {
        &self.kernel.families[&family]
    }

    fn vips_of(&self, pod: IpAddr) -> BTreeSet<IpAddr> {
        self.had.get(&pod).cloned().unwrap_or_default()
    }

    /// Every pod opens a connection to every destination that it reaches now.
    fn open_connections(&mut self, families: &[Family]) {
        for family in families {
            for (pod, destination) in pairs(*family) {
                let packet = packet(pod, destination, Tracking::New);
                if let Fate::Direct(bound) | Fate::ToGateway { source: bound, .. } =
                    fate(self.by, self.state(*family), &packet)
                {
                    self.connections.insert(Connection {
                        pod,
                        destination,
                        bound,
                    });
                }
            }
        }
    }

    /// A step, and whatever pods do before the next one; returns the families that it may matter to.
    fn apply(&mut self, step: &Step) -> Vec<Family> {
        let before = self.kernel.families.clone();
        self.kernel.apply(step);
        // Not what the cluster says, but what the kernel was told.
        let excluded: Vec<IpNet> = self.kernel.excluded().collect();
        let is_excluded = |c: &Connection| excluded.iter().any(|net| net.contains(&c.destination));
        let forgotten = |c: &Connection| match step {
            Step::Connection(ConnectionStep::Forget(pod)) => c.pod == *pod && !is_excluded(c),
            Step::Connection(ConnectionStep::Resume { pod, source }) => {
                c.pod == *pod && c.bound != *source && !is_excluded(c)
            }
            Step::Connection(ConnectionStep::ForgetWrongSource { sources, .. }) => {
                sources.get(&c.pod).is_some_and(|s| *s != c.bound) && !is_excluded(c)
            }
            Step::Connection(ConnectionStep::ForgetNewlyExcluded { pods, nets }) => {
                pods.contains(&c.pod) && nets.iter().any(|net| net.contains(&c.destination))
            }
            _ => false,
        };
        self.connections.retain(|c| !forgotten(c));
        let families: Vec<Family> = match step {
            Step::Connection(step) => {
                if let ConnectionStep::Forget(pod) | ConnectionStep::Resume { pod, .. } = step {
                    self.forgotten.insert(*pod);
                }
                if let ConnectionStep::ForgetNewlyExcluded { nets, .. } = step {
                    let families = nets.iter().map(|net| Family::of_net(*net));
                    self.inside_forgotten.extend(families);
                }
                Family::ALL.into()
            }
            _ => {
                let changed = |f: &Family| self.kernel.families.get(f) != before.get(f);
                Family::ALL.into_iter().filter(changed).collect()
            }
        };
        self.open_connections(&families);
        families
    }
}

type Truths = BTreeMap<Family, Truth>;

fn truths(view: &View, settings: &Settings) -> Truths {
    let of = |family| (family, Truth::of(family, view, settings));
    Family::ALL.map(of).into()
}

fn is_egress_in(state: &FamilyState, pod: IpAddr) -> bool {
    state
        .firewall
        .pods
        .get(&pod)
        .is_some_and(|pod: &PodState| pod.egress)
}

type Judgement = Result<(), TestCaseError>;

/// The change that is under way in one family.
struct Change<'a> {
    family: Family,
    host: &'a Host,
    before: &'a Truth,
    after: &'a Truth,
}

impl Change<'_> {
    fn state(&self) -> &FamilyState {
        self.host.state(self.family)
    }

    fn fate(&self, packet: &Packet) -> Fate {
        fate(self.host.by, self.state(), packet)
    }

    fn has_lan(&self) -> bool {
        let mut landmarks = self.state().firewall.landmarks.iter();
        landmarks.any(|landmark| matches!(landmark, Landmark::Lan(_)))
    }

    /// I1 with all our routes lost, or rules of others ahead of them: no egress pod shows itself. In the iptables backend
    /// nothing can tell for IPv6.
    fn a_mark_is_no_way(&self) -> Judgement {
        if self.host.by == Backend::Iptables && self.family == Family::V6 {
            return Ok(());
        }
        let lost = FamilyState {
            firewall: self.state().firewall.clone(),
            ..FamilyState::default()
        };
        let outside = |d: IpAddr| !self.before.is_excluded(d) && !self.after.is_excluded(d);
        for (pod, destination) in pairs(self.family).filter(|(_, d)| outside(*d)) {
            let (was, is) = (&self.before.pods[&pod], &self.after.pods[&pod]);
            if !was.is_egress() || !is.is_egress() {
                continue;
            }
            let bound = self.connections(pod, destination).map(|c| c.bound);
            let known = bound.map(Tracking::Established);
            for tracking in std::iter::once(Tracking::New).chain(known) {
                let packet = packet(pod, destination, tracking);
                let fate = fate(self.host.by, &lost, &packet);
                prop_assert_ne!(fate, Fate::Direct(pod), "{:?} without routes", packet);
            }
        }
        Ok(())
    }

    fn connections(&self, pod: IpAddr, destination: IpAddr) -> impl Iterator<Item = &Connection> {
        let all = self.host.connections.iter();
        all.filter(move |c| c.pod == pod && c.destination == destination)
    }

    /// I1 for what becomes outside or inside: whatever a pod opens has its node's address or a VIP, and what it has
    /// opened before, too, when it was forgotten.
    fn no_leak_at_a_border(&self) -> Judgement {
        let moves = |d: IpAddr| self.before.is_excluded(d) != self.after.is_excluded(d);
        for (pod, destination) in pairs(self.family).filter(|(_, d)| moves(*d)) {
            if !self.before.pods[&pod].is_egress() || !self.after.pods[&pod].is_egress() {
                continue;
            }
            let new = packet(pod, destination, Tracking::New);
            let here = masquerade(&new);
            let vips = self.host.vips_of(pod);
            let ended = self.host.inside_forgotten.contains(&self.family);
            let is_over = self.before.is_excluded(destination)
                || (ended && !self.dead_run_excluded(destination));
            let old = self.connections(pod, destination).filter(|_| is_over);
            let old = old.map(|connection| Packet {
                tracking: Tracking::Established(connection.bound),
                ..new
            });
            for packet in std::iter::once(new).chain(old) {
                if let Fate::Direct(source) = self.fate(&packet) {
                    prop_assert!(
                        source == here || vips.contains(&source),
                        "{packet:?} as {source}"
                    );
                }
            }
        }
        Ok(())
    }

    /// I1 for what is outside before and after.
    fn no_leak(&self) -> Judgement {
        let outside = |d: IpAddr| !self.before.is_excluded(d) && !self.after.is_excluded(d);
        for (pod, destination) in pairs(self.family).filter(|(_, d)| outside(*d)) {
            let (before, after) = (&self.before.pods[&pod], &self.after.pods[&pod]);
            let (was, is) = (before.is_egress(), after.is_egress());
            if !was && !is {
                continue;
            }
            let packet = packet(pod, destination, Tracking::New);
            // What an ordinary pod has.
            let here = masquerade(&packet);
            match self.fate(&packet) {
                Fate::Direct(source) => {
                    let is_ordinary = was != is && !is_egress_in(self.state(), pod);
                    let as_node = source == here && is_ordinary;
                    // The VIPs of this change, not of those before.
                    let is_vip = [before.vip, after.vip].contains(&Some(source));
                    prop_assert!(as_node || is_vip, "{packet:?} as {source}");
                }
                Fate::ToGateway { source, .. } => prop_assert_eq!(source, pod, "{:?}", packet),
                Fate::Rejected | Fate::Dropped => {}
            }
            if was && is {
                let invalid = Packet {
                    tracking: Tracking::Invalid,
                    ..packet
                };
                let fate = self.fate(&invalid);
                prop_assert!(
                    matches!(fate, Fate::Dropped | Fate::Rejected),
                    "{invalid:?}: {fate:?}"
                );
            }
            // Connections that are older than our say have the node's address until they are forgotten.
            let older = (!was || !before.passes) && !self.host.forgotten.contains(&pod);
            let vips = self.host.vips_of(pod);
            for connection in self.connections(pod, destination) {
                let packet = Packet {
                    tracking: Tracking::Established(connection.bound),
                    ..packet
                };
                match self.fate(&packet) {
                    Fate::Direct(source) => {
                        let as_node = source == here && (older || !is);
                        prop_assert!(as_node || vips.contains(&source), "{packet:?} as {source}");
                    }
                    // With a VIP of the time when this node was the gateway: its guard there drops it.
                    Fate::ToGateway { source, .. } => prop_assert!(
                        source == pod || vips.contains(&source) || (source == here && older),
                        "{packet:?} to the gateway as {source}"
                    ),
                    Fate::Rejected | Fate::Dropped => {}
                }
            }
        }
        Ok(())
    }

    /// I2: what is not ours is as without us.
    fn no_theft(&self) -> Judgement {
        let untouched = |packet: Packet| -> Judgement {
            prop_assert_eq!(self.fate(&packet), without_us(&packet), "{:?}", packet);
            Ok(())
        };
        for destination in destinations(self.family) {
            let excluded =
                self.before.is_excluded(destination) && self.after.is_excluded(destination);
            let here = node_address(self.family, 1);
            for tracking in [
                Tracking::New,
                Tracking::Established(here),
                Tracking::Reply,
                Tracking::Invalid,
            ] {
                untouched(Packet {
                    host: true,
                    ..packet(here, destination, tracking)
                })?;
            }
            for pod in all_pods(self.family) {
                untouched(packet(pod, destination, Tracking::Reply))?;
                let is_ordinary = |truth: &Truth| truth.pods[&pod].way == Way::Ordinary;
                let stays_ordinary = is_ordinary(self.before) && is_ordinary(self.after);
                if !excluded && !stays_ordinary {
                    continue;
                }
                let bound = masquerade(&packet(pod, destination, Tracking::New));
                for tracking in [
                    Tracking::New,
                    Tracking::Established(bound),
                    Tracking::Invalid,
                ] {
                    untouched(packet(pod, destination, tracking))?;
                }
            }
        }
        Ok(())
    }

    /// VIPs are guarded: their packets that stray here go no further, and the node's own do.
    fn vips_are_guarded(&self) -> Judgement {
        for vip in self.before.vips.intersection(&self.after.vips) {
            let outside = destinations(self.family)[0];
            let to = packet(outside, *vip, Tracking::New);
            let from = packet(*vip, outside, Tracking::New);
            if self.has_lan() {
                prop_assert_eq!(self.fate(&to), Fate::Dropped);
            }
            // A node may be the router of others.
            prop_assert_eq!(self.fate(&from), without_us(&from));
            let own = Packet {
                host: true,
                ..packet(node_address(self.family, 1), *vip, Tracking::New)
            };
            prop_assert_eq!(self.fate(&own), without_us(&own));
        }
        Ok(())
    }

    fn judge(&self, was_intact: bool) -> Judgement {
        self.no_leak()?;
        self.no_leak_at_a_border()?;
        self.no_theft()?;
        if was_intact {
            self.a_mark_is_no_way()?;
            self.vips_are_guarded()?;
        }
        Ok(())
    }

    /// Not promised: that connections to a destination end when the agent that excluded it died before it ended them. The
    /// next one finds the destination excluded, and nothing new.
    fn dead_run_excluded(&self, destination: IpAddr) -> bool {
        self.host.died && !self.before.is_excluded(destination)
    }

    /// The end of a change: every packet, also of every connection that is still there, goes as the cluster wants.
    fn arrived(&self) -> Judgement {
        let truth = self.after;
        for (pod, destination) in pairs(self.family) {
            let new = packet(pod, destination, Tracking::New);
            let is_inside = truth.is_excluded(destination);
            let shows_itself = masquerade(&new) != pod
                && self.connections(pod, destination).any(|c| c.bound == pod);
            prop_assert!(
                !shows_itself || !is_inside || self.dead_run_excluded(destination),
                "{new:?} shows itself"
            );
            let Some(wanted) = truth.wanted(&new) else {
                continue;
            };
            prop_assert_eq!(self.fate(&new), wanted, "{:?}", new);
            let facts = &truth.pods[&pod];
            if is_inside || !facts.is_egress() || !facts.passes {
                continue;
            }
            for connection in self.connections(pod, destination) {
                let packet = Packet {
                    tracking: Tracking::Established(connection.bound),
                    ..new
                };
                prop_assert_eq!(self.fate(&packet), wanted, "{:?}", packet);
            }
        }
        Ok(())
    }
}

/// Follows one moment, with every judge after every step. Where the agent dies, the next one goes on with what it finds.
fn follow(
    host: &mut Host,
    slots: Slots,
    before: &Truths,
    moment: &Moment,
) -> Result<Slots, TestCaseError> {
    let after = truths(&moment.view, &moment.settings);
    for truth in before.values().chain(after.values()) {
        for (pod, facts) in &truth.pods {
            host.had.entry(*pod).or_default().extend(facts.vip);
        }
    }
    host.forgotten.clear();
    host.inside_forgotten.clear();
    host.died = false;
    let was_intact: BTreeMap<Family, bool> = (host.kernel.families.iter())
        .map(|(family, state)| (*family, state.firewall.skeleton == Skeleton::Intact))
        .collect();
    let mut slots = slots;
    let mut restarted = moment.restarted;
    let mut death = moment.death;
    host.kernel.remnants.extend(&moment.remnants);
    loop {
        host.kernel = moment.found(&host.kernel, restarted);
        if restarted {
            slots = Slots::adopt(&host.kernel, &moment.settings);
        }
        let desired = moment.plan(&slots);
        let steps = diff(&host.kernel, &desired.kernel);
        let told = |step: Option<&Step>, error: TestCaseError| {
            let steps: Vec<String> = steps.iter().map(Step::to_string).collect();
            let step = step.map(Step::to_string);
            TestCaseError::fail(format!("after {step:?} of {steps:#?}: {error}"))
        };
        let alive = death.unwrap_or(steps.len()).min(steps.len());
        for step in std::iter::once(None).chain(steps.iter().take(alive).map(Some)) {
            if let Some(Step::RemoveRemnant(_)) = step {
                // Ours does all of the work by now.
                let is_done = host.kernel.families.iter().all(|(family, state)| {
                    state.firewall == desired.kernel.families[family].firewall
                });
                prop_assert!(is_done, "a remnant goes too early");
            }
            let families = match step {
                Some(step) => host.apply(step),
                None => Family::ALL.into(),
            };
            for family in families {
                let change = Change {
                    family,
                    host,
                    before: &before[&family],
                    after: &after[&family],
                };
                change
                    .judge(was_intact[&family])
                    .map_err(|error| told(step, error))?;
            }
        }
        if alive == steps.len() {
            arrived(host, &desired.kernel, before, &after)?;
            plan_agrees(&desired.services, &after)?;
            if host.died {
                // What `dead_run_excluded` says.
                let is_outside =
                    |c: &Connection| !after[&Family::of(c.pod)].is_excluded(c.destination);
                host.connections.retain(is_outside);
            }
            return Ok(desired.slots);
        }
        (death, restarted, host.died) = (None, true, true);
    }
}

fn arrived(host: &Host, desired: &KernelState, before: &Truths, after: &Truths) -> Judgement {
    prop_assert_eq!(&host.kernel, desired);
    for family in Family::ALL {
        let change = Change {
            family,
            host,
            before: &before[&family],
            after: &after[&family],
        };
        change.arrived()?;
    }
    Ok(())
}

/// What the plan says of each Service, and why.
fn plan_agrees(
    planned: &BTreeMap<ObjectKey, BTreeMap<Family, Verdict>>,
    truths: &Truths,
) -> Judgement {
    for (family, truth) in truths {
        let of_family = planned
            .iter()
            .filter_map(|(key, verdicts)| Some((key.clone(), verdicts.get(family)?.clone())));
        let of_family: BTreeMap<_, _> = of_family.collect();
        prop_assert_eq!(&of_family, &truth.services);
    }
    Ok(())
}

/// Goes through a history step by step, with every judge after every step.
fn judge(history: &History) -> Judgement {
    let mut moments = history.moments.iter();
    let mut slots = Slots::default();
    let mut before: Truths = Family::ALL
        .map(|family| (family, Truth::nothing(family)))
        .into();
    let mut host = match history.from_nothing {
        true => Host::new(history.by, nothing()),
        false => {
            let first = moments.next().unwrap();
            let desired = first.plan(&slots);
            slots = desired.slots;
            before = truths(&first.view, &first.settings);
            Host::new(history.by, desired.kernel)
        }
    };
    for moment in moments {
        slots = follow(&mut host, slots, &before, moment)?;
        before = truths(&moment.view, &moment.settings);
    }
    Ok(())
}

/// An agent that is started finds this kernel, and makes it what it should be.
fn repair(kernel: KernelState, moment: &Moment) -> Judgement {
    let mut host = Host::new(moment.by(), kernel);
    host.kernel = moment.found(&host.kernel, true);
    let after = truths(&moment.view, &moment.settings);
    let desired = moment
        .plan(&Slots::adopt(&host.kernel, &moment.settings))
        .kernel;
    for step in diff(&host.kernel, &desired) {
        host.apply(&step);
    }
    arrived(&host, &desired, &after, &after)
}

fn config(cases: u32) -> ProptestConfig {
    let saved = FileFailurePersistence::Direct("proptest-regressions/model.txt");
    ProptestConfig {
        failure_persistence: Some(Box::new(saved)),
        ..ProptestConfig::with_cases(cases)
    }
}

proptest! {
    // Every case is some 100 steps with hundreds of packets after each.
    #![proptest_config(config(300))]

    #[test]
    fn i1_i2_no_prefix_of_a_change_leaks_or_steals(history in any_history()) {
        judge(&history)?;
    }
}

proptest! {
    #![proptest_config(config(300))]

    #[test]
    fn i5_damage_is_repaired_for_every_packet((moment, damaged) in any_damage()) {
        repair(damaged, &moment)?;
    }
}

// === what was once missed ===

/// A node that is the gateway of a pod of its own.
fn small() -> View {
    View::default()
        .with(nth_node(1))
        .with(service("s0").vip("192.0.2.200").announced_by("node1"))
        .with(slice("s0", "s0", [endpoint("10.244.1.11", "node1")]))
}

fn small_plan(view: &View, settings: &Settings) -> KernelState {
    Moment::of(view.clone(), settings.clone())
        .plan(&Slots::default())
        .kernel
}

#[test]
fn i1_a_connection_opened_just_before_its_destination_is_egress_again() {
    let settings = settings_on("node1");
    let mut excluding = settings.clone();
    excluding.excluded.listed.insert(net("10.9.0.0/16"));
    let before = small_plan(&small(), &excluding);
    repair(before, &Moment::of(small(), settings)).unwrap();
}

#[test]
fn i1_a_connection_opened_while_the_firewall_was_damaged() {
    let settings = settings_on("node1");
    let mut damaged = small_plan(&small(), &settings);
    for state in damaged.families.values_mut() {
        state.firewall.skeleton = Skeleton::Damaged("a jump is missing".to_owned());
    }
    repair(damaged, &Moment::of(small(), settings)).unwrap();
}

#[test]
fn i1_a_connection_that_a_dead_run_did_not_come_to_forget() {
    let settings = settings_on("node1");
    let mut unlabelled = small();
    unlabelled.services.clear();
    let before = small_plan(&unlabelled, &settings);
    let steps = diff(&before, &small_plan(&small(), &settings)).len();
    // Every death, the one just before the connections are forgotten among them.
    for death in 0..steps {
        let moment = Moment {
            death: Some(death),
            ..Moment::of(small(), settings.clone())
        };
        let history = History {
            by: Backend::Nftables,
            from_nothing: false,
            moments: vec![Moment::of(unlabelled.clone(), settings.clone()), moment],
        };
        judge(&history).unwrap();
    }
}

/// Saved seeds are numbers for one generator: what this one's predecessors found is written down.
#[test]
fn i1_a_pod_of_another_node_gets_another_service_and_this_node_as_gateway() {
    let settings = settings_on("node1");
    let view = |name: &str| {
        View::default()
            .with(node("node1"))
            .with(service(name).families(&[Family::V4]).vip("192.0.2.201"))
            .with(slice(name, name, [endpoint("10.244.3.11", "node3")]))
    };
    let mut after = view("s2");
    after.announcers.insert(ip("192.0.2.201"), name_of(1));
    let history = History {
        by: Backend::Nftables,
        from_nothing: true,
        moments: vec![
            Moment::of(view("s0"), settings.clone()),
            Moment::of(after, settings),
        ],
    };
    judge(&history).unwrap();
}

#[test]
fn i1_a_service_loses_its_vip_and_the_node_its_pod_network() {
    let settings = settings_on("node1");
    let before = cluster()
        .with(service("s2").vip("192.0.2.200").announced_by("node2"))
        .with(slice("s2", "s2", [endpoint("10.244.1.11", "node1")]));
    let after = View::default()
        .with(node("node1"))
        .with(service("s2"))
        .with(slice("s2", "s2", [endpoint("10.244.1.11", "node1")]));
    let history = History {
        by: Backend::Nftables,
        from_nothing: false,
        moments: vec![
            Moment::of(before, settings.clone()),
            Moment::of(after, settings),
        ],
    };
    judge(&history).unwrap();
}
