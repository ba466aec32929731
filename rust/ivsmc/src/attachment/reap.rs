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
            SlotState::Live { at, prover } => {
                self.witness.proves(region, at, prover) && region.reclaim(at).slot
            }
        }
    }

    /// Whether the lock of `at` is on a file of this process's own kernel.
    fn sees_lock_of(&self, region: &Region<Arc<Mapping>>, at: SlotRef, prover: Prover) -> bool {
        // 32 bits of a boot id may be those of another one too.
        let is_ours = || region.boot_of(at).is_none_or(|boot| boot.id == self.witness.boot.id);
        matches!((prover, self.locks), (Prover::Lock { boot }, Some(ours)) if boot == ours)
            && is_ours()
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

/// A boot id in 32 bits: enough to tell two machines apart that share a region, as
/// an attacker who wants a slot declared dead can write to it anyway.
pub(super) fn fold(boot: u128) -> u32 {
    boot.to_le_bytes()
        .chunks_exact(4)
        .fold(0, |sum, part| sum ^ u32::from_le_bytes([part[0], part[1], part[2], part[3]]))
}
