//! Proofs that the owner of a slot is dead: what one process may know of another's end.
//!
//! Memory is reused on such a proof alone, so each rests on something that cannot be while the owner
//! could still write: not on silence, and not on an id that somebody else may have by now. A machine
//! that is paused, stopped in a debugger, or swapped out for a week gives none of them.
//!
//! | proof | by whom | why its owner cannot write any more |
//! | --- | --- | --- |
//! | lock | who obtains the lock on the slot's byte, same boot | the lock lives as long as the mapping |
//! | left | the ivshmem server that saw the connection of an id end | QEMU, or the process, has ended: its memory ends before its sockets |
//! | exclusive | who opened the VFIO group anew, same boot, same id | the group is busy while a descriptor of its device, or a mapping of one, is anywhere: with an agent's clients, with forked children, in a message under way |
//! | reset | who has the same id and another boot, where ids are given once | one machine, and it runs this boot |
//! | machine | who has the same machine uuid and another boot; if the prover is a lock, who holds that too | the same |
//! | word | an operator | they say so |
//!
//! *Left* and *lock* are not here: the first is the ivshmem server's doing, the second is in
//! [`crate::judge`]. [`Witness::proves`] is the rest.
//!
//! **Boots.** Another boot proves a death only if both ids are the kernel's own. A container manager
//! may show an id of its own making to each container (LXC and systemd-nspawn do) while the machine's
//! uuid is the real one: the same machine and seemingly another boot, and both run. A process that
//! finds such an id says that it does not know its boot, nor its machine: it proves
//! nothing by either, and nothing is proved of it by either. *Left*, *lock*, and *exclusive* where
//! ids are given once remain. A lock whose owner does not know its boot is always on the region's own
//! file, never on a device's in a guest: all who can lock that file see it.
//!
//! **Ids.** An id alone says little. An ivshmem server that is restarted may give an id to a second
//! machine while the first, with the same one, lives on. Ours does not (`marker` says how), and
//! the region says so for each id; where it does not, an owner's record has to agree: with the
//! same boot for *exclusive*, with the same machine for *reset*.
//!
//! **Claimed, then killed.** Between a claim and the first record nobody knows the owner's boot. Such
//! an owner has claimed nothing but its slot. It is proved dead all the same by *left*, by *lock*, and by
//! *exclusive* where ids are given once; otherwise the slot, without any memory, stays until an operator
//! declares it dead.
//!
//! **What breaks these proofs**, and must not be done: two machines with one uuid at the same time (as
//! a snapshot started twice: libvirt refuses it); serving one file by an ivshmem server of ours and
//! by one of another make, both with machines that still run; going back to a snapshot of a machine
//! whose region others have used since (QEMU refuses to take one unless the device has `master=on`);
//! where ids are not given once, two devices of one machine with the same id on the same region (two
//! ivshmem servers of another make on one file): who opens the group of one has not the other's; an
//! emulated kernel that makes up a boot id, and says that it is in its own `/proc`, on the real uuid.

use crate::host::Boot;
use crate::memory::Memory;
use crate::region::Region;
use crate::slot::{Prover, SlotRef};

/// What a process knows of itself, by which it may say that others are dead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Witness {
    /// Where it runs.
    pub boot: Boot,
    /// The id of its device at the ivshmem server, if it is a guest's.
    pub ivposition: Option<u16>,
    /// It has opened the VFIO group of that device, and has given nobody a descriptor of it.
    pub is_exclusive: bool,
}

impl Witness {
    /// Whether the owner of `at`, another than this process's own slot, with this prover, is dead.
    ///
    /// True stays true: `at` never lives again. Never of a slot whose prover is a lock: see
    /// [`Witness::proves_with_lock`].
    pub fn proves<M: Memory>(&self, region: &Region<M>, at: SlotRef, prover: Prover) -> bool {
        if matches!(prover, Prover::Lock { .. }) {
            return false;
        }
        let theirs = region.boot_of(at);
        let is_same_boot = theirs.and_then(|theirs| theirs.is_same(self.boot));
        match theirs.and_then(|theirs| theirs.is_of_same_machine(self.boot)) {
            Some(true) if is_same_boot == Some(false) => return true,
            Some(false) => return false,
            _ => {}
        }
        let (Prover::VfioExclusive(id) | Prover::Agent(id)) = prover else { return false };
        let Some(ours) = self.ivposition.map(u32::from).filter(|ours| *ours == id) else {
            return false;
        };
        let is_given_once = ours < region.ids_given();
        match is_same_boot {
            Some(true) => self.is_exclusive,
            Some(false) => is_given_once,
            None => is_given_once && self.is_exclusive,
        }
    }

    /// The same of a slot whose prover is a lock, for who could lock its byte and holds that lock
    /// until the slot is reclaimed.
    ///
    /// The lock by itself says nothing about an owner elsewhere; but one that cannot be had is an
    /// owner that lives, whatever the ids are.
    pub fn proves_with_lock<M: Memory>(&self, region: &Region<M>, at: SlotRef) -> bool {
        region.boot_of(at).is_some_and(|theirs| {
            theirs.is_of_same_machine(self.boot) == Some(true)
                && theirs.is_same(self.boot) == Some(false)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heap::HeapMemory;
    use crate::host::{HostIdentity, HostRecord};
    use crate::layout::MIN_REGION;

    /// Ids below 10 are given once.
    fn region() -> Region<HeapMemory> {
        let region = Region::attach(HeapMemory::new(MIN_REGION), 1).unwrap();
        region.set_ids_given(10);
        region
    }

    /// A peer that has written its record, unless it has no boot.
    fn peer(region: &Region<HeapMemory>, prover: Prover, boot: Option<Boot>) -> SlotRef {
        let index = region.unclaimed().next().unwrap();
        let at = region.claim_slot(index, prover).unwrap();
        if let Some(Boot { id, machine }) = boot {
            let identity = HostIdentity { boot: id, netns: 1, ivposition: 0 };
            region.write_host_record(at, &HostRecord::new(identity, &[]).on_machine(machine));
        }
        at
    }

    const GUEST: Boot = Boot { id: 100, machine: 0 };
    const REBOOTED: Boot = Boot { id: 101, machine: 0 };
    const KINDS: [fn(u32) -> Prover; 2] = [Prover::VfioExclusive, Prover::Agent];

    fn witness(boot: Boot, ivposition: u16, is_exclusive: bool) -> Witness {
        Witness { boot, ivposition: Some(ivposition), is_exclusive }
    }

    #[test]
    fn who_has_the_group_alone_outlives_all_of_the_same_id_and_boot() {
        let region = region();
        for kind in KINDS {
            for id in [3, 12] {
                let at = peer(&region, kind(u32::from(id)), Some(GUEST));
                let prover = kind(u32::from(id));
                assert!(witness(GUEST, id, true).proves(&region, at, prover));
                // Another process of the guest that does not have the group: an agent's client.
                assert!(!witness(GUEST, id, false).proves(&region, at, prover));
                // Another device of the same guest.
                assert!(!witness(GUEST, id + 1, true).proves(&region, at, prover));
                assert!(!Witness { ivposition: None, ..witness(GUEST, id, true) }
                    .proves(&region, at, prover));
            }
        }
    }

    #[test]
    fn another_boot_of_the_same_id_counts_only_where_ids_are_given_once() {
        let region = region();
        for kind in KINDS {
            for (id, is_given_once) in [(3, true), (9, true), (10, false), (12, false)] {
                let prover = kind(u32::from(id));
                let at = peer(&region, prover, Some(GUEST));
                for is_exclusive in [true, false] {
                    let witness = witness(REBOOTED, id, is_exclusive);
                    assert_eq!(witness.proves(&region, at, prover), is_given_once, "{id}");
                }
                assert!(!witness(REBOOTED, id + 1, true).proves(&region, at, prover));
            }
        }
    }

    #[test]
    fn without_a_record_both_are_needed() {
        let region = region();
        for kind in KINDS {
            for (id, is_exclusive, dead) in
                [(3, true, true), (3, false, false), (12, true, false), (12, false, false)]
            {
                let prover = kind(u32::from(id));
                let at = peer(&region, prover, None);
                for boot in [GUEST, REBOOTED, Boot { id: 7, machine: 7 }] {
                    let witness = witness(boot, id, is_exclusive);
                    assert_eq!(witness.proves(&region, at, prover), dead, "{id} {is_exclusive}");
                }
            }
        }
    }

    #[test]
    fn a_machine_that_was_reset_proves_it_for_every_kind() {
        let region = region();
        let old = Boot { id: 100, machine: 5 };
        let provers =
            [Prover::IvPosition(3), Prover::Agent(12), Prover::VfioExclusive(12), Prover::None];
        for prover in provers {
            let at = peer(&region, prover, Some(old));
            let by = |id, machine| {
                let boot = Boot { id, machine };
                Witness { boot, ivposition: None, is_exclusive: false }.proves(&region, at, prover)
            };
            assert!(by(101, 5));
            assert!(!by(100, 5), "the same boot lives: {prover:?}");
            assert!(!by(101, 6), "another machine: {prover:?}");
            assert!(!by(101, 0), "a machine without a uuid: {prover:?}");
        }
        // Two machines without a uuid are not the same.
        let at = peer(&region, Prover::None, Some(GUEST));
        assert!(!Witness { boot: REBOOTED, ivposition: None, is_exclusive: false }.proves(
            &region,
            at,
            Prover::None
        ));
    }

    #[test]
    fn of_a_locks_owner_the_machine_proves_it_to_who_holds_the_lock() {
        let region = region();
        let prover = Prover::Lock { boot: 77 };
        let at = peer(&region, prover, Some(Boot { id: 100, machine: 5 }));
        let unrecorded = peer(&region, prover, None);
        for (id, machine, dead) in
            [(101, 5, true), (100, 5, false), (101, 6, false), (101, 0, false)]
        {
            let witness = witness(Boot { id, machine }, 3, true);
            assert!(!witness.proves(&region, at, prover), "without the lock");
            assert_eq!(witness.proves_with_lock(&region, at), dead, "{id} {machine}");
            assert!(!witness.proves_with_lock(&region, unrecorded));
        }
    }

    #[test]
    fn a_boot_that_is_not_known_is_neither_the_same_nor_another() {
        let region = region();
        let (known, unknown) = (Boot { id: 100, machine: 5 }, Boot { id: 0, machine: 0 });
        // Nor if one of them says which machine it is on.
        let half = Boot { id: 0, machine: 5 };
        let pairs = [
            (known, unknown),
            (unknown, known),
            (unknown, unknown),
            (known, half),
            (half, known),
            (half, half),
        ];
        for (theirs, ours) in pairs {
            let others = [Prover::IvPosition(3), Prover::None, Prover::Lock { boot: 0 }];
            for prover in others {
                let at = peer(&region, prover, Some(theirs));
                let witness = witness(ours, 3, true);
                assert!(!witness.proves(&region, at, prover), "{theirs:?} {ours:?} {prover:?}");
                assert!(!witness.proves_with_lock(&region, at), "{theirs:?} {ours:?}");
                region.reclaim(at);
            }
            // The id and the group, both: as of an owner without a record.
            for kind in KINDS {
                for (id, is_exclusive, dead) in
                    [(3, true, true), (3, false, false), (12, true, false), (12, false, false)]
                {
                    let prover = kind(u32::from(id));
                    let at = peer(&region, prover, Some(theirs));
                    let witness = witness(ours, id, is_exclusive);
                    assert_eq!(witness.proves(&region, at, prover), dead, "{id} {is_exclusive}");
                    region.reclaim(at);
                }
            }
        }
    }

    #[test]
    fn another_machine_is_another_whatever_its_id() {
        let region = region();
        let prover = Prover::VfioExclusive(3);
        let at = peer(&region, prover, Some(Boot { id: 100, machine: 5 }));
        for id in [100, 101] {
            assert!(!witness(Boot { id, machine: 6 }, 3, true).proves(&region, at, prover));
        }
        // One of the two may have been unable to read the uuid.
        assert!(witness(REBOOTED, 3, false).proves(&region, at, prover));
    }

    #[test]
    fn locks_and_clients_of_the_ivshmem_server_have_other_provers() {
        let region = region();
        for prover in [Prover::Lock { boot: 1 }, Prover::IvPosition(3), Prover::None] {
            let at = peer(&region, prover, Some(GUEST));
            for boot in [GUEST, REBOOTED] {
                assert!(!witness(boot, 3, true).proves(&region, at, prover), "{prover:?}");
            }
        }
    }
}
