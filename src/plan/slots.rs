//! Which slot (mark and routing table) belongs to which gateway.
//!
//! A gateway keeps its slot for as long as pods use it, also over a restart of the agent: the routing tables
//! in the kernel say which slot is whose.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::settings::{FwMask, Settings};
use crate::state::{Family, KernelState, Mark, TableId};

/// Number of a gateway's mark value and of its routing table above the offset, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(u32);

impl Slot {
    /// The routing table of this slot.
    #[must_use]
    pub fn table(self, settings: &Settings) -> TableId {
        TableId(settings.table_offset.saturating_add(self.0))
    }

    /// The mark of this slot; `None` when the mask is too narrow for it.
    #[must_use]
    pub fn mark(self, mask: FwMask) -> Option<Mark> {
        mask.mark(self.0)
    }
}

/// The slots in use, by gateway address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    gateways: BTreeMap<IpAddr, Slot>,
}

impl Slots {
    /// The slots that an earlier run of the agent left in the kernel.
    #[must_use]
    pub fn adopt(observed: &KernelState, settings: &Settings) -> Slots {
        let mut gateways = BTreeMap::new();
        for state in observed.families.values() {
            for (table, content) in &state.routes.tables {
                let Some(gateway) = &content.gateway else {
                    continue;
                };
                let number = table.0.checked_sub(settings.table_offset);
                let slot = number.filter(|n| (1..=settings.mask.slots()).contains(n));
                if let Some(slot) = slot {
                    gateways.entry(gateway.via).or_insert(Slot(slot));
                }
            }
        }
        Slots { gateways }
    }

    /// The slots for the gateways that are `needed` in one family: a gateway keeps the slot that it has, a new
    /// one gets the lowest that nobody has or had just now, so that no table changes hands while packets are
    /// still marked for its former gateway. Gateways beyond the last slot get none.
    #[must_use]
    pub fn assign(&self, family: Family, needed: &BTreeSet<IpAddr>, mask: FwMask) -> Slots {
        let held: BTreeMap<IpAddr, Slot> = self
            .gateways
            .iter()
            .filter(|(gateway, _)| Family::of(**gateway) == family)
            .map(|(gateway, slot)| (*gateway, *slot))
            .collect();
        let mut gateways: BTreeMap<IpAddr, Slot> = held
            .iter()
            .filter(|(gateway, _)| needed.contains(gateway))
            .map(|(gateway, slot)| (*gateway, *slot))
            .collect();
        let kept: BTreeSet<Slot> = gateways.values().copied().collect();
        let just_freed: BTreeSet<Slot> = held.values().copied().collect();
        let never_held = (1..=mask.slots())
            .map(Slot)
            .filter(|slot| !just_freed.contains(slot));
        let reused = just_freed
            .iter()
            .copied()
            .filter(|slot| !kept.contains(slot));
        let new = needed.iter().filter(|gateway| !held.contains_key(gateway));
        gateways.extend(new.copied().zip(never_held.chain(reused)));
        Slots { gateways }
    }

    /// The slot of a gateway.
    #[must_use]
    pub fn get(&self, gateway: IpAddr) -> Option<Slot> {
        self.gateways.get(&gateway).copied()
    }

    /// Gateways and their slots.
    pub fn iter(&self) -> impl Iterator<Item = (IpAddr, Slot)> {
        self.gateways
            .iter()
            .map(|(gateway, slot)| (*gateway, *slot))
    }

    /// Adds the slots of another family.
    pub fn extend(&mut self, other: Slots) {
        self.gateways.extend(other.gateways);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn mask(slots: u32) -> FwMask {
        FwMask::new(slots).unwrap()
    }

    fn assign(slots: &Slots, needed: &[u8], mask: FwMask) -> Slots {
        let needed = needed.iter().map(|last| ip(*last)).collect();
        slots.assign(Family::V4, &needed, mask)
    }

    fn numbers(slots: &Slots) -> Vec<(IpAddr, u32)> {
        slots
            .iter()
            .map(|(gateway, slot)| (gateway, slot.0))
            .collect()
    }

    #[test]
    fn a_gateway_keeps_its_slot_while_others_come_and_go() {
        let first = assign(&Slots::default(), &[11, 12], mask(15));
        assert_eq!(numbers(&first), [(ip(11), 1), (ip(12), 2)]);
        let second = assign(&first, &[12, 13], mask(15));
        assert_eq!(numbers(&second), [(ip(12), 2), (ip(13), 3)]);
        let third = assign(&second, &[12, 13, 10], mask(15));
        assert_eq!(numbers(&third), [(ip(10), 1), (ip(12), 2), (ip(13), 3)]);
    }

    #[test]
    fn a_slot_changes_hands_at_once_only_when_there_is_no_other() {
        let full = assign(&Slots::default(), &[11, 12, 13], mask(3));
        assert_eq!(
            numbers(&assign(&full, &[12, 13, 14], mask(3))),
            [(ip(12), 2), (ip(13), 3), (ip(14), 1)]
        );
    }

    #[test]
    fn gateways_beyond_the_last_slot_get_none() {
        let slots = assign(&Slots::default(), &[11, 12], mask(1));
        assert_eq!(numbers(&slots), [(ip(11), 1)]);
        assert_eq!(slots.get(ip(12)), None);
    }
}
