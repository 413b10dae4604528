//! Notices drift: that others may have changed what is ours.
//!
//! The kernel notifies of every change of links, addresses, routes, rules and nftables objects, which include
//! iptables rules in nf_tables mode. Notifications of our own changes, and of what is none of our business, are ignored.
//! Legacy iptables and ipset notify of nothing: damage there is found when the state is read back.
//!
//! How nodes are reached is noticed here, too, and by which link-layer addresses.

use std::future::pending;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use futures::FutureExt;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{SockFilter, SockRef};
use tokio::task::unconstrained;
use tokio::time::Instant;
use tracing::warn;

use crate::kernel::backend::Watched;
use crate::kernel::iptables::forward::{ACCEPT, BASE, FILTER};
use crate::kernel::neighbours;
use crate::kernel::netlink::{Message, NetlinkError, OwnPorts, messages};
use crate::kernel::ours::{PROTOCOL_NUMBER, Ranges};
use crate::kernel::reach::{self, Lookup};
use crate::kernel::routes::{concerns_route, concerns_rule};

/// Links, neighbours, addresses, routes and rules, of both families.
const ROUTE_GROUPS: [u32; 8] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_NEIGH,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV4_RULE,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV6_RULE,
];
const NFTABLES_GROUP: u32 = libc::NFNLGRP_NFTABLES.cast_unsigned();
/// Attributes of nf_tables.h: the first one of every object names its table, then each kind has its own.
const TABLE_OF_OBJECT: u16 = 1;
const CHAIN_OF_RULE: u16 = 2;
const NAME_OF_CHAIN: u16 = 3;
/// A program makes several changes at once: wait for the rest of them.
const SETTLE: Duration = Duration::from_millis(20);
/// Between two reports, so that a program that changes things all the time does not make us read all the time.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(500);
/// Between two tries to open a socket; as long as there is none, everything is drift.
const REOPEN_INTERVAL: Duration = Duration::from_secs(5);
/// Room for what a program tells in one transaction: about 20,000 rules. The kernel takes it only as it is needed.
const RECEIVE_BYTES: usize = 4 * 1024 * 1024;

/// Instructions of classic BPF (filter.h): load a byte, load two, compare, return.
const LOAD_1: u16 = 0x30;
const LOAD_2: u16 = 0x28;
const EQUALS: u16 = 0x15;
const AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
const EVERYTHING: u32 = u32::MAX;
/// Where a message has its type (`struct nlmsghdr`), and a route its table and protocol (`struct rtmsg`).
const TYPE_AT: u32 = 4;
const TABLE_AT: u32 = 16 + 4;
const PROTOCOL_AT: u32 = 16 + 5;

/// `RTPROT_DHCP` of rtnetlink.h. Before the first routing daemon come the kernel, router advertisements and administrators.
const RTPROT_DHCP: u8 = 16;
const FIRST_DAEMON: u32 = 10;

/// How sure it is that others have changed what is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Drift {
    /// It may be so, or something that the plan depends on has changed.
    Possible,
    Certain,
}

pub(crate) struct DriftListener {
    sockets: Sockets,
    filter: Filter,
    /// Since when something is heard that is not reported yet.
    heard: Option<(Instant, Drift)>,
    reported: Option<Instant>,
}

impl std::fmt::Debug for DriftListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DriftListener")
            .field("filter", &self.filter)
            .finish_non_exhaustive()
    }
}

/// `None` for one that has failed, until it is opened again: it would fail at once, over and over.
struct Sockets {
    routes: Option<TokioSocket>,
    netfilter: Option<TokioSocket>,
    last_try: Instant,
}

/// Which notifications matter.
#[derive(Debug)]
struct Filter {
    own_ports: OwnPorts,
    ranges: Ranges,
    watched: Watched,
    lookup: Lookup,
    /// Whether our chain in iptables' FORWARD may be there.
    forward: bool,
}

/// What the kernel does not even put into the buffer: routes of routing daemons outside of our range, of which a router changes
/// thousands a second. Tables beyond 255 have all the same number here. A notification of routing is one message.
fn routes_filter() -> [SockFilter; 11] {
    // The compared number is in network byte order to the filter, and in the host's to the kernel.
    let kind = |kind: u16| u32::from(u16::from_be_bytes(kind.to_ne_bytes()));
    let (new, old) = (kind(libc::RTM_NEWROUTE), kind(libc::RTM_DELROUTE));
    let large = u32::from(libc::RT_TABLE_COMPAT);
    // The middle numbers: how many instructions are jumped over when equal, and when not.
    [
        SockFilter::new(LOAD_2, 0, 0, TYPE_AT),
        SockFilter::new(EQUALS, 1, 0, new),
        SockFilter::new(EQUALS, 0, 7, old),
        SockFilter::new(LOAD_1, 0, 0, TABLE_AT),
        SockFilter::new(EQUALS, 5, 0, large),
        SockFilter::new(LOAD_1, 0, 0, PROTOCOL_AT),
        SockFilter::new(EQUALS, 3, 0, u32::from(PROTOCOL_NUMBER)),
        SockFilter::new(EQUALS, 2, 0, u32::from(RTPROT_DHCP)),
        SockFilter::new(AT_LEAST, 0, 1, FIRST_DAEMON),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, EVERYTHING),
    ]
}

fn listen(protocol: isize, groups: &[u32]) -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(protocol)?;
    setsockopt(socket.socket_ref(), sockopt::RcvBufForce, &RECEIVE_BYTES)?;
    socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
    for group in groups {
        socket.socket_mut().add_membership(*group)?;
    }
    Ok(socket)
}

impl Sockets {
    fn open(ranges: &Ranges) -> io::Result<Sockets> {
        let mut sockets = Sockets {
            routes: None,
            netfilter: None,
            last_try: Instant::now(),
        };
        sockets.reopen(ranges)?;
        Ok(sockets)
    }

    /// Opens those that have failed.
    fn reopen(&mut self, ranges: &Ranges) -> io::Result<()> {
        self.last_try = Instant::now();
        if self.routes.is_none() {
            let socket = listen(NETLINK_ROUTE, &ROUTE_GROUPS)?;
            // Numbers below are visible to the filter, and may be ours.
            if ranges.table_offset > u32::from(u8::MAX) {
                SockRef::from(socket.socket_ref()).attach_filter(&routes_filter())?;
            }
            self.routes = Some(socket);
        }
        if self.netfilter.is_none() {
            self.netfilter = Some(listen(NETLINK_NETFILTER, &[NFTABLES_GROUP])?);
        }
        Ok(())
    }

    fn are_open(&self) -> bool {
        self.routes.is_some() && self.netfilter.is_some()
    }

    /// Whether everything is heard that the kernel has told of until now.
    fn are_empty(&self) -> bool {
        let sockets = [&self.routes, &self.netfilter].into_iter().flatten();
        let asked = sockets.map(|s| PollFd::new(s.socket_ref().as_fd(), PollFlags::POLLIN));
        let mut asked: Vec<PollFd<'_>> = asked.collect();
        // Not by trying to receive: that would take away the word of an overrun.
        poll(&mut asked, PollTimeout::ZERO) == Ok(0)
    }

    /// The next notifications, and whether they are of routing.
    async fn receive(&mut self) -> (io::Result<Vec<u8>>, bool) {
        let (received, of_routes) = tokio::select! {
            received = receive(&self.routes) => (received, true),
            received = receive(&self.netfilter) => (received, false),
        };
        // An overrun is told once, and the socket goes on.
        if received
            .as_ref()
            .is_err_and(|error| error.raw_os_error() != Some(libc::ENOBUFS))
        {
            let failed = match of_routes {
                true => &mut self.routes,
                false => &mut self.netfilter,
            };
            *failed = None;
        }
        (received, of_routes)
    }
}

async fn receive(socket: &Option<TokioSocket>) -> io::Result<Vec<u8>> {
    match socket {
        Some(socket) => Ok(socket.recv_from_full().await?.0),
        None => pending().await,
    }
}

impl DriftListener {
    pub(crate) fn open(
        own_ports: OwnPorts,
        ranges: Ranges,
        watched: Watched,
        lookup: Lookup,
        forward: bool,
    ) -> Result<DriftListener, NetlinkError> {
        Ok(DriftListener {
            sockets: Sockets::open(&ranges).map_err(NetlinkError::Socket)?,
            filter: Filter {
                own_ports,
                ranges,
                watched,
                lookup,
                forward,
            },
            heard: None,
            reported: None,
        })
    }

    /// Waits until others may have changed what is ours. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Drift {
        let (since, _) = loop {
            if let Some(heard) = self.heard {
                break heard;
            }
            match self.sockets.are_open() {
                true => self.hear().await,
                false => self.reopen().await,
            }
        };
        let earliest = self.reported.map_or(since, |last| last + SHORTEST_INTERVAL);
        tokio::time::sleep_until(earliest.max(since + SETTLE)).await;
        // What was heard until now is one report.
        while unconstrained(self.hear()).now_or_never().is_some() {}
        self.reported = Some(Instant::now());
        let heard = self.heard.take();
        heard.map_or(Drift::Possible, |(_, drift)| drift)
    }

    fn note(&mut self, drift: Drift) {
        let now = Instant::now();
        let (since, known) = self.heard.unwrap_or((now, drift));
        self.heard = Some((since, known.max(drift)));
    }

    /// Opens sockets that have failed. What was told meanwhile nobody heard.
    async fn reopen(&mut self) {
        tokio::time::sleep_until(self.sockets.last_try + REOPEN_INTERVAL).await;
        if let Err(error) = self.sockets.reopen(&self.filter.ranges) {
            warn!("cannot listen for changes of others, trying again: {error}");
        }
        self.note(Drift::Possible);
    }

    /// Takes the next notifications, and notes what matters of them.
    async fn hear(&mut self) {
        if self.sockets.are_empty() {
            self.filter.own_ports.all_heard();
        }
        let (received, of_routes) = self.sockets.receive().await;
        // The receive buffer overflowed, or what came is nonsense: it may have been about us.
        let Ok(bytes) = received else {
            return self.note(Drift::Possible);
        };
        let Ok(messages) = messages(&bytes) else {
            return self.note(Drift::Possible);
        };
        for message in messages {
            if self.filter.own_ports.contains(message.port) {
                continue;
            }
            let drift = match of_routes {
                true => self.filter.of_routes(message),
                false => self.filter.of_firewall(message),
            };
            if let Some(drift) = drift {
                self.note(drift);
            }
        }
    }
}

impl Filter {
    fn of_routes(&self, message: Message<'_>) -> Option<Drift> {
        let possible = |matters: bool| matters.then_some(Drift::Possible);
        match message.kind {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => {
                possible(self.lookup.interfaces.hears_of_link(message))
            }
            libc::RTM_NEWADDR | libc::RTM_DELADDR => {
                possible(self.lookup.interfaces.hears_of_address(message))
            }
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
                let moves_a_node = || {
                    let net = reach::changed_by(&message);
                    net.is_some_and(|net| self.lookup.addresses.any_in(net))
                };
                match concerns_route(message, &self.ranges) {
                    true => Some(Drift::Certain),
                    false => possible(moves_a_node()),
                }
            }
            libc::RTM_NEWRULE | libc::RTM_DELRULE => {
                let is_ours = concerns_rule(message, &self.ranges)?;
                Some(if is_ours {
                    Drift::Certain
                } else {
                    Drift::Possible
                })
            }
            // Nodes' alone, and not that they were heard of again.
            libc::RTM_NEWNEIGH => {
                let neighbour = neighbours::neighbour(message)?;
                possible(self.lookup.neighbours.take(neighbour))
            }
            _ => None,
        }
    }

    fn of_firewall(&self, message: Message<'_>) -> Option<Drift> {
        let text = |wanted: u16| {
            let value = message.attribute(wanted)?;
            let end = value.iter().position(|byte| *byte == 0)?;
            std::str::from_utf8(value.get(..end)?).ok()
        };
        // The upper byte is the subsystem, the lower one the message.
        let kind = i32::from(message.kind) - (libc::NFNL_SUBSYS_NFTABLES << 8);
        let chain = match kind {
            libc::NFT_MSG_NEWCHAIN..=libc::NFT_MSG_DELCHAIN => text(NAME_OF_CHAIN),
            libc::NFT_MSG_NEWRULE..=libc::NFT_MSG_DELRULE => text(CHAIN_OF_RULE),
            _ => None,
        };
        let table = text(TABLE_OF_OBJECT)?;
        if self.forward && table == FILTER {
            match chain {
                Some(ACCEPT) => return Some(Drift::Certain),
                Some(BASE) => return Some(Drift::Possible),
                _ => {}
            }
        }
        let Watched {
            tables,
            chains,
            base_chains,
        } = self.watched;
        if !tables.contains(&table) {
            return None;
        }
        let Some(is_ours) = chains else {
            return Some(Drift::Certain);
        };
        match (kind, chain) {
            (libc::NFT_MSG_NEWTABLE..=libc::NFT_MSG_DELTABLE, _) => Some(Drift::Possible),
            (_, Some(chain)) if is_ours(chain) => Some(Drift::Certain),
            (_, Some(chain)) if base_chains.contains(&chain) => Some(Drift::Possible),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn a_socket_that_has_failed_is_opened_again_and_what_was_missed_is_looked_for() {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "needs root");
            println!("skipped: needs root");
            return;
        }
        let test = async {
            let watched = Watched {
                tables: &["metaleg"],
                chains: None,
                base_chains: &[],
            };
            let ports = OwnPorts::default();
            let (ranges, lookup) = (Ranges::DEFAULT, Lookup::default());
            let mut listener = DriftListener::open(ports, ranges, watched, lookup, false).unwrap();
            for _ in 0..3 {
                listener.sockets.routes = None;
                let started = Instant::now();
                assert_eq!(listener.next().await, Drift::Possible);
                assert!(listener.sockets.are_open());
                assert!(
                    started.elapsed() >= REOPEN_INTERVAL,
                    "at once, over and over"
                );
            }
            let more = tokio::time::timeout(REOPEN_INTERVAL * 2, listener.next()).await;
            assert!(more.is_err(), "{more:?}");
        };
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .start_paused(true)
                .build();
            runtime.unwrap().block_on(test);
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
}
