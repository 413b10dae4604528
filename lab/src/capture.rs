//! What the nodes put on the LAN towards the outside: the oracle that counts packets, not connections.

use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use etherparse::{IpNumber, LaxNetSlice, LaxSlicedPacket, LinkSlice, TransportSlice};
use nix::libc::PACKET_OUTGOING;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{LinkAddr, recvfrom, setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::host::Host;
use crate::{Family, Outside, net};

/// `ETH_P_ALL` of if_ether.h.
const EVERYTHING: u16 = 3;
/// The TTL of a node's own packets (`ip_default_ttl`): a node resets what it has no connection for, such as the answer
/// to a forgotten one, and that packet may have the node's address.
const OWN_TTL: u8 = 64;
/// Holds what comes while the machine is busy with something else.
const BUFFER_BYTES: usize = 16 << 20;

/// The packets that nodes forwarded to servers outside, by node and source.
#[derive(Debug, Default)]
pub struct Forwarded(BTreeMap<(usize, IpAddr), Packets>);

impl Forwarded {
    /// Checks the node and the source of every packet, and that there were packets at all: a capture that saw nothing
    /// has shown nothing.
    ///
    /// # Errors
    /// With the packets that `may_leave` does not allow.
    pub fn only(&self, may_leave: impl Fn(usize, IpAddr) -> bool) -> Result<()> {
        let wrong: Vec<String> = self
            .iter()
            .filter(|(node, source, _)| !may_leave(*node, *source))
            .map(|(node, _, Packets { count, first })| {
                format!("{count} from node{node}, first {first}")
            })
            .collect();
        ensure!(wrong.is_empty(), "packets leaked: {}", wrong.join(", "));
        ensure!(!self.0.is_empty(), "no packet was seen at all");
        Ok(())
    }

    /// Checks that there was no packet. Shows something only where the same capture sees what does leave.
    ///
    /// # Errors
    /// With the packets.
    pub fn nothing(&self) -> Result<()> {
        match self.0.is_empty() {
            true => Ok(()),
            false => self.only(|_, _| false),
        }
    }

    /// The packets of each node and source.
    pub fn iter(&self) -> impl Iterator<Item = (usize, IpAddr, &Packets)> {
        let all = self.0.iter();
        all.map(|((node, source), packets)| (*node, *source, packets))
    }
}

/// Packets of one source.
#[derive(Debug)]
pub struct Packets {
    /// How many there were.
    pub count: usize,
    /// The first of them, to be found again in the logs.
    pub first: Packet,
}

/// A packet that left a node, and when.
#[derive(Debug)]
pub struct Packet {
    source: IpAddr,
    to: IpAddr,
    protocol: IpNumber,
    /// What its transport header says; nothing of a later fragment.
    detail: String,
    at: SystemTime,
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.at.duration_since(SystemTime::UNIX_EPOCH);
        let of_day = since.unwrap_or_default().as_millis() % 86_400_000;
        let (seconds, ms) = (of_day / 1000, of_day % 1000);
        let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        let protocol = self.protocol.keyword_str().unwrap_or("unknown protocol");
        write!(
            f,
            "{protocol}{} {} to {} at {hours:02}:{minutes:02}:{seconds:02}.{ms:03}",
            self.detail, self.source, self.to
        )
    }
}

/// Counts the packets that leave nodes for a server outside; stops when it goes out of scope.
#[derive(Debug)]
pub struct Capture {
    seen: Arc<Mutex<Forwarded>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Capture {
    /// Listens at the far ends of the nodes' wires.
    pub(crate) fn start(lan: &Host, nodes: usize) -> Result<Capture> {
        let seen = Arc::new(Mutex::new(Forwarded::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, opened) = std::sync::mpsc::channel();
        let thread = lan.inside({
            let (seen, stop) = (seen.clone(), stop.clone());
            move || {
                let mut ports = BTreeMap::new();
                for n in 1..=nodes {
                    let index = if_nametoindex(format!("node{n}").as_str())?;
                    ports.insert(usize::try_from(index).unwrap_or_default(), n);
                }
                let protocol = Protocol::from(i32::from(EVERYTHING.to_be()));
                let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
                setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES)?;
                socket.set_read_timeout(Some(Duration::from_millis(50)))?;
                // The caller waits for it.
                let _ = ready.send(());
                let mut frame = [0; 2048];
                while !stop.load(Ordering::Relaxed) {
                    let (length, from) = match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame)
                    {
                        Ok((length, from)) => (length, from),
                        Err(error) => {
                            let error = std::io::Error::from(error);
                            match error.kind() {
                                ErrorKind::WouldBlock | ErrorKind::Interrupted => continue,
                                _ => return Err(error),
                            }
                        }
                    };
                    let node = from.and_then(|from| {
                        let leaves_port = from.pkttype() == PACKET_OUTGOING;
                        ports.get(&from.ifindex()).filter(|_| !leaves_port)
                    });
                    let packet = frame.get(..length).and_then(outbound);
                    if let (Some(node), Some(packet)) = (node, packet) {
                        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                        seen.0
                            .entry((*node, packet.source))
                            .and_modify(|packets| packets.count += 1)
                            .or_insert(Packets {
                                count: 1,
                                first: packet,
                            });
                    }
                }
                Ok(())
            }
        })?;
        if opened.recv().is_err() {
            let result = thread.join();
            bail!("cannot capture on the LAN: {result:?}");
        }
        Ok(Capture {
            seen,
            stop,
            thread: Some(thread),
        })
    }

    /// What was seen since the last call.
    ///
    /// # Errors
    /// When the capture has ended.
    pub fn take(&self) -> Result<Forwarded> {
        let thread = self.thread.as_ref().context("the capture was stopped")?;
        if thread.is_finished() {
            bail!("the capture has failed");
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut *seen))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Whoever asked it for something was told that it failed.
            let _ = thread.join();
        }
    }
}

/// A packet that a node forwarded to a server outside, whatever its protocol: not one that it sent itself, and not one
/// on its way to another node, which may have its pod's address.
fn outbound(frame: &[u8]) -> Option<Packet> {
    let sliced = LaxSlicedPacket::from_ethernet(frame).ok()?;
    let Some(LinkSlice::Ethernet2(ethernet)) = &sliced.link else {
        return None;
    };
    let next_hop = ethernet.destination();
    if (1..=net::MOST_NODES).any(|n| net::node_mac_bytes(n) == next_hop) {
        return None;
    }
    let (source, to, ttl, payload) = match &sliced.net {
        Some(LaxNetSlice::Ipv4(packet)) => {
            let header = packet.header();
            let (source, to) = (header.source_addr(), header.destination_addr());
            (source.into(), to.into(), header.ttl(), packet.payload())
        }
        Some(LaxNetSlice::Ipv6(packet)) => {
            let header = packet.header();
            let (source, to) = (header.source_addr(), header.destination_addr());
            let payload = packet.payload();
            (source.into(), to.into(), header.hop_limit(), payload)
        }
        _ => return None,
    };
    let to: IpAddr = to;
    let is_server = Outside::BOTH.iter().any(|server| {
        Family::BOTH
            .iter()
            .any(|family| server.address(*family) == to)
    });
    if !is_server || ttl >= OWN_TTL {
        return None;
    }
    let detail = match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let flags = tcp.slice().get(13).copied().unwrap_or_default();
            let (from, to) = (tcp.source_port(), tcp.destination_port());
            format!(" {from} to {to}, flags {flags:#04x},")
        }
        Some(TransportSlice::Udp(udp)) => {
            format!(" {} to {}", udp.source_port(), udp.destination_port())
        }
        _ => String::new(),
    };
    Some(Packet {
        source,
        to,
        protocol: payload.ip_number,
        detail,
        at: now(),
    })
}

#[expect(
    clippy::disallowed_methods,
    reason = "logs tell this clock's time, and nothing is decided by it"
)]
fn now() -> SystemTime {
    SystemTime::now()
}

#[cfg(test)]
mod tests {
    use etherparse::{IpFragOffset, Ipv4Header, Ipv6FragmentHeader, PacketBuilder};

    use super::*;

    const ROUTER: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];

    fn frame(step: etherparse::PacketBuilderStep<etherparse::IpHeaders>, to: IpNumber) -> Vec<u8> {
        let mut frame = Vec::new();
        step.write(&mut frame, to, b"payload").expect("a packet");
        frame
    }

    fn v4(next_hop: [u8; 6], to: [u8; 4], ttl: u8, offset: u16) -> Vec<u8> {
        let mut header =
            Ipv4Header::new(7, ttl, IpNumber::UDP, [10, 244, 1, 11], to).expect("a header");
        header.fragment_offset = IpFragOffset::try_new(offset).expect("an offset");
        let headers = etherparse::IpHeaders::Ipv4(header, Default::default());
        let step = PacketBuilder::ethernet2(net::node_mac_bytes(1), next_hop);
        frame(step.ip(headers), IpNumber::UDP)
    }

    #[test]
    fn every_protocol_to_a_server_is_seen_also_a_later_fragment() {
        let server = [198, 51, 100, 10];
        let seen = |frame: &[u8]| outbound(frame).map(|packet| packet.source.to_string());
        let own = Some("10.244.1.11".to_owned());
        assert_eq!(seen(&v4(ROUTER, server, 63, 0)), own);
        assert_eq!(seen(&v4(ROUTER, server, 63, 100)), own);
        for number in [IpNumber::ICMP, IpNumber::SCTP, IpNumber::GRE] {
            let header =
                Ipv4Header::new(7, 63, number, [10, 244, 1, 11], server).expect("a header");
            let headers = etherparse::IpHeaders::Ipv4(header, Default::default());
            let step = PacketBuilder::ethernet2(net::node_mac_bytes(1), ROUTER);
            assert_eq!(seen(&frame(step.ip(headers), number)), own, "{number:?}");
        }
    }

    #[test]
    fn what_is_not_forwarded_to_a_server_is_left_out() {
        let server = [198, 51, 100, 10];
        assert!(outbound(&v4(ROUTER, server, 64, 0)).is_none(), "a node's");
        assert!(outbound(&v4(net::node_mac_bytes(2), server, 63, 0)).is_none());
        assert!(outbound(&v4(ROUTER, [10, 96, 0, 1], 63, 0)).is_none());
    }

    #[test]
    fn an_extension_header_hides_nothing() {
        let source: std::net::Ipv6Addr = "fd00:10:244:1::b".parse().expect("an address");
        let to: std::net::Ipv6Addr = "2001:db8:2::10".parse().expect("an address");
        let mut frame = Vec::new();
        let ethernet = etherparse::Ethernet2Header {
            source: net::node_mac_bytes(1),
            destination: ROUTER,
            ether_type: etherparse::EtherType::IPV6,
        };
        ethernet.write(&mut frame).expect("a header");
        let header = etherparse::Ipv6Header {
            payload_length: 16,
            next_header: IpNumber::IPV6_FRAGMENTATION_HEADER,
            hop_limit: 63,
            source: source.octets(),
            destination: to.octets(),
            ..Default::default()
        };
        header.write(&mut frame).expect("a header");
        let offset = IpFragOffset::try_new(100).expect("an offset");
        let fragment = Ipv6FragmentHeader::new(IpNumber::UDP, offset, false, 7);
        fragment.write(&mut frame).expect("a header");
        frame.extend([0; 8]);
        let packet = outbound(&frame).expect("a packet");
        assert_eq!(packet.source, source);
        assert_eq!(packet.protocol, IpNumber::UDP);
    }
}
