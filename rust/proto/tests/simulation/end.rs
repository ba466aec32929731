//! Ends of processes, machines and hosts, and who sees them.

use std::rc::Rc;

use ivsmc_proto::slot::SlotRef;

use crate::world::{Process, World};

impl World {
    /// The process is gone, and with it its locks and connections.
    pub(crate) fn kill(&self, process: &Rc<Process>) {
        if !process.life.alive.replace(false) {
            return;
        }
        let pid = process.pid();
        self.shared.release_locks(pid);
        if process.slot.get().is_some() {
            self.attached.set(self.attached.get() - 1);
        }
        if let Some((server, id)) = process.connection {
            self.end_connection(server, id);
        }
        if let (Some(agent), Some(slot)) = (process.agent.get(), process.slot.get()) {
            if let Some(agent) = self.process(agent) {
                agent.ended_slots.borrow_mut().push(slot);
            }
        }
        let mut server = self.server.borrow_mut();
        if server.as_ref().is_some_and(|server| server.pid() == pid) {
            *server = None;
        }
        self.living.borrow_mut().retain(|living| *living != pid);
        self.processes.borrow_mut()[pid] = None;
    }

    /// An ivshmem server, if it is still there, sees the end of a client.
    fn end_connection(&self, server: usize, id: u16) {
        if let Some(server) = self.process(server) {
            server.clients.borrow_mut().remove(&id);
            server.ended_ids.borrow_mut().push(id);
        }
    }

    /// The process has a slot now, unless it has ended meanwhile.
    pub(crate) fn seat(&self, process: &Process, slot: SlotRef) {
        process.slot.set(Some(slot));
        if process.life.alive.get() {
            self.attached.set(self.attached.get() + 1);
            self.counts.most.set(self.counts.most.get().max(self.attached.get()));
        }
    }

    pub(crate) fn processes_of(&self, machine: usize) -> Vec<Rc<Process>> {
        let living = self.living.borrow().clone();
        let processes = living.iter().filter_map(|pid| self.process(*pid));
        processes.filter(|process| process.machine == machine).collect()
    }

    /// The guest's QEMU is killed.
    pub(crate) fn end_machine(&self, index: usize) {
        let machine = self.machine(index);
        self.processes_of(index).iter().for_each(|process| self.kill(process));
        if machine.is_on.replace(false) {
            if let (Some(server), Some(id)) = (machine.connection, machine.ivposition) {
                self.end_connection(server, id);
            }
        }
    }

    /// The guest is reset: the same device, another boot.
    pub(crate) fn reset(&self, index: usize) {
        self.processes_of(index).iter().for_each(|process| self.kill(process));
        self.machine(index).boot.set(self.new_boot());
    }

    /// The host is reset; the region's file is still there after that.
    pub(crate) fn reboot_host(&self) {
        for machine in (1..self.machines.borrow().len()).rev() {
            self.end_machine(machine);
        }
        self.reset(0);
    }
}
