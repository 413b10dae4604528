//! What is ours in a kernel: names and numbers that both backends share.

use crate::state::{Family, NetSet, PodSet};

/// A set that every firewall backend keeps, one for each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum OwnSet {
    /// Networks.
    Nets(NetSet),
    /// Pods.
    Pods(PodSet),
    /// VIPs to guard.
    Vips,
    /// Replies to forgotten connections: the kernel removes them by itself, and nobody reads them.
    LateReplies,
}

impl OwnSet {
    pub(crate) const ALL: [OwnSet; 9] = [
        OwnSet::Nets(NetSet::Excluded),
        OwnSet::Nets(NetSet::RemotePods),
        OwnSet::Nets(NetSet::LocalPods),
        OwnSet::Pods(PodSet::Egress),
        OwnSet::Pods(PodSet::GatewayHere),
        OwnSet::Pods(PodSet::Blocked),
        OwnSet::Pods(PodSet::Ordinary),
        OwnSet::Vips,
        OwnSet::LateReplies,
    ];

    /// What the set is called, as far as backends agree.
    pub(crate) fn word(self) -> &'static str {
        match self {
            OwnSet::Nets(NetSet::Excluded) => "excluded",
            OwnSet::Nets(NetSet::RemotePods) => "remote_pods",
            OwnSet::Nets(NetSet::LocalPods) => "local_pods",
            OwnSet::Pods(PodSet::Egress) => "egress",
            OwnSet::Pods(PodSet::GatewayHere) => "gateway_here",
            OwnSet::Pods(PodSet::Blocked) => "blocked",
            OwnSet::Pods(PodSet::Ordinary) => "ordinary",
            OwnSet::Vips => "vips",
            OwnSet::LateReplies => "late_replies",
        }
    }
}

/// The digit by which names tell families apart.
pub(crate) fn digit(family: Family) -> u8 {
    match family {
        Family::V4 => 4,
        Family::V6 => 6,
    }
}
