//! What another backend or an earlier release left: found at the start, removed when the present backend does
//! all of the work.

use std::collections::BTreeSet;

use crate::error::chain;
use crate::kernel::error::Error;
use crate::kernel::firewall::Firewall;
use crate::kernel::iptables::{Variant, remnants as iptables_remnants};
use crate::kernel::nftables;
use crate::kernel::routes::Routes;
use crate::state::{Family, Remnant};

/// What does not belong to the backend in use.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) remnants: BTreeSet<Remnant>,
    /// What could not be looked at, as sentences for the operator. It keeps nothing else from being done.
    pub(crate) unseen: BTreeSet<String>,
}

impl Found {
    fn or_unseen<T: Default>(&mut self, what: &str, seen: Result<T, impl Into<Error>>) -> T {
        seen.unwrap_or_else(|error| {
            let error: Error = error.into();
            let why = chain(&error);
            self.unseen.insert(format!("cannot look for {what}: {why}"));
            T::default()
        })
    }
}

/// Looks for it.
pub(crate) async fn find(in_use: &Firewall, families: &[Family], earlier_rules: bool) -> Found {
    let mut found = Found::default();
    let mut earlier = earlier_rules;
    let own = in_use.profile().remnants;
    for (variant, remnant) in [
        (Variant::Nft, Remnant::IptablesNft),
        (Variant::Legacy, Remnant::IptablesLegacy),
    ] {
        let chains = iptables_remnants::find_chains(variant, families).await;
        let chains = found.or_unseen(&remnant.to_string(), chains);
        earlier |= chains.earlier;
        if chains.present && !own.contains(&remnant) {
            found.remnants.insert(remnant);
        }
    }
    let sets = iptables_remnants::find_sets().await;
    let sets = found.or_unseen(&Remnant::Ipsets.to_string(), sets);
    if sets.present && !own.contains(&Remnant::Ipsets) {
        found.remnants.insert(Remnant::Ipsets);
    }
    if earlier || sets.earlier {
        found.remnants.insert(Remnant::EarlierRelease);
    }
    if !own.contains(&Remnant::Nftables)
        && found.or_unseen(&Remnant::Nftables.to_string(), nftables::exists())
    {
        found.remnants.insert(Remnant::Nftables);
    }
    found
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
