//! Routing rules of others that come before ours and can match an egress packet. Pure.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};

use crate::kernel::ours::Ranges;
use crate::state::{Family, RuleAhead, TableId};

/// The kernel's table of a node's own addresses: what it finds is for the node itself.
const LOCAL: u32 = 255;

/// A rule, with the table that it asks, if it asks one.
pub(super) type Ahead = (RuleAhead, Option<TableId>);

/// A rule that may take packets away from ours, if it does.
pub(super) fn ahead(family: Family, message: &RuleMessage, ranges: &Ranges) -> Option<Ahead> {
    let (mut priority, mut table, mut target) = (0, 0, 0);
    let (mut value, mut mask) = (0, 0);
    let (mut source, mut destination) = (None, None);
    let mut interface = None;
    let mut suppressed = None;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(found) => priority = *found,
            RuleAttribute::Table(found) => table = *found,
            RuleAttribute::Goto(found) => target = *found,
            RuleAttribute::FwMark(found) => value = *found,
            RuleAttribute::FwMask(found) => mask = *found,
            RuleAttribute::Source(found) => source = Some(*found),
            RuleAttribute::Destination(found) => destination = Some(*found),
            RuleAttribute::Iifname(found) => interface = Some(found.clone()),
            RuleAttribute::SuppressPrefixLen(found) if *found != u32::MAX => {
                suppressed = Some(*found);
            }
            // Forwarded packets are looked up without an outgoing interface, and outside of VRFs.
            RuleAttribute::Oifname(_) | RuleAttribute::L3MDev(true) => return None,
            _ => {}
        }
    }
    if priority >= ranges.end() || interface.as_deref() == Some("lo") {
        return None;
    }
    let is_inverted = message.header.flags.contains(RuleFlags::Invert);
    let from = net(family, source, message.header.src_len)?;
    let to = net(family, destination, message.header.dst_len)?;
    let is_of_all = from.is_none() && to.is_none() && interface.is_none();
    let mut marks = ranges.marks();
    let may_match = match is_inverted {
        false => mask == 0 || mask & ranges.mask != 0 || marks.any(|mark| mark & mask == value),
        // But for the mark nothing is known of what all pods have in common.
        true if is_of_all => mask != 0 && marks.any(|mark| mark & mask != value),
        true => true,
    };
    if !may_match {
        return None;
    }
    let action = match message.header.action {
        RuleAction::ToTable if table == LOCAL => return None,
        RuleAction::ToTable => format!("lookup {table}"),
        RuleAction::Goto if target <= ranges.priority => return None,
        RuleAction::Goto => format!("goto {target}"),
        RuleAction::Blackhole => "blackhole".to_owned(),
        RuleAction::Unreachable => "unreachable".to_owned(),
        RuleAction::Prohibit => "prohibit".to_owned(),
        // Also `nop`.
        _ => return None,
    };
    let mut text = format!("pref {priority}");
    let mut add = |word: &str, what: Option<String>| {
        // Writing into a String cannot fail.
        let _ = what.map(|what| write!(text, " {word}{what}"));
    };
    add("not", is_inverted.then(String::new));
    add("from ", from.map(|net| net.to_string()));
    add("to ", to.map(|net| net.to_string()));
    add("iif ", interface.clone());
    add(
        "fwmark ",
        (mask != 0).then(|| format!("{value:#x}/{mask:#x}")),
    );
    add("", Some(action));
    add("suppress_prefixlength ", suppressed.map(|n| n.to_string()));
    // An inverted match says nothing of which pods it is about.
    let (from, to) = if is_inverted {
        (None, None)
    } else {
        (from, to)
    };
    let rule = RuleAhead {
        text,
        from,
        to,
        interface,
    };
    let asks = message.header.action == RuleAction::ToTable;
    Some((rule, asks.then_some(TableId(table))))
}

/// The network that a rule names; the inner `None` is all. The kernel leaves out an address of zeros.
fn net(family: Family, address: Option<IpAddr>, length: u8) -> Option<Option<IpNet>> {
    let zero = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    match length {
        0 => Some(None),
        length => Some(Some(IpNet::new(address.unwrap_or(zero), length).ok()?)),
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::AddressFamily;

    use super::*;

    /// What is told of a rule.
    fn told(action: RuleAction, priority: u32, attributes: &[RuleAttribute]) -> Option<String> {
        told_with(RuleMessage::default(), action, priority, attributes)
    }

    fn told_with(
        mut message: RuleMessage,
        action: RuleAction,
        priority: u32,
        attributes: &[RuleAttribute],
    ) -> Option<String> {
        message.header.family = AddressFamily::Inet;
        message.header.action = action;
        message.attributes = attributes.to_vec();
        message.attributes.push(RuleAttribute::Priority(priority));
        Some(ahead(Family::V4, &message, &Ranges::DEFAULT)?.0.text)
    }

    #[test]
    fn rules_ahead_of_ours_are_told_if_they_can_match_an_egress_packet() {
        use RuleAction::{Goto, Nop, Prohibit, ToTable};
        use RuleAttribute::{FwMark, FwMask, Iifname, L3MDev, Oifname, SuppressPrefixLen, Table};
        let mark = |value, mask| [Table(77), FwMark(value), FwMask(mask)];
        for (action, priority, attributes, expected) in [
            // The kernel's own, and where Cilium puts it.
            (ToTable, 0, vec![Table(255)], None),
            (ToTable, 100, vec![Table(255)], None),
            // strongSwan, NetBird.
            (ToTable, 220, vec![Table(220)], Some("pref 220 lookup 220")),
            (
                ToTable,
                105,
                vec![Table(254), SuppressPrefixLen(0)],
                Some("pref 105 lookup 254 suppress_prefixlength 0"),
            ),
            (
                ToTable,
                999,
                mark(0x0010_0000, 0x00ff_0000).to_vec(),
                Some("pref 999 fwmark 0x100000/0xff0000 lookup 77"),
            ),
            // Cilium's own marks, and none at all.
            (ToTable, 9, mark(0x200, 0xf00).to_vec(), None),
            (
                ToTable,
                9,
                mark(0, 0xf00).to_vec(),
                Some("pref 9 fwmark 0x0/0xf00 lookup 77"),
            ),
            (ToTable, 1001, vec![Table(77)], Some("pref 1001 lookup 77")),
            (ToTable, 1002, vec![Table(77)], None),
            (ToTable, 32766, vec![Table(254)], None),
            (Prohibit, 5, vec![], Some("pref 5 prohibit")),
            (
                Goto,
                5,
                vec![RuleAttribute::Goto(2000)],
                Some("pref 5 goto 2000"),
            ),
            (Goto, 5, vec![RuleAttribute::Goto(900)], None),
            (Nop, 5, vec![], None),
            (ToTable, 5, vec![Table(77), Iifname("lo".to_owned())], None),
            (
                ToTable,
                5,
                vec![Table(77), Iifname("cni0".to_owned())],
                Some("pref 5 iif cni0 lookup 77"),
            ),
            (
                ToTable,
                5,
                vec![Table(77), Oifname("eth1".to_owned())],
                None,
            ),
            (ToTable, 1000, vec![L3MDev(true)], None),
        ] {
            let found = told(action, priority, &attributes);
            assert_eq!(
                found.as_deref(),
                expected,
                "{action:?} {priority} {attributes:?}"
            );
        }
        // wg-quick, which sends all but its own packets into the tunnel.
        let mut inverted = RuleMessage::default();
        inverted.header.flags |= RuleFlags::Invert;
        let found = told_with(inverted, ToTable, 500, &mark(0xca6c, u32::MAX));
        assert_eq!(
            found.as_deref(),
            Some("pref 500 not fwmark 0xca6c/0xffffffff lookup 77")
        );
        let mut of_pods = RuleMessage::default();
        of_pods.header.src_len = 16;
        let source = RuleAttribute::Source(IpAddr::from([10, 244, 0, 0]));
        let found = told_with(of_pods, ToTable, 500, &[source, Table(77)]);
        assert_eq!(
            found.as_deref(),
            Some("pref 500 from 10.244.0.0/16 lookup 77")
        );
    }
}
