//! The changing part of the table: which facts are which elements of which sets and maps. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};

use crate::kernel::conntrack::LateReply;
use crate::kernel::firewall::LATE_REPLY_SECONDS;
use crate::kernel::nftables::ruleset::{mark_of_chain, slot_chain};
use crate::kernel::ours::{OwnSet, digit};
use crate::state::{Family, FirewallState, NetSet, PodSet, PodState, Skeleton};

/// A set or map of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A set that the other backend has, too.
    Set(OwnSet),
    /// Pod to the chain that marks its packets for its gateway.
    Slot,
    /// Pod to VIP.
    Vip,
}

impl Kind {
    pub(crate) fn all() -> impl Iterator<Item = Kind> {
        let sets = OwnSet::ALL.into_iter().map(Kind::Set);
        sets.chain([Kind::Slot, Kind::Vip])
    }

    /// Whether its keys are networks.
    pub(crate) fn of_networks(self) -> bool {
        matches!(self, Kind::Set(OwnSet::Nets(_)))
    }

    /// The name of the family's set.
    pub(crate) fn name(self, family: Family) -> String {
        let word = match self {
            Kind::Set(set) => set.word(),
            Kind::Slot => "slot",
            Kind::Vip => "vip",
        };
        format!("{word}{}", digit(family))
    }

    /// The declaration as `nft` takes it, with elements.
    pub(crate) fn text<'a>(
        self,
        family: Family,
        elements: impl Iterator<Item = (&'a IpNet, &'a Value)>,
    ) -> String {
        let address = match family {
            Family::V4 => "ipv4_addr",
            Family::V6 => "ipv6_addr",
        };
        let (word, kind) = match self {
            Kind::Slot => ("map", format!("{address} : verdict")),
            Kind::Vip => ("map", format!("{address} : {address}")),
            Kind::Set(OwnSet::LateReplies) => (
                "set",
                format!("{address} . inet_proto . inet_service . {address} . inet_service"),
            ),
            _ => ("set", address.to_owned()),
        };
        let flags = match self {
            _ if self.of_networks() => "    flags interval;\n".to_owned(),
            Kind::Set(OwnSet::LateReplies) => {
                format!("    flags timeout;\n    timeout {LATE_REPLY_SECONDS}s;\n")
            }
            _ => String::new(),
        };
        let elements: Vec<String> = elements
            .map(|(key, value)| match value {
                Value::None if self.of_networks() => key.to_string(),
                Value::None => key.addr().to_string(),
                Value::Chain(chain) => format!("{} : goto {chain}", key.addr()),
                Value::Address(address) => format!("{} : {address}", key.addr()),
            })
            .collect();
        let elements = if elements.is_empty() {
            String::new()
        } else {
            // Ends with a line break: nft 1.0 takes a `}` that follows a verdict for a part of it.
            format!("    elements = {{ {}\n    }}\n", elements.join(",\n      "))
        };
        let name = self.name(family);
        format!("  {word} {name} {{\n    type {kind};\n{flags}{elements}  }}\n")
    }
}

/// What a map gives for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// Of a set: the key is in it.
    None,
    /// Go on in this chain.
    Chain(String),
    /// This address.
    Address(IpAddr),
}

/// Elements by set; an address is a network of one.
pub(crate) type Elements = BTreeMap<Kind, BTreeMap<IpNet, Value>>;

/// The elements of a pod.
pub(crate) fn of_pod(address: IpAddr, pod: &PodState, elements: &mut Elements) {
    let mut put = |kind: Kind, value: Value| {
        let set = elements.entry(kind).or_default();
        set.insert(IpNet::from(address), value);
    };
    for set in PodSet::ALL {
        if pod.is_in(set) {
            put(Kind::Set(OwnSet::Pods(set)), Value::None);
        }
    }
    if let Some(mark) = pod.mark {
        put(Kind::Slot, Value::Chain(slot_chain(mark)));
    }
    // Of two, in the middle of a change, a map can hold one.
    if let Some(vip) = pod.vips.last() {
        put(Kind::Vip, Value::Address(*vip));
    }
}

/// The elements of everything but pods.
pub(crate) fn of_networks(state: &FirewallState, elements: &mut Elements) {
    // In the middle of a change one network may hold another: intervals of a set may not.
    let disjoint = |nets: &BTreeSet<IpNet>| {
        let nets = IpNet::aggregate(&nets.iter().copied().collect());
        nets.into_iter().map(|net| (net, Value::None)).collect()
    };
    for set in NetSet::ALL {
        let nets = disjoint(state.nets(set));
        elements.insert(Kind::Set(OwnSet::Nets(set)), nets);
    }
    let vips = state
        .vips
        .iter()
        .map(|vip| (IpNet::from(*vip), Value::None));
    elements.insert(Kind::Set(OwnSet::Vips), vips.collect());
}

/// All elements of a family.
pub(crate) fn of_state(state: &FirewallState) -> Elements {
    let mut elements = Elements::new();
    of_networks(state, &mut elements);
    for (address, pod) in &state.pods {
        of_pod(*address, pod, &mut elements);
    }
    elements
}

/// The state that elements stand for.
pub(crate) fn state_of(elements: &Elements, mask: u32, skeleton: Skeleton) -> FirewallState {
    let keys = |kind: Kind| elements.get(&kind).into_iter().flatten();
    let mut pods: BTreeMap<IpAddr, PodState> = BTreeMap::new();
    for set in PodSet::ALL {
        for (net, _) in keys(Kind::Set(OwnSet::Pods(set))) {
            pods.entry(net.addr()).or_default().set(set, true);
        }
    }
    for (net, value) in keys(Kind::Slot) {
        if let Value::Chain(chain) = value {
            pods.entry(net.addr()).or_default().mark = mark_of_chain(chain, mask);
        }
    }
    for (net, value) in keys(Kind::Vip) {
        if let Value::Address(vip) = value {
            pods.entry(net.addr()).or_default().vips.insert(*vip);
        }
    }
    let mut state = FirewallState {
        skeleton,
        vips: keys(Kind::Set(OwnSet::Vips))
            .map(|(net, _)| net.addr())
            .collect(),
        pods,
        ..FirewallState::default()
    };
    for set in NetSet::ALL {
        let nets = keys(Kind::Set(OwnSet::Nets(set))).map(|(net, _)| *net);
        state.nets_mut(set).extend(nets);
    }
    state
}

/// The key of late replies: each part begins at a multiple of four bytes, as nft concatenates them.
pub(crate) fn late_key(late: &LateReply) -> Vec<u8> {
    let mut key = octets(late.outside.0);
    key.extend([late.protocol, 0, 0, 0]);
    for (port, address) in [(late.outside.1, Some(late.pod.0)), (late.pod.1, None)] {
        key.extend(port.to_be_bytes());
        key.extend([0; 2]);
        key.extend(address.into_iter().flat_map(octets));
    }
    key
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The networks between the ends of intervals, as the kernel keeps them: `true` marks the first address after
/// an interval.
pub(crate) fn networks(family: Family, mut ends: Vec<(IpAddr, bool)>) -> BTreeSet<IpNet> {
    // Where one interval follows on another, its start comes after the other's end.
    ends.sort_by_key(|(address, is_end)| (*address, !is_end));
    let mut nets = BTreeSet::new();
    let mut start = None;
    for (address, is_end) in ends {
        match (start, is_end) {
            (None, false) => start = Some(address),
            (Some(first), true) => {
                if let Some(last) = before(address) {
                    nets.extend(cover(first, last));
                }
                start = None;
            }
            // An end without a start is how nft marks the beginning of the address space.
            _ => {}
        }
    }
    if let Some(first) = start {
        nets.extend(cover(first, last_of(family)));
    }
    nets
}

/// The first address after a network; `None` at the end of the address space.
pub(crate) fn after(net: &IpNet) -> Option<IpAddr> {
    match net.broadcast() {
        IpAddr::V4(last) => u32::from(last)
            .checked_add(1)
            .map(|next| Ipv4Addr::from(next).into()),
        IpAddr::V6(last) => u128::from(last)
            .checked_add(1)
            .map(|next| Ipv6Addr::from(next).into()),
    }
}

fn before(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => u32::from(v4)
            .checked_sub(1)
            .map(|last| Ipv4Addr::from(last).into()),
        IpAddr::V6(v6) => u128::from(v6)
            .checked_sub(1)
            .map(|last| Ipv6Addr::from(last).into()),
    }
}

fn last_of(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::BROADCAST.into(),
        Family::V6 => Ipv6Addr::from(u128::MAX).into(),
    }
}

/// The networks that make up a range.
fn cover(first: IpAddr, last: IpAddr) -> Vec<IpNet> {
    match (first, last) {
        (IpAddr::V4(first), IpAddr::V4(last)) => {
            Ipv4Subnets::new(first, last, 0).map(IpNet::V4).collect()
        }
        (IpAddr::V6(first), IpAddr::V6(last)) => {
            Ipv6Subnets::new(first, last, 0).map(IpNet::V6).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(nets: &[&str]) -> Vec<(IpAddr, bool)> {
        let mut ends = Vec::new();
        for net in nets {
            let net: IpNet = net.parse().unwrap();
            ends.push((net.network(), false));
            ends.extend(after(&net).map(|next| (next, true)));
        }
        ends
    }

    #[test]
    fn networks_survive_the_way_through_intervals() {
        for (family, nets) in [
            (
                Family::V4,
                &[
                    "10.244.0.0/16",
                    "192.0.2.11/32",
                    "192.0.2.12/31",
                    "255.255.255.255/32",
                ][..],
            ),
            (Family::V4, &["0.0.0.0/0"]),
            (
                Family::V6,
                &[
                    "::1/128",
                    "fd00:10:244::/64",
                    "fd00:10:244:1::/64",
                    "ff00::/8",
                ],
            ),
        ] {
            let expected: BTreeSet<IpNet> = nets.iter().map(|net| net.parse().unwrap()).collect();
            let mut ends = ends(nets);
            assert_eq!(networks(family, ends.clone()), expected);
            ends.reverse();
            ends.push((
                if family == Family::V4 {
                    "0.0.0.0"
                } else {
                    "::"
                }
                .parse()
                .unwrap(),
                true,
            ));
            if nets[0] != "0.0.0.0/0" {
                assert_eq!(networks(family, ends), expected);
            }
        }
    }

    #[test]
    fn a_range_that_is_no_network_becomes_several() {
        let range = vec![
            ("192.0.2.11".parse().unwrap(), false),
            ("192.0.2.14".parse().unwrap(), true),
        ];
        let found: Vec<String> = networks(Family::V4, range)
            .iter()
            .map(IpNet::to_string)
            .collect();
        assert_eq!(found, ["192.0.2.11/32", "192.0.2.12/31"]);
    }

    #[test]
    fn a_state_survives_the_way_through_elements() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let mask = 0x00f0_0000;
        let pod = PodState {
            egress: true,
            vips: [ip("192.0.2.200")].into(),
            ..PodState::default()
        };
        let marked = PodState {
            mark: Some(crate::state::Mark {
                value: 0x0020_0000,
                mask,
            }),
            ..pod.clone()
        };
        let state = FirewallState {
            skeleton: Skeleton::Intact,
            excluded: ["10.244.0.0/16".parse().unwrap()].into(),
            remote_pods: ["10.244.2.0/24".parse().unwrap()].into(),
            local_pods: ["10.244.1.0/24".parse().unwrap()].into(),
            vips: [ip("192.0.2.200")].into(),
            pods: [
                (ip("10.244.1.11"), pod.clone()),
                (ip("10.244.1.12"), marked),
                (
                    ip("10.244.1.14"),
                    PodState {
                        ordinary: true,
                        ..PodState::default()
                    },
                ),
                (
                    ip("10.244.1.13"),
                    PodState {
                        gateway_here: true,
                        blocked: true,
                        ..pod
                    },
                ),
            ]
            .into(),
        };
        assert_eq!(state_of(&of_state(&state), mask, Skeleton::Intact), state);
    }
}
