//! What happens next, by chance.

use std::rc::Rc;

use ivsmc_proto::slot::{SlotRef, SlotState};

use crate::counts::count;
use crate::device::Device;
use crate::world::{Process, Rule, World};

impl World {
    /// One thing happens somewhere. Time goes on.
    pub(crate) fn step(&self) {
        self.now.set(self.now.get() + 1);
        let is_full = self.attached.get() >= self.kind.peers;
        // Until so many have come, they come fast.
        let in_how_many = if self.counts.most.get() < self.kind.peers { 2 } else { 20 };
        if !is_full && self.random.below(in_how_many) == 0 {
            self.somebody_comes();
            return;
        }
        match self.random.below(1000) {
            0..3 => self.a_machine_ends_or_pauses(),
            3..22 => self.a_process_ends_or_stops(),
            22..27 => self.any(is_attached).iter().for_each(|process| self.leave(process)),
            27..42 => self.serve(),
            42..50 => self
                .any(|process| process.device == Device::Agent)
                .iter()
                .for_each(|agent| self.serve_as_agent(agent)),
            50 => self.the_server_ends(),
            51..55 => self.start_server(),
            55..58 => self.an_operator_speaks(),
            58 if self.random.below(100) == 0 => self.reboot_host(),
            59..69 => {
                if let Some(process) = self.any(is_attached) {
                    self.note_return(&process);
                    let _ = self.run(&process, || self.look_at_all(&process));
                }
            }
            _ => self.somebody_acts(),
        }
    }

    /// An attached process does something, if there is one that can.
    fn somebody_acts(&self) {
        let what = self.random.below(100);
        let can: fn(&Process) -> bool = match what {
            20..40 => |process| !process.inbox.borrow().is_empty(),
            40..60 | 72..80 => |process| !process.local.borrow().writes.is_empty(),
            60..72 | 80..86 => |process| !process.local.borrow().reads.is_empty(),
            _ => |_| true,
        };
        let Some(process) = self.any(|process| is_attached(process) && can(process)) else {
            return;
        };
        self.note_return(&process);
        match what {
            ..20 => {
                if let Some(writer) = self.any(is_attached) {
                    self.invite(&process, &writer);
                }
            }
            20..40 => self.attach(&process),
            40..60 => self.write(&process),
            60..72 => self.read(&process),
            72..80 => self.detach(&process),
            80..86 => self.release(&process),
            86..90 => self.sweep(&process, what % 2),
            90..93 => self.listen(&process),
            93..96 => self.intend(&process),
            96..98 => {
                let client = self.random.below(self.processes.borrow().len());
                self.accept(&process, client);
            }
            _ => {
                let slots = usize::from(process.region.geometry().slots());
                let index = u16::try_from(self.random.below(slots)).unwrap();
                if process.slot.get().is_some_and(|me| me.index != index) {
                    let _ = self.run(&process, || self.look(&process, index));
                }
            }
        }
    }

    /// It was silent for long, and goes on as if nothing had been.
    fn note_return(&self, process: &Process) {
        let machine = self.machine(process.machine);
        let (own, all) = (process.silent_until.replace(0), machine.silent_until.replace(0));
        if own > 0 || all > 0 {
            count(&self.counts.returns);
        }
    }

    fn somebody_comes(&self) {
        let machines = self.machines.borrow().clone();
        let guests: Vec<usize> =
            (1..machines.len()).filter(|index| machines[*index].is_on.get()).collect();
        if guests.len() < 20 && self.random.below(20) == 0 {
            self.start_guest();
            return;
        }
        let is_guest = !guests.is_empty() && self.random.below(3) > 0;
        let (machine, device) = if is_guest {
            let devices = [
                Device::Vfio,
                Device::VfioContainer,
                Device::Pci(0),
                Device::Pci(0),
                Device::Pci(1),
                Device::PciContainer,
                Device::Agent,
                Device::AgentClient,
                Device::AgentClient,
                Device::AgentClient,
            ];
            let guest = guests[self.random.below(guests.len())];
            (guest, devices[self.random.below(devices.len())])
        } else {
            let devices = [Device::Host, Device::Host, Device::File, Device::Container];
            let device = match self.random.below(12) {
                0 => Device::Unlockable,
                _ => devices[self.random.below(devices.len())],
            };
            (0, device)
        };
        if machines[machine].silent_until.get() <= self.now.get() {
            self.join(machine, device);
        }
    }

    fn a_machine_ends_or_pauses(&self) {
        let machines = self.machines.borrow().clone();
        let on: Vec<usize> =
            (1..machines.len()).filter(|index| machines[*index].is_on.get()).collect();
        if on.is_empty() {
            return;
        }
        let chosen = on[self.random.below(on.len())];
        match self.random.below(30) {
            0..2 => self.end_machine(chosen),
            2..8 => self.reset(chosen),
            _ => {
                let pause = self.random.below(6000) as u64;
                machines[chosen].silent_until.set(self.now.get() + pause);
            }
        }
    }

    fn a_process_ends_or_stops(&self) {
        let Some(process) = self.any(|process| process.device != Device::Server) else { return };
        match self.random.below(4) {
            0 | 1 => self.kill(&process),
            _ => {
                let stop = self.random.below(9000) as u64;
                process.silent_until.set(self.now.get() + stop);
            }
        }
    }

    fn the_server_ends(&self) {
        let server = self.server.borrow().clone();
        let Some(server) = server.filter(|server| self.can_run(server)) else { return };
        if self.kind.marks && self.random.below(2) == 0 {
            let ended = self.run(&server, || {
                server.region.clear_marking_server(1.try_into().unwrap());
            });
            if ended.is_none() {
                return;
            }
        }
        self.kill(&server);
    }

    /// An operator knows of a death, and says so.
    fn an_operator_speaks(&self) {
        let Some(process) = self.any(is_attached) else { return };
        if let Some(at) = self.unproved(&process).first() {
            self.declare_dead(&process, *at);
        }
        if self.lacks(Rule::Silence) {
            let living = self.living.borrow().clone();
            let is_silent = |other: &Rc<Process>| {
                other.silent_until.get() > self.now.get() && !other.busy.get()
            };
            let mut silent = living.iter().filter_map(|pid| self.process(*pid)).filter(is_silent);
            if let Some(at) = silent.find_map(|other| other.slot.get()) {
                self.declare_dead(&process, at);
            }
        }
    }

    /// The slots that stand as live and whose owners are dead.
    pub(crate) fn unproved(&self, process: &Process) -> Vec<SlotRef> {
        let slots = process.region.slots().filter_map(|(_, state)| match state {
            SlotState::Live { at, .. } => Some(at),
            _ => None,
        });
        slots.filter(|at| !self.shared.law.lives(*at)).collect()
    }
}

fn is_attached(process: &Process) -> bool {
    process.slot.get().is_some()
}
