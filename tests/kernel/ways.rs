//! A mark is not a way: rules of others come ahead of ours, ours are lost, and others set our bits or take them away.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use socket2::SockRef;

use super::*;
use crate::hosts::{connect_hosts, prepare_gateway};
use crate::server::{Carried, PORT, Seen, Server, all_from};
use crate::states::{labelled, labelled_all, lookups};
use crate::talk::Talk;

/// The network of pods, the router, and the server with its network, as `ip` takes them.
const PLACES: [[&str; 4]; 2] = [
    ["-4", "10.244.0.0/16", "192.0.2.254", "198.51.100.10"],
    ["-6", "fd00:10:244::/48", "2001:db8:1::fe", "2001:db8:2::10"],
];

/// What is ahead of our rules, how it comes and how it goes. It knows nothing of marks.
const AHEAD: [[&str; 3]; 3] = [
    [
        "a node with an uplink of its own for pods",
        "ip F route add default via ROUTER table 500; ip F rule add pref 500 from PODS lookup 500",
        "ip F rule del pref 500",
    ],
    [
        "a VPN agent that prefers all of main but its default, and a server on the LAN",
        "ip F neigh replace SERVER lladdr 02:00:00:00:00:fe dev eth0
         ip F route add SERVER dev eth0; ip F rule add pref 105 lookup main suppress_prefixlength 0",
        "ip F rule del pref 105; ip F route del SERVER dev eth0",
    ],
    [
        "IPsec with a table of its own",
        "ip F route add SERVER via ROUTER table 220; ip F rule add pref 220 lookup 220",
        "ip F rule del pref 220",
    ],
];

fn in_each_family(script: &str) -> String {
    let of = |[option, pods, router, server]: [&str; 4]| {
        script
            .replace(" F ", &format!(" {option} "))
            .replace("PODS", pods)
            .replace("ROUTER", router)
            .replace("SERVER", server)
    };
    PLACES.map(of).join("\n")
}

fn vips_of(number: usize) -> Seen {
    all_from(&Family::ALL.map(|family| vip(family, number)).into())
}

/// The families in which the backend sees where a packet really goes. There is no realm in IPv6.
fn seeing(mode: Mode) -> &'static [Family] {
    match mode {
        Mode::Nftables => &Family::ALL,
        Mode::IptablesNft | Mode::IptablesLegacy => &[Family::V4],
    }
}

/// The pod's own addresses, in the families in which nothing sees that they leave.
fn overlooked(mode: Mode) -> Seen {
    let unseen = Family::ALL
        .iter()
        .filter(|family| !seeing(mode).contains(family));
    all_from(&unseen.map(|family| pod(*family, 12)).collect())
}

/// The rule that drops what does not go where its mark says.
fn by_another_way(mode: Mode) -> &'static str {
    match mode {
        Mode::Nftables => "leak",
        Mode::IptablesNft | Mode::IptablesLegacy => "way",
    }
}

async fn rules_of_others_that_come_first_let_nothing_out(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    for [what, come, go] in AHEAD {
        let talk = Talk::connected(12);
        assert_eq!(talk.arrive(&mut server, &vips_of(0)), vips_of(0), "{what}");
        talk.wait_for_acknowledgements();
        let before = mode.met(by_another_way(mode));
        sh(&in_each_family(come));
        server.seen();
        let mut seen = Seen::new();
        eventually("packets", || {
            talk.send();
            seen.extend(server.seen());
            let met = mode.met(by_another_way(mode));
            let mut met = Family::ALL.iter().zip(met.iter().zip(before));
            met.all(|(family, (now, before))| !seeing(mode).contains(family) || *now > before + 5)
                && seen.is_superset(&overlooked(mode))
        });
        std::thread::sleep(Duration::from_millis(100));
        seen.extend(server.seen());
        assert_eq!(seen, overlooked(mode), "{what}");
        sh(&in_each_family(go));
        server.seen();
    }
}

each_mode!(rules_of_others_that_come_first_let_nothing_out);

/// Where nothing sees the next hop, what leaves by another interface than the LAN's is seen all the same.
async fn a_rule_of_others_that_leads_off_the_lan_lets_nothing_out(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    sh("ip netns add uplink; ip link add uplink type veth peer name peer netns uplink; ip link set uplink up
        ip -n uplink link set peer up; ip addr add 203.0.113.1/24 dev uplink
        ip addr add 2001:db8:3::1/64 dev uplink nodad
        ip netns exec uplink nft 'table inet seen { chain arrivals { type filter hook prerouting priority -300
            ip saddr 10.244.1.12 counter
            ip6 saddr fd00:10:244:1::12 counter
        }; }'
        for router in 203.0.113.254 2001:db8:3::fe; do
            ip neigh add $router dev uplink lladdr $(ip -n uplink -br link show peer | awk '{ print $3 }')
            ip route add default via $router table 500
        done
        ip rule add pref 500 from 10.244.0.0/16 lookup 500
        ip -6 rule add pref 500 from fd00:10:244::/48 lookup 500");
    reach_and_die(mode, &labelled(12));
    let talk = Talk::of(12);
    eventually("packets", || {
        talk.send();
        let met = mode.met(by_another_way(mode));
        met.iter().all(|packets| *packets > 5)
    });
    let seen = sh("ip netns exec uplink nft list table inet seen");
    assert_eq!(seen.matches("packets 0 bytes 0").count(), 2, "{seen}");
}

each_mode!(a_rule_of_others_that_leads_off_the_lan_lets_nothing_out);

/// As systemd-networkd does when it is restarted, unless it is told not to.
const FLUSH: &str = "for family in -4 -6; do
        ip $family rule | sed -n 's/^\\([0-9]*\\):.*proto 77.*/rule del pref \\1/p' | ip $family -force -batch -
        ip $family route flush table all proto 77
    done";

async fn lost_rules_and_routes_let_nothing_out_until_they_are_repaired(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    let mut kernel = open(mode).await;
    reach(&mut kernel, &labelled(12)).await;
    let talk = Talk::connected(12);
    assert_eq!(talk.arrive(&mut server, &vips_of(0)), vips_of(0));

    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let pod = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            talk.send();
        }
    });
    let allowed = &vips_of(0) | &overlooked(mode);
    for _ in 0..10 {
        sh(FLUSH);
        let drifted = tokio::time::timeout(Duration::from_secs(1), kernel.drifted());
        drifted.await.unwrap();
        reach(&mut kernel, &labelled(12)).await;
        let mut seen = server.seen();
        eventually("the pod's packets with the VIP again", || {
            let now = server.seen();
            let is_again = now.is_superset(&vips_of(0));
            seen.extend(now);
            is_again
        });
        assert!(seen.is_subset(&allowed), "{seen:?}");
    }
    stop.store(true, Ordering::Relaxed);
    pod.join().unwrap();
    // Without a repair nothing leaves, for as long as it takes.
    drop(kernel);
    sh(FLUSH);
    std::thread::sleep(Duration::from_millis(100));
    server.seen();
    let before = mode.met(by_another_way(mode));
    let talk = Talk::of(12);
    let mut seen = Seen::new();
    eventually("packets", || {
        talk.send();
        seen.extend(server.seen());
        let met = mode.met(by_another_way(mode));
        met[0] > before[0] + 20
    });
    assert!(seen.is_subset(&overlooked(mode)), "{seen:?}");
}

each_mode!(lost_rules_and_routes_let_nothing_out_until_they_are_repaired);

/// Somebody sets marks on what pods of this node send, as Cilium and Calico do.
fn mark_packets_of(pods: &[u8], mark: &str) {
    let of = |last: &u8| {
        format!(
            "ip saddr 10.244.1.{last} meta mark set {mark}
             ip6 saddr fd00:10:244:1::{last} meta mark set {mark}\n"
        )
    };
    let rules: String = pods.iter().map(of).collect();
    sh(&format!(
        "nft delete table inet marks 2>/dev/null || true
         nft 'table inet marks {{ chain arrivals {{ type filter hook prerouting priority -300
            {rules}
         }}; }}'"
    ));
}

/// What the plan is where others may set our bits: every rule is about a pod.
fn with_a_shared_mask(state: &mut KernelState) {
    for (family, state) in &mut state.families {
        let of_pod = lookups(1).map(|rule| Rule {
            from: Some(pod(*family, 12)),
            ..rule
        });
        state.routes.rules = of_pod.into();
        rebuild_ways(state);
    }
}

fn of_node() -> Seen {
    all_from(&Family::ALL.map(node).into())
}

/// Whatever has the address of this node.
fn count_what_comes_by_the_gateway() {
    on("gateway", || {
        sh(
            "nft 'table inet passed { chain forwarded { type filter hook forward priority 0
                ip saddr 192.0.2.11 counter
                ip6 saddr 2001:db8:1::11 counter
            }; }'",
        )
    });
}

fn by_the_gateway() -> Vec<u64> {
    let listed = on("gateway", || sh("nft list table inet passed"));
    let counts = listed.split("packets ").skip(1);
    let count = |text: &str| text.split(' ').next().unwrap().parse().unwrap();
    counts.map(count).collect()
}

/// Everybody's packets go where they would go without us: those of an ordinary pod, those of a pod whose gateway is here.
async fn marks_of_others_that_are_no_gateways_mislead_nobody(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    let mut kernel = open(mode).await;
    // Bits of ours among theirs; 3 is no slot in use.
    let mark = "0x30390f00";
    mark_packets_of(&[12, 13], mark);
    reach(&mut kernel, &labelled_all(&[12])).await;
    assert_eq!(Talk::of(13).arrive(&mut server, &of_node()), of_node());
    assert_eq!(Talk::of(12).arrive(&mut server, &vips_of(0)), vips_of(0));

    reach(&mut kernel, &labelled_all(&[12, 13])).await;
    assert_eq!(Talk::of(13).arrive(&mut server, &vips_of(1)), vips_of(1));
    assert_eq!(Talk::of(12).arrive(&mut server, &vips_of(0)), vips_of(0));

    // The node's own programs mark theirs, too.
    for family in Family::ALL {
        let socket = UdpSocket::bind((node(family), 0)).unwrap();
        SockRef::from(&socket).set_mark(0x6d6f_6c65).unwrap();
        let expected = Seen::from([(Carried::Udp, node(family))]);
        let mut seen = Seen::new();
        eventually("packets of the node", || {
            socket.send_to(b"x", (outside(family), PORT)).unwrap();
            seen.extend(server.seen());
            !seen.is_empty()
        });
        assert_eq!(seen, expected);
    }
}

each_mode!(marks_of_others_that_are_no_gateways_mislead_nobody);

async fn marks_of_others_that_are_a_gateways_mislead_nobody_where_that_is_expected(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    let mut kernel = open(mode).await;
    mark_packets_of(&[12, 13], "0x00100f00");
    // Where it is not expected, an ordinary pod's packets go by the gateway.
    count_what_comes_by_the_gateway();
    reach(&mut kernel, &labelled_all(&[12])).await;
    let talk = Talk::of(13);
    eventually("misled packets", || {
        talk.send();
        by_the_gateway().iter().all(|packets| *packets > 0)
    });

    let mut ordinary = labelled_all(&[12]);
    let mut both = labelled_all(&[12, 13]);
    with_a_shared_mask(&mut ordinary);
    with_a_shared_mask(&mut both);
    for (state, of_other) in [(ordinary, of_node()), (both, vips_of(1))] {
        reach(&mut kernel, &state).await;
        let before = by_the_gateway();
        server.seen();
        assert_eq!(Talk::of(13).arrive(&mut server, &of_other), of_other);
        assert_eq!(by_the_gateway(), before);
        assert_eq!(Talk::of(12).arrive(&mut server, &vips_of(0)), vips_of(0));
    }
    // Whose own rules are lost does not leave.
    sh("ip rule del pref 1000; ip -6 rule del pref 1000");
    server.seen();
    Talk::of(12).send();
    server.sees_nothing();
}

each_mode!(marks_of_others_that_are_a_gateways_mislead_nobody_where_that_is_expected);

/// As scripts for several uplinks do. Where marks are set before DNAT, a rule of others may stand after ours.
async fn a_mark_that_others_take_away_lets_nothing_out(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    let mut kernel = open(mode).await;
    reach(&mut kernel, &labelled(12)).await;
    for tool in mode.tools() {
        sh(&format!(
            "{tool} -t mangle -A PREROUTING -j CONNMARK --restore-mark"
        ));
    }
    let talk = Talk::of(12);
    eventually("packets", || {
        talk.send();
        let met = mode.met("unrouted");
        met.iter().all(|packets| *packets > 5)
    });
    server.sees_nothing();

    assert_ne!(observe(&mut kernel).await, labelled(12));
    reach(&mut kernel, &labelled(12)).await;
    for tool in mode.tools() {
        let chain = sh(&format!("{tool} -t mangle -S PREROUTING"));
        let last = chain.lines().last().unwrap_or_default();
        assert!(last.ends_with("-j METALEG-MARK"), "{chain}");
    }
    assert_eq!(talk.arrive(&mut server, &vips_of(0)), vips_of(0));
}

each_mode!(a_mark_that_others_take_away_lets_nothing_out: iptables_nft, iptables_legacy);
