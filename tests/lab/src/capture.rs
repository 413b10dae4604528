//! What the nodes put on the LAN towards the outside: the oracle that counts packets, not connections.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

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
/// Holds what comes while the machine is busy with something else.
const BUFFER_BYTES: usize = 16 << 20;

/// How many packets left each node, by their source.
pub type Sources = BTreeMap<(usize, IpAddr), usize>;

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
                    let source = frame.get(..length).and_then(source_of_outbound);
                    if let (Some(node), Some(source)) = (node, source) {
                        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                        *seen.entry((*node, source)).or_default() += 1;
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

/// The source of a TCP or UDP packet to a server's port, unless the frame goes to a node or to everybody: on its way
/// to a gateway a packet may have its pod's address.
fn source_of_outbound(frame: &[u8]) -> Option<IpAddr> {
    let (to, rest) = frame.split_first_chunk::<6>()?;
    let is_for_a_node = (1..=net::MOST_NODES).any(|n| net::node_mac_bytes(n) == *to);
    if is_for_a_node || to[0] & 1 == 1 {
        return None;
    }
    let (kind, packet) = rest.get(6..)?.split_first_chunk::<2>()?;
    let (source, protocol, payload) = match u16::from_be_bytes(*kind) {
        0x0800 => {
            let words = usize::from(packet.first()? & 0x0f);
            let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            let payload = packet.get(words * 4..)?;
            (Ipv4Addr::from(source).into(), *packet.get(9)?, payload)
        }
        0x86dd => {
            let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            let payload = packet.get(40..)?;
            (Ipv6Addr::from(source).into(), *packet.get(6)?, payload)
        }
        _ => return None,
    };
    let is_tcp_or_udp = matches!(protocol, 6 | 17);
    let port: [u8; 2] = payload.get(2..4)?.try_into().ok()?;
    (is_tcp_or_udp && u16::from_be_bytes(port) == PORT).then_some(source)
}
