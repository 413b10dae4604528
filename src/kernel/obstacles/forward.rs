//! Filters that drop what is forwarded unless a rule accepts it: base chains of the forward hook with policy drop.
//!
//! A drop in any of them is final, so that what another chain accepts does not help. Their rules are read only where the
//! policy is drop: there may be many.

use std::collections::{BTreeMap, BTreeSet};

use nix::libc::NF_INET_FORWARD;

use crate::kernel::iptables::{Variant, forward};
use crate::kernel::nftables::TABLE;
use crate::kernel::obstacles::chains::Found;
use crate::kernel::obstacles::judge::{Chains, iptables_rule, judge, nft_rules};
use crate::kernel::tool::{ToolError, run};
use crate::state::{DroppingFilter, Family};

pub(super) async fn find(
    families: &[Family],
    chains: &[Found],
) -> Result<BTreeMap<Family, BTreeSet<DroppingFilter>>, ToolError> {
    let mut found: BTreeMap<Family, BTreeSet<DroppingFilter>> = BTreeMap::new();
    for &family in families {
        let filters = found.entry(family).or_default();
        let dropping = chains.iter().filter(|chain| {
            chain.base.hook == NF_INET_FORWARD && !chain.base.accepts && chain.table != TABLE
        });
        for chain in dropping.filter(|chain| chain.sees(family)) {
            filters.insert(of_nftables(family, chain).await?);
        }
        filters.extend(of_iptables(Variant::Legacy, family).await?);
    }
    Ok(found)
}

async fn of_nftables(family: Family, chain: &Found) -> Result<DroppingFilter, ToolError> {
    let Found {
        kind, table, name, ..
    } = chain;
    let is_iptables = *kind != "inet" && table == "filter" && name == "FORWARD";
    // A table of this name that iptables did not make is one that it cannot read.
    if is_iptables && let Ok(Some(filter)) = of_iptables(Variant::Nft, family).await {
        return Ok(filter);
    }
    let text = run("nft", &["list", "chain", kind, table, name], String::new()).await?;
    let chains = [(name.clone(), nft_rules(family, &text))].into();
    let title = format!("chain {name} of nftables table {kind} {table}");
    Ok(judge(family, &chains, name, title))
}

/// The FORWARD chain of iptables in a mode, if its policy is DROP.
async fn of_iptables(
    variant: Variant,
    family: Family,
) -> Result<Option<DroppingFilter>, ToolError> {
    let Some(rules) = forward::dropping(variant, family).await? else {
        return Ok(None);
    };
    let mut chains = Chains::new();
    for (chain, rule) in rules {
        let rule = iptables_rule(&chain, &rule);
        chains.entry(chain).or_default().push(rule);
    }
    let title = format!("chain FORWARD of iptables in {variant} mode");
    Ok(Some(judge(family, &chains, forward::BASE, title)))
}
