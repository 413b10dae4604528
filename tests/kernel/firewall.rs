use std::time::Instant;

use metaleg::state::{ConnectionStep, FirewallStep, PodSet, Remnant, RouteStep, Step};

use super::*;

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

fn a_state_is_reached_read_back_and_removed(mode: Mode) {
    in_namespace(move || async move {
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
    });
}

/// What is there, as the tools show it.
fn look(mode: Mode) {
    if mode == Mode::Own {
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

#[test]
fn own_a_state_is_reached_read_back_and_removed() {
    a_state_is_reached_read_back_and_removed(Mode::Own);
}

#[test]
fn nft_a_state_is_reached_read_back_and_removed() {
    a_state_is_reached_read_back_and_removed(Mode::Nft);
}

#[test]
fn legacy_a_state_is_reached_read_back_and_removed() {
    a_state_is_reached_read_back_and_removed(Mode::Legacy);
}

fn damage_is_seen_and_healed(mode: Mode, damages: Vec<String>) {
    in_namespace(move || async move {
        let mut kernel = open(mode).await;
        reach(&mut kernel, &example()).await;
        let of_routes = [
            "ip rule flush; ip rule add pref 32766 lookup main",
            "ip -6 rule del pref 1000",
            "ip rule del pref 1099",
            "ip -6 route flush table 100001",
            "ip route del default table 100001 metric 100",
            "echo 1 > /proc/sys/net/ipv6/conf/eth0/keep_addr_on_down; ip link set eth0 down; ip link set eth0 up",
        ];
        for damage in damages.into_iter().chain(of_routes.map(str::to_owned)) {
            sh(&damage);
            assert_ne!(observe(&mut kernel).await, example(), "not seen: {damage}");
            reach(&mut kernel, &example()).await;
        }
    });
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
    for set in ["egress4", "vips6", "gateway_here4", "remote_pods6"] {
        damages.push(format!(
            "nft flush table inet metaleg; nft delete set inet metaleg {set}"
        ));
    }
    damages
}

#[test]
fn own_damage_is_seen_and_healed() {
    damage_is_seen_and_healed(Mode::Own, damages_of_nftables());
}

#[test]
fn nft_damage_is_seen_and_healed() {
    damage_is_seen_and_healed(Mode::Nft, damages_of_iptables(Mode::Nft));
}

#[test]
fn legacy_damage_is_seen_and_healed() {
    damage_is_seen_and_healed(Mode::Legacy, damages_of_iptables(Mode::Legacy));
}

fn every_step_may_be_repeated(mode: Mode) {
    in_namespace(move || async move {
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
    });
}

#[test]
fn own_every_step_may_be_repeated() {
    every_step_may_be_repeated(Mode::Own);
}

#[test]
fn nft_every_step_may_be_repeated() {
    every_step_may_be_repeated(Mode::Nft);
}

fn vips_come_and_go_beside_each_other(mode: Mode) {
    in_namespace(move || async move {
        let mut kernel = open(mode).await;
        reach(&mut kernel, &example()).await;
        let mut other = example();
        let firewall = &mut other.families.get_mut(&Family::V4).unwrap().firewall;
        firewall.vips = [ip("192.0.2.200"), ip("192.0.2.210"), ip("192.0.2.211")].into();
        firewall.pods.get_mut(&ip("10.244.1.13")).unwrap().vips = [ip("192.0.2.210")].into();
        reach(&mut kernel, &other).await;
        assert!(!format!("{}{}", sh("ipset list -n"), mode.save()).contains("192.0.2.201"));
        reach(&mut kernel, &example()).await;
    });
}

#[test]
fn own_vips_come_and_go_beside_each_other() {
    vips_come_and_go_beside_each_other(Mode::Own);
}

#[test]
fn nft_vips_come_and_go_beside_each_other() {
    vips_come_and_go_beside_each_other(Mode::Nft);
}

#[test]
fn a_step_that_fails_costs_only_the_steps_that_rely_on_it() {
    in_namespace(|| async {
        let mut kernel = open(Mode::Nft).await;
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

fn five_thousand_services_fit(mode: Mode) {
    in_namespace(move || async move {
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
    });
}

#[test]
fn own_five_thousand_services_fit() {
    five_thousand_services_fit(Mode::Own);
}

#[test]
fn nft_five_thousand_services_fit() {
    five_thousand_services_fit(Mode::Nft);
}

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

#[test]
fn another_backend_takes_over_and_leaves_nothing_of_the_other() {
    let modes = [Mode::Own, Mode::Nft, Mode::Legacy];
    for (from, to) in modes.into_iter().flat_map(|a| modes.map(|b| (a, b))) {
        if from == to {
            continue;
        }
        in_namespace(move || async move {
            let mut kernel = open(from).await;
            reach(&mut kernel, &example()).await;
            for tool in from.tools() {
                sh(&format!("{tool} -t mangle -X KUBE-IPTABLES-HINT"));
            }
            let mut kernel = open(to).await;
            let steps = diff(&kernel.observe().await.unwrap().state, &example());
            let at = |wanted: fn(&Step) -> bool| steps.iter().position(wanted).unwrap();
            let installed = at(|step| matches!(step, Step::Firewall(FirewallStep::Install(..))));
            let removed = at(|step| matches!(step, Step::RemoveRemnant(_)));
            assert!(installed < removed, "{steps:?}");
            reach(&mut kernel, &example()).await;
            let own_table = sh("nft list tables").contains("table inet metaleg\n");
            assert_eq!(own_table, to == Mode::Own);
            for mode in [Mode::Nft, Mode::Legacy] {
                assert_eq!(mode.save().contains("METALEG-NAT"), to == mode);
            }
            assert_eq!(sh("ipset list -n").contains("METALEG"), to != Mode::Own);
        });
    }
}

/// What a release before 0.3 makes for one Service with a local pod and a remote gateway.
fn make_earlier(mode: Mode) {
    for (tool, family, set, pod, vip, gateway, ip) in [
        (
            mode.tools()[0].clone(),
            "inet",
            "METALEG-SRC-0a1b2c3d",
            "10.244.1.11",
            "192.0.2.200",
            "192.0.2.12",
            "ip",
        ),
        (
            mode.tools()[1].clone(),
            "inet6",
            "inet6:METALEG-SRC-0a1b2c3d",
            "fd00:10:244:1::11",
            "2001:db8:1::c8",
            "2001:db8:1::12",
            "ip -6",
        ),
    ] {
        let excluded = format!("METALEG-EXCLUDE-DST-{}", if ip == "ip" { 4 } else { 6 });
        let reject = if ip == "ip" {
            "icmp-port-unreachable"
        } else {
            "icmp6-port-unreachable"
        };
        sh(&format!(
            "ipset create {set} hash:ip family {family}; ipset add {set} {pod}
             ipset create {excluded} hash:net family {family}
             {tool} -t mangle -N METALEG-RT-MARK
             {tool} -t mangle -I METALEG-RT-MARK -m set --match-set {excluded} dst -j RETURN
             {tool} -t mangle -A METALEG-RT-MARK -m set --match-set {set} src -j MARK --set-xmark 0x100000/0xf00000
             {tool} -t mangle -A PREROUTING -j METALEG-RT-MARK
             {tool} -N METALEG-REJECT; {tool} -I FORWARD -j METALEG-REJECT
             {tool} -A METALEG-REJECT -m set --match-set {set} src -j REJECT --reject-with {reject}
             {tool} -t nat -N METALEG-SNAT; {tool} -t nat -I POSTROUTING -j METALEG-SNAT
             {tool} -t nat -A METALEG-SNAT -m set --match-set {set} src -j SNAT --to {vip}
             {tool} -t nat -I POSTROUTING -m mark ! --mark 0x0/0xf00000 -j RETURN
             {ip} rule add fwmark 0x100000/0xf00000 lookup 100000 protocol 0
             {ip} route add default via {gateway} table 100000 protocol boot"
        ));
    }
}

fn an_earlier_release_is_taken_over(of: Mode, by: Mode) {
    in_namespace(move || async move {
        make_earlier(of);
        // Not of that release: made by hand, and another pair of mark and table.
        sh(
            "ip rule add fwmark 0x100000/0xf00000 lookup 100009 pref 5000 protocol static
            ip rule add fwmark 0x200000/0xf00000 lookup 100007 pref 5001 protocol 0",
        );
        let mut kernel = open(by).await;
        let observed = kernel.observe().await.unwrap();
        assert_eq!(observed.state.remnants, [Remnant::EarlierRelease].into());
        reach(&mut kernel, &example()).await;
        let left = format!("{}{}", of.save(), sh("ipset list -n; ip rule; ip -6 rule"));
        for trace in [
            "RT-MARK",
            "REJECT",
            "SNAT\n",
            "-SRC-",
            "EXCLUDE-DST",
            "lookup 100000",
            "j RETURN\n-A",
        ] {
            assert!(
                !left.contains(&format!("METALEG-{trace}")),
                "{trace} in {left}"
            );
        }
        assert!(
            !left.contains("-m mark ! --mark 0x0/0xf00000 -j RETURN"),
            "{left}"
        );
        assert!(!left.contains("lookup 100000"), "{left}");
        assert_eq!(
            sh("ip route show table 100000; ip -6 route show table 100000"),
            ""
        );
        assert_eq!(sh("ip rule | grep -c -e 100009 -e 100007"), "2\n");
        assert_eq!(
            kernel.observe().await.unwrap().state.remnants,
            BTreeSet::new()
        );
    });
}

#[test]
fn an_earlier_release_is_taken_over_in_every_combination() {
    for of in [Mode::Nft, Mode::Legacy] {
        for by in [Mode::Own, of] {
            an_earlier_release_is_taken_over(of, by);
        }
    }
}

#[test]
fn tables_and_rules_of_others_in_our_ranges_are_told() {
    in_namespace(|| async {
        sh("ip rule add pref 500 fwmark 0x100000/0x100000 lookup 7
            ip rule add pref 1001 to 203.0.113.0/24 lookup main
            ip rule add pref 3000 lookup 100004
            ip route add 203.0.113.0/24 dev eth0 table 100002");
        let mut kernel = open(Mode::Own).await;
        let observed = kernel.observe().await.unwrap();
        let table = |number| (Family::V4, TableId(number));
        assert_eq!(observed.occupied, [table(100_002), table(100_004)].into());
        let told: Vec<&String> = observed.collisions.iter().collect();
        assert_eq!(
            told,
            [
                "the IPv4 routing rule `pref 1001 to 203.0.113.0/24 lookup 254` of others comes before ours or among them",
                "the IPv4 routing rule `pref 500 fwmark 0x100000/0x100000 lookup 7` of others comes before ours or among them"
            ]
        );
    });
}

#[test]
fn nat_of_others_that_may_come_first_is_told() {
    for (mode, told) in [
        (Mode::Own, vec!["chain early of nftables table ip others"]),
        (
            Mode::Nft,
            vec![
                "chain POSTROUTING of iptables in legacy mode",
                "chain early of nftables table ip others",
                "chain late of nftables table inet cni",
            ],
        ),
        (
            Mode::Legacy,
            vec![
                "chain CNI-1 of iptables in nf_tables mode",
                "chain early of nftables table ip others",
                "chain late of nftables table inet cni",
            ],
        ),
    ] {
        in_namespace(move || async move {
            let mut kernel = open(mode).await;
            sh("nft 'table ip others { chain early { type nat hook postrouting priority 50; masquerade; }; }'
                nft 'table inet cni { chain late { type nat hook postrouting priority 100; masquerade; }; }'
                nft 'table ip kube-proxy { chain p { type nat hook postrouting priority 100; masquerade; }; }'");
            if mode != Mode::Legacy {
                sh("iptables-legacy -t nat -A POSTROUTING -j MASQUERADE");
            }
            sh("iptables-nft -t nat -N CNI-1; iptables-nft -t nat -A CNI-1 -j MASQUERADE
                iptables-nft -t nat -N KUBE-POSTROUTING; iptables-nft -t nat -A KUBE-POSTROUTING -j MASQUERADE");
            reach(&mut kernel, &example()).await;
            let observed = kernel.observe().await.unwrap();
            let rivals: Vec<&str> = observed
                .collisions
                .iter()
                .filter_map(|text| Some(text.split_once(" may translate")?.0))
                .collect();
            assert_eq!(rivals, told);
        });
    }
}

#[test]
fn the_lock_of_iptables_is_waited_for_and_busy_neighbours_do_not_matter() {
    for mode in [Mode::Own, Mode::Nft, Mode::Legacy] {
        in_namespace(move || async move {
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
        });
    }
}
