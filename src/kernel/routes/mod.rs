//! Route backend: routing rules and tables by netlink.
//!
//! What carries our protocol number is ours, wherever it stands; all else belongs to others, even with our
//! priority or in our tables.

mod ahead;
mod codec;

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use futures::TryStreamExt;
use netlink_packet_route::route::{RouteMessage, RouteProtocol};
use netlink_packet_route::rule::RuleMessage;
use netlink_sys::AsyncSocket;
use nix::libc::{EEXIST, ENOENT, ESRCH};
use rtnetlink::Handle;

use self::ahead::{Ahead, ahead};
use self::codec::{
    Found, address_family, fallback_message, gateway_message, is_default_in, parse_rule,
    rule_message, take_route,
};
use crate::kernel::interfaces::{self, WatchedInterfaces};
use crate::kernel::ours::Ranges;
use crate::names::Interface;
use crate::state::{Family, RouteState, RouteStep, RuleAction, Surroundings, TableId};

#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    #[error("cannot open a netlink route socket")]
    Open(#[source] io::Error),
    #[error("cannot {attempt}")]
    Refused {
        attempt: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("no interface is called {0}")]
    NoInterface(String),
}

fn refused(attempt: &'static str) -> impl Fn(rtnetlink::Error) -> RouteError {
    move |error| RouteError::Refused {
        attempt,
        source: match error {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other),
        },
    }
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
}

#[derive(Debug)]
pub(crate) struct Routes {
    handle: Handle,
    families: Vec<Family>,
    ranges: Ranges,
    /// The socket of our changes, by which the kernel tells of them.
    pub(crate) port: u32,
    /// The interfaces whose state matters, as they are found.
    pub(crate) watched: WatchedInterfaces,
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
            watched: WatchedInterfaces::default(),
        })
    }

    /// Reads our rules and tables, and what of others is in their way.
    pub(crate) async fn observe(&self) -> Result<Observed, RouteError> {
        let links = self.links().await?.into_iter();
        let names: BTreeMap<u32, String> = links.map(|link| (link.index, link.name)).collect();
        let mut observed = Observed::default();
        for &family in &self.families {
            let mut state = RouteState::default();
            let mut ahead_of_ours: Vec<Ahead> = Vec::new();
            for message in &self.rules(family).await? {
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
            let mut of_others = BTreeSet::new();
            for route in &self.routes(family).await? {
                of_others.extend(take_route(route, &names, &mut state.tables));
            }
            // What a table does not know goes on to the next rule: an empty one takes nothing away.
            let takes = |(_, table): &Ahead| table.is_none_or(|table| of_others.contains(&table));
            let rules = ahead_of_ours.into_iter().filter(takes);
            let found = Surroundings {
                rules: rules.map(|(rule, _)| rule).collect(),
                ..Surroundings::default()
            };
            observed.surroundings.insert(family, found);
            let occupied = of_others
                .into_iter()
                .filter(|table| self.ranges.has_table(*table));
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

    async fn links(&self) -> Result<Vec<interfaces::Link>, RouteError> {
        let links = interfaces::links(&self.handle).await;
        links.map_err(refused("list interfaces"))
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
    pub(crate) async fn interfaces(&self) -> Result<Vec<Interface>, RouteError> {
        let links = self.links().await?;
        let interfaces = interfaces::connected(&self.handle, links, &self.watched).await;
        interfaces.map_err(refused("list addresses"))
    }

    pub(crate) async fn execute(&self, step: &RouteStep) -> Result<(), RouteError> {
        let (rules, routes) = (|| self.handle.rule(), || self.handle.route());
        match step {
            RouteStep::AddRule(family, rule) => {
                let mut request = rules().add();
                *request.message_mut() = rule_message(*family, rule);
                present(request.execute().await).map_err(refused("add the rule"))
            }
            RouteStep::RemoveRule(family, rule) => {
                let request = rules().del(rule_message(*family, rule));
                absent(request.execute().await).map_err(refused("remove the rule"))
            }
            RouteStep::AddFallback(family, table) => {
                let request = routes().add(fallback_message(*family, *table));
                present(request.execute().await).map_err(refused("add the route"))
            }
            RouteStep::RemoveFallback(family, table) => {
                let request = routes().del(fallback_message(*family, *table));
                absent(request.execute().await).map_err(refused("remove the route"))
            }
            RouteStep::SetGateway(table, hop) => {
                let links = self.links().await?;
                let link = links.iter().find(|link| link.name == hop.dev);
                let link = link.ok_or_else(|| RouteError::NoInterface(hop.dev.clone()))?;
                let message = gateway_message(*table, hop.via, Some(link.index));
                let request = routes().add(message).replace();
                request.execute().await.map_err(refused("set the route"))
            }
            RouteStep::RemoveGateway(table, hop) => {
                let request = routes().del(gateway_message(*table, hop.via, None));
                absent(request.execute().await).map_err(refused("remove the route"))
            }
        }
    }
}

/// What is there already is as good as added.
fn present(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    forgive(result, &[EEXIST])
}

/// What is not there is as good as removed. A missing route is ESRCH.
fn absent(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    forgive(result, &[ENOENT, ESRCH])
}

fn forgive(result: Result<(), rtnetlink::Error>, codes: &[i32]) -> Result<(), rtnetlink::Error> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message))
            if codes.contains(&message.raw_code().saturating_neg()) =>
        {
            Ok(())
        }
        result => result,
    }
}
