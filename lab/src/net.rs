//! The wires: one LAN with control plane, nodes, a server and a router, and a second network behind the router.

use std::net::IpAddr;

use anyhow::Result;

use crate::host::Host;
use crate::{Family, Masquerade};

/// Address of the API server.
pub const CONTROL_PLANE: [&str; 2] = ["192.0.2.1", "2001:db8:1::1"];
/// Addresses of the server on the LAN.
pub const LAN_SERVER: [&str; 2] = ["192.0.2.100", "2001:db8:1::100"];
/// Addresses of the router on the LAN.
const ROUTER: [&str; 2] = ["192.0.2.254", "2001:db8:1::fe"];
/// Addresses of the server behind the router.
pub const FAR_SERVER: [&str; 2] = ["198.51.100.10", "2001:db8:2::10"];

/// Addresses of a node, counted from 1.
#[must_use]
pub fn node(number: usize) -> [String; 2] {
    [
        format!("192.0.2.{}", 10 + number),
        format!("2001:db8:1::{}", 10 + number),
    ]
}

/// Pod networks of a node.
#[must_use]
pub fn pod_nets(number: usize) -> [String; 2] {
    [
        format!("10.244.{number}.0/24"),
        format!("fd00:10:244:{number}::/64"),
    ]
}

/// Addresses of the n-th pod of a node.
#[must_use]
pub fn pod(number: usize, n: usize) -> [String; 2] {
    [
        format!("10.244.{number}.{}", 10 + n),
        format!("fd00:10:244:{number}::{:x}", 10 + n),
    ]
}

/// The address of a family out of a pair.
#[must_use]
pub fn pick<S: AsRef<str>>(pair: &[S; 2], family: Family) -> IpAddr {
    let text = match family {
        Family::V4 => pair[0].as_ref(),
        Family::V6 => pair[1].as_ref(),
    };
    // All pairs of this file are addresses.
    text.parse().unwrap_or(IpAddr::from([0, 0, 0, 0]))
}

/// Hardware address of a node, by which the wire tells who announces.
#[must_use]
pub fn node_mac(number: usize) -> String {
    format!("02:00:00:00:00:{:02x}", 10 + number)
}

/// The addresses above have room for so many.
pub(crate) const MOST_NODES: usize = 80;

/// The same as bytes.
pub(crate) fn node_mac_bytes(number: usize) -> [u8; 6] {
    let last = u8::try_from(10 + number).unwrap_or_default();
    [2, 0, 0, 0, 0, last]
}

/// Addresses are there at once, none comes from a router, and everybody may ask by ICMP.
const HOST: &str = "
    sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0 \
        net.ipv6.conf.all.accept_ra=0 net.ipv6.conf.default.accept_ra=0
    sysctl -qw net.ipv4.ping_group_range='0 0'";
const FORWARD: &str = "
    sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1";

/// Makes the bridge of the LAN.
///
/// # Errors
/// When a command fails.
pub fn make_lan(lan: &Host) -> Result<()> {
    lan.sh("ip link add lan type bridge mcast_snooping 0 forward_delay 0 && ip link set lan up")?;
    Ok(())
}

/// Joins a host to the LAN with an `eth0` of these addresses.
///
/// # Errors
/// When a command fails.
pub fn join(lan: &Host, host: &Host, mac: &str, addresses: &[impl AsRef<str>; 2]) -> Result<()> {
    let (name, pid) = (&host.name, host.pid());
    lan.sh(&format!(
        "ip link add {name} type veth peer name eth0 address {mac} netns {pid}
         ip link set {name} master lan up"
    ))?;
    let [v4, v6] = addresses;
    let (v4, v6) = (v4.as_ref(), v6.as_ref());
    host.sh(&format!(
        "{HOST}
         ip link set eth0 up
         ip addr add {v4}/24 dev eth0
         ip addr add {v6}/64 dev eth0 nodad"
    ))?;
    Ok(())
}

/// Connects router and far server, and gives everybody on the LAN the router as default.
///
/// # Errors
/// When a command fails.
pub fn make_far_side(router: &Host, far: &Host) -> Result<()> {
    let pid = far.pid();
    router.sh(&format!(
        "{FORWARD}
         ip link add eth1 type veth peer name eth0 netns {pid}
         ip link set eth1 up
         ip addr add 198.51.100.1/24 dev eth1
         ip addr add 2001:db8:2::1/64 dev eth1 nodad"
    ))?;
    far.sh(&format!(
        "{HOST}
         ip link set eth0 up
         ip addr add 198.51.100.10/24 dev eth0
         ip addr add 2001:db8:2::10/64 dev eth0 nodad
         ip route add default via 198.51.100.1
         ip -6 route add default via 2001:db8:2::1"
    ))?;
    Ok(())
}

/// Routes everything that is not on the LAN to the router.
///
/// # Errors
/// When a command fails.
pub fn default_route(host: &Host) -> Result<()> {
    let [v4, v6] = ROUTER;
    host.sh(&format!(
        "ip route add default via {v4}; ip -6 route add default via {v6}"
    ))?;
    Ok(())
}

/// Routes pod networks to their nodes. Servers and router get these routes, too: a packet that leaks with a
/// pod's address is answered and seen, not lost.
///
/// # Errors
/// When a command fails.
pub fn routes_to_pods(host: &Host, nodes: usize, own: Option<usize>) -> Result<()> {
    let mut script = String::new();
    for n in (1..=nodes).filter(|n| Some(*n) != own) {
        let ([net4, net6], [via4, via6]) = (pod_nets(n), node(n));
        script += &format!("ip route add {net4} via {via4}; ip -6 route add {net6} via {via6}\n");
    }
    if !script.is_empty() {
        host.sh(&script)?;
    }
    Ok(())
}

/// Turns a host into a node: forwarding, the masquerade of a CNI plugin, and the hint of a kubelet which mode
/// of iptables this node uses. Before anything else touches the packet filter there, as on a real node.
///
/// # Errors
/// When a command fails.
pub fn make_node(host: &Host, number: usize, masquerade: Masquerade) -> Result<()> {
    host.sh(FORWARD)?;
    program_node(host, number, masquerade)
}

/// Takes everything from a node that a reboot takes from its packet filter and its routing rules.
///
/// # Errors
/// When a command fails.
pub fn empty_node(host: &Host) -> Result<()> {
    host.sh(
        "nft flush ruleset
         for tool in iptables-legacy ip6tables-legacy; do
           for table in nat mangle filter; do $tool -t $table -F; $tool -t $table -X; done
         done
         ipset destroy || true
         for family in -4 -6; do
           ip $family rule | sed -n 's/^\\([1-9][0-9]*\\):.*/\\1/p' | while read place; do
             [ $place -ge 32766 ] || ip $family rule del pref $place
           done
           ip $family route show table all | sed -n 's/.* table \\([0-9][0-9]*\\).*/\\1/p' | sort -u |
             while read table; do ip $family route flush table $table; done
         done
         conntrack -F; conntrack -F -f ipv6",
    )?;
    Ok(())
}

/// What CNI plugin and kubelet put into a node's packet filter.
///
/// # Errors
/// When a command fails.
pub fn program_node(host: &Host, number: usize, masquerade: Masquerade) -> Result<()> {
    let [net4, net6] = pod_nets(number);
    let (all4, all6) = ("10.244.0.0/16", "fd00:10:244::/48");
    let mode = masquerade.iptables_mode();
    let rules = match masquerade {
        Masquerade::NftTable => format!(
            "nft -f - <<'END'
             table inet cni {{
               chain postrouting {{
                 type nat hook postrouting priority srcnat; policy accept;
                 ip saddr {net4} ip daddr != {all4} masquerade
                 ip6 saddr {net6} ip6 daddr != {all6} masquerade
               }}
             }}\nEND\n"
        ),
        Masquerade::IptablesNft | Masquerade::IptablesLegacy => format!(
            "iptables-{mode} -t nat -A POSTROUTING -s {net4} ! -d {all4} -j MASQUERADE
             ip6tables-{mode} -t nat -A POSTROUTING -s {net6} ! -d {all6} -j MASQUERADE"
        ),
    };
    host.sh(&format!(
        "{rules}
         iptables-{mode} -t mangle -N KUBE-IPTABLES-HINT
         ip6tables-{mode} -t mangle -N KUBE-IPTABLES-HINT"
    ))?;
    Ok(())
}

/// Connects a pod to its node with a link of its own, as many CNI plugins do.
///
/// Pods open connections from ports that no other pod uses: where two pods with one VIP take the same port to the
/// same server by chance, the second one is remapped, and does not survive a move of the VIP. That limit is known
/// and documented; tests that meet it by chance would say nothing.
///
/// # Errors
/// When a command fails.
pub fn connect_pod(
    node: &Host,
    number: usize,
    pod_host: &Host,
    link: &str,
    n: usize,
) -> Result<()> {
    let [v4, v6] = pod(number, n);
    let [gate4, gate6] = [
        format!("10.244.{number}.1"),
        format!("fd00:10:244:{number}::1"),
    ];
    let pid = pod_host.pid();
    let first_port = 20_000 + 1_000 * n;
    let last_port = first_port + 999;
    node.sh(&format!(
        "ip link add {link} type veth peer name eth0 netns {pid}
         ip link set {link} up
         ip addr add {gate4}/32 dev {link}
         ip addr add {gate6}/128 dev {link} nodad
         ip route add {v4}/32 dev {link}
         ip -6 route add {v6}/128 dev {link}"
    ))?;
    pod_host.sh(&format!(
        "{HOST}
         sysctl -qw net.ipv4.ip_local_port_range='{first_port} {last_port}'
         ip link set eth0 up
         ip addr add {v4}/32 dev eth0
         ip addr add {v6}/128 dev eth0 nodad
         ip route add {gate4} dev eth0; ip route add default via {gate4}
         ip -6 route add {gate6} dev eth0; ip -6 route add default via {gate6}"
    ))?;
    Ok(())
}
