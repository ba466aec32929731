//! Machines, processes and ivshmem servers: who lives, who is silent, and who sees whose end.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::rc::Rc;

use ivsmc_proto::judge::Judge;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::SlotRef;

use crate::counts::{count, Counts};
use crate::device::Device;
use crate::law::Life;
use crate::memory::{Alarm, Shared, View, NEVER};
use crate::peer::{Invitation, Local};
use crate::random::Random;

/// A host or a guest.
pub(crate) struct Machine {
    /// 0 if nobody can read it.
    pub(crate) uuid: u128,
    pub(crate) boot: Cell<u128>,
    /// Of its device.
    pub(crate) ivposition: Option<u16>,
    /// The ivshmem server, by its pid, that its device is connected to.
    pub(crate) connection: Option<usize>,
    pub(crate) is_on: Cell<bool>,
    /// Paused until then.
    pub(crate) silent_until: Cell<u64>,
}

/// A process.
pub(crate) struct Process {
    pub(crate) life: Rc<Life>,
    pub(crate) machine: usize,
    pub(crate) device: Device,
    pub(crate) region: Region<View>,
    pub(crate) judge: Judge,
    /// Its connection to an ivshmem server: that one's pid, and the id.
    pub(crate) connection: Option<(usize, u16)>,
    /// The pid of its agent.
    pub(crate) agent: Cell<Option<usize>>,
    pub(crate) slot: Cell<Option<SlotRef>>,
    /// It is in the middle of something, and interrupted.
    pub(crate) busy: Cell<bool>,
    /// Stopped until then.
    pub(crate) silent_until: Cell<u64>,
    pub(crate) local: RefCell<Local>,
    pub(crate) inbox: RefCell<Vec<Invitation>>,
    /// Of an agent: its clients that have ended.
    pub(crate) ended_slots: RefCell<Vec<SlotRef>>,
    /// Of an ivshmem server: ids of its clients, of those that have ended, and the first it gives.
    pub(crate) clients: RefCell<BTreeSet<u16>>,
    pub(crate) ended_ids: RefCell<Vec<u16>>,
    pub(crate) first_id: Cell<u32>,
}

impl Process {
    pub(crate) fn pid(&self) -> usize {
        self.life.pid
    }
}

/// What differs between the worlds that are simulated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    /// Bytes of the region.
    pub(crate) size: u64,
    /// Processes there are to be.
    pub(crate) peers: usize,
    /// The ivshmem servers are ours and mark leavers, or of another make and do not.
    pub(crate) marks: bool,
    /// The host's uuid can be read.
    pub(crate) host_has_uuid: bool,
    /// What nobody heeds.
    pub(crate) without: Option<Rule>,
}

/// A rule by which deaths are proved, and that is the runtime's to keep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rule {
    /// The lock on a slot is taken before the slot is claimed.
    LockBeforeClaim,
    /// Who does not know its boot is judged on the region's own file only.
    OwnFile,
    /// A boot id that may not be the kernel's own is not one.
    KnownBoot,
    /// Exclusive is who opened the group while nobody had it.
    GroupAnew,
    /// An ivshmem server marks a leaver before it gives the id out again.
    MarkBeforeId,
    /// An id that may still be somebody's is not given out by the next ivshmem server.
    IdsOnce,
    /// An agent's client is dead when its connection has ended.
    EndOfConnection,
    /// Who is silent lives.
    Silence,
}

/// All there is.
pub(crate) struct World {
    pub(crate) kind: Kind,
    pub(crate) shared: Rc<Shared>,
    pub(crate) random: Random,
    pub(crate) now: Cell<u64>,
    pub(crate) machines: RefCell<Vec<Rc<Machine>>>,
    /// By pid; `None` once it has ended.
    pub(crate) processes: RefCell<Vec<Option<Rc<Process>>>>,
    /// The pids of those that have not ended.
    pub(crate) living: RefCell<Vec<usize>>,
    /// How many of them have slots.
    pub(crate) attached: Cell<usize>,
    pub(crate) server: RefCell<Option<Rc<Process>>>,
    next_boot: Cell<u128>,
    /// Processes that are interrupted, one within another.
    pub(crate) depth: Cell<u32>,
    pub(crate) counts: Counts,
}

/// As many are interrupted at once.
pub(crate) const DEEPEST: u32 = 3;

/// What a killed process unwinds with.
struct Killed;

impl World {
    pub(crate) fn new(kind: Kind, seed: u64) -> Rc<World> {
        let world = Rc::new(World {
            kind,
            shared: Shared::new(kind.size),
            random: Random::new(seed),
            now: Cell::new(0),
            machines: RefCell::default(),
            processes: RefCell::default(),
            living: RefCell::default(),
            attached: Cell::new(0),
            server: RefCell::default(),
            next_boot: Cell::new(1 << 40),
            depth: Cell::new(0),
            counts: Counts::default(),
        });
        *world.shared.world.borrow_mut() = Rc::downgrade(&world);
        let uuid = if kind.host_has_uuid { 1 } else { 0 };
        world.add_machine(uuid, None, None);
        world
    }

    pub(crate) fn add_machine(
        &self,
        uuid: u128,
        ivposition: Option<u16>,
        connection: Option<usize>,
    ) -> usize {
        let mut machines = self.machines.borrow_mut();
        machines.push(Rc::new(Machine {
            uuid,
            boot: Cell::new(self.new_boot()),
            ivposition,
            connection,
            is_on: Cell::new(true),
            silent_until: Cell::new(0),
        }));
        machines.len() - 1
    }

    pub(crate) fn new_boot(&self) -> u128 {
        self.next_boot.set(self.next_boot.get() + 1);
        self.next_boot.get()
    }

    /// Whether `rule` is left out.
    pub(crate) fn lacks(&self, rule: Rule) -> bool {
        self.kind.without == Some(rule)
    }

    pub(crate) fn machine(&self, index: usize) -> Rc<Machine> {
        self.machines.borrow()[index].clone()
    }

    pub(crate) fn process(&self, pid: usize) -> Option<Rc<Process>> {
        self.processes.borrow()[pid].clone()
    }

    /// A process that can go on now.
    pub(crate) fn can_run(&self, process: &Process) -> bool {
        process.life.alive.get()
            && !process.busy.get()
            && process.silent_until.get() <= self.now.get()
            && self.machines.borrow()[process.machine].silent_until.get() <= self.now.get()
    }

    /// Any process that can go on and is as asked for.
    pub(crate) fn any(&self, is: impl Fn(&Process) -> bool) -> Option<Rc<Process>> {
        let living = self.living.borrow();
        let start = self.random.below(living.len().max(1));
        let (before, after) = living.split_at(start.min(living.len()));
        let processes = self.processes.borrow();
        let mut in_turn = after.iter().chain(before).filter_map(|pid| processes[*pid].as_ref());
        in_turn.find(|process| self.can_run(process) && is(process)).cloned()
    }

    /// Has `process` do something; it may be killed, or interrupted, at any access to memory. `None`
    /// if it was killed.
    pub(crate) fn run<T>(&self, process: &Rc<Process>, act: impl FnOnce() -> T) -> Option<T> {
        let alarm = if self.depth.get() < DEEPEST { self.alarm() } else { NEVER };
        self.run_until(process, alarm, act)
    }

    fn run_until<T>(
        &self,
        process: &Rc<Process>,
        alarm: Alarm,
        act: impl FnOnce() -> T,
    ) -> Option<T> {
        assert!(process.life.alive.get() && !process.busy.replace(true));
        let before = self.shared.set_alarm(alarm);
        let done = catch_unwind(AssertUnwindSafe(act));
        self.shared.set_alarm(before);
        self.shared.law.claiming_for.take();
        process.busy.set(false);
        match done {
            Ok(done) => Some(done),
            Err(cause) if cause.is::<Killed>() => None,
            Err(cause) => resume_unwind(cause),
        }
    }

    /// When to interrupt: mostly never, else soon, or before one of the next changes, or late.
    fn alarm(&self) -> Alarm {
        match self.random.below(120) {
            0 => (u32::try_from(self.random.below(60)).unwrap(), u32::MAX),
            1..4 => (u32::MAX, u32::try_from(self.random.below(25)).unwrap()),
            4 => (u32::try_from(self.random.below(15_000)).unwrap(), u32::MAX),
            _ => NEVER,
        }
    }

    /// A process is about to access memory: it may end here, or others go on for a while first.
    pub(crate) fn interrupt(&self, pid: usize) {
        let process = self.process(pid).expect("it runs");
        let claiming_for = self.shared.law.claiming_for.take();
        let proof = self.shared.law.proof.get();
        match self.random.below(10) {
            0..4 => {
                count(&self.counts.killed_within);
                self.kill(&process);
            }
            4 if process.machine != 0 => match self.random.below(6) {
                0 => self.end_machine(process.machine),
                1 => self.reset(process.machine),
                _ => self.kill(&process),
            },
            _ => {
                count(&self.counts.silent_within);
                let steps = match self.random.below(20) {
                    0 => 300,
                    _ => self.random.below(30),
                };
                self.depth.set(self.depth.get() + 1);
                for _ in 0..steps {
                    self.step();
                }
                self.depth.set(self.depth.get() - 1);
            }
        }
        if !process.life.alive.get() {
            resume_unwind(Box::new(Killed));
        }
        *self.shared.law.claiming_for.borrow_mut() = claiming_for;
        self.shared.law.proof.set(proof);
        // It may be interrupted again.
        let alarm = if self.random.below(3) == 0 { self.alarm() } else { NEVER };
        self.shared.set_alarm(alarm);
    }
}
