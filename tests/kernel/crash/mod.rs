//! An agent may die at any moment, and the next one finds what it left: after every step of a change the state
//! of the kernel is one that a new agent reads as it is, and takes to its goal from there.

mod connections;
mod packets;

use std::collections::HashSet;
use std::time::Instant;

use ipnet::IpNet;
use strum::VariantNames as _;

use super::*;

/// Changes there and back; every kind of step is in one of them.
fn changes() -> [(&'static str, KernelState, KernelState, Deaths); 3] {
    [
        ("nothing and example", nothing(), example(), Deaths::All),
        ("example and changed", example(), changed(), Deaths::All),
        ("changed and idle", changed(), idle(), Deaths::OneOfEachKind),
    ]
}

// === agents and their deaths ===

/// What an agent that has just been started finds. The mode of iptables has been said before.
async fn start(mode: Mode) -> (NodeKernel, KernelState) {
    let mut kernel = open_backend(mode.backend()).await;
    let found = kernel.observe().await.unwrap().state;
    // Else the new agent would trust connections that the old one did not come to forget.
    assert!(found.doubt);
    (kernel, found)
}

/// What a new agent must find after these steps of the old one.
fn after(mode: Mode, from: &KernelState, steps: &[Step]) -> KernelState {
    let mut state = from.clone();
    for step in steps {
        state.apply(step);
    }
    if mode == Mode::Nftables {
        // One table holds the chains of both families, its map one translation of a pod, and its sets of networks
        // have no borders within.
        let is_whole = |family: &FamilyState| family.firewall.skeleton == Skeleton::Intact;
        let whole = state.families.values().any(is_whole);
        for FamilyState { firewall, .. } in state.families.values_mut() {
            if whole {
                firewall.skeleton = Skeleton::Intact;
            }
            for nets in [
                &mut firewall.excluded,
                &mut firewall.remote_pods,
                &mut firewall.local_pods,
            ] {
                let all: Vec<IpNet> = std::mem::take(nets).into_iter().collect();
                nets.extend(IpNet::aggregate(&all));
            }
            for pod in firewall.pods.values_mut() {
                pod.vips = pod.vips.pop_last().into_iter().collect();
            }
        }
    } else {
        state.families.values_mut().for_each(rebuild_ways);
    }
    state.doubt = true;
    state
}

/// Tells a difference as the steps that would make it.
fn assert_same(found: &KernelState, expected: &KernelState, said: &str) {
    let steps: Vec<String> = diff(expected, found).iter().map(Step::to_string).collect();
    assert!(
        found == expected,
        "{said}, instead of what is expected: {steps:#?}"
    );
}

/// How many deaths a change is worth.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Deaths {
    /// One after every step.
    All,
    /// One after the first step of each kind: a look at the kernel takes a dozen processes with iptables.
    OneOfEachKind,
}

/// Every kind of step that there is: its variant, and the set or the remnant that it is about.
fn all_kinds() -> BTreeSet<String> {
    let variants = [
        RouteStep::VARIANTS,
        FirewallStep::VARIANTS,
        ConnectionStep::VARIANTS,
    ];
    let with_objects = variants.concat().into_iter().flat_map(|variant| {
        let objects = match variant {
            "AddPod" | "RemovePod" => PodSet::VARIANTS,
            "AddNet" | "RemoveNet" => NetSet::VARIANTS,
            _ => return vec![variant.to_owned()],
        };
        objects.iter().map(|o| format!("{variant} {o}")).collect()
    });
    let remnants = Remnant::VARIANTS.iter();
    let remnants = remnants.map(|remnant| format!("RemoveRemnant {remnant}"));
    with_objects.chain(remnants).collect()
}

fn kind(step: &Step) -> String {
    let variant: &str = match step {
        Step::Route(step) => step.into(),
        Step::Firewall(step) => step.into(),
        Step::Connection(step) => step.into(),
        Step::Accept(..) => "Accept",
        Step::RemoveRemnant(_) => "RemoveRemnant",
    };
    let object: &str = match step {
        Step::Firewall(FirewallStep::AddPod(set, _) | FirewallStep::RemovePod(set, _)) => {
            set.into()
        }
        Step::Firewall(FirewallStep::AddNet(set, _) | FirewallStep::RemoveNet(set, _)) => {
            set.into()
        }
        Step::RemoveRemnant(remnant) => remnant.into(),
        _ => return variant.to_owned(),
    };
    format!("{variant} {object}")
}

/// Kinds of steps that none of the changes here has, and whose they are.
const ELSEWHERE: [&str; 6] = [
    // A gateway that was none for a while: `conntrack::a_gateway_again_resumes_connections`.
    "Resume",
    // `remnants::another_backend_takes_over_and_leaves_nothing_of_the_other`.
    "RemoveRemnant Nftables",
    "RemoveRemnant IptablesNft",
    "RemoveRemnant IptablesLegacy",
    "RemoveRemnant Ipsets",
    // `remnants::an_earlier_release_is_taken_over_in_every_combination`.
    "RemoveRemnant EarlierRelease",
];

/// The numbers of steps after which an agent dies.
fn lengths(deaths: Deaths, steps: &[Step]) -> Vec<usize> {
    let mut seen = HashSet::new();
    (0..=steps.len())
        .filter(|length| {
            let last = length.checked_sub(1).map(|at| kind(&steps[at]));
            seen.insert(last) || deaths == Deaths::All || *length == steps.len()
        })
        .collect()
}

/// An agent dies after these steps on its way, the next one, now and then, after some of its own, and the last
/// one arrives.
async fn die_and_arrive(
    mode: Mode,
    mut kernel: NodeKernel,
    (from, to): (&KernelState, &KernelState),
    steps: &[Step],
) -> NodeKernel {
    apply(&mut kernel, steps).await;
    drop(kernel);
    let mut said = format!("dead after {:?}", steps.last());
    let (mut next, mut found) = start(mode).await;
    assert_same(&found, &after(mode, from, steps), &said);
    if steps.len().is_multiple_of(4) {
        let rest = diff(&found, to);
        let (done, _) = rest.split_at(steps.len() * 7 % (rest.len() + 1));
        apply(&mut next, done).await;
        drop(next);
        let expected = after(mode, &found, done);
        said = format!("{said} and {:?}", done.last());
        (next, found) = start(mode).await;
        assert_same(&found, &expected, &said);
    }
    apply(&mut next, &diff(&found, to)).await;
    assert_same(&observe(&mut next).await, to, &said);
    next
}

async fn a_death_after_any_step_is_survived(mode: Mode) {
    let mut kinds = BTreeSet::new();
    let mut kernel = open(mode).await;
    for (what, one, other, deaths) in changes() {
        let started = Instant::now();
        reach(&mut kernel, &one).await;
        let there = match mode {
            Mode::Nftables => deaths,
            Mode::IptablesNft | Mode::IptablesLegacy => Deaths::OneOfEachKind,
        };
        let ways = [(&one, &other, there), (&other, &one, Deaths::OneOfEachKind)].map(
            |(from, to, deaths)| {
                let steps = diff(from, to);
                (from, to, lengths(deaths, &steps), steps)
            },
        );
        let turns = ways.iter().map(|(_, _, lengths, _)| lengths.len());
        for turn in 0..turns.clone().max().unwrap() {
            for (from, to, lengths, steps) in &ways {
                match lengths.get(turn) {
                    Some(length) => {
                        let done = &steps[..*length];
                        kinds.extend(done.last().map(kind));
                        kernel = die_and_arrive(mode, kernel, (from, to), done).await;
                    }
                    None => reach(&mut kernel, to).await,
                }
            }
        }
        println!(
            "{what}: {} deaths in {:?}",
            turns.sum::<usize>(),
            started.elapsed()
        );
    }
    let elsewhere = ELSEWHERE.map(str::to_owned).into();
    assert_eq!(kinds, &all_kinds() - &elsewhere);
}

each_mode!(a_death_after_any_step_is_survived);
