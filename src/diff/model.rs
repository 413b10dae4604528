//! A model of the data path: what one packet experiences on a node whose kernel holds a given state.
//!
//! The steps between two plans are applied one by one, and after each of them every kind of packet is sent
//! through the model: a promise is kept if it is kept by every prefix. Connections that were opened on the way
//! keep the source address that they were born with, until they are forgotten.
//!
//! The model follows the chains and rules, not the code that writes them. One family is enough: families share
//! no kernel object.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;

use crate::cluster::leases::BootId;
use crate::cluster::{Endpoint, EndpointSlice, Node, OnNoGateway, Service, Target, View};
use crate::diff::diff;
use crate::names::{Interface, NodeName, ObjectKey};
use crate::plan::slots::Slots;
use crate::plan::{Desired, plan};
use crate::settings::{FwMask, Settings};
use crate::state::{
    ConnectionStep, Family, FamilyState, FirewallState, KernelState, PodState, RouteState, Rule,
    RuleAction, Skeleton, Step, Table,
};

// === the model ===

/// What connection tracking says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tracking {
    /// The first one of its connection: its translation is decided.
    New,
    /// In the original direction of a known connection, which leaves with this source; the sender's own address
    /// if nothing or the identity was decided.
    Established(IpAddr),
    /// The answer to a connection that the other side opened.
    Reply,
    /// Of no connection: it has no direction, and skips NAT.
    Invalid,
}

/// A packet on its way through the node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet {
    /// The source as it arrives.
    pub(super) source: IpAddr,
    /// Sent by the node itself: passes neither `PREROUTING` nor `FORWARD`.
    pub(super) host: bool,
    /// The destination, after DNAT if there was one.
    pub(super) destination: IpAddr,
    pub(super) tracking: Tracking,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Goes where the node's own routes say, with this source.
    Direct(IpAddr),
    /// Goes to a gateway.
    ToGateway {
        /// The gateway's address.
        via: IpAddr,
        /// The source that it has there.
        source: IpAddr,
    },
    /// The sender learns that there is no way out.
    Rejected,
    Dropped,
}

/// What the routing rules decide.
enum Way {
    Main,
    Via(IpAddr),
    Unreachable,
}

pub(super) fn fate(state: &FamilyState, packet: &Packet) -> Fate {
    let firewall = &state.firewall;
    // Chains that are not whole may do anything; the least that they may do is nothing.
    let in_force = firewall.skeleton == Skeleton::Intact && !packet.host;
    let unknown = PodState::default();
    let pod = firewall.pods.get(&packet.source).unwrap_or(&unknown);
    let mark = pod
        .mark
        .filter(|_| in_force && packet.tracking != Tracking::Reply)
        .map_or(0, |mark| mark.value);
    let way = way(&state.routes, mark, packet);
    if matches!(way, Way::Unreachable) {
        return Fate::Rejected;
    }
    if in_force && let Some(end) = guard(firewall, pod, mark, packet) {
        return end;
    }
    let source = match packet.tracking {
        Tracking::New if firewall.skeleton == Skeleton::Intact => {
            translate(firewall, pod, mark, packet)
        }
        Tracking::New => masquerade(packet),
        Tracking::Established(source) => source,
        Tracking::Reply | Tracking::Invalid => packet.source,
    };
    match way {
        Way::Via(via) => Fate::ToGateway { via, source },
        _ => Fate::Direct(source),
    }
}

/// What would become of a packet on a node without us.
fn without_us(packet: &Packet) -> Fate {
    fate(&FamilyState::default(), packet)
}

fn way(routes: &RouteState, mark: u32, packet: &Packet) -> Way {
    let rules: Vec<&Rule> = routes.rules.iter().collect();
    let mut next = 0;
    while let Some(rule) = rules.get(next) {
        next += 1;
        let marked = rule.mark.is_none_or(|m| mark & m.mask == m.value);
        let towards = rule.to.is_none_or(|net| net.contains(&packet.destination));
        let by = rule.from.is_none_or(|source| source == packet.source);
        if (marked && towards && by) == rule.not {
            continue;
        }
        match rule.action {
            RuleAction::Nop => {}
            RuleAction::Unreachable => return Way::Unreachable,
            // A table that lost everything has no match, and the lookup goes on.
            RuleAction::Lookup(table) => match routes.tables.get(&table) {
                Some(Table {
                    gateway: Some(hop), ..
                }) => return Way::Via(hop.via),
                Some(Table { fallback: true, .. }) => return Way::Unreachable,
                _ => {}
            },
            // Without its target, a `goto` is passed over.
            RuleAction::Goto(priority) => {
                let target = rules.iter().position(|rule| rule.priority == priority);
                next = target.unwrap_or(next);
            }
        }
    }
    Way::Main
}

/// The chains that drop and reject what is forwarded, in their order.
fn guard(firewall: &FirewallState, pod: &PodState, mark: u32, packet: &Packet) -> Option<Fate> {
    let Packet {
        source,
        destination,
        tracking,
        ..
    } = *packet;
    let within = |nets: &BTreeSet<IpNet>, ip| nets.iter().any(|net| net.contains(&ip));
    let starts = matches!(tracking, Tracking::New | Tracking::Invalid);
    if starts && firewall.vips.contains(&destination) {
        return Some(Fate::Dropped);
    }
    if firewall.vips.contains(&source) {
        return Some(Fate::Dropped);
    }
    if within(&firewall.excluded, destination) || tracking == Tracking::Reply {
        return None;
    }
    if pod.blocked {
        return Some(Fate::Rejected);
    }
    // To the kernel, a connection that was translated to its own address is not translated.
    let untranslated = tracking == Tracking::Established(source);
    let escapes = tracking == Tracking::Invalid || (untranslated && mark == 0);
    if pod.egress && escapes {
        return Some(Fate::Dropped);
    }
    if within(&firewall.remote_pods, source) && !pod.egress {
        return Some(Fate::Dropped);
    }
    if within(&firewall.local_pods, source) && !pod.egress && !pod.ordinary {
        return Some(Fate::Dropped);
    }
    None
}

/// The source that a new connection gets.
fn translate(firewall: &FirewallState, pod: &PodState, mark: u32, packet: &Packet) -> IpAddr {
    let excluded = &firewall.excluded;
    if !pod.egress || excluded.iter().any(|n| n.contains(&packet.destination)) {
        masquerade(packet)
    } else if mark != 0 {
        packet.source
    } else {
        // In the middle of a change there may be two: which one counts is the order of the rules.
        let vip = pod.vips.iter().find(|vip| firewall.vips.contains(vip));
        vip.copied().unwrap_or_else(|| masquerade(packet))
    }
}

/// What the CNI plugin does after us: pods have the node's address outside the pod network.
fn masquerade(packet: &Packet) -> IpAddr {
    let pods = net("10.244.0.0/16");
    if pods.contains(&packet.source) && !pods.contains(&packet.destination) {
        ip("192.0.2.11")
    } else {
        packet.source
    }
}

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
    state: FamilyState,
    connections: BTreeSet<Connection>,
    /// Pods whose connections were forgotten on the way to the present goal.
    forgotten: BTreeSet<IpAddr>,
    /// So were those to destinations that are inside from now on.
    inside_forgotten: bool,
}

impl Host {
    fn new(state: &KernelState) -> Host {
        let state = v4(state).clone();
        let mut host = Host {
            state,
            connections: BTreeSet::new(),
            forgotten: BTreeSet::new(),
            inside_forgotten: false,
        };
        host.open_connections();
        host
    }

    fn kernel(&self) -> KernelState {
        KernelState {
            families: [(Family::V4, self.state.clone())].into(),
            ..KernelState::default()
        }
    }

    /// Every pod opens a connection to every destination that it reaches now.
    fn open_connections(&mut self) {
        for (pod, destination) in pairs() {
            let packet = packet(pod, destination, Tracking::New);
            if let Fate::Direct(bound) | Fate::ToGateway { source: bound, .. } =
                fate(&self.state, &packet)
            {
                self.connections.insert(Connection {
                    pod,
                    destination,
                    bound,
                });
            }
        }
    }

    /// A step on the way to `after`, and whatever pods do before the next one.
    fn apply(&mut self, step: &Step, after: &FamilyState) {
        let mut kernel = self.kernel();
        kernel.apply(step);
        self.state = v4(&kernel).clone();
        if let Step::Connection(ConnectionStep::Forget(pod))
        | Step::Connection(ConnectionStep::Resume { pod, .. }) = step
        {
            self.forgotten.insert(*pod);
        }
        let is_forgotten = |c: &Connection| match step {
            Step::Connection(ConnectionStep::Forget(pod)) => c.pod == *pod,
            Step::Connection(ConnectionStep::Resume { pod, source }) => {
                c.pod == *pod && c.bound != *source
            }
            Step::Connection(ConnectionStep::ForgetWrongSource { sources, .. }) => {
                sources.get(&c.pod).is_some_and(|s| *s != c.bound)
            }
            _ => false,
        };
        self.inside_forgotten |= matches!(
            step,
            Step::Connection(ConnectionStep::ForgetNewlyExcluded { .. })
        );
        let is_inside = |c: &Connection| match step {
            Step::Connection(ConnectionStep::ForgetNewlyExcluded { pods, nets }) => {
                pods.contains(&c.pod) && nets.iter().any(|net| net.contains(&c.destination))
            }
            _ => false,
        };
        self.connections
            .retain(|c| !is_inside(c) && (!is_forgotten(c) || is_excluded(after, c.destination)));
        self.open_connections();
    }

    /// What a run does that has just read the kernel.
    fn reconcile(&mut self, after: &KernelState) {
        let observed = KernelState {
            doubt: true,
            ..self.kernel()
        };
        for step in diff(&observed, after) {
            self.apply(&step, v4(after));
        }
    }
}

// === the cast ===

/// Addresses of this node, `node1`, and of the others.
const NODES: u8 = 4;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn node(n: u8) -> NodeName {
    NodeName(format!("node{n}"))
}

fn node_address(n: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, 10 + n])
}

fn pod(n: u8, last: u8) -> IpAddr {
    IpAddr::from([10, 244, n, last])
}

fn vip(n: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, 200 + n])
}

fn key(n: u8) -> ObjectKey {
    ObjectKey {
        namespace: "shop".to_owned(),
        name: format!("s{n}"),
    }
}

/// All pods, of this node and of others; which of them are egress pods is the Services' matter.
fn all_pods() -> impl Iterator<Item = IpAddr> {
    (1..=NODES).flat_map(|n| [pod(n, 11), pod(n, 12)])
}

fn is_of_this_node(pod: IpAddr) -> bool {
    net("10.244.1.0/24").contains(&pod)
}

/// Always outside; outside unless the operator's pod networks are unknown; a node; a pod; cloud metadata.
fn destinations() -> [IpAddr; 5] {
    [
        "203.0.113.7",
        "10.9.0.1",
        "192.0.2.12",
        "10.244.1.99",
        "169.254.169.254",
    ]
    .map(ip)
}

fn pairs() -> impl Iterator<Item = (IpAddr, IpAddr)> {
    all_pods().flat_map(|pod| destinations().map(|destination| (pod, destination)))
}

fn packet(source: IpAddr, destination: IpAddr, tracking: Tracking) -> Packet {
    Packet {
        source,
        host: (1..=NODES).any(|n| node_address(n) == source),
        destination,
        tracking,
    }
}

fn v4(state: &KernelState) -> &FamilyState {
    &state.families[&Family::V4]
}

fn pod_in(state: &FamilyState, pod: IpAddr) -> PodState {
    state.firewall.pods.get(&pod).cloned().unwrap_or_default()
}

fn is_excluded(state: &FamilyState, destination: IpAddr) -> bool {
    let nets = &state.firewall.excluded;
    nets.iter().any(|net| net.contains(&destination))
}

/// Whether the pod's packets pass this node, as far as it knows: the pod is here, or its gateway is.
fn passes_here(state: &FamilyState, pod: IpAddr) -> bool {
    let state = pod_in(state, pod);
    is_of_this_node(pod) || state.gateway_here || state.mark.is_some()
}

// === clusters ===

/// The usual settings, with few or many marks, with and without filters.
fn any_settings() -> impl Strategy<Value = Settings> {
    let mask = prop_oneof![
        4 => Just(0x00f0_0000),
        1 => Just(0x0030_0000),
        1 => Just(0x0010_0000),
    ];
    let mostly = || prop::bool::weighted(0.8);
    (mask, mostly(), mostly()).prop_map(|(mask, filter, guard)| Settings {
        mask: FwMask::new(mask).unwrap(),
        filter_endpoints_for_node: filter,
        guard_transit: guard,
        ..Settings::default_on("node1")
    })
}

/// Small clusters in which everything that matters may be missing or shared.
fn any_view() -> impl Strategy<Value = View> {
    let mostly = || prop::bool::weighted(0.9);
    let nodes = proptest::collection::vec((mostly(), mostly(), mostly()), usize::from(NODES));
    let service = (
        0..2_i64,
        prop::option::weighted(0.8, 0..3_u8),
        prop::option::weighted(0.8, 1..=NODES),
    );
    let services = proptest::collection::vec(prop::option::weighted(0.8, service), 3);
    let endpoint = (0..3_u8, 1..=NODES, 11..=12_u8);
    let endpoints = proptest::collection::vec(endpoint, 0..8);
    (nodes, services, endpoints, mostly()).prop_map(|(nodes, services, endpoints, on_link)| {
        let mut view = View::default();
        for (n, (there, has_address, has_net)) in (1..).zip(nodes) {
            let address = has_address.then(|| node_address(n));
            let pod_net = has_net.then(|| net(&format!("10.244.{n}.0/24")));
            let facts = Node {
                addresses: address.into_iter().collect(),
                pod_cidrs: pod_net.into_iter().collect(),
                ready: true,
                programmed: Some(BootId("first".to_owned())),
                ..Node::default()
            };
            if there || n == 1 {
                view.nodes.insert(node(n), facts);
            }
        }
        for (n, service) in (0..).zip(services) {
            let Some((created, address, announcer)) = service else {
                continue;
            };
            let facts = Service {
                uid: String::new(),
                created,
                load_balancer: true,
                families: [Family::V4].into(),
                vips: address.map(|n| (Family::V4, vip(n))).into_iter().collect(),
                hostname: None,
                on_no_gateway: OnNoGateway::Reject,
                selector: BTreeMap::new(),
            };
            if let (Some(announcer), Some(vip)) = (announcer, facts.vips.get(&Family::V4)) {
                view.announcers.insert(*vip, node(announcer));
            }
            view.services.insert(key(n), facts);
        }
        for (service, n, last) in endpoints {
            let endpoint = Endpoint {
                addresses: vec![pod(n, last).to_string()],
                node: Some(node(n)),
                target: Target::Pod(key(service)),
            };
            let slice = view
                .slices
                .entry(key(service))
                .or_insert_with(|| EndpointSlice {
                    service: key(service),
                    endpoints: Vec::new(),
                });
            slice.endpoints.push(endpoint);
        }
        let lan = Interface {
            name: "eth0".to_owned(),
            nets: [net("192.0.2.0/24")].into(),
        };
        view.links = on_link.then_some(lan).into_iter().collect();
        view
    })
}

fn plan_after(view: &View, settings: &Settings, slots: &Slots) -> Desired {
    plan(view, settings, &[Family::V4].into(), slots)
}

/// What a node goes through: the kernel states of successive plans, with the view behind each.
type History = Vec<(View, KernelState)>;

fn any_history() -> impl Strategy<Value = History> {
    (
        any_settings(),
        prop::bool::weighted(0.2),
        proptest::collection::vec(any_view(), 2..4),
    )
        .prop_map(|(settings, first_start, views)| {
            let mut history = Vec::new();
            let mut slots = Slots::default();
            if first_start {
                let nothing = [(Family::V4, FamilyState::default())].into();
                history.push((
                    View::default(),
                    KernelState {
                        families: nothing,
                        ..KernelState::default()
                    },
                ));
            }
            for view in views {
                let desired = plan_after(&view, &settings, &slots);
                slots = desired.slots;
                history.push((view, desired.kernel));
            }
            history
        })
}

/// A plan, and what damage may have left of it.
fn any_damage() -> impl Strategy<Value = (View, KernelState, KernelState)> {
    let kept = proptest::collection::vec(prop::bool::weighted(0.8), 64);
    let kept = (kept.clone(), kept);
    (
        any_settings(),
        any_view(),
        any_view(),
        any::<bool>(),
        any::<bool>(),
        kept,
    )
        .prop_map(|(settings, old, view, changed, whole, (kept, kept_here))| {
            let old = if changed { &old } else { &view };
            let old = plan_after(old, &settings, &Slots::default());
            let desired = plan_after(&view, &settings, &old.slots);
            let mut state = v4(&old.kernel).clone();
            let mut kept = kept.iter().chain(&kept_here).copied().cycle();
            let mut keep = || kept.next().unwrap_or(true);
            state.routes.rules.retain(|_| keep());
            for table in state.routes.tables.values_mut() {
                table.fallback = keep();
                table.gateway = table.gateway.take().filter(|_| keep());
            }
            state.firewall.excluded.retain(|_| keep());
            state.firewall.remote_pods.retain(|_| keep());
            for pod in state.firewall.pods.values_mut() {
                pod.egress &= keep();
                pod.mark = pod.mark.filter(|_| keep());
                pod.vips.retain(|_| keep());
                pod.blocked ^= !keep();
                pod.gateway_here &= keep();
            }
            // What is empty cannot be observed.
            state.routes.tables.retain(|_, t| *t != Table::default());
            let pods = &mut state.firewall.pods;
            pods.retain(|_, pod| *pod != PodState::default());
            if !whole {
                state.firewall.vips.retain(|_| keep());
                state.firewall.skeleton = Skeleton::Damaged("a jump is missing".to_owned());
            }
            let families = [(Family::V4, state)].into();
            (
                view,
                KernelState {
                    families,
                    ..KernelState::default()
                },
                desired.kernel,
            )
        })
}

// === the judges ===

type Verdict = Result<(), TestCaseError>;

/// I1 between two steps, for what becomes outside or inside: whatever a pod opens has its node's address or a VIP, and
/// what it has opened before, too, when it was forgotten.
fn no_leak_at_a_border(
    host: &Host,
    (before, after): (&FamilyState, &FamilyState),
    had: &BTreeMap<IpAddr, BTreeSet<IpAddr>>,
) -> Verdict {
    let moves = |d: IpAddr| is_excluded(before, d) != is_excluded(after, d);
    let none = BTreeSet::new();
    for (pod, destination) in pairs().filter(|(_, d)| moves(*d)) {
        if !pod_in(before, pod).egress || !pod_in(after, pod).egress {
            continue;
        }
        let new = packet(pod, destination, Tracking::New);
        let here = masquerade(&new);
        let vips = had.get(&pod).unwrap_or(&none);
        let connections = host.connections.iter();
        let own = connections.filter(|c| c.pod == pod && c.destination == destination);
        let old = own.filter(|_| host.inside_forgotten || is_excluded(before, destination));
        let old = old.map(|connection| Packet {
            tracking: Tracking::Established(connection.bound),
            ..new
        });
        for packet in std::iter::once(new).chain(old) {
            if let Fate::Direct(source) = fate(&host.state, &packet) {
                prop_assert!(
                    source == here || vips.contains(&source),
                    "{packet:?} as {source}"
                );
            }
        }
    }
    Ok(())
}

/// I1 between two steps, for what is outside before and after.
fn no_leak(
    host: &Host,
    (before, after): (&FamilyState, &FamilyState),
    had: &BTreeMap<IpAddr, BTreeSet<IpAddr>>,
) -> Verdict {
    let outside = |d: IpAddr| !is_excluded(before, d) && !is_excluded(after, d);
    let none = BTreeSet::new();
    for (pod, destination) in pairs().filter(|(_, d)| outside(*d)) {
        let (was, is) = (pod_in(before, pod).egress, pod_in(after, pod).egress);
        if !was && !is {
            continue;
        }
        let vips = had.get(&pod).unwrap_or(&none);
        let packet = packet(pod, destination, Tracking::New);
        // What an ordinary pod has.
        let here = masquerade(&packet);
        let known = pod_in(&host.state, pod).egress;
        match fate(&host.state, &packet) {
            Fate::Direct(source) => {
                let released = was && !is;
                let not_yet = is && !was && !known;
                let as_node = source == here && (released || not_yet);
                // The VIPs of this change, not of those before.
                let vips = &pod_in(before, pod).vips | &pod_in(after, pod).vips;
                prop_assert!(as_node || vips.contains(&source), "{packet:?} as {source}");
            }
            Fate::ToGateway { source, .. } => prop_assert_eq!(source, pod, "{:?}", packet),
            Fate::Rejected | Fate::Dropped => {}
        }
        if was && is {
            let invalid = Packet {
                tracking: Tracking::Invalid,
                ..packet
            };
            let fate = fate(&host.state, &invalid);
            prop_assert!(
                matches!(fate, Fate::Dropped | Fate::Rejected),
                "{invalid:?}: {fate:?}"
            );
        }
        // Connections that are older than our say have the node's address until they are forgotten.
        let older = (!was || !passes_here(before, pod)) && !host.forgotten.contains(&pod);
        let connections = host.connections.iter();
        for connection in connections.filter(|c| c.pod == pod && c.destination == destination) {
            let packet = Packet {
                tracking: Tracking::Established(connection.bound),
                ..packet
            };
            match fate(&host.state, &packet) {
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

/// I2 between two steps: what is not ours is as without us.
fn no_theft(state: &FamilyState, before: &FamilyState, after: &FamilyState) -> Verdict {
    let untouched = |packet: Packet| -> Verdict {
        prop_assert_eq!(fate(state, &packet), without_us(&packet), "{:?}", packet);
        Ok(())
    };
    for destination in destinations() {
        let excluded = is_excluded(before, destination) && is_excluded(after, destination);
        let here = node_address(1);
        for tracking in [
            Tracking::New,
            Tracking::Established(here),
            Tracking::Reply,
            Tracking::Invalid,
        ] {
            untouched(packet(here, destination, tracking))?;
        }
        for pod in all_pods() {
            untouched(packet(pod, destination, Tracking::Reply))?;
            let is_egress = pod_in(before, pod).egress || pod_in(after, pod).egress;
            let ordinary = is_of_this_node(pod) && !is_egress;
            if !ordinary && !excluded {
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
fn vips_are_guarded(state: &FamilyState, before: &FamilyState, after: &FamilyState) -> Verdict {
    for vip in before.firewall.vips.intersection(&after.firewall.vips) {
        let outside = ip("203.0.113.7");
        let to = packet(outside, *vip, Tracking::New);
        let from = packet(*vip, outside, Tracking::New);
        prop_assert_eq!(fate(state, &to), Fate::Dropped);
        prop_assert_eq!(fate(state, &from), Fate::Dropped);
        let own = packet(node_address(1), *vip, Tracking::New);
        prop_assert_eq!(fate(state, &own), without_us(&own));
    }
    Ok(())
}

/// The fate that the cluster's objects want for an egress pod's packet to outside, read from the view and not
/// from the plan.
fn wanted(view: &View, state: &FamilyState, pod: IpAddr) -> Fate {
    let planned = pod_in(state, pod);
    if planned.blocked {
        return Fate::Rejected;
    }
    let vip = planned.vips.first().copied();
    let vip = vip.filter(|_| planned.vips.len() == 1).unwrap();
    if planned.mark.is_none() {
        return Fate::Direct(vip);
    }
    let via = view.nodes[&view.announcers[&vip]].addresses[0];
    Fate::ToGateway { via, source: pod }
}

/// The end of a change: every packet, also of every connection that is still there, goes as the cluster wants.
fn arrived(host: &Host, view: &View, after: &FamilyState) -> Verdict {
    let state = &host.state;
    prop_assert_eq!(state, after);
    for (pod, destination) in pairs() {
        let new = packet(pod, destination, Tracking::New);
        let mut own = host.connections.iter();
        let shows_itself = masquerade(&new) != pod
            && own.any(|c| c.pod == pod && c.destination == destination && c.bound == pod);
        prop_assert!(
            !shows_itself || !is_excluded(after, destination),
            "{:?}",
            new
        );
        if is_excluded(after, destination) || !pod_in(after, pod).egress {
            if is_of_this_node(pod) || is_excluded(after, destination) {
                prop_assert_eq!(fate(state, &new), without_us(&new), "{:?}", new);
            }
            continue;
        }
        let wanted = wanted(view, after, pod);
        prop_assert_eq!(fate(state, &new), wanted, "{:?}", new);
        let connections = host
            .connections
            .iter()
            .filter(|c| c.pod == pod && c.destination == destination);
        for connection in connections.filter(|_| passes_here(after, pod)) {
            let packet = Packet {
                tracking: Tracking::Established(connection.bound),
                ..new
            };
            prop_assert_eq!(fate(state, &packet), wanted, "{:?}", packet);
        }
    }
    Ok(())
}

/// Goes through a history step by step, with every judge after every step.
fn judge(history: &History) -> Verdict {
    let mut host = Host::new(&history[0].1);
    let mut had: BTreeMap<IpAddr, BTreeSet<IpAddr>> = BTreeMap::new();
    for pair in history.windows(2) {
        let ((_, before), (view, after)) = (&pair[0], &pair[1]);
        let steps = diff(before, after);
        let (before, after) = (v4(before), v4(after));
        host.forgotten.clear();
        host.inside_forgotten = false;
        for (pod, state) in before.firewall.pods.iter().chain(&after.firewall.pods) {
            had.entry(*pod).or_default().extend(&state.vips);
        }
        for step in std::iter::once(None).chain(steps.iter().map(Some)) {
            if let Some(step) = step {
                host.apply(step, after);
            }
            let said = |error: TestCaseError| {
                let steps: Vec<String> = steps.iter().map(Step::to_string).collect();
                let step = step.map(Step::to_string);
                TestCaseError::fail(format!("after {step:?} of {steps:#?}: {error}"))
            };
            no_leak(&host, (before, after), &had).map_err(said)?;
            no_leak_at_a_border(&host, (before, after), &had).map_err(said)?;
            no_theft(&host.state, before, after).map_err(said)?;
            if before.firewall.skeleton == Skeleton::Intact {
                vips_are_guarded(&host.state, before, after).map_err(said)?;
            }
        }
        arrived(&host, view, after)?;
    }
    Ok(())
}

proptest! {
    // Every case is some 50 steps with hundreds of packets after each.
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn i1_i2_no_prefix_of_a_change_leaks_or_steals(history in any_history()) {
        judge(&history)?;
    }

}

proptest! {
    #[test]
    fn i5_damage_is_repaired_for_every_packet((view, damaged, desired) in any_damage()) {
        let mut host = Host::new(&damaged);
        host.reconcile(&desired);
        arrived(&host, &view, v4(&desired))?;
    }
}

// === what was once missed ===

/// A node that is the gateway of a pod of its own.
fn small() -> View {
    let vips = [(Family::V4, vip(0))].into();
    let service = Service {
        uid: String::new(),
        created: 0,
        load_balancer: true,
        families: [Family::V4].into(),
        vips,
        hostname: None,
        on_no_gateway: OnNoGateway::Reject,
        selector: BTreeMap::new(),
    };
    let endpoint = Endpoint {
        addresses: vec![pod(1, 11).to_string()],
        node: Some(node(1)),
        target: Target::Pod(key(0)),
    };
    let slice = EndpointSlice {
        service: key(0),
        endpoints: vec![endpoint],
    };
    let facts = Node {
        addresses: vec![node_address(1)],
        pod_cidrs: [net("10.244.1.0/24")].into(),
        ready: true,
        programmed: Some(BootId("first".to_owned())),
        ..Node::default()
    };
    View {
        services: [(key(0), service)].into(),
        slices: [(key(0), slice)].into(),
        nodes: [(node(1), facts)].into(),
        announcers: [(vip(0), node(1))].into(),
        ..View::default()
    }
}

fn small_plan(view: &View, settings: &Settings) -> KernelState {
    plan_after(view, settings, &Slots::default()).kernel
}

#[test]
fn i1_a_connection_opened_just_before_its_destination_is_egress_again() {
    let settings = Settings::default_on("node1");
    let mut excluding = settings.clone();
    excluding.excluded.listed.insert(net("10.9.0.0/16"));
    let after = small_plan(&small(), &settings);
    let mut host = Host::new(&small_plan(&small(), &excluding));
    host.reconcile(&after);
    arrived(&host, &small(), v4(&after)).unwrap();
}

#[test]
fn i1_a_connection_opened_while_the_firewall_was_damaged() {
    let after = small_plan(&small(), &Settings::default_on("node1"));
    let mut damaged = after.clone();
    let state = damaged.families.get_mut(&Family::V4).unwrap();
    state.firewall.skeleton = Skeleton::Damaged("a jump is missing".to_owned());
    let mut host = Host::new(&damaged);
    host.reconcile(&after);
    arrived(&host, &small(), v4(&after)).unwrap();
}

#[test]
fn i1_a_connection_that_a_dead_run_did_not_come_to_forget() {
    let settings = Settings::default_on("node1");
    let mut unlabelled = small();
    unlabelled.services.clear();
    let before = small_plan(&unlabelled, &settings);
    let after = small_plan(&small(), &settings);
    let mut host = Host::new(&before);
    for step in diff(&before, &after) {
        if matches!(step, Step::Connection(ConnectionStep::Forget(_))) {
            break;
        }
        host.apply(&step, v4(&after));
    }
    host.reconcile(&after);
    arrived(&host, &small(), v4(&after)).unwrap();
}
