//! Kernel objects of the product that rows look at: renamed there, they are renamed here.

pub(crate) const TABLE: &str = "inet metaleg";
pub(crate) const PROTOCOL: &str = "proto 77";
pub(crate) const FIRST_RULE: &str = "1000";
pub(crate) const LAST_RULE: &str = "1001";
pub(crate) const ROUTE_TABLES: &str = "10000";

pub(crate) const TRANSLATION_CHAIN: &str = "translation";
pub(crate) const GUARD_CHAIN: &str = "guard";
pub(crate) const CHAINS: &str = "METALEG-";
pub(crate) const NAT_CHAIN: &str = "METALEG-NAT";
pub(crate) const MARK_CHAIN: &str = "METALEG-MARK";

pub(crate) const EGRESS_SET: &str = "egress";
pub(crate) const EGRESS_IPSET: &str = "METALEG-EGRESS-";
pub(crate) const LATE_REPLIES_IPSET: &str = "METALEG-LATE-REPLIES-";
pub(crate) const SETS_OF_PODS: [&str; 6] =
    ["egress", "vips", "blocked", "gateway_here", "slot", "vip"];
/// What stays while the guards wait for late replies.
pub(crate) const IPSETS_OF_GUARDS: [&str; 4] = ["EXCLUDED", "REMOTE-PODS", "LATE-REPLIES", "LANS"];
