//! A packet socket that hears and sends neighbour messages on one interface.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{LinkAddr, bind};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::net::UdpSocket;

use crate::ethernet::{Claim, Mac, Own};

/// `ETH_P_ALL` of if_ether.h: only a socket for all protocols hears what this node itself sends, and that is how
/// its own announcements are known.
const EVERYTHING: u16 = 3;
/// Neighbour messages have less than 100 bytes.
const FRAME_BYTES: usize = 256;
/// The same, as the filter takes it.
const FRAME_LENGTH: u32 = 256;

/// Instructions of classic BPF (filter.h): load two bytes, load a byte, compare, return.
const LOAD_2: u16 = 0x28;
const LOAD_1: u16 = 0x30;
const EQUALS: u16 = 0x15;
const RETURN: u16 = 0x06;

/// ARP and ICMPv6 neighbour advertisements; the kernel keeps all else from us.
fn filter() -> [SockFilter; 9] {
    // The middle numbers: how many instructions are jumped over when equal, and when not.
    [
        SockFilter::new(LOAD_2, 0, 0, 12),
        SockFilter::new(EQUALS, 6, 0, 0x0806),
        SockFilter::new(EQUALS, 0, 4, 0x86dd),
        SockFilter::new(LOAD_1, 0, 0, 20),
        SockFilter::new(EQUALS, 0, 2, 58),
        SockFilter::new(LOAD_1, 0, 0, 54),
        SockFilter::new(EQUALS, 1, 0, 136),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, FRAME_LENGTH),
    ]
}

/// The socket of one interface.
#[derive(Debug)]
pub(crate) struct LanSocket {
    // Not UDP: to tokio, any bound datagram socket is the same.
    socket: UdpSocket,
    /// That of the interface.
    index: u32,
    own: Own,
}

impl LanSocket {
    /// Opens it, with the addresses that the interface has now.
    pub(crate) fn open(interface: &str) -> io::Result<LanSocket> {
        let (link, own) = addresses(interface)?;
        let protocol = Protocol::from(i32::from(EVERYTHING.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
        socket.set_nonblocking(true)?;
        socket.attach_filter(&filter())?;
        bind(socket.as_raw_fd(), &link)?;
        // Drops what came before the filter was attached, and from other interfaces.
        let mut buffer = [MaybeUninit::uninit(); FRAME_BYTES];
        while socket.recv(&mut buffer).is_ok() {}
        let socket = UdpSocket::from_std(OwnedFd::from(socket).into())?;
        let index = u32::try_from(link.ifindex()).map_err(io::Error::other)?;
        Ok(LanSocket { socket, index, own })
    }

    /// The number of its interface.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// Our link-layer address there.
    pub(crate) fn mac(&self) -> Mac {
        self.own.mac
    }

    /// Waits for the next claim.
    pub(crate) async fn next(&self) -> io::Result<Claim> {
        let mut frame = [0; FRAME_BYTES];
        loop {
            let length = self.socket.recv(&mut frame).await?;
            if let Some(claim) = frame.get(..length).and_then(Claim::of) {
                return Ok(claim);
            }
        }
    }

    /// Asks who has an address; does nothing when the interface has no address of that family.
    pub(crate) async fn ask(&self, address: IpAddr) -> io::Result<()> {
        match self.own.question(address) {
            Some(frame) => self.socket.send(&frame).await.map(drop),
            None => Ok(()),
        }
    }
}

fn addresses(interface: &str) -> io::Result<(LinkAddr, Own)> {
    let (mut link, mut v4, mut v6) = (None, None, None);
    let addresses = getifaddrs()?.filter(|address| address.interface_name == interface);
    for address in addresses.filter_map(|address| address.address) {
        if let Some(found) = address.as_link_addr() {
            link = Some(*found);
        }
        if let Some(found) = address.as_sockaddr_in() {
            v4.get_or_insert(found.ip());
        }
        if let Some(found) = address.as_sockaddr_in6() {
            // A global address is preferred, a link-local one will do.
            if v6.is_none_or(|known: Ipv6Addr| known.is_unicast_link_local()) {
                v6 = Some(found.ip());
            }
        }
    }
    let no_interface = || io::Error::other(format!("no Ethernet interface is called {interface}"));
    let link = link.ok_or_else(no_interface)?;
    let mac = Mac(link.addr().ok_or_else(no_interface)?);
    Ok((link, Own { mac, v4, v6 }))
}
