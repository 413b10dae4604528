//! Which of what surrounds this node is in the way of which Service.
//!
//! An obstacle is told where it is: by the node that has a Service's pods, or that is their gateway. It changes nothing:
//! what is lost is lost by others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::cluster::View;
use crate::names::{NodeName, ObjectKey, Reach};
use crate::plan::egress::Egress;
use crate::plan::pods::EgressPod;
use crate::state::{DroppingFilter, Family, NextHop, Obstacle, Passage, RuleAhead, Surroundings};

/// What this node has to do with a Service.
#[derive(Default)]
struct Part<'a> {
    /// Its pods here.
    own: Vec<IpAddr>,
    /// Where they are routed to, if that is another node.
    hop: Option<&'a NextHop>,
    /// Its pods on other nodes, where this one is their gateway.
    passing: Vec<(IpAddr, Option<&'a NodeName>)>,
}

/// The obstacles of each Service in a family; those without any are left out.
pub(super) fn obstacles(
    family: Family,
    view: &View,
    pods: &BTreeMap<IpAddr, EgressPod<'_>>,
    egress: &BTreeMap<&ObjectKey, Egress<'_>>,
    excluded: &BTreeSet<IpNet>,
) -> Vec<(ObjectKey, BTreeSet<Obstacle>)> {
    let Some(surroundings) = view.surroundings.get(&family) else {
        return Vec::new();
    };
    let mut parts: BTreeMap<&ObjectKey, Part<'_>> = BTreeMap::new();
    for (address, pod) in pods {
        let egress = egress.get(pod.service).filter(|e| !e.is_released());
        let Some(egress) = egress else {
            continue;
        };
        if pod.local {
            let part = parts.entry(pod.service).or_default();
            part.own.push(*address);
            part.hop = egress.hop();
        } else if egress.is_gateway_here() {
            let part = parts.entry(pod.service).or_default();
            part.passing.push((*address, pod.node));
        }
    }
    let judge = Judge {
        family,
        view,
        surroundings,
        excluded,
    };
    let found = parts.into_iter();
    let found = found.map(|(service, part)| (service.clone(), judge.of(&part)));
    found.filter(|(_, found)| !found.is_empty()).collect()
}

struct Judge<'a> {
    family: Family,
    view: &'a View,
    surroundings: &'a Surroundings,
    excluded: &'a BTreeSet<IpNet>,
}

impl Judge<'_> {
    fn of(&self, part: &Part<'_>) -> BTreeSet<Obstacle> {
        let mut found = self.surroundings.obstacles.clone();
        let filters = self.surroundings.filters.iter();
        found.extend(filters.flat_map(|filter| forward_drops(filter, part)));
        let rules = self.surroundings.rules.iter();
        let rules = rules.filter(|rule| self.takes(rule, part));
        found.extend(rules.map(|rule| Obstacle::RuleAhead(rule.text.clone())));
        let off = self.surroundings.not_forwarding.iter();
        let off = off.filter(|name| self.leads_to_nodes(name));
        found.extend(
            off.map(|name| Obstacle::ForwardingOff(format!("net.ipv4.conf.{name}.forwarding"))),
        );
        found.extend(self.answers_dropped(part));
        found.extend(self.passage_dropped(part));
        found
    }

    /// Whether a rule comes between this node's marked pods and their gateway.
    fn takes(&self, rule: &RuleAhead, part: &Part<'_>) -> bool {
        let is_of_pods = |net: &IpNet| part.own.iter().any(|pod| net.contains(pod));
        let is_inside = |net: &IpNet| self.excluded.iter().any(|inside| inside.contains(net));
        part.hop.is_some()
            && rule.from.as_ref().is_none_or(is_of_pods)
            && !rule.to.as_ref().is_some_and(is_inside)
            && !rule
                .interface
                .as_ref()
                .is_some_and(|name| self.leads_to_nodes(name))
    }

    /// Whether other nodes are directly reached by an interface: no pod of this node is.
    fn leads_to_nodes(&self, name: &str) -> bool {
        let mut addresses = self.view.nodes.values().flat_map(|node| &node.addresses);
        addresses.any(|address| self.interface_to(address) == Some(name))
    }

    /// The interface that an address is on link at.
    fn interface_to(&self, address: &IpAddr) -> Option<&str> {
        match self.view.reach.get(address)? {
            Reach::OnLink(name) => Some(name),
            Reach::Router(_) | Reach::Own | Reach::Unreachable(_) => None,
        }
    }

    /// The answers to this node's pods come from the gateway as it reaches them: by a tunnel, if the CNI plugin has one.
    fn answers_dropped(&self, part: &Part<'_>) -> Option<Obstacle> {
        let reverse_path = &self.surroundings.reverse_path;
        let hop = part.hop?;
        let mut nodes = self.view.nodes.values();
        let gateway = nodes.find(|node| node.addresses.contains(&hop.via));
        let mut nets = gateway.into_iter().flat_map(|gateway| &gateway.pod_cidrs);
        let pods = nets.find(|net| Family::of_net(**net) == self.family);
        let by = pods.and_then(|net| reverse_path.interface_to(net.network()));
        // What only the default route knows is reached as the gateway is.
        let is_known = |by: &&str| Some(*by) != reverse_path.interface_to_outside();
        let by = by.filter(is_known).unwrap_or(&hop.dev);
        let outside = reverse_path.interface_to_outside()?;
        let drops = reverse_path.strict.contains(by) && outside != by;
        drops.then(|| Obstacle::StrictReversePath(by.to_owned(), Passage::OwnPods))
    }

    /// Packets of other nodes' pods come in from their nodes.
    fn passage_dropped(&self, part: &Part<'_>) -> Option<Obstacle> {
        let reverse_path = &self.surroundings.reverse_path;
        // All pods of a node are reached in one way.
        let one_each: BTreeMap<&NodeName, IpAddr> = part
            .passing
            .iter()
            .filter_map(|(pod, node)| Some(((*node)?, *pod)))
            .collect();
        one_each.into_iter().find_map(|(node, pod)| {
            let addresses = &self.view.nodes.get(node)?.addresses;
            let mut addresses = addresses.iter().filter(|a| Family::of(**a) == self.family);
            let by = addresses.find_map(|address| self.interface_to(address))?;
            let back = reverse_path.interface_to(pod)?;
            let drops = reverse_path.strict.contains(by) && back != by;
            drops.then(|| Obstacle::StrictReversePath(by.to_owned(), Passage::PodsOfOthers))
        })
    }
}

/// Ordinary pods of this node must pass its filters, too, by whatever rules: its egress pods do unless it is certain that
/// they do not. Packets that come in from another node and leave again are nothing that others provide for: they do not
/// pass unless it is certain.
fn forward_drops<'a>(
    filter: &'a DroppingFilter,
    part: &Part<'_>,
) -> impl Iterator<Item = Obstacle> + 'a {
    let drops_own = part.own.iter().any(|pod| !filter.accepts(*pod)) && !filter.is_conditional;
    let drops_passing = part.passing.iter().any(|(pod, _)| !filter.accepts(*pod));
    let dropped = [
        drops_own.then_some(Passage::OwnPods),
        drops_passing.then_some(Passage::PodsOfOthers),
    ];
    let obstacle = |passage| Obstacle::ForwardDrop(filter.chain.clone(), passage);
    dropped.into_iter().flatten().map(obstacle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Node;
    use crate::cluster::leases::BootId;
    use crate::fixtures::{With, endpoint, ip, key, service, slice};
    use crate::plan::plan;
    use crate::plan::slots::Slots;
    use crate::settings::Settings;
    use crate::state::{Accepted, ReversePath};

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    /// Three nodes with a pod of Service `a` on node1 and node2 each, announced by one of the nodes. Pods of node N are
    /// reached through `flannel.1`, nodes through `eth1`, the rest through `eth0`.
    fn view(announcer: u8, surroundings: Surroundings) -> View {
        let node = |n: u8| NodeName(format!("node{n}"));
        let boot = || Some(BootId("first".to_owned()));
        let address = |n: u8| IpAddr::from([192, 0, 2, 10 + n]);
        let on_link = || Reach::OnLink("eth1".to_owned());
        let facts = |n: u8| Node {
            addresses: vec![address(n)],
            pod_cidrs: [net(&format!("10.244.{n}.0/24"))].into(),
            ready: true,
            boot: boot(),
            programmed: boot(),
            ..Node::default()
        };
        let vip = "192.0.2.200";
        let endpoints = [
            endpoint("10.244.1.11", "node1"),
            endpoint("10.244.2.11", "node2"),
        ];
        let view = View {
            nodes: (1..=3).map(|n| (node(n), facts(n))).collect(),
            announcers: [(ip(vip), node(announcer))].into(),
            reach: (1..=3).map(|n| (address(n), on_link())).collect(),
            surroundings: [(Family::V4, surroundings)].into(),
            ..View::default()
        };
        view.with(service("a").created(1).vip(vip))
            .with(slice("a-4", "a", endpoints))
    }

    /// What node1 tells Service `a`: as the gateway, and where it only has a pod.
    fn told(surroundings: &Surroundings) -> [Vec<String>; 2] {
        [1, 3].map(|announcer| {
            let view = view(announcer, surroundings.clone());
            let settings = Settings::default_on("node1");
            let desired = plan(&view, &settings, &[Family::V4].into(), &Slots::default());
            let found = desired.obstacles.get(&key("a"));
            let found = found.and_then(|families| families.get(&Family::V4));
            let label = |o: &Obstacle| match o {
                Obstacle::ForwardDrop(_, passage) | Obstacle::StrictReversePath(_, passage) => {
                    format!("{} {passage:?}", o.label())
                }
                other => other.label().to_owned(),
            };
            found.into_iter().flatten().map(label).collect()
        })
    }

    fn nothing() -> Vec<String> {
        Vec::new()
    }

    #[test]
    fn a_filter_is_in_the_way_of_those_that_it_does_not_accept() {
        let filter = |pods: &[&str], is_conditional| Surroundings {
            filters: [DroppingFilter {
                sources: pods.iter().map(|pods| net(pods)).collect(),
                answered: [net("0.0.0.0/0")].into(),
                is_conditional,
                ..DroppingFilter::default()
            }]
            .into(),
            ..Surroundings::default()
        };
        let (own, others) = ("ForwardDrop OwnPods", "ForwardDrop PodsOfOthers");
        for (pods, is_conditional, gateway, pods_node) in [
            (vec![], false, vec![own, others], vec![own]),
            // A bridge of the CNI plugin's.
            (vec![], true, vec![others], vec![]),
            (vec!["10.244.1.0/24"], false, vec![others], vec![]),
            (vec!["10.244.2.0/24"], false, vec![own], vec![own]),
            (vec!["10.244.0.0/16"], false, vec![], vec![]),
        ] {
            let told = told(&filter(&pods, is_conditional));
            assert_eq!(told, [gateway, pods_node], "{pods:?} {is_conditional}");
        }
    }

    #[test]
    fn a_rule_ahead_is_in_the_way_of_this_nodes_pods_on_their_way_to_another_node() {
        let rule = |from: Option<&str>, to: Option<&str>, interface: Option<&str>| RuleAhead {
            text: String::new(),
            from: from.map(net),
            to: to.map(net),
            interface: interface.map(str::to_owned),
        };
        for (rule, expected) in [
            (rule(None, None, None), true),
            (rule(Some("10.244.0.0/16"), None, None), true),
            (rule(Some("10.244.2.0/24"), None, None), false),
            (rule(Some("192.0.2.11/32"), None, None), false),
            (rule(None, Some("198.51.100.0/24"), None), true),
            // Inside the cluster.
            (rule(None, Some("10.244.2.0/24"), None), false),
            (rule(None, None, Some("cni0")), true),
            (rule(None, None, Some("eth1")), false),
        ] {
            let surroundings = Surroundings {
                rules: [rule.clone()].into(),
                ..Surroundings::default()
            };
            let expected = match expected {
                true => vec!["RuleAhead".to_owned()],
                false => nothing(),
            };
            assert_eq!(told(&surroundings), [nothing(), expected], "{rule:?}");
        }
    }

    #[test]
    fn a_strict_reverse_path_is_in_the_way_where_packets_come_back_by_another_interface() {
        let reverse_path = |strict: &str, routes: &[(&str, &str)]| Surroundings {
            reverse_path: ReversePath {
                strict: [strict.to_owned()].into(),
                routes: routes
                    .iter()
                    .map(|(to, by)| (net(to), (*by).to_owned()))
                    .collect(),
            },
            ..Surroundings::default()
        };
        let outside = |by| ("0.0.0.0/0", by);
        let pods = |n: u8, by| match n {
            2 => ("10.244.2.0/24", by),
            _ => ("10.244.3.0/24", by),
        };
        let (own, others) = (
            "StrictReversePath OwnPods",
            "StrictReversePath PodsOfOthers",
        );
        // As datapath experiments have shown: host routes always work, tunnels only with loose filters.
        for (strict, routes, gateway, pods_node) in [
            (
                "eth1",
                vec![outside("eth1"), pods(2, "eth1"), pods(3, "eth1")],
                vec![],
                vec![],
            ),
            (
                "eth1",
                vec![outside("eth1"), pods(2, "flannel.1"), pods(3, "flannel.1")],
                vec![others],
                vec![],
            ),
            (
                "flannel.1",
                vec![outside("eth1"), pods(2, "flannel.1"), pods(3, "flannel.1")],
                vec![],
                vec![own],
            ),
            // The default route is by another interface than the nodes.
            (
                "eth1",
                vec![outside("eth0"), pods(2, "eth1"), pods(3, "eth1")],
                vec![],
                vec![own],
            ),
            (
                "eth0",
                vec![outside("eth0"), pods(2, "eth1"), pods(3, "eth1")],
                vec![],
                vec![],
            ),
            // Without routes nothing is foreseen.
            ("eth1", vec![], vec![], vec![]),
        ] {
            let told = told(&reverse_path(strict, &routes));
            assert_eq!(told, [gateway, pods_node], "{strict} {routes:?}");
        }
    }

    #[test]
    fn what_concerns_the_node_is_told_to_every_service_that_it_has_to_do_with() {
        let surroundings = Surroundings {
            obstacles: [Obstacle::StrictTracking].into(),
            not_forwarding: ["eth1", "docker0"].map(str::to_owned).into(),
            ..Surroundings::default()
        };
        let expected = vec!["ForwardingOff".to_owned(), "StrictTracking".to_owned()];
        assert_eq!(told(&surroundings), [expected.clone(), expected]);
        // On a node that is neither the gateway nor has a pod.
        let view = view(1, surroundings);
        let settings = Settings::default_on("node3");
        let desired = plan(&view, &settings, &[Family::V4].into(), &Slots::default());
        assert_eq!(desired.obstacles, BTreeMap::new());
    }

    #[test]
    fn packets_are_accepted_where_the_operator_wants_it_and_there_are_any() {
        for (node, wanted, expected) in [
            ("node1", true, true),
            ("node2", true, true),
            ("node3", true, false),
            ("node1", false, false),
        ] {
            let settings = Settings {
                forward_accept: wanted,
                ..Settings::default_on(node)
            };
            let view = view(1, Surroundings::default());
            let desired = plan(&view, &settings, &[Family::V4].into(), &Slots::default());
            let pods = ["10.244.1.0/24", "10.244.2.0/23"].map(net);
            let accepted = expected.then(|| Accepted::Sources(pods.into()));
            assert_eq!(desired.kernel.accepted.get(&Family::V4), accepted.as_ref());
        }
    }
}
