//! The interfaces of this node, as far as routes need to know of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::{Error, Handle};

use crate::names::Interface;

/// Interfaces whose state matters, by index: those that have or had an address of global scope, or a node on link, because
/// a gateway may be behind them when they come up again. Shared between what reads interfaces and what listens for drift.
#[derive(Clone, Debug, Default)]
pub(crate) struct WatchedInterfaces(Arc<Mutex<BTreeSet<u32>>>);

impl WatchedInterfaces {
    pub(crate) fn contains(&self, index: u32) -> bool {
        self.indexes().contains(&index)
    }

    pub(crate) fn add(&self, index: u32) {
        self.indexes().insert(index);
    }

    fn indexes(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    flags: LinkFlags,
}

pub(crate) async fn links(handle: &Handle) -> Result<Vec<Link>, Error> {
    let link = |message: LinkMessage| {
        let mut attributes = message.attributes.into_iter();
        let name = attributes.find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name),
            _ => None,
        })?;
        Some(Link {
            index: message.header.index,
            name,
            flags: message.header.flags,
        })
    };
    let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
    Ok(links.into_iter().filter_map(link).collect())
}

/// Those of the interfaces that are up, but for loopback, with their addresses and networks.
pub(crate) async fn connected(
    handle: &Handle,
    links: Vec<Link>,
    watched: &WatchedInterfaces,
) -> Result<Vec<Interface>, Error> {
    let is_usable = |link: &Link| {
        link.flags.contains(LinkFlags::Up) && !link.flags.contains(LinkFlags::Loopback)
    };
    let mut interfaces = BTreeMap::new();
    for Link { index, name, .. } in links.into_iter().filter(is_usable) {
        let interface = Interface {
            name,
            ..Interface::default()
        };
        interfaces.insert(index, interface);
    }
    let mut addresses = handle.address().get().execute();
    while let Some(message) = addresses.try_next().await? {
        if message.header.scope == AddressScope::Universe {
            watched.add(message.header.index);
        }
        let Some(interface) = interfaces.get_mut(&message.header.index) else {
            continue;
        };
        let length = message.header.prefix_len;
        // On a point-to-point link `Address` is the peer's, which is what can be reached there, and `Local` our own. IPv6 has
        // no `Local` elsewhere.
        let (mut peer, mut local) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Address(address) => peer = Some(*address),
                AddressAttribute::Local(address) => local = Some(*address),
                _ => {}
            }
        }
        let net = peer.and_then(|peer| IpNet::new(peer, length).ok());
        interface.nets.extend(net.map(|net| net.trunc()));
        interface.addresses.extend(local.or(peer));
    }
    Ok(interfaces.into_values().collect())
}
