//! Chains, rules and sets: written, read back, damaged, healed and removed, and what of others stays.

use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::*;
use crate::hosts::{connect_hosts, prepare_gateway};
use crate::namespace::PATIENCE;
use crate::server::Server;
use crate::states::labelled;
use crate::talk::datagrams;

/// Chains, rules and sets that look as much like ours as others' may.
fn make_foreign(mode: Mode) {
    for tool in mode.tools() {
        let family = if tool.starts_with("ip6") {
            "inet6"
        } else {
            "inet"
        };
        let foreign = format!("MY-METALEG-{family}");
        sh(&format!(
            "{tool} -t mangle -N METALEG-OF-OTHERS; {tool} -t mangle -A METALEG-OF-OTHERS -j ACCEPT
             {tool} -t mangle -A FORWARD -j METALEG-OF-OTHERS
             {tool} -t nat -A POSTROUTING -m comment --comment 'metaleg is not ours' -j MASQUERADE
             {tool} -A FORWARD -j ACCEPT
             ipset create {foreign} hash:ip family {family}
             ipset create METALEGION-{family} hash:ip family {family}"
        ));
    }
}

fn foreign(text: &str) -> Vec<String> {
    let counters = |line: &str| line.split(" [").next().unwrap_or_default().to_owned();
    let is_foreign = |line: &&str| {
        !line.starts_with('#')
            && ["OTHERS", "not ours", "FORWARD -j ACCEPT"]
                .iter()
                .any(|f| line.contains(f))
    };
    text.lines().filter(is_foreign).map(counters).collect()
}

async fn a_state_is_reached_read_back_and_removed(mode: Mode) {
    make_foreign(mode);
    let foreign_before = foreign(&mode.save());
    let mut kernel = open(mode).await;
    assert_eq!(observe(&mut kernel).await, nothing());

    reach(&mut kernel, &example()).await;
    assert!(diff(&observe(&mut kernel).await, &example()).is_empty());
    look(mode);

    reach(&mut kernel, &nothing()).await;
    assert_eq!(foreign(&mode.save()), foreign_before);
    assert!(!sh("nft list tables").contains("table inet metaleg\n"));
    let left = format!("{}{}", mode.save(), sh("ipset list -n"));
    let ours = |line: &&str| line.contains("METALEG") && !line.contains("OTHERS");
    let left: Vec<&str> = left.lines().filter(ours).collect();
    assert_eq!(
        left,
        [
            "MY-METALEG-inet",
            "METALEGION-inet",
            "MY-METALEG-inet6",
            "METALEGION-inet6"
        ]
    );
}

each_mode!(a_state_is_reached_read_back_and_removed);

/// What is there, as the tools show it.
fn look(mode: Mode) {
    if mode == Mode::Nftables {
        for (what, element) in [
            ("slot4", "10.244.1.12 : goto slot1"),
            ("slot6", "fd00:10:244:1::12 : goto slot1"),
            ("vip4", "10.244.1.13 : 192.0.2.201"),
            ("vip6", "fd00:10:244:1::11 : 2001:db8:1::c8"),
            ("excluded4", "10.244.1.0/24"),
            ("excluded6", "fe80::/10"),
            ("blocked4", "10.244.1.14"),
        ] {
            let kind = if what.starts_with("slot") || what.starts_with("vip") {
                "map"
            } else {
                "set"
            };
            let listed = sh(&format!("nft list {kind} inet metaleg {what}"));
            assert!(listed.contains(element), "{listed}");
        }
        return;
    }
    let marks = sh("ipset save METALEG-MARK-4; ipset save METALEG-MARK-6");
    assert!(
        marks.contains("add METALEG-MARK-4 10.244.1.12 skbmark 0x100000/0xf00000"),
        "{marks}"
    );
    let save = mode.save();
    for rule in [
        "-j SNAT --to-source 192.0.2.200",
        "-j SNAT --to-source 2001:db8:1::c8",
    ] {
        assert_eq!(save.matches(rule).count(), 1, "{save}");
    }
}

/// Every kind of object of the backend deleted, flushed, reordered, doubled or changed.
fn damages_of_iptables(mode: Mode) -> Vec<String> {
    let [v4, v6] = mode.tools();
    vec![
            format!("{v4} -t nat -D POSTROUTING 1"),
            format!("{v4} -D FORWARD 1"),
            format!("{v6} -t mangle -D PREROUTING 1"),
            format!("{v4} -t nat -F METALEG-NAT"),
            format!("{v6} -F METALEG-BLOCK"),
            format!("{v4} -t mangle -D METALEG-GUARD 3"),
            format!("{v4} -t mangle -I METALEG-GUARD 1 -j ACCEPT"),
            format!("{v4} -t nat -I POSTROUTING 1 -j MASQUERADE"),
            format!("{v4} -I FORWARD 1 -j ACCEPT"),
            format!("{v4} -t mangle -A FORWARD -j METALEG-GUARD"),
            format!("{v6} -t mangle -A PREROUTING -j CONNMARK --restore-mark"),
            format!("{v4} -t nat -D METALEG-NAT 4"),
            format!("{v4} -t nat -F; {v4} -t mangle -F; {v4} -F"),
            "ipset flush METALEG-EGRESS-4".to_owned(),
            "ipset del METALEG-VIPS-4 192.0.2.200".to_owned(),
            "ipset add METALEG-BLOCKED-4 10.244.1.99".to_owned(),
            "ipset flush METALEG-MARK-6; ipset add METALEG-MARK-6 fd00:10:244:1::c skbmark 0x200000/0xf00000".to_owned(),
            "ipset create METALEG-VIP-192.0.2.99 hash:ip maxelem 1048576; ipset add METALEG-VIP-192.0.2.99 10.244.1.11".to_owned(),
            format!("{v4} -t nat -F; {v4} -t mangle -F; {v4} -F; ipset destroy METALEG-EGRESS-4"),
    ]
}

fn damages_of_nftables() -> Vec<String> {
    let mut damages: Vec<String> = [
        "delete table inet metaleg",
        "flush table inet metaleg",
        "flush chain inet metaleg leak",
        "flush chain inet metaleg slot1",
        "insert rule inet metaleg guard accept",
        "add rule inet metaleg translation masquerade",
        "chain inet metaleg guard { policy drop; }",
        "flush set inet metaleg egress4",
        "flush map inet metaleg slot6",
        "flush map inet metaleg vip4",
        "flush set inet metaleg excluded6",
        "add element inet metaleg excluded4 { 198.51.100.0/24 }",
        "add element inet metaleg blocked4 { 10.244.1.99 }",
        "delete element inet metaleg vips4 { 192.0.2.200 }",
        "delete element inet metaleg slot4 { 10.244.1.12 }; add element inet metaleg slot4 { 10.244.1.12 : goto slot2 }",
    ]
    .map(|command| format!("nft '{command}'"))
    .into();
    for chain in ["marking", "errors", "guard", "translation", "leak"] {
        damages.push(format!(
            "nft flush chain inet metaleg {chain}; nft delete chain inet metaleg {chain}"
        ));
        damages.push(format!(
            "nft delete rule inet metaleg {chain} handle \
             $(nft -a list chain inet metaleg {chain} | sed -n 's/.*comment.*handle //p' | tail -1)"
        ));
        // The last rule becomes the first.
        damages.push(format!(
            "rule=$(nft -a list chain inet metaleg {chain} | grep comment | tail -1)
             nft delete rule inet metaleg {chain} handle ${{rule##* }}
             nft insert rule inet metaleg {chain} \"$(echo \"${{rule% \\# handle*}}\" | sed 's/packets [0-9]* bytes [0-9]*//')\""
        ));
    }
    damages.push("nft 'add table inet metaleg { flags dormant; }'".to_owned());
    // Sets with our names that hold something else, in a table that is as it was but for that.
    for change in [
        "/late_replies4 /,/}/ { /flags timeout/d; /timeout 1m/d }",
        "/egress4 /,/}/ s/type ipv4_addr/&\\nflags timeout/",
        "/egress6 /,/}/ s/type ipv6_addr/&\\nflags interval/",
        "/blocked4 /,/}/ s/type ipv4_addr/&\\nsize 2/",
        "/set gateway_here4 /,/}/ { s/type ipv4_addr/type inet_service/; /elements/d }",
    ] {
        // nft 1.0 takes a `}` that follows a verdict for a part of it.
        damages.push(format!(
            "nft list table inet metaleg | sed -e 's/goto slot[0-9]* }}/goto slot1\\n}}/' -e '{change}' >/run/table
             {{ echo delete table inet metaleg; cat /run/table; }} | nft -f -"
        ));
    }
    for set in ["egress4", "vips6", "gateway_here4", "remote_pods6"] {
        damages.push(format!(
            "nft flush table inet metaleg; nft delete set inet metaleg {set}"
        ));
    }
    damages
}

async fn damage_is_seen_and_healed(mode: Mode) {
    let damages = match mode {
        Mode::Nftables => damages_of_nftables(),
        Mode::IptablesNft | Mode::IptablesLegacy => damages_of_iptables(mode),
    };
    let mut kernel = open(mode).await;
    reach(&mut kernel, &example()).await;
    let of_routes = [
        "ip rule flush; ip rule add pref 32766 lookup main",
        "ip -6 rule del pref 1000",
        "ip rule del pref 1001",
        "ip -6 route flush table 100001",
        "ip route del default table 100001 metric 100",
        "echo 1 > /proc/sys/net/ipv6/conf/eth0/keep_addr_on_down; ip link set eth0 down; ip link set eth0 up",
    ];
    for damage in damages.into_iter().chain(of_routes.map(str::to_owned)) {
        sh(&damage);
        assert_ne!(observe(&mut kernel).await, example(), "not seen: {damage}");
        reach(&mut kernel, &example()).await;
    }
}

each_mode!(damage_is_seen_and_healed);

async fn every_step_may_be_repeated(mode: Mode) {
    let mut kernel = open(mode).await;
    for (from, to) in [(nothing(), example()), (example(), nothing())] {
        for step in diff(&from, &to) {
            for _ in 0..2 {
                let failed = kernel.apply(std::slice::from_ref(&step)).await;
                assert!(failed.is_empty(), "{step}: {failed:?}");
            }
        }
        assert_eq!(observe(&mut kernel).await, to);
    }
}

each_mode!(every_step_may_be_repeated: nftables, iptables_nft);

async fn vips_come_and_go_beside_each_other(mode: Mode) {
    let mut kernel = open(mode).await;
    reach(&mut kernel, &example()).await;
    let mut other = example();
    let firewall = &mut other.families.get_mut(&Family::V4).unwrap().firewall;
    firewall.vips = [ip("192.0.2.200"), ip("192.0.2.210"), ip("192.0.2.211")].into();
    firewall.pods.get_mut(&ip("10.244.1.13")).unwrap().vips = [ip("192.0.2.210")].into();
    reach(&mut kernel, &other).await;
    assert!(!format!("{}{}", sh("ipset list -n"), mode.save()).contains("192.0.2.201"));
    reach(&mut kernel, &example()).await;
}

each_mode!(vips_come_and_go_beside_each_other: nftables, iptables_nft);

/// A route by which marked packets pass, while NAT does not exclude their destination, would let them out with the pod's own
/// address.
#[test]
fn a_route_waits_for_the_exclusion_that_it_relies_on() {
    in_namespace(|| async {
        let mut kernel = open(Mode::IptablesNft).await;
        let (refused, installed) = ("10.9.0.0/16".parse().unwrap(), "fd09::/16".parse().unwrap());
        let pass = |net| Step::Route(RouteStep::AddThrow(FLOOR, net));
        let steps = [
            Step::Firewall(FirewallStep::Install(Family::V6, BTreeSet::new())),
            // Without the firewall of its family there is no set to put it into.
            Step::Firewall(FirewallStep::AddNet(NetSet::Excluded, refused)),
            Step::Firewall(FirewallStep::AddNet(NetSet::Excluded, installed)),
            pass(refused),
            pass(installed),
        ];
        let failed = kernel.apply(&steps).await;
        let failed: Vec<&Step> = failed.iter().map(|failure| &failure.step).collect();
        assert_eq!(failed, [&steps[1], &steps[3]]);
        assert_eq!(sh("ip -4 route show table 100000 2>/dev/null || true"), "");
        assert!(sh("ip -6 route show table 100000").contains("throw fd09::/16"));
    });
}

#[test]
fn a_step_that_fails_costs_only_the_steps_that_rely_on_it() {
    in_namespace(|| async {
        let mut kernel = open(Mode::IptablesNft).await;
        let (bad, good) = (ip("10.244.1.11"), ip("10.244.1.12"));
        let mark = Mark {
            value: 0x0010_0000,
            mask: MASK,
        };
        let translate = |pod, vip| Step::Firewall(FirewallStep::Translate { pod, vip: ip(vip) });
        let steps = [
            Step::Firewall(FirewallStep::Install(
                Family::V4,
                [ip("192.0.2.200")].into(),
            )),
            // There is no such VIP: a pod that was marked all the same would leave with the node's address.
            translate(bad, "192.0.2.99"),
            translate(good, "192.0.2.200"),
            Step::Firewall(FirewallStep::AddPod(PodSet::Egress, bad)),
            Step::Firewall(FirewallStep::AddPod(PodSet::Egress, good)),
            Step::Firewall(FirewallStep::Mark { pod: bad, mark }),
            Step::Firewall(FirewallStep::Mark { pod: good, mark }),
            Step::Route(RouteStep::SetGateway(
                TableId(100_001),
                NextHop {
                    via: ip("192.0.2.12"),
                    dev: "eth9".to_owned(),
                },
            )),
            Step::Connection(ConnectionStep::Forget(bad)),
            Step::Firewall(FirewallStep::AddPod(PodSet::Blocked, bad)),
            Step::Firewall(FirewallStep::AddPod(PodSet::GatewayHere, good)),
        ];
        let failed = kernel.apply(&steps).await;
        let failed: Vec<&Step> = failed.iter().map(|failure| &failure.step).collect();
        assert_eq!(failed, [1, 3, 5, 7, 8].map(|n: usize| &steps[n]));
        let state = observe(&mut kernel).await;
        let pods = &state.families[&Family::V4].firewall.pods;
        let only_blocked = PodState {
            blocked: true,
            ..PodState::default()
        };
        assert_eq!(pods[&bad], only_blocked);
        let complete = PodState {
            egress: true,
            vips: [ip("192.0.2.200")].into(),
            mark: Some(mark),
            gateway_here: true,
            ..PodState::default()
        };
        assert_eq!(pods[&good], complete);
    });
}

async fn five_thousand_services_fit(mode: Mode) {
    let mut kernel = open(mode).await;
    let mut large = example();
    let firewall = &mut large.families.get_mut(&Family::V4).unwrap().firewall;
    for n in 0..5000_u16 {
        let [high, low] = n.to_be_bytes();
        let vip = IpAddr::from([198, 18, high, low]);
        let state = PodState {
            egress: true,
            vips: [vip].into(),
            ..PodState::default()
        };
        firewall.vips.insert(vip);
        firewall
            .pods
            .insert(IpAddr::from([10, 99, high, low]), state);
    }
    let started = Instant::now();
    reach(&mut kernel, &large).await;
    println!(
        "5,000 VIPs with a pod each: written and read back in {:?}",
        started.elapsed()
    );
    let started = Instant::now();
    reach(&mut kernel, &example()).await;
    println!("removed and read back in {:?}", started.elapsed());
}

each_mode!(five_thousand_services_fit: nftables, iptables_nft);

#[test]
fn legacy_tables_are_not_registered_by_looking_for_them() {
    in_namespace(|| async {
        sh("iptables-nft -t nat -A POSTROUTING -j MASQUERADE");
        let kernel = open_backend(FirewallBackend::Iptables).await;
        assert!(
            kernel.describe().contains("nf_tables"),
            "{}",
            kernel.describe()
        );
        assert_eq!(sh("cat /proc/net/ip_tables_names 2>/dev/null || true"), "");
    });
}

#[test]
fn without_a_kubelet_the_mode_with_more_rules_is_used() {
    in_namespace(|| async {
        sh("iptables-legacy -t nat -A POSTROUTING -j MASQUERADE");
        let kernel = open_backend(FirewallBackend::Iptables).await;
        assert!(
            kernel.describe().contains("legacy"),
            "{}",
            kernel.describe()
        );
    });
}

async fn the_lock_of_iptables_is_waited_for_and_busy_neighbours_do_not_matter(mode: Mode) {
    let mut kernel = open(mode).await;
    // Another program holds the lock for a second, and one writes its own rules all the time.
    let mut busy = Command::new("sh")
        .args(["-c", "flock /run/xtables.lock sleep 1; i=0; while [ $i -lt 2000 ]; do i=$((i+1)); \
               nft 'table ip busy { chain c { ip saddr 203.0.113.1 accept; }; }; delete table ip busy'; done"])
        .spawn()
        .unwrap();
    for _ in 0..5 {
        reach(&mut kernel, &example()).await;
        reach(&mut kernel, &nothing()).await;
    }
    busy.kill().unwrap();
    busy.wait().unwrap();
}

each_mode!(the_lock_of_iptables_is_waited_for_and_busy_neighbours_do_not_matter);

/// What the round trip of an egress pod's packet costs, with one excluded network and with a thousand.
async fn the_way_out_beside_a_thousand_excluded_networks(mode: Mode) {
    const ROUND_TRIPS: u32 = 5000;
    connect_hosts(mode);
    prepare_gateway(mode);
    let server = Server::start();
    let [echo, _] = server.udp.each_ref().map(|udp| udp.try_clone().unwrap());
    std::thread::spawn(move || {
        let mut word = [0; 1];
        while let Ok((_, peer)) = echo.recv_from(&mut word) {
            let _ = echo.send_to(&word, peer);
        }
    });
    let pod = on("pods", || datagrams(pod(Family::V4, 12)));
    pod.set_read_timeout(Some(PATIENCE)).unwrap();
    for excluded in [0, 1000_u16, 0, 1000] {
        let mut state = labelled(12);
        let FamilyState { routes, firewall } = state.families.get_mut(&Family::V4).unwrap();
        for [high, low] in (0..excluded).map(|n| (2 * n).to_be_bytes()) {
            let net: IpNet = format!("10.{}.{low}.0/24", 100 + high).parse().unwrap();
            firewall.excluded.insert(net);
            if mode != Mode::Nftables {
                for table in routes.tables.values_mut() {
                    table.throws.insert(net);
                }
            }
        }
        reach_and_die(mode, &state);
        let mut times: Vec<Duration> = Vec::new();
        for _ in 0..ROUND_TRIPS {
            let started = Instant::now();
            pod.send(b"x").unwrap();
            pod.recv(&mut [0; 1]).unwrap();
            times.push(started.elapsed());
        }
        times.sort();
        println!(
            "{excluded} more excluded networks: round trip of {:?} (median), {:?} (lowest tenth)",
            times[times.len() / 2],
            times[times.len() / 10],
        );
    }
}

each_mode!(the_way_out_beside_a_thousand_excluded_networks: nftables, iptables_nft);
