//! Servers that say whom they see, and clients that ask them.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use etherparse::{
    ArpEthIpv4Packet, ArpOperation, IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header,
    Icmpv6Type, PacketBuilder,
};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use tokio::sync::oneshot;

use crate::Family;
use crate::host::Host;

/// Port of every server of the lab.
pub const PORT: u16 = 8080;

/// How long a client waits: more than the kernel's first two retransmissions of a SYN (1 s and 2 s later).
pub const PATIENCE: Duration = Duration::from_secs(4);

/// A server on one host; stops when it goes out of scope.
#[derive(Debug)]
pub struct Server {
    _stop: oneshot::Sender<()>,
    /// The threads that answer ICMP look whether it is there.
    alive: Arc<()>,
}

/// The same, and answers ICMP echo requests with the line instead of with what they carry.
///
/// # Errors
/// When the sockets cannot be opened.
pub fn serve_outside(host: &Host) -> Result<Server> {
    let server = serve(host)?;
    host.sh("sysctl -qw net.ipv4.icmp_echo_ignore_all=1 net.ipv6.icmp.echo_ignore_all=1")?;
    for family in Family::BOTH {
        let name = host.name.clone();
        let (domain, protocol, _) = icmp(family);
        let socket = host.inside(move || Socket::new(domain, Type::RAW, Some(protocol)))?;
        let socket = socket
            .join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))??;
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let alive = Arc::downgrade(&server.alive);
        std::thread::spawn(move || {
            while alive.strong_count() > 0 {
                // Nothing came, or an error that an earlier answer brought.
                let _ = answer_icmp(&name, family, &socket);
            }
        });
    }
    Ok(server)
}

/// Answers on TCP and UDP, both families: a line with the host's name and the address of the peer, at the
/// beginning of a connection and for each line and datagram received.
///
/// # Errors
/// When the port cannot be bound.
pub fn serve(host: &Host) -> Result<Server> {
    let (stop, stopped) = oneshot::channel::<()>();
    let (ready, bound) = std::sync::mpsc::channel();
    let name = host.name.clone();
    host.inside(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let result = runtime.and_then(|runtime| {
            runtime.block_on(async {
                let any = (std::net::Ipv6Addr::UNSPECIFIED, PORT);
                let tcp = tokio::net::TcpListener::bind(any).await?;
                let udp = tokio::net::UdpSocket::bind(any).await?;
                let _ = ready.send(None);
                tokio::select! {
                    _ = stopped => {}
                    () = serve_tcp(&name, tcp) => {}
                    () = serve_udp(&name, udp) => {}
                }
                Ok(())
            })
        });
        if let Err(error) = result {
            let _ = ready.send(Some(error));
        }
    })?;
    match bound.recv().context("a server ended at once")? {
        None => Ok(Server {
            _stop: stop,
            alive: Arc::new(()),
        }),
        Some(error) => Err(error).with_context(|| format!("cannot serve on {}", host.name)),
    }
}

fn line(name: &str, peer: SocketAddr) -> String {
    format!("{name} {} {}\n", peer.ip().to_canonical(), peer.port())
}

async fn serve_tcp(name: &str, listener: tokio::net::TcpListener) {
    while let Ok((mut stream, peer)) = listener.accept().await {
        let line = line(name, peer);
        tokio::spawn(async move {
            let (reader, mut writer) = stream.split();
            let mut lines = tokio::io::BufReader::new(reader).lines();
            let mut times = 1;
            loop {
                if writer
                    .write_all(line.repeat(times).as_bytes())
                    .await
                    .is_err()
                {
                    return;
                }
                match lines.next_line().await {
                    // A number asks for as many answers, `after` and a number for one after so many milliseconds.
                    Ok(Some(text)) => {
                        times = text.parse().unwrap_or(1);
                        let pause = text.strip_prefix("after ").and_then(|ms| ms.parse().ok());
                        tokio::time::sleep(Duration::from_millis(pause.unwrap_or(0))).await;
                    }
                    Ok(None) | Err(_) => return,
                }
            }
        });
    }
}

async fn serve_udp(name: &str, socket: tokio::net::UdpSocket) {
    let mut buffer = [0; 64];
    while let Ok((_, peer)) = socket.recv_from(&mut buffer).await {
        // A peer that is gone is no reason to stop.
        let _ = socket.send_to(line(name, peer).as_bytes(), peer).await;
    }
}

/// Domain and protocol of ICMP in a family, and the type of an echo request.
fn icmp(family: Family) -> (Domain, socket2::Protocol, u8) {
    match family {
        Family::V4 => (Domain::IPV4, socket2::Protocol::ICMPV4, 8),
        Family::V6 => (Domain::IPV6, socket2::Protocol::ICMPV6, 128),
    }
}

fn answer_icmp(name: &str, family: Family, socket: &UdpSocket) -> std::io::Result<()> {
    let (_, _, request) = icmp(family);
    let mut buffer = [0; 256];
    let (length, peer) = socket.recv_from(&mut buffer)?;
    // Of IPv4 the kernel gives the IP header, too.
    let header = match family {
        Family::V4 => usize::from(buffer[0] & 0x0f) * 4,
        Family::V6 => 0,
    };
    let packet = buffer.get(header..length).unwrap_or_default();
    let Some(&[kind, _, _, _, id0, id1, seq0, seq1]) = packet.first_chunk() else {
        return Ok(());
    };
    if kind != request {
        return Ok(());
    }
    let echo = IcmpEchoHeader::from_bytes([id0, id1, seq0, seq1]);
    let line = line(name, SocketAddr::new(peer.ip(), 0));
    let header = match family {
        Family::V4 => {
            let reply = Icmpv4Type::EchoReply(echo);
            Icmpv4Header::with_checksum(reply, line.as_bytes())
                .to_bytes()
                .to_vec()
        }
        // The kernel fills in the checksum.
        Family::V6 => {
            let reply = Icmpv6Type::EchoReply(echo);
            Icmpv6Header::new(reply).to_bytes().to_vec()
        }
    };
    socket.send_to(&[&header, line.as_bytes()].concat(), peer)?;
    Ok(())
}

/// Transport protocols, and ICMP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP echo; answered with a name and an address by servers outside only.
    Icmp,
}

impl Protocol {
    /// All.
    pub const ALL: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Icmp];
    /// Those that Services and pods answer, too.
    pub const WITH_PORTS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];
}

/// What came of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The server answered.
    As {
        /// Name of the host that answered.
        by: String,
        /// The address that it saw.
        address: IpAddr,
    },
    /// Refused or reset.
    Refused,
    /// No route, or prohibited.
    Unreachable,
    /// No answer.
    TimedOut,
}

impl Seen {
    /// The address that was seen, if any.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        match self {
            Seen::As { address, .. } => Some(*address),
            _ => None,
        }
    }

    /// Whether nothing came through, and the client was told so.
    #[must_use]
    pub fn is_rejected(&self) -> bool {
        matches!(self, Seen::Refused | Seen::Unreachable)
    }

    pub(crate) fn from_line(line: &str) -> Seen {
        let mut words = line.split_whitespace();
        match (
            words.next(),
            words.next().and_then(|word| word.parse().ok()),
        ) {
            (Some(by), Some(address)) => Seen::As {
                by: by.to_owned(),
                address,
            },
            _ => Seen::TimedOut,
        }
    }

    fn from_error(error: &std::io::Error) -> Seen {
        match error.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Seen::Refused,
            ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::PermissionDenied => Seen::Unreachable,
            _ => Seen::TimedOut,
        }
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Seen::As { by, address } => write!(f, "{address} (seen by {by})"),
            Seen::Refused => f.write_str("refused"),
            Seen::Unreachable => f.write_str("unreachable"),
            Seen::TimedOut => f.write_str("no answer"),
        }
    }
}

/// Opens a connection from a host and returns what the server saw.
///
/// # Errors
/// When the host's network cannot be entered.
pub fn ask(from: &Host, to: SocketAddr, protocol: Protocol) -> Result<Seen> {
    let asked = from.inside(move || {
        let result = match protocol {
            Protocol::Tcp => ask_tcp(to),
            Protocol::Udp => ask_udp(to),
            Protocol::Icmp => ask_icmp(to.ip()),
        };
        match result {
            // Says nothing of the way.
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable => Err(error),
            result => Ok(result.unwrap_or_else(|error| Seen::from_error(&error))),
        }
    })?;
    let seen = asked
        .join()
        .map_err(|_| anyhow::anyhow!("the client panicked"))?;
    Ok(seen?)
}

/// Sends a gratuitous ARP reply to some hosts only, from a made-up sender, in the calling thread's network.
pub(crate) fn forge_arp(
    interface: &str,
    to: &[[u8; 6]],
    address: std::net::Ipv4Addr,
) -> Result<()> {
    use nix::sys::socket::bind;

    let arp = socket2::Protocol::from(i32::from(0x0806_u16.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(arp))?;
    let mut addresses = nix::ifaddrs::getifaddrs()?;
    let link = addresses.find_map(|a| {
        let link = a.address?.as_link_addr().copied();
        link.filter(|_| a.interface_name == interface)
    });
    bind(socket.as_raw_fd(), &link.context("no such interface")?)?;
    for host in to {
        let sender = [2, 0, 0, 0, 0x66, 0x66];
        let claim = ArpEthIpv4Packet {
            operation: ArpOperation::REPLY,
            sender_mac: sender,
            sender_ipv4: address.octets(),
            target_mac: *host,
            target_ipv4: address.octets(),
        };
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(sender, *host)
            .arp(claim.into())
            .write(&mut frame)?;
        socket.send(&frame)?;
    }
    Ok(())
}

fn ask_tcp(to: SocketAddr) -> std::io::Result<Seen> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // Ends with a reset, so that the port, of which a pod has a thousand, is free at once.
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(Seen::from_line(&line))
}

fn ask_udp(to: SocketAddr) -> std::io::Result<Seen> {
    let any: IpAddr = if to.is_ipv4() {
        [0; 4].into()
    } else {
        [0_u16; 8].into()
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut buffer = [0; 64];
    for _ in 0..3 {
        match socket.send(b"?").and_then(|_| socket.recv(&mut buffer)) {
            Ok(length) => return Ok(Seen::from_line(&String::from_utf8_lossy(&buffer[..length]))),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            // The kernel sends such an error only once a second to one host, after the first six.
            Err(error) => return Err(error),
        }
    }
    Ok(Seen::TimedOut)
}

fn ask_icmp(to: IpAddr) -> std::io::Result<Seen> {
    let (domain, protocol, request) = icmp(match to {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    });
    // The kernel chooses the identifier, and reports errors as of a connected UDP socket.
    let socket = UdpSocket::from(Socket::new(domain, Type::DGRAM, Some(protocol))?);
    socket.connect((to, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut buffer = [0; 64];
    for number in 1..=3 {
        let question = [request, 0, 0, 0, 0, 0, 0, number];
        match socket
            .send(&question)
            .and_then(|_| socket.recv(&mut buffer))
        {
            Ok(length) => {
                let line = buffer.get(8..length).unwrap_or_default();
                return Ok(Seen::from_line(&String::from_utf8_lossy(line)));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            // The kernel sends such an error only once a second to one host, after the first six.
            Err(error) => return Err(error),
        }
    }
    Ok(Seen::TimedOut)
}

/// Asks a web server on a host itself, and returns the whole answer.
///
/// # Errors
/// When it does not answer.
pub fn http_get(host: &Host, port: u16, path: &str) -> Result<String> {
    let path = path.to_owned();
    let asked = host.inside(move || -> std::io::Result<String> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    let answer = asked
        .join()
        .map_err(|_| anyhow::anyhow!("the client panicked"))?;
    answer.with_context(|| format!("{}:{port} does not answer", host.name))
}

/// A connection that stays open.
#[derive(Debug)]
pub struct Stream {
    reader: BufReader<TcpStream>,
}

impl Stream {
    /// Opens it.
    ///
    /// # Errors
    /// When the connection cannot be made.
    pub fn open(from: &Host, to: SocketAddr) -> Result<Stream> {
        let connected = from.inside(move || TcpStream::connect_timeout(&to, PATIENCE))?;
        let stream = connected
            .join()
            .map_err(|_| anyhow::anyhow!("the client panicked"))??;
        stream.set_nodelay(true)?;
        let mut stream = Stream {
            reader: BufReader::new(stream),
        };
        stream.read(PATIENCE)?;
        Ok(stream)
    }

    /// Sends a line and returns what the server says of us; retransmissions may take up to `limit`.
    ///
    /// # Errors
    /// When the connection is broken or silent.
    pub fn ask(&mut self, limit: Duration) -> Result<Seen> {
        self.reader
            .get_mut()
            .write_all(b"?\n")
            .context("cannot send")?;
        self.read(limit)
    }

    /// Asks for an answer after a time.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn ask_for_later(&mut self, pause: Duration) -> Result<()> {
        let request = format!("after {}\n", pause.as_millis());
        let written = self.reader.get_mut().write_all(request.as_bytes());
        written.context("cannot send")
    }

    /// Ends its own half of the connection.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn say_no_more(&self) -> Result<()> {
        let ended = self.reader.get_ref().shutdown(Shutdown::Write);
        ended.context("cannot end")
    }

    /// Waits for what the server says by itself.
    ///
    /// # Errors
    /// When the connection is broken or silent.
    pub fn hear(&mut self, limit: Duration) -> Result<Seen> {
        self.read(limit)
    }

    /// Asks for many answers at once, so that packets of full size come back, and waits for all of them.
    ///
    /// # Errors
    /// When the connection is broken or silent.
    pub fn download(&mut self, answers: usize, limit: Duration) -> Result<()> {
        let request = format!("{answers}\n");
        let written = self.reader.get_mut().write_all(request.as_bytes());
        written.context("cannot send")?;
        (0..answers).try_for_each(|_| self.read(limit).map(drop))
    }

    fn read(&mut self, limit: Duration) -> Result<Seen> {
        self.reader.get_ref().set_read_timeout(Some(limit))?;
        let mut line = String::new();
        let length = self.reader.read_line(&mut line).context("no answer")?;
        anyhow::ensure!(length > 0, "closed by the other side");
        Ok(Seen::from_line(&line))
    }
}
