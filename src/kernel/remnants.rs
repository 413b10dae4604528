//! What another backend or an earlier release left: found at the start, removed when the present backend does
//! all of the work.

use std::collections::BTreeSet;

use crate::kernel::error::Error;
use crate::kernel::firewall::Firewall;
use crate::kernel::iptables::{Variant, remnants as iptables_remnants};
use crate::kernel::nftables;
use crate::kernel::routes::Routes;
use crate::state::{Family, Remnant};

/// Looks for what does not belong to the backend in use.
pub(crate) async fn find(
    in_use: &Firewall,
    families: &[Family],
    earlier_rules: bool,
) -> Result<BTreeSet<Remnant>, Error> {
    let mut remnants = BTreeSet::new();
    let mut earlier = earlier_rules;
    let own = in_use.profile().remnants;
    for (variant, remnant) in [
        (Variant::Nft, Remnant::IptablesNft),
        (Variant::Legacy, Remnant::IptablesLegacy),
    ] {
        let found = iptables_remnants::find_chains(variant, families).await?;
        earlier |= found.earlier;
        if found.present && !own.contains(&remnant) {
            remnants.insert(remnant);
        }
    }
    let sets = iptables_remnants::find_sets().await?;
    if sets.present && !own.contains(&Remnant::Ipsets) {
        remnants.insert(Remnant::Ipsets);
    }
    if earlier || sets.earlier {
        remnants.insert(Remnant::EarlierRelease);
    }
    if !own.contains(&Remnant::Nftables) && nftables::exists()? {
        remnants.insert(Remnant::Nftables);
    }
    Ok(remnants)
}

/// Removes it; absent is fine.
pub(crate) async fn remove(
    remnant: Remnant,
    families: &[Family],
    mask: u32,
    routes: &mut Routes,
) -> Result<(), Error> {
    match remnant {
        Remnant::Nftables => nftables::remove()?,
        Remnant::IptablesNft => iptables_remnants::remove_chains(Variant::Nft, families).await?,
        Remnant::IptablesLegacy => {
            iptables_remnants::remove_chains(Variant::Legacy, families).await?
        }
        Remnant::Ipsets => iptables_remnants::remove_sets().await?,
        Remnant::EarlierRelease => {
            // What marks goes first, what a marked packet needs last.
            for variant in [Variant::Nft, Variant::Legacy] {
                iptables_remnants::remove_earlier_chains(variant, families, mask).await?;
            }
            iptables_remnants::remove_earlier_sets().await?;
            routes.remove_earlier()?;
        }
    }
    Ok(())
}
