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
//! * **It survives its own end**, where somebody keeps its descriptors ([`Holder`]): the next one goes on
//!   with the same region, ids, eventfds and connections. Whatever it does is noted first (`ledger.rs`), so
//!   that it may be killed between any two steps. A connection is lost only if it is killed just
//!   between accepting it and having it kept, when its client has been told nothing.
//!
//! ```text
//!   clients --connect--> Socket --accept--> Client --Outbox--> version, id, region, vectors ...
//!                                              |
//!                                     its end  +--> Memory: mark dead, reclaim --> other Outboxes
//! ```
//!
//! One thread, the caller's of [`Server::serve`], does all of it.
//!
//! | step | a kill after it leaves | and the next one |
//! | --- | --- | --- |
//! | accept a newcomer | a connection that ends | (a `host:` client connects again) |
//! | have its connection kept | one that is in no entry of the ledger | takes it in |
//! | have the eventfds of its id kept | some or all of them | completes them |
//! | say in the region that the id is given | an id that was not | gives it |
//! | its entry in the ledger | a client that was told nothing | tells it, and the others |
//! | a message | the message and the note of it (`ledger.rs`), or neither | goes on behind it |
//! | a client ends: its slots are dead, others notified | an ended connection | does it again |
//! | its entry is taken out of the ledger | a connection of nobody, ended | has it kept no longer |

mod client;
mod holder;
mod ids;
mod ledger;
mod membership;
mod memory;
mod options;
mod outbox;
mod start;
mod state;
mod status;
mod turn;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use self::holder::Name;
use self::ids::Ids;
use self::memory::Memory;
use self::start::Start;
use self::state::State;
use crate::host::{Host, Timeout};
use crate::reactor::lock;
use crate::socket::{Retry, Serving, Stop};
use crate::Result;

pub use self::holder::Holder;
pub use self::ids::IdOrder;
pub use self::memory::Backing;
pub use self::options::ServerOptions;
pub use self::status::{ClientStatus, Event, Status};

/// An ivshmem server: listening, and handing out its region while [`Server::serve`] runs.
///
/// Dropping it ends it: the socket's name goes, clients see the end of their connections and keep
/// the region and each other; unless it was [left to its holder](Server::leave_to_holder). In a forked
/// child it does nothing.
#[derive(Debug)]
pub struct Server {
    options: ServerOptions,
    serving: Serving,
    memory: Memory,
    state: Mutex<State>,
    /// A successor goes on.
    is_left: AtomicBool,
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

impl Server {
    /// Makes the region and listens; clients wait until [`Server::serve`].
    ///
    /// # Errors
    /// [`crate::Error::ApiMisuse`] for options that cannot be; [`crate::Error::Device`] if the path or the
    /// memory cannot be had, [`crate::Error::Region`] if the file holds something else.
    pub fn new(options: ServerOptions) -> Result<Self> {
        Self::start(options, None)
    }

    /// As [`Server::new`], and has `holder` keep what a successor needs. If it holds what an ivshmem
    /// server before this one left, goes on with that: whatever in `options` is different cannot be
    /// taken then ([`Event::Unlike`]), but for who may join.
    ///
    /// # Errors
    /// Those of [`Server::new`]; [`crate::Error::Os`] if the holder does not do its part.
    pub fn held_by(options: ServerOptions, holder: Holder) -> Result<Self> {
        Self::start(options, Some(holder))
    }

    fn start(mut options: ServerOptions, holder: Option<Holder>) -> Result<Self> {
        options.judge()?;
        let mut start = Start::new(&mut options, holder)?;
        let eventfds = start.complete_eventfds(options.vectors)?;
        let Start { socket, memory, ledger, holder, clients, lost, newcomers, events, .. } = start;
        let (next_serial, is_resumed) = (start.last_serial + 1, start.is_resumed);
        let server = Self {
            serving: Serving::new(socket)?,
            state: Mutex::new(State {
                clients: BTreeMap::new(),
                eventfds,
                begun: BTreeMap::new(),
                ids: Ids::new(options.ids, memory.first_id()),
                lost,
                ledger,
                holder,
                newcomers,
                next_serial,
                events,
                retry: Retry::default(),
                joined: 0,
                left: 0,
                refused: 0,
            }),
            memory,
            is_left: AtomicBool::new(is_resumed),
            options,
        };
        server.resume(clients)?;
        if let Some(holder) = &lock(&server.state).holder {
            holder.ready()?;
        }
        server.set_left(false);
        Ok(server)
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

    /// From now on its drop ends nothing: a successor goes on with what the holder keeps. False if
    /// there is no holder.
    pub fn leave_to_holder(&self) -> bool {
        let state = lock(&self.state);
        if state.holder.as_ref().is_none_or(|holder| holder.stopping().is_err()) {
            return false;
        }
        self.set_left(true);
        true
    }

    /// Whether its drop ends nothing. So it is until it has started where one before it was broken off:
    /// if it cannot, the next attempt finds everything as it was.
    fn set_left(&self, is_left: bool) {
        self.serving.socket().set_left(is_left);
        self.memory.set_left(is_left);
        self.is_left.store(is_left, Ordering::Relaxed);
    }

    /// What there is now.
    ///
    /// # Errors
    /// [`crate::Error::Forked`] in a forked child.
    pub fn status(&self) -> Result<Status> {
        self.serving.judge_process()?;
        let state = lock(&self.state);
        let region = self.memory.region();
        let held: BTreeSet<u16> = self
            .memory
            .named_ids()
            .chain(state.lost.iter().copied())
            .filter(|id| !state.clients.contains_key(id))
            .collect();
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
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.serving.judge_process().is_err() || *self.is_left.get_mut() {
            return;
        }
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(holder) = &mut state.holder else { return };
        let vectors = state.eventfds.iter().chain(&state.begun).flat_map(|(&id, all)| {
            (0..).zip(all).map(move |(vector, _)| Name::Vector { id, vector })
        });
        // The ledger first: without it nobody goes on with the rest.
        let names = [Name::Ledger, Name::Memory, Name::Listener]
            .into_iter()
            .chain(state.clients.values().map(|client| Name::Client { serial: client.serial }))
            .chain(state.newcomers.iter().map(|&(serial, _)| Name::Client { serial }))
            .chain(vectors);
        for name in names {
            if holder.drop(name).is_err() {
                return;
            }
        }
    }
}
