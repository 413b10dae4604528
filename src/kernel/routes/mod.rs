//! Route backend: routing rules and tables by netlink.
//!
//! What carries our protocol number is ours, wherever it stands; all else belongs to others, even with our
//! priority or in our tables.

mod ahead;
mod codec;

use std::collections::{BTreeMap, BTreeSet};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{RouteMessage, RouteProtocol};
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EEXIST, ENOENT, ESRCH};
use nix::net::if_::if_nametoindex;
use tracing::debug;

use self::ahead::{Ahead, ahead};
use self::codec::{
    Found, PROTOCOL, address_family, fallback_message, gateway_message, is_default_in, parse_rule,
    rule_message, take_route, throw_message,
};
use crate::error::chain;
use crate::kernel::interfaces::{connected, links};
use crate::kernel::netlink::{Care, Message, NetlinkError, OwnPorts, attribute};
use crate::kernel::ours::{PROTOCOL_NUMBER, Ranges};
use crate::kernel::rtnetlink::{Rtnetlink, decode};
use crate::kernel::watched::WatchedInterfaces;
use crate::names::Interface;
use crate::state::{Family, RouteState, RouteStep, RuleAction, Surroundings, Survey, TableId};

/// `struct rtmsg` of rtnetlink.h: family, lengths, TOS, table, protocol, scope, type and flags.
const ROUTE_HEADER_BYTES: usize = 12;
const PROTOCOL_OF_ROUTE_AT: usize = 5;
/// `FRA_PROTOCOL` of fib_rules.h, and the length of `struct fib_rule_hdr`.
const PROTOCOL_OF_RULE: u16 = 21;
const RULE_HEADER_BYTES: usize = 12;

#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    #[error("cannot {attempt}")]
    Refused {
        attempt: &'static str,
        #[source]
        source: NetlinkError,
    },
    #[error("no interface is called {0}")]
    NoInterface(String),
}

fn refused(attempt: &'static str) -> impl Fn(NetlinkError) -> RouteError {
    move |source| RouteError::Refused { attempt, source }
}

#[derive(Debug, Default)]
pub(crate) struct Observed {
    /// Ours, by family.
    pub(crate) states: BTreeMap<Family, RouteState>,
    /// Tables of our range that others use.
    pub(crate) occupied: BTreeSet<(Family, TableId)>,
    /// Rules of others ahead of ours.
    pub(crate) surroundings: BTreeMap<Family, Surroundings>,
    /// Rules of a release before 0.3 are there.
    pub(crate) earlier: bool,
    /// The interfaces that are up, but for loopback, with their connected networks.
    pub(crate) interfaces: Vec<Interface>,
}

#[derive(Debug)]
pub(crate) struct Routes {
    /// The socket of our changes; opened again after it has failed.
    netlink: Option<Rtnetlink>,
    ports: OwnPorts,
    families: Vec<Family>,
    ranges: Ranges,
    /// The interfaces whose state matters, as they are found.
    pub(crate) watched: WatchedInterfaces,
}

impl Routes {
    pub(crate) fn new(families: Vec<Family>, ranges: Ranges, ports: OwnPorts) -> Routes {
        Routes {
            netlink: None,
            ports,
            families,
            ranges,
            watched: WatchedInterfaces::default(),
        }
    }

    /// Reads our rules and tables, what of others is in their way, and the interfaces. In a thread of its own, which a
    /// node with many routes keeps busy, and in its network namespace.
    pub(crate) async fn observe(&self) -> Result<Observed, RouteError> {
        let look = Look {
            families: self.families.clone(),
            ranges: self.ranges,
            watched: self.watched.clone(),
        };
        let looked = tokio::task::spawn_blocking(move || look.look()).await;
        looked.unwrap_or_else(|error| Err(refused("look at routes")(error.into())))
    }

    /// Removes the rules of a release before 0.3, each with the default route of its table; absent is fine.
    pub(crate) fn remove_earlier(&mut self) -> Result<(), RouteError> {
        for family in self.families.clone() {
            let netlink = Rtnetlink::open().map_err(refused("open a socket"))?;
            for message in rules(&netlink, family)? {
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
                for route in routes(&netlink, family, RouteProtocol::Boot)? {
                    if is_default_in(&route, table) {
                        absent(self.change(RouteNetlinkMessage::DelRoute(route), 0))
                            .map_err(refused("remove the route of an earlier release"))?;
                    }
                }
                absent(self.change(RouteNetlinkMessage::DelRule(message), 0))
                    .map_err(refused("remove the rule of an earlier release"))?;
            }
        }
        Ok(())
    }

    pub(crate) fn execute(&mut self, step: &RouteStep) -> Result<(), RouteError> {
        use RouteNetlinkMessage::{DelRoute, DelRule, NewRoute, NewRule};
        const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;
        match step {
            RouteStep::AddRule(family, rule) => {
                let added = self.change(NewRule(rule_message(*family, rule)), NEW);
                present(added).map_err(refused("add the rule"))
            }
            RouteStep::RemoveRule(family, rule) => {
                let removed = self.change(DelRule(rule_message(*family, rule)), 0);
                absent(removed).map_err(refused("remove the rule"))
            }
            RouteStep::AddFallback(family, table) => {
                let added = self.change(NewRoute(fallback_message(*family, *table)), NEW);
                present(added).map_err(refused("add the route"))
            }
            RouteStep::RemoveFallback(family, table) => {
                let removed = self.change(DelRoute(fallback_message(*family, *table)), 0);
                absent(removed).map_err(refused("remove the route"))
            }
            RouteStep::SetGateway(table, hop) => {
                let index = if_nametoindex(hop.dev.as_str());
                let index = index.map_err(|_| RouteError::NoInterface(hop.dev.clone()))?;
                let message = gateway_message(*table, hop.via, Some(index));
                let set = self.change(NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE);
                set.map_err(refused("set the route"))
            }
            RouteStep::RemoveGateway(table, hop) => {
                let message = gateway_message(*table, hop.via, None);
                let removed = self.change(DelRoute(message), 0);
                absent(removed).map_err(refused("remove the route"))
            }
            RouteStep::AddThrow(table, net) => {
                let added = self.change(NewRoute(throw_message(*table, *net)), NEW);
                present(added).map_err(refused("add the route"))
            }
            RouteStep::RemoveThrow(table, net) => {
                let removed = self.change(DelRoute(throw_message(*table, *net)), 0);
                absent(removed).map_err(refused("remove the route"))
            }
        }
    }

    fn change(&mut self, change: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        let netlink = match &self.netlink {
            Some(netlink) => netlink,
            None => {
                let netlink = Rtnetlink::open()?;
                self.ports.opened(netlink.port);
                self.netlink.insert(netlink)
            }
        };
        let changed = netlink.change(change, flags);
        // What the kernel refuses is not the socket's fault; after anything else it may hold answers that nobody waits for.
        if let Err(error) = &changed
            && error.code().is_none()
            && let Some(netlink) = self.netlink.take()
        {
            self.ports.closed(netlink.port);
        }
        changed
    }
}

/// One look, with a socket of its own: one that has failed once cannot make the next look fail.
struct Look {
    families: Vec<Family>,
    ranges: Ranges,
    watched: WatchedInterfaces,
}

impl Look {
    fn look(&self) -> Result<Observed, RouteError> {
        let netlink = Rtnetlink::open().map_err(refused("open a socket"))?;
        let links = links(&netlink).map_err(refused("list interfaces"))?;
        let addresses = netlink.addresses().map_err(refused("list addresses"))?;
        self.watched.see(&links, &addresses);
        let names = links.iter().map(|link| (link.index, link.name.clone()));
        let names: BTreeMap<u32, String> = names.collect();
        let mut observed = Observed {
            interfaces: connected(links, &addresses),
            ..Observed::default()
        };
        for &family in &self.families {
            let mut state = RouteState::default();
            let mut ahead_of_ours: Vec<Ahead> = Vec::new();
            for message in &rules(&netlink, family)? {
                let found = parse_rule(message);
                let is_of_others = match &found {
                    Some(Found::Ours(_)) => false,
                    Some(Found::Nameless(rule)) => !self.ranges.is_earlier(rule),
                    Some(Found::Others(_)) | None => true,
                };
                if is_of_others {
                    ahead_of_ours.extend(ahead(family, message, &self.ranges));
                }
                match found {
                    Some(Found::Ours(rule)) => drop(state.rules.insert(rule)),
                    Some(Found::Nameless(rule)) if self.ranges.is_earlier(&rule) => {
                        observed.earlier = true;
                        self.occupy(family, rule.action, &mut observed);
                    }
                    Some(Found::Others(rule) | Found::Nameless(rule)) => {
                        self.occupy(family, rule.action, &mut observed);
                    }
                    None => {}
                }
            }
            let mut of_others = self.tables_of_others(&netlink, family)?;
            for route in &routes(&netlink, family, PROTOCOL)? {
                of_others.extend(take_route(route, &names, &mut state.tables));
            }
            // What a table does not know goes on to the next rule: an empty one takes nothing away.
            let takes = |(_, table): &Ahead| {
                table.is_none_or(|t| of_others.contains(&t) || state.tables.contains_key(&t))
            };
            let rules = ahead_of_ours.into_iter().filter(takes);
            let found = Surroundings {
                rules: rules.map(|(rule, _)| rule).collect(),
                ..Surroundings::default()
            };
            observed.surroundings.insert(family, found);
            let occupied = of_others.into_iter();
            let occupied = occupied.filter(|table| self.ranges.has_table(*table));
            observed
                .occupied
                .extend(occupied.map(|table| (family, table)));
            observed.states.insert(family, state);
        }
        Ok(observed)
    }

    /// Notes the table that a rule of others takes from us.
    fn occupy(&self, family: Family, action: RuleAction, observed: &mut Observed) {
        if let RuleAction::Lookup(table) = action
            && self.ranges.has_table(table)
        {
            observed.occupied.insert((family, table));
        }
    }

    /// Tables that have routes of others. No route is kept: a router has a million of them, which change all the time; when
    /// the first one of a table of our range is missed, the kernel tells of it.
    fn tables_of_others(
        &self,
        netlink: &Rtnetlink,
        family: Family,
    ) -> Result<BTreeSet<TableId>, RouteError> {
        let mut question = RouteMessage::default();
        question.header.address_family = address_family(family);
        let question = RouteNetlinkMessage::GetRoute(question);
        let tables = netlink.dump(question, Care::Glance, |all: &mut BTreeSet<_>, answer| {
            let (table, protocol) = (table_of_route(answer), protocol_of_route(answer));
            all.extend(table.filter(|_| protocol != Some(PROTOCOL_NUMBER)));
            Ok(())
        });
        tables.map_err(refused("list routes"))
    }
}

/// Looks at what else uses marks and priorities, in the network namespace of the calling thread.
pub(crate) fn survey(families: &[Family], ranges: &Ranges) -> Result<Survey, RouteError> {
    let netlink = Rtnetlink::open().map_err(refused("open a socket"))?;
    let links = links(&netlink).map_err(refused("list interfaces"))?;
    let mut survey = Survey {
        interfaces: links.into_iter().map(|link| link.name).collect(),
        ..Survey::default()
    };
    for &family in families {
        for message in &rules(&netlink, family)? {
            match parse_rule(message) {
                Some(Found::Ours(rule)) => survey.own.push(rule),
                Some(Found::Nameless(rule)) if ranges.is_earlier(&rule) => {}
                Some(Found::Others(rule) | Found::Nameless(rule)) => survey.others.push(rule),
                None => {}
            }
        }
    }
    Ok(survey)
}

/// The table of a route.
fn table_of_route(message: Message<'_>) -> Option<TableId> {
    let table = attribute(message.tail(ROUTE_HEADER_BYTES), nix::libc::RTA_TABLE)?;
    Some(TableId(u32::from_ne_bytes(table.try_into().ok()?)))
}

fn protocol_of_route(message: Message<'_>) -> Option<u8> {
    message.byte_at(PROTOCOL_OF_ROUTE_AT)
}

/// Whether a notification of a route is of one of ours, or of a table of our range.
pub(crate) fn concerns_route(message: Message<'_>, ranges: &Ranges) -> bool {
    protocol_of_route(message) == Some(PROTOCOL_NUMBER)
        || table_of_route(message).is_some_and(|table| ranges.has_table(table))
}

/// Whether a notification of a rule is of one of ours (`Some(true)`), or of one that gets in their way (`Some(false)`).
pub(crate) fn concerns_rule(message: Message<'_>, ranges: &Ranges) -> Option<bool> {
    let rule = match decode(message) {
        Ok(RouteNetlinkMessage::NewRule(rule) | RouteNetlinkMessage::DelRule(rule)) => rule,
        Ok(_) | Err(_) => return is_own_rule(message).then_some(true),
    };
    let family = match rule.header.family {
        AddressFamily::Inet6 => Family::V6,
        _ => Family::V4,
    };
    let occupies = match parse_rule(&rule) {
        Some(Found::Ours(_)) => return Some(true),
        Some(Found::Others(of_others) | Found::Nameless(of_others)) => {
            matches!(of_others.action, RuleAction::Lookup(table) if ranges.has_table(table))
        }
        None => false,
    };
    (occupies || ahead(family, &rule, ranges).is_some()).then_some(false)
}

fn is_own_rule(message: Message<'_>) -> bool {
    let protocol = attribute(message.tail(RULE_HEADER_BYTES), PROTOCOL_OF_RULE);
    protocol == Some(&[PROTOCOL_NUMBER])
}

fn rules(netlink: &Rtnetlink, family: Family) -> Result<Vec<RuleMessage>, RouteError> {
    let mut question = RuleMessage::default();
    question.header.family = address_family(family);
    let question = RouteNetlinkMessage::GetRule(question);
    let rules = netlink.dump(question, Care::Exact, |all: &mut Vec<_>, answer| {
        match decode(answer) {
            Ok(RouteNetlinkMessage::NewRule(rule)) => all.push(rule),
            Ok(_) => {}
            Err(error) if is_own_rule(answer) => return Err(error),
            // A look must not fail for ever because of what others have.
            Err(error) => debug!(
                "cannot read a {family} routing rule of others: {}",
                chain(&error)
            ),
        }
        Ok(())
    });
    rules.map_err(refused("list rules"))
}

/// The routes of a protocol, in all tables. The kernel leaves out all others, so that they cost no memory.
fn routes(
    netlink: &Rtnetlink,
    family: Family,
    protocol: RouteProtocol,
) -> Result<Vec<RouteMessage>, RouteError> {
    let mut question = RouteMessage::default();
    question.header.address_family = address_family(family);
    question.header.protocol = protocol;
    let question = RouteNetlinkMessage::GetRoute(question);
    let routes = netlink.dump(question, Care::Exact, |all: &mut Vec<_>, answer| {
        if protocol_of_route(answer) == Some(protocol.into())
            && let RouteNetlinkMessage::NewRoute(route) = decode(answer)?
        {
            all.push(route);
        }
        Ok(())
    });
    routes.map_err(refused("list routes"))
}

/// What is there already is as good as added.
fn present(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    forgive(result, &[EEXIST])
}

/// What is not there is as good as removed. A missing route is ESRCH.
fn absent(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    forgive(result, &[ENOENT, ESRCH])
}

fn forgive(result: Result<(), NetlinkError>, codes: &[i32]) -> Result<(), NetlinkError> {
    match result {
        Err(error) if error.code().is_some_and(|code| codes.contains(&code)) => Ok(()),
        result => result,
    }
}
