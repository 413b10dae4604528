//! Which pods are translated to which VIPs, and the `ipset restore` lines that change it. Pure.
//!
//! A pod is in the set of each of its VIPs, and while it has one in [`StaticSet::Translated`]: that lets its packets
//! through to the translation. It enters last and leaves first.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::kernel::iptables::sets::{Sets, StaticSet, vip_of_set, vip_set};
use crate::state::Family;

#[derive(Clone, Debug, Default)]
pub(super) struct Translations(BTreeMap<IpAddr, BTreeSet<IpAddr>>);

impl Translations {
    /// What the sets of VIPs say.
    pub(super) fn read(sets: &Sets) -> Translations {
        let mut translations = Translations::default();
        for (name, members) in sets {
            let Some(vip) = vip_of_set(name) else {
                continue;
            };
            for pod in members.iter().filter_map(|(pod, _)| pod.parse().ok()) {
                translations.0.entry(pod).or_default().insert(vip);
            }
        }
        translations
    }

    /// Each pod of a family with its VIPs, at least one.
    pub(super) fn of(&self, family: Family) -> impl Iterator<Item = (&IpAddr, &BTreeSet<IpAddr>)> {
        let of_family = move |(pod, _): &(&IpAddr, _)| Family::of(**pod) == family;
        self.0.iter().filter(of_family)
    }

    pub(super) fn translate(&mut self, pod: IpAddr, vip: IpAddr) -> String {
        self.0.entry(pod).or_default().insert(vip);
        format!("add {} {pod}\n{}", vip_set(vip), enter(pod))
    }

    pub(super) fn untranslate(&mut self, pod: IpAddr, vip: IpAddr) -> String {
        let vips = self.0.entry(pod).or_default();
        vips.remove(&vip);
        let leave = if vips.is_empty() {
            self.0.remove(&pod);
            leave(pod)
        } else {
            String::new()
        };
        format!("{leave}del {} {pod}\n", vip_set(vip))
    }

    /// Only these VIPs go on: the lines for pods that have none of them.
    pub(super) fn retain(&mut self, keep: impl Fn(&IpAddr) -> bool) -> String {
        let mut lines = String::new();
        self.0.retain(|pod, vips| {
            vips.retain(&keep);
            if vips.is_empty() {
                lines += &leave(*pod);
            }
            !vips.is_empty()
        });
        lines
    }

    /// The lines after which those pods of a family are let through that have a VIP, and nobody else.
    pub(super) fn align(&self, family: Family, sets: &Sets) -> String {
        let let_through = let_through(family, sets);
        let surplus = let_through.iter().filter(|pod| !self.0.contains_key(pod));
        let missing = self.of(family).map(|(pod, _)| *pod);
        let missing = missing.filter(|pod| !let_through.contains(pod));
        surplus
            .copied()
            .map(leave)
            .chain(missing.map(enter))
            .collect()
    }
}

fn let_through(family: Family, sets: &Sets) -> BTreeSet<IpAddr> {
    let members = sets.get(&StaticSet::Translated.name(family));
    let members = members.into_iter().flatten();
    members.filter_map(|(pod, _)| pod.parse().ok()).collect()
}

fn enter(pod: IpAddr) -> String {
    let set = StaticSet::Translated.name(Family::of(pod));
    format!("add {set} {pod}\n")
}

fn leave(pod: IpAddr) -> String {
    let set = StaticSet::Translated.name(Family::of(pod));
    format!("del {set} {pod}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_let_through_while_it_has_a_vip() {
        let pod: IpAddr = "10.244.1.11".parse().unwrap();
        let [first, second] = ["192.0.2.200", "192.0.2.201"].map(|vip| vip.parse().unwrap());
        let mut translations = Translations::default();
        let enter = "add METALEG-TRANSLATED-4 10.244.1.11\n";
        let leave = "del METALEG-TRANSLATED-4 10.244.1.11\n";
        for vip in [first, second] {
            let add = format!("add METALEG-VIP-{vip} 10.244.1.11\n");
            assert_eq!(translations.translate(pod, vip), add + enter);
        }
        let del = |vip: IpAddr| format!("del METALEG-VIP-{vip} 10.244.1.11\n");
        assert_eq!(translations.untranslate(pod, first), del(first));
        // Said again, too.
        assert_eq!(translations.untranslate(pod, first), del(first));
        let last = leave.to_owned() + &del(second);
        assert_eq!(translations.untranslate(pod, second), last);
        assert_eq!(translations.untranslate(pod, second), last);

        translations.translate(pod, first);
        assert_eq!(translations.retain(|vip| *vip != second), "");
        assert_eq!(translations.retain(|vip| *vip != first), leave);
    }
}
