//! The kernel's neighbour table: which link-layer address an IP address has, and where.

use std::net::IpAddr;

use futures::TryStreamExt;
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};

use crate::ethernet::Mac;

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
