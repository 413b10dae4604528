use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;

use super::*;
use crate::ethernet::Mac;
use crate::state::{
    ConnectionStep, FirewallStep, Mark, NextHop, PodSet, Remnant, Rule, RuleAction, Table, TableId,
    Way,
};

fn ip(last: u8) -> IpAddr {
    IpAddr::from([10, 244, 1, last])
}

fn vip(last: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, last])
}

fn mark(slot: u32) -> Mark {
    Mark {
        value: slot << 20,
        mask: 0x00f0_0000,
    }
}

fn kernel(pod: Option<PodState>) -> KernelState {
    let firewall = FirewallState {
        skeleton: Skeleton::Intact,
        vips: [vip(200)].into(),
        pods: pod.map(|pod| (ip(11), pod)).into_iter().collect(),
        ..FirewallState::default()
    };
    let state = FamilyState {
        firewall,
        ..FamilyState::default()
    };
    KernelState {
        families: [(Family::V4, state)].into(),
        ..KernelState::default()
    }
}

fn translated() -> PodState {
    PodState {
        egress: true,
        vips: [vip(200)].into(),
        ..PodState::default()
    }
}

fn routed(slot: u32) -> PodState {
    PodState {
        mark: Some(mark(slot)),
        ..translated()
    }
}

fn gateway_here() -> PodState {
    PodState {
        gateway_here: true,
        ..translated()
    }
}

fn blocked() -> PodState {
    PodState {
        blocked: true,
        ..translated()
    }
}

fn steps(from: Option<PodState>, to: Option<PodState>) -> Vec<String> {
    let steps = diff(&kernel(from), &kernel(to));
    steps.iter().map(Step::to_string).collect()
}

const FORGET: &str = "forget the connections of pod 10.244.1.11";
const ELICIT: &str = "elicit an ACK of pod 10.244.1.11 on each of its connections";

#[test]
fn a_new_pod_is_translated_and_known_before_it_is_marked() {
    assert_eq!(
        steps(None, Some(routed(1))),
        [
            "translate pod 10.244.1.11 to 192.0.2.200",
            "add 10.244.1.11 to the egress pods",
            "mark pod 10.244.1.11 with 0x100000/0xf00000",
            FORGET,
            ELICIT,
        ]
    );
}

#[test]
fn a_pod_that_is_released_stays_guarded_until_its_connections_are_forgotten() {
    assert_eq!(
        steps(Some(routed(1)), None),
        [
            "no longer mark pod 10.244.1.11",
            "no longer translate pod 10.244.1.11 to 192.0.2.200",
            FORGET,
            "remove 10.244.1.11 from the egress pods",
        ]
    );
}

#[test]
fn a_gateway_that_moves_between_other_nodes_changes_only_the_mark() {
    assert_eq!(
        steps(Some(routed(1)), Some(routed(2))),
        ["mark pod 10.244.1.11 with 0x200000/0xf00000"]
    );
}

#[test]
fn pods_whose_packets_take_another_way_are_woken_at_last() {
    // Two gateways, one of them by a rule of the pod's own.
    let kernel = |via: [u8; 2], pod: PodState| {
        let mut state = kernel(Some(pod));
        let routes = &mut state.families.entry(Family::V4).or_default().routes;
        for (slot, via, from) in [(1, via[0], None), (2, via[1], Some(ip(11)))] {
            let table = TableId(100_000 + slot);
            routes.rules.insert(Rule {
                priority: 1002,
                action: RuleAction::Lookup(table),
                mark: Some(mark(slot)),
                not: false,
                from,
                to: None,
            });
            let gateway = Some(NextHop {
                via: vip(via),
                dev: "eth0".to_owned(),
            });
            let content = Table {
                fallback: true,
                gateway,
                ..Table::default()
            };
            routes.tables.insert(table, content);
        }
        state
    };
    let before = kernel([12, 13], routed(1));
    for (what, after, woken) in [
        ("nothing", kernel([12, 13], routed(1)), false),
        (
            "another gateway's address",
            kernel([12, 14], routed(1)),
            false,
        ),
        ("the gateway's address", kernel([14, 13], routed(1)), true),
        ("the slot", kernel([12, 13], routed(2)), true),
        (
            "slot and tables, to the same gateway",
            kernel([13, 12], routed(2)),
            false,
        ),
    ] {
        let steps = diff(&before, &after);
        assert_eq!(
            steps.last() == Some(&Step::Connection(ConnectionStep::ElicitAck(ip(11)))),
            woken,
            "{what}"
        );
        let wakes = steps
            .iter()
            .filter(|step| matches!(step, Step::Connection(ConnectionStep::ElicitAck(_))));
        assert_eq!(wakes.count(), usize::from(woken), "{what}");
    }
}

#[test]
fn a_node_that_becomes_or_stops_being_the_gateway_forgets_the_connections() {
    assert_eq!(
        steps(Some(routed(1)), Some(gateway_here())),
        [
            "no longer mark pod 10.244.1.11",
            FORGET,
            "add 10.244.1.11 to the pods whose gateway this node is",
            ELICIT,
        ]
    );
    assert_eq!(
        steps(Some(gateway_here()), Some(translated())),
        [
            FORGET,
            "remove 10.244.1.11 from the pods whose gateway this node is"
        ]
    );
}

#[test]
fn a_pod_of_another_node_that_does_not_pass_here_costs_no_look_at_the_connections() {
    assert_eq!(
        steps(None, Some(translated())),
        [
            "translate pod 10.244.1.11 to 192.0.2.200",
            "add 10.244.1.11 to the egress pods"
        ]
    );
}

#[test]
fn what_came_while_a_guard_was_not_whole_is_looked_for_where_there_had_been_one() {
    let remote = kernel(Some(translated()));
    let to = kernel(Some(routed(1)));
    let route = |state: &mut KernelState| {
        let routes = &mut state.families.entry(Family::V4).or_default().routes;
        let gateway = None;
        let fallback = true;
        routes.tables.insert(
            TableId(100_001),
            Table {
                fallback,
                gateway,
                ..Table::default()
            },
        );
    };
    let with = |mut state: KernelState, skeleton: Skeleton| {
        let firewall = &mut state.families.entry(Family::V4).or_default().firewall;
        firewall.skeleton = skeleton;
        state
    };
    let nothing = || with(KernelState::default(), Skeleton::Absent);
    let damaged = || Skeleton::Damaged("chain guard".to_owned());
    let mut flushed = nothing();
    route(&mut flushed);
    for (what, from, to, expected) in [
        ("whole", to.clone(), &to, vec![]),
        ("the first one", nothing(), &to, vec![]),
        ("damaged", with(to.clone(), damaged()), &to, vec![ip(11)]),
        ("flushed, with the routes left", flushed, &to, vec![ip(11)]),
        (
            "chains gone, with the sets left",
            with(to.clone(), Skeleton::Absent),
            &to,
            vec![ip(11)],
        ),
        (
            "damaged, of a pod that is elsewhere",
            with(remote.clone(), damaged()),
            &remote,
            vec![],
        ),
    ] {
        let from = KernelState {
            doubt: true,
            ..from
        };
        let steps = diff(&from, to);
        let found = steps.iter().find_map(|step| match step {
            Step::Connection(ConnectionStep::ForgetWrongSource { unguarded, .. }) => {
                Some(unguarded.iter().copied().collect::<Vec<_>>())
            }
            _ => None,
        });
        assert_eq!(found, Some(expected), "{what}");
    }
}

#[test]
fn a_pod_is_blocked_before_its_mark_goes_and_unblocked_after_it_is_back() {
    assert_eq!(
        steps(Some(routed(1)), Some(blocked())),
        [
            "add 10.244.1.11 to the blocked pods",
            "no longer mark pod 10.244.1.11",
            FORGET,
            ELICIT,
        ]
    );
    assert_eq!(
        steps(Some(blocked()), Some(routed(1))),
        [
            "mark pod 10.244.1.11 with 0x100000/0xf00000",
            FORGET,
            "remove 10.244.1.11 from the blocked pods",
            ELICIT,
        ]
    );
}

#[test]
fn a_gateway_that_may_have_been_none_for_a_while_begins_anew_or_stops() {
    let interrupted = PodState {
        interrupted: true,
        ..gateway_here()
    };
    assert_eq!(
        steps(Some(interrupted.clone()), Some(gateway_here())),
        [
            "resume the connections of pod 10.244.1.11 as 192.0.2.200",
            "add 10.244.1.11 to the pods whose gateway this node is"
        ]
    );
    assert_eq!(
        steps(Some(interrupted), Some(translated())),
        [
            FORGET,
            "remove 10.244.1.11 from the pods whose gateway this node is"
        ]
    );
}

#[test]
fn a_changed_vip_is_added_before_the_old_one_is_removed() {
    let mut other = gateway_here();
    other.vips = [vip(201)].into();
    assert_eq!(
        steps(Some(gateway_here()), Some(other)),
        [
            "translate pod 10.244.1.11 to 192.0.2.201",
            "no longer translate pod 10.244.1.11 to 192.0.2.200",
            FORGET,
            ELICIT,
        ]
    );
}

#[test]
fn the_firewall_is_installed_with_every_translation_that_is_in_use() {
    let mut damaged = kernel(Some(routed(1)));
    let firewall = &mut damaged.families.get_mut(&Family::V4).unwrap().firewall;
    firewall.skeleton = Skeleton::Damaged("a jump is missing".to_owned());
    firewall.vips.clear();
    let steps = diff(&damaged, &kernel(Some(routed(1))));
    assert_eq!(
        steps,
        [Step::Firewall(FirewallStep::Install(
            Family::V4,
            [vip(200)].into()
        ))]
    );
}

#[test]
fn a_table_has_its_floor_first_and_loses_it_last() {
    let table = TableId(100_001);
    let lookup = Rule {
        priority: 1002,
        action: RuleAction::Lookup(table),
        mark: Some(mark(1)),
        not: false,
        from: None,
        to: None,
    };
    let mut with = kernel(None);
    let routes = &mut with.families.get_mut(&Family::V4).unwrap().routes;
    routes.rules.insert(lookup);
    let gateway = Some(NextHop {
        via: vip(12),
        dev: "eth0".to_owned(),
    });
    routes.tables.insert(
        table,
        Table {
            fallback: true,
            gateway,
            throws: [net(1)].into(),
        },
    );
    fn text(from: &KernelState, to: &KernelState) -> Vec<String> {
        diff(from, to).iter().map(Step::to_string).collect()
    }
    let fallback = "the unreachable IPv4 default of table 100001";
    assert_eq!(
        text(&kernel(None), &with),
        [
            format!("add {fallback}"),
            "route table 100001 via 192.0.2.12 dev eth0".to_owned(),
            "let table 100001 leave 10.1.0.0/16 to later rules".to_owned(),
            "add IPv4 rule pref 1002 fwmark 0x100000/0xf00000 lookup 100001".to_owned(),
        ]
    );
    // A run that died has left the table: its rule waits all the same.
    let mut begun = kernel(None);
    let routes = &mut begun.families.get_mut(&Family::V4).unwrap().routes;
    let left = Table {
        fallback: true,
        ..Table::default()
    };
    routes.tables.insert(table, left);
    assert_eq!(text(&begun, &with), text(&kernel(None), &with)[1..]);
    assert_eq!(
        text(&with, &kernel(None)),
        [
            "remove IPv4 rule pref 1002 fwmark 0x100000/0xf00000 lookup 100001".to_owned(),
            "remove from table 100001 the route via 192.0.2.12 dev eth0".to_owned(),
            "let table 100001 decide about 10.1.0.0/16".to_owned(),
            format!("remove {fallback}"),
        ]
    );
}

fn any_pod() -> impl Strategy<Value = PodState> {
    let vips = proptest::collection::btree_set((200..203_u8).prop_map(vip), 0..3);
    let mark = proptest::option::of((1..4_u32).prop_map(mark));
    let flags = any::<[bool; 5]>();
    (vips, mark, flags).prop_map(
        |(vips, mark, [egress, gateway_here, interrupted, blocked, ordinary])| PodState {
            egress,
            vips,
            mark,
            gateway_here,
            interrupted: gateway_here && interrupted,
            blocked,
            ordinary,
        },
    )
}

/// What plans want of a pod: known, and with a way out or blocked.
fn wanted_pod() -> impl Strategy<Value = PodState> {
    prop_oneof![
        Just(translated()),
        Just(gateway_here()),
        Just(blocked()),
        (1..4_u32).prop_map(routed),
        Just(PodState {
            egress: true,
            blocked: true,
            ..PodState::default()
        }),
        (201..203_u8).prop_map(|last| PodState {
            vips: [vip(last)].into(),
            ..gateway_here()
        }),
        Just(PodState {
            ordinary: true,
            ..PodState::default()
        }),
    ]
}

fn net(n: u8) -> IpNet {
    IpNet::new(IpAddr::from([10, n, 0, 0]), 16).unwrap()
}

fn any_net() -> impl Strategy<Value = IpNet> {
    (0..4_u8).prop_map(net)
}

fn any_landmark() -> impl Strategy<Value = Landmark> {
    prop_oneof![
        (1..4_u32, 11..13_u8).prop_map(|(slot, last)| Landmark::Way(Way {
            mark: mark(slot),
            via: vip(last),
        })),
        (1..4_u8).prop_map(|n| Landmark::Node(Mac([2, 0, 0, 0, 0, n]))),
        (0..2_u8).prop_map(|n| Landmark::Lan(format!("eth{n}"))),
    ]
}

fn any_routes() -> impl Strategy<Value = RouteState> {
    let action = prop_oneof![
        Just(RuleAction::Nop),
        Just(RuleAction::Unreachable),
        (1..4_u32).prop_map(|t| RuleAction::Lookup(TableId(t))),
        Just(RuleAction::Goto(1099)),
    ];
    let rule = (1000..1003_u32, action).prop_map(|(priority, action)| Rule {
        priority,
        action,
        mark: None,
        not: false,
        from: None,
        to: None,
    });
    let gateway = (11..13_u8).prop_map(|last| NextHop {
        via: vip(last),
        dev: "eth0".to_owned(),
    });
    let throws = proptest::collection::btree_set(any_net(), 0..3);
    let table = (any::<bool>(), proptest::option::of(gateway), throws).prop_map(
        |(fallback, gateway, throws)| Table {
            fallback,
            gateway,
            throws,
        },
    );
    let tables = proptest::collection::btree_map((1..4_u32).prop_map(TableId), table, 0..3);
    (proptest::collection::btree_set(rule, 0..5), tables).prop_map(|(rules, mut tables)| {
        tables.retain(|_, table| *table != Table::default());
        RouteState { rules, tables }
    })
}

fn any_state(
    pod: impl Strategy<Value = PodState> + 'static,
    skeleton: impl Strategy<Value = Skeleton> + 'static,
    all_vips: bool,
) -> impl Strategy<Value = KernelState> {
    let nets = || proptest::collection::btree_set(any_net(), 0..4);
    let pods = proptest::collection::btree_map((11..15_u8).prop_map(ip), pod, 0..5);
    let vips = proptest::collection::btree_set((200..204_u8).prop_map(vip), 0..4);
    let landmarks = proptest::collection::btree_set(any_landmark(), 0..4);
    let nets = (nets(), nets(), nets());
    (skeleton, nets, vips, pods, landmarks, any_routes()).prop_map(
        move |(skeleton, nets, mut vips, mut pods, landmarks, routes)| {
            let (excluded, remote_pods, local_pods) = nets;
            pods.retain(|_, pod| *pod != PodState::default());
            if all_vips {
                vips.extend(pods.values().flat_map(|pod| pod.vips.iter().copied()));
            }
            let firewall = FirewallState {
                skeleton,
                excluded,
                remote_pods,
                local_pods,
                vips,
                landmarks,
                pods,
            };
            KernelState {
                families: [(Family::V4, FamilyState { routes, firewall })].into(),
                ..KernelState::default()
            }
        },
    )
}

/// Whatever a crash, a bug or an operator may leave.
fn observed() -> impl Strategy<Value = KernelState> {
    let skeleton = prop_oneof![
        Just(Skeleton::Absent),
        Just(Skeleton::Damaged("…".to_owned())),
        Just(Skeleton::Intact),
    ];
    any_state(any_pod(), skeleton, false)
}

fn desired() -> impl Strategy<Value = KernelState> {
    any_state(wanted_pod(), Just(Skeleton::Intact), true)
}

fn pods(state: &KernelState) -> &BTreeMap<IpAddr, PodState> {
    &state.families[&Family::V4].firewall.pods
}

fn remnants() -> impl Strategy<Value = BTreeSet<Remnant>> {
    let all = vec![
        Remnant::Nftables,
        Remnant::IptablesNft,
        Remnant::IptablesLegacy,
        Remnant::Ipsets,
        Remnant::EarlierRelease,
    ];
    proptest::sample::subsequence(all, 0..=5).prop_map(|some| some.into_iter().collect())
}

proptest! {
    #[test]
    fn i5_from_any_state_the_steps_lead_to_the_desired_one(
        from in observed(), remnants in remnants(), doubt: bool, to in desired()
    ) {
        let from = KernelState { remnants, doubt, ..from };
        let mut state = from.clone();
        for step in diff(&from, &to) {
            state.apply(&step);
        }
        prop_assert_eq!(state, to);
    }

    #[test]
    fn i7_equal_states_need_no_step(state in desired()) {
        prop_assert_eq!(diff(&state, &state), []);
    }

    /// Four sets, a translation and an old one, a mark, the connections and an ACK: more than that for one pod is work
    /// that does not come of the change.
    #[test]
    fn i7_a_change_of_one_pod_takes_few_steps_that_are_all_about_it(
        state in desired(), which in 11..15_u8, pod in prop::option::of(wanted_pod())
    ) {
        let mut from = state;
        let firewall = &mut from.families.entry(Family::V4).or_default().firewall;
        firewall.vips.extend((200..204_u8).map(vip));
        let mut to = from.clone();
        let pods = &mut to.families.entry(Family::V4).or_default().firewall.pods;
        pods.remove(&ip(which));
        pods.extend(pod.map(|pod| (ip(which), pod)));
        let steps = diff(&from, &to);
        for step in &steps {
            prop_assert_eq!(step.pod(), Some(ip(which)), "{}", step);
        }
        prop_assert!(steps.len() <= 9, "{steps:?}");
    }

    #[test]
    fn i5_a_run_that_dies_after_any_step_is_completed_by_the_next(from in observed(), to in desired()) {
        let steps = diff(&from, &to);
        let mut state = from;
        for step in &steps {
            state.apply(step);
            let mut resumed = state.clone();
            for step in diff(&state, &to) {
                resumed.apply(&step);
            }
            prop_assert_eq!(&resumed, &to);
        }
    }

    #[test]
    fn i1_a_pod_that_stays_an_egress_pod_is_protected_after_every_step(from in desired(), to in desired()) {
        let mut state = from.clone();
        let is_known = |state: &KernelState, pod: &IpAddr| pods(state).get(pod).is_some_and(|pod| pod.egress);
        let stays: Vec<IpAddr> = pods(&from).keys().filter(|pod| is_known(&from, pod) && is_known(&to, pod)).copied().collect();
        for step in diff(&from, &to) {
            state.apply(&step);
            for pod in &stays {
                let now = &pods(&state)[pod];
                prop_assert!(now.egress, "{step}");
                prop_assert!(now.blocked || now.mark.is_some() || !now.vips.is_empty(), "{step}");
            }
        }
    }

    #[test]
    fn i1_a_pod_is_forgotten_before_it_leaves_whenever_the_agent_dies(from in desired(), to in desired()) {
        let is_known = |state: &KernelState, pod: &IpAddr| pods(state).get(pod).is_some_and(|pod| pod.egress);
        let leaving: Vec<IpAddr> = pods(&from)
            .iter()
            .filter(|(pod, state)| opens_connections_here(state) && is_known(&from, pod) && !is_known(&to, pod))
            .map(|(pod, _)| *pod)
            .collect();
        let steps = diff(&from, &to);
        for death in 0..=steps.len() {
            let (done, _) = steps.split_at(death);
            let mut state = from.clone();
            done.iter().for_each(|step| state.apply(step));
            state.doubt = true;
            let all: Vec<Step> = done.iter().cloned().chain(diff(&state, &to)).collect();
            for pod in &leaving {
                let forgotten = all.iter().position(|step| *step == Step::Connection(ConnectionStep::Forget(*pod)));
                let unknown = all.iter().position(|step| *step == Step::Firewall(FirewallStep::RemovePod(PodSet::Egress, *pod)));
                prop_assert!(forgotten.is_some() && forgotten < unknown, "{pod}, death after {death} steps");
            }
        }
    }

    #[test]
    fn i4_a_classified_pod_never_waits_to_be_classified(from in desired(), to in desired()) {
        let waits = |state: &KernelState, pod: &IpAddr| {
            let firewall = &state.families[&Family::V4].firewall;
            let is_classified = firewall.pods.get(pod).is_some_and(|pod| pod.egress || pod.ordinary);
            !firewall.local_pods.is_empty() && !is_classified
        };
        let all: BTreeSet<IpAddr> = pods(&from).keys().chain(pods(&to).keys()).copied().collect();
        let mut state = from.clone();
        for step in diff(&from, &to) {
            state.apply(&step);
            for pod in all.iter().filter(|pod| !waits(&from, pod) && !waits(&to, pod)) {
                prop_assert!(!waits(&state, pod), "{pod} waits after: {step}");
            }
        }
    }

    #[test]
    fn i1_a_new_pod_is_never_marked_without_our_translation_in_force(from in desired(), to in desired()) {
        let mut state = from.clone();
        for step in diff(&from, &to) {
            state.apply(&step);
            let firewall = &state.families[&Family::V4].firewall;
            for now in firewall.pods.values() {
                prop_assert!(now.mark.is_none() || now.egress, "{step}");
                prop_assert!(now.vips.is_subset(&firewall.vips), "{step}");
            }
        }
    }

    #[test]
    fn i1_no_step_leaves_a_table_in_use_without_its_floor(from in desired(), to in desired()) {
        let mut state = from.clone();
        let floors = |state: &KernelState| -> Vec<TableId> {
            let routes = &state.families[&Family::V4].routes;
            let used = routes.rules.iter().filter_map(|rule| match rule.action {
                RuleAction::Lookup(table) => Some(table),
                _ => None,
            });
            used.filter(|table| !routes.tables.get(table).is_some_and(|t| t.fallback)).collect()
        };
        let before = floors(&from);
        let after = floors(&to);
        for step in diff(&from, &to) {
            state.apply(&step);
            for open in floors(&state) {
                prop_assert!(before.contains(&open) || after.contains(&open), "{step}");
            }
        }
    }
}
