//! One entry of connection tracking, parsed once. Pure.

use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::{DefaultNla, Nla};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol, Status, Tuple,
};

/// `TCP_CONNTRACK_ESTABLISHED` of nf_conntrack_tcp.h.
const ESTABLISHED: u8 = 3;
/// Attributes that tell apart entries with the same tuple (`CTA_ID`, `CTA_ZONE` of nfnetlink_conntrack.h).
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
/// Where the flags of both directions are (nfnetlink_conntrack.h).
const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;
/// `IP_CT_TCP_FLAG_BE_LIBERAL` of nf_conntrack_tcp.h.
const BE_LIBERAL: u8 = 8;

pub(super) type Entry = Vec<ConntrackAttribute>;

/// Replies that may still come to a pod's own address when their connection is forgotten: from the node that was its
/// gateway, or from a server that has seen the pod itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LateReply {
    /// TCP or UDP, as a number of IP.
    pub(crate) protocol: u8,
    pub(crate) outside: SocketAddr,
    pub(crate) pod: SocketAddr,
}

/// A TCP connection that a pod has opened to outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Flow {
    pub(crate) pod: SocketAddr,
    pub(crate) outside: SocketAddr,
}

/// The ends of one direction; the ports are 0 where the protocol has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
}

#[derive(Clone, Debug)]
pub(super) struct Connection {
    /// As the first packet was sent, before any translation.
    pub(super) original: Ends,
    /// As replies are sent: from the destination after DNAT to the source after SNAT.
    pub(super) reply: Ends,
    /// TCP or UDP; `None`: another protocol.
    pub(super) protocol: Option<Protocol>,
    /// A packet of the reply direction was seen.
    pub(super) is_replied: bool,
    /// Of TCP, in state ESTABLISHED.
    pub(super) is_established: bool,
    attributes: Entry,
}

impl Connection {
    /// The entry that the kernel describes; `None` without addresses of both directions.
    pub(super) fn parse(attributes: Entry) -> Option<Connection> {
        let (mut original, mut reply) = (None, None);
        let (mut is_replied, mut is_established) = (false, false);
        for attribute in &attributes {
            match attribute {
                ConntrackAttribute::CtaTupleOrig(tuple) => original = parse_tuple(tuple),
                ConntrackAttribute::CtaTupleReply(tuple) => reply = parse_tuple(tuple),
                ConntrackAttribute::CtaStatus(status) => {
                    is_replied = status.contains(Status::SeenReply);
                }
                ConntrackAttribute::CtaProtoInfo(info) => {
                    is_established = info.iter().any(|info| match info {
                        ProtoInfo::TCP(tcp) => tcp.contains(&ProtoInfoTCP::State(ESTABLISHED)),
                        _ => false,
                    });
                }
                _ => {}
            }
        }
        let (original, protocol) = original?;
        let (reply, _) = reply?;
        Some(Connection {
            original,
            reply,
            protocol,
            is_replied,
            is_established,
            attributes,
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

    /// The connection of TCP, if it is established and not to a Service.
    pub(super) fn flow(&self) -> Option<Flow> {
        (self.is_established && !self.has_dnat()).then_some(Flow {
            pod: self.original.source,
            outside: self.original.destination,
        })
    }

    /// The replies that may still come when it is forgotten; `None` where they do not come to the pod's own address.
    /// Protocols other than TCP and UDP begin no connection with a reply.
    pub(super) fn late_reply(&self) -> Option<LateReply> {
        let protocol = self.protocol?.into();
        (self.leaves_as() == self.opener()).then_some(LateReply {
            protocol,
            outside: self.reply.source,
            pod: self.reply.destination,
        })
    }

    /// What tells the entry from all others, as the kernel gave it.
    pub(super) fn identity(self) -> Entry {
        let identifies = |attribute: &ConntrackAttribute| match attribute {
            ConntrackAttribute::CtaTupleOrig(_) => true,
            ConntrackAttribute::Other(other) => matches!(other.kind(), CTA_ID | CTA_ZONE),
            _ => false,
        };
        self.attributes.into_iter().filter(identifies).collect()
    }

    /// The request that sets the entry liberal: packets of both directions pass, wherever their TCP windows are by now.
    pub(super) fn resumption(self) -> Entry {
        // The value, and which bits of it count.
        let liberal = |kind| ProtoInfoTCP::Other(DefaultNla::new(kind, vec![BE_LIBERAL; 2]));
        let mut entry = self.identity();
        // An entry is changed by its tuple; only deleting compares the number.
        entry.retain(|attribute| attribute.kind() != CTA_ID);
        let tcp = vec![
            liberal(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL),
            liberal(CTA_PROTOINFO_TCP_FLAGS_REPLY),
        ];
        entry.push(ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(tcp)]));
        entry
    }
}

fn parse_tuple(tuple: &[Tuple]) -> Option<(Ends, Option<Protocol>)> {
    let (mut source, mut destination, mut protocol) = (None, None, None);
    let (mut source_port, mut destination_port) = (0, 0);
    for part in tuple {
        match part {
            Tuple::Ip(addresses) => {
                for address in addresses {
                    match address {
                        IPTuple::SourceAddress(found) => source = Some(*found),
                        IPTuple::DestinationAddress(found) => destination = Some(*found),
                        _ => {}
                    }
                }
            }
            Tuple::Proto(parts) => {
                for part in parts {
                    match part {
                        ProtoTuple::Protocol(found) => protocol = Some(*found),
                        ProtoTuple::SourcePort(port) => source_port = *port,
                        ProtoTuple::DestinationPort(port) => destination_port = *port,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let ends = Ends {
        source: SocketAddr::new(source?, source_port),
        destination: SocketAddr::new(destination?, destination_port),
    };
    let is_known = |protocol: &Protocol| matches!(protocol, Protocol::Tcp | Protocol::Udp);
    Some((ends, protocol.filter(is_known)))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

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
    ) -> Entry {
        let number = DefaultNla::new(CTA_ID, vec![0, 0, 0, 1]);
        vec![
            ConntrackAttribute::CtaTupleOrig(tuple(protocol, original[0], original[1])),
            ConntrackAttribute::CtaTupleReply(tuple(protocol, reply[0], reply[1])),
            ConntrackAttribute::CtaTimeout(60),
            ConntrackAttribute::CtaStatus(Status::Confirmed),
            ConntrackAttribute::Other(number),
        ]
    }

    fn established(original: [&str; 2], reply: [&str; 2]) -> Connection {
        let mut entry = entry(Protocol::Tcp, original, reply);
        let state = ProtoInfoTCP::State(ESTABLISHED);
        entry.push(ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(
            vec![state],
        )]));
        Connection::parse(entry).unwrap()
    }

    const POD: &str = "10.244.1.11:40000";
    const SERVER: &str = "198.51.100.10:443";
    const VIP: &str = "192.0.2.200:40000";

    #[test]
    fn an_entry_is_identified_by_its_original_tuple_and_its_number() {
        let connection = established([POD, SERVER], [SERVER, VIP]);
        let kinds = |entry: Entry| entry.iter().map(Nla::kind).collect::<Vec<_>>();
        let [tuple, info] = [1, 4];
        assert_eq!(kinds(connection.clone().identity()), [tuple, CTA_ID]);
        assert_eq!(kinds(connection.resumption()), [tuple, info]);
    }

    #[test]
    fn a_resumption_sets_both_directions_liberal() {
        let entry = established([POD, SERVER], [SERVER, VIP]).resumption();
        let Some(ConntrackAttribute::CtaProtoInfo(info)) = entry.last() else {
            panic!("{entry:?}")
        };
        let flags = |kind| ProtoInfoTCP::Other(DefaultNla::new(kind, vec![8, 8]));
        assert_eq!(*info, [ProtoInfo::TCP(vec![flags(4), flags(5)])]);
    }

    #[test]
    fn only_established_connections_that_are_not_of_a_service_are_flows() {
        let flow = Flow {
            pod: POD.parse().unwrap(),
            outside: SERVER.parse().unwrap(),
        };
        let to_outside = established([POD, SERVER], [SERVER, VIP]);
        assert_eq!(to_outside.flow(), Some(flow));
        let to_service = established([POD, "10.96.0.10:80"], ["10.244.2.21:8080", POD]);
        assert_eq!(to_service.flow(), None);
        let begun = entry(Protocol::Tcp, [POD, SERVER], [SERVER, VIP]);
        assert_eq!(Connection::parse(begun).unwrap().flow(), None);
    }

    #[test]
    fn late_replies_are_those_to_the_pod_itself() {
        let late = |protocol, replies_to| {
            let entry = entry(protocol, [POD, SERVER], [SERVER, replies_to]);
            Connection::parse(entry).unwrap().late_reply()
        };
        let expected = |protocol| {
            Some(LateReply {
                protocol,
                outside: SERVER.parse().unwrap(),
                pod: POD.parse().unwrap(),
            })
        };
        assert_eq!(late(Protocol::Tcp, POD), expected(6));
        assert_eq!(late(Protocol::Udp, POD), expected(17));
        assert_eq!(late(Protocol::Icmp, POD), None);
        assert_eq!(late(Protocol::Tcp, VIP), None);
    }
}
