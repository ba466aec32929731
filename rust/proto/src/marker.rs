//! The marker: whether an ivshmem server is there that marks leavers dead.
//!
//! An ivposition proves a death only while an ivshmem server watches the client it gave that id
//! to, and marks its slots before the id is given out again. Such a server stands in the region
//! with an *instance* word of its own, random and never zero, from its start to its end. A server
//! that was killed leaves the word behind; so while it lives it also holds an OFD lock on the
//! word's byte, through an open file that no client shares: who has the file (not a guest) looks
//! at the lock too. The lock keeps a second server off the same file, and the next one replaces
//! the word.
//!
//! **Ids are given once.** Such a server also keeps in the region below which number it and those
//! before it have given ids out. The clients of a server that was killed live on, with their ids and
//! their memory, and nobody will see their end; some may not even have claimed a slot yet. So the next
//! server gives only ids from there on. Whoever has an id below that number therefore knows that
//! nobody else who lives has it. QEMU's own server keeps no such number: then it is 0, and ids prove
//! nothing.

use core::num::NonZeroU64;
use core::sync::atomic::Ordering;

use crate::failpoint::reached;
use crate::layout::PAGE;
use crate::memory::Memory;
use crate::region::Region;
use crate::slot::{Prover, SlotRef};

/// Offset of the instance word in the superblock, on a cache line of its own.
const INSTANCE: u64 = 512;
/// Offset of the word with the number of ids given out.
const IDS: u64 = 520;
const _: () = assert!(IDS + 8 <= PAGE);

/// Ids there are: 0..=65535.
const IDS_THERE_ARE: u32 = 1 << 16;

/// Whether the region in `memory` says that an ivshmem server is there that marks leavers, as far as
/// can be told before anything in it has been looked at.
pub fn is_there(memory: &impl Memory) -> bool {
    memory.load(INSTANCE, Ordering::Acquire) != 0
}

impl<M: Memory> Region<M> {
    /// The ivshmem server that said it marks leavers and has not taken it back.
    pub fn marking_server(&self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.word(INSTANCE))
    }

    /// Says that from now on the ivshmem server `instance` marks the slots of a leaver dead before
    /// it gives the leaver's id out again. Its caller holds the lock on
    /// [`Region::marking_server_offset`].
    pub fn set_marking_server(&self, instance: NonZeroU64) {
        self.set_word(INSTANCE, instance.get());
        reached("marker.set");
    }

    /// Takes back what [`Region::set_marking_server`] said, unless another server is there by now.
    pub fn clear_marking_server(&self, instance: NonZeroU64) {
        self.step("marker.cleared", INSTANCE, instance.get(), 0);
    }

    /// Ids below this number were given out by ivshmem servers that mark leavers, each to nobody else
    /// while its holder may live; 0..=65536.
    pub fn ids_given(&self) -> u32 {
        // Of a word that is none, nothing is believed.
        u32::try_from(self.word(IDS)).ok().filter(|ids| *ids <= IDS_THERE_ARE).unwrap_or(0)
    }

    /// Says [`Region::ids_given`], before an id is given out. Its caller holds the lock on
    /// [`Region::marking_server_offset`].
    pub fn set_ids_given(&self, ids: u32) {
        self.set_word(IDS, u64::from(ids));
        reached("ids.set");
    }

    /// Through the connection of which client of the ivshmem server the owner of `at`, which has this
    /// prover, has the region, if it says so. Who saw the end of that knows that the owner is dead.
    pub fn ivposition_of(&self, at: SlotRef, prover: Prover) -> Option<u16> {
        match prover {
            Prover::IvPosition(id) => Some(id),
            Prover::Agent(id) | Prover::VfioExclusive(id) => u16::try_from(id).ok(),
            // Of a guest's process without VFIO its own kernel knows; but not when that is gone.
            Prover::Lock { .. } | Prover::None => self.slot_info(at)?.ivposition,
        }
    }

    /// Offset of the byte to lock.
    pub fn marking_server_offset(&self) -> u64 {
        INSTANCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heap::HeapMemory;
    use crate::layout::MIN_REGION;

    #[test]
    fn a_server_takes_back_only_its_own_word() {
        let region = Region::attach(HeapMemory::new(MIN_REGION), 1).unwrap();
        let [first, second] = [7, 8].map(|instance| NonZeroU64::new(instance).unwrap());
        assert_eq!(region.marking_server(), None);
        region.set_marking_server(first);
        region.set_marking_server(second);
        region.clear_marking_server(first);
        assert_eq!(region.marking_server(), Some(second));
        region.clear_marking_server(second);
        assert_eq!(region.marking_server(), None);
    }

    #[test]
    fn the_number_of_ids_is_kept_and_garbage_is_none() {
        let region = Region::attach(HeapMemory::new(MIN_REGION), 1).unwrap();
        assert_eq!(region.ids_given(), 0);
        for ids in [3, 65_536] {
            region.set_ids_given(ids);
            assert_eq!(region.ids_given(), ids);
        }
        for garbage in [65_537, u64::MAX] {
            region.set_word(IDS, garbage);
            assert_eq!(region.ids_given(), 0);
        }
    }
}
