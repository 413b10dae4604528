//! Rules and tables of one family: a block of rules that unmarked packets pass in one step, and a table for each gateway.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::plan::slots::{Slot, Slots};
use crate::settings::Settings;
use crate::state::{Family, NextHop, RouteState, Rule, RuleAction, Table};

/// Offsets of our rules from `ROUTE_RULE_PRIORITY`. The first rule lets unmarked packets skip all others.
const PASS_UNMARKED: u32 = 0;

/// Excluded destinations are routed as without us.
const PASS_EXCLUDED: u32 = 1;

/// One rule for each gateway.
const TO_GATEWAY: u32 = 2;

/// Whatever is marked and found no gateway is rejected.
const REJECT_REST: u32 = 98;

/// The target of `goto`: the end of our block.
const END: u32 = 99;

pub(super) fn routes(
    family: Family,
    settings: &Settings,
    excluded: &BTreeSet<IpNet>,
    slots: &Slots,
    hops: &BTreeMap<IpAddr, &NextHop>,
) -> RouteState {
    let rule = |place: u32, action: RuleAction| rule(settings, place, action);
    let end = settings.rule_priority + END;
    let unmarked = settings.mask.unmarked();
    let mut state = RouteState::default();
    state.rules.insert(Rule {
        mark: Some(unmarked),
        ..rule(PASS_UNMARKED, RuleAction::Goto(end))
    });
    // Not `lookup main`: an excluded destination is routed by whatever rules others have, as if unmarked. This
    // is also what lets a reverse path check that looks at the mark (src_valid_mark, firewalld's
    // IPv6_rpfilter) find the way back to a pod.
    state.rules.extend(excluded.iter().map(|net| Rule {
        to: Some(*net),
        ..rule(PASS_EXCLUDED, RuleAction::Goto(end))
    }));
    // Matches marked packets only, although unmarked ones never come here: if the first rule were lost, an unconditional
    // one would cut the node off.
    state.rules.insert(Rule {
        mark: Some(unmarked),
        not: true,
        ..rule(REJECT_REST, RuleAction::Unreachable)
    });
    state.rules.insert(rule(END, RuleAction::Nop));
    for (gateway, slot) in slots.iter().filter(|(g, _)| Family::of(*g) == family) {
        let Some(hop) = hops.get(&gateway) else {
            continue;
        };
        // Where gateways share a mark, each of their pods has a rule.
        if !slot.overflows(settings.mask) {
            state.rules.insert(to_gateway(slot, settings));
        }
        let table = Table {
            fallback: true,
            gateway: Some((*hop).clone()),
        };
        state.tables.insert(slot.table(settings), table);
    }
    state
}

fn rule(settings: &Settings, place: u32, action: RuleAction) -> Rule {
    Rule {
        priority: settings.rule_priority + place,
        action,
        mark: None,
        not: false,
        from: None,
        to: None,
    }
}

/// Sends what has a slot's mark to the slot's table.
fn to_gateway(slot: Slot, settings: &Settings) -> Rule {
    let table = slot.table(settings);
    Rule {
        mark: Some(slot.mark(settings.mask)),
        ..rule(settings, TO_GATEWAY, RuleAction::Lookup(table))
    }
}

/// The rule of one pod, where its gateway shares the mark with others.
pub(super) fn of_pod(pod: IpAddr, slot: Slot, settings: &Settings) -> Option<Rule> {
    slot.overflows(settings.mask).then(|| Rule {
        from: Some(pod),
        ..to_gateway(slot, settings)
    })
}
