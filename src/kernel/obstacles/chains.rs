//! Base chains of everybody, in every table of nftables that sees packets of IP.

use netlink_packet_netfilter::NetfilterProtoFamily;

use crate::kernel::netfilter::NetlinkError;
use crate::kernel::nftables::{BaseChain, base_chains};
use crate::state::Family;

/// A chain with a hook.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// As `nft` says it.
    pub(super) kind: &'static str,
    pub(super) table: String,
    pub(super) name: String,
    pub(super) base: BaseChain,
}

impl Found {
    pub(super) fn sees(&self, family: Family) -> bool {
        match self.kind {
            "ip" => family == Family::V4,
            "ip6" => family == Family::V6,
            _ => true,
        }
    }
}

pub(super) fn find() -> Result<Vec<Found>, NetlinkError> {
    let found = base_chains()?.into_iter();
    let found = found.filter_map(|(family, table, name, base)| {
        let kind = match family {
            NetfilterProtoFamily::IPv4 => "ip",
            NetfilterProtoFamily::IPv6 => "ip6",
            NetfilterProtoFamily::Inet => "inet",
            // ARP, bridges and devices neither translate nor forward packets of IP.
            _ => return None,
        };
        Some(Found {
            kind,
            table,
            name,
            base,
        })
    });
    Ok(found.collect())
}
