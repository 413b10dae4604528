//! What the node's own configuration, and other programs on it, put in the way of egress packets.
//!
//! [`Surroundings`] are what was read, [`Obstacle`]s what `plan` concludes from them for a Service.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use derive_more::Display;
use ipnet::IpNet;
use strum::{IntoStaticStr, VariantNames};

/// Something that keeps pods of a Service from leaving as promised, or their connections from going on: what was found,
/// and what to do.
#[derive(Clone, Debug, Display, IntoStaticStr, PartialEq, Eq, PartialOrd, Ord, VariantNames)]
pub enum Obstacle {
    #[display(
        "{_0} drops forwarded packets by its policy, and no rule there is known to accept {_1}: accept these there, \
         or, if it is iptables' FORWARD, set FORWARD_ACCEPT=true"
    )]
    ForwardDrop(String, Passage),
    #[display("the node does not forward packets, because {_0} is 0: set it to 1")]
    ForwardingOff(String),
    #[display(
        "the strict reverse path filter of interface {_0} drops {_1}, because the way back is another interface: set \
         net.ipv4.conf.{_0}.rp_filter to 2"
    )]
    StrictReversePath(String, Passage),
    #[display(
        "TCP connections are reset when their VIP moves here or away, because net.netfilter.nf_conntrack_tcp_loose is \
         0: set it to 1"
    )]
    StrictTracking,
    #[display(
        "the routing rule `{_0}` of others comes before ours and takes egress packets: give it a priority after ours, \
         or set ROUTE_RULE_PRIORITY below it"
    )]
    RuleAhead(String),
    #[display("{_0} may translate packets before we do: {_1}")]
    ForeignNat(String, &'static str),
    #[display(
        "packets arrive with bits of FIREWALL_MASK that others have set: set it to bits that nobody uses"
    )]
    ForeignMark,
    #[display(
        "another program has removed all of our routing rules within the last hour: stop it from doing so \
         (systemd-networkd: ManageForeignRoutingPolicyRules=no and ManageForeignRoutes=no)"
    )]
    RulesRemoved,
    #[display(
        "systemd-networkd removes routing rules of others when it is restarted: set {_0}=no in networkd.conf"
    )]
    ForeignRulesManaged(&'static str),
    #[display(
        "the iptables backend, which promises less, is in use, because nftables cannot be used: {_0}"
    )]
    NoNftables(String),
    #[display("the node cannot be searched for obstacles: {_0}")]
    NotSeen(String),
}

/// Which packets an obstacle is in the way of.
#[derive(Clone, Copy, Debug, Display, PartialEq, Eq, PartialOrd, Ord)]
pub enum Passage {
    /// On the pod's node.
    #[display("packets of this node's egress pods and their answers")]
    OwnPods,
    /// On the gateway.
    #[display("packets of other nodes' egress pods and their answers")]
    PodsOfOthers,
}

impl Obstacle {
    /// One word for metrics and Events.
    #[must_use]
    pub fn label(&self) -> &'static str {
        self.into()
    }
}

/// What of a node decides with us about egress packets of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Those that are in the way of every egress pod that this node has to do with.
    pub obstacles: BTreeSet<Obstacle>,
    /// Filters that drop forwarded packets unless a rule accepts them.
    pub filters: BTreeSet<DroppingFilter>,
    /// Routing rules of others ahead of ours, as far as they can match marked packets.
    pub rules: BTreeSet<RuleAhead>,
    /// Interfaces whose packets are not forwarded, though the node forwards those of others.
    pub not_forwarding: BTreeSet<String>,
    pub reverse_path: ReversePath,
}

/// A chain of the forward hook with policy drop, and what its rules accept.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct DroppingFilter {
    /// As its owner's tools name it.
    pub chain: String,
    /// From there to everywhere, packets that begin a connection are accepted for certain.
    pub sources: BTreeSet<IpNet>,
    /// What belongs to connections that were opened from there is accepted for certain.
    pub answered: BTreeSet<IpNet>,
    /// Rules accept on other terms, such as interfaces and marks, which may be those of this node's pods.
    pub is_conditional: bool,
}

impl DroppingFilter {
    /// Whether packets of a pod and their answers pass for certain.
    #[must_use]
    pub fn accepts(&self, pod: IpAddr) -> bool {
        let is_in = |nets: &BTreeSet<IpNet>| nets.iter().any(|net| net.contains(&pod));
        is_in(&self.sources) && is_in(&self.answered)
    }
}

/// A routing rule of others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RuleAhead {
    /// As `ip rule` takes it.
    pub text: String,
    pub from: Option<IpNet>,
    pub to: Option<IpNet>,
    /// The interface that packets come in by.
    pub interface: Option<String>,
}

/// What is needed to foresee the kernel's check that a packet comes in where packets to its source go out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReversePath {
    /// Interfaces with the strict check.
    pub strict: BTreeSet<String>,
    /// The main table, by destination; empty where no interface is strict.
    pub routes: BTreeMap<IpNet, String>,
}

impl ReversePath {
    /// The interface on the way to an address.
    #[must_use]
    pub fn interface_to(&self, address: IpAddr) -> Option<&str> {
        let routes = self.routes.iter();
        let routes = routes.filter(|(net, _)| net.contains(&address));
        let (_, interface) = routes.max_by_key(|(net, _)| net.prefix_len())?;
        Some(interface)
    }

    /// The interface on the way to what no other route knows.
    #[must_use]
    pub fn interface_to_outside(&self) -> Option<&str> {
        let mut routes = self.routes.iter();
        let default = routes.find(|(net, _)| net.prefix_len() == 0);
        default.map(|(_, interface)| interface.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> BTreeSet<IpNet> {
        texts.iter().map(|net| net.parse().unwrap()).collect()
    }

    #[test]
    fn a_filter_lets_a_pod_through_that_it_lets_send_and_be_answered() {
        let filter = |sources: &[&str], answered: &[&str]| DroppingFilter {
            sources: nets(sources),
            answered: nets(answered),
            ..DroppingFilter::default()
        };
        let pod = IpAddr::from([10, 244, 1, 11]);
        let (all, pods) = (&["0.0.0.0/0"], &["10.244.0.0/16"]);
        assert!(filter(pods, all).accepts(pod) && filter(all, pods).accepts(pod));
        assert!(!filter(pods, &[]).accepts(pod) && !filter(&[], all).accepts(pod));
        assert!(!filter(&["10.244.2.0/24"], all).accepts(pod));
    }

    #[test]
    fn the_page_for_operators_has_every_obstacle() {
        let page = include_str!("../../docs/operations.md");
        let (_, section) = page.split_once("## Obstacles").unwrap();
        let (section, _) = section.split_once("\n## ").unwrap();
        let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
        let documented: Vec<&str> = rows.map(|row| row.split_once('`').unwrap().0).collect();
        assert_eq!(documented, Obstacle::VARIANTS);
    }

    #[test]
    fn the_way_back_is_the_longest_route() {
        let routes = [
            ("0.0.0.0/0", "eth0"),
            ("10.244.0.0/16", "eth1"),
            ("10.244.2.0/24", "flannel.1"),
        ];
        let reverse_path = ReversePath {
            strict: BTreeSet::new(),
            routes: routes
                .map(|(net, interface)| (net.parse().unwrap(), interface.to_owned()))
                .into(),
        };
        for (address, interface) in [
            ([10, 244, 2, 9], "flannel.1"),
            ([10, 244, 3, 9], "eth1"),
            ([198, 51, 100, 10], "eth0"),
        ] {
            let found = reverse_path.interface_to(IpAddr::from(address));
            assert_eq!(found, Some(interface));
        }
        assert_eq!(reverse_path.interface_to_outside(), Some("eth0"));
        assert_eq!(ReversePath::default().interface_to_outside(), None);
    }
}
