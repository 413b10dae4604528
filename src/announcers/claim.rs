//! Who announces one VIP: the node of the newest claim, for as long as something speaks for it.

use std::time::{Duration, Instant};

use crate::names::NodeName;
use crate::settings::AnnouncerSource as Source;

/// MetalLB's objects follow the LAN within 30 ms; a disagreement that lasts this long is worth a warning.
const DISAGREEMENT: Duration = Duration::from_secs(5);

/// A source's word that a node announces the VIP.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    pub(super) source: Source,
    pub(super) node: NodeName,
    /// When it was made: an object counts from when it was first seen to name the node.
    pub(super) at: Instant,
    /// Other objects of this source name other nodes.
    pub(super) is_doubled: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Announcer {
    /// The present claims, one of each source that says something.
    claims: Vec<Claim>,
    /// The announcer by the newest claim, and when that was made.
    newest: Option<(NodeName, Instant)>,
    /// When something spoke for it last, where no object does.
    evidence: Option<Instant>,
    /// Since when the claims disagree.
    disagree: Option<Instant>,
    /// The gateway that an earlier run of the agent has left in the kernel, and when that was found.
    adopted: Option<(NodeName, Instant)>,
}

#[derive(Debug)]
pub(super) struct Judgement {
    pub(super) announcer: Option<NodeName>,
    /// Nothing contradicts it.
    pub(super) is_settled: bool,
    /// Two sources that have named different nodes for long.
    pub(super) disagreement: Option<[(Source, NodeName); 2]>,
    /// When this changes by itself.
    pub(super) ends: Option<Instant>,
}

impl Source {
    /// Whether a claim holds for as long as it is there, as an object does; else from the moment when it is heard.
    fn is_standing(self) -> bool {
        match self {
            Source::Status => true,
            Source::Lan => false,
        }
    }
}

impl Announcer {
    /// Takes over the gateway that was found in the kernel: it counts as announcer from `now` on.
    pub(super) fn adopt(&mut self, node: NodeName, now: Instant) {
        self.newest.get_or_insert((node.clone(), now));
        self.evidence.get_or_insert(now);
        self.adopted = Some((node, now));
    }

    /// Judges what the sources say now. Of two claims of the same moment the later in the list counts.
    pub(super) fn judge(&mut self, claims: Vec<Claim>, now: Instant, grace: Duration) -> Judgement {
        self.note(claims, now);
        let is_standing = self.claims.iter().any(|c| c.source.is_standing());
        let is_heard = self.claims.iter().any(|c| !c.source.is_standing());
        // What is heard counts from when it was heard, and no longer than for the grace period.
        let mut ends = None;
        if let Some(evidence) = self.evidence.filter(|_| !is_standing) {
            if now.saturating_duration_since(evidence) < grace {
                ends = Some(evidence + grace);
            } else {
                self.newest = None;
            }
        }
        // At a start an object looks new, and may be older than what the earlier run has heard.
        let is_fresh = |at: &Instant| !is_heard && now.saturating_duration_since(*at) < grace;
        self.adopted = self.adopted.take().filter(|(_, at)| is_fresh(at));
        let adopted = self.adopted.as_ref().map(|(node, _)| node);
        let announcer = self.newest.as_ref().map(|(node, _)| node.clone());
        let is_as_adopted = adopted.is_none_or(|adopted| announcer.as_ref() == Some(adopted));
        let is_doubled = self.claims.iter().any(|claim| claim.is_doubled);

        let differing = self.differing();
        let is_undisputed = differing.is_none() && !is_doubled;
        self.disagree = differing.as_ref().map(|_| self.disagree.unwrap_or(now));
        let reported_at = self.disagree.map(|since| since + DISAGREEMENT);
        let waits = reported_at.filter(|at| now < *at);
        Judgement {
            announcer,
            is_settled: is_standing && is_undisputed && is_as_adopted,
            disagreement: differing.filter(|_| waits.is_none()),
            ends: ends.into_iter().chain(waits).min(),
        }
    }

    /// Two claims that name different nodes.
    fn differing(&self) -> Option<[(Source, NodeName); 2]> {
        let (first, others) = self.claims.split_first()?;
        let other = others.iter().find(|other| other.node != first.node)?;
        Some([first, other].map(|claim| (claim.source, claim.node.clone())))
    }

    /// Replaces the claims by the present ones, and follows the newest.
    fn note(&mut self, claims: Vec<Claim>, now: Instant) {
        let before = std::mem::replace(&mut self.claims, claims);
        for old in before.iter().filter(|old| old.source.is_standing()) {
            let mut present = self.claims.iter_mut();
            match present.find(|claim| claim.source == old.source) {
                Some(same) if same.node == old.node => same.at = old.at,
                Some(_) => {}
                None => self.evidence = Some(now),
            }
        }
        for claim in &self.claims {
            if !claim.source.is_standing() {
                self.evidence = self.evidence.max(Some(claim.at));
            }
            if self.newest.as_ref().is_none_or(|(_, at)| claim.at >= *at) {
                self.newest = Some((claim.node.clone(), claim.at));
            }
        }
    }
}
