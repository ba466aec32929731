//! One turn of the loop that serves an ivshmem server's clients.

use std::time::Instant;

use ivsmc_shm::fd::Fd;
use ivsmc_shm::poll::{self, EpollEvent};

use super::holder::Name;
use super::state::State;
use super::{Event, Server};
use crate::reactor::lock;
use crate::socket::Daemon;

impl Daemon for Server {
    type Event = Event;
    const NAME: &'static str = "ivshmem server";

    fn next_look(&self) -> Option<Instant> {
        lock(&self.state).next_look()
    }

    fn turn<'a>(&self, ready: impl Iterator<Item = &'a EpollEvent>, events: &mut Vec<Event>) {
        let state = &mut *lock(&self.state);
        events.append(&mut state.events);
        for event in ready {
            self.client_ready(state, event.key(), event.events(), events);
        }
        if state.retry.is_due(Instant::now()) {
            self.flush_all(state);
        }
        // After the leavers, whose ids and descriptors may be needed.
        self.admit_kept(state, events);
    }

    fn meet(&self, arrived: Result<Fd, String>, events: &mut Vec<Event>) {
        let state = &mut *lock(&self.state);
        let serial = state.next_serial;
        let kept = arrived.and_then(|socket| {
            state.keep(Name::Client { serial }, &socket, events).map(|()| socket)
        });
        match kept {
            Ok(socket) => {
                state.next_serial += 1;
                self.admit(state, serial, socket, events);
            }
            Err(reason) => state.refuse(reason, events),
        }
    }

    fn paused(reason: String) -> Event {
        Event::Paused { reason }
    }
}

impl Server {
    /// A client has read, or has ended.
    fn client_ready(&self, state: &mut State, key: u64, found: u32, events: &mut Vec<Event>) {
        #[allow(clippy::cast_possible_truncation)] // the low 16 bits are the id
        let id = key as u16;
        let Some(client) = state.clients.get_mut(&id).filter(|client| client.serial == key >> 16)
        else {
            return;
        };
        if found & (poll::HUP | poll::ERR) != 0 {
            self.leave(state, id, false, events);
        } else {
            let shared = self.memory.shared();
            state.retry.note(client.flush(id, shared, &state.eventfds, &state.ledger));
        }
    }

    /// Sends all clients what may be sent now.
    pub(super) fn flush_all(&self, state: &mut State) {
        let shared = self.memory.shared();
        for (&id, client) in &mut state.clients {
            state.retry.note(client.flush(id, shared, &state.eventfds, &state.ledger));
        }
    }
}
