//! What is made of what is heard. Pure: the time comes in as a value.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::ethernet::{Claim, Mac};
use crate::names::NodeName;

/// At most one question for an address, and one change of its announcer, in this time.
const PACE: Duration = Duration::from_secs(1);
/// So many changes of an announcer in so long a time are no moves: two nodes answer.
const MOST_TURNS: u32 = 4;
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
    /// This node.
    pub own: Option<NodeName>,
    /// The nodes' addresses.
    pub nodes: BTreeMap<IpAddr, NodeName>,
    /// Addresses whose announcer matters, and who is taken for it.
    pub vips: BTreeMap<IpAddr, Option<NodeName>>,
    /// Those of them that are asked for once a second: who announces them is in doubt.
    pub unsettled: BTreeSet<IpAddr>,
    /// The others are asked for so often.
    pub audit: Duration,
}

/// The last confirmed claim to a VIP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// The node that announces it.
    pub node: NodeName,
    /// When it was heard last.
    pub at: Instant,
    /// How often another node than the one before was heard, believed or not.
    pub others: u64,
    /// When it became this node.
    since: Instant,
    /// How often the announcer changed since `quiet`.
    turns: u32,
    quiet: Instant,
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
            quiet: at,
        }
    }
}

/// What an operator should know of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Anomaly {
    /// Somebody who is no node claims a VIP.
    UnknownSender(IpAddr, Mac),
    /// Two nodes claim a VIP again and again.
    DuplicateAnnouncer(IpAddr, NodeName, NodeName),
}

impl Anomaly {
    /// The VIP that it is about.
    #[must_use]
    pub fn vip(&self) -> IpAddr {
        match self {
            Anomaly::UnknownSender(vip, _) | Anomaly::DuplicateAnnouncer(vip, ..) => *vip,
        }
    }
}

impl fmt::Display for Anomaly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Anomaly::UnknownSender(vip, mac) => write!(
                f,
                "{mac}, which is no node's, claims VIP {vip} on the LAN: not believed"
            ),
            Anomaly::DuplicateAnnouncer(vip, one, other) => write!(
                f,
                "{one} and {other} claim VIP {vip} on the LAN by turns: following whoever was heard last"
            ),
        }
    }
}

/// What was heard so far.
#[derive(Debug, Default)]
pub(crate) struct Hearing {
    wanted: Wanted,
    /// Nodes by link-layer address, of the neighbour table and of answers to our own questions.
    nodes: BTreeMap<Mac, NodeName>,
    heard: BTreeMap<IpAddr, Heard>,
    asked: BTreeMap<IpAddr, Instant>,
    /// Claims of unknown senders.
    waiting: Vec<(Claim, Instant)>,
    /// Anomalies, and how often each was met.
    odd: BTreeMap<Anomaly, u64>,
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
        // Nothing speaks against what is settled: no question before its time.
        let vips = wanted.vips.keys();
        for vip in vips.filter(|vip| !wanted.unsettled.contains(vip)) {
            self.asked.entry(*vip).or_insert(now);
        }
        self.odd
            .retain(|anomaly, _| wanted.vips.contains_key(&anomaly.vip()));
        let names: BTreeSet<&NodeName> = wanted.nodes.values().collect();
        self.nodes.retain(|_, node| names.contains(node));
        self.wanted = wanted;
    }

    /// Takes a claim; returns whether there is news: of another announcer than the one that is taken for it, or than
    /// the one heard before, or an anomaly not met before.
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
                if self.waiting.len() < MOST_WAITING
                    && !self.waiting.iter().any(|(w, _)| *w == claim)
                {
                    self.waiting.push((claim, now));
                }
                false
            }
        }
    }

    /// Takes the nodes' link-layer addresses; returns whether there is news.
    pub(crate) fn neighbours(&mut self, table: &[(Mac, IpAddr)], own: Mac, now: Instant) -> bool {
        let found: BTreeMap<Mac, NodeName> = table
            .iter()
            .filter_map(|(mac, address)| Some((*mac, self.wanted.nodes.get(address)?.clone())))
            .collect();
        // A node with a new card has lost the old one.
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
        // Whoever has waited longest first: every one has its turn, however many there are.
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

    /// Who announces what.
    pub(crate) fn heard(&self) -> &BTreeMap<IpAddr, Heard> {
        &self.heard
    }

    /// What an operator should know of, and how often it was met.
    pub(crate) fn anomalies(&self) -> &BTreeMap<Anomaly, u64> {
        &self.odd
    }

    fn accept(&mut self, vip: IpAddr, node: NodeName, now: Instant) -> bool {
        let Some(heard) = self.heard.get_mut(&vip) else {
            self.heard.insert(vip, Heard::new(node, now));
            return true;
        };
        if heard.node == node {
            heard.at = now;
            // An object may have spoken for another one since: this claim is the newer one.
            let taken = self.wanted.vips.get(&vip);
            return taken.is_some_and(|taken| taken.as_ref() != Some(&node));
        }
        heard.others += 1;
        // Two that answer at once would turn us to and fro. Who is right says so again; and the old one may still
        // answer in the moment of a move.
        if now.saturating_duration_since(heard.since) < PACE {
            return true;
        }
        if now.saturating_duration_since(heard.quiet) >= CONTEST {
            heard.quiet = now;
            heard.turns = 0;
        }
        heard.turns += 1;
        if heard.turns >= MOST_TURNS {
            let anomaly = Anomaly::DuplicateAnnouncer(vip, heard.node.clone(), node.clone());
            meet(&mut self.odd, anomaly);
        }
        heard.node = node;
        heard.at = now;
        heard.since = now;
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
                changed |= meet(&mut self.odd, anomaly);
            }
        }
        changed
    }
}

/// Counts an anomaly; returns whether it is new.
fn meet(odd: &mut BTreeMap<Anomaly, u64>, anomaly: Anomaly) -> bool {
    let count = odd.entry(anomaly).or_default();
    *count += 1;
    *count == 1
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
        hearing
            .heard()
            .get(&ip(vip))
            .map(|heard| heard.node.clone())
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
    fn a_stranger_moves_nothing_and_is_told() {
        let (mut hearing, now) = hearing(&[]);
        hearing.claim(claim("192.0.2.200", 2), now);
        assert!(!hearing.claim(claim("192.0.2.200", 66), now));
        assert!(hearing.is_waiting());
        let later = now + LOOKUP_PATIENCE;
        assert!(hearing.neighbours(&[], OWN, later), "it is news");
        assert_eq!(announcer(&hearing, "192.0.2.200"), Some(name(2)));
        let stranger = Anomaly::UnknownSender(ip("192.0.2.200"), mac(66));
        assert_eq!(hearing.anomalies(), &[(stranger, 1)].into());
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
        assert!(hearing.anomalies().is_empty(), "that was a move");
    }

    #[test]
    fn a_claim_against_the_announcer_that_is_taken_for_it_is_news_though_it_was_heard_before() {
        let (mut hearing, now) = hearing(&["192.0.2.200"]);
        hearing.claim(claim("192.0.2.200", 2), now);
        for (taken, is_news) in [(Some(name(2)), false), (Some(name(3)), true), (None, true)] {
            hearing.wanted.vips.insert(ip("192.0.2.200"), taken.clone());
            let told = hearing.claim(claim("192.0.2.200", 2), now);
            assert_eq!(told, is_news, "while {taken:?} is taken for it");
        }
    }

    #[test]
    fn two_nodes_that_answer_by_turns_are_told() {
        let (mut hearing, now) = hearing(&[]);
        for turn in 0..=MOST_TURNS {
            let by = if turn % 2 == 0 { 2 } else { 3 };
            assert!(hearing.claim(claim("192.0.2.200", by), now + turn * PACE));
        }
        let contested = Anomaly::DuplicateAnnouncer(ip("192.0.2.200"), name(3), name(2));
        assert_eq!(hearing.anomalies(), &[(contested, 1)].into());
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
