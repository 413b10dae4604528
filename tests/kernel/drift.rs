//! Damage is noticed at once, and what others do to what is theirs is not taken for it.

use std::fmt::Write as _;
use std::time::Duration;

use super::*;

/// The product's promise: damage is repaired within a second, of which noticing it is the larger part.
const SOON: Duration = Duration::from_millis(800);

async fn has_drifted(kernel: &mut NodeKernel, within: Duration) -> bool {
    drift(kernel, within).await.is_some()
}

async fn drift(kernel: &mut NodeKernel, within: Duration) -> Option<Drift> {
    let drifted = tokio::time::timeout(within, kernel.drifted());
    drifted.await.ok()
}

/// Lets what belongs to the start pass by.
async fn settle(kernel: &mut NodeKernel) {
    kernel.observe().await.unwrap();
    while has_drifted(kernel, Duration::from_millis(700)).await {}
}

async fn damage_is_noticed_at_once(mode: Mode) {
    let mut kernel = open(mode).await;
    reach(&mut kernel, &example()).await;
    settle(&mut kernel).await;
    let of_firewall: &[&str] = match mode {
        Mode::Nftables => &[
            "nft 'add table inet metaleg { flags dormant; }'",
            "nft flush chain inet metaleg leak",
            "nft delete element inet metaleg egress4 '{ 10.244.1.11 }'",
            "nft insert rule inet metaleg guard accept",
            "nft delete table inet metaleg",
        ],
        Mode::IptablesNft | Mode::IptablesLegacy => &[
            "iptables-nft -t nat -F METALEG-NAT",
            "iptables-nft -t nat -I POSTROUTING -j MASQUERADE",
            "iptables-nft -t mangle -A PREROUTING -j CONNMARK --restore-mark",
            "ip6tables-nft -t mangle -D PREROUTING 1",
            "iptables-nft -F",
            "nft flush ruleset",
        ],
    };
    let of_routes = [
        "ip rule del pref 1000",
        "ip -6 rule del pref 1001",
        "ip rule add pref 1000 fwmark 0x100000/0xf00000 lookup 7",
        "ip route del default table 100001 metric 100",
        "ip -6 route flush table 100001",
        "ip route add 203.0.113.0/24 dev eth0 table 100001",
        "ip addr add 198.51.100.1/24 dev eth0",
        "ip link set eth0 down",
        "ip link set eth0 up",
    ];
    for damage in of_firewall.iter().chain(&of_routes) {
        sh(damage);
        assert!(
            has_drifted(&mut kernel, SOON).await,
            "not noticed: {damage}"
        );
        // What is told of one damage late must not count for the next.
        settle(&mut kernel).await;
    }
    // Several at once are noticed once.
    sh("ip rule del pref 1001; ip -6 rule del pref 1000");
    assert!(has_drifted(&mut kernel, SOON).await);
    assert!(!has_drifted(&mut kernel, SOON).await);
}

each_mode!(damage_is_noticed_at_once: nftables, iptables_nft);

/// So much is told at once that the kernel drops some of it, and the damage is in what it drops.
async fn damage_that_nobody_was_told_of_is_noticed(mode: Mode) {
    let mut kernel = open(mode).await;
    reach(&mut kernel, &example()).await;
    settle(&mut kernel).await;
    // Each changes one thing by itself, so that each is told.
    let (mut of_routes, mut of_firewall) = (String::new(), String::new());
    for n in 0..4000 {
        let _ = writeln!(
            of_routes,
            "route append 203.0.113.0/24 dev eth0 table 7 metric {}",
            n + 1
        );
    }
    let _ = writeln!(of_firewall, "add table ip others; add chain ip others c");
    for _ in 0..4000 {
        of_firewall += "add rule ip others c accept\n";
    }
    for (flood, tool, damage) in [
        (of_routes, "ip -batch", "ip rule del pref 1000"),
        (
            of_firewall,
            "nft -f",
            match mode {
                Mode::Nftables => "nft flush chain inet metaleg leak",
                Mode::IptablesNft | Mode::IptablesLegacy => "iptables-nft -t nat -F METALEG-NAT",
            },
        ),
    ] {
        std::fs::write("/run/flood", flood).unwrap();
        sh(&format!("{tool} /run/flood"));
        sh(damage);
        assert!(
            has_drifted(&mut kernel, SOON).await,
            "not noticed: {damage}"
        );
        settle(&mut kernel).await;
    }
}

each_mode!(damage_that_nobody_was_told_of_is_noticed: nftables, iptables_nft);

async fn what_is_none_of_our_business_is_passed_over(mode: Mode) {
    let mut kernel = open(mode).await;
    reach(&mut kernel, &example()).await;
    settle(&mut kernel).await;
    sh("nft add table ip kube-proxy; nft add chain ip kube-proxy services; nft add rule ip kube-proxy services accept
        iptables-nft -t nat -N KUBE-SVC-1; iptables-nft -t nat -A KUBE-SVC-1 -j ACCEPT
        ip link add pod1 type veth peer name inner1; ip link set pod1 up; ip link set inner1 up
        ip route add 10.244.1.50/32 dev pod1; ip route del 10.244.1.50/32; ip link del pod1");
    assert!(!has_drifted(&mut kernel, SOON).await, "by others");
    let mut other = example();
    let firewall = &mut other.families.get_mut(&Family::V4).unwrap().firewall;
    firewall.pods.remove(&ip("10.244.1.11"));
    let routes = &mut other.families.get_mut(&Family::V6).unwrap().routes;
    routes.tables.clear();
    other.families.values_mut().for_each(rebuild_ways);
    reach(&mut kernel, &other).await;
    assert!(!has_drifted(&mut kernel, SOON).await, "by ourselves");
}

each_mode!(what_is_none_of_our_business_is_passed_over: nftables, iptables_nft);

/// What happens on a node all day long.
async fn the_noise_of_a_node_is_no_drift(mode: Mode) {
    let mut kernel = open(mode).await;
    reach(&mut kernel, &example()).await;
    settle(&mut kernel).await;
    let chains: String = (0..3000)
        .map(|n| format!("add chain ip others c{n}\nadd rule ip others c{n} accept\n"))
        .collect();
    std::fs::write("/run/chains", format!("add table ip others\n{chains}")).unwrap();
    let pods = |script: &str| {
        (1..=4)
            .map(|n| script.replace('N', &n.to_string()) + "\n")
            .collect()
    };
    let (come, go): (String, String) = (
        pods(
            "ip link add podN type veth peer name innerN; ip link set podN up; ip link set innerN up
             ip addr add 10.244.1.1/32 dev podN; ip addr add fd00:10:244:1::1/128 dev podN nodad
             ip route add 10.244.1.5N/32 dev podN",
        ),
        pods("ip link del podN"),
    );
    for (what, script) in [
        (
            "router advertisements prolong an address",
            "for n in 1 2 3 4 5 6; do
                 ip -6 addr change 2001:db8:1::11/64 dev eth0 valid_lft 1${n}00 preferred_lft 1000
             done",
        ),
        (
            "one more address of a network that is there",
            "ip -6 addr add 2001:db8:1::1234/64 dev eth0 nodad; ip -6 addr del 2001:db8:1::1234/64 dev eth0
             ip addr add 192.0.2.77/24 dev eth0; ip addr del 192.0.2.77/24 dev eth0",
        ),
        ("pods that have an address on the host's end come", &come),
        ("they go", &go),
        (
            "rules of others that take nothing of ours",
            "for n in 1 2 3; do ip rule add pref 500$n from 10.9.0.0/16 lookup 7; done
             ip rule add pref 500 to 10.9.0.0/16 lookup 7; ip -6 rule add pref 5000 lookup 7",
        ),
        ("a large transaction of others", "nft -f /run/chains"),
        (
            "a router's routes",
            "for n in $(seq 5000); do echo route append 203.0.113.0/24 dev eth0 metric $n; done >/run/routes
             ip -batch /run/routes",
        ),
        (
            "an interface is looked at with tcpdump",
            "ip link set eth0 promisc on; ip link set eth0 promisc off",
        ),
    ] {
        sh(script);
        assert_eq!(drift(&mut kernel, SOON).await, None, "{what}");
        // The next thing happens after a look that has seen this one.
        kernel.observe().await.unwrap();
    }
}

each_mode!(the_noise_of_a_node_is_no_drift: nftables, iptables_nft);

/// The whole firewall is written and removed by a tool, which is another process.
async fn what_our_tools_change_is_no_drift(mode: Mode) {
    let mut kernel = open(mode).await;
    reach(&mut kernel, &example()).await;
    settle(&mut kernel).await;
    reach(&mut kernel, &nothing()).await;
    reach(&mut kernel, &changed()).await;
    assert_eq!(drift(&mut kernel, SOON).await, None);
    // The same from another process of the same number is not ours, once ours is heard.
    let damage = match mode {
        Mode::Nftables => "nft flush chain inet metaleg leak",
        Mode::IptablesNft | Mode::IptablesLegacy => "iptables-nft -t nat -F METALEG-NAT",
    };
    sh(damage);
    assert_eq!(drift(&mut kernel, SOON).await, Some(Drift::Certain));
}

each_mode!(what_our_tools_change_is_no_drift: nftables, iptables_nft);

/// Connections are looked at only after changes that are certainly of something of ours.
#[test]
fn news_of_what_is_not_ours_is_told_from_damage() {
    in_namespace(|| async {
        let mut kernel = open(Mode::Nftables).await;
        reach(&mut kernel, &example()).await;
        settle(&mut kernel).await;
        for (script, expected) in [
            (
                "ip link add lan1 type veth peer name lan2; ip link set lan1 up; ip addr add 198.51.100.1/24 dev lan1",
                Drift::Possible,
            ),
            ("ip addr del 198.51.100.1/24 dev lan1", Drift::Possible),
            (
                "ip addr add 198.51.100.1 peer 198.51.100.2 dev lan1",
                Drift::Possible,
            ),
            ("ip link set lan1 down", Drift::Possible),
            ("ip link set lan1 up", Drift::Possible),
            ("ip link del lan1", Drift::Possible),
            (
                "ip rule add pref 999 fwmark 0x100000/0xf00000 lookup 7",
                Drift::Possible,
            ),
            ("ip rule add pref 3000 lookup 100004", Drift::Possible),
            ("ip rule del pref 1001", Drift::Certain),
            (
                "ip route add 203.0.113.0/24 dev eth0 table 100001",
                Drift::Certain,
            ),
            (
                "nft 'add table inet metaleg { flags dormant; }'",
                Drift::Certain,
            ),
        ] {
            sh(script);
            assert_eq!(drift(&mut kernel, SOON).await, Some(expected), "{script}");
            settle(&mut kernel).await;
        }
    });
}
