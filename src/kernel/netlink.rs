//! A netlink socket to netfilter: nftables and connection tracking, without a process.
//!
//! Blocking, because the kernel answers before `send` returns; what may take long runs in a thread of its own.

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};

/// A dump message of the kernel is at most 32 KiB.
const RECEIVE_BYTES: usize = 64 * 1024;
/// Room for a transaction of 100,000 set elements, of about 60 bytes each.
const SEND_BYTES: usize = 8 * 1024 * 1024;
/// How often a dump that a change of others interrupted is tried again.
const DUMP_TRIES: u32 = 20;
const EINTR: i32 = 4;
const EAGAIN: i32 = 11;
/// `MSG_DONTWAIT` of socket.h.
const DONT_WAIT: i32 = 0x40;

/// What can go wrong when speaking to netfilter.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket, or the kernel refused.
    #[error("netfilter refused: {0}")]
    Refused(#[from] std::io::Error),
    /// An answer that is none.
    #[error("netfilter answered nonsense: {0}")]
    Decode(String),
    /// Other programs change netfilter faster than it can be read.
    #[error("netfilter changed {DUMP_TRIES} times while it was read")]
    Unsteady,
}

impl NetlinkError {
    /// Whether the object asked for does not exist.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, NetlinkError::Refused(error) if error.kind() == std::io::ErrorKind::NotFound)
    }
}

/// What netfilter answers.
pub(crate) type Answer = NetlinkMessage<NetfilterMessage>;

/// A socket to netfilter in the network namespace of the thread that opened it.
pub(crate) struct Netfilter {
    socket: Socket,
}

impl std::fmt::Debug for Netfilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Netfilter").finish_non_exhaustive()
    }
}

impl Netfilter {
    /// Opens the socket.
    pub(crate) fn open() -> Result<Netfilter, NetlinkError> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        // A transaction must go out in one piece, whatever the default is. Without CAP_NET_ADMIN nothing here
        // works anyway.
        setsockopt(&socket, sockopt::SndBufForce, &SEND_BYTES).map_err(std::io::Error::from)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Netfilter { socket })
    }

    /// Sends whole messages.
    pub(crate) fn send(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        Ok(self.socket.send(bytes, 0).map(drop)?)
    }

    /// Waits for the next answers.
    pub(crate) fn receive(&self) -> Result<Vec<Answer>, NetlinkError> {
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        self.socket.recv(&mut buffer, 0)?;
        parse(&buffer)
    }

    /// Sends a transaction, and returns the first failure that the kernel reports; none: it is in force.
    pub(crate) fn commit(&self, batch: &[u8]) -> Result<(), NetlinkError> {
        self.send(batch)?;
        let mut result = Ok(());
        loop {
            let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
            match self.socket.recv(&mut buffer, DONT_WAIT) {
                Ok(_) => {}
                // All answers are there when `send` returns.
                Err(error) if error.raw_os_error() == Some(EAGAIN) => return result,
                Err(error) => return Err(error.into()),
            }
            for answer in parse(&buffer)? {
                if let NetlinkPayload::Error(error) = answer.payload
                    && error.code.is_some()
                    && result.is_ok()
                {
                    result = Err(error.to_io().into());
                }
            }
        }
    }

    /// Asks for everything that `question` describes, and hands each answer to `take`; once more from the
    /// start, with a new `T`, when somebody changed netfilter in the meantime.
    pub(crate) fn dump<T: Default>(
        &self,
        family: NetfilterProtoFamily,
        question: &NetfilterMessageInner,
        take: impl Fn(&mut T, NetfilterMessageInner),
    ) -> Result<T, NetlinkError> {
        for _ in 0..DUMP_TRIES {
            self.send(&message(family, NLM_F_DUMP, 0, question.clone()))?;
            let mut all = T::default();
            if self.dumped(&mut all, &take)? {
                return Ok(all);
            }
        }
        Err(NetlinkError::Unsteady)
    }

    /// Takes the answers of a dump; `false` when it is not consistent.
    fn dumped<T>(
        &self,
        all: &mut T,
        take: &impl Fn(&mut T, NetfilterMessageInner),
    ) -> Result<bool, NetlinkError> {
        let mut consistent = true;
        loop {
            for answer in self.receive()? {
                consistent &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(consistent),
                    NetlinkPayload::Error(error) => {
                        let error = error.to_io();
                        if error.raw_os_error() == Some(EINTR) {
                            return Ok(false);
                        }
                        return Err(error.into());
                    }
                    NetlinkPayload::InnerMessage(message) => take(all, message.inner),
                    _ => {}
                }
            }
        }
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

fn parse(buffer: &[u8]) -> Result<Vec<Answer>, NetlinkError> {
    let mut messages = Vec::new();
    let mut rest = buffer;
    while !rest.is_empty() {
        let message =
            Answer::deserialize(rest).map_err(|error| NetlinkError::Decode(error.to_string()))?;
        let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
        let aligned = length.checked_next_multiple_of(4).unwrap_or(length).max(4);
        rest = rest.get(aligned..).unwrap_or_default();
        messages.push(message);
    }
    Ok(messages)
}
