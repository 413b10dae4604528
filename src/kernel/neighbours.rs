//! The kernel's neighbour table: which link-layer address an IP address has, and where.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::TryStreamExt;
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};

use nix::libc;

use crate::ethernet::Mac;
use crate::kernel::netfilter::{Message, address, attribute};

/// Length of `struct ndmsg`, and where its `ndm_ifindex` is.
const NDMSG: usize = 12;
const INTERFACE: usize = 4;

/// Who has an address, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Neighbour {
    pub(crate) address: IpAddr,
    pub(crate) mac: Mac,
    pub(crate) interface: u32,
}

pub(crate) async fn neighbour_table(
    handle: &rtnetlink::Handle,
) -> Result<Vec<Neighbour>, rtnetlink::Error> {
    let neighbours: Vec<NeighbourMessage> =
        handle.neighbours().get().execute().try_collect().await?;
    Ok(neighbours.iter().filter_map(neighbour).collect())
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

/// What a notification says of a neighbour. As in the table, the kernel names a link-layer address only in states in which it
/// sends there: not while it is still asking, nor after nobody has answered. Entries of bridges and of tunnels between nodes are
/// told in the same group, with an address family of their own.
pub(crate) fn notified(message: &Message<'_>) -> Option<Neighbour> {
    let family = i32::from(*message.payload.first()?);
    if ![libc::AF_INET, libc::AF_INET6].contains(&family) {
        return None;
    }
    let interface = message.payload.get(INTERFACE..)?.first_chunk::<4>()?;
    let attributes = message.payload.get(NDMSG..)?;
    let mac = attribute(attributes, libc::NDA_LLADDR)?.try_into().ok()?;
    Some(Neighbour {
        address: address(attribute(attributes, libc::NDA_DST)?)?,
        mac: Mac(mac),
        interface: u32::from_ne_bytes(*interface),
    })
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let (mut mac, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac);
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                address = Some(IpAddr::from(*v4));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                address = Some(IpAddr::from(*v6));
            }
            _ => {}
        }
    }
    Some(Neighbour {
        address: address?,
        mac: mac?,
        interface: message.header.ifindex,
    })
}
