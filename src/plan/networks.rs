//! Networks: destinations that are not egress, and where pods have their addresses from.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::cluster::View;
use crate::settings::{ExcludedDestinations, Settings};
use crate::state::Family;

/// Never outside the cluster, whatever else is known: loopback, link-local (cloud metadata, node-local DNS),
/// multicast and limited broadcast.
const LOCAL: [&str; 7] = [
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/4",
    "255.255.255.255/32",
    "::1/128",
    "fe80::/10",
    "ff00::/8",
];

/// Private networks (RFC 1918, RFC 6598, RFC 4193): assumed to be the cluster's when its pod networks are not
/// known.
const PRIVATE: [&str; 5] = [
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "fc00::/7",
];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Excluded {
    pub(super) nets: BTreeSet<IpNet>,
    /// A pod outside every known pod network: the reason why all private networks are excluded.
    pub(super) unknown_network_of: Option<IpAddr>,
}

/// Finds the excluded destinations: what the operator lists, and with `auto` pod networks, Service networks and
/// addresses of nodes. An egress pod outside every known pod network means that the cluster's pod networks are
/// not known; its traffic inside the cluster is then protected by excluding all private networks.
pub(super) fn excluded(
    family: Family,
    view: &View,
    wanted: &ExcludedDestinations,
    pods: impl IntoIterator<Item = IpAddr>,
) -> Excluded {
    let mut nets: Vec<IpNet> = wanted.listed.iter().copied().collect();
    let mut unknown_network_of = None;
    if wanted.auto {
        let nodes = view.nodes.values();
        let pod_cidrs = nodes.flat_map(|node| &node.pod_cidrs);
        let pod_cidrs: Vec<IpNet> = pod_cidrs.chain(&view.pod_pools).copied().collect();
        let is_unknown = |pod: &IpAddr| !pod_cidrs.iter().any(|cidr| cidr.contains(pod));
        unknown_network_of = pods.into_iter().find(is_unknown);
        if unknown_network_of.is_some() {
            nets.extend(constant(&PRIVATE));
        }
        nets.extend(pod_cidrs);
        nets.extend(constant(&LOCAL));
        nets.extend(view.service_cidrs.iter().copied());
        let addresses = view.nodes.values().flat_map(|node| &node.addresses);
        nets.extend(addresses.map(|address| IpNet::from(*address)));
    }
    Excluded {
        nets: merged(family, nets.iter()),
        unknown_network_of,
    }
}

/// The networks of one family, in as few as possible. Adjacent ones are merged, as the kernel merges them: else each would
/// be found changed when it is read back.
fn merged<'a>(family: Family, nets: impl Iterator<Item = &'a IpNet>) -> BTreeSet<IpNet> {
    let nets = nets.filter(|net| Family::of_net(**net) == family).copied();
    let nets: Vec<IpNet> = nets.collect();
    IpNet::aggregate(&nets).into_iter().collect()
}

fn constant(nets: &'static [&'static str]) -> impl Iterator<Item = IpNet> {
    nets.iter().filter_map(|net| net.parse().ok())
}

/// Every known pod network.
pub(super) fn pods(family: Family, view: &View) -> BTreeSet<IpNet> {
    let nets = view.nodes.values().flat_map(|node| &node.pod_cidrs);
    merged(family, nets.chain(&view.pod_pools))
}

/// The pod networks of the other nodes, while this node is a gateway, unless it may be their router.
pub(super) fn remote_pods(family: Family, view: &View, settings: &Settings) -> BTreeSet<IpNet> {
    let is_wanted = settings.guard_transit && view.is_gateway;
    if !is_wanted || !pods_are_where_their_nodes_say(family, view, settings) {
        return BTreeSet::new();
    }
    let nodes = view.nodes.iter();
    let others = nodes.filter(|(name, _)| **name != settings.node_name);
    merged(family, others.flat_map(|(_, node)| &node.pod_cidrs))
}

/// Whether pods have addresses of their nodes' podCIDRs. Where a CNI plugin has pools of its own, as Calico does, podCIDRs
/// mean nothing: a pod of this node may have an address from another node's podCIDR.
fn pods_are_where_their_nodes_say(family: Family, view: &View, settings: &Settings) -> bool {
    let own = view.nodes.get(&settings.node_name);
    let is_own = |pod| {
        let mut nets = own.into_iter().flat_map(|node| &node.pod_cidrs);
        nets.any(|net| net.contains(&pod))
    };
    let mut pods = own_addresses(family, view).peekable();
    let mut pools = view.pod_pools.iter();
    match pods.peek() {
        None => !pools.any(|net| Family::of_net(*net) == family),
        Some(_) => pods.all(is_own),
    }
}

/// The networks that pods of this node get addresses from, if pods are to wait until they are classified.
pub(super) fn local_pods(family: Family, view: &View, settings: &Settings) -> BTreeSet<IpNet> {
    if !settings.strict_start {
        return BTreeSet::new();
    }
    let nets: Vec<IpNet> = own_pods(view, settings).collect();
    merged(family, nets.iter())
}

/// The networks that pods of this node get addresses from, of both families.
pub(super) fn own_pods(view: &View, settings: &Settings) -> impl Iterator<Item = IpNet> {
    let own = view.nodes.get(&settings.node_name);
    let nets = own.into_iter().flat_map(|node| &node.pod_cidrs);
    nets.chain(&view.pod_pools).copied()
}

pub(super) fn own_addresses(family: Family, view: &View) -> impl Iterator<Item = IpAddr> {
    let addresses = view.pods.values().flat_map(|pod| &pod.addresses).copied();
    addresses.filter(move |address| Family::of(*address) == family)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Node;
    use crate::names::NodeName;

    fn view() -> View {
        let node = |last: u8| Node {
            addresses: vec![IpAddr::from([192, 0, 2, 10 + last])],
            pod_cidrs: [format!("10.244.{last}.0/24").parse().unwrap()].into(),
            ready: true,
            ..Node::default()
        };
        View {
            nodes: [2, 3]
                .map(|n| (NodeName(format!("node{n}")), node(n)))
                .into(),
            service_cidrs: ["10.96.0.0/16".parse().unwrap()].into(),
            ..View::default()
        }
    }

    fn found(wanted: &str, pod: &str) -> (Vec<String>, bool) {
        let wanted = ExcludedDestinations {
            auto: wanted.contains("auto"),
            listed: wanted
                .split(',')
                .filter_map(|net| net.parse().ok())
                .collect(),
        };
        let found = excluded(Family::V4, &view(), &wanted, [pod.parse().unwrap()]);
        let nets = found.nets.iter().map(IpNet::to_string).collect();
        (nets, found.unknown_network_of.is_some())
    }

    #[test]
    fn constants_parse() {
        assert_eq!(constant(&LOCAL).count(), LOCAL.len());
        assert_eq!(constant(&PRIVATE).count(), PRIVATE.len());
    }

    #[test]
    fn auto_is_what_belongs_to_the_cluster_and_not_every_private_network() {
        assert_eq!(
            found("auto", "10.244.2.9"),
            (
                [
                    "10.96.0.0/16",
                    "10.244.2.0/23",
                    "127.0.0.0/8",
                    "169.254.0.0/16",
                    "192.0.2.12/31",
                    "224.0.0.0/4",
                    "255.255.255.255/32"
                ]
                .map(str::to_owned)
                .into(),
                false
            )
        );
    }

    #[test]
    fn a_pod_outside_every_pod_network_excludes_the_private_networks() {
        let (nets, fallback) = found("auto", "172.30.0.9");
        assert!(fallback);
        assert!(
            nets.contains(&"10.0.0.0/8".to_owned()) && nets.contains(&"172.16.0.0/12".to_owned())
        );
    }

    #[test]
    fn pools_of_the_cni_plugin_are_pod_networks() {
        let mut view = view();
        view.pod_pools.insert("172.30.0.0/16".parse().unwrap());
        let auto = ExcludedDestinations {
            auto: true,
            listed: BTreeSet::new(),
        };
        let found = excluded(Family::V4, &view, &auto, ["172.30.0.9".parse().unwrap()]);
        assert_eq!(found.unknown_network_of, None);
        assert!(found.nets.contains(&"172.30.0.0/16".parse().unwrap()));
    }

    #[test]
    fn a_list_replaces_auto_and_adds_to_it() {
        assert_eq!(
            found("10.0.0.0/8,10.9.0.0/16", "172.30.0.9"),
            (vec!["10.0.0.0/8".to_owned()], false)
        );
        assert!(
            found("auto,203.0.113.0/24", "10.244.2.9")
                .0
                .contains(&"203.0.113.0/24".to_owned())
        );
    }
}
