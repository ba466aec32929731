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
mod turn;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Mutex;

use self::client::{Client, EventFds};
use self::ids::Ids;
use self::memory::Memory;
use crate::device::Kind;
use crate::host::{Host, Timeout};
use crate::reactor::lock;
use crate::socket::{Retry, Serving, Socket, Stop};
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

impl Server {
    /// Makes the region and listens; clients wait until [`Server::serve`].
    ///
    /// # Errors
    /// [`crate::Error::ApiMisuse`] for options that cannot be; [`crate::Error::Device`] if the path or the
    /// memory cannot be had, [`crate::Error::Region`] if the file holds something else.
    pub fn new(options: ServerOptions) -> Result<Self> {
        options.judge()?;
        // The socket first: of the two it is the one that is often refused, and leaves nothing.
        let socket = Socket::bind(Kind::Host, &options.path, options.mode, options.group)?;
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
}
