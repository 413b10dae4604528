//! Which slot (mark and routing table) belongs to which gateway.
//!
//! A gateway keeps its slot for as long as pods use it, also over a restart of the agent: the routing tables
//! in the kernel say which slot is whose.
//!
//! The last value of the mask is the *overflow* mark: all gateways beyond the others share it, and a rule for each of
//! their pods chooses the table by the pod's address. So the number of gateways has no limit, and only those beyond cost
//! more.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::settings::{FwMask, Settings};
use crate::state::{Family, KernelState, Mark, TableId};

/// Number of a gateway's routing table above the offset, and of its mark while there are marks; from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(u32);

impl Slot {
    pub fn table(self, settings: &Settings) -> TableId {
        TableId(settings.table_offset.saturating_add(self.0))
    }

    pub fn mark(self, mask: FwMask) -> Mark {
        mask.mark(self.0)
    }

    /// Whether others share its mark.
    pub fn overflows(self, mask: FwMask) -> bool {
        self.0 >= mask.slots()
    }
}

/// `default`, `main` and `local`.
const KERNEL_TABLES: std::ops::RangeInclusive<u32> = 253..=255;

/// The table that rejects what has a mark of ours and found no gateway: the first of our range. None where that is one of
/// the kernel's.
pub(super) fn floor(settings: &Settings) -> Option<TableId> {
    let number = settings.table_offset;
    let is_ours = number > 0 && !KERNEL_TABLES.contains(&number);
    is_ours.then_some(TableId(number))
}

/// The slots in use, by gateway address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    gateways: BTreeMap<IpAddr, Slot>,
    /// Tables that others use.
    occupied: BTreeSet<(Family, TableId)>,
}

impl Slots {
    /// The slots that an earlier run of the agent left in the kernel.
    pub fn adopt(observed: &KernelState, settings: &Settings) -> Slots {
        let mut gateways = BTreeMap::new();
        for state in observed.families.values() {
            for (table, content) in &state.routes.tables {
                let number = table.0.checked_sub(settings.table_offset);
                let number = number.filter(|number| *number > 0);
                if let (Some(number), Some(gateway)) = (number, &content.gateway) {
                    gateways.entry(gateway.via).or_insert(Slot(number));
                }
            }
        }
        Slots {
            gateways,
            occupied: BTreeSet::new(),
        }
    }

    /// Notes which tables others use: none of them is given to a gateway.
    #[must_use]
    pub fn avoiding(mut self, occupied: BTreeSet<(Family, TableId)>) -> Slots {
        self.occupied = occupied;
        self
    }

    /// The slots for the gateways that are `needed` in one family: a gateway keeps the slot that it has, a new
    /// one gets the lowest that nobody has or had just now, so that no table changes hands while packets are
    /// still marked for its former gateway.
    pub fn assign(&self, family: Family, needed: &BTreeSet<IpAddr>, settings: &Settings) -> Slots {
        let is_free = |slot: &Slot| {
            let table = slot.table(settings);
            !KERNEL_TABLES.contains(&table.0) && !self.occupied.contains(&(family, table))
        };
        let slots = self.iter();
        let held: BTreeMap<IpAddr, Slot> = slots
            .filter(|(gateway, _)| Family::of(*gateway) == family)
            .collect();
        let mut gateways = held.clone();
        gateways.retain(|gateway, slot| needed.contains(gateway) && is_free(slot));
        let kept: BTreeSet<Slot> = gateways.values().copied().collect();
        let had: BTreeSet<Slot> = held.values().copied().collect();
        let own_marks = || (1..settings.mask.slots()).map(Slot);
        let overflow = || (settings.mask.slots()..=u32::MAX).map(Slot);
        let untouched = own_marks().filter(|slot| !had.contains(slot));
        let just_freed = own_marks().filter(|slot| had.contains(slot) && !kept.contains(slot));
        let beyond = overflow().filter(|slot| !had.contains(slot));
        let free = untouched.chain(just_freed).chain(beyond).filter(is_free);
        let new = needed
            .iter()
            .filter(|gateway| !gateways.contains_key(gateway));
        let new: Vec<IpAddr> = new.copied().collect();
        gateways.extend(new.into_iter().zip(free));
        Slots {
            gateways,
            occupied: BTreeSet::new(),
        }
    }

    pub fn get(&self, gateway: IpAddr) -> Option<Slot> {
        self.gateways.get(&gateway).copied()
    }

    pub fn iter(&self) -> impl Iterator<Item = (IpAddr, Slot)> {
        self.gateways.iter().map(|(via, slot)| (*via, *slot))
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

    fn settings(slots: u32) -> Settings {
        Settings {
            mask: FwMask::new(slots).unwrap(),
            ..Settings::default_on("node1")
        }
    }

    fn assign(slots: &Slots, needed: &[u8], settings: &Settings) -> Slots {
        let needed = needed.iter().map(|last| ip(*last)).collect();
        slots.assign(Family::V4, &needed, settings)
    }

    fn numbers(slots: &Slots) -> Vec<(IpAddr, u32)> {
        slots
            .iter()
            .map(|(gateway, slot)| (gateway, slot.0))
            .collect()
    }

    #[test]
    fn a_gateway_keeps_its_slot_while_others_come_and_go() {
        let first = assign(&Slots::default(), &[11, 12], &settings(15));
        assert_eq!(numbers(&first), [(ip(11), 1), (ip(12), 2)]);
        let second = assign(&first, &[12, 13], &settings(15));
        assert_eq!(numbers(&second), [(ip(12), 2), (ip(13), 3)]);
        let third = assign(&second, &[12, 13, 10], &settings(15));
        assert_eq!(numbers(&third), [(ip(10), 1), (ip(12), 2), (ip(13), 3)]);
    }

    #[test]
    fn a_slot_changes_hands_at_once_only_when_there_is_no_other() {
        let settings = settings(3);
        let full = assign(&Slots::default(), &[11, 12], &settings);
        assert_eq!(numbers(&full), [(ip(11), 1), (ip(12), 2)]);
        assert_eq!(
            numbers(&assign(&full, &[12, 13], &settings)),
            [(ip(12), 2), (ip(13), 1)]
        );
    }

    #[test]
    fn gateways_beyond_the_marks_share_the_last_one_and_keep_tables_of_their_own() {
        for bits in [1, 3, 15] {
            let settings = settings(bits);
            let needed: Vec<u8> = (1..=100).collect();
            let slots = assign(&Slots::default(), &needed, &settings);
            let tables: BTreeSet<TableId> = slots.iter().map(|(_, s)| s.table(&settings)).collect();
            assert_eq!(tables.len(), 100);
            let marks: BTreeMap<u32, usize> =
                slots.iter().fold(BTreeMap::new(), |mut marks, (_, slot)| {
                    *marks.entry(slot.mark(settings.mask).value).or_default() += 1;
                    marks
                });
            let expected = (1..=bits).map(|n| {
                let last = usize::try_from(101 - bits).unwrap();
                (n, if n == bits { last } else { 1 })
            });
            assert_eq!(marks, expected.collect());
            for (_, slot) in slots.iter() {
                let shared = slot.mark(settings.mask).value == bits;
                assert_eq!(slot.overflows(settings.mask), shared);
            }
        }
    }

    #[test]
    fn the_tables_of_the_kernel_are_given_to_nobody() {
        let settings = Settings {
            table_offset: 251,
            ..settings(15)
        };
        let slots = assign(&Slots::default(), &[11, 12, 13], &settings);
        assert_eq!(numbers(&slots), [(ip(11), 1), (ip(12), 5), (ip(13), 6)]);
    }

    #[test]
    fn a_table_that_others_use_is_given_to_nobody_and_taken_from_who_has_it() {
        let settings = settings(15);
        let table = |number: u32| TableId(settings.table_offset + number);
        let first = assign(&Slots::default(), &[11, 12], &settings);
        let avoiding = first.avoiding([(Family::V4, table(1)), (Family::V6, table(3))].into());
        assert_eq!(
            numbers(&assign(&avoiding, &[11, 12, 13], &settings)),
            [(ip(11), 3), (ip(12), 2), (ip(13), 4)]
        );
    }
}
