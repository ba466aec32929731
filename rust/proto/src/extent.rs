//! Extents: what a process claims to carve DMBs from.
//!
//! One word per extent: zero while nobody's, else its owner.
//!
//! ```text
//!   0 --claim_extent--> claimed --open_extent--> open --free_extent--> 0
//!                          |                       |
//!                          +-- free_extent         +-- the last to let go, owner dead --> 0
//!                          +-- reclaim
//! ```
//!
//! Each step is one compare-exchange by the owner, which then divides the extent privately
//! ([`crate::allocator`]); only an extent whose owner is no longer live is freed by others, once
//! every DMB in it is idle. A dead owner never comes back, so a word that was read stands for the
//! same claim as long as it is there.
//!
//! Between claimed and open the owner has the memory backed. Others look at the control blocks of
//! open extents only: on a full file system a look at one that is not backed would be a SIGBUS.

use crate::failpoint::reached;
use crate::memory::Memory;
use crate::region::Region;
use crate::slot::{SlotRef, GENERATION_BITS};

/// Bit of a claimed extent, lowest in the word.
const CLAIMED: u64 = 1;
/// Shift of the slot.
const SLOT_SHIFT: u32 = 1;
/// Shift of the generation.
const GENERATION_SHIFT: u32 = 13;
/// Bit of an open extent.
const OPEN: u64 = 1 << (GENERATION_SHIFT + GENERATION_BITS);

/// The word of an extent that `owner` has claimed and not opened.
fn claimed_by(owner: SlotRef) -> u64 {
    u64::from(owner.generation) << GENERATION_SHIFT | u64::from(owner.index) << SLOT_SHIFT | CLAIMED
}

/// The owner that an extent word names.
#[allow(clippy::cast_possible_truncation)] // Masked to fewer bits than the types have.
fn owner_in(word: u64) -> Option<SlotRef> {
    (word & CLAIMED != 0).then_some(SlotRef {
        index: (word >> SLOT_SHIFT & 0xfff) as u16,
        generation: (word >> GENERATION_SHIFT & ((1 << GENERATION_BITS) - 1)) as u32,
    })
}

impl<M: Memory> Region<M> {
    /// Claims an extent for `owner`, the caller. `None` if all are claimed, or the owner is dead.
    ///
    /// The caller then has [`crate::layout::Geometry::extent_ranges`] backed by memory and opens
    /// the extent, or frees it.
    pub fn claim_extent(&self, owner: SlotRef) -> Option<u32> {
        let index = (0..self.geometry().extents()).find(|index| {
            let at = self.geometry().extent_word(*index);
            self.word(at) == 0 && self.replace(at, 0, claimed_by(owner))
        })?;
        reached("extent.claimed");
        // Pairs with the fence in `reclaim`: either it finds the extent, or we find us dead.
        self.memory().fence();
        if self.is_live(owner) {
            return Some(index);
        }
        self.free_extent(index, owner);
        None
    }

    /// Opens extent `index`, which `owner`, the caller, has claimed and which is backed by memory:
    /// DMBs may be made in it. Whether it is open.
    ///
    /// # Panics
    /// If there is no such extent.
    pub fn open_extent(&self, index: u32, owner: SlotRef) -> bool {
        let word = claimed_by(owner);
        self.step("extent.opened", self.extent_word_offset(index), word, word | OPEN)
    }

    /// Frees extent `index` of `owner`, the caller. Whether it did: not if the extent is another's
    /// or a DMB in it is not idle.
    ///
    /// # Panics
    /// If there is no such extent.
    pub fn free_extent(&self, index: u32, owner: SlotRef) -> bool {
        let at = self.extent_word_offset(index);
        let word = self.word(at);
        owner_in(word) == Some(owner)
            && self.is_idle(index, word)
            && self.step("extent.freed", at, word, 0)
    }

    /// The owner of extent `index`; it may be dead, when a writer has not let go.
    ///
    /// # Panics
    /// If there is no such extent.
    pub fn extent_owner(&self, index: u32) -> Option<SlotRef> {
        owner_in(self.word(self.extent_word_offset(index)))
    }

    /// Claimed extents, open or not, with their owners.
    pub fn claimed_extents(&self) -> impl Iterator<Item = (u32, SlotRef)> + '_ {
        (0..self.geometry().extents())
            .filter_map(|index| self.extent_owner(index).map(|owner| (index, owner)))
    }

    /// Open extents with their owners.
    pub(crate) fn open_extents(&self) -> impl Iterator<Item = (u32, SlotRef)> + '_ {
        (0..self.geometry().extents())
            .filter_map(|index| self.open_extent_owner(index).map(|owner| (index, owner)))
    }

    /// The owner of extent `index`, which exists, if it is open.
    pub(crate) fn open_extent_owner(&self, index: u32) -> Option<SlotRef> {
        let word = self.word(self.geometry().extent_word(index));
        owner_in(word).filter(|_| word & OPEN != 0)
    }

    /// Frees extent `index` if its owner is no longer live and every DMB in it is idle. Whether
    /// this call did. After a fence that follows the caller's own letting go: of two who let go
    /// last, at least one sees both.
    pub(crate) fn free_orphan(&self, index: u32) -> bool {
        let at = self.geometry().extent_word(index);
        // Twice: an owner that does not know that it is dead may open it meanwhile.
        (0..2).any(|_| {
            let word = self.word(at);
            // If somebody else frees it and it is claimed again, the word is another one.
            owner_in(word).is_some_and(|owner| !self.is_live(owner))
                && self.is_idle(index, word)
                && self.step("reclaim.extent", at, word, 0)
        })
    }

    /// Whether every DMB of extent `index`, whose word is `word`, is idle.
    fn is_idle(&self, index: u32, word: u64) -> bool {
        word & OPEN == 0
            || self.geometry().granules_of(index).all(|granule| self.dmb_is_idle(granule))
    }

    /// Offset of the word of extent `index`.
    fn extent_word_offset(&self, index: u32) -> u64 {
        let extents = self.geometry().extents();
        assert!(index < extents, "extent {index} of {extents}");
        self.geometry().extent_word(index)
    }
}
