use std::time::Duration;

use super::*;

/// The product's promise: damage is repaired within a second, of which noticing it is the larger part.
const SOON: Duration = Duration::from_millis(800);

async fn is_disturbed(kernel: &mut NodeKernel, within: Duration) -> bool {
    tokio::time::timeout(within, kernel.drifted()).await.is_ok()
}

/// Lets what belongs to the start pass by.
async fn settle(kernel: &mut NodeKernel) {
    kernel.links().await.unwrap();
    while is_disturbed(kernel, Duration::from_millis(700)).await {}
}

fn damage_is_noticed_at_once(mode: Mode, damages: &'static [&'static str]) {
    in_namespace(move || async move {
        let mut kernel = open(mode).await;
        reach(&mut kernel, &example()).await;
        settle(&mut kernel).await;
        let of_routes = [
            "ip rule del pref 1000",
            "ip -6 rule del pref 1099",
            "ip rule add pref 1002 fwmark 0x100000/0xf00000 lookup 7",
            "ip route del default table 100001 metric 100",
            "ip -6 route flush table 100001",
            "ip route add 203.0.113.0/24 dev eth0 table 100001",
            "ip addr add 198.51.100.1/24 dev eth0",
            "ip link set eth0 down",
            "ip link set eth0 up",
        ];
        for damage in damages.iter().chain(&of_routes) {
            sh(damage);
            assert!(
                is_disturbed(&mut kernel, SOON).await,
                "not noticed: {damage}"
            );
        }
        // Several at once are noticed once.
        sh("ip rule del pref 1098; ip rule del pref 1001; ip -6 rule del pref 1098");
        assert!(is_disturbed(&mut kernel, SOON).await);
        assert!(!is_disturbed(&mut kernel, SOON).await);
    });
}

#[test]
fn own_damage_is_noticed_at_once() {
    damage_is_noticed_at_once(
        Mode::Own,
        &[
            "nft flush chain inet metaleg leak",
            "nft delete element inet metaleg egress4 '{ 10.244.1.11 }'",
            "nft insert rule inet metaleg guard accept",
            "nft delete table inet metaleg",
        ],
    );
}

#[test]
fn nft_damage_is_noticed_at_once() {
    damage_is_noticed_at_once(
        Mode::Nft,
        &[
            "iptables-nft -t nat -F METALEG-NAT",
            "iptables-nft -t nat -I POSTROUTING -j MASQUERADE",
            "ip6tables-nft -t mangle -D PREROUTING 1",
            "iptables-nft -F",
            "nft flush ruleset",
        ],
    );
}

#[test]
fn what_is_none_of_our_business_is_passed_over() {
    for mode in [Mode::Own, Mode::Nft] {
        in_namespace(move || async move {
            let mut kernel = open(mode).await;
            reach(&mut kernel, &example()).await;
            settle(&mut kernel).await;
            sh("nft add table ip kube-proxy; nft add chain ip kube-proxy services; nft add rule ip kube-proxy services accept
                iptables-nft -t nat -N KUBE-SVC-1; iptables-nft -t nat -A KUBE-SVC-1 -j ACCEPT
                ip link add pod1 type veth peer name inner1; ip link set pod1 up; ip link set inner1 up
                ip route add 10.244.1.50/32 dev pod1; ip route del 10.244.1.50/32; ip link del pod1");
            assert!(!is_disturbed(&mut kernel, SOON).await, "by others");
            let mut other = example();
            let firewall = &mut other.families.get_mut(&Family::V4).unwrap().firewall;
            firewall.pods.remove(&ip("10.244.1.11"));
            let routes = &mut other.families.get_mut(&Family::V6).unwrap().routes;
            routes.tables.clear();
            reach(&mut kernel, &other).await;
            assert!(!is_disturbed(&mut kernel, SOON).await, "by ourselves");
        });
    }
}
