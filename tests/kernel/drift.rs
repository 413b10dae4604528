//! Damage is noticed at once, and what others do to what is theirs is not taken for it.

use std::fmt::Write as _;
use std::time::Duration;

use super::*;

/// The product's promise: damage is repaired within a second, of which noticing it is the larger part.
const SOON: Duration = Duration::from_millis(800);

async fn has_drifted(kernel: &mut NodeKernel, within: Duration) -> bool {
    tokio::time::timeout(within, kernel.drifted()).await.is_ok()
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
            "nft flush chain inet metaleg leak",
            "nft delete element inet metaleg egress4 '{ 10.244.1.11 }'",
            "nft insert rule inet metaleg guard accept",
            "nft delete table inet metaleg",
        ],
        Mode::IptablesNft | Mode::IptablesLegacy => &[
            "iptables-nft -t nat -F METALEG-NAT",
            "iptables-nft -t nat -I POSTROUTING -j MASQUERADE",
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
