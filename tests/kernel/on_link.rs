//! How nodes are reached: as the kernel says, whatever the networks of addresses are, and how long that holds.

use std::time::Duration;

use metaleg::ethernet::Mac;
use metaleg::names::Reach;
use metaleg::state::{Asked, Observed};

use super::*;

/// The product's promise: what has changed is seen within a second.
const SOON: Duration = Duration::from_millis(800);

/// How these addresses are reached, as a pass that reads everything finds it.
async fn reach(kernel: &mut NodeKernel, addresses: &[&str]) -> Vec<Reach> {
    let mut observed = kernel.observe().await.unwrap();
    complete(kernel, addresses, &mut observed).await
}

/// The same, of a pass that knows the kernel.
async fn complete(
    kernel: &mut NodeKernel,
    addresses: &[&str],
    observed: &mut Observed,
) -> Vec<Reach> {
    kernel.look_up(&nodes(addresses), observed).await.unwrap();
    assert_eq!(observed.reach.len(), addresses.len());
    let reach = addresses.iter().map(|a| observed.reach[&ip(a)].clone());
    reach.collect()
}

fn nodes(addresses: &[&str]) -> Asked {
    Asked {
        nodes: addresses.iter().map(|a| ip(a)).collect(),
        ..Asked::default()
    }
}

fn on_link(interface: &str) -> Reach {
    Reach::OnLink(interface.to_owned())
}

fn unreachable() -> Reach {
    Reach::Unreachable("Network is unreachable (os error 101)".to_owned())
}

async fn has_drifted(kernel: &mut NodeKernel) -> bool {
    tokio::time::timeout(SOON, kernel.drifted()).await.is_ok()
}

async fn settle(kernel: &mut NodeKernel) {
    while has_drifted(kernel).await {}
}

/// As DHCPv6 and some providers give them.
const WITHOUT_NETWORKS: &str = "
    ip addr flush dev eth0 scope global
    ip addr add 192.0.2.11/32 dev eth0; ip addr add 2001:db8:1::11/128 dev eth0 nodad";

#[test]
fn an_address_without_a_network_reaches_what_a_route_says() {
    in_namespace(|| async {
        let nodes = ["192.0.2.12", "2001:db8:1::12"];
        sh(WITHOUT_NETWORKS);
        let mut kernel = open(Mode::Nftables).await;
        assert_eq!(
            reach(&mut kernel, &nodes).await,
            [unreachable(), unreachable()]
        );
        let addresses = kernel.observe().await.unwrap().interfaces;
        let addresses = addresses.into_iter().find(|link| link.name == "eth0");
        let addresses = addresses.unwrap().addresses;
        assert!(addresses.contains(&ip("192.0.2.11")) && addresses.contains(&ip("2001:db8:1::11")));
        settle(&mut kernel).await;
        for (route, expected) in [
            (
                "route add 192.0.2.0/24 dev eth0 scope link",
                [on_link("eth0"), unreachable()],
            ),
            (
                "-6 route add 2001:db8:1::/64 dev eth0 proto ra metric 100",
                [on_link("eth0"), on_link("eth0")],
            ),
            (
                "route del 192.0.2.0/24 dev eth0",
                [unreachable(), on_link("eth0")],
            ),
            (
                "route add default dev eth0",
                [on_link("eth0"), on_link("eth0")],
            ),
        ] {
            sh(&format!("ip {route}"));
            assert!(has_drifted(&mut kernel).await, "not noticed: {route}");
            assert_eq!(reach(&mut kernel, &nodes).await, expected, "{route}");
            settle(&mut kernel).await;
        }
    });
}

#[test]
fn the_longest_network_wins_over_the_first_interface() {
    in_namespace(|| async {
        sh("ip link del eth0; ip link add wide type veth peer name wire1; ip link add eth0 type veth peer name wire2
            for link in wide eth0 wire1 wire2; do ip link set $link up; done
            ip addr add 10.0.0.11/8 dev wide; ip addr add 10.1.2.11/24 dev eth0
            ip -6 addr add fd00::11/32 dev wide nodad; ip -6 addr add fd00:0:1::11/64 dev eth0 nodad");
        let mut kernel = open(Mode::Nftables).await;
        let nodes = ["10.1.2.12", "10.1.3.12", "fd00:0:1::12", "fd00:0:2::12"];
        let expected = ["eth0", "wide", "eth0", "wide"].map(on_link);
        assert_eq!(reach(&mut kernel, &nodes).await, expected);
    });
}

#[test]
fn behind_a_router_or_a_rejecting_route_is_not_on_link_nor_is_the_node_itself() {
    in_namespace(|| async {
        sh("ip route add 198.51.100.0/24 via 192.0.2.254; ip -6 route add 2001:db8:2::/64 via 2001:db8:1::fe
            ip route add 203.0.113.0/24 via inet6 2001:db8:1::fe
            ip route add unreachable 192.0.2.13; ip -6 route add unreachable 2001:db8:1::13
            ip route add blackhole 192.0.2.14; ip -6 route add blackhole 2001:db8:1::14
            ip route add prohibit 192.0.2.15; ip -6 route add prohibit 2001:db8:1::15
            ip addr add 192.0.2.99/32 dev lo; ip addr add 2001:db8:1::99/128 dev lo
            ip route add 192.0.2.16/32 dev lo");
        let mut kernel = open(Mode::Nftables).await;
        let router = |address: &str| Reach::Router(ip(address));
        for (address, expected) in [
            ("198.51.100.12", Some(router("192.0.2.254"))),
            ("2001:db8:2::12", Some(router("2001:db8:1::fe"))),
            ("203.0.113.12", Some(router("2001:db8:1::fe"))),
            ("192.0.2.11", Some(Reach::Own)),
            ("2001:db8:1::11", Some(Reach::Own)),
            ("192.0.2.99", Some(Reach::Own)),
            ("2001:db8:1::99", Some(Reach::Own)),
            ("192.0.2.13", None),
            ("192.0.2.14", None),
            ("192.0.2.15", None),
            ("192.0.2.16", None),
            ("2001:db8:1::13", None),
            ("2001:db8:1::14", None),
            ("2001:db8:1::15", None),
            ("192.0.2.12", Some(on_link("eth0"))),
        ] {
            let [reach] = &reach(&mut kernel, &[address]).await[..] else {
                panic!("one question, one answer");
            };
            match expected {
                Some(expected) => assert_eq!(*reach, expected, "{address}"),
                None => assert!(matches!(reach, Reach::Unreachable(_)), "{address}: {reach}"),
            }
        }
    });
}

#[test]
fn only_unknown_addresses_are_looked_up_and_thousands_at_once() {
    in_namespace(|| async {
        let mut kernel = open(Mode::Nftables).await;
        let mut observed = kernel.observe().await.unwrap();
        let node = ["192.0.2.12"];
        assert_eq!(
            complete(&mut kernel, &node, &mut observed).await,
            [on_link("eth0")]
        );
        sh("ip link set eth0 down");
        let both = ["192.0.2.12", "192.0.2.13"];
        let reach = complete(&mut kernel, &both, &mut observed).await;
        assert_eq!(
            reach,
            [on_link("eth0"), unreachable()],
            "as it was, and as it is"
        );
        assert_eq!(
            complete(&mut kernel, &node, &mut observed).await,
            [on_link("eth0")]
        );
        sh("ip link set eth0 up");
        let many = (0..5000_u16).map(|n| {
            let [high, low] = n.to_be_bytes();
            let octets = [192, if n % 2 == 0 { 0 } else { 1 }, 2 + high, low];
            IpAddr::from(octets)
        });
        sh("ip addr add 192.0.3.1/16 dev eth0; ip route add default via 192.0.2.254");
        let many = Asked {
            vips: many.collect(),
            ..Asked::default()
        };
        kernel.look_up(&many, &mut observed).await.unwrap();
        for (address, reach) in &observed.reach {
            let expected = match address {
                IpAddr::V4(v4) if v4.octets()[1] == 1 => Reach::Router(ip("192.0.2.254")),
                IpAddr::V4(_) | IpAddr::V6(_) => on_link("eth0"),
            };
            assert_eq!(*reach, expected, "{address}");
        }
        assert_eq!(observed.reach.len(), 5000);
    });
}

#[test]
fn what_changes_the_way_to_a_node_is_noticed_and_other_routes_are_not() {
    in_namespace(|| async {
        sh("ip link add eth1 type veth peer name wire1; ip link set wire1 up; ip link set eth1 up");
        let mut kernel = open(Mode::Nftables).await;
        let nodes = ["192.0.2.12", "203.0.113.12", "2001:db8:1::12"];
        sh("ip route add 203.0.113.0/24 dev eth1 scope link");
        reach(&mut kernel, &nodes).await;
        settle(&mut kernel).await;
        for change in [
            "ip route add 192.0.2.0/25 via 192.0.2.254",
            "ip route add 192.0.2.12/32 dev eth1 scope link",
            "ip -6 route add unreachable 2001:db8:1::12",
            "ip -6 route del unreachable 2001:db8:1::12",
            // Without an address of its own, and IPv4 does not tell of routes that go with a link.
            "ip link set eth1 down",
        ] {
            sh(change);
            assert!(has_drifted(&mut kernel).await, "not noticed: {change}");
            reach(&mut kernel, &nodes).await;
            settle(&mut kernel).await;
        }
        sh("ip link add pod1 type veth peer name inner1; ip link set pod1 up; ip link set inner1 up
            ip route add 10.244.1.50/32 dev pod1 scope link; ip -6 route add fd00:10:244:1::50 dev pod1
            ip route add 10.244.2.0/24 via 192.0.2.12; ip route add default via 192.0.2.254
            ip -6 route add default via 2001:db8:1::fe; ip route del 10.244.1.50/32
            ip link del pod1");
        assert!(!has_drifted(&mut kernel).await, "none of it is on the way");
    });
}

/// The link-layer addresses of other nodes, as a pass that reads everything finds them.
async fn neighbours(kernel: &mut NodeKernel, asked: &Asked) -> Vec<(String, Mac)> {
    let mut observed = kernel.observe().await.unwrap();
    kernel.look_up(asked, &mut observed).await.unwrap();
    let found = observed.neighbours.into_iter();
    found.map(|(a, mac)| (a.to_string(), mac)).collect()
}

#[test]
fn the_link_layer_addresses_of_nodes_are_known_and_news_only_when_they_change() {
    in_namespace(|| async {
        sh("ip link add eth1 type veth peer name wire1; ip link set wire1 up; ip link set eth1 up");
        let mut kernel = open(Mode::Nftables).await;
        let asked = Asked {
            nodes: [
                "192.0.2.12",
                "192.0.2.13",
                "198.51.100.14",
                "2001:db8:1::12",
            ]
            .map(ip)
            .into(),
            // On link, and announced by one node after the other.
            vips: [ip("192.0.2.200")].into(),
        };
        assert_eq!(neighbours(&mut kernel, &asked).await, []);
        settle(&mut kernel).await;
        let of = |n: u8| Mac([2, 0, 0, 0, 0, n]);
        let v4 = |n: u8| ("192.0.2.12".to_owned(), of(n));
        let v6 = |n: u8| ("2001:db8:1::12".to_owned(), of(n));
        let at = |change: &str| format!("ip neigh replace {change}");
        for (change, is_news, expected) in [
            (
                at("192.0.2.12 lladdr 02:00:00:00:00:02 dev eth0 nud reachable"),
                true,
                vec![v4(2)],
            ),
            (
                at("192.0.2.12 lladdr 02:00:00:00:00:02 dev eth0 nud stale"),
                false,
                vec![v4(2)],
            ),
            (
                at("192.0.2.12 lladdr 02:00:00:00:00:02 dev eth0 nud permanent"),
                false,
                vec![v4(2)],
            ),
            (
                at("2001:db8:1::12 lladdr 02:00:00:00:00:02 dev eth0 nud stale"),
                true,
                vec![v4(2), v6(2)],
            ),
            (
                at("192.0.2.12 lladdr 02:00:00:00:00:22 dev eth0 nud stale"),
                true,
                vec![v4(0x22), v6(2)],
            ),
            // Nobody answers any more, and nobody has asked for long.
            (
                at("192.0.2.12 dev eth0 nud failed"),
                false,
                vec![v4(0x22), v6(2)],
            ),
            (
                "ip neigh flush dev eth0".to_owned(),
                false,
                vec![v4(0x22), v6(2)],
            ),
            (
                at("192.0.2.12 lladdr 02:00:00:00:00:22 dev eth0 nud stale"),
                false,
                vec![v4(0x22), v6(2)],
            ),
            // Not asked about, not on link, on another interface.
            (
                at("10.244.1.11 lladdr 02:00:00:00:00:31 dev eth0 nud reachable"),
                false,
                vec![v4(0x22), v6(2)],
            ),
            (
                at("192.0.2.200 lladdr 02:00:00:00:00:32 dev eth0 nud reachable"),
                false,
                vec![v4(0x22), v6(2)],
            ),
            (
                at("198.51.100.14 lladdr 02:00:00:00:00:33 dev eth0 nud reachable"),
                false,
                vec![v4(0x22), v6(2)],
            ),
            (
                at("192.0.2.13 lladdr 02:00:00:00:00:34 dev eth1 nud reachable"),
                false,
                vec![v4(0x22), v6(2)],
            ),
        ] {
            sh(&change);
            assert_eq!(has_drifted(&mut kernel).await, is_news, "{change}");
            assert!(!has_drifted(&mut kernel).await, "{change}: told twice");
            assert_eq!(neighbours(&mut kernel, &asked).await, expected, "{change}");
        }
        let fewer = nodes(&["2001:db8:1::12"]);
        assert_eq!(neighbours(&mut kernel, &fewer).await, [v6(2)]);
    });
}
