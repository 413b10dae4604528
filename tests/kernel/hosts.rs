//! Hosts beside this node, each a namespace: `outside` is a server, `gateway` the node that announces the first VIP,
//! and `pods` has pods of this node. The second VIP is announced by this node.

use super::*;
use crate::namespace::forgo_duplicate_detection;

/// Pods that there are, by the last part of their addresses.
pub(crate) const PODS: [u8; 2] = [12, 13];

pub(crate) fn connect_hosts(mode: Mode) {
    add_namespace("lan");
    add_namespace("pods");
    sh("ip link set wire netns lan; ip -n lan link add bridge type bridge; ip -n lan link set bridge up
        ip -n lan link set wire master bridge up
        ip link add pods type veth peer name eth0 netns pods
        ip link set pods up; ip -n pods link set eth0 up
        ip addr add 10.244.1.1/24 dev pods; ip addr add fd00:10:244:1::1/64 dev pods nodad
        ip netns exec pods sysctl -qw net.ipv4.ping_group_range='0 2147483647'");
    for last in PODS {
        sh(&format!(
            "ip -n pods addr add 10.244.1.{last}/24 dev eth0
             ip -n pods addr add fd00:10:244:1::{last}/64 dev eth0 nodad"
        ));
    }
    sh(
        "ip -n pods route add default via 10.244.1.1; ip -n pods route add default via fd00:10:244:1::1",
    );
    add_host("outside", 254, ["192.0.2.254/24", "2001:db8:1::fe/64"]);
    // It knows its routes; a gateway, which sends on to the LAN that a packet came from, would tell it better ones.
    sh("ip -n outside addr add 198.51.100.10/32 dev lo; ip -n outside addr add 2001:db8:2::10/128 dev lo
        ip netns exec outside sysctl -qw net.ipv4.conf.all.accept_redirects=0 \
            net.ipv4.conf.eth0.accept_redirects=0 net.ipv6.conf.eth0.accept_redirects=0
        ip -n outside route add 10.244.1.0/24 via 192.0.2.11
        ip -n outside route add fd00:10:244:1::/64 via 2001:db8:1::11");
    add_gateway("gateway", 12, mode);
    for address in ["192.0.2.200/32", "2001:db8:1::c8/128"] {
        sh(&format!(
            "ip -n gateway addr add {address} dev eth0 nodad preferred_lft 0"
        ));
    }
    sh(
        "for address in 192.0.2.201/32 2001:db8:1:ffff:ffff:ffff:ffff:ffff/128; do
            ip addr add $address dev eth0 nodad preferred_lft 0
        done
        ip -n outside route add 2001:db8:1:ffff:ffff:ffff:ffff:ffff via 2001:db8:1::11
        ip route add default via 192.0.2.254; ip route add default via 2001:db8:1::fe",
    );
    become_router(mode);
}

fn add_namespace(host: &str) {
    sh(&format!("ip netns add {host}"));
    on(host, || {
        forgo_duplicate_detection();
        sh("ip link set lo up");
    });
}

/// Another host of the network that nodes are on.
fn add_host(host: &str, last: u8, addresses: [&str; 2]) {
    add_namespace(host);
    sh(&format!(
        "ip link add eth0 netns {host} address 02:00:00:00:00:{last:02x} type veth peer name {host} netns lan
         ip -n lan link set {host} master bridge up; ip -n {host} link set eth0 up"
    ));
    for address in addresses {
        sh(&format!("ip -n {host} addr add {address} dev eth0 nodad"));
    }
}

/// Another node, which knows where the pods of this one are.
pub(crate) fn add_gateway(host: &str, last: u8, mode: Mode) {
    add_host(
        host,
        last,
        [
            &format!("192.0.2.{last}/24"),
            &format!("2001:db8:1::{last}/64"),
        ],
    );
    on(host, || {
        sh("ip route add 10.244.1.0/24 via 192.0.2.11; ip route add fd00:10:244:1::/64 via 2001:db8:1::11
            ip route add default via 192.0.2.254; ip route add default via 2001:db8:1::fe");
        become_router(mode);
    });
}

/// Forwards, and masquerades what pods send to outside, as CNI plugins do.
fn become_router(mode: Mode) {
    sh("echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding");
    for (tool, pods) in mode
        .tools()
        .iter()
        .zip(["10.244.0.0/16", "fd00:10:244::/48"])
    {
        sh(&format!(
            "{tool} -t nat -A POSTROUTING -s {pods} ! -d {pods} -j MASQUERADE"
        ));
    }
}

/// What the gateway of a pod is to have in its kernel.
pub(crate) fn gateway_of(pods: &[u8]) -> KernelState {
    let mut state = unlabelled();
    for (family, FamilyState { routes, firewall }) in &mut state.families {
        *routes = RouteState::default();
        firewall.landmarks = [Landmark::Lan("eth0".to_owned())].into();
        let net = match family {
            Family::V4 => "10.244.1.0/24",
            Family::V6 => "fd00:10:244:1::/64",
        };
        firewall.remote_pods = [net.parse().unwrap()].into();
        firewall.vips = [vip(*family, 0)].into();
        let here = PodState {
            egress: true,
            vips: firewall.vips.clone(),
            gateway_here: true,
            ..PodState::default()
        };
        let pods = pods.iter().map(|last| (pod(*family, *last), here.clone()));
        firewall.pods = pods.collect();
    }
    state
}

/// The agent of the gateway has done its work.
pub(crate) fn prepare_gateway(mode: Mode) {
    on("gateway", || reach_and_die(mode, &gateway_of(&[12])));
}

/// The first VIP is no address of the gateway, as with `MetalLB`: packets to it are forwarded.
pub(crate) fn route_first_vip_to(gateway: u8) {
    sh(&format!(
        "ip -n gateway addr del 192.0.2.200/32 dev eth0 2>/dev/null || true
         ip -n gateway addr del 2001:db8:1::c8/128 dev eth0 2>/dev/null || true
         ip -n outside route replace 192.0.2.200 via 192.0.2.{gateway}
         ip -n outside route replace 2001:db8:1::c8 via 2001:db8:1::{gateway}"
    ));
}
