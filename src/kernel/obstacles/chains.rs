//! Base chains of everybody, in every table of nftables that sees packets of IP.

use netlink_packet_netfilter::NetfilterProtoFamily;

use crate::kernel::netfilter::NetlinkError;
use crate::kernel::nftables::{BaseChain, chains_of_all};
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
    let mut found = Vec::new();
    for (family, kind) in [
        (NetfilterProtoFamily::IPv4, "ip"),
        (NetfilterProtoFamily::IPv6, "ip6"),
        (NetfilterProtoFamily::Inet, "inet"),
    ] {
        for (table, name, base) in chains_of_all(family)? {
            found.extend(base.map(|base| Found {
                kind,
                table,
                name,
                base,
            }));
        }
    }
    Ok(found)
}
