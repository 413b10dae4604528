//! The kernel's neighbour table: which link-layer address an IP address has, and where.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::NeighbourMessage;
use nix::libc::{AF_INET, AF_INET6, NDA_DST, NDA_LLADDR};

use crate::ethernet::Mac;
use crate::kernel::netlink::{Care, Message, NetlinkError, address, attribute};
use crate::kernel::rtnetlink::Rtnetlink;

/// `struct ndmsg` of neighbour.h: family, padding, then the interface.
const HEADER_BYTES: usize = 12;
const INTERFACE_AT: usize = 4;

/// Who has an address, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Neighbour {
    pub(crate) address: IpAddr,
    pub(crate) mac: Mac,
    pub(crate) interface: u32,
}

/// Reads the table, in the network namespace of the runtime's threads. With a socket of its own: one that has failed once
/// cannot make the next look fail.
pub(crate) async fn neighbour_table() -> Result<Vec<Neighbour>, NetlinkError> {
    let read = || {
        let question = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        Rtnetlink::open()?.dump(question, Care::Exact, |all: &mut Vec<_>, answer| {
            all.extend(neighbour(answer));
            Ok(())
        })
    };
    // A node with thousands of pods has as many neighbours.
    tokio::task::spawn_blocking(read).await?
}

/// Those whose link-layer address matters, with where they are and what it was when it was last known. Shared between what
/// reads the table and what listens for drift.
#[derive(Clone, Debug, Default)]
pub(crate) struct WatchedNeighbours(Arc<Mutex<BTreeMap<IpAddr, Watched>>>);

#[derive(Clone, Copy, Debug)]
struct Watched {
    interface: u32,
    mac: Option<Mac>,
}

impl WatchedNeighbours {
    /// Watches these, each on its interface, and no others. What is known of them stays.
    pub(crate) fn watch(&self, places: impl Iterator<Item = (IpAddr, u32)>) {
        let mut all = self.all();
        let watched = places.map(|(address, interface)| {
            let known = all.get(&address).filter(|w| w.interface == interface);
            let mac = known.and_then(|watched| watched.mac);
            (address, Watched { interface, mac })
        });
        *all = watched.collect();
    }

    /// Takes an entry of the table; returns whether it is news. An entry that goes away is none: it was not used for a while.
    pub(crate) fn take(&self, neighbour: Neighbour) -> bool {
        let mut all = self.all();
        let watched = all.get_mut(&neighbour.address);
        let Some(watched) = watched.filter(|w| w.interface == neighbour.interface) else {
            return false;
        };
        watched.mac.replace(neighbour.mac) != Some(neighbour.mac)
    }

    pub(crate) fn known(&self) -> BTreeMap<IpAddr, Mac> {
        let all = self.all();
        let known = all
            .iter()
            .filter_map(|(a, watched)| Some((*a, watched.mac?)));
        known.collect()
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<IpAddr, Watched>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An entry, of the table or of a notification; `None` for one without a link-layer address, or with one that is not
/// Ethernet's. The kernel names a link-layer address only in states in which it sends there: not while it is still asking,
/// nor after nobody has answered. Entries of bridges and of tunnels between nodes are told in the same group, with an
/// address family of their own.
pub(crate) fn neighbour(message: Message<'_>) -> Option<Neighbour> {
    let family = i32::from(message.byte_at(0)?);
    if ![AF_INET, AF_INET6].contains(&family) {
        return None;
    }
    let attributes = message.tail(HEADER_BYTES);
    let mac = attribute(attributes, NDA_LLADDR)?;
    Some(Neighbour {
        address: address(attribute(attributes, NDA_DST)?)?,
        mac: Mac(<[u8; 6]>::try_from(mac).ok()?),
        interface: message.number_at(INTERFACE_AT)?,
    })
}
