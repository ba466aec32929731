//! An ivshmem server: hands a region, ids and eventfds to virtual machines and host processes.
//!
//! It speaks the protocol of QEMU's own (`docs/specs/ivshmem-spec.rst`), so any QEMU with an
//! `ivshmem-doorbell` device and any `host:` device can be its client. What it promises beyond
//! that one:
//!
//! * **It says who is dead.** When a client's socket ends, everything that names the client's id
//!   as its prover is marked dead and taken back in the region; then the others' vector 0 is
//!   notified; only then the id can be given out again. The region says that such a server
//!   is there for as long as it is (`ivsmc_proto::marker`).
//! * **No client holds up another.** Nothing waits for a client. One that does not read is only
//!   behind: it costs a bounded number of descriptors in flight and a few bytes for each id
//!   (`outbox.rs`), and gets what still matters when it reads again.
//!   Eventfds are shared with clients, who may fill them and make them wait: it never waits for one
//!   (`EventFd::notify_shared`).
//! * **No client is told that an id left**, and an id keeps its eventfds: QEMU's device would not survive
//!   that the id came back (`ids.rs`). That is where it departs from QEMU's specification.
//! * **Memory is there.** The region is reserved whole; a memfd is sealed, so that no client can
//!   take it away from under another.
//!
//! ```text
//!   clients --connect--> Socket --accept--> Client --Outbox--> version, id, region, vectors ...
//!                                              |
//!                                     its end  +--> Memory: mark dead, reclaim --> other Outboxes
//! ```
//!
//! One thread, the caller's of [`Server::serve`], does all of it.

mod client;
mod ids;
mod memory;
mod options;
mod outbox;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use ivsmc_shm::fd::Fd;
use ivsmc_shm::net;
use ivsmc_shm::poll::{self, EpollEvent, EventFd};

use self::client::{Client, EventFds};
use self::ids::Ids;
use self::memory::Memory;
use self::outbox::Outbox;
use crate::device::Kind;
use crate::host::{Host, Timeout};
use crate::reactor::lock;
use crate::socket::{descriptors_ended, Daemon, Retry, Serving, Socket, Stop};
use crate::Result;

pub use self::ids::IdOrder;
pub use self::memory::Backing;
pub use self::options::ServerOptions;
pub use self::status::{ClientStatus, Event, Status};

/// An ivshmem server: listening, and handing out its region while [`Server::serve`] runs.
///
/// Dropping it ends it: the socket's name goes, clients see the end of their connections and keep
/// the region and each other. In a forked child it does nothing.
#[derive(Debug)]
pub struct Server {
    options: ServerOptions,
    serving: Serving,
    memory: Memory,
    state: Mutex<State>,
}

/// What changes while serving.
#[derive(Debug)]
struct State {
    clients: BTreeMap<u16, Client>,
    /// Of those ids, and of all that were given out before.
    eventfds: EventFds,
    ids: Ids,
    /// From 1. The key of a client in the epoll is `serial << 16 | id`, so of no other descriptor.
    next_serial: u64,
    retry: Retry,
    joined: u64,
    left: u64,
    refused: u64,
}

/// Ends [`Server::serve`], from any thread.
#[derive(Clone, Debug)]
pub struct ServerHandle(Stop);

impl ServerHandle {
    /// Makes [`Server::serve`] return soon; if it does not run now, then its next call at once.
    pub fn stop(&self) {
        self.0.stop();
    }
}

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
    /// Makes the region and listens; clients wait until [`Server::serve`].
    ///
    /// # Errors
    /// [`crate::Error::ApiMisuse`] for options that cannot be; [`crate::Error::Device`] if the path or the
    /// memory cannot be had, [`crate::Error::Region`] if the file holds something else.
    pub fn new(options: ServerOptions) -> Result<Self> {
        options.judge()?;
        // The socket first: of the two it is the one that is often refused, and leaves nothing.
        let socket = Socket::bind(Kind::Host, &options.path, options.mode, None)?;
        let memory = Memory::new(&options.backing)?;
        let ids = Ids::new(options.ids, memory.first_id());
        Ok(Self {
            serving: Serving::new(socket)?,
            memory,
            state: Mutex::new(State {
                clients: BTreeMap::new(),
                eventfds: EventFds::new(),
                ids,
                next_serial: 1,
                retry: Retry::default(),
                joined: 0,
                left: 0,
                refused: 0,
            }),
            options,
        })
    }

    /// Ends [`Server::serve`] from elsewhere.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle(self.serving.stop())
    }

    /// Where clients connect.
    pub fn path(&self) -> &Path {
        self.serving.path()
    }

    /// Serves until [`ServerHandle::stop`], and tells `on_event` what happens.
    ///
    /// Clients stay connected when it returns, and are served on when it is called again.
    ///
    /// # Errors
    /// Whatever [`Host::interrupted`] gives after a signal; [`crate::Error::ApiMisuse`] if another thread
    /// is serving, [`crate::Error::Forked`] in a forked child, [`crate::Error::Os`] if waiting fails.
    pub fn serve(&self, host: &impl Host, on_event: impl FnMut(Event)) -> Result<()> {
        self.serve_for(Timeout::Never, host, on_event)
    }

    /// As [`Server::serve`], but returns after `time` too: at once, having done what there is to
    /// do, for [`Timeout::NonBlocking`].
    ///
    /// # Errors
    /// Those of [`Server::serve`]; time that runs out is none.
    pub fn serve_for(
        &self,
        time: Timeout,
        host: &impl Host,
        on_event: impl FnMut(Event),
    ) -> Result<()> {
        self.serving.run(self, time, host, on_event)
    }

    /// What there is now.
    ///
    /// # Errors
    /// [`crate::Error::Forked`] in a forked child.
    pub fn status(&self) -> Result<Status> {
        self.serving.judge_process()?;
        let state = lock(&self.state);
        let region = self.memory.region();
        let held: BTreeSet<u16> =
            self.memory.named_ids().filter(|id| !state.clients.contains_key(id)).collect();
        Ok(Status {
            path: self.path().to_owned(),
            file: match &self.options.backing {
                Backing::Memfd { .. } => None,
                Backing::File { path, .. } => Some(path.clone()),
            },
            uuid: region.uuid(),
            size: region.geometry().size(),
            vectors: self.options.vectors,
            clients: state
                .clients
                .iter()
                .map(|(&id, client)| ClientStatus {
                    id,
                    pid: client.credentials.map(|who| who.pid),
                    uid: client.credentials.map(|who| who.uid),
                    age: client.since.elapsed(),
                    behind: client.outbox.len(),
                })
                .collect(),
            held_ids: held.into_iter().collect(),
            joined: state.joined,
            left: state.left,
            refused: state.refused,
        })
    }

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
