//! One turn of the loop that serves an ivshmem server's clients.

use std::collections::BTreeSet;
use std::io;
use std::time::Instant;

use ivsmc_proto::failpoint::reached;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net;
use ivsmc_shm::poll::{self, EpollEvent, EventFd};

use super::client::{Client, EventFds};
use super::outbox::Outbox;
use super::{Event, Server, State};
use crate::reactor::lock;
use crate::socket::{descriptors_ended, Daemon};

impl Daemon for Server {
    type Event = Event;
    const NAME: &'static str = "ivshmem server";

    fn next_look(&self) -> Option<Instant> {
        lock(&self.state).retry.at()
    }

    fn turn<'a>(&self, ready: impl Iterator<Item = &'a EpollEvent>, events: &mut Vec<Event>) {
        let state = &mut *lock(&self.state);
        for event in ready {
            self.client_ready(state, event.key(), event.events(), events);
        }
        if state.retry.is_due(Instant::now()) {
            self.flush_all(state);
        }
    }

    fn meet(&self, arrived: Result<Fd, String>, events: &mut Vec<Event>) {
        let state = &mut *lock(&self.state);
        if let Err(reason) = arrived.and_then(|socket| self.join(state, socket, events)) {
            state.refused += 1;
            events.push(Event::Refused { reason });
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
            self.leave(state, id, events);
        } else {
            state.retry.note(client.flush(self.memory.shared(), &state.eventfds));
        }
    }

    /// Takes the client `id`, whose socket has ended, out.
    fn leave(&self, state: &mut State, id: u16, events: &mut Vec<Event>) {
        let Some(client) = state.clients.remove(&id) else { return };
        // Closing would do, were the socket not shared with a child that is being forked.
        let _ = self.serving.epoll().remove(&client.socket);
        drop(client);
        // Before anybody can be told or be given this id: what it held in the region is nobody's.
        let slots = self.memory.mark_leaver(id);
        reached("server.taken_back");
        for other in state.clients.values_mut() {
            other.outbox.left(id);
        }
        if slots > 0 {
            for other in state.clients.keys() {
                // Whoever sleeps looks whether those it talks to still live. A full counter wakes too.
                let vectors = state.eventfds.get(other);
                let _ = vectors.and_then(|all| all.first()).map(EventFd::notify_shared);
            }
        }
        if state.clients.is_empty() {
            self.memory.all_left();
        }
        state.left += 1;
        events.push(Event::Left { id, slots });
    }

    fn flush_all(&self, state: &mut State) {
        for client in state.clients.values_mut() {
            state.retry.note(client.flush(self.memory.shared(), &state.eventfds));
        }
    }

    /// Takes a newcomer in, or says why it cannot be.
    fn join(&self, state: &mut State, socket: Fd, events: &mut Vec<Event>) -> Result<(), String> {
        let count = state.clients.len();
        if count >= self.options.max_clients {
            return Err(format!("{count} clients are there, as many as may be (max_clients)"));
        }
        let named: BTreeSet<u16> = self.memory.named_ids().collect();
        let clients = &state.clients;
        let id = state.ids.take(|id| !clients.contains_key(&id) && !named.contains(&id)).ok_or(
            "all 65536 ids are taken, held by slots in the region, or were given out by an \
                 ivshmem server that ended before its clients did; stop whatever has the file \
                 (\"fuser\" tells) and start this ivshmem server again, or serve a fresh file",
        )?;
        self.prepare_eventfds(&mut state.eventfds, id)
            .map_err(|error| descriptors_ended(&error))?;
        // From before anybody can know it.
        self.memory.give(id);
        let serial = state.next_serial;
        state.next_serial += 1;
        // Edge-triggered: one event each time it reads, one when it ends. What it sends is not read.
        self.serving
            .epoll()
            .add(&socket, poll::OUT | poll::ET, serial << 16 | u64::from(id))
            .map_err(|error| format!("it cannot be watched: {error}"))?;
        let outbox = Outbox::new(id, self.options.vectors, state.clients.keys().copied());
        let credentials = net::peer_credentials(&socket).ok();
        for other in state.clients.values_mut() {
            other.outbox.joined(id);
        }
        let since = Instant::now();
        state.clients.insert(id, Client { socket, credentials, since, outbox, serial });
        self.flush_all(state);
        state.joined += 1;
        events.push(Event::Joined {
            id,
            pid: credentials.map(|who| who.pid),
            uid: credentials.map(|who| who.uid),
        });
        Ok(())
    }

    /// Has `id` have eventfds that count from 0: those it has had, if it has.
    fn prepare_eventfds(&self, eventfds: &mut EventFds, id: u16) -> io::Result<()> {
        if let Some(vectors) = eventfds.get(&id) {
            return vectors.iter().try_for_each(EventFd::renew);
        }
        let vectors =
            (0..self.options.vectors).map(|_| EventFd::new()).collect::<io::Result<_>>()?;
        eventfds.insert(id, vectors);
        Ok(())
    }
}
