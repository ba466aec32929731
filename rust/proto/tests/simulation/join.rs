//! How a process attaches to the region, and judges the slots of others.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use ivsmc_proto::host::{Boot, HostIdentity, HostRecord};
use ivsmc_proto::judge::{self, Judge, Locks, UNKNOWN_BOOT};
use ivsmc_proto::proof::Witness;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotInfo, SlotRef, SlotState};

use crate::device::Device;
use crate::law::Life;
use crate::memory::{FileLocks, View, HOST_FILE, NEVER};
use crate::peer::Local;
use crate::world::{Process, Rule, World};

impl World {
    /// Starts a process that has the region; it does nothing yet.
    pub(crate) fn start(
        &self,
        machine: usize,
        device: Device,
        connection: Option<(usize, u16)>,
    ) -> Rc<Process> {
        let on = self.machine(machine);
        let pid = self.processes.borrow().len();
        let life = Rc::new(Life { pid, alive: Cell::new(true), leaving: Cell::new(false) });
        let view =
            View { shared: self.shared.clone(), life: life.clone(), taken: RefCell::default() };
        let before = self.shared.set_alarm(NEVER);
        let region = Region::attach(view, 1).unwrap();
        self.shared.set_alarm(before);
        let boot = match (device.knows_boot(), self.lacks(Rule::KnownBoot)) {
            (true, _) => Boot { id: on.boot.get(), machine: on.uuid },
            (false, false) => Boot { id: 0, machine: 0 },
            // What a container manager made up.
            (false, true) => Boot { id: self.new_boot(), machine: on.uuid },
        };
        let witness = Witness {
            boot,
            ivposition: on.ivposition.filter(|_| device.is_guests()),
            is_exclusive: matches!(device, Device::Vfio | Device::VfioContainer | Device::Agent),
        };
        let locks = match device {
            Device::Host | Device::File => Some(judge::lock_name(boot.id, 0, None)),
            Device::Container => Some(UNKNOWN_BOOT),
            Device::Pci(file_system) => {
                Some(judge::lock_name(boot.id, file_system.into(), on.ivposition))
            }
            _ => None,
        };
        let is_on_own_file = matches!(device, Device::Host | Device::File | Device::Container)
            || matches!(device, Device::Pci(_)) && self.lacks(Rule::OwnFile);
        let process = Rc::new(Process {
            life,
            machine,
            device,
            local: RefCell::new(Local::new(region.geometry())),
            region,
            judge: Judge { witness, locks, is_on_own_file },
            connection,
            agent: Cell::new(None),
            slot: Cell::new(None),
            busy: Cell::new(false),
            silent_until: Cell::new(0),
            inbox: RefCell::default(),
            ended_slots: RefCell::default(),
            clients: RefCell::default(),
            ended_ids: RefCell::default(),
            first_id: Cell::new(0),
        });
        self.processes.borrow_mut().push(Some(process.clone()));
        self.living.borrow_mut().push(pid);
        process
    }

    pub(crate) fn locks<'a>(&'a self, process: &Process) -> FileLocks<'a> {
        let file = match process.device {
            Device::Pci(file_system) => {
                u32::try_from(process.machine).unwrap() * 2 + 1 + u32::from(file_system)
            }
            _ => HOST_FILE,
        };
        FileLocks { shared: &self.shared, file, pid: process.pid() }
    }

    /// The process looks at all slots, and takes back what the dead had.
    pub(crate) fn look_at_all(&self, process: &Rc<Process>) {
        let me = process.slot.get();
        for index in 0..process.region.geometry().slots() {
            if me.map(|me| me.index) != Some(index) {
                self.look(process, index);
            }
        }
    }

    /// The process looks at one slot.
    pub(crate) fn look(&self, process: &Rc<Process>, index: u16) {
        let judge = &process.judge;
        if let SlotState::Live { at, prover } = process.region.slot_state(index) {
            let boot = process.region.boot_of(at);
            let is_same = boot.and_then(|boot| boot.is_same(judge.witness.boot));
            let is_of_same_machine =
                boot.and_then(|boot| boot.is_of_same_machine(judge.witness.boot));
            self.shared.law.proof.set(match (prover, is_same) {
                (_, Some(false)) if is_of_same_machine == Some(true) => "machine",
                (Prover::Lock { .. }, _) => "lock",
                (_, Some(false)) => "reset",
                _ => "exclusive",
            });
        }
        judge.look(&process.region, &self.locks(process), index);
        self.shared.law.proof.set("other");
    }

    /// Starts a process and has it attach to the region. Its pid, or `None` if it cannot.
    pub(crate) fn join(&self, machine: usize, device: Device) -> Option<usize> {
        if device == Device::AgentClient {
            return self.join_by_agent(machine);
        }
        if device.holds_group() && self.is_group_busy(machine) && !self.lacks(Rule::GroupAnew) {
            return None;
        }
        let connection = match device {
            Device::Host => Some(self.connect()?),
            _ => None,
        };
        let process = self.start(machine, device, connection);
        self.run(&process, || {
            let region = &process.region;
            self.look_at_all(&process);
            if device == Device::Agent {
                return;
            }
            let prover = self.prover(&process);
            let slot = match prover {
                Prover::Lock { .. } if !self.lacks(Rule::LockBeforeClaim) => {
                    judge::claim_with_lock(region, &self.locks(&process), prover).unwrap()
                }
                _ => region.unclaimed().find_map(|index| region.claim_slot(index, prover)),
            };
            if let Some(slot) = slot {
                self.seat(&process, slot);
                if self.lacks(Rule::LockBeforeClaim) {
                    let at = region.slot_claim_offset(slot.index);
                    let Ok(_) = self.locks(&process).try_lock(at);
                }
                self.say_who(&process, slot);
            }
        })?;
        if process.slot.get().is_none() && device != Device::Agent {
            self.kill(&process);
            return None;
        }
        Some(process.pid())
    }

    /// Who may say that the process is dead, as the runtime chooses.
    fn prover(&self, process: &Process) -> Prover {
        let marker = process.region.marking_server_offset();
        let has_marking_server = process.region.marking_server().is_some()
            && self.shared.is_locked_by_other(HOST_FILE, marker, process.pid());
        match (process.device, process.connection, process.judge.locks) {
            (Device::Host, Some((_, id)), _) if has_marking_server => Prover::IvPosition(id),
            (Device::Vfio | Device::VfioContainer, ..) => {
                Prover::VfioExclusive(self.ivposition(process).into())
            }
            (_, _, Some(boot)) => Prover::Lock { boot },
            (_, _, None) => Prover::None,
        }
    }

    pub(crate) fn ivposition(&self, process: &Process) -> u16 {
        self.machine(process.machine).ivposition.expect("a guest has a device")
    }

    pub(crate) fn say_who(&self, process: &Rc<Process>, slot: SlotRef) {
        let id = process.connection.map(|(_, id)| id);
        let ivposition = id.or(process.judge.witness.ivposition);
        let info = SlotInfo { ivposition, vector: None, eid: [b' '; 32] };
        process.region.set_slot_info(slot, &info);
        let Boot { id: boot, machine } = process.judge.witness.boot;
        let ivposition = process.judge.witness.ivposition.unwrap_or(0);
        let record = HostRecord::new(HostIdentity { boot, netns: 1, ivposition }, &[]);
        process.region.write_host_record(slot, &record.on_machine(machine));
    }

    fn is_group_busy(&self, machine: usize) -> bool {
        self.processes_of(machine).iter().any(|process| process.device.holds_group())
    }
}
