//! Which destinations are not egress.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::cluster::View;
use crate::settings::ExcludedDestinations;
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

/// The excluded destinations of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excluded {
    /// As few networks as cover them.
    pub nets: BTreeSet<IpNet>,
    /// A pod outside every known pod network: the reason why all private networks are excluded.
    pub unknown_network_of: Option<IpAddr>,
}

/// Finds the excluded destinations: what the operator lists, and with `auto` pod networks, Service networks and
/// addresses of nodes. An egress pod outside every known pod network means that the cluster's pod networks are
/// not known; its traffic inside the cluster is then protected by excluding all private networks.
#[must_use]
pub fn find(
    family: Family,
    view: &View,
    wanted: &ExcludedDestinations,
    pods: impl IntoIterator<Item = IpAddr>,
) -> Excluded {
    let mut nets: Vec<IpNet> = wanted.listed.iter().copied().collect();
    let mut unknown_network_of = None;
    if wanted.auto {
        let pod_cidrs: Vec<IpNet> = view
            .nodes
            .values()
            .flat_map(|node| node.pod_cidrs.iter().copied())
            .chain(view.pod_pools.iter().copied())
            .collect();
        unknown_network_of = pods
            .into_iter()
            .find(|pod| !pod_cidrs.iter().any(|cidr| cidr.contains(pod)));
        if unknown_network_of.is_some() {
            nets.extend(constant(&PRIVATE));
        }
        nets.extend(pod_cidrs);
        nets.extend(constant(&LOCAL));
        nets.extend(view.service_cidrs.iter().copied());
        let addresses = view.nodes.values().flat_map(|node| node.addresses.iter());
        nets.extend(addresses.map(|address| IpNet::from(*address)));
    }
    nets.retain(|net| Family::of_net(*net) == family);
    Excluded {
        nets: IpNet::aggregate(&nets).into_iter().collect(),
        unknown_network_of,
    }
}

fn constant(nets: &'static [&'static str]) -> impl Iterator<Item = IpNet> {
    nets.iter().filter_map(|net| net.parse().ok())
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
        let excluded = find(Family::V4, &view(), &wanted, [pod.parse().unwrap()]);
        let nets = excluded.nets.iter().map(IpNet::to_string).collect();
        (nets, excluded.unknown_network_of.is_some())
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
        let excluded = find(Family::V4, &view, &auto, ["172.30.0.9".parse().unwrap()]);
        assert_eq!(excluded.unknown_network_of, None);
        assert!(excluded.nets.contains(&"172.30.0.0/16".parse().unwrap()));
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
