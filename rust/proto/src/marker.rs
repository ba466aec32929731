//! The marker: whether an ivshmem server is there that marks leavers dead.
//!
//! An ivposition proves a death only while an ivshmem server watches the client it gave that id
//! to, and marks its slots before the id is given out again. Such a server stands in the region
//! with an *instance* word of its own, random and never zero, from its start to its end. A server
//! that was killed leaves the word behind; so while it lives it also holds an OFD lock on the
//! word's byte, through an open file that no client shares: who has the file (not a guest) looks
//! at the lock too. The lock keeps a second server off the same file, and the next one replaces
//! the word.

use core::num::NonZeroU64;

use crate::layout::PAGE;
use crate::memory::Memory;
use crate::region::Region;

/// Offset of the instance word in the superblock, on a cache line of its own.
const INSTANCE: u64 = 512;
const _: () = assert!(INSTANCE + 8 <= PAGE);

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
    }

    /// Takes back what [`Region::set_marking_server`] said, unless another server is there by now.
    pub fn clear_marking_server(&self, instance: NonZeroU64) {
        self.replace(INSTANCE, instance.get(), 0);
    }

    /// Offset of the byte to lock.
    pub fn marking_server_offset(&self) -> u64 {
        INSTANCE
    }
}

#[cfg(all(test, feature = "heap"))]
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
}
