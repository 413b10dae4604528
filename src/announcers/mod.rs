//! Who announces each VIP: what MetalLB's objects say, held against what is heard on the LAN.
//!
//! Pure: the time comes in as a value. The object is a hint: MetalLB 0.15 loses it when a speaker comes back, and
//! every version writes it after the VIP has moved. The wire is the truth: the newer of two claims wins, and
//! where they differ or one is missing, the wire is asked.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::cluster::l2status::L2Status;
use crate::cluster::leases::BootId;
use crate::cluster::{Node, Service};
use crate::lan::Heard;
use crate::names::{NodeName, ObjectKey};

/// Objects follow the wire within 30 ms; a difference that stays this long is worth telling.
const DISAGREEMENT: Duration = Duration::from_secs(5);

/// Everything that speaks for an announcer.
#[derive(Clone, Copy, Debug)]
pub struct Claims<'a> {
    /// Labelled Services: whose VIPs matter.
    pub services: &'a BTreeMap<ObjectKey, Service>,
    /// MetalLB's objects.
    pub statuses: &'a BTreeMap<ObjectKey, L2Status>,
    /// What was heard on the LAN.
    pub heard: &'a BTreeMap<IpAddr, Heard>,
    /// The nodes.
    pub nodes: &'a BTreeMap<NodeName, Node>,
    /// The API server does not answer: objects may be old.
    pub away: bool,
}

/// What comes of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    /// The node that pods of each VIP leave through: its announcer, or the one before while that is not programmed.
    pub announcers: BTreeMap<IpAddr, NodeName>,
    /// The announcer of each VIP by the newest claim.
    pub claimed: BTreeMap<IpAddr, NodeName>,
    /// VIPs to be asked for on the LAN.
    pub unsettled: BTreeSet<IpAddr>,
    /// VIPs of which object and wire have told different things for long: what the object says, and the wire.
    pub disagreements: BTreeMap<IpAddr, (NodeName, NodeName)>,
    /// Announcers whose Lease is gone, in the boot in which it said that they are programmed: they are, and nobody tells.
    pub still_programmed: BTreeSet<NodeName>,
    /// VIPs that another node announced for a while: a gateway that it is still or again was none meanwhile.
    pub interrupted: BTreeSet<IpAddr>,
    /// When this changes by itself.
    pub ends: Option<Instant>,
}

/// Remembers what was known of each VIP.
#[derive(Debug)]
pub struct Announcers {
    own: NodeName,
    grace: Duration,
    known: BTreeMap<IpAddr, Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// What the object says, and since when.
    status: Option<(NodeName, Instant)>,
    /// The announcer by the newest claim, and when that was made.
    last: Option<(NodeName, Instant)>,
    /// When something spoke for it last, where there is no object.
    evidence: Option<Instant>,
    /// Since when object and wire differ.
    differ: Option<Instant>,
    /// The gateway that an earlier run of the agent has left in the kernel, and when that was found.
    adopted: Option<(NodeName, Instant)>,
    /// The last announcer that was programmed, and in which boot.
    gateway: Option<(NodeName, Option<BootId>)>,
    /// Since when the announcer is one that is not programmed.
    waiting: Option<Instant>,
    /// How many claims of others were heard.
    others: u64,
}

impl Announcers {
    /// Knows none yet. A node that is programmed by whoever asks is `own`.
    #[must_use]
    pub fn new(own: NodeName, grace: Duration) -> Announcers {
        Announcers {
            own,
            grace,
            known: BTreeMap::new(),
        }
    }

    /// Takes over what an earlier run of the agent knew, as found in the kernel: it counts as last known from
    /// `now` on.
    pub fn adopt(&mut self, vip: IpAddr, node: NodeName, now: Instant) {
        let known = self.known.entry(vip).or_default();
        known.gateway.get_or_insert((node.clone(), None));
        known.last.get_or_insert((node.clone(), now));
        known.adopted = Some((node, now));
        known.evidence.get_or_insert(now);
    }

    /// The announcers at the time `now`.
    pub fn resolve(&mut self, claims: Claims<'_>, now: Instant) -> Resolved {
        let mut users: BTreeMap<IpAddr, Vec<&ObjectKey>> = BTreeMap::new();
        for (key, service) in claims.services {
            for vip in service.vips.values() {
                users.entry(*vip).or_default().push(key);
            }
        }
        let mut of_service: BTreeMap<&ObjectKey, Vec<&L2Status>> = BTreeMap::new();
        for status in claims.statuses.values() {
            of_service.entry(&status.service).or_default().push(status);
        }
        self.known.retain(|vip, _| users.contains_key(vip));
        let mut resolved = Resolved::default();
        for (vip, services) in users {
            let of_vip = services
                .into_iter()
                .flat_map(|s| of_service.get(s).into_iter().flatten());
            let statuses: Vec<&L2Status> = of_vip.copied().collect();
            let heard = claims.heard.get(&vip);
            let known = self.known.entry(vip).or_default();
            known.resolve(
                vip,
                &statuses,
                heard,
                claims,
                (now, self.grace),
                &mut resolved,
            );
            let held = known.hold(&self.own, claims.nodes, (now, self.grace));
            if let Some((node, end)) = held {
                let is_programmed = |node| claims.nodes.get(node).is_some_and(Node::is_programmed);
                if end.is_some() && !is_programmed(&node) {
                    resolved.still_programmed.insert(node.clone());
                }
                resolved.ends = resolved.ends.into_iter().chain(end).min();
                resolved.announcers.insert(vip, node);
            }
        }
        resolved
    }
}

impl Known {
    fn resolve(
        &mut self,
        vip: IpAddr,
        statuses: &[&L2Status],
        heard: Option<&Heard>,
        claims: Claims<'_>,
        (now, grace): (Instant, Duration),
        resolved: &mut Resolved,
    ) {
        let others = heard.map_or(self.others, |heard| heard.others);
        if std::mem::replace(&mut self.others, others) != others {
            resolved.interrupted.insert(vip);
        }
        // Of two, as at a move, the newer one.
        let newest = statuses.iter().max_by_key(|status| status.version);
        match (newest, &self.status) {
            (Some(status), Some((node, _))) if status.node == *node => {}
            (Some(status), _) => self.status = Some((status.node.clone(), now)),
            (None, Some(_)) => {
                self.status = None;
                self.evidence = Some(now);
            }
            (None, None) => {}
        }
        let voice = heard.map(|heard| (heard.node.clone(), heard.at));
        self.evidence = self.evidence.max(heard.map(|heard| heard.at));
        for claim in [&self.status, &voice].into_iter().flatten() {
            if self.last.as_ref().is_none_or(|(_, at)| claim.1 >= *at) {
                self.last = Some(claim.clone());
            }
        }
        let mut ends = None;
        if self.status.is_none()
            && let Some(evidence) = self.evidence
        {
            if now.saturating_duration_since(evidence) < grace {
                ends = Some(evidence + grace);
            } else {
                self.last = None;
            }
        }
        let differing = match (&self.status, &voice) {
            (Some((node, _)), Some((voice, _))) if node != voice => Some((node, voice)),
            _ => None,
        };
        if let Some((node, voice)) = differing {
            let differ = *self.differ.get_or_insert(now);
            if now.saturating_duration_since(differ) >= DISAGREEMENT {
                let both = (node.clone(), voice.clone());
                resolved.disagreements.insert(vip, both);
            } else {
                ends = Some(differ + DISAGREEMENT);
            }
        } else {
            self.differ = None;
        }
        let announcer = self.last.as_ref().map(|(node, _)| node);
        // An object that is older than what an earlier run has heard looks new at a start.
        let is_fresh = |at: &Instant| voice.is_none() && now.saturating_duration_since(*at) < grace;
        self.adopted = self.adopted.take().filter(|(_, at)| is_fresh(at));
        let adopted = self.adopted.as_ref().map(|(node, _)| node);
        if let Some(node) = announcer {
            resolved.claimed.insert(vip, node.clone());
        }
        let is_usable = |node: &NodeName| claims.nodes.get(node).is_some_and(|node| node.ready);
        let is_doubled = statuses
            .iter()
            .any(|s| newest.is_some_and(|n| n.node != s.node));
        let is_settled = self.status.is_some()
            && differing.is_none()
            && !is_doubled
            && adopted.is_none_or(|adopted| announcer == Some(adopted))
            && !claims.away
            && announcer.is_some_and(is_usable);
        if !is_settled {
            resolved.unsettled.insert(vip);
        }
        resolved.ends = resolved.ends.into_iter().chain(ends).min();
    }

    /// Which node to leave through, and when that changes by itself. Where the announcer is not programmed, what is sent
    /// there would leave with its address. The gateway before it still translates, so that connections are only silent
    /// until the announcer is programmed; after the grace period they are told that there is no way.
    fn hold(
        &mut self,
        own: &NodeName,
        nodes: &BTreeMap<NodeName, Node>,
        (now, grace): (Instant, Duration),
    ) -> Option<(NodeName, Option<Instant>)> {
        let (announcer, _) = self.last.as_ref()?;
        let facts = |node: &NodeName| nodes.get(node);
        let is_programmed =
            |node: &NodeName| node == own || facts(node).is_some_and(Node::is_programmed);
        let boot = |node: &NodeName| facts(node).and_then(|facts| facts.boot.clone());
        if is_programmed(announcer) {
            self.waiting = None;
            self.gateway = Some((announcer.clone(), boot(announcer)));
            return Some((announcer.clone(), None));
        }
        let end = *self.waiting.get_or_insert(now) + grace;
        let before = self.gateway.as_ref().filter(|_| now < end);
        match before {
            Some((gateway, _)) if gateway != announcer && is_programmed(gateway) => {
                Some((gateway.clone(), Some(end)))
            }
            // Deleted by mistake, or with a node's object that is created anew: its agent writes it again.
            Some((gateway, Some(known)))
                if gateway == announcer && boot(gateway).as_ref() == Some(known) =>
            {
                Some((gateway.clone(), Some(end)))
            }
            _ => Some((announcer.clone(), None)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::OnNoGateway;
    use crate::state::Family;

    const GRACE: Duration = Duration::from_secs(30);

    /// A Service with one VIP, and what speaks for its announcer.
    struct Case {
        announcers: Announcers,
        start: Instant,
        services: BTreeMap<ObjectKey, Service>,
        statuses: BTreeMap<ObjectKey, L2Status>,
        heard: BTreeMap<IpAddr, Heard>,
        nodes: BTreeMap<NodeName, Node>,
        away: bool,
    }

    fn vip() -> IpAddr {
        IpAddr::from([192, 0, 2, 200])
    }

    fn key(name: &str) -> ObjectKey {
        ObjectKey {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
        }
    }

    fn node(n: u8) -> NodeName {
        NodeName(format!("node{n}"))
    }

    fn case() -> Case {
        let service = Service {
            uid: String::new(),
            created: 0,
            load_balancer: true,
            families: [Family::V4].into(),
            vips: [(Family::V4, vip())].into(),
            hostname: None,
            on_no_gateway: OnNoGateway::Reject,
            selector: BTreeMap::new(),
        };
        let facts = Node {
            ready: true,
            programmed: Some(BootId("first".to_owned())),
            ..Node::default()
        };
        Case {
            announcers: Announcers::new(node(9), GRACE),
            start: Instant::now(),
            services: [(key("a"), service)].into(),
            statuses: BTreeMap::new(),
            heard: BTreeMap::new(),
            nodes: (1..=3).map(|n| (node(n), facts.clone())).collect(),
            away: false,
        }
    }

    impl Case {
        fn status(&mut self, name: &str, of: u8, version: u64) {
            let status = L2Status {
                service: key("a"),
                node: node(of),
                version,
            };
            self.statuses.insert(key(name), status);
        }

        fn hear(&mut self, from: u8, seconds: u64) {
            let at = self.start + Duration::from_secs(seconds);
            self.heard.insert(vip(), Heard::new(node(from), at));
        }

        /// The announcer, and whether the wire is to be asked.
        fn at(&mut self, seconds: u64) -> (Option<NodeName>, bool) {
            let resolved = self.resolve(seconds);
            let announcer = resolved.announcers.get(&vip()).cloned();
            (announcer, resolved.unsettled.contains(&vip()))
        }

        fn resolve(&mut self, seconds: u64) -> Resolved {
            let claims = Claims {
                services: &self.services,
                statuses: &self.statuses,
                heard: &self.heard,
                nodes: &self.nodes,
                away: self.away,
            };
            let now = self.start + Duration::from_secs(seconds);
            self.announcers.resolve(claims, now)
        }
    }

    #[test]
    fn an_object_that_nothing_contradicts_is_settled() {
        let mut case = case();
        case.status("s", 1, 5);
        assert_eq!(case.at(0), (Some(node(1)), false));
        case.hear(1, 1);
        assert_eq!(case.at(1), (Some(node(1)), false));
    }

    #[test]
    fn at_a_move_the_wire_comes_first_and_the_object_follows() {
        let mut case = case();
        case.status("s", 1, 5);
        case.at(0);
        case.hear(2, 10);
        assert_eq!(case.at(10), (Some(node(2)), true));
        case.status("s", 2, 6);
        assert_eq!(case.at(11), (Some(node(2)), false));
    }

    #[test]
    fn an_object_that_is_newer_than_the_last_voice_wins_and_the_wire_is_asked() {
        let mut case = case();
        case.status("s", 1, 5);
        case.hear(1, 0);
        case.at(0);
        case.status("s", 2, 6);
        assert_eq!(case.at(10), (Some(node(2)), true));
        // The answer says that the object is wrong.
        case.hear(1, 11);
        assert_eq!(case.at(11), (Some(node(1)), true));
    }

    #[test]
    fn without_an_object_the_wire_serves_for_as_long_as_it_answers() {
        let mut case = case();
        case.status("s", 1, 5);
        case.at(0);
        case.statuses.clear();
        assert_eq!(case.at(1), (Some(node(1)), true));
        for seconds in [2, 20, 40, 60] {
            case.hear(1, seconds);
            assert_eq!(case.at(seconds), (Some(node(1)), true));
        }
        // Then nobody answers for the grace period.
        assert_eq!(case.at(89), (Some(node(1)), true));
        assert_eq!(case.at(90), (None, true));
        case.hear(3, 100);
        assert_eq!(case.at(100), (Some(node(3)), true));
    }

    #[test]
    fn the_last_announcer_is_kept_for_the_grace_period_and_not_longer() {
        let mut case = case();
        case.status("s", 1, 5);
        case.at(0);
        case.statuses.clear();
        for (seconds, expected) in [
            (10, Some(node(1))),
            (39, Some(node(1))),
            (40, None),
            (41, None),
        ] {
            let resolved = case.resolve(seconds);
            assert_eq!(
                resolved.announcers.get(&vip()),
                expected.as_ref(),
                "at {seconds} s"
            );
            let end = expected.map(|_| case.start + Duration::from_secs(40));
            assert_eq!(resolved.ends, end);
        }
        case.status("s", 2, 9);
        assert_eq!(case.at(50), (Some(node(2)), false));
    }

    #[test]
    fn the_newest_of_two_objects_wins_and_the_wire_is_asked() {
        for (first, second) in [((1, 5), (2, 6)), ((2, 6), (1, 5))] {
            let mut case = case();
            case.status("x", first.0, first.1);
            case.status("y", second.0, second.1);
            assert_eq!(case.at(0), (Some(node(2)), true));
        }
    }

    #[test]
    fn a_node_that_is_gone_or_not_ready_and_a_silent_api_server_put_it_in_doubt() {
        let mut case = case();
        case.status("s", 1, 5);
        assert_eq!(case.at(0), (Some(node(1)), false));
        case.away = true;
        assert_eq!(case.at(1), (Some(node(1)), true));
        case.away = false;
        case.nodes.entry(node(1)).or_default().ready = false;
        assert_eq!(case.at(2), (Some(node(1)), true));
        case.nodes.remove(&node(1));
        assert_eq!(case.at(3), (Some(node(1)), true));
        case.hear(2, 4);
        assert_eq!(case.at(4), (Some(node(2)), true));
    }

    #[test]
    fn a_disagreement_that_lasts_is_told() {
        let mut case = case();
        case.status("s", 1, 5);
        case.at(0);
        case.hear(2, 10);
        let resolved = case.resolve(10);
        assert!(resolved.disagreements.is_empty());
        assert_eq!(resolved.ends, Some(case.start + Duration::from_secs(15)));
        let both = (node(1), node(2));
        assert_eq!(case.resolve(15).disagreements, [(vip(), both)].into());
        case.status("s", 2, 6);
        assert!(case.resolve(16).disagreements.is_empty());
    }

    #[test]
    fn an_adopted_announcer_serves_until_something_names_one() {
        let mut case = case();
        case.announcers.adopt(vip(), node(3), case.start);
        assert_eq!(case.at(0), (Some(node(3)), true));
        assert_eq!(case.at(29), (Some(node(3)), true));
        case.status("s", 1, 1);
        assert_eq!(case.at(30), (Some(node(1)), false));
    }

    #[test]
    fn an_object_that_contradicts_an_adopted_announcer_is_held_against_the_wire() {
        let mut case = case();
        case.status("s", 1, 5);
        case.at(0);
        case.announcers.adopt(vip(), node(3), case.start);
        assert_eq!(case.at(1), (Some(node(1)), true));
        case.hear(3, 2);
        assert_eq!(case.at(2).0, Some(node(3)));
        case.status("s", 3, 6);
        assert_eq!(case.at(3), (Some(node(3)), false));
    }

    #[test]
    fn a_lease_that_is_lost_costs_nothing_within_the_grace_period() {
        let boot = |id: &str| Some(BootId(id.to_owned()));
        let mut case = case();
        case.nodes.entry(node(1)).or_default().boot = boot("first");
        case.status("s", 1, 5);
        assert!(case.resolve(0).still_programmed.is_empty());
        case.nodes.entry(node(1)).or_default().programmed = None;
        for (seconds, still) in [(10, true), (39, true), (40, false)] {
            let resolved = case.resolve(seconds);
            assert_eq!(resolved.announcers.get(&vip()), Some(&node(1)));
            assert_eq!(
                resolved.still_programmed.contains(&node(1)),
                still,
                "at {seconds} s"
            );
        }
        // Rebooted, it is not what it was.
        case.nodes.entry(node(1)).or_default().programmed = boot("first");
        case.resolve(50);
        case.nodes.entry(node(1)).or_default().boot = boot("second");
        assert!(case.resolve(51).still_programmed.is_empty());
    }

    #[test]
    fn a_claim_of_another_node_interrupts_even_when_it_is_not_believed() {
        let mut case = case();
        case.status("s", 1, 5);
        case.hear(1, 0);
        assert!(case.resolve(0).interrupted.is_empty());
        case.heard.get_mut(&vip()).unwrap().others = 1;
        let resolved = case.resolve(1);
        assert_eq!(resolved.announcers.get(&vip()), Some(&node(1)));
        assert_eq!(resolved.interrupted, [vip()].into());
        assert!(case.resolve(2).interrupted.is_empty());
    }

    #[test]
    fn the_gateway_before_serves_while_the_announcer_is_not_programmed() {
        let boot = |id: &str| Some(BootId(id.to_owned()));
        let mut case = case();
        case.status("s", 1, 5);
        assert_eq!(case.at(0).0, Some(node(1)));
        // Rebooted: its Lease tells of the boot before.
        case.nodes.entry(node(2)).or_default().boot = boot("second");
        case.status("s", 2, 6);
        let end = Some(case.start + Duration::from_secs(40));
        for seconds in [10, 39] {
            let resolved = case.resolve(seconds);
            assert_eq!(resolved.announcers.get(&vip()), Some(&node(1)));
            assert_eq!(resolved.ends, end);
        }
        case.nodes.entry(node(2)).or_default().programmed = boot("second");
        assert_eq!(case.at(39).0, Some(node(2)));
        // The plan says why nothing is routed there when it takes too long, or nobody was there before.
        case.nodes.entry(node(3)).or_default().programmed = None;
        case.status("s", 3, 7);
        assert_eq!(case.at(50).0, Some(node(2)));
        assert_eq!(case.at(80).0, Some(node(3)));
        // The node that asks programs itself.
        case.status("s", 9, 8);
        assert_eq!(case.at(90).0, Some(node(9)));
    }

    #[test]
    fn vips_of_services_without_the_label_are_forgotten() {
        let mut case = case();
        case.status("s", 1, 5);
        case.at(0);
        case.services.clear();
        assert_eq!(case.resolve(1), Resolved::default());
    }
}
