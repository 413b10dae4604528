//! What is in the kernel, as a state. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::kernel::iptables::chains::{
    Chain, NAT, chains, is_own_chain, jumps_to_us, translated_vips, translation,
};
use crate::kernel::iptables::save::Line;
use crate::kernel::iptables::sets::{Sets, StaticSet, vip_of_set};
use crate::kernel::ours::OwnSet;
use crate::state::{Family, FirewallState, Mark, NetSet, PodSet, PodState, Skeleton};

/// What the lines of `iptables-save` and `ipset save` say.
pub(super) fn state(family: Family, mask: u32, lines: &[Line], sets: &Sets) -> FirewallState {
    let members = |set: StaticSet| sets.get(&set.name(family)).map_or(&[][..], Vec::as_slice);
    let addresses = |set: StaticSet| {
        members(set)
            .iter()
            .filter_map(|(ip, _)| ip.parse::<IpAddr>().ok())
    };
    let nets = |set: StaticSet| -> BTreeSet<IpNet> {
        let net = |text: &str| {
            text.parse()
                .ok()
                .or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
        };
        members(set)
            .iter()
            .filter_map(|(text, _)| net(text))
            .collect()
    };
    let mut pods: BTreeMap<IpAddr, PodState> = BTreeMap::new();
    for set in PodSet::ALL {
        for pod in addresses(StaticSet::Set(OwnSet::Pods(set))) {
            pods.entry(pod).or_default().set(set, true);
        }
    }
    for (pod, rest) in members(StaticSet::Mark) {
        if let (Ok(pod), Some(mark)) = (pod.parse(), skbmark(rest)) {
            pods.entry(pod).or_default().mark = Some(mark);
        }
    }
    let mut with_set = BTreeSet::new();
    for (name, members) in sets {
        let Some(vip) = vip_of_set(name).filter(|vip| Family::of(*vip) == family) else {
            continue;
        };
        with_set.insert(vip);
        for pod in members.iter().filter_map(|(pod, _)| pod.parse().ok()) {
            pods.entry(pod).or_default().vips.insert(vip);
        }
    }
    let guarded: BTreeSet<IpAddr> = addresses(StaticSet::Set(OwnSet::Vips)).collect();
    let with_rule: BTreeSet<IpAddr> = translated_vips(lines).collect();
    let skeleton = skeleton(family, mask, lines, sets, [&with_set, &guarded, &with_rule]);
    let mut state = FirewallState {
        skeleton,
        vips: with_set
            .into_iter()
            .filter(|vip| guarded.contains(vip) && with_rule.contains(vip))
            .collect(),
        pods,
        ..FirewallState::default()
    };
    for set in NetSet::ALL {
        *state.nets_mut(set) = nets(StaticSet::Set(OwnSet::Nets(set)));
    }
    state
}

/// `skbmark 0x100000/0xf00000`; without a mask all bits count.
fn skbmark(rest: &str) -> Option<Mark> {
    let mut words = rest.split(' ').skip_while(|word| *word != "skbmark");
    let text = words.nth(1)?;
    let number = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let (value, mask) = match text.split_once('/') {
        Some((value, mask)) => (number(value)?, number(mask)?),
        None => (number(text)?, u32::MAX),
    };
    Some(Mark { value, mask })
}

fn skeleton(
    family: Family,
    mask: u32,
    lines: &[Line],
    sets: &Sets,
    [with_set, guarded, with_rule]: [&BTreeSet<IpAddr>; 3],
) -> Skeleton {
    let own_sets: Vec<String> = StaticSet::all().map(|set| set.name(family)).collect();
    let has_chain = lines
        .iter()
        .any(|line| is_own_chain(&line.chain) || jumps_to_us(line));
    if !has_chain && with_set.is_empty() && !own_sets.iter().any(|set| sets.contains_key(set)) {
        return Skeleton::Absent;
    }
    if let Some(missing) = own_sets.iter().find(|set| !sets.contains_key(*set)) {
        return Skeleton::Damaged(format!("set {missing} is missing"));
    }
    for chain in chains(family, mask) {
        if let Some(what) = damage(&chain, lines) {
            return Skeleton::Damaged(what);
        }
    }
    let expected = chains(family, mask).len();
    let jumps = lines.iter().filter(|line| jumps_to_us(line)).count();
    if jumps != expected {
        return Skeleton::Damaged(format!("{jumps} jumps to our chains instead of {expected}"));
    }
    if with_set != guarded || with_set != with_rule {
        return Skeleton::Damaged("VIPs without set, guard or translation".to_owned());
    }
    Skeleton::Intact
}

/// What is wrong with a chain or the jump to it.
fn damage(chain: &Chain, lines: &[Line]) -> Option<String> {
    let name = chain.name;
    let rules_of = |wanted: &'static str| {
        let of_chain = move |line: &&Line| {
            line.table == chain.table && line.chain == wanted && line.rule.is_some()
        };
        lines.iter().filter(of_chain)
    };
    let found: Vec<Option<&str>> = rules_of(name).map(Line::tag).collect();
    let mut expected: Vec<Option<&str>> = chain
        .rules
        .iter()
        .map(|rule| Some(rule.tag.as_str()))
        .collect();
    let vip_rules: Vec<String> = if name == NAT {
        translated_vips(lines)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .map(|vip| translation(vip).tag)
            .collect()
    } else {
        Vec::new()
    };
    let (fixed, rest) = found.split_at(expected.len().min(found.len()));
    let mut rest: Vec<_> = rest.to_vec();
    rest.sort_unstable();
    let mut expected_rest: Vec<_> = vip_rules.iter().map(|tag| Some(tag.as_str())).collect();
    expected_rest.sort_unstable();
    if fixed != expected.as_mut_slice() || rest != expected_rest {
        return Some(format!("chain {name} is missing or changed"));
    }
    let jumps: Vec<usize> = rules_of(chain.base)
        .enumerate()
        .filter(|(_, line)| line.tag() == Some(chain.jump.tag.as_str()))
        .map(|(position, _)| position)
        .collect();
    match jumps.as_slice() {
        [0] => None,
        [_] if !chain.first => None,
        [_] => Some(format!(
            "the jump from {} to {name} is not the first rule",
            chain.base
        )),
        [] => Some(format!("the jump from {} to {name} is missing", chain.base)),
        _ => Some(format!(
            "the jump from {} to {name} is there {} times",
            chain.base,
            jumps.len()
        )),
    }
}
