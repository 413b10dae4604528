//! Route backend: routing rules and tables by netlink.
//!
//! What carries our protocol number is ours, wherever it stands; all else belongs to others, even with our
//! priority or in our tables.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::PoisonError;

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{
    RuleAction as NetlinkAction, RuleAttribute, RuleFlags, RuleMessage,
};
use netlink_sys::AsyncSocket;
use rtnetlink::Handle;

use crate::kernel::drift::Devices;
use crate::kernel::error::StepError;
use crate::names::Interface;
use crate::state::{
    Family, Mark, NextHop, RouteState, RouteStep, Rule, RuleAction, Table, TableId,
};

/// Protocol number of our rules and routes: in none of the lists of iproute2, FRR or BIRD. Shown by `ip rule`
/// and `ip route` as `proto 77`.
pub(crate) const PROTOCOL_NUMBER: u8 = 77;
const PROTOCOL: RouteProtocol = RouteProtocol::Other(PROTOCOL_NUMBER);
/// Metric of a table's fallback: 0xff000000 + 8192, which no routing daemon uses.
const FALLBACK_METRIC: u32 = 4_278_198_272;
/// Metric of the route to a gateway. Given for both families: IPv6 would choose 1024 by itself.
const GATEWAY_METRIC: u32 = 100;

/// What can go wrong with rules and routes.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// No netlink socket.
    #[error("cannot open a netlink route socket")]
    Open(#[source] std::io::Error),
    /// The kernel refused.
    #[error("cannot {attempt}: {reason}")]
    Refused {
        /// What was tried.
        attempt: &'static str,
        /// The kernel's reason.
        reason: String,
    },
    /// The interface is not there.
    #[error("no interface is called {0}")]
    NoInterface(String),
}

fn refused(attempt: &'static str) -> impl Fn(rtnetlink::Error) -> RouteError {
    move |error| RouteError::Refused {
        attempt,
        reason: match &error {
            rtnetlink::Error::NetlinkError(message) => message.to_io().to_string(),
            other => other.to_string(),
        },
    }
}

/// The numbers that we use, and others should not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ranges {
    /// Bits of the mark.
    pub(crate) mask: u32,
    /// Tables are numbered from here + 1.
    pub(crate) table_offset: u32,
    /// First of our rules' priorities.
    pub(crate) priority: u32,
}

/// How many priorities are ours.
const PRIORITIES: u32 = 100;

/// What was read.
#[derive(Debug, Default)]
pub(crate) struct Observed {
    /// Ours, by family.
    pub(crate) states: BTreeMap<Family, RouteState>,
    /// Tables of our range that others use.
    pub(crate) occupied: BTreeSet<(Family, TableId)>,
    /// Rules of others that get in the way of ours, as sentences for the operator.
    pub(crate) collisions: BTreeSet<String>,
    /// Rules of a release before 0.3 are there.
    pub(crate) earlier: bool,
}

/// Rules and tables of this node.
#[derive(Debug)]
pub(crate) struct Routes {
    handle: Handle,
    families: Vec<Family>,
    ranges: Ranges,
    /// The socket of our changes.
    port: u32,
    /// Interfaces that have or had an address: a gateway may be behind them when they come up again.
    devices: Devices,
}

impl Routes {
    /// Opens the netlink socket, in the network namespace of the calling thread.
    pub(crate) fn open(families: Vec<Family>, ranges: Ranges) -> Result<Routes, RouteError> {
        let (mut connection, handle, _) = rtnetlink::new_connection().map_err(RouteError::Open)?;
        let socket = connection.socket_mut().socket_mut();
        let address = socket.bind_auto().map_err(RouteError::Open)?;
        tokio::spawn(connection);
        Ok(Routes {
            handle,
            families,
            ranges,
            port: address.port_number(),
            devices: Devices::default(),
        })
    }

    /// The socket of our changes, by which the kernel tells of them.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// The interfaces whose state matters, as they are found.
    pub(crate) fn devices(&self) -> Devices {
        self.devices.clone()
    }

    /// Reads our rules and tables, and what of others is in their way.
    pub(crate) async fn observe(&self) -> Result<Observed, RouteError> {
        let names: BTreeMap<u32, String> = self
            .interfaces()
            .await?
            .into_iter()
            .map(|interface| (interface.index, interface.name))
            .collect();
        let mut observed = Observed::default();
        for &family in &self.families {
            let mut state = RouteState::default();
            for message in &self.rules(family).await? {
                match parse_rule(message) {
                    Some(Found::Ours(rule)) => drop(state.rules.insert(rule)),
                    Some(Found::Others(rule)) => self.ranges.judge(family, &rule, &mut observed),
                    Some(Found::Nameless(rule)) if self.ranges.is_earlier(&rule) => {
                        observed.earlier = true;
                        self.ranges.occupy(family, &rule, &mut observed);
                    }
                    Some(Found::Nameless(rule)) => self.ranges.judge(family, &rule, &mut observed),
                    None => {}
                }
            }
            for route in &self.routes(family).await? {
                if let Some(table) = take_route(route, &names, &mut state.tables)
                    && table.0 > self.ranges.table_offset
                {
                    observed.occupied.insert((family, table));
                }
            }
            observed.states.insert(family, state);
        }
        Ok(observed)
    }

    async fn rules(&self, family: Family) -> Result<Vec<RuleMessage>, RouteError> {
        let version = match family {
            Family::V4 => rtnetlink::IpVersion::V4,
            Family::V6 => rtnetlink::IpVersion::V6,
        };
        let rules = self.handle.rule().get(version).execute().try_collect();
        rules.await.map_err(refused("list rules"))
    }

    async fn routes(&self, family: Family) -> Result<Vec<RouteMessage>, RouteError> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = address_family(family);
        let routes = self.handle.route().get(filter).execute().try_collect();
        routes.await.map_err(refused("list routes"))
    }

    /// Removes the rules of a release before 0.3, each with the default route of its table; absent is fine.
    pub(crate) async fn remove_earlier(&self) -> Result<(), RouteError> {
        for &family in &self.families {
            for message in self.rules(family).await? {
                let Some(Found::Nameless(rule)) = parse_rule(&message) else {
                    continue;
                };
                let RuleAction::Lookup(table) = rule.action else {
                    continue;
                };
                if !self.ranges.is_earlier(&rule) {
                    continue;
                }
                // The rule last: as long as it is there, the rest is found again.
                for route in self.routes(family).await? {
                    if is_default_in(&route, table) && route.header.protocol == RouteProtocol::Boot
                    {
                        absent(self.handle.route().del(route).execute().await)
                            .map_err(refused("remove the route of an earlier release"))?;
                    }
                }
                absent(self.handle.rule().del(message).execute().await)
                    .map_err(refused("remove the rule of an earlier release"))?;
            }
        }
        Ok(())
    }

    /// The interfaces that are up, but for loopback, with their connected networks.
    pub(crate) async fn links(&self) -> Result<Vec<Interface>, RouteError> {
        let mut links: BTreeMap<u32, Interface> = self
            .interfaces()
            .await?
            .into_iter()
            .filter(|interface| interface.up && !interface.loopback)
            .map(|interface| {
                let link = Interface {
                    name: interface.name,
                    nets: BTreeSet::new(),
                };
                (interface.index, link)
            })
            .collect();
        let mut addresses = self.handle.address().get().execute();
        while let Some(message) = addresses
            .try_next()
            .await
            .map_err(refused("list addresses"))?
        {
            if message.header.scope == AddressScope::Universe {
                let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
                devices.insert(message.header.index);
            }
            let Some(link) = links.get_mut(&message.header.index) else {
                continue;
            };
            let length = message.header.prefix_len;
            // `Address` is the peer's on a point-to-point link, which is what can be reached there.
            let nets = message
                .attributes
                .iter()
                .filter_map(|attribute| match attribute {
                    AddressAttribute::Address(address) => IpNet::new(*address, length).ok(),
                    _ => None,
                });
            link.nets.extend(nets.map(|net| net.trunc()));
        }
        Ok(links.into_values().collect())
    }

    /// Executes route steps in order, and adds those that fail to `failed`.
    pub(crate) async fn apply(&self, steps: &[&RouteStep], failed: &mut Vec<StepError>) {
        for step in steps {
            if let Err(error) = self.execute(step).await {
                failed.push(StepError::new(*step, error));
            }
        }
    }

    async fn execute(&self, step: &RouteStep) -> Result<(), RouteError> {
        match step {
            RouteStep::AddRule(family, rule) => {
                let mut request = self.handle.rule().add();
                *request.message_mut() = rule_message(*family, rule);
                present(request.execute().await).map_err(refused("add the rule"))
            }
            RouteStep::RemoveRule(family, rule) => {
                let request = self.handle.rule().del(rule_message(*family, rule));
                absent(request.execute().await).map_err(refused("remove the rule"))
            }
            RouteStep::AddFallback(family, table) => {
                let request = self.handle.route().add(fallback_message(*family, *table));
                present(request.execute().await).map_err(refused("add the route"))
            }
            RouteStep::RemoveFallback(family, table) => {
                let request = self.handle.route().del(fallback_message(*family, *table));
                absent(request.execute().await).map_err(refused("remove the route"))
            }
            RouteStep::SetGateway(table, hop) => {
                let message = self.gateway_message(*table, hop).await?;
                let request = self.handle.route().add(message).replace();
                request.execute().await.map_err(refused("set the route"))
            }
            RouteStep::RemoveGateway(table, hop) => {
                // The interface may be gone already, and the route with it.
                let mut message = route_message(Family::of(hop.via), *table, GATEWAY_METRIC);
                message.header.kind = RouteType::Unicast;
                let gateway = RouteAttribute::Gateway(RouteAddress::from(hop.via));
                message.attributes.push(gateway);
                let request = self.handle.route().del(message);
                absent(request.execute().await).map_err(refused("remove the route"))
            }
        }
    }

    async fn gateway_message(
        &self,
        table: TableId,
        hop: &NextHop,
    ) -> Result<RouteMessage, RouteError> {
        let interfaces = self.interfaces().await?;
        let index = interfaces
            .iter()
            .find(|interface| interface.name == hop.dev)
            .map(|interface| interface.index)
            .ok_or_else(|| RouteError::NoInterface(hop.dev.clone()))?;
        let mut message = route_message(Family::of(hop.via), table, GATEWAY_METRIC);
        message.header.kind = RouteType::Unicast;
        let gateway = RouteAttribute::Gateway(RouteAddress::from(hop.via));
        message.attributes.push(gateway);
        message.attributes.push(RouteAttribute::Oif(index));
        Ok(message)
    }

    async fn interfaces(&self) -> Result<Vec<Link>, RouteError> {
        let links: Vec<_> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(refused("list interfaces"))?;
        let interface = |link: netlink_packet_route::link::LinkMessage| {
            let name = link
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name.clone()),
                    _ => None,
                })?;
            Some(Link {
                index: link.header.index,
                name,
                up: link.header.flags.contains(LinkFlags::Up),
                loopback: link.header.flags.contains(LinkFlags::Loopback),
            })
        };
        Ok(links.into_iter().filter_map(interface).collect())
    }
}

#[derive(Debug)]
struct Link {
    index: u32,
    name: String,
    up: bool,
    loopback: bool,
}

/// What is there already is as good as added.
fn present(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    forgive(result, &[std::io::ErrorKind::AlreadyExists])
}

/// What is not there is as good as removed. A missing route is ESRCH, which has no kind of its own.
fn absent(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    const ESRCH: i32 = 3;
    match &result {
        Err(rtnetlink::Error::NetlinkError(message))
            if message.to_io().raw_os_error() == Some(ESRCH) =>
        {
            Ok(())
        }
        _ => forgive(result, &[std::io::ErrorKind::NotFound]),
    }
}

fn forgive(
    result: Result<(), rtnetlink::Error>,
    kinds: &[std::io::ErrorKind],
) -> Result<(), rtnetlink::Error> {
    match &result {
        Err(rtnetlink::Error::NetlinkError(message)) if kinds.contains(&message.to_io().kind()) => {
            Ok(())
        }
        _ => result,
    }
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// The message for adding and for removing alike: the kernel removes the first rule that matches what is
/// given, so that everything has to be given.
fn rule_message(family: Family, rule: &Rule) -> RuleMessage {
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

/// A rule, by whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// Carries our protocol number.
    Ours(Rule),
    /// Carries that of another program, or of an administrator.
    Others(Rule),
    /// Carries none, as the rules of releases before 0.3.
    Nameless(Rule),
}

impl Ranges {
    /// Whether a nameless rule is one that releases before 0.3 made: the pairs of mark and table are theirs.
    fn is_earlier(&self, rule: &Rule) -> bool {
        let (Some(mark), RuleAction::Lookup(table)) = (rule.mark, rule.action) else {
            return false;
        };
        let slot = mark.value >> self.mask.trailing_zeros();
        mark.mask == self.mask
            && mark.value & !self.mask == 0
            && table.0.checked_sub(self.table_offset) == slot.checked_sub(1)
            && slot > 0
            && rule.to.is_none()
            && rule.from.is_none()
            && !rule.not
    }

    /// Notes what a rule of others takes from us.
    fn judge(&self, family: Family, rule: &Rule, observed: &mut Observed) {
        self.occupy(family, rule, observed);
        let ours = self.priority..self.priority.saturating_add(PRIORITIES);
        let takes_our_mark = rule.mark.is_some_and(|m| m.mask & self.mask != 0)
            && rule.priority < ours.end
            && rule.action != RuleAction::Nop;
        if ours.contains(&rule.priority) || takes_our_mark {
            let text = format!(
                "the {family} routing rule `{rule}` of others comes before ours or among them"
            );
            observed.collisions.insert(text);
        }
    }

    fn occupy(&self, family: Family, rule: &Rule, observed: &mut Observed) {
        if let RuleAction::Lookup(table) = rule.action
            && table.0 > self.table_offset
        {
            observed.occupied.insert((family, table));
        }
    }
}

/// What a rule says and whose it is; `None` for one that does what none of ours does.
fn parse_rule(message: &RuleMessage) -> Option<Found> {
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

fn fallback_message(family: Family, table: TableId) -> RouteMessage {
    let mut message = route_message(family, table, FALLBACK_METRIC);
    message.header.kind = RouteType::Unreachable;
    message
}

/// Notes a default route of ours in its table; returns the table of a route of others.
fn take_route(
    message: &RouteMessage,
    names: &BTreeMap<u32, String>,
    tables: &mut BTreeMap<TableId, Table>,
) -> Option<TableId> {
    let table = table_of(message);
    if message.header.protocol != PROTOCOL || message.header.destination_prefix_length != 0 {
        return Some(table);
    }
    let (mut metric, mut via, mut dev) = (0, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Priority(found) => metric = *found,
            RouteAttribute::Gateway(RouteAddress::Inet(found)) => via = Some(IpAddr::from(*found)),
            RouteAttribute::Gateway(RouteAddress::Inet6(found)) => via = Some(IpAddr::from(*found)),
            RouteAttribute::Oif(found) => dev = names.get(found).cloned(),
            _ => {}
        }
    }
    if message.header.kind == RouteType::Unreachable && metric == FALLBACK_METRIC {
        tables.entry(table).or_default().fallback = true;
    }
    if let (RouteType::Unicast, Some(via), Some(dev)) = (message.header.kind, via, dev) {
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

fn is_default_in(message: &RouteMessage, table: TableId) -> bool {
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
