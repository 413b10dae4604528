//! States of a node's kernel that tests go between, and the addresses in them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;
use metaleg::diff::diff;
use metaleg::ethernet::Mac;
use metaleg::kernel::{Kernel as _, NodeKernel};
use metaleg::state::{
    Family, FamilyState, FirewallState, KernelState, Landmark, Mark, NextHop, PodState, RouteState,
    Rule, RuleAction, Skeleton, Step, Table, TableId, Way,
};

use crate::mode::{Mode, open};

pub(crate) const MASK: u32 = 0x00f0_0000;
/// The table that rejects.
pub(crate) const FLOOR: TableId = TableId(100_000);
/// The link-layer address of the other node that is known.
pub(crate) const NODE_MAC: Mac = Mac([2, 0, 0, 0, 0, 12]);
/// This node, in both families.
const NODE: [&str; 2] = ["192.0.2.11", "2001:db8:1::11"];
/// VIPs: the two of the example, and a new one.
pub(crate) const VIPS: [[&str; 3]; 2] = [
    ["192.0.2.200", "192.0.2.201", "192.0.2.210"],
    [
        "2001:db8:1::c8",
        "2001:db8:1:ffff:ffff:ffff:ffff:ffff",
        "2001:db8:1::d2",
    ],
];
pub(crate) const OUTSIDE: [&str; 2] = ["198.51.100.10", "2001:db8:2::10"];

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn place(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

pub(crate) fn node(family: Family) -> IpAddr {
    ip(NODE[place(family)])
}

pub(crate) fn vip(family: Family, number: usize) -> IpAddr {
    ip(VIPS[place(family)][number])
}

pub(crate) fn outside(family: Family) -> IpAddr {
    ip(OUTSIDE[place(family)])
}

pub(crate) fn pod(family: Family, last: u8) -> IpAddr {
    let net = ["10.244.1.", "fd00:10:244:1::"][place(family)];
    ip(&format!("{net}{last}"))
}

pub(crate) fn slot(number: u32) -> Mark {
    Mark {
        value: number << MASK.trailing_zeros(),
        mask: MASK,
    }
}

pub(crate) fn rule(place: u32, action: RuleAction) -> Rule {
    Rule {
        priority: 1000 + place,
        action,
        mark: None,
        not: false,
        from: None,
        to: None,
    }
}

/// The rules of a slot: to its gateway's table, and to the floor.
pub(crate) fn lookups(number: u32) -> [Rule; 2] {
    let mark = Some(slot(number));
    let table = TableId(FLOOR.0 + number);
    [(0, table), (1, FLOOR)].map(|(place, table)| Rule {
        mark,
        ..rule(place, RuleAction::Lookup(table))
    })
}

/// What a plan for a small cluster looks like: pods in every state, in both families.
pub(crate) fn example() -> KernelState {
    let slot_1 = Mark {
        value: 0x0010_0000,
        mask: MASK,
    };
    let mut families = BTreeMap::new();
    for (family, pod, vip, via, nets) in [
        (
            Family::V4,
            "10.244.1.",
            ["192.0.2.200", "192.0.2.201"],
            "192.0.2.12",
            [
                "10.244.2.0/24",
                "127.0.0.0/8",
                "10.244.1.0/24",
                "192.0.2.11/32",
            ],
        ),
        (
            Family::V6,
            "fd00:10:244:1::",
            ["2001:db8:1::c8", "2001:db8:1:ffff:ffff:ffff:ffff:ffff"],
            "2001:db8:1::12",
            [
                "fd00:10:244:2::/64",
                "::1/128",
                "fe80::/10",
                "2001:db8:1::11/128",
            ],
        ),
    ] {
        let vips: BTreeSet<IpAddr> = vip.map(ip).into();
        let translated = PodState {
            egress: true,
            vips: [ip(vip[0])].into(),
            ..PodState::default()
        };
        let states = [
            translated.clone(),
            PodState {
                mark: Some(slot_1),
                ..translated.clone()
            },
            PodState {
                gateway_here: true,
                vips: [ip(vip[1])].into(),
                ..translated.clone()
            },
            PodState {
                blocked: true,
                vips: BTreeSet::new(),
                ..translated
            },
            PodState {
                ordinary: true,
                ..PodState::default()
            },
        ];
        let pods = (11..)
            .zip(states)
            .map(|(last, state)| (ip(&format!("{pod}{last}")), state));
        let nets = nets.map(|net| net.parse().unwrap());
        let table = TableId(100_001);
        // Each is a step, and most steps are an agent that dies there.
        let throws: BTreeSet<IpNet> = [nets[0], nets[2]].into();
        let gateway = NextHop {
            via: ip(via),
            dev: "eth0".to_owned(),
        };
        let table_state = Table {
            fallback: true,
            gateway: Some(gateway),
            throws: throws.clone(),
        };
        let floor = Table {
            fallback: true,
            gateway: None,
            throws,
        };
        let way = Way {
            mark: slot_1,
            via: ip(via),
        };
        let state = FamilyState {
            routes: RouteState {
                rules: lookups(1).into(),
                tables: [(table, table_state), (FLOOR, floor)].into(),
            },
            firewall: FirewallState {
                skeleton: Skeleton::Intact,
                excluded: nets.into(),
                remote_pods: [nets[0]].into(),
                local_pods: [nets[0]].into(),
                vips,
                landmarks: [
                    Landmark::Way(way),
                    Landmark::Node(NODE_MAC),
                    Landmark::Lan("eth0".to_owned()),
                ]
                .into(),
                pods: pods.collect(),
            },
        };
        families.insert(family, state);
    }
    KernelState {
        families,
        ..KernelState::default()
    }
}

/// Marks stand for what the routes say.
pub(crate) fn rebuild_ways(state: &mut FamilyState) {
    let landmarks = &mut state.firewall.landmarks;
    landmarks.retain(|landmark| !matches!(landmark, Landmark::Way(_)));
    landmarks.extend(state.routes.ways().map(Landmark::Way));
}

/// Nothing of ours, as the agent wants it before it goes.
pub(crate) fn nothing() -> KernelState {
    KernelState {
        families: Family::ALL
            .map(|family| (family, FamilyState::default()))
            .into(),
        ..KernelState::default()
    }
}

/// The example after a day in its life: VIPs moved to this node, away from it and between others, one VIP became
/// another, a pod went, new ones came, one got its way out, and the networks of the cluster changed.
pub(crate) fn changed() -> KernelState {
    let mut state = example();
    for (family, old_net, new_net, remote, via) in [
        (
            Family::V4,
            "192.0.2.11/32",
            "10.96.0.0/12",
            "10.244.3.0/24",
            ["192.0.2.13", "192.0.2.14"],
        ),
        (
            Family::V6,
            "fe80::/10",
            "fd00:10:96::/112",
            "fd00:10:244:3::/64",
            ["2001:db8:1::13", "2001:db8:1::14"],
        ),
    ] {
        let FamilyState { routes, firewall } = state.families.get_mut(&family).unwrap();
        let [old_net, new_net, remote] =
            [old_net, new_net, remote].map(|net| net.parse::<IpNet>().unwrap());
        let floor = routes.tables.get_mut(&FLOOR).unwrap();
        floor.throws.remove(&old_net);
        floor.throws.insert(new_net);
        let throws = floor.throws.clone();
        for (number, via) in (1..).zip(via) {
            routes.rules.extend(lookups(number));
            let gateway = NextHop {
                via: ip(via),
                dev: "eth0".to_owned(),
            };
            let table_state = Table {
                fallback: true,
                gateway: Some(gateway),
                throws: throws.clone(),
            };
            routes.tables.insert(TableId(FLOOR.0 + number), table_state);
        }
        firewall.landmarks = [
            Landmark::Node(Mac([2, 0, 0, 0, 0, 13])),
            Landmark::Lan("eth1".to_owned()),
        ]
        .into();
        firewall.excluded.remove(&old_net);
        firewall.excluded.insert(new_net);
        firewall.remote_pods = [remote].into();
        firewall.vips = [vip(family, 0), vip(family, 2)].into();
        let with_vip = |number| PodState {
            egress: true,
            vips: [vip(family, number)].into(),
            ..PodState::default()
        };
        let to_slot = |number, mark| PodState {
            mark: Some(slot(mark)),
            ..with_vip(number)
        };
        let here = |number| PodState {
            gateway_here: true,
            ..with_vip(number)
        };
        let blocked = PodState {
            blocked: true,
            vips: BTreeSet::new(),
            ..with_vip(0)
        };
        let pods = [
            (12, here(0)),
            (13, to_slot(2, 2)),
            (14, to_slot(0, 1)),
            (15, blocked),
            (16, here(2)),
        ];
        firewall.pods = pods.map(|(last, state)| (pod(family, last), state)).into();
        rebuild_ways(state.families.get_mut(&family).unwrap());
    }
    state
}

/// The chains of a node that has nothing to do.
pub(crate) fn idle() -> KernelState {
    let mut state = nothing();
    for family in state.families.values_mut() {
        family.firewall.skeleton = Skeleton::Intact;
    }
    state
}

/// The example before any Service was labelled.
pub(crate) fn unlabelled() -> KernelState {
    let mut state = example();
    for family in state.families.values_mut() {
        family.firewall.pods.clear();
        family.firewall.vips.clear();
    }
    state
}

/// One pod of this node is labelled: the route to its gateway comes with it.
pub(crate) fn labelled(last: u8) -> KernelState {
    labelled_all(&[last])
}

pub(crate) fn labelled_all(pods: &[u8]) -> KernelState {
    let mut state = example();
    for (family, FamilyState { routes, firewall }) in &mut state.families {
        let wanted: Vec<IpAddr> = pods.iter().map(|last| pod(*family, *last)).collect();
        firewall.pods.retain(|pod, _| wanted.contains(pod));
        let vips = firewall.pods.values().flat_map(|pod| &pod.vips);
        firewall.vips = vips.copied().collect();
        if firewall.pods.values().all(|pod| pod.mark.is_none()) {
            *routes = RouteState::default();
        }
    }
    state.families.values_mut().for_each(rebuild_ways);
    state
}

/// No pod is labelled, on a node whose exclusions and rules are there.
pub(crate) fn ordinary() -> KernelState {
    let mut state = labelled(13);
    for FamilyState { firewall, .. } in state.families.values_mut() {
        firewall.pods.clear();
        firewall.vips.clear();
    }
    state
}

/// What there is, apart from the doubt about connections that comes with looking.
pub(crate) async fn observe(kernel: &mut NodeKernel) -> KernelState {
    KernelState {
        doubt: false,
        ..kernel.observe().await.unwrap().state
    }
}

pub(crate) async fn apply(kernel: &mut NodeKernel, steps: &[Step]) {
    let failed = kernel.apply(steps).await;
    assert!(failed.is_empty(), "{failed:?}");
}

/// Brings the kernel to a state, from whatever is there.
pub(crate) async fn reach(kernel: &mut NodeKernel, desired: &KernelState) {
    let observed = observe(kernel).await;
    let steps = diff(&observed, desired);
    let failed = kernel.apply(&steps).await;
    let text = failed.iter().fold(String::new(), |mut text, error| {
        let source = std::error::Error::source(error).map(ToString::to_string);
        let _ = writeln!(text, "{error}: {}", source.unwrap_or_default());
        text
    });
    assert!(failed.is_empty(), "{text}");
    assert_eq!(&observe(kernel).await, desired);
}

/// An agent with a runtime of its own: all that it does ends with it. One that goes on asks pods for acknowledgements
/// for seconds, on whatever connections they have by then.
pub(crate) fn agent_dies_after(work: impl AsyncFnOnce() + Send) {
    std::thread::scope(|scope| {
        let agent = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(work());
        });
        if let Err(panic) = agent.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

pub(crate) fn reach_and_die(mode: Mode, desired: &KernelState) {
    agent_dies_after(async || reach(&mut open(mode).await, desired).await);
}
