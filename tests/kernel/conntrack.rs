//! Connections that are forgotten, resumed, and what may still come of them.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use socket2::{Domain, Socket, Type};

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

    forget_pod(&mut kernel).await;
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

async fn forget_pod(kernel: &mut NodeKernel) {
    let pods = Family::ALL.map(|family| pod(family, 12));
    let forget = pods.map(|pod| Step::Connection(ConnectionStep::Forget(pod)));
    apply(kernel, &forget).await;
}

/// Protocols without ports, and what a packet carries: ESP, two numbers; GRE, no flags, IP, and as much as translation wants.
pub(crate) const PORTLESS: [(u8, [u8; 8]); 2] = [
    (50, [0, 0, 0, 1, 0, 0, 0, 1]),
    (47, [0, 0, 8, 0, 0, 0, 0, 0]),
];

pub(crate) fn raw_socket(protocol: u8, from: IpAddr) -> Socket {
    let domain = match from {
        IpAddr::V4(_) => Domain::IPV4,
        IpAddr::V6(_) => Domain::IPV6,
    };
    let protocol = i32::from(protocol).into();
    let socket = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
    socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
    socket
}

/// The same of protocols that have no ports.
async fn a_late_packet_without_ports_begins_no_connection(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    let mut kernel = open(mode).await;
    let rule = match mode {
        Mode::Nftables => "late-portless",
        Mode::IptablesNft | Mode::IptablesLegacy => "late-reply",
    };
    let the_pod: fn(Family) -> IpAddr = |family| pod(family, 12);
    for (protocol, packet) in PORTLESS {
        let sockets = |of: fn(Family) -> IpAddr| Family::ALL.map(|f| raw_socket(protocol, of(f)));
        let pods = on("pods", || sockets(the_pod));
        let servers = on("outside", || sockets(outside));
        let send = |from: &[Socket; 2], to: fn(Family) -> IpAddr| {
            for (socket, family) in from.iter().zip(Family::ALL) {
                let to = SocketAddr::new(to(family), 0);
                socket.send_to(&packet, &to.into()).unwrap();
            }
        };
        let expected: Seen = Family::ALL
            .map(|family| (Carried::Other(u64::from(protocol)), vip(family, 0)))
            .into();
        let arrive = |server: &mut Server| {
            let mut seen = Seen::new();
            eventually("packets of the pod", || {
                send(&pods, outside);
                seen.extend(server.seen());
                seen.is_superset(&expected)
            });
            assert_eq!(seen, expected, "protocol {protocol}");
        };
        arrive(&mut server);
        forget_pod(&mut kernel).await;
        let before = mode.met(rule);
        send(&servers, the_pod);
        eventually("late packets", || {
            let mut met = mode.met(rule).into_iter().zip(before);
            met.all(|(now, before)| now > before)
        });
        server.seen();
        arrive(&mut server);
    }
}

each_mode!(a_late_packet_without_ports_begins_no_connection);

/// What is expected stays so when the table is written anew.
async fn late_replies_are_expected_through_a_repair(mode: Mode) {
    let mut kernel = open(mode).await;
    reach(&mut kernel, &labelled(12)).await;
    for family in Family::ALL {
        let (pod, outside) = (pod(family, 12), outside(family));
        for protocol in ["udp", "50"] {
            sh(&entry_of(protocol, pod, outside, [outside, pod]));
        }
    }
    forget_pod(&mut kernel).await;
    let expected = || {
        let sets = [
            "late_replies4",
            "late_portless4",
            "late_replies6",
            "late_portless6",
        ];
        sets.map(|set| {
            let listed = sh(&format!("nft -n list set inet metaleg {set}"));
            let element = listed.split_once("elements = { ").unwrap().1;
            let (key, rest) = element.split_once(" expires ").unwrap();
            let seconds = rest.split_once('s').unwrap().0;
            (key.to_owned(), seconds.parse::<u32>().unwrap())
        })
    };
    let before = expected();
    eventually("time passes", || expected()[0].1 < before[0].1);
    sh("nft flush chain inet metaleg guard");
    reach(&mut kernel, &labelled(12)).await;
    for ((key, at_first), (found, seconds)) in before.iter().zip(expected()) {
        assert_eq!(key, &found);
        assert!(seconds < *at_first, "{found} {seconds}");
    }
}

each_mode!(late_replies_are_expected_through_a_repair: nftables);

/// The command that makes an entry of a protocol.
fn entry_of(protocol: &str, source: IpAddr, destination: IpAddr, reply: [IpAddr; 2]) -> String {
    let ports = match protocol {
        "tcp" | "udp" | "udplite" | "sctp" => {
            "--sport 7 --dport 53 --reply-port-src 53 --reply-port-dst 7"
        }
        _ => "",
    };
    let rest = match protocol {
        "tcp" => "--state ESTABLISHED",
        "sctp" => "--state ESTABLISHED --orig-vtag 1 --reply-vtag 1",
        "gre" => "--srckey 1 --dstkey 2 --reply-key-src 2 --reply-key-dst 1",
        "icmp" => "--icmp-type 8 --icmp-code 0 --icmp-id 7",
        "icmpv6" => "--icmpv6-type 128 --icmpv6-code 0 --icmpv6-id 7",
        _ => "",
    };
    let [answerer, leaves_as] = reply;
    format!(
        "conntrack -I -p {protocol} -s {source} -d {destination} -r {answerer} -q {leaves_as} \
         {ports} {rest} -t 600 >/dev/null 2>&1\n"
    )
}

/// Protocol, source and destination of every entry, in order.
fn all_entries() -> Vec<String> {
    let all = sh("conntrack -L -f ipv4 2>/dev/null; conntrack -L -f ipv6 2>/dev/null");
    let said = |line: &str| {
        let is_end = |word: &&str| word.starts_with("src=") || word.starts_with("dst=");
        let protocol = line.split_whitespace().nth(1);
        let ends = line.split_whitespace().filter(is_end).take(2);
        let words: Vec<&str> = protocol.into_iter().chain(ends).collect();
        words.join(" ")
    };
    let mut all: Vec<String> = all.lines().map(said).collect();
    all.sort();
    all
}

/// Whatever the protocol of a connection, it is forgotten where its source is wrong.
async fn connections_of_every_protocol_are_forgotten(mode: Mode) {
    let mut kernel = open(mode).await;
    install(&mut kernel).await;
    let entries = |last: u8| -> String {
        let of_family = |family: Family| {
            let icmp = match family {
                Family::V4 => "icmp",
                Family::V6 => "icmpv6",
            };
            let (pod, outside) = (pod(family, last), outside(family));
            ["tcp", "udp", "udplite", "sctp", "gre", "50", icmp]
                .map(|protocol| entry_of(protocol, pod, outside, [outside, pod]))
                .concat()
        };
        Family::ALL.map(of_family).concat()
    };
    sh(&entries(99));
    let others = all_entries();
    assert_eq!(others.len(), 14, "{others:?}");
    let sources = Family::ALL.map(|family| (pod(family, 12), vip(family, 0)));
    let wrong_sources = ConnectionStep::ForgetWrongSource {
        sources: sources.into(),
        vips: BTreeSet::new(),
        unguarded: BTreeSet::new(),
    };
    let forget = Family::ALL.map(|family| ConnectionStep::Forget(pod(family, 12)));
    for steps in [vec![wrong_sources], forget.to_vec()] {
        sh(&entries(12));
        assert_eq!(all_entries().len(), 28);
        let steps: Vec<Step> = steps.into_iter().map(Step::Connection).collect();
        apply(&mut kernel, &steps).await;
        assert_eq!(all_entries(), others);
    }
}

each_mode!(connections_of_every_protocol_are_forgotten);

/// Switches in software track the same packets in zones of their own, without translation.
async fn connections_of_other_zones_are_left_alone(mode: Mode) {
    let mut kernel = open(mode).await;
    install(&mut kernel).await;
    for family in Family::ALL {
        let (pod, outside) = (pod(family, 12), outside(family));
        let zones = ["", "-w 5", "--orig-zone 6", "--reply-zone 7"];
        for (port, zone) in (5000..).zip(zones) {
            sh(&format!(
                "conntrack -I -p tcp -s {pod} -d {outside} --sport {port} --dport 443 \
                 --state ESTABLISHED -t 600 {zone} 2>/dev/null"
            ));
        }
    }
    assert_eq!(all_entries().len(), 8);
    let sources = Family::ALL.map(|family| (pod(family, 12), vip(family, 0)));
    let wrong_sources = ConnectionStep::ForgetWrongSource {
        sources: sources.into(),
        vips: Family::ALL.map(outside).into(),
        unguarded: BTreeSet::new(),
    };
    apply(&mut kernel, &[Step::Connection(wrong_sources)]).await;
    assert_eq!(all_entries().len(), 6);
    forget_pod(&mut kernel).await;
    let resume = Family::ALL.map(|family| {
        let (pod, source) = (pod(family, 12), vip(family, 0));
        Step::Connection(ConnectionStep::Resume { pod, source })
    });
    apply(&mut kernel, &resume).await;
    assert_eq!(all_entries().len(), 6);
}

each_mode!(connections_of_other_zones_are_left_alone: nftables);

/// While the guard was not whole, connections of the pod were lost and begun anew by what the server said.
async fn what_nobody_guarded_against_is_forgotten_by_the_repair(mode: Mode) {
    let mut kernel = open(mode).await;
    reach(&mut kernel, &labelled(12)).await;
    let of = |family: Family| {
        let (server, own, other) = (outside(family), pod(family, 12), pod(family, 99));
        let to = |protocol, pod| entry_of(protocol, server, pod, [pod, server]);
        let rest = ["udp", "sctp", "gre", "50"].map(|protocol| to(protocol, own));
        let to_service = entry_of("udplite", server, node(family), [own, server]);
        let inside = ip(match family {
            Family::V4 => "10.244.2.21",
            Family::V6 => "fd00:10:244:2::21",
        });
        let from_inside = entry_of("udp", inside, own, [own, inside]);
        let stays = [to("tcp", own), to("udp", other), to_service, from_inside];
        (rest.concat(), stays.concat())
    };
    for (_, stays) in Family::ALL.map(of) {
        sh(&stays);
    }
    let stays = all_entries();
    assert_eq!(stays.len(), 8, "{stays:?}");
    for (rest, _) in Family::ALL.map(of) {
        sh(&rest);
    }
    assert_eq!(all_entries().len(), 16);
    // A look alone ends no conversation of others with the pod.
    let look = async |kernel: &mut NodeKernel| {
        let found = kernel.observe().await.unwrap().state;
        let steps = diff(&found, &labelled(12));
        apply(kernel, &steps).await;
    };
    look(&mut kernel).await;
    assert_eq!(all_entries().len(), 16);
    match mode {
        Mode::Nftables => drop(sh("nft flush chain inet metaleg guard")),
        Mode::IptablesNft | Mode::IptablesLegacy => {
            for tool in mode.tools() {
                sh(&format!("{tool} -t mangle -F METALEG-GUARD"));
            }
        }
    }
    look(&mut kernel).await;
    assert_eq!(all_entries(), stays);
}

each_mode!(what_nobody_guarded_against_is_forgotten_by_the_repair);

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
