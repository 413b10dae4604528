//! A netlink socket to netfilter: nftables and connection tracking, without a process.

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::kernel::netlink::{Care, Netlink};
pub(crate) use crate::kernel::netlink::{Message, NetlinkError, attribute, attributes};

/// Family, version and resource come before the attributes.
const HEADER_BYTES: usize = 4;

impl<'a> Message<'a> {
    /// The attributes: type and value.
    pub(crate) fn attributes(&self) -> impl Iterator<Item = (u16, &'a [u8])> {
        attributes(self.tail(HEADER_BYTES))
    }

    /// The value of the first attribute of a type.
    pub(crate) fn attribute(&self, wanted: u16) -> Option<&'a [u8]> {
        attribute(self.tail(HEADER_BYTES), wanted)
    }

    /// The family that an object belongs to.
    pub(crate) fn family(&self) -> NetfilterProtoFamily {
        self.byte_at(0).unwrap_or_default().into()
    }
}

/// A socket to netfilter in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Netfilter {
    netlink: Netlink,
    /// Notifications of a change carry the port of the socket that asked for it.
    pub(crate) port: u32,
}

impl Netfilter {
    pub(crate) fn open() -> Result<Netfilter, NetlinkError> {
        let netlink = Netlink::open(NETLINK_NETFILTER)?;
        let port = netlink.port;
        Ok(Netfilter { netlink, port })
    }

    pub(crate) fn send(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        self.netlink.send(bytes)
    }

    /// Waits for the next messages.
    pub(crate) fn receive<T>(
        &self,
        take: impl FnOnce(Vec<Message<'_>>) -> Result<T, NetlinkError>,
    ) -> Result<T, NetlinkError> {
        self.netlink.receive(take)
    }

    /// Sends a transaction. Returns the first failure that the kernel reports; without one it is in force.
    pub(crate) fn commit(&self, batch: &[u8]) -> Result<(), NetlinkError> {
        self.netlink.request(batch, |_| {})
    }

    /// Whether the object that is asked for exists.
    pub(crate) fn has(
        &self,
        family: NetfilterProtoFamily,
        question: NetfilterMessageInner,
    ) -> Result<bool, NetlinkError> {
        let question = message(family, NLM_F_ACK, 0, question);
        match self.netlink.request(&question, |_| {}) {
            Ok(()) => Ok(true),
            Err(error) if error.is_absent() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Dumps everything that `question` describes, and hands each answer to `take`; from the start, with a new `T`, when
    /// somebody changed netfilter meanwhile.
    pub(crate) fn dump<T: Default>(
        &self,
        family: NetfilterProtoFamily,
        question: &NetfilterMessageInner,
        take: impl Fn(&mut T, Message<'_>) -> Result<(), NetlinkError>,
    ) -> Result<T, NetlinkError> {
        let question = message(family, NLM_F_DUMP, 0, question.clone());
        self.netlink.dump(&question, Care::Exact, take)
    }
}

/// One message; `resource` is the subsystem that a transaction is for, 0 elsewhere.
pub(crate) fn message(
    family: NetfilterProtoFamily,
    flags: u16,
    resource: u16,
    inner: NetfilterMessageInner,
) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let payload = NetfilterMessage::new(NetfilterHeader::new(family, 0, resource), inner);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(payload));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    // Messages are aligned to 4 bytes.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}
