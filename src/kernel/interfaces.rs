//! The interfaces of this node, as far as routes need to know of them.

use std::collections::BTreeMap;

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use nix::libc::IFLA_IFNAME;

use crate::kernel::netlink::{Care, Message, NetlinkError, attribute};
use crate::kernel::rtnetlink::Rtnetlink;
use crate::names::Interface;

/// `struct ifinfomsg` of rtnetlink.h: family, type, then index and flags.
const HEADER_BYTES: usize = 16;
const INDEX_AT: usize = 4;
const FLAGS_AT: usize = 8;

#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    flags: LinkFlags,
}

impl Link {
    /// What matters of it.
    pub(crate) fn state(&self) -> (&str, LinkFlags) {
        let matters = LinkFlags::Up | LinkFlags::Running | LinkFlags::Loopback;
        (&self.name, self.flags & matters)
    }
}

pub(crate) fn links(netlink: &Rtnetlink) -> Result<Vec<Link>, NetlinkError> {
    let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
    netlink.dump(question, Care::Exact, |all: &mut Vec<_>, answer| {
        all.extend(link(answer));
        Ok(())
    })
}

/// A link; of its many attributes, which each kind of interface has its own of, only the name is looked at.
pub(crate) fn link(message: Message<'_>) -> Option<Link> {
    let name = attribute(message.tail(HEADER_BYTES), IFLA_IFNAME)?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(Link {
        index: message.number_at(INDEX_AT)?,
        name: String::from_utf8_lossy(name).into_owned(),
        flags: LinkFlags::from_bits_retain(message.number_at(FLAGS_AT)?),
    })
}

/// Those of the interfaces that are up, but for loopback, with their addresses and networks.
pub(crate) fn connected(links: Vec<Link>, addresses: &[AddressMessage]) -> Vec<Interface> {
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
    for message in addresses {
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
    interfaces.into_values().collect()
}
