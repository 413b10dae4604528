//! A netlink socket to netfilter: nftables and connection tracking, without a process.
//!
//! Blocking, because the kernel answers before `send` returns; what may take long runs in a thread of its own.

use netlink_packet_core::{
    DecodeError, ErrorBuffer, ErrorMessage, NLA_TYPE_MASK, NLM_F_DUMP, NLM_F_DUMP_INTR,
    NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, Parseable,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::libc::{EAGAIN, EINTR, MSG_DONTWAIT};
use nix::sys::socket::{setsockopt, sockopt};

/// A dump message of the kernel is at most 32 KiB.
const RECEIVE_BYTES: usize = 64 * 1024;
/// Room for a transaction of 100,000 set elements, of about 60 bytes each.
const SEND_BYTES: usize = 8 * 1024 * 1024;
/// Room for the answers to some hundred requests, of about 1 KiB each in the kernel's memory.
const ANSWER_BYTES: usize = 1024 * 1024;
/// How often a dump is tried when changes of others interrupt it.
const DUMP_TRIES: u32 = 20;

#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket, or the kernel refused.
    #[error("netfilter refused")]
    Refused(#[from] std::io::Error),
    #[error("netfilter answered nonsense")]
    Decode(#[from] DecodeError),
    #[error("netfilter changed {DUMP_TRIES} times while it was read")]
    Unsteady,
}

impl NetlinkError {
    /// Whether the object asked for does not exist.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, NetlinkError::Refused(error) if error.kind() == std::io::ErrorKind::NotFound)
    }
}

/// A message of netfilter, decoded only as far as needed: to decode every expression of every rule takes seconds where
/// thousands of elements are read, and fails on attributes of a newer kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    /// Everything after the netlink header.
    pub(crate) payload: &'a [u8],
    /// Subsystem and type.
    pub(crate) kind: u16,
    flags: u16,
    /// The port of the socket whose request caused it.
    pub(crate) port: u32,
}

impl<'a> Message<'a> {
    /// The attributes: type and value.
    pub(crate) fn attributes(&self) -> impl Iterator<Item = (u16, &'a [u8])> {
        // Family, version and resource come first.
        attributes(self.payload.get(4..).unwrap_or_default())
    }

    /// The value of the first attribute of a type.
    pub(crate) fn attribute(&self, wanted: u16) -> Option<&'a [u8]> {
        attribute(self.payload.get(4..)?, wanted)
    }

    /// What an answer to a request says: done, or why not. `None` for other messages.
    pub(crate) fn acknowledges(&self) -> Option<Result<(), std::io::Error>> {
        if self.kind != NLMSG_ERROR {
            return None;
        }
        let error =
            ErrorBuffer::new_checked(&self.payload).and_then(|buffer| ErrorMessage::parse(&buffer));
        Some(match error {
            Ok(error) if error.code.is_none() => Ok(()),
            Ok(error) => Err(error.to_io()),
            Err(error) => Err(std::io::Error::other(error)),
        })
    }
}

/// Attributes one after the other: type without flags, and value.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [l0, l1, k0, k1, ..] = *bytes else {
            return None;
        };
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = bytes.get(4..length)?;
        // Aligned to 4 bytes.
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & NLA_TYPE_MASK, value))
    })
}

/// The value of the first attribute of a type.
pub(crate) fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut attributes = attributes(bytes);
    Some(attributes.find(|(kind, _)| *kind == wanted)?.1)
}

/// The messages in a buffer that the kernel filled.
pub(crate) fn messages(buffer: &[u8]) -> Result<Vec<Message<'_>>, NetlinkError> {
    let mut messages = Vec::new();
    let mut rest = buffer;
    while !rest.is_empty() {
        let message = NetlinkBuffer::new_checked(rest)?;
        messages.push(Message {
            payload: message.payload(),
            kind: message.message_type(),
            flags: message.flags(),
            port: message.port_number(),
        });
        let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
        let aligned = length.checked_next_multiple_of(4).unwrap_or(length).max(4);
        rest = rest.get(aligned..).unwrap_or_default();
    }
    Ok(messages)
}

/// A socket to netfilter in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Netfilter {
    socket: Socket,
    /// Notifications of a change carry the port of the socket that asked for it.
    pub(crate) port: u32,
}

impl Netfilter {
    pub(crate) fn open() -> Result<Netfilter, NetlinkError> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        // A transaction must go out in one piece, whatever the default is. Without CAP_NET_ADMIN nothing here
        // works anyway.
        setsockopt(&socket, sockopt::SndBufForce, &SEND_BYTES).map_err(std::io::Error::from)?;
        setsockopt(&socket, sockopt::RcvBufForce, &ANSWER_BYTES).map_err(std::io::Error::from)?;
        let port = socket.bind_auto()?.port_number();
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Netfilter { socket, port })
    }

    pub(crate) fn send(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        Ok(self.socket.send(bytes, 0).map(drop)?)
    }

    /// Waits for the next messages.
    pub(crate) fn receive<T>(
        &self,
        take: impl FnOnce(Vec<Message<'_>>) -> Result<T, NetlinkError>,
    ) -> Result<T, NetlinkError> {
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        self.socket.recv(&mut buffer, 0)?;
        take(messages(&buffer)?)
    }

    /// Sends a transaction. Returns the first failure that the kernel reports; without one it is in force.
    pub(crate) fn commit(&self, batch: &[u8]) -> Result<(), NetlinkError> {
        self.send(batch)?;
        let mut result = Ok(());
        loop {
            let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
            match self.socket.recv(&mut buffer, MSG_DONTWAIT) {
                Ok(_) => {}
                // All answers are there when `send` returns.
                Err(error) if error.raw_os_error() == Some(EAGAIN) => return result,
                Err(error) => return Err(error.into()),
            }
            for answer in messages(&buffer)? {
                if let (Ok(()), Some(Err(error))) = (&result, answer.acknowledges()) {
                    result = Err(error.into());
                }
            }
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
        for _ in 0..DUMP_TRIES {
            self.send(&message(family, NLM_F_DUMP, 0, question.clone()))?;
            let mut all = T::default();
            let mut interrupted = false;
            loop {
                match self.receive(|messages| part(messages, &mut all, &mut interrupted, &take))? {
                    Part::More => {}
                    Part::Complete => return Ok(all),
                    Part::Interrupted => break,
                }
            }
        }
        Err(NetlinkError::Unsteady)
    }
}

/// How far a dump has come.
enum Part {
    More,
    Complete,
    Interrupted,
}

fn part<T>(
    messages: Vec<Message<'_>>,
    all: &mut T,
    // The kernel sets the flag once, in whichever part comes next.
    interrupted: &mut bool,
    take: &impl Fn(&mut T, Message<'_>) -> Result<(), NetlinkError>,
) -> Result<Part, NetlinkError> {
    for message in messages {
        *interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
        if message.kind == NLMSG_DONE {
            return Ok(if *interrupted {
                Part::Interrupted
            } else {
                Part::Complete
            });
        }
        match message.acknowledges() {
            Some(Err(error)) if error.raw_os_error() == Some(EINTR) => {
                return Ok(Part::Interrupted);
            }
            Some(Err(error)) => return Err(error.into()),
            Some(Ok(())) => {}
            None => take(all, message)?,
        }
    }
    Ok(Part::More)
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
