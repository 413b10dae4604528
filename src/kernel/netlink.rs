//! A netlink socket: requests, answers, and dumps that are complete or an error.
//!
//! Blocking, because the kernel answers before `send` returns, and goes on with a dump inside of each `recv`; what may
//! take long runs in a thread of its own.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netlink_packet_core::{
    DecodeError, DoneBuffer, ErrorBuffer, ErrorMessage, NLA_TYPE_MASK, NLM_F_DUMP_INTR, NLMSG_DONE,
    NLMSG_ERROR, NetlinkBuffer, Parseable,
};
use netlink_sys::{Socket, SocketAddr};
use nix::libc::{EAGAIN, EINTR, EINVAL, EOPNOTSUPP, MSG_DONTWAIT};
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
    /// No socket, or one that cannot be used any more.
    #[error("cannot talk to the kernel")]
    Socket(#[source] io::Error),
    #[error("the kernel refused")]
    Refused(#[from] io::Error),
    #[error("the kernel answered nonsense")]
    Decode(#[from] DecodeError),
    #[error("it changed {DUMP_TRIES} times while it was read")]
    Unsteady,
    #[error("reading was cut off")]
    CutOff(#[from] tokio::task::JoinError),
}

impl NetlinkError {
    /// What the kernel said, if it did.
    pub(crate) fn code(&self) -> Option<i32> {
        match self {
            NetlinkError::Refused(error) => error.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the object asked for does not exist.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, NetlinkError::Refused(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Whether the kernel cannot do what was asked for: it has no nf_tables, or not in this family.
    pub(crate) fn is_unsupported(&self) -> bool {
        matches!(self.code(), Some(EINVAL | EOPNOTSUPP))
    }
}

/// A message, decoded only as far as needed: to decode all of it takes seconds where thousands of objects are read, and
/// fails on attributes of a newer kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    /// Everything after the netlink header.
    pub(crate) payload: &'a [u8],
    /// What it is; in netfilter, the subsystem and what it is there.
    pub(crate) kind: u16,
    flags: u16,
    /// The port of the socket whose request caused it.
    pub(crate) port: u32,
}

impl<'a> Message<'a> {
    /// What an answer to a request says: done, or why not. `None` for other messages.
    pub(crate) fn acknowledges(&self) -> Option<Result<(), io::Error>> {
        if self.kind != NLMSG_ERROR {
            return None;
        }
        let error =
            ErrorBuffer::new_checked(&self.payload).and_then(|buffer| ErrorMessage::parse(&buffer));
        Some(match error {
            Ok(error) if error.code.is_none() => Ok(()),
            Ok(error) => Err(error.to_io()),
            Err(error) => Err(io::Error::other(error)),
        })
    }

    /// How a dump ended. `None` for other messages.
    fn ends(&self) -> Option<Result<(), io::Error>> {
        if self.kind != NLMSG_DONE {
            return None;
        }
        // What cuts a dump short is told here and nowhere else.
        let code = DoneBuffer::new_checked(self.payload).map_or(0, |done| done.code());
        Some(match code {
            0.. => Ok(()),
            code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        })
    }

    /// A byte of the fixed header.
    pub(crate) fn byte_at(&self, at: usize) -> Option<u8> {
        self.payload.get(at).copied()
    }

    /// A number of the fixed header, in the host's byte order.
    pub(crate) fn number_at(&self, at: usize) -> Option<u32> {
        let bytes = self.payload.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_ne_bytes(*bytes))
    }

    /// The attributes after a fixed header of this length.
    pub(crate) fn tail(&self, header: usize) -> &'a [u8] {
        self.payload.get(header..).unwrap_or_default()
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

/// An address of either family.
pub(crate) fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from);
    v4().or_else(v6)
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

/// Whether a dump has to be complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Care {
    /// It is repeated from the start, with a new `T`, when somebody changes meanwhile what is read.
    Exact,
    /// What changes meanwhile may be missed.
    Glance,
}

/// A socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: Socket,
    /// Notifications of a change carry the port of the socket that asked for it.
    pub(crate) port: u32,
}

impl Netlink {
    /// `NETLINK_ROUTE` or `NETLINK_NETFILTER`.
    pub(crate) fn open(protocol: isize) -> Result<Netlink, NetlinkError> {
        let open = || {
            let mut socket = Socket::new(protocol)?;
            // A transaction must go out in one piece, whatever the default is. Without CAP_NET_ADMIN nothing here
            // works anyway.
            setsockopt(&socket, sockopt::SndBufForce, &SEND_BYTES)?;
            setsockopt(&socket, sockopt::RcvBufForce, &ANSWER_BYTES)?;
            // Kernels before 4.20 have no filters of dumps: whoever asks for a part looks for it himself, too.
            let _ = socket.set_netlink_get_strict_chk(true);
            let port = socket.bind_auto()?.port_number();
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(Netlink { socket, port })
        };
        open().map_err(NetlinkError::Socket)
    }

    pub(crate) fn send(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        let sent = self.socket.send(bytes, 0);
        sent.map(drop).map_err(NetlinkError::Socket)
    }

    /// Waits for the next messages.
    pub(crate) fn receive<T>(
        &self,
        take: impl FnOnce(Vec<Message<'_>>) -> Result<T, NetlinkError>,
    ) -> Result<T, NetlinkError> {
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        let received = self.socket.recv(&mut buffer, 0);
        received.map_err(NetlinkError::Socket)?;
        take(messages(&buffer)?)
    }

    /// Sends requests, of which at least one is to be acknowledged, and takes all answers. Returns the first failure that
    /// the kernel reports; without one everything is done.
    pub(crate) fn request(
        &self,
        requests: &[u8],
        mut take: impl FnMut(Message<'_>),
    ) -> Result<(), NetlinkError> {
        self.send(requests)?;
        let mut result = Ok(());
        loop {
            let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
            match self.socket.recv(&mut buffer, MSG_DONTWAIT) {
                Ok(_) => {}
                // All answers are there when `send` returns.
                Err(error) if error.raw_os_error() == Some(EAGAIN) => return result,
                Err(error) => return Err(NetlinkError::Socket(error)),
            }
            for answer in messages(&buffer)? {
                match answer.acknowledges() {
                    Some(Err(error)) if result.is_ok() => {
                        result = Err(NetlinkError::Refused(error));
                    }
                    Some(_) => {}
                    None => take(answer),
                }
            }
        }
    }

    /// Sends a request for a dump, and hands each message of it to `take`. After a failure the socket may hold the rest of
    /// it: open another one.
    pub(crate) fn dump<T: Default>(
        &self,
        request: &[u8],
        care: Care,
        take: impl Fn(&mut T, Message<'_>) -> Result<(), NetlinkError>,
    ) -> Result<T, NetlinkError> {
        for _ in 0..DUMP_TRIES {
            self.send(request)?;
            let mut all = T::default();
            let mut interrupted = false;
            loop {
                match self.receive(|messages| part(messages, &mut all, &mut interrupted, &take))? {
                    Part::More => {}
                    Part::Complete => return Ok(all),
                    Part::Interrupted if care == Care::Glance => return Ok(all),
                    Part::Interrupted => break,
                }
            }
        }
        Err(NetlinkError::Unsteady)
    }
}

/// How far a dump has come.
#[derive(Debug, PartialEq, Eq)]
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
        match message.ends().or_else(|| message.acknowledges()) {
            Some(Err(error)) if error.raw_os_error() == Some(EINTR) => {
                return Ok(Part::Interrupted);
            }
            Some(Err(error)) => return Err(NetlinkError::Refused(error)),
            Some(Ok(())) if message.kind == NLMSG_DONE => {
                return Ok(if *interrupted {
                    Part::Interrupted
                } else {
                    Part::Complete
                });
            }
            Some(Ok(())) => {}
            None => take(all, message)?,
        }
    }
    Ok(Part::More)
}

/// The ports from which this process makes changes: what the kernel tells of those is no drift. Shared between what makes
/// changes and what listens; cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct OwnPorts(Arc<Mutex<Ports>>);

#[derive(Debug, Default)]
struct Ports {
    /// Of sockets that are open.
    open: BTreeSet<u32>,
    /// Of sockets and tools that are gone, or will be when somebody listens again. Others may get the number next, so it
    /// counts only until everything that the kernel has told of is heard.
    passing: BTreeSet<u32>,
}

impl OwnPorts {
    fn ports(&self) -> MutexGuard<'_, Ports> {
        // Numbers come and go one by one: a panic elsewhere leaves no half of one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn opened(&self, port: u32) {
        self.ports().open.insert(port);
    }

    pub(crate) fn closed(&self, port: u32) {
        let mut ports = self.ports();
        ports.open.remove(&port);
        ports.passing.insert(port);
    }

    /// A tool was started. The kernel gives the first netlink socket of a process its number, unless another socket of the
    /// namespace has it: then its changes count as those of others.
    pub(crate) fn started(&self, process: u32) {
        self.ports().passing.insert(process);
    }

    pub(crate) fn contains(&self, port: u32) -> bool {
        let ports = self.ports();
        ports.open.contains(&port) || ports.passing.contains(&port)
    }

    /// Everything was heard that the kernel had to tell.
    pub(crate) fn all_heard(&self) {
        self.ports().passing.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, payload: &[u8]) -> Message<'_> {
        Message {
            payload,
            kind,
            flags,
            port: 0,
        }
    }

    fn read(messages: Vec<Message<'_>>) -> (Result<Part, Option<i32>>, Vec<u8>) {
        let (mut all, mut interrupted) = (Vec::new(), false);
        let take = |all: &mut Vec<u8>, message: Message<'_>| {
            all.extend_from_slice(message.payload);
            Ok(())
        };
        let part = part(messages, &mut all, &mut interrupted, &take);
        (part.map_err(|error| error.code()), all)
    }

    #[test]
    fn a_dump_is_complete_only_when_nothing_cut_it_short() {
        let [good, interrupted, refused] =
            [0, -EINTR, -nix::libc::ENOMEM].map(|code: i32| code.to_ne_bytes());
        let entry = || message(16, 0, &[1]);
        let end = |payload| message(NLMSG_DONE, 0, payload);
        assert_eq!(read(vec![entry()]), (Ok(Part::More), vec![1]));
        assert_eq!(
            read(vec![entry(), end(&good)]),
            (Ok(Part::Complete), vec![1])
        );
        for flagged in [
            vec![message(16, NLM_F_DUMP_INTR, &[1]), end(&good)],
            vec![entry(), message(NLMSG_DONE, NLM_F_DUMP_INTR, &good)],
            vec![entry(), end(&interrupted)],
        ] {
            assert_eq!(read(flagged), (Ok(Part::Interrupted), vec![1]));
        }
        let code = Err(Some(nix::libc::ENOMEM));
        assert_eq!(read(vec![entry(), end(&refused)]), (code, vec![1]));
    }

    #[test]
    fn the_port_of_a_tool_is_ours_until_everything_is_heard() {
        let ports = OwnPorts::default();
        ports.opened(1);
        ports.opened(2);
        ports.closed(2);
        ports.started(3);
        assert!([1, 2, 3].iter().all(|port| ports.contains(*port)));
        ports.all_heard();
        assert_eq!(
            [1, 2, 3].map(|port| ports.contains(port)),
            [true, false, false]
        );
    }
}
