//! Who announces each VIP, and through which node its pods leave.
//!
//! Pure: the time comes in as a value. MetalLB's object is a hint: MetalLB 0.15 loses it when a speaker comes back, and
//! every version writes it after the VIP has moved. The LAN is the truth: the newer of two claims wins, and where they
//! disagree or one is missing, the LAN is asked.

mod claim;
mod gateway;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use self::claim::{Announcer, Claim};
use self::gateway::Gateway;
use crate::cluster::l2status::L2Status;
use crate::cluster::{Node, Service};
use crate::lan::Heard;
use crate::names::{NodeName, ObjectKey};
pub use crate::settings::AnnouncerSource as Source;

#[derive(Clone, Copy, Debug)]
pub struct Sources<'a> {
    /// Labelled Services: whose VIPs matter.
    pub services: &'a BTreeMap<ObjectKey, Service>,
    pub statuses: &'a BTreeMap<ObjectKey, L2Status>,
    pub heard: &'a BTreeMap<IpAddr, Heard>,
    pub nodes: &'a BTreeMap<NodeName, Node>,
    /// The API server does not answer: objects may be old.
    pub away: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    /// The node that pods of each VIP leave through: its announcer, or the one before while that is not programmed.
    pub announcers: BTreeMap<IpAddr, NodeName>,
    /// The announcer of each VIP by the newest claim.
    pub claimed: BTreeMap<IpAddr, NodeName>,
    /// VIPs to be asked for on the LAN.
    pub unsettled: BTreeSet<IpAddr>,
    /// VIPs of which two sources have named different nodes for long.
    pub disagreements: BTreeMap<IpAddr, [(Source, NodeName); 2]>,
    /// Announcers whose Lease vanished within the same boot: their kernel is still programmed.
    pub still_programmed: BTreeSet<NodeName>,
    /// VIPs that another node announced for a while: conntrack entries of a gateway that it is still or again may be old.
    pub interrupted: BTreeSet<IpAddr>,
    /// When this changes by itself.
    pub ends: Option<Instant>,
}

#[derive(Clone, Debug)]
pub struct Announcers {
    own: NodeName,
    grace: Duration,
    known: BTreeMap<IpAddr, Known>,
}

#[derive(Clone, Debug, Default)]
struct Known {
    announcer: Announcer,
    gateway: Gateway,
    /// How often another node was heard on the LAN.
    others: u64,
}

impl Announcers {
    /// Knows none yet. `own` is the node of this agent, which programs it.
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
        known.gateway.adopt(node.clone());
        known.announcer.adopt(node, now);
    }

    pub fn resolve(&mut self, sources: Sources<'_>, now: Instant) -> Resolved {
        let vips = sources.services.values().flat_map(|s| s.vips.values());
        let mut statuses: BTreeMap<IpAddr, Vec<&L2Status>> =
            vips.map(|vip| (*vip, Vec::new())).collect();
        for status in sources.statuses.values() {
            let service = sources.services.get(&status.service);
            for vip in service.into_iter().flat_map(|s| s.vips.values()) {
                statuses.entry(*vip).or_default().push(status);
            }
        }
        self.known.retain(|vip, _| statuses.contains_key(vip));
        let mut resolved = Resolved::default();
        for (vip, statuses) in statuses {
            self.resolve_one(vip, &statuses, sources, now, &mut resolved);
        }
        resolved
    }

    /// Adds to `resolved` what comes of one VIP.
    fn resolve_one(
        &mut self,
        vip: IpAddr,
        statuses: &[&L2Status],
        sources: Sources<'_>,
        now: Instant,
        resolved: &mut Resolved,
    ) {
        let (own, grace) = (&self.own, self.grace);
        let known = self.known.entry(vip).or_default();
        let facts = |node: &NodeName| sources.nodes.get(node);
        let heard = sources.heard.get(&vip);
        let others = heard.map_or(known.others, |heard| heard.others);
        if std::mem::replace(&mut known.others, others) != others {
            resolved.interrupted.insert(vip);
        }
        let claims = claims(statuses, heard, now);
        let judgement = known.announcer.judge(claims, now, grace);
        let announcer = judgement.announcer;
        let is_ready = |node: &NodeName| facts(node).is_some_and(|node| node.ready);
        if !judgement.is_settled || sources.away || !announcer.as_ref().is_some_and(is_ready) {
            resolved.unsettled.insert(vip);
        }
        let disagreement = judgement.disagreement.map(|both| (vip, both));
        resolved.disagreements.extend(disagreement);
        let mut ends: Vec<Instant> = resolved.ends.into_iter().chain(judgement.ends).collect();
        if let Some(announcer) = announcer {
            let memory = &mut known.gateway;
            let (gateway, until) = memory.hold(&announcer, own, sources.nodes, now, grace);
            if until.is_some() && !facts(&gateway).is_some_and(Node::is_programmed) {
                resolved.still_programmed.insert(gateway.clone());
            }
            ends.extend(until);
            resolved.announcers.insert(vip, gateway);
            resolved.claimed.insert(vip, announcer);
        }
        resolved.ends = ends.into_iter().min();
    }
}

/// What each source says of one VIP. In this order: of two claims of the same moment, that of the LAN counts.
fn claims(statuses: &[&L2Status], heard: Option<&Heard>, now: Instant) -> Vec<Claim> {
    // Of two objects, as at a move, the newer one.
    let status = statuses.iter().max_by_key(|status| status.version);
    let status = status.map(|newest| Claim {
        source: Source::Status,
        node: newest.node.clone(),
        at: now,
        is_doubled: statuses.iter().any(|status| status.node != newest.node),
    });
    let heard = heard.map(|heard| Claim {
        source: Source::Lan,
        node: heard.node.clone(),
        at: heard.at,
        is_doubled: false,
    });
    status.into_iter().chain(heard).collect()
}

#[cfg(test)]
mod tests;
