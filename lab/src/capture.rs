//! What the nodes put on the LAN towards the outside: the oracle that counts packets, not connections.

use std::collections::BTreeMap;
use std::fmt;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use nix::libc::PACKET_OUTGOING;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{LinkAddr, recvfrom, setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::host::Host;
use crate::net;
use crate::probe::PORT;

/// `ETH_P_ALL` of if_ether.h.
const EVERYTHING: u16 = 3;
/// What a node's own packets begin with (`ip_default_ttl`): it resets what it knows nothing of, such as the answer to a
/// connection that was forgotten.
const HOPS: u8 = 64;
/// Holds what comes while the machine is busy with something else.
const BUFFER_BYTES: usize = 16 << 20;

/// The packets that left each node, by their source.
pub type Sources = BTreeMap<(usize, IpAddr), Packets>;

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
    source: SocketAddr,
    to: SocketAddr,
    /// The flags of a TCP header, `None` of UDP.
    flags: Option<u8>,
    at: SystemTime,
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.at.duration_since(SystemTime::UNIX_EPOCH);
        let of_day = since.unwrap_or_default().as_millis() % 86_400_000;
        let (seconds, ms) = (of_day / 1000, of_day % 1000);
        let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        match self.flags {
            Some(flags) => write!(f, "TCP, flags {flags:#04x}")?,
            None => f.write_str("UDP")?,
        }
        let (source, to) = (self.source, self.to);
        write!(
            f,
            " {source} to {to} at {hours:02}:{minutes:02}:{seconds:02}.{ms:03}"
        )
    }
}

/// Counts the packets that leave nodes for a server outside; stops when it goes out of scope.
#[derive(Debug)]
pub struct Capture {
    seen: Arc<Mutex<Sources>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Capture {
    /// Listens at the far ends of the nodes' wires.
    pub(crate) fn start(lan: &Host, nodes: usize) -> Result<Capture> {
        let seen = Arc::new(Mutex::new(Sources::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, opened) = std::sync::mpsc::channel();
        let thread = lan.inside({
            let (seen, stop) = (seen.clone(), stop.clone());
            move || {
                let ports: BTreeMap<usize, usize> = (1..=nodes)
                    .filter_map(|n| {
                        let index = if_nametoindex(format!("node{n}").as_str()).ok()?;
                        Some((usize::try_from(index).ok()?, n))
                    })
                    .collect();
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
                        seen.entry((*node, packet.source.ip()))
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
    pub fn take(&self) -> Result<Sources> {
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

/// A TCP or UDP packet to a server's port that the node has forwarded, unless the frame goes to a node or to everybody: on
/// its way to a gateway a packet may have its pod's address.
fn outbound(frame: &[u8]) -> Option<Packet> {
    let (to, rest) = frame.split_first_chunk::<6>()?;
    let is_for_a_node = (1..=net::MOST_NODES).any(|n| net::node_mac_bytes(n) == *to);
    if is_for_a_node || to[0] & 1 == 1 {
        return None;
    }
    let (kind, packet) = rest.get(6..)?.split_first_chunk::<2>()?;
    let hops;
    let (source, to, protocol, payload) = match u16::from_be_bytes(*kind) {
        0x0800 => {
            let words = usize::from(packet.first()? & 0x0f);
            let (source, rest) = packet.get(12..)?.split_first_chunk::<4>()?;
            let to = Ipv4Addr::from(*rest.first_chunk::<4>()?).into();
            let source: IpAddr = Ipv4Addr::from(*source).into();
            hops = *packet.get(8)?;
            (source, to, *packet.get(9)?, packet.get(words * 4..)?)
        }
        0x86dd => {
            let (source, rest) = packet.get(8..)?.split_first_chunk::<16>()?;
            let to = Ipv6Addr::from(*rest.first_chunk::<16>()?).into();
            let source: IpAddr = Ipv6Addr::from(*source).into();
            hops = *packet.get(7)?;
            (source, to, *packet.get(6)?, packet.get(40..)?)
        }
        _ => return None,
    };
    let port = |at| {
        Some(u16::from_be_bytes(
            payload.get(at..at + 2)?.try_into().ok()?,
        ))
    };
    let to: IpAddr = to;
    let flags = match protocol {
        6 => Some(*payload.get(13)?),
        17 => None,
        _ => return None,
    };
    (port(2)? == PORT && hops < HOPS).then_some(Packet {
        source: SocketAddr::new(source, port(0)?),
        to: SocketAddr::new(to, PORT),
        flags,
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
