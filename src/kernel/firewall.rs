//! The firewall backends, and what each must be able to do.

use std::collections::BTreeMap;

use crate::kernel::conntrack::LateReply;
use crate::kernel::error::{Error, StepError};
use crate::kernel::iptables::Iptables;
use crate::kernel::nftables::Nftables;
use crate::state::{Family, FirewallState, FirewallStep};

/// How long replies to forgotten connections are still dropped. Old gateway and server normally learn of the change
/// within seconds.
pub(crate) const LATE_REPLY_SECONDS: u32 = 60;

/// A backend that marks, translates, guards and rejects packets.
pub(crate) trait Firewall {
    /// Reads everything of ours, by family.
    async fn observe(&mut self) -> Result<BTreeMap<Family, FirewallState>, Error>;

    /// Executes steps in order, and adds those that fail to `failed`.
    async fn apply(&mut self, steps: &[&FirewallStep], failed: &mut Vec<StepError>);

    /// Keeps late replies of connections that are about to be forgotten from beginning connections of their own: the
    /// pod's next packet would be taken for an answer to one that came from outside, and leave with the pod's address.
    async fn expect_late_replies(&mut self, replies: &[LateReply]) -> Result<(), Error>;
}

/// The backend in use.
#[derive(Debug)]
pub(crate) enum Backend {
    Nftables(Nftables),
    Iptables(Iptables),
}

impl Firewall for Backend {
    async fn observe(&mut self) -> Result<BTreeMap<Family, FirewallState>, Error> {
        match self {
            Backend::Nftables(nftables) => nftables.observe().await,
            Backend::Iptables(iptables) => iptables.observe().await,
        }
    }

    async fn apply(&mut self, steps: &[&FirewallStep], failed: &mut Vec<StepError>) {
        match self {
            Backend::Nftables(nftables) => nftables.apply(steps, failed).await,
            Backend::Iptables(iptables) => iptables.apply(steps, failed).await,
        }
    }

    async fn expect_late_replies(&mut self, replies: &[LateReply]) -> Result<(), Error> {
        match self {
            Backend::Nftables(nftables) => nftables.expect_late_replies(replies).await,
            Backend::Iptables(iptables) => iptables.expect_late_replies(replies).await,
        }
    }
}
