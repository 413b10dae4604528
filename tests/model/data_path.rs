//! A model of the data path: what one packet experiences on a node whose kernel holds a given state.
//!
//! The model follows the chains and rules, not the code that writes them. Families share no kernel object here; with
//! the nftables backend they share a table, which is written as a whole. Marks without a way, which rules of others or their
//! loss make of ours, are packets of a state without routes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use metaleg::state::{
    self, Family, FamilyState, FirewallState, Landmark, Mark, PodState, RouteState, Rule,
    RuleAction, Skeleton, Table, Traits,
};

use crate::fixtures::net;
use crate::fixtures::worlds::node_address;

/// What connection tracking says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Tracking {
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
pub(crate) struct Packet {
    /// The source as it arrives.
    pub(crate) source: IpAddr,
    /// Sent by the node itself: passes neither `PREROUTING` nor `FORWARD`.
    pub(crate) host: bool,
    /// The destination, after DNAT if there was one.
    pub(crate) destination: IpAddr,
    pub(crate) tracking: Tracking,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
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

/// Whose chains a packet meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Backend {
    Nftables,
    Iptables,
}

impl Backend {
    pub(crate) fn traits(self) -> Traits {
        Traits {
            marks_before_dnat: self == Backend::Iptables,
            ..Traits::default()
        }
    }
}

/// What the routing rules decide.
#[derive(Clone, Copy)]
enum Way {
    Main,
    Via(IpAddr),
    Unreachable,
}

pub(crate) fn fate(by: Backend, state: &FamilyState, packet: &Packet) -> Fate {
    let firewall = &state.firewall;
    // Chains that are not whole may do anything; the least that they may do is nothing.
    let in_force = firewall.skeleton == Skeleton::Intact && !packet.host;
    let unknown = PodState::default();
    let pod = firewall.pods.get(&packet.source).unwrap_or(&unknown);
    let is_excluded = within(&firewall.excluded, packet.destination);
    let is_marked =
        in_force && packet.tracking != Tracking::Reply && (by == Backend::Iptables || !is_excluded);
    let mark = pod.mark.filter(|_| is_marked);
    let way = way(&state.routes, mark.map_or(0, |mark| mark.value), packet);
    if matches!(way, Way::Unreachable) {
        return Fate::Rejected;
    }
    if in_force && let Some(end) = guard(by, firewall, pod, packet) {
        return end;
    }
    let source = match packet.tracking {
        Tracking::New if firewall.skeleton == Skeleton::Intact => translate(firewall, pod, packet),
        Tracking::New => masquerade(packet),
        Tracking::Established(source) => source,
        Tracking::Reply | Tracking::Invalid => packet.source,
    };
    let is_looked_at = in_force && packet.tracking != Tracking::Reply && !is_excluded;
    if is_looked_at && leaks(by, firewall, packet, mark, way, source) {
        return Fate::Dropped;
    }
    match way {
        Way::Via(via) => Fate::ToGateway { via, source },
        _ => Fate::Direct(source),
    }
}

/// What would become of a packet on a node without us.
pub(crate) fn without_us(packet: &Packet) -> Fate {
    fate(Backend::Nftables, &FamilyState::default(), packet)
}

fn within(nets: &BTreeSet<IpNet>, ip: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(&ip))
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
                Some(table) if within(&table.throws, packet.destination) => {}
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
fn guard(by: Backend, firewall: &FirewallState, pod: &PodState, packet: &Packet) -> Option<Fate> {
    let Packet {
        source,
        destination,
        tracking,
        ..
    } = *packet;
    // From outside, to a VIP: no beginning of a connection, and it would leave by the LAN that it came from.
    let starts = matches!(tracking, Tracking::New | Tracking::Invalid);
    let has_lan = firewall
        .landmarks
        .iter()
        .any(|l| matches!(l, Landmark::Lan(_)));
    let is_inside = within(&firewall.excluded, source);
    if starts && has_lan && !is_inside && firewall.vips.contains(&destination) {
        return Some(Fate::Dropped);
    }
    if within(&firewall.excluded, destination) || tracking == Tracking::Reply {
        return None;
    }
    if pod.blocked {
        return Some(Fate::Rejected);
    }
    if pod.egress && tracking == Tracking::Invalid {
        return Some(Fate::Dropped);
    }
    if by == Backend::Iptables && pod.egress {
        if pod.mark.is_none() && pod.vips.is_disjoint(&firewall.vips) {
            return Some(Fate::Dropped);
        }
        // To the kernel, a connection that was translated to its own address is not translated.
        let is_translated = matches!(tracking, Tracking::Established(bound) if bound != source);
        let is_known = matches!(tracking, Tracking::Established(_));
        let is_wrong = match pod.mark {
            Some(_) => is_translated,
            None => is_known && !is_translated,
        };
        if is_wrong {
            return Some(Fate::Dropped);
        }
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
fn translate(firewall: &FirewallState, pod: &PodState, packet: &Packet) -> IpAddr {
    if !pod.egress || within(&firewall.excluded, packet.destination) {
        masquerade(packet)
    } else if pod.mark.is_some() {
        packet.source
    } else {
        // In the middle of a change there may be two: which one counts is the order of the rules.
        let vip = pod.vips.iter().find(|vip| firewall.vips.contains(vip));
        // Without one it is dropped: where translations are decided, or before.
        vip.copied().unwrap_or(packet.source)
    }
}

/// Whether a packet to outside is dropped at last, for where it goes and as whom.
fn leaks(
    by: Backend,
    firewall: &FirewallState,
    packet: &Packet,
    mark: Option<Mark>,
    way: Way,
    source: IpAddr,
) -> bool {
    let Some(pod) = firewall.pods.get(&packet.source).filter(|pod| pod.egress) else {
        return false;
    };
    let landmarks = &firewall.landmarks;
    let is_way = match (mark, way) {
        (Some(mark), Way::Via(via)) => landmarks.contains(&Landmark::Way(state::Way { mark, via })),
        _ => false,
    };
    match by {
        Backend::Nftables if source == packet.source => !is_way,
        Backend::Nftables => !firewall.vips.contains(&source) || pod.mark.is_some(),
        // By the realm of the route; routes of IPv6 have none.
        Backend::Iptables => mark.is_some() && matches!(way, Way::Main) && source.is_ipv4(),
    }
}

/// What the CNI plugin does after us: pods have the node's address outside the pod network.
pub(crate) fn masquerade(packet: &Packet) -> IpAddr {
    let is_pod = |ip: &IpAddr| PODS.with(|nets| nets.iter().any(|net| net.contains(ip)));
    if is_pod(&packet.source) && !is_pod(&packet.destination) {
        node_address(Family::of(packet.source), 1)
    } else {
        packet.source
    }
}

thread_local! {
    /// The pod networks, as the CNI plugin knows them.
    static PODS: [IpNet; 4] = ["10.244.0.0/16", "10.99.0.0/16", "fd00:10:244::/48", "fd00:10:99::/48"].map(net);
}
