use std::time::Instant;

use metaleg::state::{ConnectionStep, FirewallStep, NetSet, Step};

use super::*;

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
        let mut kernel = open(Mode::Nft).await;
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

fn thousands_of_connections_are_forgotten_at_once(mode: Mode) {
    in_namespace(move || async move {
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
    });
}

#[test]
fn own_thousands_of_connections_are_forgotten_at_once() {
    thousands_of_connections_are_forgotten_at_once(Mode::Own);
}

#[test]
fn nft_thousands_of_connections_are_forgotten_at_once() {
    thousands_of_connections_are_forgotten_at_once(Mode::Nft);
}

fn late_replies_are_expected_anew(mode: Mode) {
    in_namespace(move || async move {
        let mut kernel = open(mode).await;
        install(&mut kernel).await;
        sh("conntrack -L >/dev/null 2>&1; iptables-nft -A FORWARD -m conntrack --ctstate NEW");
        let (pod, outside) = ("10.244.1.11", "198.51.100.10");
        let mut left = Vec::new();
        for pause in [2, 0] {
            sh(&insert(pod, outside, [outside, pod], 1002));
            let forget = [Step::Connection(ConnectionStep::Forget(ip(pod)))];
            let failed = kernel.apply(&forget).await;
            assert!(failed.is_empty(), "{failed:?}");
            tokio::time::sleep(std::time::Duration::from_secs(pause)).await;
            let listed = match mode {
                Mode::Own => sh(
                    "nft list set inet metaleg late_replies4 | tr ' ' '\\n' | sed -n '/expires/{n;s/s.*//;p}'",
                ),
                _ => sh(
                    "ipset list METALEG-LATE-REPLIES-4 | sed -n 's/.* timeout \\([0-9]*\\)$/\\1/p'",
                ),
            };
            left.push(listed.trim().parse::<u64>().unwrap());
        }
        assert!(left[1] > left[0], "seconds left: {left:?}");
    });
}

#[test]
fn own_late_replies_are_expected_anew() {
    late_replies_are_expected_anew(Mode::Own);
}

#[test]
fn nft_late_replies_are_expected_anew() {
    late_replies_are_expected_anew(Mode::Nft);
}
