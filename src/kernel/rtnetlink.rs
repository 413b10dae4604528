//! A netlink socket to routing: links, addresses, neighbours, routes and rules.

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, ParseableParametrized,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::kernel::netlink::{Care, Message, Netlink, NetlinkError};

/// The whole message in the crate's words.
pub(crate) fn decode(message: Message<'_>) -> Result<RouteNetlinkMessage, NetlinkError> {
    let decoded = RouteNetlinkMessage::parse_with_param(message.payload, message.kind);
    Ok(decoded?)
}

/// A socket to routing in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Rtnetlink {
    netlink: Netlink,
    /// Notifications of a change carry the port of the socket that asked for it.
    pub(crate) port: u32,
}

impl Rtnetlink {
    pub(crate) fn open() -> Result<Rtnetlink, NetlinkError> {
        let netlink = Netlink::open(NETLINK_ROUTE)?;
        let port = netlink.port;
        Ok(Rtnetlink { netlink, port })
    }

    /// Changes something; `flags` say how.
    pub(crate) fn change(
        &self,
        change: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NetlinkError> {
        let change = message(change, NLM_F_ACK | flags);
        self.netlink.request(&change, |_| {})
    }

    /// Dumps everything that `question` describes, and hands each answer to `take`.
    pub(crate) fn dump<T: Default>(
        &self,
        question: RouteNetlinkMessage,
        care: Care,
        take: impl Fn(&mut T, Message<'_>) -> Result<(), NetlinkError>,
    ) -> Result<T, NetlinkError> {
        self.netlink
            .dump(&message(question, NLM_F_DUMP), care, take)
    }

    /// The addresses of all interfaces.
    pub(crate) fn addresses(&self) -> Result<Vec<AddressMessage>, NetlinkError> {
        let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.dump(question, Care::Exact, |all: &mut Vec<_>, answer| {
            if let RouteNetlinkMessage::NewAddress(address) = decode(answer)? {
                all.push(address);
            }
            Ok(())
        })
    }
}

fn message(inner: RouteNetlinkMessage, flags: u16) -> Vec<u8> {
    let mut message = NetlinkMessage::from(inner);
    message.header.flags = NLM_F_REQUEST | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}
