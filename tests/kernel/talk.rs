//! What pods send to the server outside.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::*;
use crate::namespace::PATIENCE;
use crate::server::{PORT, Seen, Server};

/// Sockets of one pod that talk to the server, in both families.
pub(crate) struct Talk {
    pod: [IpAddr; 2],
    pub(crate) udp: [UdpSocket; 2],
    pub(crate) icmp: [Socket; 2],
    /// Connections that there are.
    pub(crate) tcp: Vec<TcpStream>,
}

impl Talk {
    pub(crate) fn of(last: u8) -> Talk {
        Talk::by(Family::ALL.map(|family| pod(family, last)))
    }

    /// By whoever has these addresses.
    pub(crate) fn by(pod: [IpAddr; 2]) -> Talk {
        on("pods", || Talk {
            pod,
            udp: pod.map(datagrams),
            icmp: pod.map(echoes),
            tcp: Vec::new(),
        })
    }

    /// With a connection in each family.
    pub(crate) fn connected(last: u8) -> Talk {
        let mut talk = Talk::of(last);
        let connect = || talk.pod.map(|pod| stream(pod).unwrap());
        talk.tcp = on("pods", connect).into();
        talk
    }

    /// Waits until the server's word has come on all of TCP.
    pub(crate) fn hear(&self, expected: &[u8; 4]) {
        for mut stream in &self.tcp {
            stream.set_nonblocking(false).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            let mut word = [0; 4];
            stream.read_exact(&mut word).unwrap();
            assert_eq!(&word, expected);
        }
    }

    /// Sends on all of them, and on new ones.
    pub(crate) fn send(&self) {
        let new = Talk::by(self.pod);
        // It may hear that there is no way.
        for socket in self.udp.iter().chain(&new.udp) {
            let _ = socket.send(b"x");
        }
        for socket in self.icmp.iter().chain(&new.icmp) {
            let _ = socket.send(&echo_request(socket));
        }
        self.send_tcp();
        on("pods", || self.pod.map(begin_connection));
    }

    /// Sends on its connections alone.
    pub(crate) fn send_tcp(&self) {
        for mut stream in &self.tcp {
            let _ = stream.write(b"x");
        }
    }

    /// Sends until the server has seen all of this, and returns all that it has seen by then: the first packets wait
    /// for the answers of neighbours.
    pub(crate) fn arrive(&self, server: &mut Server, expected: &Seen) -> Seen {
        let deadline = Instant::now() + PATIENCE;
        let mut all = Seen::new();
        while !all.is_superset(expected) && Instant::now() < deadline {
            self.send();
            all.extend(server.seen());
        }
        all
    }

    /// Waits until all that was sent by TCP is acknowledged: what is not is sent again.
    pub(crate) fn wait_for_acknowledgements(&self) {
        let ports: Vec<String> = self
            .tcp
            .iter()
            .map(|stream| format!(":{} ", stream.local_addr().unwrap().port()))
            .collect();
        eventually("acknowledgements", || {
            // State, bytes not yet read, bytes not yet acknowledged, own end, other end.
            let listed = on("pods", || sh("ss -Htn"));
            ports.iter().all(|port| {
                let line = listed.lines().find(|line| line.contains(port));
                let unacknowledged = line.and_then(|line| line.split_whitespace().nth(2));
                unacknowledged == Some("0")
            })
        });
    }
}

pub(crate) fn datagrams(from: IpAddr) -> UdpSocket {
    let socket = UdpSocket::bind((from, 0)).unwrap();
    socket.connect((outside(Family::of(from)), PORT)).unwrap();
    socket
}

pub(crate) fn stream(from: IpAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(domain(from), Type::STREAM, None).unwrap();
    // Ends at once, and does not disturb the next connections.
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
    let server = SocketAddr::new(outside(Family::of(from)), PORT).into();
    socket.connect_timeout(&server, Duration::from_secs(5))?;
    socket.set_nonblocking(true).unwrap();
    Ok(socket.into())
}

/// Sends the first packet of a connection.
fn begin_connection(from: IpAddr) {
    let socket = Socket::new(domain(from), Type::STREAM, None).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
    let server = SocketAddr::new(outside(Family::of(from)), PORT);
    let _ = socket.connect(&server.into());
}

/// Sends echo requests, as `ping` does.
pub(crate) fn echoes(from: IpAddr) -> Socket {
    let protocol = match from {
        IpAddr::V4(_) => Protocol::ICMPV4,
        IpAddr::V6(_) => Protocol::ICMPV6,
    };
    let socket = Socket::new(domain(from), Type::DGRAM, Some(protocol)).unwrap();
    socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
    let server = SocketAddr::new(outside(Family::of(from)), 0);
    socket.connect(&server.into()).unwrap();
    socket
}

/// Type, code, and what the kernel fills in.
pub(crate) fn echo_request(socket: &Socket) -> [u8; 8] {
    let is_ipv4 = socket.domain().unwrap() == Domain::IPV4;
    [if is_ipv4 { 8 } else { 128 }, 0, 0, 0, 0, 0, 0, 0]
}

fn domain(address: IpAddr) -> Domain {
    match address {
        IpAddr::V4(_) => Domain::IPV4,
        IpAddr::V6(_) => Domain::IPV6,
    }
}
