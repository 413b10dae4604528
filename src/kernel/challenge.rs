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
use crate::kernel::conntrack::{self, Conntrack, Flow};
use crate::kernel::neighbours::neighbour_table;
use crate::state::{ConnectionStep, Step};

/// Pauses before the pods are challenged again: the new gateway's agent may not know yet that it is one. A kernel sends
/// one challenge ACK each 0.5 s on a connection (`tcp_invalid_ratelimit`).
const PAUSES: [Duration; 2] = [Duration::from_millis(600), Duration::from_millis(1400)];

/// How many challenge ACKs all pods of a host together may send in a second. Kernels from 5.19 on have no limit by default.
const BUDGET: &str = "/proc/sys/net/ipv4/tcp_challenge_ack_limit";
const DEFAULT_BUDGET: usize = 1000;
const BUDGET_TIME: Duration = Duration::from_secs(1);

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

    /// Rounds that failed, as a whole or on an interface: connections, pods or interfaces could not be looked up, or frames
    /// not be sent.
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
    /// Pods that are going to be challenged, unless a step fails.
    pub(crate) expected: BTreeSet<IpAddr>,
    /// Pods that are challenged: their connections to outside.
    pub(crate) pods: BTreeSet<IpAddr>,
    /// Connections of the expected pods, when they were looked at already: those that were forgotten are not listed any
    /// more.
    pub(crate) flows: Option<BTreeSet<Flow>>,
}

impl Unheard {
    /// Whose connections are to be looked at for these steps.
    pub(crate) fn expect(steps: &[Step]) -> Unheard {
        let pods = steps.iter().filter_map(|step| match step {
            Step::Connection(ConnectionStep::ElicitAck(pod)) => Some(*pod),
            _ => None,
        });
        Unheard {
            expected: pods.collect(),
            ..Unheard::default()
        }
    }

    /// Those that are to be challenged now, once each.
    pub(crate) fn taken(&mut self) -> Unheard {
        Unheard {
            pods: std::mem::take(&mut self.pods),
            flows: self.flows.clone(),
            expected: BTreeSet::new(),
        }
    }
}

/// Challenges the pods, now and twice more, in a task of its own; pods that are not on a link of this node are skipped. A
/// failure costs only time: the connection goes on when the pod sends something by itself.
pub(crate) fn elicit(
    unheard: Unheard,
    mut conntrack: Conntrack,
    excluded: BTreeSet<IpNet>,
    challenges: Challenges,
) {
    let Unheard { pods, flows, .. } = unheard;
    if pods.is_empty() {
        return;
    }
    tokio::spawn(async move {
        let mut flows = match flows {
            Some(flows) => flows,
            None => match conntrack.flows(pods.clone(), excluded).await {
                Ok(flows) => flows,
                Err(error) => return challenges.failed("find the connections of pods", &error),
            },
        };
        flows.retain(|flow| pods.contains(&flow.pod.ip()));
        for pause in PAUSES {
            if flows.is_empty() {
                return;
            }
            challenge(&flows, &challenges).await;
            tokio::time::sleep(pause).await;
            // What has ended, or has begun anew, is challenged no more: a pod that waits for the answer to its own SYN would
            // take ours for one. What is not known is challenged again: the pod's answer may have been lost, or not been
            // sent. Where no socket is left, the reset that it sends is INVALID, and dropped.
            match conntrack::not_open(flows.clone()).await {
                Ok(not_open) => flows.retain(|flow| !not_open.contains(flow)),
                Err(error) => return challenges.failed("ask for connections of pods", &error),
            }
        }
        challenge(&flows, &challenges).await;
    });
}

async fn challenge(flows: &BTreeSet<Flow>, challenges: &Challenges) {
    let at_once = at_once().await;
    let flows: Vec<Flow> = flows.iter().copied().collect();
    for (number, flows) in flows.chunks(at_once).enumerate() {
        if number > 0 {
            tokio::time::sleep(BUDGET_TIME).await;
        }
        let frames = match frames(flows).await {
            Ok(frames) => frames,
            Err(error) => return challenges.failed("find pods on links", &error),
        };
        let counts = challenges.clone();
        let sent = tokio::task::spawn_blocking(move || {
            for (link, frames) in frames.into_values() {
                if let Err(error) = send(link, &frames, &counts.0.sent) {
                    counts.failed("challenge the pods of an interface", &error);
                }
            }
        });
        if let Err(error) = sent.await {
            challenges.failed("challenge pods", &error);
        }
    }
}

/// How many connections are challenged at once: about half of those that a kernel answers for in a second, because what
/// counts is a number that it draws between half of the budget and one and a half.
async fn at_once() -> usize {
    let budget = tokio::fs::read_to_string(BUDGET).await.unwrap_or_default();
    let budget = budget.trim().parse().unwrap_or(DEFAULT_BUDGET);
    (budget / 2).max(1)
}

/// Frames by interface, with its address.
type Frames = BTreeMap<usize, (LinkAddr, Vec<Vec<u8>>)>;

async fn frames(flows: &[Flow]) -> io::Result<Frames> {
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

/// Sends frames on one interface. What cannot be sent, as when there is no room for the moment, costs no other.
fn send(link: LinkAddr, frames: &[Vec<u8>], sent: &AtomicU64) -> io::Result<()> {
    // Without a protocol it receives nothing.
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    bind(socket.as_raw_fd(), &link)?;
    let mut result = Ok(());
    for frame in frames {
        match socket.send(frame) {
            Ok(_) => drop(sent.fetch_add(1, Ordering::Relaxed)),
            Err(error) => result = Err(error),
        }
    }
    result
}
