//! A region with a thousand peers, in virtual time: hosts, guests, containers, agents and ivshmem
//! servers come and go by chance, are silent for long and go on, and die, whole machines at once and
//! each process at any access to memory; all provers prove what they can. At every change of the
//! memory it is judged that nobody's is touched by another ([`law`]): no DMB has two writers, ever. In
//! the end all is dead, and everything comes back. The code that acts is the real one, `Region`,
//! `Judge` and rings on a memory of words; what is simulated is who runs, and what the kernel and
//! ivshmem servers see.
//!
//! The tests at the end leave one rule of the runtime out each, and must find a violation.
//!
//! A seed repeats a run. More of them, from another one on, and longer:
//!
//! ```text
//! IVSMC_SIMULATION_SEEDS=100 IVSMC_SIMULATION_SEED=7 IVSMC_SIMULATION_STEPS=1000000 \
//!     cargo test --release -p ivsmc-proto --test simulation all_of_it -- --nocapture
//! ```

mod connect;
mod counts;
mod device;
mod end;
mod join;
mod law;
mod memory;
mod peer;
mod random;
mod server;
mod steps;
mod world;

use std::collections::BTreeMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::rc::Rc;
use std::time::Instant;

use ivsmc_proto::judge::UNKNOWN_BOOT;
use ivsmc_proto::reclaim::Census;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotRef, SlotState};

use device::Device;
use memory::View;
use world::{Kind, Rule, World, DEEPEST};

/// Says how to repeat a run that fails.
struct Seed(u64, Kind);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to repeat: IVSMC_SIMULATION_SEED={} ({:?})", self.0, self.1);
        }
    }
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

fn simulate(kind: Kind, seed: u64, steps: u64) -> Rc<World> {
    let _seed = Seed(seed, kind);
    let world = World::new(kind, seed);
    let start = Instant::now();
    live(&world, steps);
    println!("{kind:?}, seed {seed}, {:?}: {}", start.elapsed(), world.counts);
    println!("    changes judged: {}", world.shared.law.changes.get());
    end(&world);
    println!("    deaths proved: {:?}", world.shared.law.deaths.borrow());
    world
}

/// All that happens in so many steps.
fn live(world: &Rc<World>, steps: u64) {
    while world.now.get() < steps {
        world.step();
        if world.now.get() % 5000 == 0 {
            let living = world.living.borrow().clone();
            let living = living.iter().filter_map(|pid| world.process(*pid));
            living.for_each(|process| world.check(&process));
        }
    }
}

/// All die. Then whoever can prove something comes, and at last an operator.
fn end(world: &Rc<World>) {
    world.depth.set(DEEPEST);
    let living = world.living.borrow().clone();
    for pid in living {
        if let Some(process) = world.process(pid) {
            if world.random.below(2) == 0 && process.slot.get().is_some() {
                world.leave(&process);
            }
            world.kill(&process);
        }
    }
    let machines = world.machines.borrow().clone();
    (1..machines.len()).for_each(|machine| world.end_machine(machine));
    world.start_server();
    for (index, machine) in machines.iter().enumerate() {
        machine.silent_until.set(0);
        if index > 0 {
            // On again, in another boot; as a guest, if its uuid tells who it is.
            world.reset(index);
        }
        let devices: &[Device] = match (index, machine.uuid) {
            (0, _) => &[Device::File, Device::Container],
            (_, 0) => &[],
            _ => &[Device::Pci(0), Device::Pci(1)],
        };
        for device in devices {
            let process = world.join(index, *device).and_then(|pid| world.process(pid));
            process.iter().for_each(|process| world.leave(process));
        }
    }
    let last = world.join(0, Device::File).and_then(|pid| world.process(pid)).expect("room");
    let unproved = world.unproved(&last);
    for at in &unproved {
        assert!(!is_provable(world, &last.region, *at), "{at} was left to an operator");
        world.declare_dead(&last, *at);
    }
    println!("    {} left to an operator of {}", unproved.len(), world.processes.borrow().len());
    world.leave(&last);
    let observer = world.start(0, Device::Server, None);
    assert_eq!(observer.region.census(), Census::default(), "something is left");
    assert!(observer.region.is_deserted());
}

/// Whether somebody who came at the end can prove the death of `at`.
fn is_provable(world: &World, region: &Region<View>, at: SlotRef) -> bool {
    let SlotState::Live { prover, .. } = region.slot_state(at.index) else { return false };
    if world.kind.marks && region.ivposition_of(at, prover).is_some() {
        return true;
    }
    // Killed before it has said who it is: only that tells.
    let Some(boot) = region.boot_of(at) else { return false };
    let is_another = boot.id != world.machine(0).boot.get();
    match prover {
        Prover::Lock { boot: UNKNOWN_BOOT } => true,
        Prover::Lock { .. } if !is_another => true,
        _ => is_another && boot.id != 0 && boot.machine != 0,
    }
}

/// Regions with as many slots as there can be, and smaller ones in which all is scarce; each with ivshmem servers that mark leavers and with ones that do not.
#[test]
fn no_dmb_has_two_writers_and_all_of_it_comes_back() {
    let [first, seeds, steps] = ["SEED", "SEEDS", "STEPS"]
        .map(|name| from_environment(&format!("IVSMC_SIMULATION_{name}")));
    let mut deaths = BTreeMap::new();
    for seed in first.unwrap_or(0)..first.unwrap_or(0) + seeds.unwrap_or(1) {
        for (mib, peers, few) in [(256, 1000, 30_000), (16, 200, 80_000), (2, 30, 100_000)] {
            for marks in [true, false] {
                let host_has_uuid = (seed + mib / 2) % 2 == 0;
                let kind = Kind { size: mib << 20, peers, marks, host_has_uuid, without: None };
                let world = simulate(kind, seed, steps.unwrap_or(few));
                for (proof, count) in world.shared.law.deaths.borrow().iter() {
                    *deaths.entry(*proof).or_insert(0) += count;
                }
                if [first, seeds, steps] == [None; 3] {
                    world.counts.assert_enough(peers);
                }
            }
        }
    }
    println!("{deaths:?}");
    if [first, seeds, steps] == [None; 3] {
        for proof in ["lock", "left", "exclusive", "reset", "machine", "agent", "word", "anew"] {
            assert!(deaths.get(proof).is_some_and(|count| *count > 10), "{proof}: {deaths:?}");
        }
    }
}

/// Somebody who lives is declared dead in a world that does not heed `rule`: so the simulation can fail,
/// and the rule is needed.
fn is_needed(rule: Rule) {
    let found = (0..100).find_map(|seed| {
        let kind = Kind {
            size: 4 << 20,
            peers: 60,
            marks: true,
            host_has_uuid: true,
            without: Some(rule),
        };
        let world = World::new(kind, seed);
        let cause = catch_unwind(AssertUnwindSafe(|| live(&world, 20_000))).err()?;
        let said = cause.downcast_ref::<String>().cloned().unwrap_or_default();
        Some((seed, world.now.get(), said))
    });
    let (seed, now, said) = found.expect("no violation");
    println!("{rule:?}: seed {seed}, step {now}: {said}");
    assert!(said.ends_with("lives and was declared dead"), "{said}");
}

macro_rules! needed {
    ($($name:ident: $rule:ident;)*) => {$(
        #[test]
        fn $name() {
            is_needed(Rule::$rule);
        }
    )*};
}

needed! {
    a_lock_is_taken_before_the_claim: LockBeforeClaim;
    only_on_the_regions_own_file_is_judged_who_does_not_know_its_boot: OwnFile;
    a_boot_id_is_the_kernels_own: KnownBoot;
    exclusive_is_who_opened_the_group_anew: GroupAnew;
    a_leaver_is_marked_before_its_id_is_given_out: MarkBeforeId;
    ids_that_may_be_somebodys_are_not_given_out: IdsOnce;
    an_agents_client_is_dead_when_its_connection_has_ended: EndOfConnection;
    silence_proves_nothing: Silence;
}
