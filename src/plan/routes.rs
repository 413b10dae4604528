//! Rules and tables of one family. No rule of ours matches a packet without a mark of ours, and none jumps: what is not ours
//! is routed as without us.
//!
//! Two rules for each mark. The first leads to the gateway's table; when it or its table is lost, the second leads to
//! the *floor*, a table that rejects. Both tables leave some destinations to the rules of others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::plan::slots::{self, Slot, Slots};
use crate::settings::Settings;
use crate::state::{Family, Mark, NextHop, RouteState, Rule, RuleAction, Table, TableId, Traits};

/// Offsets of our rules from `ROUTE_RULE_PRIORITY`.
const TO_GATEWAY: u32 = 0;
const TO_FLOOR: u32 = 1;

/// How pods of this node are routed to their gateways.
pub(super) struct Routing<'a> {
    pub(super) settings: &'a Settings,
    pub(super) traits: Traits,
    pub(super) slots: &'a Slots,
    /// The gateways in use, by address.
    pub(super) hops: &'a BTreeMap<IpAddr, &'a NextHop>,
}

impl Routing<'_> {
    /// Tables, and the rules that they share. Every table leaves `throws` to the rules of others.
    pub(super) fn state(&self, throws: &BTreeSet<IpNet>) -> RouteState {
        let mut state = RouteState::default();
        for (slot, hop) in self.used() {
            let mark = slot.mark(self.settings.mask);
            if !self.is_by_pod(slot) {
                state.rules.insert(self.to_gateway(slot));
            }
            if !self.traits.mask_is_shared {
                state.rules.extend(self.to_floor(mark));
            }
            let table = Table {
                fallback: true,
                gateway: Some(hop.clone()),
                throws: throws.clone(),
            };
            state.tables.insert(slot.table(self.settings), table);
            if let Some(floor) = slots::floor(self.settings) {
                let table = Table {
                    fallback: true,
                    gateway: None,
                    throws: throws.clone(),
                };
                state.tables.insert(floor, table);
            }
        }
        state
    }

    /// The rules of one pod, where its mark does not say which table is meant, or not whose it is.
    pub(super) fn of_pod(&self, pod: IpAddr, slot: Slot) -> impl Iterator<Item = Rule> {
        let by_pod = |rule: Rule| Rule {
            from: Some(pod),
            ..rule
        };
        let to_gateway = self.is_by_pod(slot).then(|| by_pod(self.to_gateway(slot)));
        let shared = self.traits.mask_is_shared;
        let floor = self.to_floor(slot.mark(self.settings.mask));
        let to_floor = floor.filter(|_| shared).map(by_pod);
        to_gateway.into_iter().chain(to_floor)
    }

    fn used(&self) -> impl Iterator<Item = (Slot, &NextHop)> {
        let slots = self.slots.iter();
        slots.filter_map(|(gateway, slot)| Some((slot, *self.hops.get(&gateway)?)))
    }

    fn is_by_pod(&self, slot: Slot) -> bool {
        self.traits.mask_is_shared || slot.overflows(self.settings.mask)
    }

    fn to_gateway(&self, slot: Slot) -> Rule {
        let mark = slot.mark(self.settings.mask);
        self.rule(TO_GATEWAY, mark, slot.table(self.settings))
    }

    fn to_floor(&self, mark: Mark) -> Option<Rule> {
        let floor = slots::floor(self.settings)?;
        Some(self.rule(TO_FLOOR, mark, floor))
    }

    fn rule(&self, place: u32, mark: Mark, table: TableId) -> Rule {
        Rule {
            priority: self.settings.rule_priority + place,
            action: RuleAction::Lookup(table),
            mark: Some(mark),
            not: false,
            from: None,
            to: None,
        }
    }
}

/// The destinations that marked packets may have all the same: every excluded one where they are marked before DNAT, else
/// none. But a reverse path check that looks at the mark (`src_valid_mark`, firewalld's IPv6_rpfilter) must find the way
/// back to a pod of this node.
pub(super) fn throws(
    family: Family,
    traits: Traits,
    excluded: &BTreeSet<IpNet>,
    own_pods: impl Iterator<Item = IpNet>,
) -> BTreeSet<IpNet> {
    if traits.marks_before_dnat {
        return excluded.clone();
    }
    // Where the operator does not exclude them, they are egress as anything else.
    let is_inside = |net: &IpNet| excluded.iter().any(|wider| wider.contains(net));
    let own = own_pods.filter(|net| Family::of_net(*net) == family);
    let own: Vec<IpNet> = own.filter(is_inside).collect();
    IpNet::aggregate(&own).into_iter().collect()
}
