//! Which node was the gateway of each VIP, as an earlier run of the agent left it in the kernel.
//!
//! A restarted agent may find no announcer: MetalLB's object can be missing for long. The routes in the kernel show
//! which node the pods left through until now.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::cluster::Node;
use crate::names::NodeName;
use crate::state::KernelState;

/// The gateways that pods of each VIP are routed to in the kernel, as nodes.
pub fn gateways(
    observed: &KernelState,
    nodes: &BTreeMap<NodeName, Node>,
    own: &NodeName,
) -> BTreeMap<IpAddr, NodeName> {
    let mut gateways = BTreeMap::new();
    for state in observed.families.values() {
        let hops = state.next_hops();
        for (pod, facts) in &state.firewall.pods {
            let node = match facts.gateway_here {
                true => Some(own),
                false => hops.of(*pod).and_then(|(_, hop)| node_of(hop.via, nodes)),
            };
            if let (Some(vip), Some(node)) = (facts.vips.first(), node) {
                gateways.entry(*vip).or_insert_with(|| node.clone());
            }
        }
    }
    gateways
}

fn node_of(address: IpAddr, nodes: &BTreeMap<NodeName, Node>) -> Option<&NodeName> {
    let mut nodes = nodes.iter();
    let (name, _) = nodes.find(|(_, node)| node.addresses.contains(&address))?;
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{
        Family, FamilyState, Mark, NextHop, PodState, Rule, RuleAction, Table, TableId,
    };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn node(n: u8) -> NodeName {
        NodeName(format!("node{n}"))
    }

    /// On node1 of three. Slot 1 is of node2, slots 2 and 3 share a mark: the latter serves 10.244.1.13 alone.
    fn kernel() -> KernelState {
        let mut state = FamilyState::default();
        for (slot, table, from) in [(1, 1, None), (2, 2, None), (2, 3, Some(ip("10.244.1.13")))] {
            let gateway = NextHop {
                via: IpAddr::from([192, 0, 2, 11 + table]),
                dev: "eth0".to_owned(),
            };
            let table = TableId(100_000 + u32::from(table));
            state.routes.rules.insert(Rule {
                priority: 1002,
                action: RuleAction::Lookup(table),
                mark: Some(mark(slot)),
                not: false,
                from,
                to: None,
            });
            let content = Table {
                fallback: true,
                gateway: Some(gateway),
                ..Table::default()
            };
            state.routes.tables.insert(table, content);
        }
        KernelState {
            families: [(Family::V4, state)].into(),
            ..KernelState::default()
        }
    }

    fn mark(slot: u32) -> Mark {
        Mark {
            value: slot << 20,
            mask: 0x00f0_0000,
        }
    }

    fn pod(vip: &str, mark: Option<Mark>) -> PodState {
        PodState {
            egress: true,
            vips: [ip(vip)].into(),
            mark,
            gateway_here: mark.is_none(),
            ..PodState::default()
        }
    }

    fn adopted(pods: &[(&str, PodState)]) -> Vec<(IpAddr, NodeName)> {
        let mut kernel = kernel();
        let firewall = &mut kernel.families.get_mut(&Family::V4).unwrap().firewall;
        firewall.pods = pods.iter().map(|(a, p)| (ip(a), p.clone())).collect();
        let facts = |n: u8| Node {
            addresses: vec![IpAddr::from([192, 0, 2, 10 + n])],
            ..Node::default()
        };
        // Slot 2 leads to 192.0.2.13, slot 3 to 192.0.2.14: the latter is of no node.
        let nodes = (1..=3).map(|n| (node(n), facts(n))).collect();
        gateways(&kernel, &nodes, &node(1)).into_iter().collect()
    }

    #[test]
    fn the_gateway_is_this_node_or_the_node_that_the_pods_table_leads_to() {
        let vip = "192.0.2.200";
        for (what, address, state, expected) in [
            ("here", "10.244.1.11", pod(vip, None), Some(node(1))),
            (
                "shared rule",
                "10.244.1.11",
                pod(vip, Some(mark(1))),
                Some(node(2)),
            ),
            (
                "shared mark",
                "10.244.1.12",
                pod(vip, Some(mark(2))),
                Some(node(3)),
            ),
            (
                "rule of its own, unknown hop",
                "10.244.1.13",
                pod(vip, Some(mark(2))),
                None,
            ),
            (
                "mark without a rule",
                "10.244.1.11",
                pod(vip, Some(mark(9))),
                None,
            ),
        ] {
            let expected: Vec<_> = expected.map(|node| (ip(vip), node)).into_iter().collect();
            assert_eq!(adopted(&[(address, state)]), expected, "{what}");
        }
    }

    #[test]
    fn of_two_pods_of_one_vip_the_first_that_has_a_gateway_decides() {
        let (one, other) = (ip("192.0.2.200"), ip("192.0.2.201"));
        let lost = PodState {
            gateway_here: false,
            ..pod("192.0.2.200", None)
        };
        let pods = [
            ("10.244.1.10", lost),
            ("10.244.1.11", pod("192.0.2.200", Some(mark(1)))),
            ("10.244.1.12", pod("192.0.2.200", None)),
            ("10.244.1.14", pod("192.0.2.201", None)),
        ];
        assert_eq!(adopted(&pods), [(one, node(2)), (other, node(1))]);
    }
}
