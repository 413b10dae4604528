//! Which bits of the mark and which priorities are ours: the defaults where nobody else uses them, else free ones. What the
//! operator names is never changed.
//!
//! Chosen once, at the start, and kept over restarts for as long as it is free: what is in the kernel already shows it.

use crate::settings::{FwMask, Settings};
use crate::state::{Rule, RuleAction, Survey};

/// Programs that show themselves by an interface, the name of which begins so, with the bits that they use.
const BY_INTERFACE: [(&str, u32, &str); 3] = [
    // `MARK_MAGIC_…` of bpf/lib/common.h: the identity in the upper half, and 0x0F00.
    ("cilium_host", 0xFFFF_0F00, "Cilium"),
    // The default of `iptablesMarkMask`, which has the bits of its eBPF data plane (0x1FF00000) too.
    ("cali", 0xFFFF_0000, "Calico"),
    ("tailscale", 0x00FF_0000, "Tailscale"),
];
/// Of kube-proxy, which every cluster may have: `masqueradeBit` 14 and the one beside it.
const KUBE_PROXY: u32 = 0x0000_C000;
/// Where to look for a free block when the default is taken, the widest first.
const BLOCKS: [u32; 7] = [
    0x00F0_0000,
    0x0000_00F0,
    0xF000_0000,
    0x0F00_0000,
    0x000F_0000,
    0x0000_000F,
    0x0000_3000,
];
/// How many priorities our rules have.
const PRIORITIES: u32 = 2;

/// The settings of a node, and what there is to tell of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    pub settings: Settings,
    /// What is not as it would be on a node without others.
    pub notes: Vec<String>,
}

/// Chooses the places.
#[must_use]
pub fn choose(settings: &Settings, survey: &Survey) -> Places {
    let mut places = Places {
        settings: settings.clone(),
        notes: Vec::new(),
    };
    choose_mask(survey, &mut places);
    choose_priority(survey, &mut places);
    places
}

fn choose_mask(survey: &Survey, places: &mut Places) {
    let settings = &mut places.settings;
    let wanted = settings.mask;
    let Some(user) = user_of(wanted.bits(), survey) else {
        return;
    };
    if settings.mask_is_given {
        settings.mask_is_shared = true;
        places.notes.push(format!(
            "FIREWALL_MASK={:#010x} has bits that {user} uses: marks count only together with the pod's address, one routing \
             rule for each; name free bits, or none to have them found",
            wanted.bits()
        ));
        return;
    }
    let free = |bits: &u32| user_of(*bits, survey).is_none();
    let own = own_rules(survey).filter_map(|rule| Some(rule.mark?.mask));
    let found = own.chain(BLOCKS).filter(free);
    let Some(mask) = found.filter_map(|bits| FwMask::new(bits).ok()).next() else {
        settings.mask_is_shared = true;
        places.notes.push(format!(
            "no block of mark bits is free, and {user} uses {:#010x}: marks count only together with the pod's address",
            wanted.bits()
        ));
        return;
    };
    settings.mask = mask;
    places.notes.push(format!(
        "{user} uses bits of {:#010x}: marks are in {:#010x} instead",
        wanted.bits(),
        mask.bits()
    ));
}

/// Who uses one of these bits.
fn user_of(bits: u32, survey: &Survey) -> Option<String> {
    let interfaces = || survey.interfaces.iter();
    let by_interface = BY_INTERFACE.iter().find(|(prefix, used, _)| {
        used & bits != 0 && interfaces().any(|name| name.starts_with(prefix))
    });
    let by_rule = || survey.others.iter().find(|rule| bits_of(rule) & bits != 0);
    match by_interface {
        Some((_, _, name)) => Some((*name).to_owned()),
        None if KUBE_PROXY & bits != 0 => Some("kube-proxy".to_owned()),
        None => by_rule().map(|rule| format!("the routing rule `{rule}`")),
    }
}

/// The bits that a rule's packets may carry. One that compares the whole mark has those of its value.
fn bits_of(rule: &Rule) -> u32 {
    rule.mark.map_or(0, |mark| match mark.mask {
        u32::MAX => mark.value,
        mask => mask,
    })
}

/// Our rules do not jump, so that one of others at the same priority takes nothing from us that it would not take elsewhere. But
/// whose comes first among equals is an accident.
fn choose_priority(survey: &Survey, places: &mut Places) {
    let settings = &mut places.settings;
    let wanted = settings.rule_priority;
    let is_free = |first: &u32| {
        let ours = *first..first.saturating_add(PRIORITIES);
        !survey
            .others
            .iter()
            .any(|rule| ours.contains(&rule.priority))
    };
    if settings.rule_priority_is_given || is_free(&wanted) {
        return;
    }
    let own = own_rules(survey).map(|rule| rule.priority).min();
    let below = (1..wanted.saturating_sub(1)).rev();
    if let Some(priority) = own.into_iter().chain(below).find(is_free) {
        settings.rule_priority = priority;
        places.notes.push(format!(
            "a routing rule of others has priority {wanted} or the next: ours begin at {priority} instead"
        ));
    }
}

fn own_rules(survey: &Survey) -> impl Iterator<Item = &Rule> {
    let is_lookup = |rule: &&Rule| matches!(rule.action, RuleAction::Lookup(_));
    survey.own.iter().filter(is_lookup)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Mark, TableId};

    fn rule(priority: u32, value: u32, mask: u32) -> Rule {
        Rule {
            priority,
            action: RuleAction::Lookup(TableId(7)),
            mark: (mask != 0).then_some(Mark { value, mask }),
            not: false,
            from: None,
            to: None,
        }
    }

    fn found(settings: &Settings, survey: &Survey) -> (u32, bool, u32, usize) {
        let Places { settings, notes } = choose(settings, survey);
        let Settings {
            mask,
            mask_is_shared,
            rule_priority,
            ..
        } = settings;
        (mask.bits(), mask_is_shared, rule_priority, notes.len())
    }

    fn beside(interfaces: &[&str], others: &[Rule], own: &[Rule]) -> Survey {
        Survey {
            interfaces: interfaces.iter().map(|name| (*name).to_owned()).collect(),
            others: others.to_vec(),
            own: own.to_vec(),
        }
    }

    #[test]
    fn the_defaults_stay_where_they_are_free_and_move_where_they_are_not() {
        let kernel = [rule(0, 0, 0), rule(32766, 0, 0)];
        let ours = |first, bits| [rule(first, 0x10, bits), rule(first + 1, 0x10, bits)];
        for (what, interfaces, others, own, expected) in [
            (
                "nobody",
                &["eth0"][..],
                vec![],
                vec![],
                (0x00F0_0000, false, 1000, 0),
            ),
            (
                "Cilium",
                &["cilium_host"],
                vec![],
                vec![],
                (0xF0, false, 1000, 1),
            ),
            (
                "Calico",
                &["cali1234"],
                vec![],
                vec![],
                (0xF0, false, 1000, 1),
            ),
            (
                "Tailscale",
                &["tailscale0"],
                vec![rule(5210, 0x0008_0000, 0x00FF_0000)],
                vec![],
                (0xF0, false, 1000, 1),
            ),
            (
                "both, and a VPN whose packets have a value",
                &["cali1", "tailscale0"],
                vec![rule(32764, 0x0000_ca6c, u32::MAX)],
                vec![],
                (0x3000, false, 1000, 1),
            ),
            (
                "a VRF",
                &["eth0"],
                vec![rule(1000, 0, 0)],
                vec![],
                (0x00F0_0000, false, 998, 1),
            ),
            (
                "as it was found at the last start",
                &["cilium_host"],
                vec![rule(1001, 0, 0)],
                ours(500, 0x3000).into(),
                (0x3000, false, 500, 2),
            ),
            (
                "somebody came to where we were",
                &["eth0"],
                vec![rule(998, 0, 0), rule(1000, 0, 0)],
                ours(998, 0x00F0_0000).into(),
                (0x00F0_0000, false, 996, 1),
            ),
        ] {
            let others = [others, kernel.to_vec()].concat();
            let survey = beside(interfaces, &others, &own);
            let settings = Settings::default_on("node1");
            assert_eq!(found(&settings, &survey), expected, "{what}");
        }
    }

    #[test]
    fn what_the_operator_names_is_kept_and_told() {
        let given = Settings {
            mask_is_given: true,
            rule_priority_is_given: true,
            ..Settings::default_on("node1")
        };
        let nobody = beside(&["eth0"], &[], &[]);
        assert_eq!(found(&given, &nobody), (0x00F0_0000, false, 1000, 0));
        let cilium = beside(&["cilium_host"], &[rule(1000, 0, 0)], &[]);
        assert_eq!(found(&given, &cilium), (0x00F0_0000, true, 1000, 1));
        let note = &choose(&given, &cilium).notes[0];
        assert!(note.contains("has bits that Cilium uses"), "{note}");
    }

    #[test]
    fn where_no_block_is_free_marks_count_with_the_pod() {
        let all = beside(&["cilium_host"], &[rule(99, 0, 0x0000_30FF)], &[]);
        let settings = Settings::default_on("node1");
        assert_eq!(found(&settings, &all), (0x00F0_0000, true, 1000, 1));
    }
}
