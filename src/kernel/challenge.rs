//! Elicits challenge ACKs: makes pods of this node send a packet on each of their connections.
//!
//! The new gateway of a pod has no conntrack entries of its connections, and drops the server's packets until it sees one
//! of the pod's. Where only the server has something to send, as in the middle of a long query, none comes. So the pod
//! gets a SYN in the server's name: a kernel answers a SYN on an established connection with a challenge ACK (RFC 5961, 4),
//! whatever its sequence number. That changes nothing at either end, and takes the pod's way out. When the connection
//! cannot go on, because it leaves with another source now, the server answers the ACK with a reset.
//!
//! The frame is sent on the pod's interface and so bypasses this node's netfilter: there the SYN would create an entry of
//! a connection from outside, and the challenge ACK would count as its reply.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{LinkAddr, bind};
use socket2::{Domain, Socket, Type};
use tracing::debug;

use crate::error::chain;
use crate::ethernet::{Mac, syn};
use crate::kernel::conntrack::{self, Flow};
use crate::kernel::neighbours::neighbour_table;

/// Pauses before the pods are challenged again: the new gateway's agent may not know yet that it is one. A kernel sends
/// one challenge ACK each 0.5 s on a connection (`tcp_invalid_ratelimit`).
const PAUSES: [Duration; 2] = [Duration::from_millis(600), Duration::from_millis(1400)];

/// How often pods were challenged, since the start. Cheap to clone; all clones count together.
#[derive(Clone, Debug, Default)]
pub struct Challenges(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    failures: AtomicU64,
}

impl Challenges {
    /// SYNs that were sent to pods.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.0.sent.load(Ordering::Relaxed)
    }

    /// Rounds that failed: connections, pods or interfaces could not be looked up, or frames not be sent.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.0.failures.load(Ordering::Relaxed)
    }

    fn failed(&self, attempt: &str, error: &(dyn std::error::Error + 'static)) {
        self.0.failures.fetch_add(1, Ordering::Relaxed);
        debug!("cannot {attempt}: {}", chain(error));
    }
}

/// Which connections the new gateway may not have heard of.
#[derive(Debug, Default)]
pub(crate) struct Unheard {
    /// Pods: their connections to outside.
    pub(crate) pods: BTreeSet<IpAddr>,
    /// Connections that were forgotten: connection tracking does not list them any more.
    pub(crate) flows: BTreeSet<Flow>,
}

/// Challenges the pods, now and twice more, in a task of its own; pods that are not on a link of this node are skipped. A
/// failure costs only time: the connection goes on when the pod sends something by itself.
pub(crate) fn elicit(unheard: Unheard, excluded: BTreeSet<IpNet>, challenges: Challenges) {
    let Unheard { mut flows, pods } = unheard;
    if pods.is_empty() {
        return;
    }
    flows.retain(|flow| pods.contains(&flow.pod.ip()));
    tokio::spawn(async move {
        flows.extend(established(pods.clone(), &excluded, &challenges).await);
        if flows.is_empty() {
            return;
        }
        challenge(&flows, &challenges).await;
        for pause in PAUSES {
            tokio::time::sleep(pause).await;
            // What has ended is challenged no more: the pod would answer with a reset that belongs to nothing.
            let now = established(pods.clone(), &excluded, &challenges).await;
            flows.retain(|flow| now.contains(flow));
            challenge(&flows, &challenges).await;
        }
    });
}

async fn established(
    pods: BTreeSet<IpAddr>,
    excluded: &BTreeSet<IpNet>,
    challenges: &Challenges,
) -> BTreeSet<Flow> {
    let found = conntrack::established(pods, excluded.clone()).await;
    found.unwrap_or_else(|error| {
        challenges.failed("find the connections of pods", &error);
        BTreeSet::new()
    })
}

async fn challenge(flows: &BTreeSet<Flow>, challenges: &Challenges) {
    let frames = match frames(flows).await {
        Ok(frames) => frames,
        Err(error) => return challenges.failed("find pods on links", &error),
    };
    let counts = challenges.clone();
    let sent = tokio::task::spawn_blocking(move || send(&frames, &counts.0.sent)).await;
    if let Err(error) = sent.unwrap_or_else(|error| Err(io::Error::other(error))) {
        challenges.failed("challenge pods", &error);
    }
}

/// Frames by interface, with its address.
type Frames = BTreeMap<usize, (LinkAddr, Vec<Vec<u8>>)>;

async fn frames(flows: &BTreeSet<Flow>) -> io::Result<Frames> {
    let neighbours = neighbour_table().await.map_err(io::Error::other)?;
    let neighbours: BTreeMap<IpAddr, (usize, Mac)> = neighbours
        .iter()
        .filter_map(|n| Some((n.address, (usize::try_from(n.interface).ok()?, n.mac))))
        .collect();
    let mut links: BTreeMap<usize, LinkAddr> = BTreeMap::new();
    for address in getifaddrs()? {
        if let Some(link) = address.address.and_then(|a| a.as_link_addr().copied()) {
            links.insert(link.ifindex(), link);
        }
    }
    let mut frames = Frames::new();
    for flow in flows {
        if let Some((interface, mac)) = neighbours.get(&flow.pod.ip())
            && let Some(link) = links.get(interface)
            && let Some(own) = link.addr()
            && let Some(frame) = syn([Mac(own), *mac], flow.outside, flow.pod)
        {
            let (_, frames) = frames
                .entry(*interface)
                .or_insert_with(|| (*link, Vec::new()));
            frames.push(frame);
        }
    }
    Ok(frames)
}

fn send(frames: &Frames, sent: &AtomicU64) -> io::Result<()> {
    for (link, frames) in frames.values() {
        // Without a protocol it receives nothing.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        bind(socket.as_raw_fd(), link)?;
        for frame in frames {
            socket.send(frame)?;
            sent.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}
