//! Looking at slots: which of them are dead, by all that one process can know.
//!
//! What proves a death without asking anybody is in [`crate::proof`]; here locks come in, which are
//! the runtime's to take ([`Locks`]). A process holds the lock on the byte of its slot's claim word
//! from before it claims the slot until its mapping is gone. Whoever obtains the lock of another's slot
//! holds it while it takes back what the dead one had: meanwhile nobody else takes the slot.

use crate::failpoint::reached;
use crate::memory::Memory;
use crate::proof::Witness;
use crate::region::Region;
use crate::slot::{Prover, SlotRef, SlotState};

/// The locks on bytes of the file through which a process has the region. Those of one process do
/// not conflict with each other, and end with its mapping.
pub trait Locks {
    /// Why a lock could not be asked for.
    type Error;
    /// Takes the lock on the byte at `at`; false if another process has it.
    ///
    /// # Errors
    /// That it could not be asked for: proves nothing about others.
    fn try_lock(&self, at: u64) -> Result<bool, Self::Error>;
    /// Gives the lock on the byte at `at` back.
    ///
    /// # Errors
    /// As [`Locks::try_lock`]; not for a lock that is held.
    fn unlock(&self, at: u64) -> Result<(), Self::Error>;
}

/// What a process may judge others by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Judge {
    /// Itself.
    pub witness: Witness,
    /// What stands in the claim words of those whose locks it can see; `None` if the mapping has
    /// no open file description of its own, so that no lock on it proves anything.
    pub locks: Option<u32>,
    /// It locks the region's own file: there it sees those who do not know their boot too.
    pub is_on_own_file: bool,
}

impl Judge {
    /// Looks at every slot but `me`; returns how many dead ones were reclaimed. One thread of a
    /// process at a time, as its locks do not keep its threads apart.
    pub fn look_at_all<M: Memory>(
        &self,
        region: &Region<M>,
        locks: &impl Locks,
        me: Option<SlotRef>,
    ) -> usize {
        (0..region.geometry().slots())
            .filter(|&index| {
                me.map(|me| me.index) != Some(index) && self.look(region, locks, index)
            })
            .count()
    }

    /// Looks at one slot, not this process's own; whether a dead one was reclaimed.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn look<M: Memory>(&self, region: &Region<M>, locks: &impl Locks, index: u16) -> bool {
        match region.slot_state(index) {
            SlotState::Free { .. } => false,
            // Its prover has said so already; several may reclaim it at once.
            SlotState::Dead { at, .. } => region.reclaim(at).slot,
            SlotState::Live { at, prover } if self.sees_lock_of(region, at, prover) => {
                try_lock(region, locks, at, prover)
            }
            // Of a boot that is over, if what is shown as ids can be believed; an owner that lives has
            // the lock.
            SlotState::Live { at, prover: prover @ Prover::Lock { .. } } => {
                self.locks.is_some()
                    && self.witness.proves_with_lock(region, at)
                    && try_lock(region, locks, at, prover)
            }
            SlotState::Live { at, prover } => {
                self.witness.proves(region, at, prover) && region.reclaim(at).slot
            }
        }
    }

    /// Whether the lock of `at` is on a file of this process's own kernel.
    fn sees_lock_of<M: Memory>(&self, region: &Region<M>, at: SlotRef, prover: Prover) -> bool {
        let Prover::Lock { boot } = prover else { return false };
        let theirs = region.boot_of(at);
        if boot == UNKNOWN_BOOT {
            return self.is_on_own_file && theirs.is_none_or(|theirs| theirs.id == 0);
        }
        // 32 bits of a boot id may be those of another one too, and machines that began as copies of
        // one have the same.
        self.locks == Some(boot)
            && theirs.is_none_or(|theirs| {
                theirs.is_same(self.witness.boot) == Some(true)
                    && theirs.is_of_same_machine(self.witness.boot) != Some(false)
            })
    }
}

/// Claims the first free slot whose lock can be had, and keeps that lock; `None` if there is none.
///
/// # Errors
/// That locks cannot be asked for.
pub fn claim_with_lock<M: Memory, L: Locks>(
    region: &Region<M>,
    locks: &L,
    prover: Prover,
) -> Result<Option<SlotRef>, L::Error> {
    for index in region.unclaimed() {
        let byte = region.slot_claim_offset(index);
        // Somebody else's: a newcomer about to claim, or one who is about to be gone.
        if !locks.try_lock(byte)? {
            continue;
        }
        reached("slot.locked");
        if let Some(me) = region.claim_slot(index, prover) {
            return Ok(Some(me));
        }
        locks.unlock(byte)?;
    }
    Ok(None)
}

/// Reclaims `at` if its lock can be had; whether it was.
fn try_lock<M: Memory>(
    region: &Region<M>,
    locks: &impl Locks,
    at: SlotRef,
    prover: Prover,
) -> bool {
    let byte = region.slot_claim_offset(at.index);
    // An error proves nothing about the other.
    if !locks.try_lock(byte).unwrap_or(false) {
        return false;
    }
    reached("reap.locked");
    // With the lock held nobody else takes this slot. It may have been taken, by a process
    // that died since, or given back, between the look and the lock: look again.
    let dead = matches!(
        region.slot_state(at.index),
        SlotState::Live { at: now, prover: found } if now == at && found == prover
    );
    let reclaimed = dead && region.reclaim(at).slot;
    // It cannot fail for a lock that is held.
    let _ = locks.unlock(byte);
    reclaimed
}

/// In the claim words of those who do not know their boot: their locks are on the region's own file.
pub const UNKNOWN_BOOT: u32 = 0;

/// A boot, with what else tells apart those who see other locks, in 32 bits that are not
/// [`UNKNOWN_BOOT`]: enough to tell two machines apart that share a region, as an attacker who wants
/// a slot declared dead can write to it anyway.
///
/// Of who locks the file of a guest's device: the number of the file system that this is on, and
/// `ivposition`, the device's id. Kernels restored from one snapshot have one boot id, but not that.
#[must_use]
pub fn lock_name(boot: u128, file_system: u64, ivposition: Option<u16>) -> u32 {
    // Spread over all bits, as numbers of file systems are small, too.
    let id = ivposition.map_or(0, |id| (u32::from(id) + 1).wrapping_mul(0x9e37_79b9));
    let name = fold(boot) ^ fold(file_system.into()) ^ id;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heap::HeapMemory;
    use crate::host::{Boot, HostIdentity, HostRecord};
    use crate::layout::MIN_REGION;
    use core::convert::Infallible;

    #[test]
    fn the_name_of_a_lock_is_not_that_of_an_unknown_boot() {
        for (boot, file_system) in [(1 << 32 | 1, 0), (5, 5)] {
            assert_eq!(lock_name(boot, file_system, None), u32::MAX);
        }
        assert_eq!(lock_name(5, 0, None), 5);
    }

    #[test]
    fn copies_of_one_machine_have_locks_of_other_names() {
        let mut names: alloc::vec::Vec<u32> = (0..1000)
            .flat_map(|id| (20..24).map(move |file_system| (file_system, id)))
            .map(|(file_system, id)| lock_name(77, file_system, Some(id)))
            .collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 4000);
        assert!(!names.contains(&lock_name(77, 20, None)));
    }

    /// A file on which nobody holds a lock.
    struct Unlocked;

    impl Locks for Unlocked {
        type Error = Infallible;
        fn try_lock(&self, _: u64) -> Result<bool, Infallible> {
            Ok(true)
        }
        fn unlock(&self, _: u64) -> Result<(), Infallible> {
            Ok(())
        }
    }

    #[test]
    fn a_lock_says_nothing_of_an_owner_on_another_machine() {
        let region = Region::attach(HeapMemory::new(MIN_REGION), 1).unwrap();
        let boot = Boot { id: 100, machine: 5 };
        let witness = Witness { boot, ivposition: None, is_exclusive: false };
        let name = lock_name(boot.id, 0, None);
        let judge = Judge { witness, locks: Some(name), is_on_own_file: false };
        for (machine, is_dead) in [(6, false), (5, true), (0, true)] {
            let at = region.claim_slot(3, Prover::Lock { boot: name }).unwrap();
            let identity = HostIdentity { boot: boot.id, netns: 1, ivposition: 0 };
            region.write_host_record(at, &HostRecord::new(identity, &[]).on_machine(machine));
            assert_eq!(judge.look(&region, &Unlocked, at.index), is_dead, "machine {machine}");
            region.reclaim(at);
        }
    }
}
