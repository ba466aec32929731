//! Who gives others their places: agents and ivshmem servers.

use std::collections::BTreeSet;
use std::rc::Rc;

use ivsmc_proto::judge::Locks;
use ivsmc_proto::slot::{Prover, SlotState};

use crate::device::Device;
use crate::world::{Machine, Process, Rule, World};

impl World {
    /// An agent claims a slot for a new client of its.
    pub(crate) fn join_by_agent(&self, machine: usize) -> Option<usize> {
        let agent =
            self.any(|process| process.machine == machine && process.device == Device::Agent)?;
        let client = self.start(machine, Device::AgentClient, None);
        client.agent.set(Some(agent.pid()));
        let prover = Prover::Agent(self.ivposition(&agent).into());
        self.run(&agent, || {
            let region = &agent.region;
            *self.shared.law.claiming_for.borrow_mut() = Some(client.life.clone());
            let slot = region.unclaimed().find_map(|index| region.claim_slot(index, prover));
            slot.iter().for_each(|slot| self.seat(&client, *slot));
            // Its end may have come before: the connection tells.
            if let Some(slot) = slot.filter(|_| !client.life.alive.get()) {
                agent.ended_slots.borrow_mut().push(slot);
            }
        });
        if client.slot.get().is_none() {
            self.kill(&client);
            return None;
        }
        if client.life.alive.get() {
            self.run(&client, || {
                self.look_at_all(&client);
                self.say_who(&client, client.slot.get().expect("claimed"));
            })?;
        }
        Some(client.pid())
    }

    /// The agent takes back what its clients that have ended had.
    pub(crate) fn serve_as_agent(&self, agent: &Rc<Process>) {
        if self.lacks(Rule::EndOfConnection) {
            let client = self.any(|process| process.agent.get() == Some(agent.pid()));
            let slot = client.and_then(|client| client.slot.get());
            agent.ended_slots.borrow_mut().extend(slot);
        }
        let Some(slot) = agent.ended_slots.borrow_mut().pop() else { return };
        self.run(agent, || {
            self.shared.law.proof.set("agent");
            agent.region.mark_dead(slot);
            self.shared.law.proof.set("other");
            agent.region.reclaim(slot);
        });
    }

    /// Starts an ivshmem server, if there is none.
    pub(crate) fn start_server(&self) {
        if self.server.borrow().is_some() {
            return;
        }
        let is_only_one = self.living.borrow().is_empty()
            && self.machines.borrow().iter().skip(1).all(|machine| !machine.is_on.get());
        let server = self.start(0, Device::Server, None);
        *self.server.borrow_mut() = Some(server.clone());
        if !self.kind.marks {
            return;
        }
        self.run(&server, || {
            let region = &server.region;
            let locks = self.locks(&server);
            assert_eq!(locks.try_lock(region.marking_server_offset()), Ok(true));
            if is_only_one {
                self.shared.law.proof.set("anew");
                for (at, prover) in region.claimed() {
                    if region.ivposition_of(at, prover).is_some() {
                        region.mark_dead(at);
                        region.reclaim(at);
                    }
                }
                self.shared.law.proof.set("other");
                region.set_ids_given(0);
            }
            region.set_marking_server(1.try_into().unwrap());
            if !self.lacks(Rule::IdsOnce) {
                server.first_id.set(region.ids_given());
            }
        });
    }

    /// The ivshmem server takes back what clients that have ended had; then their ids are free.
    pub(crate) fn serve(&self) {
        let Some(server) = self.server.borrow().clone() else { return };
        let Some(id) = server.ended_ids.borrow().last().copied() else { return };
        if !self.can_run(&server) {
            return;
        }
        let served = self.run(&server, || {
            let region = &server.region;
            if !self.kind.marks {
                return;
            }
            self.shared.law.proof.set("left");
            for (at, prover) in region.claimed() {
                if region.ivposition_of(at, prover) == Some(id) {
                    region.mark_dead(at);
                    region.reclaim(at);
                }
            }
            self.shared.law.proof.set("other");
            let is_last = server.ended_ids.borrow().len() == 1;
            if is_last && server.clients.borrow().is_empty() {
                region.set_ids_given(server.first_id.get());
            }
        });
        if served.is_some() {
            let mut ended = server.ended_ids.borrow_mut();
            ended.retain(|ended| *ended != id);
        }
    }

    /// A new client of the ivshmem server: that one's pid, and the client's id.
    pub(crate) fn connect(&self) -> Option<(usize, u16)> {
        let server = self.server.borrow().clone()?;
        if !self.can_run(&server) {
            return None;
        }
        let id = self.run(&server, || {
            let region = &server.region;
            let named: BTreeSet<u16> = match self.kind.marks {
                true => region
                    .slots()
                    .filter_map(|(_, state)| match state {
                        SlotState::Live { at, prover } => region.ivposition_of(at, prover),
                        _ => None,
                    })
                    .collect(),
                false => BTreeSet::new(),
            };
            let is_free = |id: &u16| {
                !server.clients.borrow().contains(id)
                    && (!server.ended_ids.borrow().contains(id) && !named.contains(id)
                        || self.lacks(Rule::MarkBeforeId))
            };
            let first = u16::try_from(server.first_id.get()).ok()?;
            let id = (first..=u16::MAX).find(is_free)?;
            if self.kind.marks {
                region.set_ids_given(region.ids_given().max(u32::from(id) + 1));
            }
            server.clients.borrow_mut().insert(id);
            Some(id)
        })?;
        Some((server.pid(), id?))
    }

    /// Starts a guest.
    pub(crate) fn start_guest(&self) -> Option<usize> {
        let (server, id) = self.connect()?;
        let number = self.machines.borrow().len() as u128 + 1000;
        let uuid = if self.random.below(3) == 0 { 0 } else { number };
        let guest = self.add_machine(uuid, Some(id), Some(server));
        if self.random.below(4) == 0 {
            // Began as a copy of another, and goes on with that one's boot. Where ids are given again
            // that must not be one with the same id.
            let machines = self.machines.borrow();
            let boot = machines[1 + self.random.below(machines.len() - 1)].boot.get();
            let is_like =
                |other: &Rc<Machine>| other.boot.get() == boot && other.ivposition == Some(id);
            if !machines.iter().any(is_like) {
                machines[guest].boot.set(boot);
            }
        }
        Some(guest)
    }
}
