//! Extents: two claimants, and owners that come and go.

use ivsmc_proto::memory::Memory;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotRef};
use loom::thread;

use crate::region::{explore, Lacks, LoomRegion};

/// Preemption bound of the models with two threads.
const BOUND_OF_TWO: usize = 8;
/// Preemption bound of the models with three threads.
const BOUND_OF_THREE: usize = 5;

/// Slots 0 to 2, and all extents but the first `free` claimed by the last of them.
pub(crate) fn slots_and_extents<M: Memory>(region: &Region<M>, free: u32) -> [SlotRef; 3] {
    let slots = [0, 1, 2].map(|index| region.claim_slot(index, Prover::None).unwrap());
    for _ in 0..region.geometry().extents() {
        region.claim_extent(slots[2]).unwrap();
    }
    for extent in 0..free {
        assert!(region.free_extent(extent, slots[2]));
    }
    slots
}

/// Claims an extent, opens it and uses the memory of its first granule; which it was.
pub(crate) fn claim_and_use(region: &LoomRegion, owner: SlotRef) -> Option<u32> {
    let extent = region.claim_extent(owner)?;
    assert!(region.open_extent(extent, owner), "the extent of one who lives was taken");
    use_memory(region, extent * region.geometry().granules_per_extent());
    Some(extent)
}

/// Writes into the memory of `granule`.
pub(crate) fn use_memory(region: &LoomRegion, granule: u32) {
    let per_extent = region.geometry().granules_per_extent();
    let (_, data) = region.geometry().extent_ranges(granule / per_extent);
    let size = (data.end - data.start) / u64::from(per_extent);
    region.memory().write(data.start + u64::from(granule % per_extent) * size, &[1]);
}

/// One is free and two want it: one has it.
#[test]
fn an_extent_is_claimed_once() {
    for free in [1, 2] {
        explore(
            BOUND_OF_TWO,
            Lacks::Nothing,
            move |region| slots_and_extents(region, free),
            move |region, &[first, second, _]| {
                let other = {
                    let region = region.clone();
                    thread::spawn(move || claim_and_use(&region, second))
                };
                let own = claim_and_use(region, first);
                let other = other.join().unwrap();
                assert!(own != other, "{own:?} claimed twice");
                // Who fails found the last one taken.
                let claimed = own.iter().chain(&other).count();
                assert!(claimed >= 1 && (free == 1 || claimed == 2), "{own:?} {other:?}");
            },
        );
    }
}

/// An owner uses its memory and gives it back; another takes it as soon as it can.
fn handed_on(lacks: Lacks) {
    explore(
        BOUND_OF_TWO,
        lacks,
        |region| {
            let slots = slots_and_extents(region, 1);
            assert_eq!(region.claim_extent(slots[0]), Some(0));
            assert!(region.open_extent(0, slots[0]));
            slots
        },
        |region, &[first, second, _]| {
            let other = {
                let region = region.clone();
                thread::spawn(move || claim_and_use(&region, second))
            };
            use_memory(region, 0);
            assert!(region.free_extent(0, first));
            other.join().unwrap();
        },
    );
}

#[test]
fn an_extent_is_handed_on_with_its_memory() {
    handed_on(Lacks::Nothing);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn an_extent_handed_on_without_orders_is_noticed() {
    handed_on(Lacks::Orders);
}

/// Two reclaim a dead owner with an extent that it had opened and one that it had not, and a
/// newcomer takes what becomes free: it keeps it, and nothing else is left. Three threads.
#[test]
fn the_extents_of_the_dead_are_freed_once() {
    explore(
        BOUND_OF_THREE,
        Lacks::Nothing,
        |region| {
            let slots = slots_and_extents(region, 2);
            for extent in [0, 1] {
                assert_eq!(region.claim_extent(slots[0]), Some(extent));
            }
            assert!(region.open_extent(0, slots[0]));
            slots
        },
        |region, &[dead, newcomer, _]| {
            let reapers = [0, 1].map(|_| {
                let region = region.clone();
                thread::spawn(move || region.reclaim(dead).extents)
            });
            let claimed = claim_and_use(region, newcomer);
            let freed: u32 = reapers.map(|reaper| reaper.join().unwrap()).iter().sum();
            assert_eq!(freed, 2, "each is freed once");
            for extent in [0, 1] {
                let expected = (claimed == Some(extent)).then_some(newcomer);
                assert_eq!(region.extent_owner(extent), expected, "extent {extent}");
            }
        },
    );
}
