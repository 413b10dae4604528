//! Notices drift: that others may have changed what is ours.
//!
//! The kernel notifies of every change of links, addresses, routes, rules and nftables objects, which include
//! iptables rules in nf_tables mode. Notifications of our own changes, and of what is none of our business, are ignored.
//! Legacy iptables and ipset notify of nothing: damage there is found when the state is read back.

use std::time::Duration;

use futures::FutureExt;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use nix::libc;
use tokio::time::Instant;

use crate::kernel::backend::Watched;
use crate::kernel::interfaces::WatchedInterfaces;
use crate::kernel::iptables::forward::{ACCEPT, BASE, FILTER};
use crate::kernel::netfilter::{Message, NetlinkError, attribute, attributes, messages};
use crate::kernel::ours::{PROTOCOL_NUMBER, Ranges};
use crate::state::TableId;

/// Links, addresses, routes and rules, of both families.
const ROUTE_GROUPS: [u32; 7] = [
    libc::RTNLGRP_LINK,
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

pub(crate) struct DriftListener {
    routes: TokioSocket,
    netfilter: TokioSocket,
    filter: Filter,
    /// Since when something is heard that is not reported yet.
    heard: Option<Instant>,
    reported: Option<Instant>,
}

impl std::fmt::Debug for DriftListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DriftListener")
            .field("filter", &self.filter)
            .finish_non_exhaustive()
    }
}

/// Which notifications matter.
#[derive(Debug)]
struct Filter {
    /// The sockets of our own changes.
    own_ports: Vec<u32>,
    ranges: Ranges,
    watched: Watched,
    interfaces: WatchedInterfaces,
    /// Whether our chain in iptables' FORWARD may be there.
    forward: bool,
}

fn listen(protocol: isize, groups: &[u32]) -> Result<TokioSocket, NetlinkError> {
    let mut socket = TokioSocket::new(protocol)?;
    socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
    for group in groups {
        socket.socket_mut().add_membership(*group)?;
    }
    Ok(socket)
}

impl DriftListener {
    pub(crate) fn open(
        own_ports: Vec<u32>,
        ranges: Ranges,
        watched: Watched,
        interfaces: WatchedInterfaces,
        forward: bool,
    ) -> Result<DriftListener, NetlinkError> {
        Ok(DriftListener {
            routes: listen(NETLINK_ROUTE, &ROUTE_GROUPS)?,
            netfilter: listen(NETLINK_NETFILTER, &[NFTABLES_GROUP])?,
            filter: Filter {
                own_ports,
                ranges,
                watched,
                interfaces,
                forward,
            },
            heard: None,
            reported: None,
        })
    }

    /// Waits until others may have changed what is ours. Cancel-safe.
    pub(crate) async fn next(&mut self) {
        let heard = loop {
            if let Some(heard) = self.heard {
                break heard;
            }
            if self.hear().await {
                self.heard = Some(Instant::now());
            }
        };
        let earliest = self.reported.map_or(heard, |last| last + SHORTEST_INTERVAL);
        tokio::time::sleep_until(earliest.max(heard + SETTLE)).await;
        // What was heard until now is one report.
        while self.hear().now_or_never().is_some() {}
        self.heard = None;
        self.reported = Some(Instant::now());
    }

    /// Takes the next notification; returns whether it matters.
    async fn hear(&mut self) -> bool {
        let (heard, of_routes) = tokio::select! {
            heard = self.routes.recv_from_full() => (heard, true),
            heard = self.netfilter.recv_from_full() => (heard, false),
        };
        // The receive buffer overflowed, or what came is nonsense: it may have been about us.
        let Ok((bytes, _)) = heard else { return true };
        let Ok(messages) = messages(&bytes) else {
            return true;
        };
        let mut others = messages
            .into_iter()
            .filter(|m| !self.filter.own_ports.contains(&m.port));
        others.any(|message| {
            if of_routes {
                self.filter.is_of_routes(message)
            } else {
                self.filter.is_of_firewall(message)
            }
        })
    }
}

impl Filter {
    fn is_of_routes(&self, message: Message<'_>) -> bool {
        match message.kind {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => message
                .number_at(4)
                .is_some_and(|index| self.interfaces.contains(index)),
            // Every pod's interface has a link-local address.
            libc::RTM_NEWADDR | libc::RTM_DELADDR => {
                !attributes(message.tail(8)).any(|(_, value)| is_link_local(value))
            }
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
                let table = attribute(message.tail(12), libc::RTA_TABLE);
                let table = table.and_then(|value| <[u8; 4]>::try_from(value).ok());
                let table = table.map(|table| TableId(u32::from_ne_bytes(table)));
                table.is_some_and(|table| self.ranges.has_table(table))
                    || message.byte_at(5) == Some(PROTOCOL_NUMBER)
            }
            libc::RTM_NEWRULE | libc::RTM_DELRULE => true,
            _ => false,
        }
    }

    fn is_of_firewall(&self, message: Message<'_>) -> bool {
        let text = |wanted: u16| {
            let value = message.attribute(wanted)?;
            let end = value.iter().position(|byte| *byte == 0)?;
            std::str::from_utf8(value.get(..end)?).ok()
        };
        if self.forward && text(TABLE_OF_OBJECT) == Some(FILTER) {
            let is_of_forward = |chain: &str| [BASE, ACCEPT].contains(&chain);
            // A rule names its chain, and a chain itself: in the other one's attribute there is no text.
            let mut names = [CHAIN_OF_RULE, NAME_OF_CHAIN].into_iter().filter_map(text);
            if names.any(is_of_forward) {
                return true;
            }
        }
        let Watched { tables, chains } = self.watched;
        if !text(TABLE_OF_OBJECT).is_some_and(|table| tables.contains(&table)) {
            return false;
        }
        let Some(is_ours) = chains else { return true };
        // The upper byte is the subsystem, the lower one the message.
        match i32::from(message.kind) - (libc::NFNL_SUBSYS_NFTABLES << 8) {
            libc::NFT_MSG_NEWTABLE..=libc::NFT_MSG_DELTABLE => true,
            libc::NFT_MSG_NEWCHAIN..=libc::NFT_MSG_DELCHAIN => {
                text(NAME_OF_CHAIN).is_some_and(is_ours)
            }
            libc::NFT_MSG_NEWRULE..=libc::NFT_MSG_DELRULE => {
                text(CHAIN_OF_RULE).is_some_and(is_ours)
            }
            _ => false,
        }
    }
}

fn is_link_local(value: &[u8]) -> bool {
    match value {
        [0xfe, second, ..] => value.len() == 16 && second & 0xc0 == 0x80,
        _ => false,
    }
}

impl Message<'_> {
    fn byte_at(&self, at: usize) -> Option<u8> {
        self.payload.get(at).copied()
    }

    fn number_at(&self, at: usize) -> Option<u32> {
        let bytes = self.payload.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_ne_bytes(*bytes))
    }

    /// What comes after a header of this length: attributes.
    fn tail(&self, header: usize) -> &[u8] {
        self.payload.get(header..).unwrap_or_default()
    }
}
