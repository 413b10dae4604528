//! NAT of others that may decide about a connection before ours does.
//!
//! The first NAT chain that decides about a connection wins. Those of one priority are asked in the order in which
//! they were registered, the last one first, so that a CNI plugin that is restarted may get ahead of iptables'
//! table. Only a chain with a priority of its own is always first.

use std::collections::BTreeSet;

use netlink_packet_netfilter::nftables::{ChainMessage, NfTablesMessage};
use netlink_packet_netfilter::{NetfilterMessageInner, NetfilterProtoFamily};

use crate::kernel::error::Error;
use crate::kernel::firewall::Backend;
use crate::kernel::iptables::{Variant, remnants as iptables_remnants};
use crate::kernel::netfilter::Netfilter;
use crate::kernel::nftables::{BaseChain, TABLE, TRANSLATION_PRIORITY, any_chain};
use crate::state::Family;

/// Priority of iptables' NAT (`NF_IP_PRI_NAT_SRC` of netfilter_ipv4.h).
const NAT_PRIORITY: i32 = 100;
/// `NF_INET_POST_ROUTING` of netfilter.h.
const POSTROUTING: u32 = 4;
/// kube-proxy's own table translates only what it has marked itself, which is never egress.
const KUBE_PROXY: &str = "kube-proxy";

/// Looks for them, as sentences for the operator.
pub(crate) async fn find(in_use: &Backend, families: &[Family]) -> Result<BTreeSet<String>, Error> {
    let mut rivals = BTreeSet::new();
    let (ours, own_table) = match in_use {
        Backend::Nftables(_) => (TRANSLATION_PRIORITY, TABLE),
        // In nf_tables mode our chain is in this table.
        Backend::Iptables(iptables) if iptables.variant() == Variant::Nft => (NAT_PRIORITY, "nat"),
        Backend::Iptables(_) => (NAT_PRIORITY, ""),
    };
    let netfilter = Netfilter::open()?;
    for (family, name) in [
        (NetfilterProtoFamily::IPv4, "ip"),
        (NetfilterProtoFamily::IPv6, "ip6"),
        (NetfilterProtoFamily::Inet, "inet"),
    ] {
        let attributes = Vec::new();
        let question = NfTablesMessage::GetChain(ChainMessage { attributes });
        let question = NetfilterMessageInner::NfTables(question);
        let chains: Vec<(String, String, Option<BaseChain>)> =
            netfilter.dump(family, &question, |all: &mut Vec<_>, answer| {
                all.extend(any_chain(answer));
                Ok(())
            })?;
        for (table, chain, base) in chains {
            // Legacy iptables' own tables are none of nftables'.
            let is_ours = table == own_table || [TABLE, KUBE_PROXY].contains(&table.as_str());
            // What iptables has in its other mode is looked at by what its rules do.
            let is_iptables = table == "nat" && name != "inet";
            let decides_first = base.is_some_and(|base| {
                base.kind == "nat" && base.hook == POSTROUTING && base.priority <= ours
            });
            if decides_first && !is_ours && !is_iptables {
                rivals.insert(format!("chain {chain} of nftables table {name} {table}"));
            }
        }
    }
    if let Backend::Iptables(iptables) = in_use {
        let (other, mode) = match iptables.variant() {
            Variant::Nft => (Variant::Legacy, "legacy"),
            Variant::Legacy => (Variant::Nft, "nf_tables"),
        };
        for chain in iptables_remnants::translating_chains(other, families).await? {
            rivals.insert(format!("chain {chain} of iptables in {mode} mode"));
        }
    }
    Ok(rivals)
}
