use crate::state::Mark;

/// More slots gain nothing, and each costs a chain: a node's pods hardly use as many gateways.
const MOST_SLOTS: u32 = 255;

/// The bits of the packet mark that are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FwMask(u32);

impl FwMask {
    /// A mask of contiguous bits.
    ///
    /// # Errors
    /// When it has no bit or bits with gaps.
    pub fn new(bits: u32) -> Result<FwMask, &'static str> {
        if bits == 0 {
            return Err("has no bit");
        }
        let low = bits >> bits.trailing_zeros();
        if low & low.wrapping_add(1) != 0 {
            return Err("is not contiguous");
        }
        Ok(FwMask(bits))
    }

    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }

    /// How many slots there are: all values but 0, which means unmarked, and at most `MOST_SLOTS`.
    #[must_use]
    pub fn slots(self) -> u32 {
        MOST_SLOTS.min(self.0 >> self.0.trailing_zeros())
    }

    /// The mark of a slot, from 1: those from [`FwMask::slots`] on share the last one.
    #[must_use]
    pub fn mark(self, slot: u32) -> Mark {
        Mark {
            value: slot.clamp(1, self.slots()) << self.0.trailing_zeros(),
            mask: self.0,
        }
    }

    /// The mark that no marked packet has.
    #[must_use]
    pub fn unmarked(self) -> Mark {
        Mark {
            value: 0,
            mask: self.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_slots_stay_within_the_mask() {
        let mask = FwMask::new(0x00f0_0000).unwrap();
        for (slot, value) in [(1, 0x0010_0000), (15, 0x00f0_0000), (16, 0x00f0_0000)] {
            assert_eq!(mask.mark(slot).value, value);
        }
        assert_eq!(FwMask::new(0x8000_0000).unwrap().slots(), 1);
        assert_eq!(FwMask::new(u32::MAX).unwrap().slots(), MOST_SLOTS);
    }
}
