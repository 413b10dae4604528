//! What a firewall backend must be able to do.

use std::collections::{BTreeMap, BTreeSet};

use crate::kernel::conntrack::LateReply;
use crate::kernel::error::{Error, StepError};
use crate::state::{Family, FirewallState, FirewallStep, Remnant};

/// A backend that marks, translates, guards and rejects packets.
pub(crate) trait Backend {
    /// What others must know of it.
    fn profile(&self) -> Profile;

    /// Reads everything of ours, by family.
    async fn observe(&mut self) -> Result<BTreeMap<Family, FirewallState>, Error>;

    /// Executes steps in order, and adds those that fail to `failed`.
    async fn apply(&mut self, steps: &[&FirewallStep], failed: &mut Vec<StepError>);

    /// Drops late replies of connections that are about to be forgotten: such a reply would create a new entry, as if the
    /// connection had been opened from outside. The pod's next packet would then count as a reply, skip marking, and leave
    /// with the pod's own address.
    async fn expect_late_replies(&mut self, replies: &[LateReply]) -> Result<(), Error>;

    /// NAT chains of others that may come before this backend's and that only its tools show, as words for the operator.
    async fn foreign_nat(&self) -> Result<BTreeSet<String>, Error>;
}

/// What the rest of this folder must know of a backend.
#[derive(Clone, Debug)]
pub(crate) struct Profile {
    /// Its name, and why it works as it does, for the log.
    pub(crate) name: String,
    /// The netlink port of its own changes, which are no drift; none where it runs tools.
    pub(crate) port: Option<u32>,
    /// Which objects of nftables are its own: what others change of them is drift.
    pub(crate) watched: Watched,
    /// Where its source NAT is.
    pub(crate) nat: NatPlace,
    /// What another backend would find as remnants of it.
    pub(crate) remnants: Vec<Remnant>,
}

/// Objects of nftables whose change by others is drift.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watched {
    /// Tables, in any family.
    pub(crate) tables: &'static [&'static str],
    /// Which chains of these, and their rules; `None`: everything in the tables.
    pub(crate) chains: Option<fn(&str) -> bool>,
}

/// Where a backend's source NAT is among all chains that translate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NatPlace {
    /// Its priority in postrouting.
    pub(crate) priority: i32,
    /// The table of nftables that it is in, if it is in one.
    pub(crate) table: Option<&'static str>,
    /// What an operator can do about chains of others that come first.
    pub(crate) advice: Option<&'static str>,
}
