//! What is in the kernel, as a state. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::kernel::iptables::chains::{
    Chain, Entry, NAT, NODES, Place, chains, changes_marks, from_node, is_own_chain, jumps_to_us,
    known_nodes, translated_vips, translation,
};
use crate::kernel::iptables::save::Line;
use crate::kernel::iptables::sets::{Sets, StaticSet, vip_of_set};
use crate::kernel::iptables::translations::Translations;
use crate::kernel::ours::{OwnSet, Ranges};
use crate::kernel::tag::Rule;
use crate::state::{Family, FirewallState, Landmark, Mark, NetSet, PodSet, PodState, Skeleton};

/// What the lines of `iptables-save` and `ipset save` say.
pub(super) fn state(family: Family, ranges: Ranges, lines: &[Line], sets: &Sets) -> FirewallState {
    let members = |set: StaticSet| sets.get(&set.name(family)).map_or(&[][..], Vec::as_slice);
    let addresses = |set: StaticSet| {
        let addresses = members(set).iter();
        addresses.filter_map(|(ip, _)| ip.parse::<IpAddr>().ok())
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
    for (pod, vips) in Translations::read(sets).of(family) {
        pods.entry(*pod).or_default().vips.clone_from(vips);
    }
    let with_set = sets.keys().filter_map(|name| vip_of_set(name));
    let with_set: BTreeSet<IpAddr> = with_set.filter(|vip| Family::of(*vip) == family).collect();
    let guarded: BTreeSet<IpAddr> = addresses(StaticSet::Set(OwnSet::Vips)).collect();
    let with_rule: BTreeSet<IpAddr> = translated_vips(lines).collect();
    let skeleton = skeleton(
        family,
        ranges,
        lines,
        sets,
        [&with_set, &guarded, &with_rule],
    );
    let mut state = FirewallState {
        skeleton,
        vips: with_set
            .into_iter()
            .filter(|vip| guarded.contains(vip) && with_rule.contains(vip))
            .collect(),
        landmarks: known_nodes(lines)
            .map(Landmark::Node)
            .chain(
                members(StaticSet::Lans)
                    .iter()
                    .filter_map(|(text, _)| lan(text)),
            )
            .collect(),
        pods,
        ..FirewallState::default()
    };
    for set in NetSet::ALL {
        let nets = members(StaticSet::Set(OwnSet::Nets(set))).iter();
        state
            .nets_mut(set)
            .extend(nets.filter_map(|(text, _)| net(text)));
    }
    state
}

/// `0.0.0.0/0,eth0`.
fn lan(text: &str) -> Option<Landmark> {
    let (_, name) = text.split_once(',')?;
    Some(Landmark::Lan(name.to_owned()))
}

/// ipset shows a network of one as an address.
fn net(text: &str) -> Option<IpNet> {
    let net = text.parse();
    net.or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .ok()
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
    ranges: Ranges,
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
    let chains = chains(family, ranges);
    if let Some(what) = chains.iter().find_map(|chain| damage(chain, lines)) {
        return Skeleton::Damaged(what);
    }
    let expected = chains.iter().filter(|chain| chain.entry.is_some()).count();
    let jumps = lines.iter().filter(|line| jumps_to_us(line)).count();
    if jumps != expected {
        return Skeleton::Damaged(format!("{jumps} jumps to our chains instead of {expected}"));
    }
    if with_set != guarded || with_set != with_rule {
        return Skeleton::Damaged("VIPs without set, guard or translation".to_owned());
    }
    if !Translations::read(sets).align(family, sets).is_empty() {
        let translated = StaticSet::Translated.name(family);
        return Skeleton::Damaged(format!("{translated} does not have the pods with a VIP"));
    }
    Skeleton::Intact
}

fn tags(rules: &[Rule]) -> Vec<Option<&str>> {
    rules.iter().map(|rule| Some(rule.tag.as_str())).collect()
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
    let variable: Vec<Rule> = match name {
        NAT => translated_vips(lines)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .map(translation)
            .collect(),
        NODES => known_nodes(lines)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .map(from_node)
            .collect(),
        _ => Vec::new(),
    };
    let (fixed, mut rest) = (tags(&chain.rules), tags(&variable));
    let mut found: Vec<Option<&str>> = rules_of(name).map(Line::tag).collect();
    let mut found_rest = found.split_off(fixed.len().min(found.len()));
    // They stand in any order.
    rest.sort_unstable();
    found_rest.sort_unstable();
    if found != fixed || found_rest != rest {
        return Some(format!("chain {name} is missing or changed"));
    }
    // A chain that only our own rules lead to shows itself by these.
    let Some(Entry { base, jump, place }) = &chain.entry else {
        let of_chain = |line: &Line| line.table == chain.table && line.chain == name;
        let is_there = lines.iter().any(of_chain);
        return (!is_there).then(|| format!("chain {name} is missing"));
    };
    let jumps: Vec<usize> = rules_of(base)
        .enumerate()
        .filter(|(_, line)| line.tag() == Some(jump.tag.as_str()))
        .map(|(position, _)| position)
        .collect();
    let marks = rules_of(base)
        .enumerate()
        .filter(|(_, line)| changes_marks(line));
    let last_mark = marks.map(|(position, _)| position).last();
    let what = match (jumps.as_slice(), place) {
        ([position], Place::First) if *position > 0 => "is not the first rule".to_owned(),
        ([position], Place::AfterMarks) if last_mark.is_some_and(|mark| mark > *position) => {
            "comes before a rule that changes marks".to_owned()
        }
        ([_], _) => return None,
        ([], _) => "is missing".to_owned(),
        (several, _) => format!("is there {} times", several.len()),
    };
    Some(format!("the jump from {base} to {name} {what}"))
}
