//! Forgets connections that pods opened to outside, so that their address translation is decided anew.
//!
//! One dump for each family, a pure predicate, and deletes sent in batches: thousands of entries cost
//! milliseconds, where a process for each took 20 s. Entries are chosen by their original source alone:
//! inbound connections have another one, and stay.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, NLM_F_ACK, Nla};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol,
    Status, Tuple,
};
use netlink_packet_netfilter::{NetfilterMessageInner, NetfilterProtoFamily};

use crate::kernel::netfilter::{Message, Netfilter, NetlinkError, message};
use crate::state::{ConnectionStep, Family};

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
/// How many requests are sent before their answers are read. An answer takes 832 bytes of the receive buffer where it was
/// measured, and more with other build options of the kernel: these fit many times over.
const ENTRIES_AT_ONCE: usize = 256;
const ENOENT: i32 = 2;

/// What can go wrong with connection tracking.
#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    /// No socket, or no answer.
    #[error("connection tracking: {0}")]
    Netlink(#[from] NetlinkError),
    /// The work was cut off.
    #[error("forgetting connections was cut off: {0}")]
    CutOff(#[from] tokio::task::JoinError),
}

/// What tells an entry from all others, as the kernel gave it.
type Entry = Vec<ConntrackAttribute>;

/// Selection connections of a pod are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    /// None.
    Nothing,
    /// Those that leave with this source.
    WithSource(IpAddr),
    /// The same, and their windows are not looked at from now on: packets may have passed elsewhere.
    Resumed(IpAddr),
}

/// Selection connections are to be forgotten.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    /// Those that pods opened to outside.
    pub(crate) pods: BTreeMap<IpAddr, Keep>,
    /// Those to VIPs that nobody has answered.
    pub(crate) unanswered: BTreeSet<IpAddr>,
    /// Those that these pods opened to destinations that were outside until now: to those in `newly_excluded`.
    pub(crate) inside: BTreeSet<IpAddr>,
    /// Where that is.
    pub(crate) newly_excluded: BTreeSet<IpNet>,
}

impl Selection {
    /// Selects what a step forgets or resumes.
    pub(crate) fn add(&mut self, step: &ConnectionStep) {
        match step {
            ConnectionStep::Forget(pod) => drop(self.pods.insert(*pod, Keep::Nothing)),
            ConnectionStep::Resume { pod, source } => {
                self.pods.insert(*pod, Keep::Resumed(*source));
            }
            ConnectionStep::ForgetWrongSource { sources, vips } => {
                for (pod, source) in sources {
                    self.pods.entry(*pod).or_insert(Keep::WithSource(*source));
                }
                self.unanswered.extend(vips);
            }
            ConnectionStep::ForgetNewlyExcluded { pods, nets } => {
                self.inside.extend(pods);
                self.newly_excluded.extend(nets);
            }
            // Changes nothing in connection tracking.
            ConnectionStep::ElicitAck(_) => {}
        }
    }

    fn concerns(&self, family: Family) -> bool {
        let addresses = self.pods.keys().chain(&self.unanswered);
        let mut addresses = addresses.chain(&self.inside);
        addresses.any(|address| Family::of(*address) == family)
    }
}

/// Replies that may still come to a pod's own address when their connection is forgotten: from the node that was its
/// gateway, or from a server that has seen the pod itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LateReply {
    /// TCP or UDP, as a number of IP.
    pub(crate) protocol: u8,
    /// Address and port that they come from.
    pub(crate) outside: (IpAddr, u16),
    /// Address and port that they go to.
    pub(crate) pod: (IpAddr, u16),
}

/// A TCP connection that a pod has opened to outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Flow {
    /// The pod's end.
    pub(crate) pod: SocketAddr,
    /// The other end.
    pub(crate) outside: SocketAddr,
}

/// Connections to forget.
#[derive(Debug, Default)]
pub(crate) struct Selected {
    entries: Vec<(Family, Entry)>,
    /// Those of them whose ends may go on talking.
    pub(crate) established: Vec<Flow>,
    /// What may still come of them.
    pub(crate) late_replies: Vec<LateReply>,
    /// Connections that are kept and taken up anew.
    resumed: Vec<(Family, Entry)>,
}

/// Finds the connections to forget; those to destinations in `excluded` stay.
pub(crate) async fn select(
    selection: Selection,
    excluded: BTreeSet<IpNet>,
) -> Result<Selected, ConntrackError> {
    // Blocking: a dump of a large table takes milliseconds that the agent's other tasks must not wait for.
    tokio::task::spawn_blocking(move || {
        let mut all = Selected::default();
        for family in Family::ALL {
            if selection.concerns(family) {
                let selected = find_family(family, &selection, &excluded)?;
                all.entries.extend(selected.entries);
                all.established.extend(selected.established);
                all.late_replies.extend(selected.late_replies);
                all.resumed.extend(selected.resumed);
            }
        }
        Ok(all)
    })
    .await?
}

fn find_family(
    family: Family,
    selection: &Selection,
    excluded: &BTreeSet<IpNet>,
) -> Result<Selected, ConntrackError> {
    let get = NetfilterMessageInner::Conntrack(ConntrackMessage::Get(Vec::new()));
    let take = |selected: &mut Selected, answer: Message<'_>| {
        let NetfilterMessageInner::Conntrack(ConntrackMessage::New(entry)) = answer.decode()?
        else {
            return Ok(());
        };
        if is_to_forget(&entry, &selection.pods, excluded) || is_inside(&entry, selection) {
            selected.late_replies.extend(late(&entry));
            selected.established.extend(established(&entry));
            selected.entries.push((family, identity(entry)));
        } else if is_unanswered(&entry, &selection.unanswered) {
            selected.entries.push((family, identity(entry)));
        } else if is_to_resume(&entry, &selection.pods, excluded) {
            selected.resumed.push((family, resumption(entry)));
        }
        Ok(())
    };
    Ok(Netfilter::open()?.dump(proto(family), &get, take)?)
}

/// The established connections of pods to outside.
pub(crate) async fn find_established(
    pods: BTreeSet<IpAddr>,
    excluded: BTreeSet<IpNet>,
) -> Result<BTreeSet<Flow>, ConntrackError> {
    tokio::task::spawn_blocking(move || {
        let get = NetfilterMessageInner::Conntrack(ConntrackMessage::Get(Vec::new()));
        let is_outside = |flow: &Flow| {
            let outside = flow.outside.ip();
            pods.contains(&flow.pod.ip()) && !excluded.iter().any(|net| net.contains(&outside))
        };
        let take = |flows: &mut BTreeSet<Flow>, answer: Message<'_>| {
            if let NetfilterMessageInner::Conntrack(ConntrackMessage::New(entry)) =
                answer.decode()?
            {
                flows.extend(established(&entry).filter(is_outside));
            }
            Ok(())
        };
        let mut flows = BTreeSet::new();
        for family in Family::ALL {
            if pods.iter().any(|pod| Family::of(*pod) == family) {
                flows.extend(Netfilter::open()?.dump(proto(family), &get, take)?);
            }
        }
        Ok(flows)
    })
    .await?
}

/// Forgets them, and takes up those that are kept.
pub(crate) async fn forget(selected: Selected) -> Result<(), ConntrackError> {
    if selected.entries.is_empty() && selected.resumed.is_empty() {
        return Ok(());
    }
    tokio::task::spawn_blocking(move || {
        let netfilter = Netfilter::open()?;
        for batch in selected.entries.chunks(ENTRIES_AT_ONCE) {
            execute(&netfilter, batch, ConntrackMessage::Delete)?;
        }
        for batch in selected.resumed.chunks(ENTRIES_AT_ONCE) {
            execute(&netfilter, batch, ConntrackMessage::New)?;
        }
        Ok(())
    })
    .await?
}

/// Whether a connection is one to forget: opened by one of the pods, not with the source that it should have,
/// and its other end, which is the source of its replies after any DNAT, is outside. Forgetting a connection to
/// a ClusterIP would send its next packet to another backend.
fn is_to_forget(
    attributes: &[ConntrackAttribute],
    pods: &BTreeMap<IpAddr, Keep>,
    excluded: &BTreeSet<IpNet>,
) -> bool {
    let original = original(attributes).and_then(ends);
    let reply = reply(attributes).and_then(ends);
    let (Some((pod, _)), Some((outside, source))) = (original, reply) else {
        return false;
    };
    let is_kept = match pods.get(&pod) {
        None => true,
        Some(Keep::Nothing) => false,
        // Replies go to the source that the pod's packets leave with.
        Some(Keep::WithSource(wanted) | Keep::Resumed(wanted)) => source == *wanted,
    };
    !is_kept && !excluded.iter().any(|net| net.contains(&outside))
}

/// Whether a connection is one that a pod opened to what was outside until now. One that has another destination than its
/// packets say is of a Service: its next packet would go to another backend.
fn is_inside(attributes: &[ConntrackAttribute], selection: &Selection) -> bool {
    let original = original(attributes).and_then(ends);
    let reply = reply(attributes).and_then(ends);
    let (Some((pod, wanted)), Some((answerer, _))) = (original, reply) else {
        return false;
    };
    let mut nets = selection.newly_excluded.iter();
    selection.inside.contains(&pod) && wanted == answerer && nets.any(|net| net.contains(&answerer))
}

/// Whether a connection is one of TCP to take up: of one of the pods that are resumed, with the right source. Those of
/// other protocols have no windows.
fn is_to_resume(
    attributes: &[ConntrackAttribute],
    pods: &BTreeMap<IpAddr, Keep>,
    excluded: &BTreeSet<IpNet>,
) -> bool {
    let is_tcp = attributes.iter().any(|attribute| match attribute {
        ConntrackAttribute::CtaProtoInfo(info) => {
            info.iter().any(|info| matches!(info, ProtoInfo::TCP(_)))
        }
        _ => false,
    });
    let original = original(attributes).and_then(ends);
    let reply = reply(attributes).and_then(ends);
    let (Some((pod, _)), Some((outside, source)), true) = (original, reply, is_tcp) else {
        return false;
    };
    pods.get(&pod) == Some(&Keep::Resumed(source))
        && !excluded.iter().any(|net| net.contains(&outside))
}

/// Whether a connection is one to a VIP that nobody has answered, and that no Service has taken: that is its reply
/// would come from the VIP itself.
fn is_unanswered(attributes: &[ConntrackAttribute], vips: &BTreeSet<IpAddr>) -> bool {
    let original = original(attributes).and_then(ends);
    let reply = reply(attributes).and_then(ends);
    let (Some((_, vip)), Some((answerer, _))) = (original, reply) else {
        return false;
    };
    let is_answered = attributes.iter().any(|attribute| match attribute {
        ConntrackAttribute::CtaStatus(status) => status.contains(Status::SeenReply),
        _ => false,
    });
    vips.contains(&vip) && answerer == vip && !is_answered
}

/// The connection of an entry, if it is one of TCP that is established, and not of a Service.
fn established(attributes: &[ConntrackAttribute]) -> Option<Flow> {
    let is_established = attributes.iter().any(|attribute| match attribute {
        ConntrackAttribute::CtaProtoInfo(info) => info.iter().any(|info| match info {
            ProtoInfo::TCP(tcp) => tcp.contains(&ProtoInfoTCP::State(ESTABLISHED)),
            _ => false,
        }),
        _ => false,
    });
    let tuple = original(attributes).filter(|_| is_established)?;
    let (pod, outside) = ends(tuple)?;
    let (answerer, _) = reply(attributes).and_then(ends)?;
    let (_, from, to) = ports(tuple)?;
    (answerer == outside).then_some(Flow {
        pod: SocketAddr::new(pod, from),
        outside: SocketAddr::new(outside, to),
    })
}

/// What may still come of a connection that is forgotten; `None` where replies do not come to the pod's own address.
fn late(attributes: &[ConntrackAttribute]) -> Option<LateReply> {
    let (sender, _) = original(attributes).and_then(ends)?;
    let tuple = reply(attributes)?;
    let (outside, pod) = ends(tuple)?;
    // Others than TCP and UDP begin no connection with a reply.
    let (protocol, from, to) = ports(tuple)?;
    (pod == sender).then_some(LateReply {
        protocol,
        outside: (outside, from),
        pod: (pod, to),
    })
}

/// The protocol, TCP or UDP, as a number of IP, and the ports of source and destination.
fn ports(tuple: &[Tuple]) -> Option<(u8, u16, u16)> {
    let parts = tuple.iter().find_map(|part| match part {
        Tuple::Proto(parts) => Some(parts),
        _ => None,
    })?;
    let (mut protocol, mut from, mut to) = (None, None, None);
    for part in parts {
        match part {
            ProtoTuple::Protocol(Protocol::Tcp) => protocol = Some(6),
            ProtoTuple::Protocol(Protocol::Udp) => protocol = Some(17),
            ProtoTuple::SourcePort(port) => from = Some(*port),
            ProtoTuple::DestinationPort(port) => to = Some(*port),
            _ => {}
        }
    }
    Some((protocol?, from?, to?))
}

fn original(attributes: &[ConntrackAttribute]) -> Option<&[Tuple]> {
    attributes.iter().find_map(|attribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(tuple) => Some(tuple.as_slice()),
        _ => None,
    })
}

fn reply(attributes: &[ConntrackAttribute]) -> Option<&[Tuple]> {
    attributes.iter().find_map(|attribute| match attribute {
        ConntrackAttribute::CtaTupleReply(tuple) => Some(tuple.as_slice()),
        _ => None,
    })
}

/// Source and destination.
fn ends(tuple: &[Tuple]) -> Option<(IpAddr, IpAddr)> {
    let addresses = tuple.iter().find_map(|part| match part {
        Tuple::Ip(addresses) => Some(addresses),
        _ => None,
    })?;
    let source = addresses.iter().find_map(|address| match address {
        IPTuple::SourceAddress(source) => Some(*source),
        _ => None,
    });
    let destination = addresses.iter().find_map(|address| match address {
        IPTuple::DestinationAddress(destination) => Some(*destination),
        _ => None,
    });
    source.zip(destination)
}

fn identity(attributes: Vec<ConntrackAttribute>) -> Entry {
    let identifies = |attribute: &ConntrackAttribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(_) => true,
        ConntrackAttribute::Other(other) => matches!(other.kind(), CTA_ID | CTA_ZONE),
        _ => false,
    };
    attributes.into_iter().filter(identifies).collect()
}

/// What takes a TCP connection up wherever it is by now.
fn resumption(entry: Vec<ConntrackAttribute>) -> Entry {
    // The value, and which bits of it count.
    let liberal = |kind| ProtoInfoTCP::Other(DefaultNla::new(kind, vec![BE_LIBERAL; 2]));
    let mut entry = identity(entry);
    entry.retain(|attribute| attribute.kind() != CTA_ID);
    let tcp = vec![
        liberal(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL),
        liberal(CTA_PROTOINFO_TCP_FLAGS_REPLY),
    ];
    entry.push(ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(tcp)]));
    entry
}

/// One request for each entry. Without `NLM_F_CREATE`, `New` changes what is there.
fn execute(
    netfilter: &Netfilter,
    entries: &[(Family, Entry)],
    request: fn(Entry) -> ConntrackMessage,
) -> Result<(), ConntrackError> {
    let mut batch = Vec::new();
    for (family, entry) in entries {
        let request = NetfilterMessageInner::Conntrack(request(entry.clone()));
        batch.extend(message(proto(*family), NLM_F_ACK, 0, request));
    }
    netfilter.send(&batch)?;
    let mut missing = entries.len();
    while missing > 0 {
        netfilter.receive(|answers| {
            for answer in answers {
                let Some(result) = answer.acknowledges() else {
                    continue;
                };
                missing = missing.saturating_sub(1);
                match result {
                    // Ended by itself in the meantime.
                    Err(error) if error.raw_os_error() != Some(ENOENT) => return Err(error.into()),
                    _ => {}
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn proto(family: Family) -> NetfilterProtoFamily {
    match family {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(source: &str, destination: &str) -> Vec<Tuple> {
        vec![Tuple::Ip(vec![
            IPTuple::SourceAddress(source.parse().unwrap()),
            IPTuple::DestinationAddress(destination.parse().unwrap()),
        ])]
    }

    /// Original source and destination, then source and destination of the replies.
    fn entry(original: [&str; 2], reply: [&str; 2]) -> Vec<ConntrackAttribute> {
        vec![
            ConntrackAttribute::CtaTupleOrig(tuple(original[0], original[1])),
            ConntrackAttribute::CtaTupleReply(tuple(reply[0], reply[1])),
            ConntrackAttribute::CtaTimeout(60),
            ConntrackAttribute::Other(DefaultNla::new(CTA_ID, vec![0, 0, 0, 1])),
        ]
    }

    #[test]
    fn only_connections_that_the_pods_opened_to_outside_are_forgotten() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let all = [(ip("10.244.1.11"), Keep::Nothing)].into();
        let as_vip = [(ip("10.244.1.11"), Keep::WithSource(ip("192.0.2.200")))].into();
        let as_itself = [(ip("10.244.1.11"), Keep::WithSource(ip("10.244.1.11")))].into();
        let excluded = ["10.244.0.0/16".parse().unwrap()].into();
        for (what, original, reply, expected) in [
            (
                "to outside",
                ["10.244.1.11", "198.51.100.10"],
                ["198.51.100.10", "192.0.2.200"],
                [true, false, true],
            ),
            (
                "to outside, as the node",
                ["10.244.1.11", "198.51.100.10"],
                ["198.51.100.10", "192.0.2.11"],
                [true, true, true],
            ),
            (
                "to outside, untranslated",
                ["10.244.1.11", "198.51.100.10"],
                ["198.51.100.10", "10.244.1.11"],
                [true, true, false],
            ),
            (
                "of another pod",
                ["10.244.1.12", "198.51.100.10"],
                ["198.51.100.10", "192.0.2.11"],
                [false; 3],
            ),
            (
                "to a ClusterIP",
                ["10.244.1.11", "10.96.0.10"],
                ["10.244.2.11", "10.244.1.11"],
                [false; 3],
            ),
            (
                "inbound to the VIP",
                ["198.51.100.10", "192.0.2.200"],
                ["10.244.1.11", "198.51.100.10"],
                [false; 3],
            ),
        ] {
            let entry = entry(original, reply);
            let selected =
                [&all, &as_vip, &as_itself].map(|pods| is_to_forget(&entry, pods, &excluded));
            assert_eq!(selected, expected, "{what}");
        }
    }

    #[test]
    fn only_connections_to_a_vip_that_nobody_answered_are_forgotten() {
        let vips = ["192.0.2.200".parse().unwrap()].into();
        for (what, original, reply, answered, expected) in [
            (
                "of a server, to a pod's connection",
                ["198.51.100.10", "192.0.2.200"],
                ["192.0.2.200", "198.51.100.10"],
                false,
                true,
            ),
            (
                "to an address of the node itself",
                ["198.51.100.10", "192.0.2.200"],
                ["192.0.2.200", "198.51.100.10"],
                true,
                false,
            ),
            (
                "to the Service",
                ["198.51.100.10", "192.0.2.200"],
                ["10.244.1.11", "198.51.100.10"],
                false,
                false,
            ),
            (
                "to another address",
                ["198.51.100.10", "192.0.2.11"],
                ["192.0.2.11", "198.51.100.10"],
                false,
                false,
            ),
        ] {
            let mut entry = entry(original, reply);
            let seen = Status::Confirmed | Status::SeenReply;
            let status = if answered { seen } else { Status::Confirmed };
            entry.push(ConntrackAttribute::CtaStatus(status));
            assert_eq!(is_unanswered(&entry, &vips), expected, "{what}");
        }
    }

    #[test]
    fn only_what_pods_opened_themselves_to_new_destinations_inside_is_forgotten() {
        let selection = Selection {
            inside: ["10.244.1.11".parse().unwrap()].into(),
            newly_excluded: ["10.9.0.0/16".parse().unwrap()].into(),
            ..Selection::default()
        };
        for (what, original, reply, expected) in [
            (
                "on its way to the gateway",
                ["10.244.1.11", "10.9.0.1"],
                ["10.9.0.1", "10.244.1.11"],
                true,
            ),
            (
                "of another pod",
                ["10.244.1.12", "10.9.0.1"],
                ["10.9.0.1", "10.244.1.12"],
                false,
            ),
            (
                "to another destination",
                ["10.244.1.11", "10.10.0.1"],
                ["10.10.0.1", "10.244.1.11"],
                false,
            ),
            (
                "to a Service",
                ["10.244.1.11", "10.96.0.10"],
                ["10.9.0.1", "10.244.1.11"],
                false,
            ),
        ] {
            assert_eq!(
                is_inside(&entry(original, reply), &selection),
                expected,
                "{what}"
            );
        }
    }

    #[test]
    fn an_entry_is_told_by_its_original_tuple_and_its_number() {
        let kept = identity(entry(
            ["10.244.1.11", "198.51.100.10"],
            ["198.51.100.10", "192.0.2.200"],
        ));
        assert_eq!(kept.len(), 2);
    }
}
