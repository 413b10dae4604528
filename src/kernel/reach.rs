//! How the kernel reaches an address: it is asked, as for a packet. Networks of addresses do not say: DHCPv6 gives an address
//! of /128 and leaves it to a route what is on link, some providers do so with /32, and of two networks the longer counts.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::libc::{self, MSG_DONTWAIT};
use nix::net::if_::{if_indextoname, if_nametoindex};

use crate::kernel::neighbours::WatchedNeighbours;
use crate::kernel::netlink::{Message, NetlinkError, address, attribute, messages};
use crate::kernel::watched::WatchedInterfaces;
use crate::names::Reach;

/// Questions at a time: the answers, of less than 1 KiB each in the kernel's memory, must fit into a socket's buffer of the
/// default size, 208 KiB.
const AT_A_TIME: usize = 64;
/// One answer, which holds one route.
const ANSWER_BYTES: usize = 8 * 1024;
/// Length of `struct rtmsg`, and where its `rtm_type` is.
const RTMSG: usize = 12;
const TYPE_OF_ROUTE: usize = 7;
/// A gateway of the other family; not among the constants for every C library.
const RTA_VIA: u16 = 18;
/// The loopback interface, in every network namespace.
const LOOPBACK: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum ReachError {
    #[error("cannot open a netlink socket for route lookups")]
    Open(#[source] io::Error),
    #[error("cannot look up the route to {0}")]
    LookUp(IpAddr, #[source] NetlinkError),
}

/// The addresses whose way matters. Shared between what looks it up and what listens for drift.
#[derive(Clone, Debug, Default)]
pub(crate) struct WatchedAddresses(Arc<Mutex<BTreeSet<IpAddr>>>);

impl WatchedAddresses {
    /// Whether one of them is in a network.
    pub(crate) fn any_in(&self, net: IpNet) -> bool {
        let all = self.all();
        all.range(net.network()..=net.broadcast()).next().is_some()
    }

    fn all(&self) -> MutexGuard<'_, BTreeSet<IpAddr>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks the kernel, in the network namespace of the calling thread.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lookup {
    pub(crate) interfaces: WatchedInterfaces,
    pub(crate) addresses: WatchedAddresses,
    pub(crate) neighbours: WatchedNeighbours,
}

impl Lookup {
    /// Completes what is known of these addresses, and forgets others. Returns whether there was anything to look up.
    pub(crate) fn complete(
        &self,
        addresses: BTreeSet<IpAddr>,
        known: &mut BTreeMap<IpAddr, Reach>,
    ) -> Result<bool, ReachError> {
        known.retain(|address, _| addresses.contains(address));
        let unknown: Vec<IpAddr> = addresses
            .iter()
            .filter(|address| !known.contains_key(address))
            .copied()
            .collect();
        // Before they are looked up: what changes from now on is heard.
        *self.addresses.all() = addresses;
        if unknown.is_empty() {
            return Ok(false);
        }
        let socket = open().map_err(ReachError::Open)?;
        for some in unknown.chunks(AT_A_TIME) {
            let questions: Vec<u8> = some.iter().flat_map(|a| question(*a)).collect();
            let failed =
                |address| move |error: io::Error| ReachError::LookUp(address, error.into());
            if let Some(first) = some.first() {
                socket.send(&questions, 0).map_err(failed(*first))?;
            }
            for address in some {
                // Each question has one answer, in the same order, and all are there when `send` returns.
                let mut buffer = Vec::with_capacity(ANSWER_BYTES);
                let received = socket.recv(&mut buffer, MSG_DONTWAIT);
                received.map_err(failed(*address))?;
                let reach = self.answer(&buffer);
                known.insert(
                    *address,
                    reach.map_err(|e| ReachError::LookUp(*address, e))?,
                );
            }
        }
        Ok(true)
    }

    /// Watches which link-layer addresses those of these nodes have that are on link.
    pub(crate) fn watch(&self, nodes: &BTreeSet<IpAddr>, reach: &BTreeMap<IpAddr, Reach>) {
        let mut indexes: BTreeMap<&str, Option<u32>> = BTreeMap::new();
        let places = nodes.iter().filter_map(|node| {
            let Reach::OnLink(name) = reach.get(node)? else {
                return None;
            };
            let index = indexes.entry(name);
            let index = *index.or_insert_with(|| if_nametoindex(name.as_str()).ok());
            Some((*node, index?))
        });
        self.neighbours.watch(places);
    }

    fn answer(&self, bytes: &[u8]) -> Result<Reach, NetlinkError> {
        let messages = messages(bytes)?;
        let Some(message) = messages.first() else {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        };
        if let Some(answer) = message.acknowledges() {
            let error = answer.err().map(|error| error.to_string());
            return Ok(Reach::Unreachable(error.unwrap_or_default()));
        }
        let kind = message.payload.get(TYPE_OF_ROUTE).copied();
        Ok(match (kind, gateway(message), interface(message)) {
            (Some(libc::RTN_UNICAST), Some(router), _) => Reach::Router(router),
            (Some(libc::RTN_UNICAST), None, Some(index)) if index != LOOPBACK => {
                self.interfaces.add(index);
                let name = if_indextoname(index).map_err(io::Error::from);
                match name.map(|name| name.into_string()) {
                    Ok(Ok(name)) => Reach::OnLink(name),
                    // It went away in between, which is heard.
                    _ => Reach::Unreachable(format!("on interface {index}, which is gone")),
                }
            }
            (Some(libc::RTN_LOCAL), ..) => Reach::Own,
            _ => Reach::Unreachable("a route rejects it".to_owned()),
        })
    }
}

/// A socket for a while: an answer that was not taken is nobody else's.
fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn question(address: IpAddr) -> Vec<u8> {
    let mut route = RouteMessage::default();
    (
        route.header.address_family,
        route.header.destination_prefix_length,
    ) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    let address = RouteAttribute::Destination(RouteAddress::from(address));
    route.attributes.push(address);
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let payload = NetlinkPayload::from(RouteNetlinkMessage::GetRoute(route));
    let mut message = NetlinkMessage::new(header, payload);
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn attribute_of<'a>(message: &Message<'a>, wanted: u16) -> Option<&'a [u8]> {
    attribute(message.payload.get(RTMSG..)?, wanted)
}

fn interface(message: &Message<'_>) -> Option<u32> {
    let bytes = attribute_of(message, libc::RTA_OIF)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

/// The destinations that a route, which comes or goes, may reach in another way; `None` for a default route through a router:
/// it leaves to others what is on link.
pub(crate) fn changed_by(route: &Message<'_>) -> Option<IpNet> {
    let (family, length) = (*route.payload.first()?, *route.payload.get(1)?);
    if length == 0 && gateway(route).is_some() {
        return None;
    }
    let any = match i32::from(family) {
        libc::AF_INET => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        libc::AF_INET6 => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let destination = attribute_of(route, libc::RTA_DST).and_then(address);
    IpNet::new(destination.unwrap_or(any), length).ok()
}

/// The router on the way. That of an IPv4 route may be of IPv6.
fn gateway(message: &Message<'_>) -> Option<IpAddr> {
    let via = || attribute_of(message, RTA_VIA)?.get(2..);
    address(attribute_of(message, libc::RTA_GATEWAY).or_else(via)?)
}
