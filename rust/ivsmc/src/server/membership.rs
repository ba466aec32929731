//! Who comes and who goes.
//!
//! The order of the steps is that of the table in `mod.rs`: each is noted, or kept, before the next.

use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant};

use ivsmc_proto::failpoint::reached;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net;
use ivsmc_shm::poll::{self, EventFd, PollFd};

use super::client::Client;
use super::holder::Name;
use super::ledger::Entry;
use super::outbox::Outbox;
use super::state::State;
use super::{Event, Server};
use crate::reactor::lock;
use crate::socket::descriptors_ended;

impl Server {
    /// Goes on with the clients of an ivshmem server before this one.
    pub(super) fn resume(&self, clients: Vec<(Entry, Fd)>) -> io::Result<()> {
        let mut state = lock(&self.state);
        let state = &mut *state;
        let ids: BTreeSet<u16> = clients.iter().map(|(entry, _)| entry.id).collect();
        let vectors = self.options.vectors;
        for (entry, socket) in clients {
            let Entry { id, serial, age, next, told } = entry;
            self.watch(&socket, id, serial)?;
            let outbox = Outbox::resumed(id, vectors, next, told, ids.iter().copied());
            let credentials = net::peer_credentials(&socket).ok();
            let since = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
            state.clients.insert(id, Client { socket, credentials, since, outbox, serial });
        }
        // Before anybody can be given their ids.
        for id in ids {
            let has_ended = state.clients.get(&id).is_some_and(|client| has_ended(&client.socket));
            if has_ended {
                let mut events = std::mem::take(&mut state.events);
                self.leave(state, id, true, &mut events);
                state.events = events;
            }
        }
        Ok(())
    }

    /// Takes the client `id`, whose socket has ended, out. One that ended before this ivshmem server
    /// began may be marked and reclaimed already, and others not be told so.
    pub(super) fn leave(&self, state: &mut State, id: u16, before: bool, events: &mut Vec<Event>) {
        let Some(client) = state.clients.remove(&id) else { return };
        // Closing would do, were the socket not shared with a child that is being forked.
        let _ = self.serving.epoll().remove(&client.socket);
        let serial = client.serial;
        drop(client);
        // Before anybody can be told or be given this id: what it held in the region is nobody's.
        let slots = self.memory.mark_leaver(id);
        reached("server.taken_back");
        for other in state.clients.values_mut() {
            other.outbox.left(id);
        }
        if slots > 0 || before {
            for other in state.clients.keys() {
                // Whoever sleeps looks whether those it talks to still live. A full counter wakes too.
                let vectors = state.eventfds.get(other);
                let _ = vectors.and_then(|all| all.first()).map(EventFd::notify_shared);
            }
        }
        if state.clients.is_empty() && state.lost.is_empty() {
            self.memory.all_left();
        }
        // Now that nothing of it is left: the id is free.
        state.ledger.leave(id);
        state.forget(Name::Client { serial }, events);
        state.left += 1;
        events.push(Event::Left { id, slots });
    }

    /// Takes those in whose connections were kept before they were taken in.
    pub(super) fn admit_kept(&self, state: &mut State, events: &mut Vec<Event>) {
        for (serial, socket) in std::mem::take(&mut state.newcomers) {
            if has_ended(&socket) {
                // Perhaps it was a client, and all but this was done.
                state.forget(Name::Client { serial }, events);
            } else {
                self.admit(state, serial, socket, events);
            }
        }
    }

    /// Takes a newcomer in whose connection is kept, or turns it away.
    pub(super) fn admit(
        &self,
        state: &mut State,
        serial: u64,
        socket: Fd,
        events: &mut Vec<Event>,
    ) {
        if let Err(reason) = self.join(state, serial, socket, events) {
            state.forget(Name::Client { serial }, events);
            state.refuse(reason, events);
        }
    }

    /// Takes a newcomer in, or says why it cannot be.
    fn join(
        &self,
        state: &mut State,
        serial: u64,
        socket: Fd,
        events: &mut Vec<Event>,
    ) -> Result<(), String> {
        let count = state.clients.len();
        if count >= self.options.max_clients {
            return Err(format!("{count} clients are there, as many as may be (max_clients)"));
        }
        let named: BTreeSet<u16> = self.memory.named_ids().collect();
        let State { clients, lost, ids, .. } = &mut *state;
        let is_free =
            |id| !clients.contains_key(&id) && !named.contains(&id) && !lost.contains(&id);
        let id = ids.take(is_free).ok_or(
            "all 65536 ids are taken, held by slots in the region, or were given out by an \
                 ivshmem server that ended before its clients did; stop whatever has the file \
                 (\"fuser\" tells) and start this ivshmem server again, or serve a fresh file",
        )?;
        self.prepare_eventfds(state, id, events)?;
        state.ledger.reserve(id).map_err(|error| format!("no memory to note it: {error}"))?;
        // Edge-triggered: one event each time it reads, one when it ends. What it sends is not read.
        self.watch(&socket, id, serial)
            .map_err(|error| format!("it cannot be watched: {error}"))?;
        // From before anybody can know it.
        self.memory.give(id);
        state.ledger.enter(id, serial);
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

    /// Edge-triggered: one event each time a client reads, one when it ends. What it sends is not read.
    fn watch(&self, socket: &Fd, id: u16, serial: u64) -> io::Result<()> {
        self.serving.epoll().add(socket, poll::OUT | poll::ET, serial << 16 | u64::from(id))
    }

    /// Has `id` have eventfds that count from 0: those it has had, if it has.
    fn prepare_eventfds(
        &self,
        state: &mut State,
        id: u16,
        events: &mut Vec<Event>,
    ) -> Result<(), String> {
        let ended = |error: io::Error| descriptors_ended(&error);
        if let Some(vectors) = state.eventfds.get(&id) {
            return vectors.iter().try_for_each(EventFd::renew).map_err(ended);
        }
        let names: Vec<Name> =
            (0..self.options.vectors).map(|vector| Name::Vector { id, vector }).collect();
        if let Some(holder) = &state.holder {
            let kept = state.begun.get(&id).map_or(0, Vec::len);
            holder.judge_room(&names[kept..]).map_err(|error| error.to_string())?;
        }
        // A name stands for one descriptor: what the holder had taken before it failed is used again.
        let mut vectors = state.begun.remove(&id).unwrap_or_default();
        for &name in &names[vectors.len()..] {
            let kept = EventFd::new()
                .map_err(ended)
                .and_then(|eventfd| state.keep(name, &eventfd, events).map(|()| eventfd));
            match kept {
                Ok(eventfd) => vectors.push(eventfd),
                Err(reason) => {
                    state.begun.insert(id, vectors);
                    return Err(reason);
                }
            }
        }
        state.eventfds.insert(id, vectors);
        Ok(())
    }
}

/// Whether the other end of a connection is closed.
fn has_ended(socket: &Fd) -> bool {
    let mut look = [PollFd::new(socket, 0)];
    poll::poll(&mut look, Some(Duration::ZERO)).is_ok()
        && look[0].revents() & (poll::HUP | poll::ERR) != 0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    use super::super::{Backing, Holder, ServerOptions};
    use super::*;
    use crate::host::{Plain, Timeout};

    #[test]
    fn of_an_id_a_holder_that_fails_midway_never_has_two_descriptors_for_one_vector() {
        let path = std::path::Path::new("/dev/shm").join(format!("ivs-{}", std::process::id()));
        let name = format!("ivsmc-midway-{}", std::process::id());
        let far = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        far.set_nonblocking(true).unwrap();
        let near = net::unix_datagram_to(format!("@{name}").as_ref()).unwrap();
        // Room for a few messages, however long the system has queues be.
        net::set_option_int(&near, net::SOL_SOCKET, net::SO_SNDBUF, 4608).unwrap();
        let mut kept: BTreeMap<String, u32> = BTreeMap::new();
        let mut hear = || {
            let mut bytes = [0; 256];
            while let Ok((length, _)) = net::recv_with_fd(&far, &mut bytes, 0) {
                let text = std::str::from_utf8(&bytes[..length]).unwrap();
                if let Some((_, name)) = text.split_once("FDPOLL=0\nFDNAME=") {
                    *kept.entry(name.into()).or_default() += 1;
                }
            }
            kept.clone()
        };
        let holder = Holder::over(near, Duration::ZERO);
        let options = ServerOptions {
            backing: Backing::Memfd { size: 1 << 20 },
            vectors: 64,
            ..ServerOptions::new(path.clone())
        };
        let server = Server::held_by(options, holder).unwrap();
        assert_eq!(hear().len(), 3);
        // It takes some each time, and then no more for a while.
        let mut refused = 0;
        while server.status().unwrap().clients.is_empty() {
            let _client = net::unix_connect(&path).unwrap();
            server.serve_for(Timeout::NonBlocking, &Plain, |_| ()).unwrap();
            let now = server.status().unwrap().refused;
            let vectors = hear().keys().filter(|name| name.contains("vector")).count();
            assert!(vectors > 5 * refused && now <= 20, "{vectors} after {refused}");
            refused = usize::try_from(now).unwrap();
        }
        assert!(refused > 1, "{refused}");
        let all = hear();
        let vectors: Vec<_> = all.iter().filter(|(name, _)| name.contains("vector")).collect();
        assert_eq!(vectors.len(), 64);
        assert!(vectors.iter().all(|(_, count)| **count == 1), "{vectors:?}");
    }
}
