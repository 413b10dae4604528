//! Which step must not be tried after which other one has failed: every pair of kinds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::*;

/// What steps are about.
#[derive(Clone, Copy)]
struct About {
    pod: IpAddr,
    vip: IpAddr,
    net: IpNet,
}

fn about(pod: &str, vip: &str, net: &str) -> About {
    About {
        pod: pod.parse().unwrap(),
        vip: vip.parse().unwrap(),
        net: net.parse().unwrap(),
    }
}

/// The word for a kind of step. Without a wildcard: a new kind has to be put into the table.
fn kind(step: &Step) -> &'static str {
    match step {
        Step::Route(step) => match step {
            RouteStep::AddRule(..) => "add rule",
            RouteStep::RemoveRule(..) => "remove rule",
            RouteStep::AddFallback(..) => "add fallback",
            RouteStep::RemoveFallback(..) => "remove fallback",
            RouteStep::SetGateway(..) => "set gateway",
            RouteStep::RemoveGateway(..) => "remove gateway",
            RouteStep::AddThrow(..) => "add throw",
            RouteStep::RemoveThrow(..) => "remove throw",
        },
        Step::Firewall(step) => match step {
            FirewallStep::Install(..) => "install",
            FirewallStep::Remove(_) => "remove firewall",
            FirewallStep::AddVip(_) => "add VIP",
            FirewallStep::RemoveVip(_) => "remove VIP",
            FirewallStep::AddNet(NetSet::Excluded, _) => "exclude",
            FirewallStep::AddNet(NetSet::RemotePods | NetSet::LocalPods, _) => "add pod network",
            FirewallStep::RemoveNet(NetSet::Excluded, _) => "include",
            FirewallStep::RemoveNet(NetSet::RemotePods | NetSet::LocalPods, _) => {
                "remove pod network"
            }
            FirewallStep::AddPod(PodSet::Blocked, _) => "block",
            FirewallStep::AddPod(PodSet::Egress | PodSet::GatewayHere | PodSet::Ordinary, _) => {
                "add pod"
            }
            FirewallStep::RemovePod(PodSet::Blocked, _) => "unblock",
            FirewallStep::RemovePod(PodSet::Egress | PodSet::GatewayHere | PodSet::Ordinary, _) => {
                "remove pod"
            }
            FirewallStep::Translate { .. } => "translate",
            FirewallStep::Untranslate { .. } => "untranslate",
            FirewallStep::Mark { .. } => "mark",
            FirewallStep::Unmark(_) => "unmark",
            FirewallStep::AddLandmark(..) => "add landmark",
            FirewallStep::RemoveLandmark(..) => "remove landmark",
        },
        Step::Connection(step) => match step {
            ConnectionStep::Forget(_) => "forget",
            ConnectionStep::Resume { .. } => "resume",
            ConnectionStep::ElicitAck(_) => "elicit",
            ConnectionStep::ForgetWrongSource { .. } => "forget wrong sources",
            ConnectionStep::ForgetNewlyExcluded { .. } => "forget newly excluded",
        },
        Step::Accept(..) => "accept",
        Step::RemoveRemnant(_) => "remove remnant",
    }
}

/// One step of every kind, and of every set.
fn steps(about: About) -> Vec<Step> {
    let About { pod, vip, net } = about;
    let family = Family::of(pod);
    let table = TableId(100_001);
    let mark = Mark {
        value: 0x0010_0000,
        mask: 0x00f0_0000,
    };
    let rule = Rule {
        priority: 1000,
        action: RuleAction::Lookup(table),
        mark: Some(mark),
        not: false,
        from: None,
        to: None,
    };
    let landmark = Landmark::Way(Way { mark, via: vip });
    let hop = NextHop {
        via: vip,
        dev: "eth0".to_owned(),
    };
    let mut steps: Vec<Step> = vec![
        RouteStep::AddRule(family, rule).into(),
        RouteStep::RemoveRule(family, rule).into(),
        RouteStep::AddThrow(table, net).into(),
        RouteStep::RemoveThrow(table, net).into(),
        RouteStep::AddFallback(family, table).into(),
        RouteStep::RemoveFallback(family, table).into(),
        RouteStep::SetGateway(table, hop.clone()).into(),
        RouteStep::RemoveGateway(table, hop).into(),
        FirewallStep::Install(family, [vip].into()).into(),
        FirewallStep::Remove(family).into(),
        FirewallStep::AddVip(vip).into(),
        FirewallStep::RemoveVip(vip).into(),
        FirewallStep::AddLandmark(family, landmark.clone()).into(),
        FirewallStep::RemoveLandmark(family, landmark).into(),
        FirewallStep::Translate { pod, vip }.into(),
        FirewallStep::Untranslate { pod, vip }.into(),
        FirewallStep::Mark { pod, mark }.into(),
        FirewallStep::Unmark(pod).into(),
        ConnectionStep::Forget(pod).into(),
        ConnectionStep::Resume { pod, source: vip }.into(),
        ConnectionStep::ElicitAck(pod).into(),
        ConnectionStep::ForgetWrongSource {
            sources: BTreeMap::from([(pod, vip)]),
            vips: [vip].into(),
            unguarded: [pod].into(),
        }
        .into(),
        ConnectionStep::ForgetNewlyExcluded {
            pods: [pod].into(),
            nets: [net].into(),
        }
        .into(),
        Step::Accept(family, [net].into()),
        Step::RemoveRemnant(Remnant::Ipsets),
    ];
    for set in NetSet::ALL {
        steps.push(FirewallStep::AddNet(set, net).into());
        steps.push(FirewallStep::RemoveNet(set, net).into());
    }
    for set in PodSet::ALL {
        steps.push(FirewallStep::AddPod(set, pod).into());
        steps.push(FirewallStep::RemovePod(set, pod).into());
    }
    steps
}

/// What fails for all pods of a family.
const OF_FAMILY: [&str; 5] = [
    "add rule",
    "add throw",
    "add fallback",
    "install",
    "exclude",
];
/// Steps about one pod: each needs all that come before it.
const OF_POD: [&str; 11] = [
    "block",
    "unblock",
    "add pod",
    "remove pod",
    "translate",
    "untranslate",
    "mark",
    "unmark",
    "forget",
    "resume",
    "elicit",
];

/// The kinds whose failure forbids a kind of step about the same pod, VIP and network.
fn needed_by(step: &str) -> BTreeSet<&'static str> {
    let of_pod = || OF_FAMILY.into_iter().chain(OF_POD).collect::<BTreeSet<_>>();
    match step {
        // Until ours does all of the work, it is done by what is left.
        "remove remnant" => {
            let all = steps(about("10.244.1.11", "192.0.2.200", "10.9.0.0/16"));
            all.iter().map(kind).collect()
        }
        // NAT looks at the destination again only when routes do.
        "include" => ["remove throw"].into(),
        // Routes let it pass only when NAT leaves it alone.
        "add throw" => ["exclude"].into(),
        // Closing is always safe.
        "block" => [].into(),
        "translate" => &of_pod() | &["add VIP"].into(),
        pod if OF_POD.contains(&pod) => of_pod(),
        _ => [].into(),
    }
}

#[test]
fn each_kind_of_step_needs_what_the_table_says_and_nothing_else() {
    let all = steps(about("10.244.1.11", "192.0.2.200", "10.9.0.0/16"));
    for step in &all {
        let needed = needed_by(kind(step));
        for failed in &all {
            let expected = needed.contains(kind(failed));
            assert_eq!(
                step.needs(failed),
                expected,
                "`{step}` after a failed `{failed}`"
            );
        }
    }
}

#[test]
fn what_failed_for_something_else_forbids_nothing_but_what_its_family_shares() {
    let all = steps(about("10.244.1.11", "192.0.2.200", "10.9.0.0/16"));
    for (other, shared) in [
        (
            about("10.244.1.12", "192.0.2.201", "10.8.0.0/16"),
            &OF_FAMILY[..],
        ),
        (about("fd00::12", "2001:db8::1", "fd09::/16"), &[]),
    ] {
        for step in &all {
            let kind_of_step = kind(step);
            let of_pod = OF_POD.contains(&kind_of_step) && kind_of_step != "block";
            for failed in &steps(other) {
                let is_shared = of_pod && shared.contains(&kind(failed));
                let expected = is_shared || kind_of_step == "remove remnant";
                assert_eq!(
                    step.needs(failed),
                    expected,
                    "`{step}` after a failed `{failed}`"
                );
            }
        }
    }
}
