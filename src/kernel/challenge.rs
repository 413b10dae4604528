//! Has pods of this node say something on their connections.
//!
//! Where only the server has something to say, as in the middle of a long query, a gateway that is new would never learn
//! of the connection, and drop what the server sends. So the pod is asked, in the server's name, with a SYN: its kernel
//! answers that in the middle of a connection with a plain acknowledgement (RFC 5961, 4), which changes nothing at either
//! end, whatever the numbers in the SYN, and takes the pod's way out. A connection that cannot go on learns of it so.
//!
//! The frame goes to the pod's interface, past this node's netfilter: seen there, it would begin a connection of the
//! server, and what the pod says would be an answer.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{LinkAddr, bind};
use socket2::{Domain, Socket, Type};
use tracing::debug;

use crate::error::chain;
use crate::ethernet::{Mac, checksum, sum};
use crate::kernel::conntrack::{self, Flow};
use crate::kernel::neighbours::neighbour_table;

/// Pauses before the pods are asked again: the new gateway's agent may not know yet that it is one. A kernel answers such
/// questions about a connection every 0.5 s (`tcp_invalid_ratelimit`).
const PAUSES: [Duration; 2] = [Duration::from_millis(600), Duration::from_millis(1400)];
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const TCP: u8 = 6;
const SYN: u8 = 2;
/// A router's usual one.
const HOPS: u8 = 64;

/// What is to be asked.
#[derive(Debug, Default)]
pub(super) struct Unheard {
    /// Which pods, about their connections to outside.
    pub(super) pods: BTreeSet<IpAddr>,
    /// Connections that were forgotten: connection tracking does not tell of them any more.
    pub(super) flows: BTreeSet<Flow>,
}

/// Asks the pods, now and twice more, while the caller goes on; one that is not on a link of this node is passed over.
/// Nothing is lost but time when that fails: a pod speaks when it has something to say.
pub(super) fn elicit(unheard: Unheard, excluded: BTreeSet<IpNet>) {
    let Unheard { mut flows, pods } = unheard;
    if pods.is_empty() {
        return;
    }
    flows.retain(|flow| pods.contains(&flow.pod.ip()));
    tokio::spawn(async move {
        flows.extend(established(pods.clone(), &excluded).await);
        if flows.is_empty() {
            return;
        }
        ask(&flows).await;
        for pause in PAUSES {
            tokio::time::sleep(pause).await;
            // What has ended is asked no more: the pod would answer with a reset that belongs to nothing.
            let now = established(pods.clone(), &excluded).await;
            flows.retain(|flow| now.contains(flow));
            ask(&flows).await;
        }
    });
}

async fn established(pods: BTreeSet<IpAddr>, excluded: &BTreeSet<IpNet>) -> BTreeSet<Flow> {
    let found = conntrack::find_established(pods, excluded.clone()).await;
    found.unwrap_or_else(|error| {
        debug!("cannot find connections of pods: {}", chain(&error));
        BTreeSet::new()
    })
}

async fn ask(flows: &BTreeSet<Flow>) {
    match frames(flows).await {
        Ok(frames) => {
            let asked: usize = frames.values().map(|(_, frames)| frames.len()).sum();
            debug!("asking pods to speak on {asked} connections");
            let sent = tokio::task::spawn_blocking(move || send(&frames));
            if let Ok(Err(error)) = sent.await {
                debug!("cannot ask pods to speak: {error}");
            }
        }
        Err(error) => debug!("cannot find pods on links: {}", chain(&error)),
    }
}

/// Frames by interface, with its address.
type Frames = BTreeMap<usize, (LinkAddr, Vec<Vec<u8>>)>;

async fn frames(flows: &BTreeSet<Flow>) -> io::Result<Frames> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let neighbours = neighbour_table(&handle).await.map_err(io::Error::other);
    connection.abort();
    let neighbours: BTreeMap<IpAddr, (usize, Mac)> = neighbours?
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
        let Some((interface, mac)) = neighbours.get(&flow.pod.ip()) else {
            continue;
        };
        if let Some(link) = links.get(interface)
            && let Some(own) = link.addr()
            && let Some(frame) = frame(*flow, Mac(own), *mac)
        {
            let (_, frames) = frames
                .entry(*interface)
                .or_insert_with(|| (*link, Vec::new()));
            frames.push(frame);
        }
    }
    Ok(frames)
}

fn send(frames: &Frames) -> io::Result<()> {
    for (link, frames) in frames.values() {
        // Of no protocol: it hears nothing.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        bind(socket.as_raw_fd(), link)?;
        for frame in frames {
            socket.send(frame)?;
        }
    }
    Ok(())
}

/// A SYN from outside to the pod's end of a connection.
fn frame(flow: Flow, from: Mac, to: Mac) -> Option<Vec<u8>> {
    let mut segment = Vec::new();
    segment.extend(flow.outside.port().to_be_bytes());
    segment.extend(flow.pod.port().to_be_bytes());
    // Sequence number and acknowledgement, which mean nothing; five words of header; no window, checksum, nothing urgent.
    segment.extend([0; 8]);
    segment.extend([5 << 4, SYN, 0, 0, 0, 0, 0, 0]);
    let length = u16::try_from(segment.len()).ok()?;
    let mut frame = Vec::new();
    frame.extend(to.0);
    frame.extend(from.0);
    let checksum = match (flow.outside.ip(), flow.pod.ip()) {
        (IpAddr::V4(outside), IpAddr::V4(pod)) => {
            frame.extend(IPV4);
            let mut header = vec![0x45, 0];
            header.extend((20 + length).to_be_bytes());
            header.extend([0, 0, 0, 0, HOPS, TCP, 0, 0]);
            header.extend(outside.octets());
            header.extend(pod.octets());
            let checksum_of_header = sum(&header).to_be_bytes();
            header[10..12].copy_from_slice(&checksum_of_header);
            frame.extend(header);
            checksum(&outside.octets(), &pod.octets(), TCP, &segment)
        }
        (IpAddr::V6(outside), IpAddr::V6(pod)) => {
            frame.extend(IPV6);
            frame.extend([0x60, 0, 0, 0]);
            frame.extend(length.to_be_bytes());
            frame.extend([TCP, HOPS]);
            frame.extend(outside.octets());
            frame.extend(pod.octets());
            checksum(&outside.octets(), &pod.octets(), TCP, &segment)
        }
        _ => return None,
    };
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    frame.extend(segment);
    Some(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_to_a_pod_adds_up() {
        for (pod, outside, header) in [
            ("10.244.1.11:40000", "198.51.100.10:8080", 20),
            ("[fd00:10:244:1::b]:40000", "[2001:db8:2::10]:8080", 40),
        ] {
            let flow = Flow {
                pod: pod.parse().unwrap(),
                outside: outside.parse().unwrap(),
            };
            let (own, to) = (Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2]));
            let frame = frame(flow, own, to).unwrap();
            assert_eq!(frame.len(), 14 + header + 20);
            assert_eq!(frame[..12], [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
            let (packet, segment) = frame[14..].split_at(header);
            assert_eq!(segment[..4], [0x1f, 0x90, 0x9c, 0x40]);
            let addresses = &packet[header - if header == 20 { 8 } else { 32 }..];
            let (from, to) = addresses.split_at(addresses.len() / 2);
            // With the checksum in it, the sum is nothing.
            assert_eq!(checksum(from, to, TCP, segment), 0);
            if header == 20 {
                assert_eq!(sum(packet), 0);
            }
        }
    }
}
