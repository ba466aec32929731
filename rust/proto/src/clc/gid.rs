//! GID and CHID: how CLC names a peer and the region it can be reached through.
//!
//! SMC-D finds a common device in two steps: the CHID, 16 bits, says which fabric a device is on
//! (different: impossible; same: perhaps), and the GID, 128 bits for an emulated ISM device, says
//! who on that fabric the peer is; the receiver asks its own device whether that GID is reachable.
//! Here the fabric is the region and the peer is its slot:
//!
//! ```text
//!   GID   gid     64   0 (16) | slot generation (32) | slot index (16)
//!         gid_ext 64   high half of the region's uuid
//!   CHID          16   0xFF00 + (uuid folded to 32 bits) mod 0xFF
//! ```
//!
//! The region is in both because a CHID alone has 255 values: two regions may share one, and then
//! the uuid in `gid_ext` tells them apart. The generation is in the GID so that a Proposal or
//! Accept of a peer that has died since does not name the slot's next owner. 0xFF00..=0xFFFE is
//! what `smc_ism.h` sets aside for virtio-ism; 0xFFFF is the kernel's loopback device, never ours.

use core::fmt;

/// The 128-bit id of an emulated ISM device: `gid` in the high half, `gid_ext` in the low half.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gid(pub u128);

impl Gid {
    /// The GID of the attachment in slot `index` of the region `uuid`, in its `generation`.
    #[must_use]
    pub const fn of_slot(uuid: u128, index: u16, generation: u32) -> Gid {
        let slot = (generation as u64) << 16 | index as u64;
        Gid((slot as u128) << 64 | uuid >> 64)
    }

    /// The GID from the two numbers it travels as.
    #[must_use]
    pub const fn from_halves(gid: u64, gid_ext: u64) -> Gid {
        Gid((gid as u128) << 64 | gid_ext as u128)
    }

    /// The two numbers it travels as: `gid`, `gid_ext`.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // splits the number, loses nothing
    pub const fn halves(self) -> (u64, u64) {
        ((self.0 >> 64) as u64, self.0 as u64)
    }

    /// Slot index and generation; `None` if no slot has this GID.
    ///
    /// The index may be beyond the region's slots and the generation one that never was: this
    /// is a peer's word, to be looked up.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // the bits above are zero or belong to the other part
    pub const fn slot(self) -> Option<(u16, u32)> {
        let (slot, _) = self.halves();
        if slot >> 48 != 0 {
            return None;
        }
        Some((slot as u16, (slot >> 16) as u32))
    }

    /// Whether this names a slot of the region `uuid`.
    #[must_use]
    pub const fn is_in_region(self, uuid: u128) -> bool {
        let (_, gid_ext) = self.halves();
        gid_ext as u128 == uuid >> 64 && self.slot().is_some()
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (gid, gid_ext) = self.halves();
        write!(f, "{gid:016x}:{gid_ext:016x}")
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gid({self})")
    }
}

/// The fabric a device is on.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Chid(pub u16);

impl Chid {
    /// The CHID of the region `uuid`, 0xFF00..=0xFFFE.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // folds on purpose; a value below 0xFF fits
    pub const fn of_region(uuid: u128) -> Chid {
        let half = (uuid >> 64) as u64 ^ uuid as u64;
        let fold = (half >> 32) as u32 ^ half as u32;
        Chid(0xFF00 + (fold % 0xFF) as u16)
    }

    /// Whether devices with this CHID are emulated ISM devices, with GIDs of 128 bits.
    #[must_use]
    pub const fn is_emulated(self) -> bool {
        self.0 >= 0xFF00
    }
}

impl fmt::Display for Chid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: u128 = 0x0123_4567_89AB_4DEF_8123_4567_89AB_CDEF;

    #[test]
    fn names_slot_and_region() {
        let gid = Gid::of_slot(UUID, 5, 3);
        assert_eq!(gid.halves(), (0x3_0005, 0x0123_4567_89AB_4DEF));
        assert_eq!(Gid::from_halves(0x3_0005, 0x0123_4567_89AB_4DEF), gid);
        assert_eq!(gid.slot(), Some((5, 3)));
        assert!(gid.is_in_region(UUID));
        assert!(!gid.is_in_region(!UUID));
    }

    #[test]
    fn keeps_the_extremes_apart() {
        let gid = Gid::of_slot(u128::MAX, u16::MAX, u32::MAX);
        assert_eq!(gid.slot(), Some((u16::MAX, u32::MAX)));
        assert!(gid.is_in_region(u128::MAX));
        let foreign = Gid(u128::MAX);
        assert_eq!(foreign.slot(), None);
        assert!(!foreign.is_in_region(u128::MAX));
    }

    #[test]
    fn chid_is_emulated_and_never_loopback() {
        // (0x01234567 ^ 0x81234567) ^ (0x89AB4DEF ^ 0x89ABCDEF) = 0x80008000, mod 0xFF = 1
        assert_eq!(Chid::of_region(UUID), Chid(0xFF01));
        for number in 0..100_000_u128 {
            let uuid = number.wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835);
            let chid = Chid::of_region(uuid);
            assert!((0xFF00..=0xFFFE).contains(&chid.0) && chid.is_emulated());
        }
        assert!(!Chid(0xFEFF).is_emulated());
    }
}
