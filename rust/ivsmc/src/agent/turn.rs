//! One turn of the loop that serves an agent's clients.

use std::time::Instant;

use ivsmc_proto::failpoint::reached;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::poll::{self, EpollEvent};

use super::client::Client;
use super::{Agent, Event, State, FIRST_VECTOR, LAST_VECTOR};
use crate::reactor::lock;
use crate::socket::Daemon;

impl Daemon for Agent {
    type Event = Event;
    const NAME: &'static str = "agent";

    fn next_look(&self) -> Option<Instant> {
        let state = lock(&self.state);
        let late = state.newcomers.first_key_value().map(|(_, newcomer)| newcomer.until);
        state.retry.at().into_iter().chain(late).min()
    }

    fn turn<'a>(&self, ready: impl Iterator<Item = &'a EpollEvent>, events: &mut Vec<Event>) {
        let state = &mut *lock(&self.state);
        for event in ready {
            match event.key() {
                FIRST_VECTOR => state.vectors.relay_first(),
                LAST_VECTOR => state.vectors.relay_last(),
                key if state.clients.contains_key(&key) => {
                    self.client_ready(state, key, event.events(), events);
                }
                key => self.hear(state, key, events),
            }
        }
        let now = Instant::now();
        self.send_away_late(state, now, events);
        if state.retry.is_due(now) {
            self.flush_all(state);
        }
    }

    fn meet(&self, arrived: Result<Fd, String>, events: &mut Vec<Event>) {
        let state = &mut *lock(&self.state);
        if let Err(reason) = arrived.and_then(|socket| self.greet(state, socket, events)) {
            state.refuse(reason, events);
        }
    }

    fn paused(reason: String) -> Event {
        Event::Paused { reason }
    }
}

impl Agent {
    /// A client has read, or has ended.
    fn client_ready(&self, state: &mut State, key: u64, found: u32, events: &mut Vec<Event>) {
        if found & (poll::HUP | poll::ERR) != 0 {
            return self.leave(state, key, events);
        }
        let Some(client) = state.clients.get_mut(&key) else { return };
        state.retry.note(client.flush(self.device.descriptor()));
    }

    /// Takes the client `key`, whose connection has ended, out.
    fn leave(&self, state: &mut State, key: u64, events: &mut Vec<Event>) {
        let Some(client) = state.clients.remove(&key) else { return };
        // Closing would do, were the socket not shared with a child that is being forked.
        let _ = self.serving.epoll().remove(&client.socket);
        let Client { who, slot, .. } = client;
        // Before its vector can be given to another: what it held in the region is nobody's.
        let died = self.slots.take_back(slot);
        reached("agent.taken_back");
        state.vectors.take_back(&*self.device, key);
        state.left += 1;
        if died {
            state.died += 1;
            // Sessions on other machines see their TCP connections end, as those here do.
            state.vectors.notify_departures();
        }
        events.push(if died {
            Event::Died { who, slot: slot.to_string() }
        } else {
            Event::Left { who }
        });
    }

    pub(super) fn flush_all(&self, state: &mut State) {
        for client in state.clients.values_mut() {
            state.retry.note(client.flush(self.device.descriptor()));
        }
    }
}

impl State {
    pub(super) fn refuse(&mut self, reason: String, events: &mut Vec<Event>) {
        self.refused += 1;
        events.push(Event::Refused { reason });
    }
}
