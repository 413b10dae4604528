//! Rules and routes as netlink messages. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteRealm, RouteScope,
    RouteType,
};
use netlink_packet_route::rule::{
    RuleAction as NetlinkAction, RuleAttribute, RuleFlags, RuleMessage,
};

use crate::kernel::ours::{PROTOCOL_NUMBER, REALM};
use crate::state::{Family, Mark, NextHop, Rule, RuleAction, Table, TableId};

pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Other(PROTOCOL_NUMBER);
/// Metric of a table's fallback: 0xff000000 + 8192, which no routing daemon uses.
const FALLBACK_METRIC: u32 = 4_278_198_272;
/// Metric of the route to a gateway. Given for both families: IPv6 would choose 1024 by itself.
const GATEWAY_METRIC: u32 = 100;

pub(super) fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// The message for adding and for removing alike: the kernel removes the first rule that matches what is
/// given, so that everything has to be given.
pub(super) fn rule_message(family: Family, rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(family);
    if rule.not {
        message.header.flags |= RuleFlags::Invert;
    }
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Protocol(PROTOCOL));
    if let Some(mark) = rule.mark {
        attributes.push(RuleAttribute::FwMark(mark.value));
        attributes.push(RuleAttribute::FwMask(mark.mask));
    }
    if let Some(from) = rule.from {
        message.header.src_len = IpNet::from(from).prefix_len();
        attributes.push(RuleAttribute::Source(from));
    }
    if let Some(to) = rule.to {
        message.header.dst_len = to.prefix_len();
        attributes.push(RuleAttribute::Destination(to.addr()));
    }
    message.header.action = match rule.action {
        RuleAction::Nop => NetlinkAction::Nop,
        RuleAction::Unreachable => NetlinkAction::Unreachable,
        RuleAction::Goto(priority) => {
            attributes.push(RuleAttribute::Goto(priority));
            NetlinkAction::Goto
        }
        RuleAction::Lookup(table) => {
            attributes.push(RuleAttribute::Table(table.0));
            NetlinkAction::ToTable
        }
    };
    message
}

/// A rule, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Carries our protocol number.
    Ours(Rule),
    /// Carries that of another program, or of an administrator.
    Others(Rule),
    /// Carries none, as the rules of releases before 0.3.
    Nameless(Rule),
}

/// What a rule says and whose it is; `None` for one that does what none of ours does.
pub(super) fn parse_rule(message: &RuleMessage) -> Option<Found> {
    // The kernel leaves out a priority of 0.
    let (mut priority, mut table, mut goto) = (0, 0, 0);
    let (mut source, mut destination) = (None, None);
    let (mut value, mut mask, mut protocol) = (0, None, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Protocol(found) => protocol = Some(*found),
            RuleAttribute::Priority(found) => priority = *found,
            RuleAttribute::Table(found) => table = *found,
            RuleAttribute::Goto(found) => goto = *found,
            RuleAttribute::FwMark(found) => value = *found,
            RuleAttribute::FwMask(found) => mask = Some(*found),
            RuleAttribute::Source(found) => source = Some(*found),
            RuleAttribute::Destination(found) => destination = Some(*found),
            _ => {}
        }
    }
    let action = match message.header.action {
        NetlinkAction::Nop => RuleAction::Nop,
        NetlinkAction::Unreachable => RuleAction::Unreachable,
        NetlinkAction::Goto => RuleAction::Goto(goto),
        NetlinkAction::ToTable => RuleAction::Lookup(TableId(table)),
        _ => return None,
    };
    let rule = Rule {
        priority,
        action,
        mark: mask.map(|mask| Mark { value, mask }),
        not: message.header.flags.contains(RuleFlags::Invert),
        from: source,
        to: destination.and_then(|to: IpAddr| IpNet::new(to, message.header.dst_len).ok()),
    };
    Some(match protocol {
        Some(PROTOCOL) => Found::Ours(rule),
        None | Some(RouteProtocol::Unspec) => Found::Nameless(rule),
        Some(_) => Found::Others(rule),
    })
}

/// A default route of ours.
fn route_message(family: Family, table: TableId, metric: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(family);
    message.header.protocol = PROTOCOL;
    message.header.scope = RouteScope::Universe;
    message.header.table = RouteHeader::RT_TABLE_UNSPEC;
    message.attributes.push(RouteAttribute::Table(table.0));
    message.attributes.push(RouteAttribute::Priority(metric));
    message
}

/// The default route of last resort: it rejects.
pub(super) fn fallback_message(family: Family, table: TableId) -> RouteMessage {
    let mut message = route_message(family, table, FALLBACK_METRIC);
    message.header.kind = RouteType::Unreachable;
    message
}

/// The default route to a gateway. Without an interface, as it is removed: the interface may be gone already, and the
/// route with it.
pub(super) fn gateway_message(table: TableId, via: IpAddr, interface: Option<u32>) -> RouteMessage {
    let mut message = route_message(Family::of(via), table, GATEWAY_METRIC);
    message.header.kind = RouteType::Unicast;
    let gateway = RouteAttribute::Gateway(RouteAddress::from(via));
    message.attributes.push(gateway);
    if via.is_ipv4() {
        let realm = RouteRealm {
            source: 0,
            destination: REALM,
        };
        message.attributes.push(RouteAttribute::Realm(realm));
    }
    message
        .attributes
        .extend(interface.map(RouteAttribute::Oif));
    message
}

/// The route that leaves a destination to the rules after ours.
pub(super) fn throw_message(table: TableId, net: IpNet) -> RouteMessage {
    let mut message = route_message(Family::of_net(net), table, GATEWAY_METRIC);
    message.header.kind = RouteType::Throw;
    message.header.destination_prefix_length = net.prefix_len();
    let destination = RouteAddress::from(net.network());
    message
        .attributes
        .push(RouteAttribute::Destination(destination));
    message
}

/// Notes a route of ours in its table; returns the table of a route of others.
pub(super) fn take_route(
    message: &RouteMessage,
    names: &BTreeMap<u32, String>,
    tables: &mut BTreeMap<TableId, Table>,
) -> Option<TableId> {
    let table = table_of(message);
    if message.header.protocol != PROTOCOL {
        return Some(table);
    }
    let (mut metric, mut via, mut dev, mut destination) = (0, None, None, None);
    let mut has_realm = message.header.address_family == AddressFamily::Inet6;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Priority(found) => metric = *found,
            RouteAttribute::Gateway(RouteAddress::Inet(found)) => via = Some(IpAddr::from(*found)),
            RouteAttribute::Gateway(RouteAddress::Inet6(found)) => via = Some(IpAddr::from(*found)),
            RouteAttribute::Oif(found) => dev = names.get(found).cloned(),
            RouteAttribute::Realm(realm) => has_realm |= realm.destination == REALM,
            RouteAttribute::Destination(RouteAddress::Inet(found)) => {
                destination = Some(IpAddr::from(*found));
            }
            RouteAttribute::Destination(RouteAddress::Inet6(found)) => {
                destination = Some(IpAddr::from(*found));
            }
            _ => {}
        }
    }
    if let Some(destination) = destination {
        let net = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
        if message.header.kind == RouteType::Throw {
            tables.entry(table).or_default().throws.insert(net);
        }
        return None;
    }
    if message.header.kind == RouteType::Unreachable && metric == FALLBACK_METRIC {
        tables.entry(table).or_default().fallback = true;
    }
    // One without the realm was made by an earlier release: it is set again.
    let kind = message.header.kind;
    if let (RouteType::Unicast, Some(via), Some(dev), true) = (kind, via, dev, has_realm) {
        tables.entry(table).or_default().gateway = Some(NextHop { via, dev });
    }
    None
}

fn table_of(message: &RouteMessage) -> TableId {
    let large = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    TableId(large.unwrap_or(u32::from(message.header.table)))
}

/// Whether a route is the default one of a table.
pub(super) fn is_default_in(message: &RouteMessage, table: TableId) -> bool {
    table_of(message) == table && message.header.destination_prefix_length == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_survives_the_way_through_netlink_and_another_protocol_is_not_ours() {
        for rule in [
            Rule {
                priority: 1000,
                action: RuleAction::Goto(1099),
                mark: Some(Mark {
                    value: 0,
                    mask: 0x00f0_0000,
                }),
                not: true,
                from: None,
                to: None,
            },
            Rule {
                priority: 1002,
                action: RuleAction::Lookup(TableId(100_020)),
                mark: Some(Mark {
                    value: 0x00f0_0000,
                    mask: 0x00f0_0000,
                }),
                not: false,
                from: Some("10.244.1.11".parse().unwrap()),
                to: None,
            },
            Rule {
                priority: 1001,
                action: RuleAction::Lookup(TableId(100_001)),
                mark: None,
                not: false,
                from: None,
                to: Some("10.244.0.0/16".parse().unwrap()),
            },
        ] {
            let mut message = rule_message(Family::V4, &rule);
            assert_eq!(parse_rule(&message), Some(Found::Ours(rule)));
            message
                .attributes
                .retain(|a| !matches!(a, RuleAttribute::Protocol(_)));
            message
                .attributes
                .push(RuleAttribute::Protocol(RouteProtocol::Static));
            assert_eq!(parse_rule(&message), Some(Found::Others(rule)));
        }
    }
}
