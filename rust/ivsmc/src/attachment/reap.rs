//! Who is dead, and giving back what they had.

use std::sync::Arc;

use ivsmc_proto::proof::Witness;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotRef, SlotState};
use ivsmc_shm::lock as locks;
use ivsmc_shm::mapping::Mapping;

/// What this process may judge others by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Judge {
    /// Itself.
    pub(super) witness: Witness,
    /// What stands in the claim words of those whose locks it can see; `None` if the mapping has
    /// no open file description of its own, so that no lock on it proves anything.
    pub(super) locks: Option<u32>,
    /// It locks the region's own file: there it sees those who do not know their boot too.
    pub(super) is_on_own_file: bool,
}

impl Judge {
    /// Looks at every slot but `me`; returns how many dead ones were reclaimed.
    pub(super) fn look_at_all(&self, region: &Region<Arc<Mapping>>, me: Option<SlotRef>) -> usize {
        (0..region.geometry().slots())
            .filter(|&index| me.map(|me| me.index) != Some(index) && self.look(region, index))
            .count()
    }

    /// Looks at one slot, not this process's own; whether a dead one was reclaimed.
    pub(super) fn look(&self, region: &Region<Arc<Mapping>>, index: u16) -> bool {
        match region.slot_state(index) {
            SlotState::Free { .. } => false,
            // Its prover has said so already; several may reclaim it at once.
            SlotState::Dead { at, .. } => region.reclaim(at).slot,
            SlotState::Live { at, prover } if self.sees_lock_of(region, at, prover) => {
                self.try_lock(region, at, prover)
            }
            // Of a boot that is over, if what is shown as ids can be believed; an owner that lives has
            // the lock.
            SlotState::Live { at, prover: prover @ Prover::Lock { .. } } => {
                self.locks.is_some()
                    && self.witness.proves_with_lock(region, at)
                    && self.try_lock(region, at, prover)
            }
            SlotState::Live { at, prover } => {
                self.witness.proves(region, at, prover) && region.reclaim(at).slot
            }
        }
    }

    /// Whether the lock of `at` is on a file of this process's own kernel.
    fn sees_lock_of(&self, region: &Region<Arc<Mapping>>, at: SlotRef, prover: Prover) -> bool {
        let Prover::Lock { boot } = prover else { return false };
        let theirs = region.boot_of(at);
        if boot == UNKNOWN_BOOT {
            return self.is_on_own_file && theirs.is_none_or(|theirs| theirs.id == 0);
        }
        // 32 bits of a boot id may be those of another one too.
        self.locks == Some(boot)
            && theirs.is_none_or(|theirs| theirs.is_same(self.witness.boot) == Some(true))
    }

    fn try_lock(&self, region: &Region<Arc<Mapping>>, at: SlotRef, prover: Prover) -> bool {
        let fd = region.memory().fd();
        let byte = region.slot_claim_offset(at.index);
        // An error proves nothing about the other.
        if !locks::try_lock_byte(fd, byte).unwrap_or(false) {
            return false;
        }
        // With the lock held nobody else takes this slot. It may have been taken, by a process
        // that died since, or given back, between the look and the lock: look again.
        let dead = matches!(
            region.slot_state(at.index),
            SlotState::Live { at: now, prover: found } if now == at && found == prover
        );
        let reclaimed = dead && region.reclaim(at).slot;
        // It cannot fail for a lock that is held.
        let _ = locks::unlock_byte(fd, byte);
        reclaimed
    }
}

/// In the claim words of those who do not know their boot: their locks are on the region's own file.
pub(super) const UNKNOWN_BOOT: u32 = 0;

/// A boot, with what else tells apart those who see other locks, in 32 bits that are not
/// [`UNKNOWN_BOOT`]: enough to tell two machines apart that share a region, as an attacker who wants
/// a slot declared dead can write to it anyway.
pub(super) fn lock_name(boot: u128, file_system: u64) -> u32 {
    let name = fold(boot) ^ fold(file_system.into());
    if name == UNKNOWN_BOOT {
        u32::MAX
    } else {
        name
    }
}

fn fold(number: u128) -> u32 {
    number
        .to_le_bytes()
        .chunks_exact(4)
        .fold(0, |sum, part| sum ^ u32::from_le_bytes([part[0], part[1], part[2], part[3]]))
}
