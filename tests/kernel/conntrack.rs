//! Connections that are forgotten, resumed, and what may still come of them.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Instant;

use super::*;
use crate::hosts::{add_gateway, connect_hosts, prepare_gateway, route_first_vip_to};
use crate::server::{Carried, Seen, Server, all_from};
use crate::states::{agent_dies_after, labelled, slot};
use crate::talk::Talk;

fn insert(source: &str, destination: &str, reply: [&str; 2], port: u16) -> String {
    let [reply_source, reply_destination] = reply;
    format!(
        "conntrack -I -s {source} -d {destination} -r {reply_source} -q {reply_destination} \
         -p udp --sport {port} --dport 53 --reply-port-src 53 --reply-port-dst {port} -t 600 >/dev/null 2>&1\n"
    )
}

/// The sets that forgetting relies on.
async fn install(kernel: &mut NodeKernel) {
    let steps =
        Family::ALL.map(|family| Step::Firewall(FirewallStep::Install(family, BTreeSet::new())));
    let failed = kernel.apply(&steps).await;
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn exactly_the_outside_connections_of_the_pods_are_forgotten() {
    in_namespace(|| async {
        let mut kernel = open(Mode::IptablesNft).await;
        sh(
            "iptables-nft -A FORWARD -m conntrack --ctstate NEW; ip6tables-nft -A FORWARD -m conntrack --ctstate NEW",
        );
        let (pod, other) = ("10.244.1.11", "10.244.1.12");
        let (pod6, outside6) = ("fd00:10:244:1::b", "2001:db8:2::10");
        let outside = "198.51.100.10";
        sh(&[
            insert(pod, outside, [outside, "192.0.2.200"], 1001),
            insert(pod, outside, [outside, pod], 1002),
            insert(other, outside, [outside, other], 1003),
            insert(pod, "10.96.0.10", ["10.244.2.11", pod], 1004),
            insert(outside, "192.0.2.200", [pod, outside], 1005),
            insert(pod6, outside6, [outside6, "2001:db8:1::c8"], 1006),
            insert(outside6, pod6, [pod6, outside6], 1007),
        ]
        .concat());
        let steps = [
            Step::Connection(ConnectionStep::Forget(ip(pod))),
            Step::Connection(ConnectionStep::Forget(ip(pod6))),
        ];
        install(&mut kernel).await;
        let inside = "10.244.0.0/16".parse().unwrap();
        let exclude = FirewallStep::AddNet(NetSet::Excluded, inside);
        let failed = kernel.apply(&[Step::Firewall(exclude)]).await;
        assert!(failed.is_empty(), "{failed:?}");
        let failed = kernel.apply(&steps).await;
        assert!(failed.is_empty(), "{failed:?}");
        // Of those that are forgotten, only the replies to the second one come to the pod itself.
        let late = sh(
            "ipset list METALEG-LATE-REPLIES-4 | sed '1,/Members/d'; ipset list METALEG-LATE-REPLIES-6 | sed '1,/Members/d'",
        );
        assert!(
            late.starts_with("10.244.1.11,udp:1002,198.51.100.10 timeout"),
            "{late}"
        );
        assert_eq!(late.lines().count(), 1, "{late}");
        let left = sh("conntrack -L -f ipv4 2>/dev/null; conntrack -L -f ipv6 2>/dev/null");
        let left: Vec<bool> = (1001..=1007)
            .map(|port| left.contains(&format!("sport={port} ")))
            .collect();
        assert_eq!(left, [false, false, true, true, true, false, true]);
    });
}

async fn thousands_of_connections_are_forgotten_at_once(mode: Mode) {
    let mut kernel = open(mode).await;
    sh("iptables-nft -A OUTPUT -m conntrack --ctstate NEW; ip6tables-nft -A OUTPUT -m conntrack --ctstate NEW
        ip route add default via 192.0.2.254; ip neigh add 192.0.2.254 lladdr 02:00:00:00:00:fe dev eth0
        ip route add default via 2001:db8:1::fe; ip neigh add 2001:db8:1::fe lladdr 02:00:00:00:00:fe dev eth0");
    install(&mut kernel).await;
    for source in ["192.0.2.11", "2001:db8:1::11"].map(ip) {
        let socket = std::net::UdpSocket::bind((source, 0)).unwrap();
        for n in 0..5000_u16 {
            let [high, low] = n.to_be_bytes();
            let to: IpAddr = match source {
                IpAddr::V4(_) => [198, 18, high, low].into(),
                IpAddr::V6(_) => [0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, n].into(),
            };
            socket.send_to(b"x", (to, 53)).unwrap();
        }
        let family = if source.is_ipv4() { "ipv4" } else { "ipv6" };
        let count = || {
            let list = sh(&format!(
                "conntrack -L -f {family} -s {source} 2>/dev/null | wc -l"
            ));
            list.trim().parse::<usize>().unwrap()
        };
        assert!(
            count() >= 4000,
            "the kernel keeps {} of the connections",
            count()
        );
        let started = Instant::now();
        let failed = kernel
            .apply(&[Step::Connection(ConnectionStep::Forget(source))])
            .await;
        println!(
            "forgot about 5,000 connections of {source} in {:?}",
            started.elapsed()
        );
        assert!(failed.is_empty(), "{failed:?}");
        assert_eq!(count(), 0, "connections of {source}");
    }
}

each_mode!(thousands_of_connections_are_forgotten_at_once: nftables, iptables_nft);

/// How many seconds longer a reply to a pod of IPv4 is waited for.
fn seconds_left(mode: Mode) -> u64 {
    if mode != Mode::Nftables {
        let listed = sh("ipset save METALEG-LATE-REPLIES-4");
        let member = listed.lines().find(|line| line.starts_with("add "));
        let timeout = member.and_then(|line| line.split_once(" timeout "));
        return timeout.unwrap().1.parse().unwrap();
    }
    let listed = sh("nft -j list set inet metaleg late_replies4");
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let objects = listed["nftables"].as_array().unwrap();
    let mut sets = objects.iter().filter(|object| object["set"].is_object());
    sets.next().unwrap()["set"]["elem"][0]["elem"]["expires"]
        .as_u64()
        .unwrap()
}

async fn late_replies_are_expected_anew(mode: Mode) {
    let mut kernel = open(mode).await;
    install(&mut kernel).await;
    sh("conntrack -L >/dev/null 2>&1; iptables-nft -A FORWARD -m conntrack --ctstate NEW");
    let (pod, outside) = ("10.244.1.11", "198.51.100.10");
    let forget = [Step::Connection(ConnectionStep::Forget(ip(pod)))];
    sh(&insert(pod, outside, [outside, pod], 1002));
    apply(&mut kernel, &forget).await;
    let at_first = seconds_left(mode);
    eventually("time passes", || seconds_left(mode) + 2 <= at_first);
    sh(&insert(pod, outside, [outside, pod], 1002));
    apply(&mut kernel, &forget).await;
    assert!(seconds_left(mode) + 1 >= at_first);
}

each_mode!(late_replies_are_expected_anew);

/// A reply that comes when its connection has been forgotten must not begin one from outside: what the pod sends next
/// would be an answer, which leaves as it is.
async fn a_late_reply_begins_no_connection(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    let mut kernel = open(mode).await;
    let talk = Talk::of(12);
    let vips: BTreeSet<IpAddr> = Family::ALL.map(|family| vip(family, 0)).into();
    let expected = all_from(&vips);
    assert_eq!(talk.arrive(&mut server, &expected), expected);

    let pods = Family::ALL.map(|family| pod(family, 12));
    let forget = pods.map(|pod| Step::Connection(ConnectionStep::Forget(pod)));
    apply(&mut kernel, &forget).await;
    for (server, pod) in server.udp.iter().zip(&talk.udp) {
        server.send_to(b"late", pod.local_addr().unwrap()).unwrap();
    }
    eventually("packets", || {
        mode.met("late-reply").iter().all(|packets| *packets > 0)
    });
    server.seen();
    assert_eq!(talk.arrive(&mut server, &expected), expected);
}

each_mode!(a_late_reply_begins_no_connection);

/// The VIP was announced by another node for a while, and connections of the pod have gone on there: what this node knows
/// of their windows is outdated.
async fn a_gateway_again_resumes_connections(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    add_gateway("other", 13, mode);
    on("other", || {
        sh("nft 'table inet other {
                chain translation {
                    type nat hook postrouting priority 50
                    ip saddr 10.244.1.12 ip daddr 198.51.100.10 snat ip to 192.0.2.200
                    ip6 saddr fd00:10:244:1::12 ip6 daddr 2001:db8:2::10 snat ip6 to 2001:db8:1::c8
                }
            }'")
    });
    let mut server = Server::start();
    server.add_announcer("other");
    reach_and_die(mode, &labelled(12));
    let mut kernel = open(mode).await;
    let route_to = |last: u8| {
        route_first_vip_to(last);
        let steps = [format!("192.0.2.{last}"), format!("2001:db8:1::{last}")].map(|via| {
            let hop = NextHop {
                via: ip(&via),
                dev: "eth0".to_owned(),
            };
            let way = Landmark::Way(Way {
                mark: slot(1),
                via: hop.via,
            });
            [
                Step::Firewall(FirewallStep::AddLandmark(Family::of(hop.via), way)),
                Step::Route(RouteStep::SetGateway(TableId(100_001), hop)),
            ]
        });
        steps.concat()
    };
    apply(&mut kernel, &route_to(12)).await;
    let talk = Talk::connected(12);
    let accepted = server.accept();
    talk.send_tcp();
    talk.wait_for_acknowledgements();

    apply(&mut kernel, &route_to(13)).await;
    for (pod, server) in talk.tcp.iter().zip(&accepted) {
        pod_says_much(pod, server);
    }
    talk.wait_for_acknowledgements();

    apply(&mut kernel, &route_to(12)).await;
    server.seen();
    talk.send_tcp();
    let is_met = || mode.met("invalid").iter().all(|packets| *packets > 0);
    eventually("packets", || on("gateway", is_met));
    server.sees_nothing();

    let of_others = Family::ALL.map(|family| {
        let (pod, outside) = (pod(family, 12).to_string(), outside(family).to_string());
        let other = ["192.0.2.12", "2001:db8:1::12"][usize::from(family == Family::V6)];
        (
            insert(&pod, &outside, [&outside, other], 1001),
            insert(&outside, &pod, [&pod, &outside], 1002),
        )
    });
    let known = || {
        let listed = sh("conntrack -L -f ipv4 2>/dev/null; conntrack -L -f ipv6 2>/dev/null");
        [1001, 1002].map(|port| listed.matches(&format!(" sport={port} dport=53 ")).count())
    };
    on("gateway", || {
        for (wrong_source, inbound) in &of_others {
            sh(&format!("{wrong_source}{inbound}"));
        }
        assert_eq!(known(), [2, 2]);
        agent_dies_after(async || {
            let mut kernel = open(mode).await;
            observe(&mut kernel).await;
            let resume = Family::ALL.map(|family| {
                let (pod, source) = (pod(family, 12), vip(family, 0));
                Step::Connection(ConnectionStep::Resume { pod, source })
            });
            apply(&mut kernel, &resume).await;
        });
        assert_eq!(known(), [0, 2]);
    });
    let expected: Seen = Family::ALL
        .map(|family| (Carried::Tcp, vip(family, 0)))
        .into();
    let mut seen = Seen::new();
    // The pod says the same again.
    eventually("the pod's word", || {
        seen.extend(server.seen());
        seen.is_superset(&expected)
    });
    assert_eq!(seen, expected);
    for mut stream in &accepted {
        stream.write_all(b"back").unwrap();
    }
    talk.hear(b"back");
}

each_mode!(a_gateway_again_resumes_connections);

/// More than any window that was seen before.
fn pod_says_much(mut pod: &TcpStream, mut server: &TcpStream) {
    const BYTES: usize = 4 << 20;
    pod.set_nonblocking(false).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| pod.write_all(&vec![0; BYTES]).unwrap());
        let mut left = BYTES;
        let mut buffer = vec![0; 1 << 16];
        while left > 0 {
            left = left.saturating_sub(server.read(&mut buffer).unwrap());
        }
    });
    pod.set_nonblocking(true).unwrap();
}
