//! One entry of connection tracking, parsed once. Pure.
//!
//! Only what decides is decoded: a table may have hundreds of thousands of entries, and attributes of a newer kernel.
//! The numbers are those of nfnetlink_conntrack.h.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED, Nla};
use netlink_packet_netfilter::conntrack::{
    IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol, Status, Tuple,
};
use nix::libc::{
    IPPROTO_DCCP, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP,
    IPPROTO_UDPLITE, c_int,
};

use crate::kernel::netfilter::{Message, attribute, attributes};

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
/// Tells apart entries with the same tuple.
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
/// The zone of one direction.
const CTA_TUPLE_ZONE: u16 = 3;
const CTA_IP_SRC: [u16; 2] = [1, 3];
const CTA_IP_DST: [u16; 2] = [2, 4];
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
/// Where the flags of both directions are.
const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;
/// By which parts of the original tuple a dump is filtered, and that it is by the source.
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_F_CTA_IP_SRC: u32 = 1;
/// From `TCP_CONNTRACK_ESTABLISHED` to `TCP_CONNTRACK_LAST_ACK` of nf_conntrack_tcp.h: both ends have a socket, and one of
/// them may wait for the other. In TIME_WAIT all is said.
const OPEN: std::ops::RangeInclusive<u8> = 3..=6;
/// `IP_CT_TCP_FLAG_BE_LIBERAL` of nf_conntrack_tcp.h.
const BE_LIBERAL: u8 = 8;

const TCP: u8 = number(IPPROTO_TCP);
/// Protocols whose packets begin with two ports.
const WITH_PORTS: [u8; 5] = [
    TCP,
    number(IPPROTO_UDP),
    number(IPPROTO_DCCP),
    number(IPPROTO_SCTP),
    number(IPPROTO_UDPLITE),
];
/// Their replies are tied to a request, and begin nothing.
const ICMP: [u8; 2] = [number(IPPROTO_ICMP), number(IPPROTO_ICMPV6)];

/// A protocol's number as IP carries it: one byte.
const fn number(protocol: c_int) -> u8 {
    protocol.to_le_bytes()[0]
}

/// What names an entry, and what is wanted of it.
pub(super) type Entry = Vec<DefaultNla>;

/// Replies that may still come to a pod's own address when their connection is forgotten: from the node that was its
/// gateway, or from a server that has seen the pod itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LateReply {
    /// As a number of IP.
    pub(crate) protocol: u8,
    pub(crate) outside: IpAddr,
    pub(crate) pod: IpAddr,
    /// Of outside and pod; `None` for protocols that have none.
    pub(crate) ports: Option<[u16; 2]>,
}

/// A TCP connection that a pod has opened to outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Flow {
    pub(crate) pod: SocketAddr,
    pub(crate) outside: SocketAddr,
}

impl Flow {
    /// What names its entry.
    pub(super) fn entry(self) -> Entry {
        let Flow { pod, outside } = self;
        let addresses = vec![
            IPTuple::SourceAddress(pod.ip()),
            IPTuple::DestinationAddress(outside.ip()),
        ];
        let ports = vec![
            ProtoTuple::Protocol(Protocol::Tcp),
            ProtoTuple::SourcePort(pod.port()),
            ProtoTuple::DestinationPort(outside.port()),
        ];
        let tuple = [Tuple::Ip(addresses), Tuple::Proto(ports)];
        vec![nested(CTA_TUPLE_ORIG, &tuple)]
    }
}

/// The ends of one direction; the ports are 0 where the protocol has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
}

/// A connection as people name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    protocol: u8,
    ends: Ends,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Named { protocol, ends } = self;
        let Ends {
            source,
            destination,
        } = ends;
        write!(f, "{source} to {destination} (protocol {protocol})")
    }
}

/// An entry of the default zone. Those of other zones are none of ours: switches in software track the same packets there,
/// and our translation is not among them.
#[derive(Clone, Debug)]
pub(super) struct Connection<'a> {
    /// As the first packet was sent, before any translation.
    pub(super) original: Ends,
    /// As replies are sent: from the destination after DNAT to the source after SNAT.
    pub(super) reply: Ends,
    /// As a number of IP.
    protocol: u8,
    /// A packet of the reply direction was seen.
    pub(super) is_replied: bool,
    /// Of TCP; `None` where connection tracking does not tell, as of flows that the kernel forwards past it (flow tables).
    tcp_state: Option<u8>,
    /// The original tuple and the number, as the kernel gave them.
    tuple: &'a [u8],
    number: Option<&'a [u8]>,
}

impl<'a> Connection<'a> {
    /// The entry that the kernel describes; `None` without addresses of both directions, and in another zone than the
    /// default one.
    pub(super) fn parse(message: &Message<'a>) -> Option<Connection<'a>> {
        let (mut original, mut reply, mut number) = (None, None, None);
        let (mut is_replied, mut tcp_state) = (false, None);
        for (kind, value) in message.attributes() {
            match kind {
                CTA_TUPLE_ORIG => original = Some((parse_tuple(value)?, value)),
                CTA_TUPLE_REPLY => reply = Some(parse_tuple(value)?),
                CTA_STATUS => {
                    let bits = u32::from_be_bytes(value.try_into().ok()?);
                    is_replied = Status::from_bits_retain(bits).contains(Status::SeenReply);
                }
                CTA_PROTOINFO => {
                    let tcp = attribute(value, CTA_PROTOINFO_TCP);
                    let state = tcp.and_then(|tcp| attribute(tcp, CTA_PROTOINFO_TCP_STATE));
                    tcp_state = state.and_then(|state| state.first().copied());
                }
                CTA_ID => number = Some(value),
                CTA_ZONE if is_other_zone(value) => return None,
                _ => {}
            }
        }
        let ((original, protocol), tuple) = original?;
        let (reply, _) = reply?;
        Some(Connection {
            original,
            reply,
            protocol,
            is_replied,
            tcp_state,
            tuple,
            number,
        })
    }

    /// Who opened it.
    pub(super) fn opener(&self) -> IpAddr {
        self.original.source.ip()
    }

    /// Who answers: the destination after any DNAT.
    pub(super) fn answerer(&self) -> IpAddr {
        self.reply.source.ip()
    }

    /// The source that the opener's packets leave with, after any SNAT.
    pub(super) fn leaves_as(&self) -> IpAddr {
        self.reply.destination.ip()
    }

    /// Whether its destination was translated, as that of a Service is.
    pub(super) fn has_dnat(&self) -> bool {
        self.answerer() != self.original.destination.ip()
    }

    /// Only TCP has windows, and tells its beginning.
    pub(super) fn is_tcp(&self) -> bool {
        self.protocol == TCP
    }

    /// Whether any packet of its protocol may begin a connection, a reply too.
    pub(super) fn begins_with_any_packet(&self) -> bool {
        !self.is_tcp() && !ICMP.contains(&self.protocol)
    }

    /// The connection of TCP, if it is not to a Service, and whether it is open: a socket that is, also one that has sent
    /// or received its last byte, answers a SYN with an acknowledgement.
    pub(super) fn flow(&self) -> Option<(Flow, bool)> {
        let flow = Flow {
            pod: self.original.source,
            outside: self.original.destination,
        };
        let is_open = self.tcp_state.is_none_or(|state| OPEN.contains(&state));
        (self.is_tcp() && !self.has_dnat()).then_some((flow, is_open))
    }

    /// The replies that may still come when it is forgotten; `None` where they do not come to the pod's own address, or
    /// begin nothing.
    pub(super) fn late_reply(&self) -> Option<LateReply> {
        let Ends {
            source,
            destination,
        } = self.reply;
        let ports = [source.port(), destination.port()];
        // What connection tracking knows no ports of has none for us either.
        let has_ports = WITH_PORTS.contains(&self.protocol) && ports != [0; 2];
        let begins = !ICMP.contains(&self.protocol);
        (begins && self.leaves_as() == self.opener()).then_some(LateReply {
            protocol: self.protocol,
            outside: source.ip(),
            pod: destination.ip(),
            ports: has_ports.then_some(ports),
        })
    }

    pub(super) fn name(&self) -> Named {
        Named {
            protocol: self.protocol,
            ends: self.original,
        }
    }

    /// What tells the entry from all others.
    pub(super) fn identity(&self) -> Entry {
        let number = self.number.map(|id| DefaultNla::new(CTA_ID, id.to_vec()));
        [self.tuple()].into_iter().chain(number).collect()
    }

    /// The request that sets the entry liberal: packets of both directions pass, wherever their TCP windows are by now.
    pub(super) fn resumption(&self) -> Entry {
        // The value, and which bits of it count.
        let liberal = |kind| ProtoInfoTCP::Other(DefaultNla::new(kind, vec![BE_LIBERAL; 2]));
        let tcp = vec![
            liberal(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL),
            liberal(CTA_PROTOINFO_TCP_FLAGS_REPLY),
        ];
        // An entry is changed by its tuple; only deleting compares the number.
        vec![self.tuple(), nested(CTA_PROTOINFO, &[ProtoInfo::TCP(tcp)])]
    }

    fn tuple(&self) -> DefaultNla {
        DefaultNla::new(CTA_TUPLE_ORIG | NLA_F_NESTED, self.tuple.to_vec())
    }
}

fn nested(kind: u16, parts: &[impl Nla]) -> DefaultNla {
    let mut value = vec![0; parts.buffer_len()];
    parts.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

/// Who opened the connection of an entry, whatever its zone.
pub(super) fn opener(message: &Message<'_>) -> Option<IpAddr> {
    let addresses = attribute(message.attribute(CTA_TUPLE_ORIG)?, CTA_TUPLE_IP)?;
    address(addresses, CTA_IP_SRC)
}

/// The question for entries with an original source (kernel 5.8 and newer; older ones answer with all entries).
pub(super) fn opened_by(source: IpAddr) -> Entry {
    let flags = DefaultNla::new(
        CTA_FILTER_ORIG_FLAGS,
        CTA_FILTER_F_CTA_IP_SRC.to_ne_bytes().to_vec(),
    );
    let source = Tuple::Ip(vec![IPTuple::SourceAddress(source)]);
    vec![
        nested(CTA_TUPLE_ORIG, &[source]),
        nested(CTA_FILTER, &[flags]),
    ]
}

/// The ends of a tuple, and its protocol.
fn parse_tuple(tuple: &[u8]) -> Option<(Ends, u8)> {
    let (mut addresses, mut protocol): (&[u8], &[u8]) = (&[], &[]);
    for (kind, value) in attributes(tuple) {
        match kind {
            CTA_TUPLE_IP => addresses = value,
            CTA_TUPLE_PROTO => protocol = value,
            CTA_TUPLE_ZONE if is_other_zone(value) => return None,
            _ => {}
        }
    }
    let port = |kind| {
        let port = attribute(protocol, kind).and_then(|port| port.try_into().ok());
        port.map_or(0, u16::from_be_bytes)
    };
    let source = SocketAddr::new(address(addresses, CTA_IP_SRC)?, port(CTA_PROTO_SRC_PORT));
    let destination = SocketAddr::new(address(addresses, CTA_IP_DST)?, port(CTA_PROTO_DST_PORT));
    let ends = Ends {
        source,
        destination,
    };
    let number = attribute(protocol, CTA_PROTO_NUM)?.first()?;
    Some((ends, *number))
}

/// The address in an attribute, of IPv4 or of IPv6.
fn address(addresses: &[u8], [v4, v6]: [u16; 2]) -> Option<IpAddr> {
    let octets = |kind| attribute(addresses, kind);
    let v4 = || <[u8; 4]>::try_from(octets(v4)?).ok().map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(octets(v6)?).ok().map(IpAddr::from);
    v4().or_else(v6)
}

fn is_other_zone(zone: &[u8]) -> bool {
    zone.iter().any(|byte| *byte != 0)
}

#[cfg(test)]
pub(super) mod tests {
    use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage};
    use netlink_packet_netfilter::{NetfilterMessageInner, NetfilterProtoFamily};

    use super::*;
    use crate::kernel::netfilter::message;
    use crate::kernel::netlink::messages;

    const SCTP: Protocol = Protocol::Sctp;
    const ESP: Protocol = Protocol::Other(50);

    fn tuple(protocol: Protocol, source: &str, destination: &str) -> Vec<Tuple> {
        let [source, destination]: [SocketAddr; 2] =
            [source, destination].map(|end| end.parse().unwrap());
        vec![
            Tuple::Ip(vec![
                IPTuple::SourceAddress(source.ip()),
                IPTuple::DestinationAddress(destination.ip()),
            ]),
            Tuple::Proto(vec![
                ProtoTuple::Protocol(protocol),
                ProtoTuple::SourcePort(source.port()),
                ProtoTuple::DestinationPort(destination.port()),
            ]),
        ]
    }

    /// An entry with original source and destination, then source and destination of the replies.
    pub(in crate::kernel::conntrack) fn entry(
        protocol: Protocol,
        original: [&str; 2],
        reply: [&str; 2],
    ) -> Vec<ConntrackAttribute> {
        vec![
            ConntrackAttribute::CtaTupleOrig(tuple(protocol, original[0], original[1])),
            ConntrackAttribute::CtaTupleReply(tuple(protocol, reply[0], reply[1])),
            ConntrackAttribute::CtaTimeout(60),
            ConntrackAttribute::CtaStatus(Status::Confirmed),
            other(CTA_ID, &[0, 0, 0, 1]),
        ]
    }

    fn other(kind: u16, value: &[u8]) -> ConntrackAttribute {
        ConntrackAttribute::Other(DefaultNla::new(kind, value.to_vec()))
    }

    fn bytes(attributes: &[impl Nla]) -> Vec<u8> {
        let mut bytes = vec![0; attributes.buffer_len()];
        attributes.emit(&mut bytes);
        bytes
    }

    /// The entry as the kernel would tell it.
    pub(in crate::kernel::conntrack) fn told(
        entry: Vec<ConntrackAttribute>,
    ) -> Option<Connection<'static>> {
        let inner = NetfilterMessageInner::Conntrack(ConntrackMessage::New(entry));
        let bytes = message(NetfilterProtoFamily::IPv4, 0, 0, inner).leak();
        Connection::parse(&messages(bytes).unwrap()[0])
    }

    fn in_state(state: u8, original: [&str; 2], reply: [&str; 2]) -> Connection<'static> {
        let mut entry = entry(Protocol::Tcp, original, reply);
        let state = ProtoInfoTCP::State(state);
        entry.push(ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(
            vec![state],
        )]));
        told(entry).unwrap()
    }

    const POD: &str = "10.244.1.11:40000";
    const SERVER: &str = "198.51.100.10:443";
    const VIP: &str = "192.0.2.200:40000";
    const ESTABLISHED: u8 = 3;

    #[test]
    fn an_entry_is_identified_by_its_original_tuple_and_its_number() {
        let original = [POD, SERVER];
        let connection = in_state(ESTABLISHED, original, [SERVER, VIP]);
        let tuple = ConntrackAttribute::CtaTupleOrig(tuple(Protocol::Tcp, POD, SERVER));
        let expected = [tuple, other(CTA_ID, &[0, 0, 0, 1])];
        assert_eq!(bytes(&connection.identity()), bytes(&expected));
    }

    #[test]
    fn a_resumption_sets_both_directions_liberal() {
        let entry = in_state(ESTABLISHED, [POD, SERVER], [SERVER, VIP]).resumption();
        let flags = |kind| ProtoInfoTCP::Other(DefaultNla::new(kind, vec![8, 8]));
        let expected = [
            ConntrackAttribute::CtaTupleOrig(tuple(Protocol::Tcp, POD, SERVER)),
            ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(vec![flags(4), flags(5)])]),
        ];
        assert_eq!(bytes(&entry), bytes(&expected));
    }

    #[test]
    fn entries_of_other_zones_are_none_of_ours() {
        let zone = |number: u16| other(CTA_ZONE, &number.to_be_bytes());
        let entry = || entry(Protocol::Tcp, [POD, SERVER], [SERVER, VIP]);
        for (number, is_ours) in [(0, true), (5, false), (0xfff0, false)] {
            let entry = entry().into_iter().chain([zone(number)]);
            assert_eq!(told(entry.collect()).is_some(), is_ours, "zone {number}");
        }
        for direction in 0..2 {
            let mut entry = entry();
            let (ConntrackAttribute::CtaTupleOrig(tuple)
            | ConntrackAttribute::CtaTupleReply(tuple)) = &mut entry[direction]
            else {
                panic!("{entry:?}")
            };
            let zone = DefaultNla::new(CTA_TUPLE_ZONE, vec![0, 5]);
            tuple.push(Tuple::Other(zone));
            assert!(told(entry).is_none(), "zone of direction {direction}");
        }
    }

    #[test]
    fn open_connections_that_are_not_of_a_service_are_flows() {
        let flow = Flow {
            pod: POD.parse().unwrap(),
            outside: SERVER.parse().unwrap(),
        };
        let to_outside = [[POD, SERVER], [SERVER, VIP]];
        let states = [
            ("SYN_SENT", 1, false),
            ("SYN_RECV", 2, false),
            ("ESTABLISHED", 3, true),
            ("FIN_WAIT", 4, true),
            ("CLOSE_WAIT", 5, true),
            ("LAST_ACK", 6, true),
            ("TIME_WAIT", 7, false),
            ("CLOSE", 8, false),
            ("SYN_SENT2", 9, false),
        ];
        for (name, state, is_open) in states {
            let connection = in_state(state, to_outside[0], to_outside[1]);
            assert_eq!(connection.flow(), Some((flow, is_open)), "{name}");
        }
        let untold = |protocol| told(entry(protocol, to_outside[0], to_outside[1])).unwrap();
        // One that the kernel forwards past connection tracking.
        assert_eq!(untold(Protocol::Tcp).flow(), Some((flow, true)));
        assert_eq!(untold(Protocol::Udp).flow(), None);
        let to_service = [[POD, "10.96.0.10:80"], ["10.244.2.21:8080", POD]];
        let to_service = in_state(ESTABLISHED, to_service[0], to_service[1]);
        assert_eq!(to_service.flow(), None);
    }

    #[test]
    fn late_replies_are_those_to_the_pod_itself() {
        let late = |protocol, [pod, server, replies_to]: [&str; 3]| {
            let entry = entry(protocol, [pod, server], [server, replies_to]);
            told(entry).unwrap().late_reply()
        };
        let expected = |protocol, ports| {
            Some(LateReply {
                protocol,
                outside: "198.51.100.10".parse().unwrap(),
                pod: "10.244.1.11".parse().unwrap(),
                ports,
            })
        };
        let to_pod = [POD, SERVER, POD];
        for (protocol, number) in [
            (Protocol::Tcp, 6),
            (Protocol::Udp, 17),
            (Protocol::Dccp, 33),
            (SCTP, 132),
            (Protocol::UdpLite, 136),
        ] {
            let expected = expected(number, Some([443, 40000]));
            assert_eq!(late(protocol, to_pod), expected, "{protocol:?}");
        }
        let portless = ["10.244.1.11:0", "198.51.100.10:0", "10.244.1.11:0"];
        assert_eq!(late(ESP, portless), expected(50, None));
        // Its keys are no ports.
        assert_eq!(late(Protocol::Gre, to_pod), expected(47, None));
        // The kernel has no tracker for its ports.
        assert_eq!(late(SCTP, portless), expected(132, None));
        for protocol in [Protocol::Icmp, Protocol::Ipv6Icmp] {
            assert_eq!(late(protocol, to_pod), None, "{protocol:?}");
        }
        assert_eq!(late(Protocol::Tcp, [POD, SERVER, VIP]), None);
    }

    #[test]
    fn a_filter_names_the_source_and_no_other_part() {
        let bytes = bytes(&opened_by("10.244.1.11".parse().unwrap()));
        let attributes = |bytes| attributes(bytes).collect::<Vec<_>>();
        let [(CTA_TUPLE_ORIG, tuple), (CTA_FILTER, filter)] = attributes(&bytes)[..] else {
            panic!("{bytes:?}")
        };
        let source = attribute(tuple, CTA_TUPLE_IP).unwrap();
        assert_eq!(attributes(source), [(1, &[10, 244, 1, 11][..])]);
        assert_eq!(attributes(filter), [(1, &1_u32.to_ne_bytes()[..])]);
    }
}
