//! Notices when others may have changed what is ours.
//!
//! The kernel tells of every change of links, addresses, routes, rules and nftables objects, which include
//! iptables rules in nf_tables mode. What it tells of ourselves, and of what is none of our business, is passed
//! over. Legacy iptables and ipset tell nothing: their damage is found when the state is read back.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use tokio::time::Instant;

use crate::kernel::netfilter::{Message, NetlinkError, attributes, messages};
use crate::kernel::nftables::TABLE;
use crate::kernel::routes::{PROTOCOL_NUMBER, Ranges};

/// `RTNLGRP_…` of rtnetlink.h: links, IPv4 addresses, routes and rules, and the same of IPv6.
const ROUTE_GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];
/// `NFNLGRP_NFTABLES` of nfnetlink.h.
const NFTABLES_GROUP: u32 = 7;
/// `RTM_…` of rtnetlink.h.
const NEW_LINK: u16 = 16;
const DEL_LINK: u16 = 17;
const NEW_ADDRESS: u16 = 20;
const DEL_ADDRESS: u16 = 21;
const NEW_ROUTE: u16 = 24;
const DEL_ROUTE: u16 = 25;
const NEW_RULE: u16 = 32;
const DEL_RULE: u16 = 33;
/// `RTA_TABLE` of rtnetlink.h.
const ROUTE_TABLE: u16 = 15;
/// `NFT_MSG_…RULE` of nf_tables.h, of the nftables subsystem (10).
const NFT_RULES: std::ops::RangeInclusive<u16> = 0x0a06..=0x0a08;
const NFT_TABLES: std::ops::RangeInclusive<u16> = 0x0a00..=0x0a02;
const NFT_CHAINS: std::ops::RangeInclusive<u16> = 0x0a03..=0x0a05;
/// One program's changes come together: wait for the rest of them.
const SETTLE: Duration = Duration::from_millis(20);
/// Who changes things all the time does not make us read all the time.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(500);

/// Interfaces whose state matters, by index: shared with what reads the interfaces.
pub(crate) type Devices = Arc<Mutex<BTreeSet<u32>>>;

/// Which of the firewall's objects are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watched {
    /// The nftables backend's table.
    OwnTable,
    /// The iptables backend's chains.
    IptablesChains,
}

/// Hears what the kernel tells.
pub(crate) struct DriftListener {
    routes: TokioSocket,
    netfilter: TokioSocket,
    filter: Filter,
    /// Something was heard and not yet told: since when.
    heard: Option<Instant>,
    told: Option<Instant>,
}

impl std::fmt::Debug for DriftListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DriftListener")
            .field("filter", &self.filter)
            .finish_non_exhaustive()
    }
}

/// What matters of what is heard.
#[derive(Debug)]
struct Filter {
    /// The sockets of our own changes.
    own_ports: Vec<u32>,
    ranges: Ranges,
    watched: Watched,
    devices: Devices,
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
    /// Starts to listen.
    pub(crate) fn open(
        own_ports: Vec<u32>,
        ranges: Ranges,
        watched: Watched,
        devices: Devices,
    ) -> Result<DriftListener, NetlinkError> {
        Ok(DriftListener {
            routes: listen(NETLINK_ROUTE, &ROUTE_GROUPS)?,
            netfilter: listen(NETLINK_NETFILTER, &[NFTABLES_GROUP])?,
            filter: Filter {
                own_ports,
                ranges,
                watched,
                devices,
            },
            heard: None,
            told: None,
        })
    }

    /// Waits until others may have changed what is ours. Nothing is lost when the wait is given up and taken up
    /// again.
    pub(crate) async fn next(&mut self) {
        let heard = loop {
            if let Some(heard) = self.heard {
                break heard;
            }
            if self.hear().await {
                self.heard = Some(Instant::now());
            }
        };
        let earliest = self.told.map_or(heard, |told| told + SHORTEST_INTERVAL);
        tokio::time::sleep_until(earliest.max(heard + SETTLE)).await;
        // What was told until now is answered together.
        while self.hear().now_or_never().is_some() {}
        self.heard = None;
        self.told = Some(Instant::now());
    }

    /// Takes what is told next; returns whether it matters.
    async fn hear(&mut self) -> bool {
        let (heard, of_routes) = tokio::select! {
            heard = self.routes.recv_from_full() => (heard, true),
            heard = self.netfilter.recv_from_full() => (heard, false),
        };
        // More was told than fits, or nonsense: it may have been about us.
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
            NEW_LINK | DEL_LINK => {
                let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
                message
                    .number_at(4)
                    .is_some_and(|index| devices.contains(&index))
            }
            // Every pod's interface has a link-local address.
            NEW_ADDRESS | DEL_ADDRESS => !message.tail(8).any(|(_, value)| is_link_local(value)),
            NEW_ROUTE | DEL_ROUTE => {
                let table = message.tail(12).find(|(kind, _)| *kind == ROUTE_TABLE);
                let table = table.and_then(|(_, value)| <[u8; 4]>::try_from(value).ok());
                let in_range =
                    table.is_some_and(|t| u32::from_ne_bytes(t) > self.ranges.table_offset);
                in_range || message.byte_at(5) == Some(PROTOCOL_NUMBER)
            }
            NEW_RULE | DEL_RULE => true,
            _ => false,
        }
    }

    fn is_of_firewall(&self, message: Message<'_>) -> bool {
        let text = |wanted: u16| {
            let value = message.attributes().find(|(kind, _)| *kind == wanted)?.1;
            let end = value.iter().position(|byte| *byte == 0)?;
            std::str::from_utf8(value.get(..end)?).ok()
        };
        // The table is the first attribute of every object.
        let table = text(1);
        match self.watched {
            Watched::OwnTable => table == Some(TABLE),
            Watched::IptablesChains => {
                let is_ours = |chain: &str| {
                    chain.starts_with("METALEG-")
                        || ["PREROUTING", "FORWARD", "POSTROUTING"].contains(&chain)
                };
                table.is_some_and(|table| ["mangle", "filter", "nat"].contains(&table))
                    && (NFT_TABLES.contains(&message.kind)
                        || NFT_RULES.contains(&message.kind) && text(2).is_some_and(is_ours)
                        || NFT_CHAINS.contains(&message.kind) && text(3).is_some_and(is_ours))
            }
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
        self.payload().get(at).copied()
    }

    fn number_at(&self, at: usize) -> Option<u32> {
        let bytes = self.payload().get(at..)?.first_chunk::<4>()?;
        Some(u32::from_ne_bytes(*bytes))
    }

    /// The attributes after a header of this length.
    fn tail(&self, header: usize) -> impl Iterator<Item = (u16, &[u8])> {
        attributes(self.payload().get(header..).unwrap_or_default())
    }
}
