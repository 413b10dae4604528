//! The changing part of the table: which facts are which elements of which sets and maps. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use nix::libc::IF_NAMESIZE;

use crate::ethernet::Mac;
use crate::kernel::conntrack::LateReply;
use crate::kernel::netlink::address;
use crate::kernel::nftables::ruleset::{mark_of_chain, slot_chain};
use crate::kernel::ours::{OwnSet, digit};
use crate::state::{
    Family, FirewallState, LATE_REPLY_SECONDS, Landmark, Mark, NetSet, PodSet, PodState, Skeleton,
    Way,
};

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
    /// Mark and gateway.
    Ways,
    /// Link-layer addresses of nodes.
    Nodes,
    /// LAN interfaces, each as a pair with itself: a packet that leaves by the one that it came in by.
    Lans,
}

impl Kind {
    pub(crate) fn all() -> impl Iterator<Item = Kind> {
        let sets = OwnSet::all().map(Kind::Set);
        sets.chain([
            Kind::LatePortless,
            Kind::Slot,
            Kind::Vip,
            Kind::Ways,
            Kind::Nodes,
            Kind::Lans,
        ])
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
            Kind::Ways => "ways",
            Kind::Nodes => "nodes",
            Kind::Lans => "lans",
        };
        format!("{word}{}", digit(family))
    }

    /// The declaration as `nft` takes it, with elements.
    pub(crate) fn text<'a>(
        self,
        family: Family,
        elements: impl Iterator<Item = (&'a Key, &'a Value)>,
        transient: &[Transient],
    ) -> String {
        let members = elements.map(|(key, value)| match value {
            Value::None => key.text(),
            Value::Chain(chain) => format!("{} : goto {chain}", key.text()),
            Value::Address(address) => format!("{} : {address}", key.text()),
        });
        let transient = transient.iter().filter(|t| t.is_in(self, family));
        let elements: Vec<String> = members.chain(transient.map(Transient::text)).collect();
        let elements = if elements.is_empty() {
            String::new()
        } else {
            // Ends with a line break: nft 1.0 takes a `}` that follows a verdict for a part of it.
            format!("    elements = {{ {}\n    }}\n", elements.join(",\n      "))
        };
        let shape = self.shape(family);
        let word = if shape.data.is_some() { "map" } else { "set" };
        let (name, shape) = (self.name(family), shape.text());
        format!("  {word} {name} {{\n    {shape}\n{elements}  }}\n")
    }

    /// What its elements are.
    pub(crate) fn shape(self, family: Family) -> Shape {
        use Datatype::{Address, InterfaceName, LinkAddress, Mark, Port, Protocol, Verdict};
        let address = Address(family);
        let set = |key: Vec<Datatype>| Shape {
            key,
            data: None,
            is_interval: false,
            seconds: None,
        };
        match self {
            Kind::Slot => Shape {
                data: Some(Verdict),
                ..set(vec![address])
            },
            Kind::Vip => Shape {
                data: Some(address),
                ..set(vec![address])
            },
            Kind::Set(OwnSet::Nets(_)) => Shape {
                is_interval: true,
                ..set(vec![address])
            },
            Kind::Set(OwnSet::LateReplies) => Shape {
                seconds: Some(LATE_REPLY_SECONDS),
                ..set(vec![address, Protocol, Port, address, Port])
            },
            Kind::LatePortless => Shape {
                seconds: Some(LATE_REPLY_SECONDS),
                ..set(vec![address, Protocol, address])
            },
            Kind::Set(OwnSet::Pods(_) | OwnSet::Vips) => set(vec![address]),
            Kind::Ways => set(vec![Mark, address]),
            Kind::Nodes => set(vec![LinkAddress]),
            Kind::Lans => set(vec![InterfaceName, InterfaceName]),
        }
    }
}

/// A type of keys or data.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Datatype {
    Address(Family),
    Protocol,
    Port,
    Mark,
    LinkAddress,
    InterfaceName,
    Verdict,
}

impl Datatype {
    /// Its name to `nft`, the number by which `nft` knows it again (datatype.h), and its length in bytes.
    fn of_nft(self) -> (&'static str, u32, u32) {
        match self {
            Datatype::Address(Family::V4) => ("ipv4_addr", 7, 4),
            Datatype::Address(Family::V6) => ("ipv6_addr", 8, 16),
            Datatype::Protocol => ("inet_proto", 12, 1),
            Datatype::Port => ("inet_service", 13, 2),
            Datatype::Mark => ("mark", 19, 4),
            Datatype::LinkAddress => ("ether_addr", 9, 6),
            Datatype::InterfaceName => ("ifname", 41, 16),
            // `NFT_DATA_VERDICT` of nf_tables.h; the length is the kernel's own.
            Datatype::Verdict => ("verdict", 0xffff_ff00, 16),
        }
    }
}

/// What a set or map is made for.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// Several are a concatenation.
    key: Vec<Datatype>,
    /// What a map gives.
    data: Option<Datatype>,
    is_interval: bool,
    /// How long an element stays, where it does not stay for ever.
    seconds: Option<u32>,
}

impl Shape {
    /// The declaration as `nft` takes it.
    fn text(&self) -> String {
        let names: Vec<&str> = self.key.iter().map(|part| part.of_nft().0).collect();
        let mut text = format!("type {}", names.join(" . "));
        if let Some(data) = self.data {
            text += &format!(" : {}", data.of_nft().0);
        }
        text += ";";
        if self.is_interval {
            text += "\n    flags interval;";
        }
        if let Some(seconds) = self.seconds {
            text += &format!("\n    flags timeout;\n    timeout {seconds}s;");
        }
        text
    }

    /// What the kernel keeps of it.
    pub(crate) fn traits(&self) -> SetTraits {
        let (mut key_type, mut key_length) = (0, 0);
        for part in &self.key {
            let (_, number, length) = part.of_nft();
            // 6 bits for each part of a concatenation, and each begins at a multiple of four bytes.
            key_type = key_type << 6 | number;
            key_length += match self.key.len() {
                1 => length,
                _ => length.next_multiple_of(4),
            };
        }
        let flags = [
            (self.is_interval, FLAG_INTERVAL),
            (self.data.is_some(), FLAG_MAP),
            (self.seconds.is_some(), FLAG_TIMEOUT),
        ];
        let (_, data_type, data_length) = self.data.map(Datatype::of_nft).unwrap_or_default();
        SetTraits {
            flags: flags
                .iter()
                .filter(|(is_so, _)| *is_so)
                .map(|(_, flag)| flag)
                .sum(),
            key_type,
            key_length,
            data_type,
            data_length,
            milliseconds: u64::from(self.seconds.unwrap_or_default()) * 1000,
            limits: false,
        }
    }
}

/// Flags of sets, `NFT_SET_…` of nf_tables.h.
const FLAG_ANONYMOUS: u32 = 1;
const FLAG_CONSTANT: u32 = 2;
const FLAG_INTERVAL: u32 = 4;
const FLAG_MAP: u32 = 8;
const FLAG_TIMEOUT: u32 = 0x10;
const FLAG_OBJECT: u32 = 0x40;
/// Those that change what a set can hold. What else there is only says how it is looked up.
pub(crate) const TELLING_FLAGS: u32 =
    FLAG_ANONYMOUS | FLAG_CONSTANT | FLAG_INTERVAL | FLAG_MAP | FLAG_TIMEOUT | FLAG_OBJECT;

/// What a set or map can hold, as the kernel tells it; 0 where it does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SetTraits {
    pub(crate) flags: u32,
    pub(crate) key_type: u32,
    pub(crate) key_length: u32,
    pub(crate) data_type: u32,
    pub(crate) data_length: u32,
    /// How long an element stays.
    pub(crate) milliseconds: u64,
    /// There is a largest size, or elements have expressions that decide whether they match.
    pub(crate) limits: bool,
}

/// What a map gives for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// Nothing: the key is a member of a set.
    None,
    Chain(String),
    Address(IpAddr),
}

/// What an element is found by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Key {
    Address(IpAddr),
    Net(IpNet),
    Landmark(Landmark),
}

impl Key {
    fn text(&self) -> String {
        match self {
            Key::Address(address) => address.to_string(),
            Key::Net(net) => net.to_string(),
            Key::Landmark(Landmark::Way(Way { mark, via })) => {
                format!("{:#010x} . {via}", mark.value)
            }
            Key::Landmark(Landmark::Node(mac)) => mac.to_string(),
            Key::Landmark(Landmark::Lan(name)) => format!("\"{name}\" . \"{name}\""),
        }
    }

    /// The key as the kernel has it; of a network the first address.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        match self {
            Key::Address(address) => octets(*address),
            Key::Net(net) => octets(net.network()),
            Key::Landmark(Landmark::Way(Way { mark, via })) => {
                [mark.value.to_ne_bytes().to_vec(), octets(*via)].concat()
            }
            Key::Landmark(Landmark::Node(Mac(mac))) => mac.to_vec(),
            Key::Landmark(Landmark::Lan(name)) => {
                let mut bytes = name.clone().into_bytes();
                bytes.resize(IF_NAMESIZE, 0);
                bytes.repeat(2)
            }
        }
    }

    /// The key of an element that is no network's; `None` for one that we would not have made.
    pub(crate) fn parse(kind: Kind, bytes: &[u8], mask: u32) -> Option<Key> {
        Some(match kind {
            Kind::Ways => {
                let (value, via) = bytes.split_first_chunk()?;
                let value = u32::from_ne_bytes(*value);
                let mark = Mark { value, mask };
                let via = address(via)?;
                Key::Landmark(Landmark::Way(Way { mark, via }))
            }
            Kind::Nodes => Key::Landmark(Landmark::Node(Mac(bytes.try_into().ok()?))),
            Kind::Lans => {
                let (name, again) = bytes.split_at_checked(IF_NAMESIZE)?;
                let text = name.split(|byte| *byte == 0).next()?;
                let text = std::str::from_utf8(text).ok()?;
                (name == again).then(|| Key::Landmark(Landmark::Lan(text.to_owned())))?
            }
            // Read elsewhere: it is no part of a state.
            Kind::LatePortless => return None,
            Kind::Set(_) | Kind::Slot | Kind::Vip => Key::Address(address(bytes)?),
        })
    }
}

/// Elements by set.
pub(crate) type Elements = BTreeMap<Kind, BTreeMap<Key, Value>>;

/// The elements of a pod.
pub(crate) fn of_pod(address: IpAddr, pod: &PodState, elements: &mut Elements) {
    let mut put = |kind: Kind, value: Value| {
        let set = elements.entry(kind).or_default();
        set.insert(Key::Address(address), value);
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
        let nets = nets.into_iter().map(Key::Net);
        nets.map(|net| (net, Value::None)).collect()
    };
    for set in NetSet::ALL {
        let nets = disjoint(state.nets(set));
        elements.insert(Kind::Set(OwnSet::Nets(set)), nets);
    }
    let vips = state.vips.iter();
    let vips = vips.map(|vip| (Key::Address(*vip), Value::None));
    elements.insert(Kind::Set(OwnSet::Vips), vips.collect());
    for landmark in &state.landmarks {
        let kind = match landmark {
            Landmark::Way(_) => Kind::Ways,
            Landmark::Node(_) => Kind::Nodes,
            Landmark::Lan(_) => Kind::Lans,
        };
        let set = elements.entry(kind).or_default();
        set.insert(Key::Landmark(landmark.clone()), Value::None);
    }
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
    let addresses = |kind: Kind| {
        keys(kind).filter_map(|(key, value)| match key {
            Key::Address(address) => Some((*address, value)),
            Key::Net(_) | Key::Landmark(_) => None,
        })
    };
    let mut pods: BTreeMap<IpAddr, PodState> = BTreeMap::new();
    for set in PodSet::ALL {
        for (pod, _) in addresses(Kind::Set(OwnSet::Pods(set))) {
            pods.entry(pod).or_default().set(set, true);
        }
    }
    for (pod, value) in addresses(Kind::Slot) {
        if let Value::Chain(chain) = value {
            pods.entry(pod).or_default().mark = mark_of_chain(chain, mask);
        }
    }
    for (pod, value) in addresses(Kind::Vip) {
        if let Value::Address(vip) = value {
            pods.entry(pod).or_default().vips.insert(*vip);
        }
    }
    let landmarks = [Kind::Ways, Kind::Nodes, Kind::Lans]
        .into_iter()
        .flat_map(keys);
    let landmarks = landmarks.filter_map(|(key, _)| match key {
        Key::Landmark(landmark) => Some(landmark.clone()),
        Key::Address(_) | Key::Net(_) => None,
    });
    let vips = addresses(Kind::Set(OwnSet::Vips));
    let mut state = FirewallState {
        skeleton,
        vips: vips.map(|(vip, _)| vip).collect(),
        landmarks: landmarks.collect(),
        pods,
        ..FirewallState::default()
    };
    for set in NetSet::ALL {
        let nets = keys(Kind::Set(OwnSet::Nets(set)));
        let nets = nets.filter_map(|(key, _)| match key {
            Key::Net(net) => Some(*net),
            Key::Address(_) | Key::Landmark(_) => None,
        });
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
                Kind::Ways => ("ways".to_owned(), name),
                Kind::Nodes => ("nodes".to_owned(), name),
                Kind::Lans => ("lans".to_owned(), name),
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
            mark: Some(Mark {
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
            landmarks: [
                Landmark::Way(Way {
                    mark: Mark {
                        value: 0x0020_0000,
                        mask,
                    },
                    via: ip("192.0.2.12"),
                }),
                Landmark::Node(Mac([2, 0, 0, 0, 0, 12])),
                Landmark::Lan("eth0".to_owned()),
            ]
            .into(),
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
