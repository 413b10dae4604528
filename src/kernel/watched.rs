//! What is known of the interfaces whose state matters, so that news of them can be told from repetitions.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use nix::libc::{AF_UNSPEC, RTM_DELLINK};

use crate::kernel::interfaces::{Link, link};
use crate::kernel::netlink::Message;
use crate::kernel::rtnetlink::decode;

/// Interfaces that have or had an address that reaches something, by index: a gateway may be behind them when they come up
/// again. Shared between what reads interfaces and what listens for drift.
#[derive(Clone, Debug, Default)]
pub(crate) struct WatchedInterfaces(Arc<Mutex<BTreeMap<u32, Known>>>);

#[derive(Debug, Default)]
struct Known {
    link: Option<Link>,
    /// With the length of the network.
    addresses: BTreeSet<(IpAddr, u8)>,
}

impl Known {
    fn networks(&self) -> BTreeSet<IpNet> {
        let addresses = self.addresses.iter();
        let network = |(address, length): &(IpAddr, u8)| IpNet::new(*address, *length).ok();
        addresses
            .filter_map(network)
            .map(|net| net.trunc())
            .collect()
    }

    /// Notes the link; returns whether it differs in what matters.
    fn differs(&mut self, new: Link) -> bool {
        let old = self.link.replace(new);
        old.as_ref().map(Link::state) != self.link.as_ref().map(Link::state)
    }
}

impl WatchedInterfaces {
    fn known(&self) -> MutexGuard<'_, BTreeMap<u32, Known>> {
        // Interfaces are noted one by one: a panic elsewhere leaves no half of one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is reached through an interface, whatever addresses it has.
    pub(crate) fn add(&self, index: u32) {
        self.known().entry(index).or_default();
    }

    /// Notes everything as it is.
    pub(crate) fn see(&self, links: &[Link], addresses: &[AddressMessage]) {
        let mut known = self.known();
        for interface in known.values_mut() {
            interface.addresses.clear();
        }
        for (index, address) in addresses.iter().filter_map(reach) {
            known.entry(index).or_default().addresses.insert(address);
        }
        let links: BTreeMap<u32, &Link> = links.iter().map(|link| (link.index, link)).collect();
        known.retain(|index, _| links.contains_key(index));
        for (index, interface) in known.iter_mut() {
            interface.link = links.get(index).copied().cloned();
        }
    }

    /// Takes a notification of a link; returns whether it is news of one that matters. A bridge has a MAC address, and
    /// features, that follow its ports: it is told of anew with each pod.
    pub(crate) fn hears_of_link(&self, message: Message<'_>) -> bool {
        // What a bridge tells of its ports is in a family of its own.
        if message.byte_at(0).map(i32::from) != Some(AF_UNSPEC) {
            return false;
        }
        let Some(link) = link(message) else {
            return true;
        };
        let mut known = self.known();
        if message.kind == RTM_DELLINK {
            return known.remove(&link.index).is_some();
        }
        let interface = known.get_mut(&link.index);
        interface.is_some_and(|interface| interface.differs(link))
    }

    /// Takes a notification of an address; returns whether other networks can be reached than before. The kernel tells of
    /// an address anew with each router advertisement that prolongs it.
    pub(crate) fn hears_of_address(&self, message: Message<'_>) -> bool {
        let (address, is_new) = match decode(message) {
            Ok(RouteNetlinkMessage::NewAddress(address)) => (address, true),
            Ok(RouteNetlinkMessage::DelAddress(address)) => (address, false),
            Ok(_) | Err(_) => return true,
        };
        let Some((index, address)) = reach(&address) else {
            return false;
        };
        let mut known = self.known();
        let interface = known.entry(index).or_default();
        let before = interface.networks();
        match is_new {
            true => interface.addresses.insert(address),
            false => interface.addresses.remove(&address),
        };
        interface.networks() != before
    }
}

/// The interface of an address by which something can be reached, and that address, which is the peer's on a
/// point-to-point link. An address that stands for itself reaches nothing: some CNI plugins give one to the host's end of
/// each pod's link.
fn reach(message: &AddressMessage) -> Option<(u32, (IpAddr, u8))> {
    let (mut address, mut local) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(found) => address = Some(*found),
            AddressAttribute::Local(found) => local = Some(*found),
            _ => {}
        }
    }
    let (address, length) = (address?, message.header.prefix_len);
    let is_host = IpNet::from(address).prefix_len() == length;
    let is_own = local.is_none_or(|local| local == address);
    let reaches = message.header.scope == AddressScope::Universe && !(is_host && is_own);
    reaches.then_some((message.header.index, (address, length)))
}
