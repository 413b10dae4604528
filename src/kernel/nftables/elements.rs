//! The changing part of the table: which facts are which elements of which sets and maps. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::kernel::conntrack::LateReply;
use crate::kernel::nftables::ruleset::{mark_of_chain, slot_chain};
use crate::kernel::ours::{LATE_REPLY_SECONDS, OwnSet, digit};
use crate::state::{Family, FirewallState, NetSet, PodSet, PodState, Skeleton};

/// A set or map of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A set that the other backend has, too.
    Set(OwnSet),
    /// Late replies of protocols without ports: packets of these have other things where those have ports.
    LatePortless,
    /// Pod to the chain that marks its packets for its gateway.
    Slot,
    /// Pod to VIP.
    Vip,
}

impl Kind {
    pub(crate) fn all() -> impl Iterator<Item = Kind> {
        let sets = OwnSet::all().map(Kind::Set);
        sets.chain([Kind::LatePortless, Kind::Slot, Kind::Vip])
    }

    /// Whether the kernel removes its elements by itself: they are no part of a state.
    pub(crate) fn is_transient(self) -> bool {
        matches!(self, Kind::Set(OwnSet::LateReplies) | Kind::LatePortless)
    }

    /// Whether its keys are networks.
    pub(crate) fn of_networks(self) -> bool {
        matches!(self, Kind::Set(OwnSet::Nets(_)))
    }

    pub(crate) fn name(self, family: Family) -> String {
        let word = match self {
            Kind::Set(set) => set.word(),
            Kind::LatePortless => "late_portless",
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
        transient: &[Transient],
    ) -> String {
        let address = match family {
            Family::V4 => "ipv4_addr",
            Family::V6 => "ipv6_addr",
        };
        let (word, kind) = match self {
            Kind::Slot => ("map", format!("{address} : verdict;")),
            Kind::Vip => ("map", format!("{address} : {address};")),
            Kind::Set(OwnSet::Nets(_)) => ("set", format!("{address};\n    flags interval;")),
            Kind::Set(OwnSet::LateReplies) | Kind::LatePortless => {
                let kind = match self {
                    Kind::LatePortless => format!("{address} . inet_proto . {address}"),
                    _ => {
                        format!("{address} . inet_proto . inet_service . {address} . inet_service")
                    }
                };
                let timeout = format!("flags timeout;\n    timeout {LATE_REPLY_SECONDS}s;");
                ("set", format!("{kind};\n    {timeout}"))
            }
            Kind::Set(OwnSet::Pods(_) | OwnSet::Vips) => ("set", format!("{address};")),
        };
        let members = elements.map(|(key, value)| match value {
            Value::None if self.of_networks() => key.to_string(),
            Value::None => key.addr().to_string(),
            Value::Chain(chain) => format!("{} : goto {chain}", key.addr()),
            Value::Address(address) => format!("{} : {address}", key.addr()),
        });
        let transient = transient.iter().filter(|t| t.is_in(self, family));
        let elements: Vec<String> = members.chain(transient.map(Transient::text)).collect();
        let elements = if elements.is_empty() {
            String::new()
        } else {
            // Ends with a line break: nft 1.0 takes a `}` that follows a verdict for a part of it.
            format!("    elements = {{ {}\n    }}\n", elements.join(",\n      "))
        };
        let name = self.name(family);
        format!("  {word} {name} {{\n    type {kind}\n{elements}  }}\n")
    }
}

/// What a map gives for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// Nothing: the key is a member of a set.
    None,
    Chain(String),
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
    // In the middle of a change there are two; a map holds one value for a key.
    if let Some(vip) = pod.vips.last() {
        put(Kind::Vip, Value::Address(*vip));
    }
}

/// The elements of everything but pods.
pub(crate) fn of_networks(state: &FirewallState, elements: &mut Elements) {
    // In the middle of a change one network may contain another; the intervals of a set must not overlap.
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

/// An element that lives for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Transient {
    pub(crate) late: LateReply,
    /// How much longer it lives.
    pub(crate) milliseconds: u64,
}

impl Transient {
    fn is_in(&self, kind: Kind, family: Family) -> bool {
        late_set(&self.late) == kind && Family::of(self.late.pod) == family
    }

    fn text(&self) -> String {
        let Transient { late, milliseconds } = self;
        let LateReply {
            protocol,
            outside,
            pod,
            ports,
        } = late;
        let key = match ports {
            Some([of_outside, of_pod]) => {
                format!("{outside} . {protocol} . {of_outside} . {pod} . {of_pod}")
            }
            None => format!("{outside} . {protocol} . {pod}"),
        };
        format!("{key} expires {milliseconds}ms")
    }
}

/// The set that late replies are expected in.
pub(crate) fn late_set(late: &LateReply) -> Kind {
    match late.ports {
        Some(_) => Kind::Set(OwnSet::LateReplies),
        None => Kind::LatePortless,
    }
}

/// The key of late replies: each part begins at a multiple of four bytes, as nft concatenates them.
pub(crate) fn late_reply_key(late: &LateReply) -> Vec<u8> {
    let port = |port: u16| {
        let [high, low] = port.to_be_bytes();
        [high, low, 0, 0]
    };
    let mut key = octets(late.outside);
    key.extend([late.protocol, 0, 0, 0]);
    key.extend(
        late.ports
            .into_iter()
            .flat_map(|[outside, _]| port(outside)),
    );
    key.extend(octets(late.pod));
    key.extend(late.ports.into_iter().flat_map(|[_, pod]| port(pod)));
    key
}

/// The late replies that a key stands for.
pub(crate) fn late_reply_of(kind: Kind, family: Family, mut key: &[u8]) -> Option<LateReply> {
    let mut next = |length| {
        let (part, rest) = key.split_at_checked(length)?;
        key = rest;
        Some(part)
    };
    let address_length = match family {
        Family::V4 => 4,
        Family::V6 => 16,
    };
    let port_length = match kind {
        Kind::LatePortless => 0,
        _ => 4,
    };
    let outside = address_of(next(address_length)?)?;
    let protocol = *next(4)?.first()?;
    let of_outside = next(port_length)?;
    let pod = address_of(next(address_length)?)?;
    let ports = [of_outside, next(port_length)?].map(|port| port.first_chunk::<2>());
    let ports = match ports {
        [Some(outside), Some(pod)] => Some([outside, pod].map(|port| u16::from_be_bytes(*port))),
        _ => None,
    };
    Some(LateReply {
        protocol,
        outside,
        pod,
        ports,
    })
}

pub(crate) fn address_of(octets: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(octets).ok().map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(octets).ok().map(IpAddr::from);
    v4().or_else(v6)
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::{documented_sets, page_name};

    #[test]
    fn the_sets_are_as_documented() {
        let name = |kind: Kind| {
            let name = kind.name(Family::V4);
            match kind {
                Kind::Set(set) => (page_name(set), name),
                Kind::LatePortless => ("late-portless".to_owned(), name),
                Kind::Slot => ("slot".to_owned(), name),
                Kind::Vip => ("vip".to_owned(), name),
            }
        };
        let sets: BTreeMap<String, String> = Kind::all().map(name).collect();
        assert_eq!(sets, documented_sets(1));
    }

    #[test]
    fn late_replies_survive_the_way_through_their_keys() {
        let ends = [
            ("198.51.100.10", "10.244.1.11"),
            ("2001:db8:2::10", "fd00:10:244:1::b"),
        ];
        for (outside, pod) in ends {
            for ports in [Some([443, 40000]), None] {
                let late = LateReply {
                    protocol: 132,
                    outside: outside.parse().unwrap(),
                    pod: pod.parse().unwrap(),
                    ports,
                };
                let (kind, key) = (late_set(&late), late_reply_key(&late));
                let family = Family::of(late.pod);
                assert_eq!(late_reply_of(kind, family, &key), Some(late));
                assert_eq!(late_reply_of(kind, family, &key[1..]), None);
            }
        }
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
