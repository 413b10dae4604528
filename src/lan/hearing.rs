//! Which claims are believed, and which addresses are asked for (by an ARP request or a neighbour solicitation).
//!
//! Pure: the time comes in as a value.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use derive_more::Display;
use strum::IntoStaticStr;

use crate::ethernet::{Claim, Mac};
use crate::names::NodeName;

/// Least time between two questions for an address, and between two changes of its announcer.
const PACE: Duration = Duration::from_secs(1);
/// This many changes of an announcer within [`CONTEST`] are no moves: two nodes answer for one VIP (duplicate address).
const MOST_TURNS: u32 = 4;
/// See [`MOST_TURNS`].
const CONTEST: Duration = Duration::from_secs(10);
/// How long a claim waits for its sender to be found among the nodes.
const LOOKUP_PATIENCE: Duration = Duration::from_secs(3);
/// How many questions are asked at a time.
const MOST_QUESTIONS: usize = 64;
/// Claims of unknown senders that wait: a flood of them must not cost memory.
const MOST_WAITING: usize = 64;

/// What to listen for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The interface on which VIPs are announced.
    pub interface: Option<String>,
    pub own: Option<NodeName>,
    pub nodes: BTreeMap<IpAddr, NodeName>,
    /// The VIPs, and the announcer that the agent believes each to have.
    pub vips: BTreeMap<IpAddr, Option<NodeName>>,
    /// Those of them whose announcer is in doubt: they are asked for once a second.
    pub unsettled: BTreeSet<IpAddr>,
    /// The others are asked for when they were not heard for this long.
    pub audit: Duration,
}

/// The last claim to a VIP that came from a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    pub node: NodeName,
    /// When it was heard last.
    pub at: Instant,
    /// How many claims came from another node than the announcer, believed or not.
    pub others: u64,
    /// When it became the announcer.
    since: Instant,
    /// How often the announcer changed since `turns_since`.
    turns: u32,
    turns_since: Instant,
}

impl Heard {
    /// Heard for the first time.
    #[must_use]
    pub fn new(node: NodeName, at: Instant) -> Heard {
        Heard {
            node,
            at,
            others: 0,
            since: at,
            turns: 0,
            turns_since: at,
        }
    }
}

/// What an operator should know of the LAN.
#[derive(Clone, Debug, Display, IntoStaticStr, PartialEq, Eq, PartialOrd, Ord)]
pub enum Anomaly {
    #[display("{_1}, which is no node's, claims VIP {_0} on the LAN: not believed")]
    UnknownSender(IpAddr, Mac),
    #[display("{_1} and {_2} claim VIP {_0} on the LAN by turns: following whoever was heard last")]
    DuplicateAnnouncer(IpAddr, NodeName, NodeName),
}

impl Anomaly {
    /// What [`Anomaly::kind`] can be.
    pub const KINDS: [&'static str; 2] = ["DuplicateAnnouncer", "UnknownSender"];

    /// One word for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        self.into()
    }

    #[must_use]
    pub fn vip(&self) -> IpAddr {
        match self {
            Anomaly::UnknownSender(vip, _) | Anomaly::DuplicateAnnouncer(vip, ..) => *vip,
        }
    }
}

/// Remembers what was heard.
#[derive(Debug, Default)]
pub(crate) struct Hearing {
    wanted: Wanted,
    /// Nodes by link-layer address, from the neighbour table and from answers to our questions.
    nodes: BTreeMap<Mac, NodeName>,
    pub(super) heard: BTreeMap<IpAddr, Heard>,
    asked: BTreeMap<IpAddr, Instant>,
    /// Claims of senders that are not known yet, and when they came.
    waiting: Vec<(Claim, Instant)>,
    /// Of wanted VIPs.
    pub(super) anomalies: BTreeSet<Anomaly>,
    /// How often each kind was met, also for VIPs that are no longer wanted.
    pub(super) anomaly_counts: BTreeMap<&'static str, u64>,
}

impl Hearing {
    /// Changes what to listen for; what was heard of it is kept.
    pub(crate) fn want(&mut self, wanted: Wanted, now: Instant) {
        self.heard.retain(|vip, _| wanted.vips.contains_key(vip));
        self.waiting
            .retain(|(claim, _)| wanted.vips.contains_key(&claim.address));
        self.asked.retain(|address, _| {
            wanted.vips.contains_key(address) || wanted.nodes.contains_key(address)
        });
        // What is settled is asked for after `audit`, not at once.
        let vips = wanted.vips.keys();
        for vip in vips.filter(|vip| !wanted.unsettled.contains(vip)) {
            self.asked.entry(*vip).or_insert(now);
        }
        self.anomalies
            .retain(|anomaly| wanted.vips.contains_key(&anomaly.vip()));
        let names: BTreeSet<&NodeName> = wanted.nodes.values().collect();
        self.nodes.retain(|_, node| names.contains(node));
        self.wanted = wanted;
    }

    /// Takes a claim; returns whether that is news: another announcer than the agent believes in or than was heard before,
    /// or a new anomaly.
    pub(crate) fn claim(&mut self, claim: Claim, now: Instant) -> bool {
        if let Some(node) = self.wanted.nodes.get(&claim.address).cloned() {
            // An answer to our own question, as the kernel would take it into its neighbour table.
            let asked = self.asked.get(&claim.address);
            if asked.is_some_and(|asked| now.saturating_duration_since(*asked) < PACE) {
                self.nodes.insert(claim.mac, node);
                return self.judge_waiting(now);
            }
            return false;
        }
        if !self.wanted.vips.contains_key(&claim.address) {
            return false;
        }
        match self.nodes.get(&claim.mac).cloned() {
            Some(node) => self.accept(claim.address, node, now),
            None => {
                let is_new = !self.waiting.iter().any(|(other, _)| *other == claim);
                if is_new && self.waiting.len() < MOST_WAITING {
                    self.waiting.push((claim, now));
                }
                false
            }
        }
    }

    /// Takes the neighbour table; returns whether that makes news of a claim that was waiting.
    pub(crate) fn neighbours(&mut self, table: &[(Mac, IpAddr)], own: Mac, now: Instant) -> bool {
        let found: BTreeMap<Mac, NodeName> = table
            .iter()
            .filter_map(|(mac, address)| Some((*mac, self.wanted.nodes.get(address)?.clone())))
            .collect();
        // A node with a new network card has lost its old address.
        self.nodes
            .retain(|_, node| !found.values().any(|found| found == node));
        self.nodes.extend(found);
        if let Some(node) = &self.wanted.own {
            self.nodes.insert(own, node.clone());
        }
        self.judge_waiting(now)
    }

    /// Whether claims wait for their sender to be found.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The addresses to ask for now.
    pub(crate) fn questions(&mut self, now: Instant) -> Vec<IpAddr> {
        let since = |at: Option<&Instant>| at.map(|at| now.saturating_duration_since(*at));
        let is_due = |address: &IpAddr, every: Duration| {
            since(self.asked.get(address)).is_none_or(|ago| ago >= every)
        };
        let unsettled = self.wanted.unsettled.iter().filter(|vip| is_due(vip, PACE));
        let audited = self.wanted.vips.keys().filter(|vip| {
            let heard = since(self.heard.get(vip).map(|heard| &heard.at));
            !self.wanted.unsettled.contains(vip)
                && heard.is_none_or(|ago| ago >= self.wanted.audit)
                && is_due(vip, self.wanted.audit)
        });
        let known: BTreeSet<&NodeName> = self.nodes.values().collect();
        let nodes = self.wanted.nodes.iter().filter(|(address, node)| {
            self.is_waiting()
                && self.wanted.own.as_ref() != Some(*node)
                && !known.contains(node)
                && is_due(address, PACE)
        });
        let nodes = nodes.map(|(address, _)| address);
        // Longest unasked first: each has its turn, however many there are.
        let vips: BTreeSet<_> = unsettled
            .chain(audited)
            .map(|vip| (self.asked.get(vip), vip))
            .collect();
        let all = nodes.chain(vips.into_iter().map(|(_, vip)| vip));
        let questions: Vec<IpAddr> = all.take(MOST_QUESTIONS).copied().collect();
        self.asked
            .extend(questions.iter().map(|address| (*address, now)));
        questions
    }

    fn accept(&mut self, vip: IpAddr, node: NodeName, now: Instant) -> bool {
        let Some(heard) = self.heard.get_mut(&vip) else {
            self.heard.insert(vip, Heard::new(node, now));
            return true;
        };
        if heard.node == node {
            heard.at = now;
            // An object may have named another node since: this claim is newer.
            let taken = self.wanted.vips.get(&vip);
            return taken.is_some_and(|taken| taken.as_ref() != Some(&node));
        }
        heard.others += 1;
        // An announcer is held for at least PACE: with two answering we would flap. The right one repeats itself, and
        // the old one may still answer during a move.
        if now.saturating_duration_since(heard.since) < PACE {
            return true;
        }
        if now.saturating_duration_since(heard.turns_since) >= CONTEST {
            heard.turns_since = now;
            heard.turns = 0;
        }
        heard.turns += 1;
        let is_contested = heard.turns >= MOST_TURNS;
        let before = std::mem::replace(&mut heard.node, node.clone());
        heard.at = now;
        heard.since = now;
        if is_contested {
            self.meet(Anomaly::DuplicateAnnouncer(vip, before, node));
        }
        true
    }

    fn judge_waiting(&mut self, now: Instant) -> bool {
        let mut changed = false;
        for (claim, at) in std::mem::take(&mut self.waiting) {
            if let Some(node) = self.nodes.get(&claim.mac).cloned() {
                changed |= self.accept(claim.address, node, now);
            } else if now.saturating_duration_since(at) < LOOKUP_PATIENCE {
                self.waiting.push((claim, at));
            } else {
                let anomaly = Anomaly::UnknownSender(claim.address, claim.mac);
                changed |= self.meet(anomaly);
            }
        }
        changed
    }

    /// Counts an anomaly; returns whether it is new.
    fn meet(&mut self, anomaly: Anomaly) -> bool {
        *self.anomaly_counts.entry(anomaly.kind()).or_default() += 1;
        self.anomalies.insert(anomaly)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn mac(node: u8) -> Mac {
        Mac([2, 0, 0, 0, 0, node])
    }

    fn name(n: u8) -> NodeName {
        NodeName(format!("node{n}"))
    }

    fn claim(address: &str, by: u8) -> Claim {
        Claim {
            address: ip(address),
            mac: mac(by),
        }
    }

    /// On node1 of three, whose neighbours are known.
    fn hearing(unsettled: &[&str]) -> (Hearing, Instant) {
        let now = Instant::now();
        let mut hearing = Hearing::default();
        hearing.want(
            Wanted {
                interface: Some("eth0".to_owned()),
                own: Some(name(1)),
                nodes: (1..=3)
                    .map(|n| (IpAddr::from([192, 0, 2, 10 + n]), name(n)))
                    .collect(),
                vips: ["192.0.2.200", "2001:db8:1::c8"]
                    .map(|vip| (ip(vip), None))
                    .into(),
                unsettled: unsettled.iter().map(|vip| ip(vip)).collect(),
                audit: Duration::from_secs(300),
            },
            now,
        );
        let table = [2, 3].map(|n| (mac(n), IpAddr::from([192, 0, 2, 10 + n])));
        hearing.neighbours(&table, OWN, now);
        (hearing, now)
    }

    fn announcer(hearing: &Hearing, vip: &str) -> Option<NodeName> {
        hearing.heard.get(&ip(vip)).map(|heard| heard.node.clone())
    }

    #[test]
    fn claims_of_nodes_count_for_both_families_and_our_own_too() {
        let (mut hearing, now) = hearing(&[]);
        assert!(hearing.claim(claim("192.0.2.200", 2), now));
        assert!(hearing.claim(claim("2001:db8:1::c8", 1), now));
        assert!(
            !hearing.claim(claim("192.0.2.99", 2), now),
            "no VIP of ours"
        );
        hearing.wanted.vips.insert(ip("192.0.2.200"), Some(name(2)));
        assert!(
            !hearing.claim(claim("192.0.2.200", 2), now),
            "the same again"
        );
        assert_eq!(announcer(&hearing, "192.0.2.200"), Some(name(2)));
        assert_eq!(announcer(&hearing, "2001:db8:1::c8"), Some(name(1)));
    }

    #[test]
    fn an_unknown_sender_moves_nothing_and_is_an_anomaly() {
        let (mut hearing, now) = hearing(&[]);
        hearing.claim(claim("192.0.2.200", 2), now);
        assert!(!hearing.claim(claim("192.0.2.200", 66), now));
        assert!(hearing.is_waiting());
        let later = now + LOOKUP_PATIENCE;
        assert!(hearing.neighbours(&[], OWN, later), "it is news");
        assert_eq!(announcer(&hearing, "192.0.2.200"), Some(name(2)));
        let stranger = Anomaly::UnknownSender(ip("192.0.2.200"), mac(66));
        assert_eq!(hearing.anomalies, [stranger].into());
        assert_eq!(hearing.anomaly_counts, [("UnknownSender", 1)].into());
        assert!(!hearing.is_waiting());
    }

    #[test]
    fn a_node_that_is_not_in_the_neighbour_table_is_asked_for() {
        let (mut hearing, now) = hearing(&[]);
        hearing.nodes.remove(&mac(3));
        hearing.questions(now);
        assert!(!hearing.claim(claim("192.0.2.200", 3), now));
        assert!(
            !hearing.claim(claim("192.0.2.13", 66), now),
            "an answer without a question"
        );
        assert_eq!(hearing.questions(now), [ip("192.0.2.13")]);
        assert!(hearing.claim(claim("192.0.2.13", 3), now));
        assert_eq!(announcer(&hearing, "192.0.2.200"), Some(name(3)));
    }

    #[test]
    fn the_newest_claim_wins_but_not_more_often_than_once_a_second() {
        let (mut hearing, now) = hearing(&[]);
        hearing.claim(claim("192.0.2.200", 2), now);
        assert!(hearing.claim(claim("192.0.2.200", 3), now + PACE / 2));
        assert_eq!(announcer(&hearing, "192.0.2.200"), Some(name(2)));
        assert!(hearing.claim(claim("192.0.2.200", 3), now + PACE));
        assert_eq!(announcer(&hearing, "192.0.2.200"), Some(name(3)));
        assert!(hearing.anomalies.is_empty(), "that was a move");
    }

    #[test]
    fn a_claim_against_the_announcer_that_is_taken_for_it_is_news_though_it_was_heard_before() {
        let (mut hearing, now) = hearing(&["192.0.2.200"]);
        hearing.claim(claim("192.0.2.200", 2), now);
        for (taken, is_news) in [(Some(name(2)), false), (Some(name(3)), true), (None, true)] {
            hearing.wanted.vips.insert(ip("192.0.2.200"), taken.clone());
            let news = hearing.claim(claim("192.0.2.200", 2), now);
            assert_eq!(news, is_news, "while {taken:?} is taken for it");
        }
    }

    #[test]
    fn two_nodes_that_answer_by_turns_are_an_anomaly() {
        let (mut hearing, now) = hearing(&[]);
        for turn in 0..=MOST_TURNS {
            let by = if turn % 2 == 0 { 2 } else { 3 };
            assert!(hearing.claim(claim("192.0.2.200", by), now + turn * PACE));
        }
        let contested = Anomaly::DuplicateAnnouncer(ip("192.0.2.200"), name(3), name(2));
        assert_eq!(hearing.anomalies, [contested].into());
        assert_eq!(hearing.anomaly_counts, [("DuplicateAnnouncer", 1)].into());
    }

    #[test]
    fn what_is_in_doubt_is_asked_for_every_second_and_all_else_seldom() {
        let (mut hearing, now) = hearing(&["192.0.2.200"]);
        let both = ["192.0.2.200", "2001:db8:1::c8"].map(ip);
        assert_eq!(hearing.questions(now), [both[0]]);
        assert!(hearing.questions(now + PACE / 2).is_empty());
        assert_eq!(hearing.questions(now + PACE), [both[0]]);
        hearing.claim(claim("192.0.2.200", 2), now + PACE);
        assert_eq!(hearing.questions(now + 2 * PACE), [both[0]]);
        let longest_first = [both[1], both[0]];
        assert_eq!(
            hearing.questions(now + Duration::from_secs(300)),
            longest_first
        );
    }

    #[test]
    fn of_many_in_doubt_every_one_is_asked_for() {
        let (mut hearing, now) = hearing(&[]);
        let vips = || (0..10 * 64_u16).map(|n| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n]));
        let wanted = Wanted {
            vips: vips().map(|vip| (vip, None)).collect(),
            unsettled: vips().collect(),
            ..hearing.wanted.clone()
        };
        hearing.want(wanted, now);
        let rounds = (0..10).map(|round| now + round * PACE / 4);
        let asked: BTreeSet<IpAddr> = rounds.flat_map(|at| hearing.questions(at)).collect();
        assert!(asked.iter().copied().eq(vips()));
    }

    #[test]
    fn a_node_with_a_new_card_is_known_by_it_alone() {
        let (mut hearing, now) = hearing(&[]);
        hearing.neighbours(&[(mac(22), ip("192.0.2.12"))], OWN, now);
        assert!(hearing.claim(claim("192.0.2.200", 22), now));
        assert!(!hearing.claim(claim("2001:db8:1::c8", 2), now));
        assert_eq!(announcer(&hearing, "192.0.2.200"), Some(name(2)));
    }
}
