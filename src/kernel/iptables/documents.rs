//! The documents that put chains and rules in place, and that remove them. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::ethernet::Mac;
use crate::kernel::iptables::chains::{
    NAT, NODES, Place, chains, from_node, jumps_to_us, translation,
};
use crate::kernel::iptables::save::Line;
use crate::kernel::ours::Ranges;
use crate::state::Family;

/// A document that changes one table.
pub(super) fn table(name: &str, lines: impl Iterator<Item = String>) -> String {
    let lines: String = lines.map(|line| line + "\n").collect();
    format!("*{name}\n{lines}COMMIT\n")
}

/// The document that puts all chains and jumps in place, whatever was there. Each table is exchanged
/// atomically; NAT comes first and marks last, because a marked packet needs the NAT.
pub(super) fn install_document(
    family: Family,
    ranges: Ranges,
    vips: &BTreeSet<IpAddr>,
    nodes: &BTreeSet<Mac>,
    present: &[Line],
) -> String {
    let chains = chains(family, ranges);
    let mut document = String::new();
    for name in ["nat", "filter", "mangle"] {
        let own = || chains.iter().filter(|chain| chain.table == name);
        let mut lines: Vec<String> = own().map(|c| format!(":{} - [0:0]", c.name)).collect();
        for chain in own() {
            lines.extend(chain.rules.iter().map(|rule| rule.append(chain.name)));
        }
        match name {
            "nat" => lines.extend(vips.iter().map(|vip| translation(*vip).append(NAT))),
            "mangle" => lines.extend(nodes.iter().map(|mac| from_node(*mac).append(NODES))),
            _ => {}
        }
        let jumps = present
            .iter()
            .filter(|line| line.table == name && jumps_to_us(line));
        lines.extend(jumps.map(Line::delete));
        let entries = own().filter_map(|chain| chain.entry.as_ref());
        lines.extend(entries.map(|entry| match entry.place {
            Place::First | Place::Anywhere => entry.jump.insert(entry.base),
            Place::AfterMarks => entry.jump.append(entry.base),
        }));
        document += &table(name, lines.into_iter());
    }
    document
}

/// The document that removes the chains that `is_target` names with the jumps to them, and the rules that
/// `is_stray` names; empty when there are none.
pub(super) fn remove_document(
    present: &[Line],
    is_target: impl Fn(&str) -> bool,
    is_stray: impl Fn(&Line) -> bool,
) -> String {
    let mut document = String::new();
    for name in ["mangle", "filter", "nat"] {
        let of_table = || present.iter().filter(|line| line.table == name);
        let goes = |line: &&Line| {
            let in_target = is_target(&line.chain);
            !in_target && (line.target().is_some_and(&is_target) || is_stray(line))
        };
        let mut lines: Vec<String> = of_table().filter(goes).map(Line::delete).collect();
        let targets = || of_table().filter(|line| line.rule.is_none() && is_target(&line.chain));
        lines.extend(targets().map(|line| format!("-F {}", line.chain)));
        lines.extend(targets().map(|line| format!("-X {}", line.chain)));
        if !lines.is_empty() {
            document += &table(name, lines.into_iter());
        }
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::iptables::sets::{StaticSet, create_vip};

    #[test]
    fn sets_and_chains_are_as_written_down() {
        for (family, vip, golden) in [
            (
                Family::V4,
                "192.0.2.200",
                include_str!("testdata/IPv4.restore"),
            ),
            (
                Family::V6,
                "2001:db8:1::c8",
                include_str!("testdata/IPv6.restore"),
            ),
        ] {
            let vip = vip.parse().unwrap();
            let sets: String = StaticSet::all().map(|set| set.create(family)).collect();
            let nodes = [Mac([2, 0, 0, 0, 0, 12])].into();
            let chains = install_document(family, Ranges::DEFAULT, &[vip].into(), &nodes, &[]);
            assert_eq!(sets + &create_vip(vip) + &chains, golden);
        }
    }
}
