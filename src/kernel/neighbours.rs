//! The kernel's neighbour table: which link-layer address an IP address has, and where.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::NeighbourMessage;
use nix::libc::{NDA_DST, NDA_LLADDR};

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

/// An entry; `None` for one without a link-layer address, or with one that is not Ethernet's.
fn neighbour(message: Message<'_>) -> Option<Neighbour> {
    let attributes = message.tail(HEADER_BYTES);
    let mac = attribute(attributes, NDA_LLADDR)?;
    Some(Neighbour {
        address: address(attribute(attributes, NDA_DST)?)?,
        mac: Mac(<[u8; 6]>::try_from(mac).ok()?),
        interface: message.number_at(INTERFACE_AT)?,
    })
}
