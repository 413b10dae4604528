//! The firewall backends that there are, and the one in use: the only place that tells them apart.

use std::collections::{BTreeMap, BTreeSet};

use crate::kernel::backend::Profile;
use crate::kernel::conntrack::LateReply;
use crate::kernel::error::{Error, StepError};
use crate::kernel::iptables::Iptables;
use crate::kernel::netlink::OwnPorts;
use crate::kernel::nftables::Nftables;
use crate::kernel::ours::Ranges;
use crate::settings::FirewallBackend;
use crate::state::{Family, FirewallState, FirewallStep};

/// The backend in use.
#[derive(Debug)]
pub(crate) enum Firewall {
    Nftables(Nftables),
    Iptables(Iptables),
}

impl Firewall {
    /// The backend that is wanted, with the reason when nftables would have been taken but cannot do what is needed.
    pub(crate) async fn open(
        wanted: FirewallBackend,
        ranges: Ranges,
        families: &[Family],
        ports: &OwnPorts,
    ) -> Result<(Firewall, Option<Error>), Error> {
        let refusal = match wanted {
            FirewallBackend::Iptables => None,
            FirewallBackend::Nftables | FirewallBackend::Auto => {
                match Nftables::check(ranges, families).await {
                    Ok(()) => {
                        let nftables = Nftables::new(ranges, families.to_vec(), ports.clone());
                        return Ok((Firewall::Nftables(nftables), None));
                    }
                    Err(refusal) if wanted == FirewallBackend::Nftables => return Err(refusal),
                    Err(refusal) => Some(refusal),
                }
            }
        };
        let iptables = Iptables::open(ranges, families.to_vec(), ports.clone()).await?;
        Ok((Firewall::Iptables(iptables), refusal))
    }

    /// What others must know of it.
    pub(crate) fn profile(&self) -> Profile {
        match self {
            Firewall::Nftables(nftables) => nftables.profile(),
            Firewall::Iptables(iptables) => iptables.profile(),
        }
    }

    /// Reads everything of ours, by family. `strict_tcp`: the node takes up no connection in its middle.
    pub(crate) async fn observe(
        &mut self,
        strict_tcp: bool,
    ) -> Result<BTreeMap<Family, FirewallState>, Error> {
        match self {
            Firewall::Nftables(nftables) => Ok(nftables.observe(strict_tcp)?),
            Firewall::Iptables(iptables) => iptables.observe(strict_tcp).await,
        }
    }

    /// Executes steps in order, and adds those that fail to `failed`.
    pub(crate) async fn apply(&mut self, steps: &[&FirewallStep], failed: &mut Vec<StepError>) {
        match self {
            Firewall::Nftables(nftables) => nftables.apply(steps, failed).await,
            Firewall::Iptables(iptables) => iptables.apply(steps, failed).await,
        }
    }

    /// Drops late replies of connections that are about to be forgotten: such a reply would create a new entry, as if the
    /// connection had been opened from outside. The pod's next packet would then count as a reply, skip marking, and leave
    /// with the pod's own address.
    pub(crate) async fn expect_late_replies(&mut self, replies: &[LateReply]) -> Result<(), Error> {
        match self {
            Firewall::Nftables(nftables) => Ok(nftables.expect_late_replies(replies)?),
            Firewall::Iptables(iptables) => iptables.expect_late_replies(replies).await,
        }
    }

    /// NAT chains of others that may come before this backend's and that only its tools show, as words for the operator.
    pub(crate) async fn foreign_nat(&self) -> Result<BTreeSet<String>, Error> {
        match self {
            // Chains of iptables come after ours, in every mode.
            Firewall::Nftables(_) => Ok(BTreeSet::new()),
            Firewall::Iptables(iptables) => iptables.foreign_nat().await,
        }
    }

    /// Packets that came with our bits of the mark set by others, by family; nothing where they are not counted.
    pub(crate) async fn foreign_marks(&self) -> Result<BTreeMap<Family, u64>, Error> {
        match self {
            Firewall::Nftables(nftables) => Ok(nftables.foreign_marks()?),
            Firewall::Iptables(iptables) => Ok(iptables.foreign_marks().await?),
        }
    }
}
