//! What this backend, in any mode, and earlier releases left: found and removed without using the backend.

use std::collections::BTreeSet;

use crate::kernel::error::Error;
use crate::kernel::iptables::by_name::ByName;
use crate::kernel::iptables::chains::{
    EARLIER, OWN, is_earlier_chain, is_earlier_rule, is_own_chain,
};
use crate::kernel::iptables::documents::remove_document;
use crate::kernel::iptables::mode::{Variant, legacy_tables};
use crate::kernel::iptables::save::{Line, restore, save_if_used, save_table};
use crate::kernel::iptables::sets::{self, destroy, is_earlier_set, is_own_set};
use crate::kernel::netlink::OwnPorts;
use crate::kernel::tool::ToolError;
use crate::state::Family;

/// The tables that chains of ours are in.
const TABLES: [&str; 3] = ["nat", "filter", "mangle"];

/// Whether something is there.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    /// Of this backend.
    pub(crate) present: bool,
    /// Of releases before 0.3.
    pub(crate) earlier: bool,
}

/// Looks for chains of ours in a mode, without registering tables that nobody uses.
pub(crate) async fn find_chains(variant: Variant, families: &[Family]) -> Result<Found, Error> {
    let mut found = Found::default();
    for &family in families {
        match variant {
            Variant::Nft => {
                let by_name = ByName::open()?;
                found.present |= by_name.has_any(family, OWN)?;
                found.earlier |= by_name.has_any(family, EARLIER)?;
            }
            Variant::Legacy => {
                for table in legacy_tables(family).await {
                    if !TABLES.contains(&table.as_str()) {
                        continue;
                    }
                    let (lines, _) = save_table(variant, family, &table).await?;
                    found.present |= lines.iter().any(|line| is_own_chain(&line.chain));
                    found.earlier |= lines.iter().any(|line| is_earlier_chain(&line.chain));
                }
            }
        }
    }
    Ok(found)
}

/// Looks for sets of ours.
pub(crate) async fn find_sets() -> Result<Found, ToolError> {
    let names = sets::names().await?;
    Ok(Found {
        present: names.iter().any(|name| is_own_set(name)),
        earlier: names.iter().any(|name| is_earlier_set(name)),
    })
}

/// Removes the chains of this backend in a mode; absent is fine.
pub(crate) async fn remove_chains(variant: Variant, families: &[Family]) -> Result<(), ToolError> {
    for family in families {
        let lines = save_if_used(variant, *family).await?;
        let document = remove_document(&lines, is_own_chain, |_| false);
        restore(variant, *family, document, &OwnPorts::default()).await?;
    }
    Ok(())
}

/// Removes the sets of this backend, which no chain may use any more; absent is fine.
pub(crate) async fn remove_sets() -> Result<(), ToolError> {
    let names = sets::names().await?.into_iter();
    destroy(names.filter(|name| is_own_set(name))).await
}

/// Removes the chains that an earlier release made in a mode; absent is fine.
pub(crate) async fn remove_earlier_chains(
    variant: Variant,
    families: &[Family],
    mask: u32,
) -> Result<(), ToolError> {
    for family in families {
        let lines = save_if_used(variant, *family).await?;
        // Its rule without a name could be one of others, but for its chains beside it.
        let is_there = lines.iter().any(|line| is_earlier_chain(&line.chain));
        let is_stray = |line: &Line| is_there && is_earlier_rule(line, mask);
        let document = remove_document(&lines, is_earlier_chain, is_stray);
        restore(variant, *family, document, &OwnPorts::default()).await?;
    }
    Ok(())
}

/// Removes the sets of an earlier release, which no chain may use any more; absent is fine.
pub(crate) async fn remove_earlier_sets() -> Result<(), ToolError> {
    let names = sets::names().await?.into_iter();
    destroy(names.filter(|name| is_earlier_set(name))).await
}

/// Chains of others that translate sources, in a mode. kube-proxy's translate only what it has marked itself.
pub(crate) async fn translating_chains(
    variant: Variant,
    families: &[Family],
) -> Result<BTreeSet<String>, ToolError> {
    let mut chains = BTreeSet::new();
    for family in families {
        let translates = |line: &Line| {
            line.table == "nat"
                && matches!(line.target(), Some("MASQUERADE" | "SNAT"))
                && !line.chain.starts_with("KUBE-")
                && !is_own_chain(&line.chain)
                && !is_earlier_chain(&line.chain)
        };
        let lines = save_if_used(variant, *family).await?.into_iter();
        chains.extend(lines.filter(translates).map(|line| line.chain));
    }
    Ok(chains)
}
