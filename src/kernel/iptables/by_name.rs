//! Chains of iptables in nf_tables mode, asked for by name over netlink: `iptables-nft-save` would read all rules of the
//! node, which takes seconds where there are thousands of Services.

use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, NfTablesMessage, RuleAttribute, RuleMessage,
};
use netlink_packet_netfilter::{NetfilterMessageInner, NetfilterProtoFamily};

use crate::kernel::netfilter::{Netfilter, NetlinkError};
use crate::state::Family;

/// The tables of iptables.
const TABLES: [&str; 5] = ["filter", "nat", "mangle", "raw", "security"];

/// What others call a family of nftables.
fn proto(family: Family) -> NetfilterProtoFamily {
    match family {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    }
}

/// Answers questions about the rules of nf_tables mode.
#[derive(Debug)]
pub(super) struct ByName(Netfilter);

impl ByName {
    pub(super) fn open() -> Result<ByName, NetlinkError> {
        Ok(ByName(Netfilter::open()?))
    }

    /// Whether one of these chains is there, each named after its table.
    pub(super) fn has_any(
        &self,
        family: Family,
        chains: impl IntoIterator<Item = (&'static str, &'static str)>,
    ) -> Result<bool, NetlinkError> {
        for (table, chain) in chains {
            let attributes = vec![
                ChainAttribute::Table(table.to_owned()),
                ChainAttribute::Name(chain.to_owned()),
            ];
            let question = NfTablesMessage::GetChain(ChainMessage { attributes });
            let question = NetfilterMessageInner::NfTables(question);
            match self.0.has(proto(family), question) {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(error) if error.is_unsupported() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// How many rules there are.
    pub(super) fn rules(&self, family: Family) -> Result<usize, NetlinkError> {
        let mut rules = 0;
        for table in TABLES {
            let attributes = vec![RuleAttribute::Table(table.to_owned())];
            let question = NfTablesMessage::GetRule(RuleMessage { attributes });
            let question = NetfilterMessageInner::NfTables(question);
            let count = self
                .0
                .dump(proto(family), &question, |count: &mut usize, _| {
                    *count += 1;
                    Ok(())
                });
            match count {
                Ok(count) => rules += count,
                Err(error) if error.is_absent() || error.is_unsupported() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(rules)
    }
}
