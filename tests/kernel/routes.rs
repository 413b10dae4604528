//! Routing rules and tables, as `ip` shows them and as the kernel looks them up.

use metaleg::plan::places::choose;

use super::*;
use crate::mode::settings;

#[test]
fn rules_and_routes_are_what_the_design_says() {
    in_namespace(|| async {
        let mut kernel = open(Mode::IptablesNft).await;
        reach(&mut kernel, &example()).await;
        let rules = sh("ip rule list | grep 'proto 77' | tr '\\t' ' '");
        for rule in [
            "1000: from all fwmark 0x100000/0xf00000 lookup 100001 proto 77",
            "1001: from all fwmark 0x100000/0xf00000 lookup 100000 proto 77",
        ] {
            assert!(
                rules.lines().any(|line| line == rule),
                "{rule}\nnot in\n{rules}"
            );
        }
        assert_eq!(sh("ip -6 rule list | grep -c 'proto 77'"), "2\n");
        let table = sh("ip route show table 100001");
        assert_eq!(
            table.lines().map(str::trim).collect::<Vec<_>>(),
            [
                "default via 192.0.2.12 dev eth0 proto 77 metric 100 realm 77",
                "unreachable default proto 77 metric 4278198272",
                "throw 10.244.1.0/24 proto 77 metric 100",
                "throw 10.244.2.0/24 proto 77 metric 100",
            ]
        );
        let table = sh("ip -6 route show table 100001");
        assert!(
            table.contains("default via 2001:db8:1::12 dev eth0 proto 77 metric 100"),
            "{table}"
        );
        assert!(
            table.contains("unreachable default dev lo proto 77 metric 4278198272"),
            "{table}"
        );
    });
}

#[test]
fn rules_and_routes_of_others_stay_even_in_our_ranges() {
    in_namespace(|| async {
        let foreign = "
            ip rule add pref 1000 fwmark 0x100000/0xf00000 lookup 100001
            ip rule add pref 1001 to 10.244.2.0/24 lookup main
            ip route add 203.0.113.0/24 dev eth0 table 100001
            ip route add blackhole default metric 50 table 100002";
        sh(foreign);
        let look =
            "ip rule list | grep -v 'proto 77'; ip route show table all | grep -v 'proto 77'";
        let before = sh(look);
        let mut kernel = open(Mode::IptablesNft).await;
        reach(&mut kernel, &example()).await;
        assert_eq!(sh(look), before);
        reach(&mut kernel, &nothing()).await;
        assert_eq!(sh(look), before);
    });
}

#[test]
fn a_gateway_is_replaced_without_a_moment_without_one() {
    in_namespace(|| async {
        let mut kernel = open(Mode::IptablesNft).await;
        reach(&mut kernel, &example()).await;
        let mut moved = example();
        for (family, via) in [(Family::V4, "192.0.2.13"), (Family::V6, "2001:db8:1::13")] {
            let routes = &mut moved.families.get_mut(&family).unwrap().routes;
            let table = routes.tables.get_mut(&TableId(100_001)).unwrap();
            table.gateway.as_mut().unwrap().via = ip(via);
            rebuild_ways(moved.families.get_mut(&family).unwrap());
        }
        let mut steps = diff(&example(), &moved);
        steps.retain(|step| matches!(step, Step::Route(_)));
        assert_eq!(steps.len(), 2, "{steps:?}");
        reach(&mut kernel, &moved).await;
        let look = "ip -4 route show table 100001 default; ip -6 route show table 100001 default";
        assert_eq!(sh(look).lines().count(), 4);
    });
}

#[test]
fn a_node_whose_first_rule_is_lost_is_not_cut_off() {
    in_namespace(|| async {
        let mut kernel = open(Mode::IptablesNft).await;
        reach(&mut kernel, &example()).await;
        sh("ip route add default via 192.0.2.254");
        sh("ip rule del pref 1000");
        assert!(sh("ip route get 198.51.100.10").contains("via 192.0.2.254"));
        let marked = Command::new("ip")
            .args(["route", "get", "198.51.100.10", "mark", "0x100000"])
            .output()
            .unwrap();
        assert!(
            !marked.status.success(),
            "a mark without a gateway must not leave"
        );
        // No value that stands for none of our gateways is any of our business.
        assert!(sh("ip route get 198.51.100.10 mark 0x200000").contains("via 192.0.2.254"));
    });
}

#[test]
fn a_marked_packet_takes_the_gateway_unless_its_destination_is_excluded() {
    in_namespace(|| async {
        let mut kernel = open(Mode::IptablesNft).await;
        reach(&mut kernel, &example()).await;
        sh("ip route add default via 192.0.2.254");
        let route = |to: &str| sh(&format!("ip route get {to} mark 0x100000"));
        assert!(route("198.51.100.10").contains("via 192.0.2.12"));
        assert!(route("10.244.2.9").contains("via 192.0.2.254"));
        sh("ip route del default via 192.0.2.12 table 100001");
        let lost = Command::new("ip")
            .args(["route", "get", "198.51.100.10", "mark", "0x100000"])
            .output()
            .unwrap();
        assert!(
            !lost.status.success(),
            "a lost gateway must not fall through to the main table"
        );
    });
}

#[test]
fn links_that_are_up_tell_their_networks() {
    in_namespace(|| async {
        let mut kernel = open(Mode::IptablesNft).await;
        sh("ip link add down0 type bridge; ip addr add 203.0.113.1/24 dev down0");
        let links = kernel.observe().await.unwrap().interfaces;
        let link = links.iter().find(|link| link.name == "eth0").unwrap();
        assert!(link.nets.contains(&"192.0.2.0/24".parse().unwrap()));
        assert!(link.nets.contains(&"2001:db8:1::/64".parse().unwrap()));
        assert!(
            !links
                .iter()
                .any(|link| link.name == "down0" || link.name == "lo")
        );
    });
}

#[test]
fn a_hundred_gateways_share_a_mark_and_each_pod_takes_its_own() {
    in_namespace(|| async {
        let mut kernel = open(Mode::Nftables).await;
        sh("ip link add pod0 type veth peer name inner0; ip link set pod0 up; ip link set inner0 up
            ip route add 10.244.1.0/24 dev pod0; echo 0 > /proc/sys/net/ipv4/conf/pod0/rp_filter
            echo 1 > /proc/sys/net/ipv4/ip_forward");
        let shared = Mark {
            value: MASK,
            mask: MASK,
        };
        let mut many = example();
        let routes = &mut many.families.get_mut(&Family::V4).unwrap().routes;
        for n in 0..100_u8 {
            let table = TableId(100_015 + u32::from(n));
            routes.rules.insert(Rule {
                mark: Some(shared),
                from: Some(IpAddr::from([10, 244, 1, 100 + n])),
                ..rule(0, RuleAction::Lookup(table))
            });
            let gateway = NextHop {
                via: IpAddr::from([192, 0, 2, 100 + n]),
                dev: "eth0".to_owned(),
            };
            let state = Table {
                fallback: true,
                gateway: Some(gateway),
                ..Table::default()
            };
            routes.tables.insert(table, state);
        }
        routes.rules.insert(Rule {
            mark: Some(shared),
            ..rule(1, RuleAction::Lookup(FLOOR))
        });
        rebuild_ways(many.families.get_mut(&Family::V4).unwrap());
        reach(&mut kernel, &many).await;
        for n in [0, 57, 99] {
            let way = sh(&format!(
                "ip route get 198.51.100.10 from 10.244.1.{} iif pod0 mark {MASK:#x}",
                100 + n
            ));
            assert!(way.contains(&format!("via 192.0.2.{}", 100 + n)), "{way}");
        }
        // Whose rule is lost does not leave at all.
        sh("ip rule del from 10.244.1.157 pref 1000");
        let lost = format!("ip route get 198.51.100.10 from 10.244.1.157 iif pod0 mark {MASK:#x}");
        let lost = Command::new("sh").args(["-c", &lost]).output().unwrap();
        assert!(!lost.status.success(), "{lost:?}");
        reach(&mut kernel, &example()).await;
    });
}

#[test]
fn tables_of_others_in_our_range_are_told() {
    in_namespace(|| async {
        sh("ip rule add pref 3000 lookup 100004
            ip route add 203.0.113.0/24 dev eth0 table 100002");
        let mut kernel = open(Mode::Nftables).await;
        let observed = kernel.observe().await.unwrap();
        let table = |number| (Family::V4, TableId(number));
        assert_eq!(observed.occupied, [table(100_002), table(100_004)].into());
    });
}

/// Settings on a node that others have been on before.
#[test]
fn marks_and_priorities_are_found_free_and_found_again() {
    in_namespace(|| async {
        let settings = settings(&[]);
        let survey = || async { metaleg::kernel::survey(&settings).await.unwrap() };
        let places = choose(&settings, &survey().await);
        assert_eq!((places.settings, places.notes), (settings.clone(), vec![]));

        sh(
            "ip link add cilium_host type bridge; ip -6 rule add pref 1000 from fd00::1 lookup main",
        );
        let moved = choose(&settings, &survey().await).settings;
        assert_eq!((moved.mask.bits(), moved.rule_priority), (0xf0, 998));

        // What an agent has made there stays there, whatever else becomes free.
        let marked = Rule {
            priority: 500,
            action: RuleAction::Lookup(FLOOR),
            mark: Some(Mark {
                value: 0x1000,
                mask: 0x3000,
            }),
            not: false,
            from: None,
            to: None,
        };
        let mut kernel = open(Mode::Nftables).await;
        let rule = RouteStep::AddRule(Family::V4, marked);
        apply(&mut kernel, &[Step::Route(rule)]).await;
        let kept = choose(&settings, &survey().await).settings;
        assert_eq!((kept.mask.bits(), kept.rule_priority), (0x3000, 500));
    });
}
