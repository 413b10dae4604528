//! NAT chains of others that may translate a connection before ours do.
//!
//! The first NAT chain that decides about a connection wins. Those of one priority are asked in the order in which
//! they were registered, the last one first, so that a CNI plugin that is restarted may get ahead of iptables'
//! table. Only a chain with a priority of its own is always first.

use std::collections::BTreeSet;

use netlink_packet_netfilter::nftables::{ChainMessage, NfTablesMessage};
use netlink_packet_netfilter::{NetfilterMessageInner, NetfilterProtoFamily};
use nix::libc::NF_INET_POST_ROUTING;

use crate::kernel::error::Error;
use crate::kernel::firewall::Firewall;
use crate::kernel::netfilter::Netfilter;
use crate::kernel::nftables::{BaseChain, TABLE, any_chain};

/// kube-proxy's own table translates only what it has marked itself, which is never egress.
const KUBE_PROXY: &str = "kube-proxy";

/// Looks for them. Returns sentences for the operator.
pub(crate) async fn find(in_use: &Firewall) -> Result<BTreeSet<String>, Error> {
    let ours = in_use.profile();
    let mut foreign = in_use.foreign_nat().await?;
    let netfilter = Netfilter::open()?;
    let attributes = Vec::new();
    let question = NfTablesMessage::GetChain(ChainMessage { attributes });
    let question = NetfilterMessageInner::NfTables(question);
    // Of thousands of chains, a handful have a hook.
    let hooked: Vec<(&str, String, String)> = netfilter.dump(
        NetfilterProtoFamily::Unspec,
        &question,
        |all: &mut Vec<_>, answer| {
            let name = match answer.family() {
                NetfilterProtoFamily::IPv4 => "ip",
                NetfilterProtoFamily::IPv6 => "ip6",
                NetfilterProtoFamily::Inet => "inet",
                // ARP, bridges and devices translate no addresses.
                _ => return Ok(()),
            };
            let decides_first = |base: &BaseChain| {
                base.kind == "nat"
                    && base.hook == NF_INET_POST_ROUTING
                    && base.priority <= ours.nat_priority
            };
            if let Some((table, chain, Some(base))) = any_chain(answer)
                && decides_first(&base)
            {
                all.push((name, table, chain));
            }
            Ok(())
        },
    )?;
    for (name, table, chain) in hooked {
        let is_ours = ours.nat_table == Some(&table) || table == TABLE;
        // What iptables has in its other mode is looked at by what its rules do.
        let is_iptables = table == "nat" && name != "inet";
        if !is_ours && !is_iptables && table != KUBE_PROXY {
            foreign.insert(format!("chain {chain} of nftables table {name} {table}"));
        }
    }
    let advice = ours.advice.map(|advice| format!(": {advice}"));
    let advice = advice.unwrap_or_default();
    let sentence = |chain| format!("{chain} may translate packets before we do{advice}");
    Ok(foreign.into_iter().map(sentence).collect())
}
