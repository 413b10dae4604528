//! What another backend or an earlier release left: found at the start, removed when the present backend does
//! all of the work.

use std::collections::BTreeSet;

use crate::kernel::iptables::{Variant, traces};
use crate::kernel::route::Routes;
use crate::kernel::{Backend, Error, nftables};
use crate::state::{Family, Leftover};

/// Looks for what does not belong to the backend in use.
pub(crate) async fn find(
    in_use: &Backend,
    families: &[Family],
    earlier_rules: bool,
) -> Result<BTreeSet<Leftover>, Error> {
    let mut leftovers = BTreeSet::new();
    let mut earlier = earlier_rules;
    let uses = |variant: Variant| matches!(in_use, Backend::Iptables(i) if i.variant() == variant);
    for (variant, leftover) in [
        (Variant::Nft, Leftover::IptablesNft),
        (Variant::Legacy, Leftover::IptablesLegacy),
    ] {
        let found = traces::chain_traces(variant, families).await?;
        earlier |= found.earlier;
        if found.own && !uses(variant) {
            leftovers.insert(leftover);
        }
    }
    let sets = traces::set_traces().await?;
    if sets.own && matches!(in_use, Backend::Nftables(_)) {
        leftovers.insert(Leftover::Ipsets);
    }
    if earlier || sets.earlier {
        leftovers.insert(Leftover::EarlierRelease);
    }
    if matches!(in_use, Backend::Iptables(_)) && nftables::exists()? {
        leftovers.insert(Leftover::Nftables);
    }
    Ok(leftovers)
}

/// Removes it; absent is fine.
pub(crate) async fn remove(
    leftover: Leftover,
    families: &[Family],
    mask: u32,
    routes: &Routes,
) -> Result<(), Error> {
    match leftover {
        Leftover::Nftables => nftables::remove()?,
        Leftover::IptablesNft => traces::remove_own_chains(Variant::Nft, families).await?,
        Leftover::IptablesLegacy => traces::remove_own_chains(Variant::Legacy, families).await?,
        Leftover::Ipsets => traces::remove_own_sets().await?,
        Leftover::EarlierRelease => {
            // What marks goes first, what a marked packet needs last.
            for variant in [Variant::Nft, Variant::Legacy] {
                traces::remove_earlier_chains(variant, families, mask).await?;
            }
            traces::remove_earlier_sets().await?;
            routes.remove_earlier().await?;
        }
    }
    Ok(())
}
