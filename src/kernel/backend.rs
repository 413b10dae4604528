//! What the rest of this folder must know of a firewall backend.

use crate::state::Remnant;

/// What tells one backend from the other.
#[derive(Clone, Debug)]
pub(crate) struct Profile {
    /// Its name, and why it works as it does, for the log.
    pub(crate) name: String,
    pub(crate) watched: Watched,
    /// The priority in postrouting of its source NAT.
    pub(crate) nat_priority: i32,
    /// The table of nftables that its source NAT is in, if it is in one.
    pub(crate) nat_table: Option<&'static str>,
    /// What an operator can do about NAT chains of others that come first.
    pub(crate) advice: &'static str,
    /// Packets are marked before their destination is translated.
    pub(crate) marks_before_dnat: bool,
    /// It keeps no record of what marks stand for: it sees by the routes' realm whether a packet takes one of them.
    pub(crate) ways_are_routes: bool,
    /// What another backend would find as remnants of it.
    pub(crate) remnants: Vec<Remnant>,
}

/// Objects of nftables that are a backend's own: what others change of them is drift.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watched {
    /// Tables, in any family.
    pub(crate) tables: &'static [&'static str],
    /// Which chains of these, and their rules; `None`: everything in the tables.
    pub(crate) chains: Option<fn(&str) -> bool>,
    /// Chains of others that lead into ours: what comes ahead of that matters.
    pub(crate) base_chains: &'static [&'static str],
}
