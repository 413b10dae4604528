use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;

use super::*;
use crate::cluster::{Node, OnNoGateway, Target};
use crate::ethernet::Mac;
use crate::fixtures::worlds::{World, any_settings, any_world};
use crate::fixtures::{
    ServiceFixture, With, boot, cluster, endpoint, ip, key, key_in, node, node_name, own_pod,
    service, settings_on, slice,
};
use crate::names::Reach;
use crate::settings::FwMask;
use crate::state::{Landmark, Mark, Rule, RuleAction, Table, TableId, Way};

/// Settings of an agent on a node.
fn on(name: &str) -> Settings {
    settings_on(name)
}

/// A dual-stack Service with both VIPs.
fn dual(name: &str) -> ServiceFixture {
    service(name)
        .created(1)
        .vip("192.0.2.200")
        .vip("2001:db8:1::c8")
}

/// The usual cluster: Service `a`, announced by node2, with a pod on every node.
fn usual() -> View {
    let pods = (1..=3).map(|n| endpoint(&format!("10.244.{n}.11"), &format!("node{n}")));
    cluster()
        .with(dual("a").announced_by("node2"))
        .with(slice("a-4", "a", pods))
}

fn make(view: &View, settings: &Settings) -> Desired {
    plan(view, settings, &Family::ALL.into(), &Slots::default())
}

fn pod_of(desired: &Desired, address: &str) -> Option<PodState> {
    let address = ip(address);
    let firewall = &desired.kernel.families[&Family::of(address)].firewall;
    firewall.pods.get(&address).cloned()
}

fn egress(vip: &str) -> PodState {
    PodState {
        egress: true,
        vips: [ip(vip)].into(),
        ..PodState::default()
    }
}

const SLOT_1: Mark = Mark {
    value: 0x0010_0000,
    mask: 0x00f0_0000,
};

fn blocked(desired: &Desired, family: Family) -> Option<Blocked> {
    match &desired.services[&key("a")][&family] {
        Verdict::Blocked(reason) => Some(reason.clone()),
        Verdict::Active { .. } | Verdict::Released(_) => None,
    }
}

fn off_link(address: &str, why: &str) -> Blocked {
    Blocked::GatewayOffLink(node_name("node2"), ip(address), why.to_owned())
}

#[test]
fn a_pod_is_marked_on_its_node_translated_on_the_gateway_and_known_everywhere() {
    let plain = egress("192.0.2.200");
    for (on_node, expected) in [
        ("node1", [Some(SLOT_1), None, None]),
        ("node2", [None, None, None]),
        ("node3", [None, None, Some(SLOT_1)]),
    ] {
        let desired = make(&usual(), &on(on_node));
        for (n, mark) in (1..=3).zip(expected) {
            let expected = PodState {
                mark,
                gateway_here: on_node == "node2",
                ..plain.clone()
            };
            let address = format!("10.244.{n}.11");
            assert_eq!(
                pod_of(&desired, &address),
                Some(expected),
                "{address} on {on_node}"
            );
        }
        let active = Verdict::Active {
            vip: ip("192.0.2.200"),
            gateway: node_name("node2"),
        };
        assert_eq!(desired.services[&key("a")][&Family::V4], active);
        assert!(desired.ignored.is_empty());
    }
}

fn v4(desired: &Desired) -> &FamilyState {
    &desired.kernel.families[&Family::V4]
}

fn rules(desired: &Desired) -> Vec<String> {
    let rules = v4(desired).routes.rules.iter();
    rules.map(Rule::to_string).collect()
}

#[test]
fn the_page_of_the_data_path_has_the_routing_rules() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/data-path.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, table) = page.split_once("| place | rule |\n|---|---|\n").unwrap();
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    let documented: Vec<&str> = rows.map(|row| row.split('`').nth(1).unwrap()).collect();
    assert_eq!(rules(&make(&usual(), &on("node1"))), documented);
}

/// The tables that packets may take, by number.
fn tables(desired: &Desired) -> Vec<(u32, Option<&str>, Vec<String>)> {
    let shown = |(id, table): (&TableId, &'_ Table)| {
        assert!(table.fallback);
        let throws = table.throws.iter().map(IpNet::to_string).collect();
        (id.0, table.gateway.is_some().then_some("gateway"), throws)
    };
    v4(desired).routes.tables.iter().map(shown).collect()
}

#[test]
fn no_rule_matches_an_unmarked_packet_and_none_leads_a_marked_one_to_main() {
    let desired = make(&usual(), &on("node1"));
    let expected = [
        "pref 1000 fwmark 0x100000/0xf00000 lookup 100001",
        "pref 1001 fwmark 0x100000/0xf00000 lookup 100000",
    ];
    assert_eq!(rules(&desired), expected);
    let own = vec!["10.244.1.0/24".to_owned()];
    let expected = [
        (100_000, None, own.clone()),
        (100_001, Some("gateway"), own),
    ];
    assert_eq!(tables(&desired), expected);
}

#[test]
fn where_marks_come_before_dnat_every_excluded_destination_is_left_to_others() {
    let mut view = usual();
    view.traits.marks_before_dnat = true;
    let desired = make(&view, &on("node1"));
    let excluded: Vec<String> = [
        "10.244.1.0/24",
        "10.244.2.0/23",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "192.0.2.11/32",
        "192.0.2.12/31",
        "224.0.0.0/4",
        "255.255.255.255/32",
    ]
    .map(str::to_owned)
    .into();
    for (_, _, throws) in tables(&desired) {
        assert_eq!(throws, excluded);
    }
}

#[test]
fn where_others_set_bits_of_the_mask_a_mark_counts_only_with_the_pod() {
    let mut view = usual();
    view.traits.mask_is_shared = true;
    let expected = [
        "pref 1000 from 10.244.1.11 fwmark 0x100000/0xf00000 lookup 100001",
        "pref 1001 from 10.244.1.11 fwmark 0x100000/0xf00000 lookup 100000",
    ];
    assert_eq!(rules(&make(&view, &on("node1"))), expected);
}

#[test]
fn where_the_first_table_is_the_kernels_there_is_no_floor() {
    let settings = Settings {
        table_offset: 254,
        ..on("node1")
    };
    // 255 is the kernel's, too.
    let expected = ["pref 1000 fwmark 0x200000/0xf00000 lookup 256"];
    assert_eq!(rules(&make(&usual(), &settings)), expected);
}

#[test]
fn landmarks_are_ways_nodes_and_lans() {
    let mut view = usual();
    let mac = |last| Mac([2, 0, 0, 0, 0, last]);
    view.neighbours = [(ip("192.0.2.12"), mac(12)), (ip("192.0.2.13"), mac(13))].into();
    let landmarks = |node: &str| v4(&make(&view, &on(node))).firewall.landmarks.clone();
    let beside = [
        Landmark::Node(mac(12)),
        Landmark::Node(mac(13)),
        Landmark::Lan("eth0".to_owned()),
    ];
    let way = Landmark::Way(Way {
        mark: SLOT_1,
        via: ip("192.0.2.12"),
    });
    assert_eq!(landmarks("node2"), beside.clone().into());
    assert_eq!(
        landmarks("node1"),
        beside.into_iter().chain([way]).collect()
    );
}

#[test]
fn a_node_that_no_labelled_service_concerns_has_nothing() {
    let pending = |node: &str| {
        let slice = slice("a-1", "a", [endpoint("10.244.1.11", node)]);
        cluster().with(service("a")).with(slice)
    };
    let strict = Settings {
        strict_start: true,
        ..on("node1")
    };
    for (what, view, settings, has_work) in [
        ("nothing labelled", cluster(), on("node1"), false),
        ("a VIP, which may come here", usual(), on("node3"), true),
        (
            "no VIP yet, and a pod here",
            pending("node1"),
            on("node1"),
            true,
        ),
        (
            "no VIP yet, and a pod elsewhere",
            pending("node2"),
            on("node1"),
            false,
        ),
        ("pods wait until they are known", cluster(), strict, true),
    ] {
        let state = v4(&make(&view, &settings)).clone();
        assert_eq!(state != FamilyState::default(), has_work, "{what}");
        assert_eq!(
            state.firewall.skeleton == Skeleton::Intact,
            has_work,
            "{what}"
        );
    }
}

#[test]
fn a_family_that_the_service_does_not_serve_is_not_touched() {
    let only_v4 = dual("a").families(&[Family::V4]);
    let view = cluster().with(only_v4.announced_by("node2")).with(slice(
        "a-6",
        "a",
        [endpoint("fd00:10:244:1::b", "node1")],
    ));
    let desired = make(&view, &on("node1"));
    assert_eq!(pod_of(&desired, "fd00:10:244:1::b"), None);
    assert!(!desired.services[&key("a")].contains_key(&Family::V6));
}

#[test]
fn a_family_without_a_vip_yet_is_blocked_and_the_other_goes_on() {
    let pending = service("a").vip("192.0.2.200");
    let view = cluster()
        .with(pending.announced_by("node2"))
        .with(slice("a-6", "a", [endpoint("fd00:10:244:1::b", "node1")]))
        .with(slice("a-4", "a", [endpoint("10.244.1.11", "node1")]));
    // Where the pod is not, nothing comes of it.
    for (on_node, is_blocked) in [("node1", Some(true)), ("node2", None)] {
        let desired = make(&view, &on(on_node));
        assert_eq!(blocked(&desired, Family::V6), Some(Blocked::NoVip));
        let pod = pod_of(&desired, "fd00:10:244:1::b");
        assert_eq!(pod.map(|pod| pod.blocked), is_blocked);
        assert!(!pod_of(&desired, "10.244.1.11").unwrap().blocked);
    }
}

#[test]
fn a_host_name_is_no_source_address() {
    let view = usual().with(service("a").host_name("a.example"));
    let reason = blocked(&make(&view, &on("node1")), Family::V4);
    assert_eq!(
        reason,
        Some(Blocked::HostnameIngress("a.example".to_owned()))
    );
}

#[test]
fn without_a_usable_gateway_local_pods_are_blocked_and_those_of_other_nodes_are_left_to_them() {
    type Break = fn(&mut View);
    let cases: [(Break, Blocked); 6] = [
        (|view| view.announcers.clear(), Blocked::NoAnnouncer),
        (
            |view| drop(view.nodes.remove(&node_name("node2"))),
            Blocked::UnknownGateway(node_name("node2")),
        ),
        (
            |view| {
                view.nodes
                    .get_mut(&node_name("node2"))
                    .unwrap()
                    .addresses
                    .clear()
            },
            Blocked::GatewayWithoutAddress(node_name("node2")),
        ),
        (
            |view| view.nodes.get_mut(&node_name("node2")).unwrap().programmed = None,
            Blocked::GatewayNotProgrammed(node_name("node2")),
        ),
        (
            |view| {
                let rebooted = Some(boot("second"));
                view.nodes.get_mut(&node_name("node2")).unwrap().boot = rebooted;
            },
            Blocked::GatewayNotProgrammed(node_name("node2")),
        ),
        (
            |view| {
                let router = Reach::Router(ip("192.0.2.254"));
                view.reach.insert(ip("192.0.2.12"), router);
            },
            off_link("192.0.2.12", "reached through 192.0.2.254"),
        ),
    ];
    for (break_it, reason) in cases {
        let mut view = usual();
        break_it(&mut view);
        let desired = make(&view, &on("node1"));
        assert_eq!(blocked(&desired, Family::V4), Some(reason));
        let local = PodState {
            blocked: true,
            ..egress("192.0.2.200")
        };
        assert_eq!(pod_of(&desired, "10.244.1.11"), Some(local));
        assert_eq!(pod_of(&desired, "10.244.3.11"), Some(egress("192.0.2.200")));
    }
}

#[test]
fn a_next_hop_is_the_first_address_of_the_gateway_that_is_on_link_where_it_may_be() {
    const LAN: &str = "192.0.2.12";
    const SECOND: &str = "198.51.100.12";
    type Case<'a> = (
        &'a [(&'a str, Reach)],
        Option<&'a str>,
        Result<[&'a str; 2], Blocked>,
    );
    let on_link = |dev: &str| Reach::OnLink(dev.to_owned());
    let router = || Reach::Router(ip("192.0.2.254"));
    let lost = || Reach::Unreachable("Network is unreachable".to_owned());
    let both = [(LAN, on_link("eth0")), (SECOND, on_link("eth1"))];
    let cases: [Case<'_>; 9] = [
        (&[(LAN, on_link("eth0"))], None, Ok([LAN, "eth0"])),
        (&both, None, Ok([LAN, "eth0"])),
        (&both, Some("eth1"), Ok([SECOND, "eth1"])),
        (
            &[(LAN, router()), (SECOND, on_link("eth1"))],
            None,
            Ok([SECOND, "eth1"]),
        ),
        (
            &[(LAN, lost()), (SECOND, on_link("eth1"))],
            None,
            Ok([SECOND, "eth1"]),
        ),
        (
            &[(LAN, router()), (SECOND, lost())],
            None,
            Err(off_link(LAN, "reached through 192.0.2.254")),
        ),
        (
            &[(LAN, lost())],
            None,
            Err(off_link(LAN, "not reached: Network is unreachable")),
        ),
        (
            &[(LAN, Reach::Own)],
            None,
            Err(off_link(LAN, "this node's own")),
        ),
        (
            &both,
            Some("eth2"),
            Err(off_link(LAN, "on link at eth0, and LAN_INTERFACE is eth2")),
        ),
    ];
    for (reach, lan, expected) in cases {
        let mut view = usual();
        let gateway = view.nodes.get_mut(&node_name("node2")).unwrap();
        // That of the other family is none for this one.
        gateway.addresses = vec![ip("2001:db8:1::12")];
        gateway.addresses.extend(reach.iter().map(|(a, _)| ip(a)));
        view.reach = reach.iter().map(|(a, r)| (ip(a), r.clone())).collect();
        let settings = Settings {
            lan_interface: lan.map(str::to_owned),
            ..on("node1")
        };
        let desired = make(&view, &settings);
        let tables = &desired.kernel.families[&Family::V4].routes.tables;
        let hops = tables.values().filter_map(|table| table.gateway.clone());
        let expected_hop = expected.clone().ok().map(|[via, dev]| NextHop {
            via: ip(via),
            dev: dev.to_owned(),
        });
        assert_eq!(
            hops.collect::<Vec<_>>(),
            Vec::from_iter(expected_hop),
            "{reach:?} {lan:?}"
        );
        assert_eq!(blocked(&desired, Family::V4), expected.err());
    }
}

#[test]
fn pods_of_gateways_beyond_the_marks_are_routed_by_their_address() {
    let settings = Settings {
        mask: FwMask::new(0x0030_0000).unwrap(),
        ..on("node1")
    };
    let mut view = cluster();
    for n in 4..=9_u8 {
        let (name, announcer) = (format!("s{n}"), format!("node{n}"));
        let facts = service(&name)
            .created(n.into())
            .families(&[Family::V4])
            .vip(&format!("192.0.2.{}", 200 + u32::from(n)));
        view = view
            .with(node(&announcer).address(&format!("192.0.2.{}", 10 + n)))
            .with(facts.announced_by(&announcer))
            .with(slice(
                &name,
                &name,
                [endpoint(&format!("10.244.1.{n}"), "node1")],
            ));
    }
    let desired = make(&view, &settings);
    let state = &desired.kernel.families[&Family::V4];
    assert_eq!(state.routes.tables.len(), 7, "six gateways, and the floor");
    let by_pod = |n: u8| {
        let from = Some(IpAddr::from([10, 244, 1, n]));
        state.routes.rules.iter().find(|rule| rule.from == from)
    };
    for n in 4..=9 {
        let pod = pod_of(&desired, &format!("10.244.1.{n}")).unwrap();
        let mark = pod.mark.unwrap();
        // The first two have marks of their own.
        assert_eq!(mark.value >> 20, u32::from(n - 3).min(3));
        assert_eq!(by_pod(n).is_some(), n > 5);
        let rule = by_pod(n).copied().unwrap_or_else(|| {
            let of_mark = |rule: &&Rule| rule.mark == Some(mark) && rule.from.is_none();
            *state.routes.rules.iter().find(of_mark).unwrap()
        });
        let RuleAction::Lookup(table) = rule.action else {
            panic!("{rule}");
        };
        let hop = state.routes.tables[&table].gateway.as_ref().unwrap();
        assert_eq!(hop.via, IpAddr::from([192, 0, 2, 10 + n]));
    }
}

#[test]
fn a_pod_of_this_node_is_an_egress_pod_before_a_slice_names_it() {
    let mut view = cluster()
        .with(dual("a").selects("a").announced_by("node2"))
        .with(own_pod("new", &["10.244.1.21", "fd00:10:244:1::21"]).app("a"))
        .with(own_pod("other", &["10.244.1.22"]).app("b"))
        .with(
            own_pod("foreign", &["10.244.1.23"])
                .app("a")
                .namespace("bank"),
        )
        // Never the node itself.
        .with(own_pod("host", &["192.0.2.11"]).app("a"));
    let desired = make(&view, &on("node1"));
    for (address, vip) in [
        ("10.244.1.21", "192.0.2.200"),
        ("fd00:10:244:1::21", "2001:db8:1::c8"),
    ] {
        let expected = PodState {
            mark: Some(SLOT_1),
            ..egress(vip)
        };
        assert_eq!(pod_of(&desired, address), Some(expected));
    }
    for address in ["10.244.1.22", "10.244.1.23", "192.0.2.11"] {
        assert_eq!(pod_of(&desired, address), None, "{address}");
    }
    // Where it is not, nobody knows of it yet.
    view.pods.clear();
    assert_eq!(pod_of(&make(&view, &on("node2")), "10.244.1.21"), None);
}

#[test]
fn the_older_service_has_a_pod_that_no_slice_names_yet() {
    let younger = dual("new").created(2).vip("192.0.2.201").selects("a");
    let mut view = cluster()
        .with(dual("old").selects("a").announced_by("node2"))
        .with(younger.announced_by("node2"))
        .with(own_pod("pod", &["10.244.1.21"]).app("a"));
    for slices in [false, true] {
        if slices {
            // The slice of the younger one comes first.
            view = view.with(slice("new-1", "new", [endpoint("10.244.1.21", "node1")]));
        }
        let desired = make(&view, &on("node1"));
        let state = pod_of(&desired, "10.244.1.21").unwrap();
        assert_eq!(state.vips, [ip("192.0.2.200")].into());
    }
}

#[test]
fn a_gateway_with_a_new_address_is_routed_to_by_it_in_a_table_of_its_own() {
    let settings = on("node1");
    let first = make(&usual(), &settings);
    let mut renumbered = usual();
    let node2 = renumbered.nodes.get_mut(&node_name("node2")).unwrap();
    node2.addresses[0] = ip("192.0.2.99");
    let on_link = Reach::OnLink("eth0".to_owned());
    renumbered.reach.insert(ip("192.0.2.99"), on_link);
    let second = plan(&renumbered, &settings, &Family::ALL.into(), &first.slots);
    let tables = |desired: &Desired| -> Vec<(TableId, IpAddr)> {
        let tables = &desired.kernel.families[&Family::V4].routes.tables;
        let via = |table: &Table| Some(table.gateway.as_ref()?.via);
        let to_gateways = tables
            .iter()
            .filter_map(|(id, table)| Some((*id, via(table)?)));
        to_gateways.collect()
    };
    assert_eq!(tables(&first), [(TableId(100_001), ip("192.0.2.12"))]);
    assert_eq!(tables(&second), [(TableId(100_002), ip("192.0.2.99"))]);
    // The old address is a pod's from now on, for all we know: it is excluded no more.
    let excluded = &second.kernel.families[&Family::V4].firewall.excluded;
    assert!(!excluded.iter().any(|net| net.contains(&ip("192.0.2.12"))));
}

#[test]
fn without_a_gateway_the_service_may_choose_the_nodes_address() {
    for (value, released) in [
        (OnNoGateway::Reject, false),
        (OnNoGateway::NodeAddress, true),
        (OnNoGateway::Unknown("perhaps".to_owned()), false),
    ] {
        let active = usual().with(dual("a").on_no_gateway(value.clone()));
        let mut lost = active.clone();
        lost.announcers.clear();
        let desired = make(&lost, &on("node1"));
        let verdict = &desired.services[&key("a")][&Family::V4];
        let pod = pod_of(&desired, "10.244.1.11");
        if released {
            assert_eq!(*verdict, Verdict::Released(Blocked::NoAnnouncer));
            assert_eq!(pod, None);
        } else {
            assert_eq!(*verdict, Verdict::Blocked(Blocked::NoAnnouncer));
            assert!(pod.unwrap().blocked);
        }
        let is_reported = desired
            .ignored
            .contains_key(&Subject::OnNoGateway(key("a")));
        assert_eq!(is_reported, matches!(value, OnNoGateway::Unknown(_)));
        // With a gateway there is no choice.
        let active = make(&active, &on("node1"));
        assert!(pod_of(&active, "10.244.1.11").unwrap().mark.is_some());
    }
}

#[test]
fn of_two_services_the_older_one_has_the_pod_and_the_name_decides_a_tie() {
    for (age_of_b, owner, vip) in [
        (0, "b", "192.0.2.201"),
        (1, "a", "192.0.2.200"),
        (2, "a", "192.0.2.200"),
    ] {
        let b = dual("b").created(age_of_b).vip("192.0.2.201");
        let view = cluster()
            .with(dual("a").announced_by("node2"))
            .with(b.announced_by("node2"))
            .with(slice("a-4", "a", [endpoint("10.244.1.11", "node1")]))
            .with(slice("b-4", "b", [endpoint("10.244.1.11", "node1")]));
        let desired = make(&view, &on("node2"));
        let state = PodState {
            gateway_here: true,
            ..egress(vip)
        };
        assert_eq!(pod_of(&desired, "10.244.1.11"), Some(state));
        assert_eq!(
            desired.ignored.values().collect::<Vec<_>>(),
            [&Ignored::OwnedBy(key(owner))]
        );
    }
}

#[test]
fn endpoints_that_are_no_pods_of_the_service_are_ignored_with_a_reason() {
    let of = |target| endpoint("10.244.1.11", "node1").target(target);
    let foreign = Target::Pod(key_in("bank", "p"));
    let nothing = Target::Other("nothing".to_owned());
    for (odd, reason) in [
        (endpoint("a.example", "node1"), Ignored::NotAnAddress),
        (endpoint("127.0.0.1", "node1"), Ignored::NotAPodAddress),
        (endpoint("169.254.1.1", "node1"), Ignored::NotAPodAddress),
        (endpoint("224.0.0.1", "node1"), Ignored::NotAPodAddress),
        (endpoint("fe80::1", "node1"), Ignored::NotAPodAddress),
        (
            endpoint("::ffff:10.244.1.11", "node1"),
            Ignored::NotAPodAddress,
        ),
        (
            endpoint("192.0.2.13", "node3"),
            Ignored::NodeAddress(node_name("node3")),
        ),
        (of(foreign.clone()), Ignored::NotAPodOfItsNamespace(foreign)),
        (of(nothing.clone()), Ignored::NotAPodOfItsNamespace(nothing)),
    ] {
        let view = cluster().with(dual("a").announced_by("node2")).with(slice(
            "a-4",
            "a",
            [odd, endpoint("10.244.1.12", "node1")],
        ));
        let desired = make(&view, &on("node1"));
        assert_eq!(desired.ignored.values().collect::<Vec<_>>(), [&reason]);
        let pods: Vec<_> = desired
            .kernel
            .families
            .values()
            .flat_map(|f| f.firewall.pods.keys())
            .collect();
        assert_eq!(
            pods,
            [&ip("10.244.1.12")],
            "the good endpoint counts beside: {reason}"
        );
    }
}

#[test]
fn a_service_of_another_type_is_ignored() {
    let desired = make(&usual().with(dual("a").cluster_ip()), &on("node1"));
    assert_eq!(pod_of(&desired, "10.244.1.11"), None);
    assert_eq!(
        desired.ignored,
        [(Subject::Service(key("a")), Ignored::NotLoadBalancer)].into()
    );
}

#[test]
fn an_endpoint_without_a_node_is_local_where_its_network_is() {
    let endpoint = endpoint("10.244.1.11", "node1").without_node();
    let view = cluster()
        .with(dual("a").announced_by("node2"))
        .with(slice("a-4", "a", [endpoint]));
    for (on_node, mark) in [("node1", Some(SLOT_1)), ("node3", None)] {
        assert_eq!(
            pod_of(&make(&view, &on(on_node)), "10.244.1.11")
                .unwrap()
                .mark,
            mark
        );
    }
}

#[test]
fn without_the_filter_pods_of_other_nodes_are_routed_too() {
    let settings = Settings {
        filter_endpoints_for_node: false,
        ..on("node1")
    };
    assert_eq!(
        pod_of(&make(&usual(), &settings), "10.244.3.11")
            .unwrap()
            .mark,
        Some(SLOT_1)
    );
}

#[test]
fn networks_of_other_nodes_are_guarded_where_pods_have_addresses_of_their_nodes() {
    let guards = |view: &View| {
        let view = View {
            is_gateway: true,
            ..view.clone()
        };
        let desired = make(&view, &on("node1"));
        !desired.kernel.families[&Family::V4]
            .firewall
            .remote_pods
            .is_empty()
    };
    let with_pod = |view: View, address: &str| view.with(own_pod("own", &[address]));
    let mut pools = usual();
    pools.pod_pools.insert("10.244.0.0/16".parse().unwrap());
    assert!(guards(&usual()));
    assert!(guards(&with_pod(usual(), "10.244.1.12")));
    assert!(
        !guards(&with_pod(usual(), "10.244.2.12")),
        "of node2's network"
    );
    assert!(
        !guards(&pools),
        "nobody knows where pods have their addresses from"
    );
    assert!(guards(&with_pod(pools.clone(), "10.244.1.12")));
    assert!(!guards(&with_pod(pools, "10.244.77.12")));
}

#[test]
fn a_slice_captures_no_pod_but_the_one_that_it_names() {
    let known = |view: &View| pod_of(&make(view, &on("node1")), "10.244.1.11").is_some();
    assert!(known(&usual().with(own_pod("pod", &["10.244.1.11"]))));
    let view = usual().with(own_pod("another", &["10.244.1.11"]));
    assert!(!known(&view));
    let subject = Subject::Endpoint {
        slice: key("a-4"),
        address: "10.244.1.11".to_owned(),
    };
    let desired = make(&view, &on("node1"));
    assert_eq!(
        desired.ignored.get(&subject),
        Some(&Ignored::AnotherPod(key("another")))
    );
}

#[test]
fn only_pods_of_this_node_tell_that_pod_networks_are_not_known() {
    let mut view = usual();
    view.nodes
        .entry(node_name("node3"))
        .or_default()
        .pod_cidrs
        .clear();
    let is_unknown = |name: &str| {
        let desired = make(&view, &on(name));
        desired.unknown_networks.contains_key(&Family::V4)
    };
    assert!(!is_unknown("node1"));
    assert!(is_unknown("node3"));
}

#[test]
fn with_a_strict_start_every_pod_of_this_node_waits_until_it_is_classified() {
    let mut view = usual()
        .with(own_pod("other", &["10.244.1.12", "fd00:10:244:1::c"]))
        .with(own_pod("pod", &["10.244.1.11"]));
    let free = PodState {
        ordinary: true,
        ..PodState::default()
    };
    let strict = Settings {
        strict_start: true,
        ..on("node1")
    };
    let desired = make(&view, &strict);
    for address in ["10.244.1.12", "fd00:10:244:1::c"] {
        assert_eq!(pod_of(&desired, address), Some(free.clone()));
    }
    assert!(!pod_of(&desired, "10.244.1.11").unwrap().ordinary);
    let nets = |desired: &Desired, family| {
        let firewall = &desired.kernel.families[&family].firewall;
        firewall.local_pods.clone()
    };
    let own: IpNet = "10.244.1.0/24".parse().unwrap();
    assert_eq!(nets(&desired, Family::V4), [own].into());
    // Calico gives addresses of its own pools.
    let pool: IpNet = "10.99.0.0/16".parse().unwrap();
    view.pod_pools = [pool].into();
    assert_eq!(nets(&make(&view, &strict), Family::V4), [own, pool].into());

    let desired = make(&view, &on("node1"));
    assert_eq!(pod_of(&desired, "10.244.1.12"), None);
    assert_eq!(nets(&desired, Family::V4), BTreeSet::new());
}

#[test]
fn only_other_nodes_pods_are_held_to_be_known_and_only_by_a_gateway() {
    let mut view = usual();
    view.is_gateway = true;
    let nets = |view: &View, settings: &Settings| {
        make(view, settings).kernel.families[&Family::V4]
            .firewall
            .remote_pods
            .clone()
    };
    // Those of two nodes, as the one network that they are to the kernel.
    let others: BTreeSet<IpNet> = ["10.244.2.0/23".parse().unwrap()].into();
    assert_eq!(nets(&view, &on("node1")), others);
    assert_eq!(nets(&usual(), &on("node1")), BTreeSet::new(), "no gateway");
    let router = Settings {
        guard_transit: false,
        ..on("node1")
    };
    assert_eq!(nets(&view, &router), BTreeSet::new());
}

#[test]
fn slots_are_kept_over_plans_and_adopted_from_the_kernel() {
    let settings = on("node1");
    let first = make(&usual(), &settings);
    let mut moved = usual();
    for announcer in moved.announcers.values_mut() {
        *announcer = node_name("node3");
    }
    let second = plan(&moved, &settings, &Family::ALL.into(), &first.slots);
    assert_eq!(
        pod_of(&second, "10.244.1.11").unwrap().mark.unwrap().value,
        0x0020_0000
    );
    let adopted = Slots::adopt(&second.kernel, &settings);
    assert_eq!(
        plan(&moved, &settings, &Family::ALL.into(), &adopted),
        second
    );
}

#[test]
fn a_family_that_the_kernel_lacks_is_left_alone() {
    let desired = plan(
        &usual(),
        &on("node1"),
        &[Family::V4].into(),
        &Slots::default(),
    );
    assert_eq!(
        desired.kernel.families.keys().collect::<Vec<_>>(),
        [&Family::V4]
    );
}

/// Small clusters with every kind of trouble, and what each of three agents knows and is told.
fn any_cluster() -> impl Strategy<Value = (World, Settings)> {
    (any_world(), any_settings(node_name("node1")))
}

fn agents((world, settings): &(World, Settings)) -> impl Iterator<Item = (View, Settings)> {
    ["node1", "node2", "node3"].into_iter().map(|name| {
        let node_name = node_name(name);
        let view = world.seen_from(&node_name);
        let settings = Settings {
            node_name,
            ..settings.clone()
        };
        (view, settings)
    })
}

/// Whether a node is as it was when its agent said that it has programmed it, and can be reached by all others alike.
fn is_usable(node: &Node) -> bool {
    node.is_programmed() && node.addresses.len() == 2
}

proptest! {
    #[test]
    fn i1_an_egress_pod_is_translated_routed_or_blocked_on_every_node(cluster in any_cluster()) {
        for (view, settings) in agents(&cluster) {
            for state in make(&view, &settings).kernel.families.values() {
                for (address, pod) in &state.firewall.pods {
                    if pod.ordinary {
                        prop_assert!(settings.strict_start);
                        let ordinary = PodState { ordinary: true, ..PodState::default() };
                        prop_assert_eq!(pod, &ordinary);
                        continue;
                    }
                    prop_assert!(pod.egress);
                    prop_assert!(pod.blocked || !pod.vips.is_empty());
                    prop_assert!(pod.vips.len() <= 1);
                    prop_assert!(pod.vips.is_subset(&state.firewall.vips));
                    prop_assert!(!(pod.blocked && pod.mark.is_some()));
                    if let Some(mark) = pod.mark {
                        // The pod's own rule, where gateways share a mark, else the one of the mark.
                        let table = |from: Option<IpAddr>| {
                            let rules = state.routes.rules.iter();
                            let mut rules = rules.filter(|rule| (rule.mark, rule.from) == (Some(mark), from));
                            rules.find_map(|rule| match rule.action {
                                RuleAction::Lookup(table) => Some(table),
                                _ => None,
                            })
                        };
                        let table = table(Some(*address)).or_else(|| table(None));
                        let table = &state.routes.tables[&table.expect("a rule for every mark")];
                        prop_assert!(table.fallback && table.gateway.is_some());
                    }
                }
            }
        }
    }

    /// Pods that only their own node knows, or knows better than the slices, are left out: what others think of them is
    /// not promised before a slice says it. So are verdicts about gateways that are no gateways to others but to
    /// themselves.
    #[test]
    fn nodes_agree_on_owner_vip_and_gateway_of_every_pod(cluster in any_cluster()) {
        let seen: Vec<(View, Settings)> = agents(&cluster).collect();
        let plans: Vec<Desired> = seen.iter().map(|(view, settings)| make(view, settings)).collect();
        let own: BTreeSet<IpAddr> = seen.iter()
            .flat_map(|(view, _)| view.pods.values().flat_map(|pod| pod.addresses.iter().copied()))
            .collect();
        let vips = |desired: &Desired| -> BTreeMap<IpAddr, BTreeSet<IpAddr>> {
            let firewalls = desired.kernel.families.values().map(|family| &family.firewall);
            let pods = firewalls.flat_map(|f| f.pods.iter().filter(|(pod, _)| !own.contains(pod)));
            pods.map(|(pod, state)| (*pod, state.vips.clone())).collect()
        };
        let services = |desired: &Desired| {
            let mut services = desired.services.clone();
            for verdicts in services.values_mut() {
                verdicts.retain(|_, verdict| match verdict {
                    Verdict::Active { gateway, .. } | Verdict::Blocked(
                        Blocked::GatewayNotProgrammed(gateway)
                        | Blocked::GatewayWithoutAddress(gateway)
                        | Blocked::GatewayOffLink(gateway, ..)
                    ) | Verdict::Released(
                        Blocked::GatewayNotProgrammed(gateway)
                        | Blocked::GatewayWithoutAddress(gateway)
                        | Blocked::GatewayOffLink(gateway, ..)
                    ) => {
                        let (view, settings) = &seen[0];
                        let mut lan = view.interfaces.iter().map(|link| &link.name);
                        let is_reached = match &settings.lan_interface {
                            Some(named) => lan.any(|name| name == named),
                            None => lan.next().is_some(),
                        };
                        view.nodes.get(gateway).is_some_and(is_usable) && is_reached
                    }
                    Verdict::Blocked(_) | Verdict::Released(_) => true,
                });
            }
            services
        };
        let ignored = |desired: &Desired| {
            let mut ignored = desired.ignored.clone();
            ignored.retain(|subject, _| match subject {
                Subject::Endpoint { address, .. } => !own.contains(&ip(address)),
                Subject::Service(_) | Subject::OnNoGateway(_) => true,
            });
            ignored
        };
        for other in &plans[1..] {
            prop_assert_eq!(services(&plans[0]), services(other));
            prop_assert_eq!(ignored(&plans[0]), ignored(other));
            let (ours, theirs) = (vips(&plans[0]), vips(other));
            for pod in ours.keys().filter(|pod| theirs.contains_key(pod)) {
                prop_assert_eq!(&ours[pod], &theirs[pod], "{}", pod);
            }
        }
    }

    #[test]
    fn a_plan_is_stable(cluster in any_cluster()) {
        for (view, settings) in agents(&cluster) {
            let first = make(&view, &settings);
            prop_assert_eq!(&plan(&view, &settings, &Family::ALL.into(), &first.slots), &first);
        }
    }
}
