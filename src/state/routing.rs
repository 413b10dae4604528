//! Marks, rules and tables: how a packet is routed to its gateway.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use derive_more::Display;
use ipnet::IpNet;

use crate::state::FamilyState;

/// A routing table of ours.
#[derive(Clone, Copy, Debug, Display, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub u32);

/// A value of the packet mark within a mask: the bits outside the mask belong to others.
#[derive(Clone, Copy, Debug, Display, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[display("{value:#x}/{mask:#x}")]
pub struct Mark {
    /// The bits to set or to compare, all within `mask`.
    pub value: u32,
    pub mask: u32,
}

/// What a routing rule does with a packet that it matches. The plan has `Lookup` only: the others are those of others, and
/// of releases before 0.3.0.
#[derive(Clone, Copy, Debug, Display, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleAction {
    /// Nothing: a target of `Goto` rules.
    #[display("nop")]
    Nop,
    /// Route by a table; without a match there, go on with the next rule.
    #[display("lookup {_0}")]
    Lookup(TableId),
    /// Reject with an ICMP error.
    #[display("unreachable")]
    Unreachable,
    /// Go on at the rule with this priority.
    #[display("goto {_0}")]
    Goto(u32),
}

/// A routing policy rule (`ip rule`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// Place in the list of rules, lowest first. Rules of others may share it.
    pub priority: u32,
    pub action: RuleAction,
    pub mark: Option<Mark>,
    /// The match is inverted as a whole (`ip rule add not …`).
    pub not: bool,
    pub from: Option<IpAddr>,
    pub to: Option<IpNet>,
}

impl fmt::Display for Rule {
    /// The form that `ip rule` takes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pref {}", self.priority)?;
        if self.not {
            f.write_str(" not")?;
        }
        if let Some(from) = self.from {
            write!(f, " from {from}")?;
        }
        if let Some(to) = self.to {
            write!(f, " to {to}")?;
        }
        if let Some(mark) = self.mark {
            write!(f, " fwmark {mark}")?;
        }
        write!(f, " {}", self.action)
    }
}

/// Where a routing table sends its packets.
#[derive(Clone, Debug, Display, PartialEq, Eq, PartialOrd, Ord)]
#[display("{via} dev {dev}")]
pub struct NextHop {
    /// Address of the gateway node.
    pub via: IpAddr,
    /// Name of the interface on which the gateway is directly reachable.
    pub dev: String,
}

/// What a mark stands for: packets that carry it go to this gateway, or nowhere.
#[derive(Clone, Copy, Debug, Display, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[display("{mark} via {via}")]
pub struct Way {
    pub mark: Mark,
    pub via: IpAddr,
}

/// One routing table of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// The `unreachable` default route with the worst metric is there: without it a table that lost its
    /// gateway is empty, the lookup falls through to `main`, and the packet leaks.
    pub fallback: bool,
    pub gateway: Option<NextHop>,
    /// Destinations that it leaves to the rules after ours (`throw` routes).
    pub throws: BTreeSet<IpNet>,
}

/// Rules and tables of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteState {
    /// Our rules: in the kernel those with our protocol number, wherever they stand.
    pub rules: BTreeSet<Rule>,
    pub tables: BTreeMap<TableId, Table>,
}

/// Where the pods of one family are routed to, looked up by their marks.
#[derive(Debug)]
pub struct NextHops<'a> {
    state: &'a FamilyState,
    by_mark: BTreeMap<(Mark, Option<IpAddr>), (TableId, &'a NextHop)>,
}

impl RouteState {
    /// What each mark stands for.
    pub fn ways(&self) -> impl Iterator<Item = Way> {
        self.rules.iter().filter_map(|rule| match rule.action {
            RuleAction::Lookup(table) => Some(Way {
                mark: rule.mark?,
                via: self.tables.get(&table)?.gateway.as_ref()?.via,
            }),
            RuleAction::Nop | RuleAction::Unreachable | RuleAction::Goto(_) => None,
        })
    }
}

impl FamilyState {
    /// Where marked pods are routed to.
    #[must_use]
    pub fn next_hops(&self) -> NextHops<'_> {
        let hop = |rule: &Rule| match rule.action {
            RuleAction::Lookup(id) => {
                let table = self.routes.tables.get(&id)?;
                Some((id, table.gateway.as_ref()?))
            }
            RuleAction::Nop | RuleAction::Unreachable | RuleAction::Goto(_) => None,
        };
        let rules = self.routes.rules.iter();
        let by_mark = rules.filter_map(|rule| Some(((rule.mark?, rule.from), hop(rule)?)));
        NextHops {
            state: self,
            by_mark: by_mark.collect(),
        }
    }
}

impl<'a> NextHops<'a> {
    /// The table and the gateway that a pod is routed to; a rule of the pod's own counts before the one of its mark.
    #[must_use]
    pub fn of(&self, pod: IpAddr) -> Option<(TableId, &'a NextHop)> {
        let mark = self.state.firewall.pods.get(&pod)?.mark?;
        let of_all = || self.by_mark.get(&(mark, None));
        self.by_mark
            .get(&(mark, Some(pod)))
            .or_else(of_all)
            .copied()
    }

    /// The pods that are routed to a gateway, and where.
    pub fn pods(&self) -> impl Iterator<Item = (IpAddr, &'a NextHop)> {
        let pods = self.state.firewall.pods.keys();
        pods.filter_map(|pod| Some((*pod, self.of(*pod)?.1)))
    }
}
