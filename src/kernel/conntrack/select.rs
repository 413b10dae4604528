//! Which connections are forgotten, and which are resumed. Pure.
//!
//! Entries are chosen by their original source: an inbound connection has the client's, and stays. But for those that
//! nobody guarded against.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::kernel::conntrack::connection::Connection;
use crate::state::{ConnectionStep, Family};

/// Which connections of a pod are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    Nothing,
    /// Those that leave with this source.
    WithSource(IpAddr),
    /// As `WithSource`, and kept TCP entries are set to be liberal: packets passed another gateway meanwhile, so window
    /// tracking would call them INVALID.
    Resumed(IpAddr),
}

/// Which connections are to be forgotten or resumed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    /// Those that pods opened to outside.
    pods: BTreeMap<IpAddr, Keep>,
    /// Unreplied ones to these VIPs.
    unreplied_to: BTreeSet<IpAddr>,
    /// Those of these pods to destinations that are excluded from now on.
    newly_excluded_of: BTreeSet<IpAddr>,
    newly_excluded: BTreeSet<IpNet>,
    /// Those to these pods that may be the rest of the pods' own.
    unguarded: BTreeSet<IpAddr>,
}

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// It is a pod's: forgotten, and its late replies are expected.
    Forget,
    /// It is a server's, to a VIP or to a pod: forgotten.
    ForgetInbound,
    /// It is kept, and set liberal.
    Resume,
    Leave,
}

impl Selection {
    /// Selects what a step forgets or resumes.
    pub(crate) fn add(&mut self, step: &ConnectionStep) {
        match step {
            ConnectionStep::Forget(pod) => drop(self.pods.insert(*pod, Keep::Nothing)),
            ConnectionStep::Resume { pod, source } => {
                self.pods.insert(*pod, Keep::Resumed(*source));
            }
            ConnectionStep::ForgetWrongSource {
                sources,
                vips,
                unguarded,
            } => {
                for (pod, source) in sources {
                    self.pods.entry(*pod).or_insert(Keep::WithSource(*source));
                }
                self.unreplied_to.extend(vips);
                self.unguarded.extend(unguarded);
            }
            ConnectionStep::ForgetNewlyExcluded { pods, nets } => {
                self.newly_excluded_of.extend(pods);
                self.newly_excluded.extend(nets);
            }
            // Changes nothing in connection tracking.
            ConnectionStep::ElicitAck(_) => {}
        }
    }

    /// The pods of a family whose own connections are looked at.
    pub(super) fn openers(&self, family: Family) -> BTreeSet<IpAddr> {
        let pods = self.pods.keys().chain(&self.newly_excluded_of);
        of_family(pods, family).collect()
    }

    /// Whether more connections of a family are looked at than those that pods opened.
    pub(super) fn is_about_others(&self, family: Family) -> bool {
        let addresses = self.unreplied_to.iter().chain(&self.unguarded);
        of_family(addresses, family).next().is_some()
    }

    /// What happens to a connection; those of pods to destinations in `excluded` stay.
    pub(super) fn choose(&self, connection: &Connection<'_>, excluded: &BTreeSet<IpNet>) -> Choice {
        if self.has_wrong_source(connection) && is_to_outside(connection, excluded)
            || self.is_newly_excluded(connection)
        {
            Choice::Forget
        } else if self.is_unreplied(connection) || self.is_rest(connection, excluded) {
            Choice::ForgetInbound
        } else if self.is_resumed(connection) && is_to_outside(connection, excluded) {
            Choice::Resume
        } else {
            Choice::Leave
        }
    }

    /// Opened by one of the pods, and does not leave with the source that it should have.
    fn has_wrong_source(&self, connection: &Connection<'_>) -> bool {
        match self.pods.get(&connection.opener()) {
            None => false,
            Some(Keep::Nothing) => true,
            Some(Keep::WithSource(wanted) | Keep::Resumed(wanted)) => {
                connection.leaves_as() != *wanted
            }
        }
    }

    /// Opened by a pod to a destination that is excluded from now on; not by way of a Service: its next packet would go to
    /// another backend.
    fn is_newly_excluded(&self, connection: &Connection<'_>) -> bool {
        self.newly_excluded_of.contains(&connection.opener())
            && !connection.has_dnat()
            && contain(&self.newly_excluded, connection.answerer())
    }

    /// Sent to a VIP, taken by no Service, and never answered.
    fn is_unreplied(&self, connection: &Connection<'_>) -> bool {
        self.unreplied_to.contains(&connection.answerer())
            && !connection.has_dnat()
            && !connection.is_replied
    }

    /// Sent to a pod's own address from outside, taken by no Service, in a protocol that does not tell a beginning: the
    /// rest of a connection that the pod has opened. What it says there is an answer, which leaves with its own address.
    fn is_rest(&self, connection: &Connection<'_>, excluded: &BTreeSet<IpNet>) -> bool {
        self.unguarded.contains(&connection.answerer())
            && !connection.has_dnat()
            && connection.begins_with_any_packet()
            && !contain(excluded, connection.opener())
    }

    /// Opened by a pod that is resumed, with the right source. Only TCP has windows.
    fn is_resumed(&self, connection: &Connection<'_>) -> bool {
        self.pods.get(&connection.opener()) == Some(&Keep::Resumed(connection.leaves_as()))
            && connection.is_tcp()
    }
}

/// The addresses that are of a family.
pub(super) fn of_family<'a>(
    addresses: impl Iterator<Item = &'a IpAddr>,
    family: Family,
) -> impl Iterator<Item = IpAddr> {
    addresses
        .copied()
        .filter(move |address| Family::of(*address) == family)
}

/// Whether the other end is outside. After DNAT: an entry to a ClusterIP stays, because without it the next packet would
/// go to another backend.
pub(super) fn is_to_outside(connection: &Connection<'_>, excluded: &BTreeSet<IpNet>) -> bool {
    !contain(excluded, connection.answerer())
}

fn contain(nets: &BTreeSet<IpNet>, address: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(&address))
}

#[cfg(test)]
mod tests {
    use netlink_packet_netfilter::conntrack::{ConntrackAttribute, Protocol, Status};

    use super::*;
    use crate::kernel::conntrack::connection::tests::{entry, told};

    const PROTOCOLS: [Protocol; 6] = [
        Protocol::Tcp,
        Protocol::Udp,
        Protocol::Sctp,
        Protocol::Gre,
        Protocol::Icmp,
        Protocol::Other(50),
    ];

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// With ports, which decide nothing here.
    fn connection(
        protocol: Protocol,
        original: [&str; 2],
        reply: [&str; 2],
    ) -> Connection<'static> {
        let original = original.map(|address| format!("{address}:40000"));
        let reply = reply.map(|address| format!("{address}:40000"));
        let entry = entry(
            protocol,
            [&original[0], &original[1]],
            [&reply[0], &reply[1]],
        );
        told(entry).unwrap()
    }

    fn selection(steps: &[ConnectionStep]) -> Selection {
        let mut selection = Selection::default();
        for step in steps {
            selection.add(step);
        }
        selection
    }

    fn wrong_source(source: &str) -> Selection {
        selection(&[ConnectionStep::ForgetWrongSource {
            sources: [(ip("10.244.1.11"), ip(source))].into(),
            vips: BTreeSet::new(),
            unguarded: BTreeSet::new(),
        }])
    }

    fn resume(pod: &str, source: &str) -> ConnectionStep {
        ConnectionStep::Resume {
            pod: ip(pod),
            source: ip(source),
        }
    }

    fn excluded() -> BTreeSet<IpNet> {
        ["10.244.0.0/16".parse().unwrap()].into()
    }

    #[test]
    fn only_connections_that_the_pods_opened_to_outside_are_forgotten() {
        let all = selection(&[ConnectionStep::Forget(ip("10.244.1.11"))]);
        let as_vip = wrong_source("192.0.2.200");
        let as_itself = wrong_source("10.244.1.11");
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
            for protocol in PROTOCOLS {
                let connection = connection(protocol, original, reply);
                let chosen = [&all, &as_vip, &as_itself]
                    .map(|selection| selection.choose(&connection, &excluded()));
                let expected = expected.map(|forgotten| match forgotten {
                    true => Choice::Forget,
                    false => Choice::Leave,
                });
                assert_eq!(chosen, expected, "{protocol:?} {what}");
            }
        }
    }

    #[test]
    fn resumed_pods_keep_what_leaves_with_their_source_and_only_tcp_is_set_liberal() {
        let selection = selection(&[resume("10.244.1.11", "192.0.2.200")]);
        for (what, protocol, original, reply, expected) in [
            (
                "as the VIP",
                Protocol::Tcp,
                ["10.244.1.11", "198.51.100.10"],
                ["198.51.100.10", "192.0.2.200"],
                Choice::Resume,
            ),
            (
                "without windows",
                Protocol::Udp,
                ["10.244.1.11", "198.51.100.10"],
                ["198.51.100.10", "192.0.2.200"],
                Choice::Leave,
            ),
            (
                "as another VIP",
                Protocol::Tcp,
                ["10.244.1.11", "198.51.100.10"],
                ["198.51.100.10", "192.0.2.201"],
                Choice::Forget,
            ),
            (
                "as another VIP, without windows",
                Protocol::Udp,
                ["10.244.1.11", "198.51.100.10"],
                ["198.51.100.10", "192.0.2.201"],
                Choice::Forget,
            ),
            (
                "of another pod",
                Protocol::Tcp,
                ["10.244.1.12", "198.51.100.10"],
                ["198.51.100.10", "192.0.2.200"],
                Choice::Leave,
            ),
            (
                "inside",
                Protocol::Tcp,
                ["10.244.1.11", "10.244.2.11"],
                ["10.244.2.11", "192.0.2.200"],
                Choice::Leave,
            ),
        ] {
            let chosen = selection.choose(&connection(protocol, original, reply), &excluded());
            assert_eq!(chosen, expected, "{what}");
        }
    }

    #[test]
    fn a_pod_that_is_resumed_or_forgotten_is_not_looked_at_for_wrong_sources_again() {
        let doubt = ConnectionStep::ForgetWrongSource {
            sources: [(ip("10.244.1.11"), ip("192.0.2.200"))].into(),
            vips: BTreeSet::new(),
            unguarded: BTreeSet::new(),
        };
        let as_vip = connection(
            Protocol::Tcp,
            ["10.244.1.11", "198.51.100.10"],
            ["198.51.100.10", "192.0.2.200"],
        );
        for (step, expected) in [
            (resume("10.244.1.11", "192.0.2.200"), Choice::Resume),
            (ConnectionStep::Forget(ip("10.244.1.11")), Choice::Forget),
        ] {
            for steps in [[step.clone(), doubt.clone()], [doubt.clone(), step.clone()]] {
                let chosen = selection(&steps).choose(&as_vip, &excluded());
                assert_eq!(chosen, expected, "{steps:?}");
            }
        }
    }

    #[test]
    fn only_unreplied_connections_to_a_vip_are_forgotten() {
        let selection = selection(&[ConnectionStep::ForgetWrongSource {
            sources: BTreeMap::new(),
            vips: [ip("192.0.2.200")].into(),
            unguarded: BTreeSet::new(),
        }]);
        for (what, original, reply, is_replied, expected) in [
            (
                "of a server, to a pod's connection",
                ["198.51.100.10", "192.0.2.200"],
                ["192.0.2.200", "198.51.100.10"],
                false,
                Choice::ForgetInbound,
            ),
            (
                "to an address of the node itself",
                ["198.51.100.10", "192.0.2.200"],
                ["192.0.2.200", "198.51.100.10"],
                true,
                Choice::Leave,
            ),
            (
                "to the Service",
                ["198.51.100.10", "192.0.2.200"],
                ["10.244.1.11", "198.51.100.10"],
                false,
                Choice::Leave,
            ),
            (
                "to another address",
                ["198.51.100.10", "192.0.2.11"],
                ["192.0.2.11", "198.51.100.10"],
                false,
                Choice::Leave,
            ),
        ] {
            let mut connection = connection(Protocol::Tcp, original, reply);
            connection.is_replied = is_replied;
            let chosen = selection.choose(&connection, &excluded());
            assert_eq!(chosen, expected, "{what}");
        }
    }

    #[test]
    fn what_nobody_guarded_against_is_forgotten_unless_it_tells_where_it_began() {
        let all_but_tcp_and_icmp = [false, true, true, true, false, true];
        let selection = selection(&[ConnectionStep::ForgetWrongSource {
            sources: BTreeMap::new(),
            vips: BTreeSet::new(),
            unguarded: [ip("10.244.1.11")].into(),
        }]);
        for (what, original, reply, expected) in [
            (
                "of a server, to the pod",
                ["198.51.100.10", "10.244.1.11"],
                ["10.244.1.11", "198.51.100.10"],
                all_but_tcp_and_icmp,
            ),
            (
                "of a server, to another pod",
                ["198.51.100.10", "10.244.1.12"],
                ["10.244.1.12", "198.51.100.10"],
                [false; 6],
            ),
            (
                "of a client, to a Service",
                ["198.51.100.10", "192.0.2.200"],
                ["10.244.1.11", "198.51.100.10"],
                [false; 6],
            ),
            (
                "from inside",
                ["10.244.2.11", "10.244.1.11"],
                ["10.244.1.11", "10.244.2.11"],
                [false; 6],
            ),
            (
                "of the pod",
                ["10.244.1.11", "198.51.100.10"],
                ["198.51.100.10", "10.244.1.11"],
                [false; 6],
            ),
        ] {
            for (protocol, expected) in PROTOCOLS.into_iter().zip(expected) {
                let connection = connection(protocol, original, reply);
                let expected = match expected {
                    true => Choice::ForgetInbound,
                    false => Choice::Leave,
                };
                let chosen = selection.choose(&connection, &excluded());
                assert_eq!(chosen, expected, "{protocol:?} {what}");
            }
        }
    }

    #[test]
    fn an_entry_is_replied_when_its_status_says_so() {
        let ends = ["198.51.100.10:443", "192.0.2.200:40000"];
        let mut entry = entry(Protocol::Tcp, ends, [ends[1], ends[0]]);
        assert!(!told(entry.clone()).unwrap().is_replied);
        let seen = Status::Confirmed | Status::SeenReply;
        entry.push(ConntrackAttribute::CtaStatus(seen));
        assert!(told(entry).unwrap().is_replied);
    }

    #[test]
    fn only_what_pods_opened_themselves_to_newly_excluded_destinations_is_forgotten() {
        let selection = selection(&[ConnectionStep::ForgetNewlyExcluded {
            pods: [ip("10.244.1.11")].into(),
            nets: ["10.9.0.0/16".parse().unwrap()].into(),
        }]);
        for (what, original, reply, expected) in [
            (
                "on its way to the gateway",
                ["10.244.1.11", "10.9.0.1"],
                ["10.9.0.1", "10.244.1.11"],
                Choice::Forget,
            ),
            (
                "of another pod",
                ["10.244.1.12", "10.9.0.1"],
                ["10.9.0.1", "10.244.1.12"],
                Choice::Leave,
            ),
            (
                "to another destination",
                ["10.244.1.11", "10.10.0.1"],
                ["10.10.0.1", "10.244.1.11"],
                Choice::Leave,
            ),
            (
                "to a Service",
                ["10.244.1.11", "10.96.0.10"],
                ["10.9.0.1", "10.244.1.11"],
                Choice::Leave,
            ),
        ] {
            // By now they are excluded.
            let mut excluded = excluded();
            excluded.insert("10.9.0.0/16".parse().unwrap());
            let connection = connection(Protocol::Tcp, original, reply);
            let chosen = selection.choose(&connection, &excluded);
            assert_eq!(chosen, expected, "{what}");
        }
    }
}
