//! Slots that change hands: claims against reaping, and what the owner says of itself.

use ivsmc_proto::host::{Boot, HostIdentity, HostRecord};
use ivsmc_proto::memory::Memory;
use ivsmc_proto::reclaim::Census;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotInfo, SlotRef};
use loom::thread;

use crate::region::{explore, Lacks};

/// Preemption bound of the models with two threads.
const BOUND_OF_TWO: usize = 8;
/// Preemption bound of the models with three threads.
const BOUND_OF_THREE: usize = 5;

/// A slot with an extent of its own, and one in front of that so that the table is not empty.
fn claim_with_extent<M: Memory>(region: &Region<M>, index: u16) -> Option<SlotRef> {
    let at = region.claim_slot(index, Prover::None)?;
    let extent = region.claim_extent(at)?;
    assert!(region.open_extent(extent, at), "the extent of one who lives was taken");
    Some(at)
}

/// Two want one slot: one has it.
#[test]
fn a_slot_is_claimed_once() {
    explore(
        BOUND_OF_TWO,
        Lacks::Nothing,
        |_| (),
        |region, ()| {
            let other = {
                let region = region.clone();
                thread::spawn(move || region.claim_slot(0, Prover::None))
            };
            let own = region.claim_slot(0, Prover::IvPosition(1));
            let claims = [own, other.join().unwrap()];
            assert_eq!(claims.iter().flatten().count(), 1, "{claims:?}");
            assert_eq!(region.census().live, 1);
        },
    );
}

/// Two reclaim a dead one, and a newcomer takes its slot as soon as it is free: nothing of the
/// newcomer's is taken for the dead one's. Three threads.
#[test]
fn who_takes_the_slot_of_the_dead_keeps_what_it_claims() {
    explore(
        BOUND_OF_THREE,
        Lacks::Nothing,
        |region| claim_with_extent(region, 0).unwrap(),
        |region, &dead| {
            let reapers = [0, 1].map(|_| {
                let region = region.clone();
                thread::spawn(move || region.reclaim(dead))
            });
            let newcomer = claim_with_extent(region, 0);
            let freed = reapers.map(|reaper| reaper.join().unwrap());
            assert_eq!(freed.iter().map(|done| u32::from(done.slot)).sum::<u32>(), 1);
            assert!(freed.iter().map(|done| done.extents).sum::<u32>() == 1);
            let left = u32::from(newcomer.is_some());
            assert_eq!(
                region.census(),
                Census { live: left, extents: left, ..Census::default() },
                "{newcomer:?}"
            );
            assert!(newcomer.is_none_or(|at| at.generation == 2 && region.is_live(at)));
        },
    );
}

/// A peer that leaves while its prover, mistaken or late, reclaims it, too: the slot is freed once,
/// and one who takes it in between is not marked.
#[test]
fn a_late_word_does_not_kill_the_successor() {
    explore(
        BOUND_OF_THREE,
        Lacks::Nothing,
        |region| region.claim_slot(0, Prover::None).unwrap(),
        |region, &leaver| {
            let late = {
                let region = region.clone();
                thread::spawn(move || region.mark_dead(leaver))
            };
            let successor = {
                let region = region.clone();
                thread::spawn(move || region.claim_slot(0, Prover::None))
            };
            region.reclaim(leaver);
            late.join().unwrap();
            let successor = successor.join().unwrap();
            assert!(!region.is_live(leaver));
            assert!(successor.is_none_or(|at| region.is_live(at)), "the successor was marked");
            region.reclaim(leaver);
            assert_eq!(region.census().live, u32::from(successor.is_some()));
            assert_eq!(region.census().dead, 0);
        },
    );
}

fn record(boot: u128) -> HostRecord {
    let identity = HostIdentity { boot, netns: 1, ivposition: 2 };
    HostRecord::new(identity, &[]).on_machine(boot + 1)
}

fn boot(id: u128) -> Option<Boot> {
    Some(Boot { id, machine: id + 1 })
}

fn info(ivposition: u16) -> SlotInfo {
    SlotInfo { ivposition: Some(ivposition), vector: Some(1), eid: [b'0'; 32] }
}

/// By the boot in a record deaths are proved: who reads it while the slot changes hands finds that
/// of the owner asked for, or none.
fn a_slot_changes_hands(lacks: Lacks) {
    explore(
        BOUND_OF_TWO,
        lacks,
        |region| {
            let first = region.claim_slot(0, Prover::None).unwrap();
            region.write_host_record(first, &record(1));
            region.set_slot_info(first, &info(1));
            first
        },
        |region, &first| {
            let next = SlotRef { generation: first.generation + 1, ..first };
            let writer = {
                let region = region.clone();
                thread::spawn(move || {
                    region.reclaim(first);
                    assert_eq!(region.claim_slot(0, Prover::None), Some(next));
                    region.set_slot_info(next, &info(3));
                    region.write_host_record(next, &record(3));
                })
            };
            let found = [region.boot_of(next), region.boot_of(first)];
            let [of_next, of_first] = found;
            assert!(of_next.is_none() || of_next == boot(3), "a boot of another: {found:?}");
            assert!(of_first.is_none() || of_first == boot(1), "a boot of another: {found:?}");
            writer.join().unwrap();
        },
    );
}

#[test]
fn a_boot_is_that_of_the_owner_asked_for() {
    a_slot_changes_hands(Lacks::Nothing);
}

#[test]
#[should_panic(expected = "a boot of another")]
fn a_record_without_orders_is_noticed() {
    a_slot_changes_hands(Lacks::Orders);
}

/// The same of its information, by which the ivshmem server knows whose slot it is.
#[test]
fn information_is_that_of_the_owner_asked_for() {
    explore(
        BOUND_OF_TWO,
        Lacks::Nothing,
        |region| {
            let first = region.claim_slot(0, Prover::None).unwrap();
            region.set_slot_info(first, &info(1));
            first
        },
        |region, &first| {
            let next = SlotRef { generation: first.generation + 1, ..first };
            let eid = [b'1'; 32];
            let writer = {
                let region = region.clone();
                thread::spawn(move || {
                    region.reclaim(first);
                    assert_eq!(region.claim_slot(0, Prover::None), Some(next));
                    region.set_slot_info(next, &SlotInfo { eid, ..info(3) });
                })
            };
            let (of_next, of_first) = (region.slot_info(next), region.slot_info(first));
            assert!(of_next.is_none_or(|found| found == SlotInfo { eid, ..info(3) }));
            assert!(of_first.is_none_or(|found| found == info(1)));
            writer.join().unwrap();
        },
    );
}
