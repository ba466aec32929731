//! An agent: owns the ivshmem device of a guest, and lets the guest's processes use it.
//!
//! A VFIO group is opened by one process only. The agent is that process, and hands each local process
//! that connects what it needs to go on by itself: the device's descriptor (registers and memory are
//! mapped from it), a peer slot, a vector. It stands in no one's way after that:
//!
//! ```text
//!   process --hello--> Newcomer --> Client     slot (Slots), vector (Vectors)
//!              |                      |
//!              |<--- device, eventfds-+        its end: slot dead and taken back, vector free
//!
//!   doorbell out: the process's own store to the device      doorbell in: the device's own interrupt
//! ```
//!
//! What it promises:
//!
//! * **It says who is dead.** A client's connection ends with the client, however that ends; then
//!   everything it held in the region is taken back. A client that leaves properly has done so itself.
//! * **No client holds up another.** Nothing waits for a client; who connects and says nothing is sent away
//!   after a while, who does not read is only behind. What a client sends after its hello is not read, and
//!   no reason to end its connection: that would declare a living process dead.
//! * **Its own end harms nobody.** Clients keep device, slot and wired vectors. Only what needs the
//!   agent stops: the relay of a shared vector and of departures, for which sessions have their TCP
//!   connections; and newcomers. The next agent can start when the last of those clients has ended, and
//!   takes back what they left: that the group was free proves that none is alive.
//!
//! Who may use the agent's socket owns the device: one trust domain.
//!
//! One thread, the caller's of [`Agent::serve`], does all of it.

mod access;
mod client;
mod device;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod newcomer;
mod options;
mod region;
mod status;
#[cfg(test)]
pub(crate) mod tests;
mod turn;
mod vectors;
mod vfio;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use ivsmc_proto::proof::Witness;
use ivsmc_proto::region::Region;
use ivsmc_shm::file;
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::poll;

use self::access::Access;
use self::client::Client;
use self::device::OwnedDevice;
use self::newcomer::Newcomer;
use self::region::Slots;
use self::vectors::Vectors;
use crate::boot;
use crate::device::Kind;
use crate::host::{Host, Timeout};
use crate::reactor::lock;
use crate::socket::{Retry, Serving, Socket, Stop, FIRST_KEY};
use crate::{Error, Result};

pub use self::options::AgentOptions;
pub(crate) use self::options::{is_socket_name, socket_name};
pub use self::status::{ClientStatus, Event, Status, Who};

/// See [`Agent::patience`].
const PATIENCE: Duration = Duration::from_secs(5);

/// Keys of the epoll; those of connections are above.
const FIRST_VECTOR: u64 = FIRST_KEY;
const LAST_VECTOR: u64 = FIRST_KEY + 1;
const FIRST_CONNECTION: u64 = 16;

/// An agent: listening, and handing out its device while [`Agent::serve`] runs.
///
/// Dropping it ends it: the socket's name goes, clients keep what they have. In a forked child it does
/// nothing.
pub struct Agent {
    options: AgentOptions,
    /// As people name it.
    name: String,
    serving: Serving,
    access: Access,
    slots: Slots,
    state: Mutex<State>,
    /// How long a newcomer may take to say what it wants.
    patience: Duration,
    /// The last one to go.
    device: Box<dyn OwnedDevice>,
}

/// What changes while serving.
#[derive(Debug)]
struct State {
    newcomers: BTreeMap<u64, Newcomer>,
    clients: BTreeMap<u64, Client>,
    vectors: Vectors,
    /// Of the next connection; never used twice.
    next_key: u64,
    retry: Retry,
    joined: u64,
    left: u64,
    died: u64,
    refused: u64,
}

/// Ends [`Agent::serve`], from any thread.
#[derive(Clone, Debug)]
pub struct AgentHandle(Stop);

impl AgentHandle {
    /// Makes [`Agent::serve`] return soon; if it does not run now, then its next call at once.
    pub fn stop(&self) {
        self.0.stop();
    }
}

impl Agent {
    /// Takes the ivshmem device at the PCI `address`, or the only one of this machine that is bound to
    /// vfio-pci, and listens; clients wait until [`Agent::serve`].
    ///
    /// # Errors
    /// [`Error::ApiMisuse`] for options that cannot be; [`Error::Device`] if the path or the
    /// device cannot be had, [`Error::Region`] if its memory holds something else.
    pub fn new(options: AgentOptions, address: Option<&str>) -> Result<Self> {
        options.judge()?;
        // The socket first: of the two it is the one that is often refused, and leaves nothing.
        let socket = Socket::bind(Kind::Agent, &options.path, options.mode, options.group)?;
        let (name, device, mapping) = vfio::take(address)?;
        // Who opened its group has it alone until a client is given it.
        Self::over(options, socket, name, Box::new(device), mapping, true)
    }

    /// Hands out `device`, which people call `name` and whose memory is `mapping`; `is_exclusive` if nobody
    /// else can have it now.
    fn over(
        options: AgentOptions,
        socket: Socket,
        name: String,
        device: Box<dyn OwnedDevice>,
        mapping: Mapping,
        is_exclusive: bool,
    ) -> Result<Self> {
        let access = Access::of(socket.path())?;
        let region = Region::attach(mapping, file::random_u128()?)
            .map_err(|error| Error::region(name.clone(), error.to_string()))?;
        let (boot, _) = boot::here()?;
        let witness = Witness { boot, ivposition: Some(device.ivposition()), is_exclusive };
        let slots = Slots::new(region, device.ivposition(), witness);
        let vectors = Vectors::new(&*device)
            .map_err(|error| Error::device(name.clone(), format!("vector 0: {error}")))?;
        let serving = Serving::new(socket)?;
        serving.epoll().add(vectors.first(), poll::IN, FIRST_VECTOR)?;
        serving.epoll().add(vectors.last(), poll::IN, LAST_VECTOR)?;
        Ok(Self {
            options,
            name,
            serving,
            access,
            slots,
            state: Mutex::new(State {
                newcomers: BTreeMap::new(),
                clients: BTreeMap::new(),
                vectors,
                next_key: FIRST_CONNECTION,
                retry: Retry::default(),
                joined: 0,
                left: 0,
                died: 0,
                refused: 0,
            }),
            patience: PATIENCE,
            device,
        })
    }

    /// Ends [`Agent::serve`] from elsewhere.
    pub fn handle(&self) -> AgentHandle {
        AgentHandle(self.serving.stop())
    }

    /// Where clients connect.
    pub fn path(&self) -> &Path {
        self.serving.path()
    }

    /// Serves until [`AgentHandle::stop`], and tells `on_event` what happens.
    ///
    /// Clients stay connected when it returns, and are served on when it is called again.
    ///
    /// # Errors
    /// Whatever [`Host::interrupted`] gives after a signal; [`Error::ApiMisuse`] if another thread
    /// is serving, [`Error::Forked`] in a forked child, [`Error::Os`] if waiting fails.
    pub fn serve(&self, host: &impl Host, on_event: impl FnMut(Event)) -> Result<()> {
        self.serve_for(Timeout::Never, host, on_event)
    }

    /// As [`Agent::serve`], but returns after `time` too: at once, having done what there is to
    /// do, for [`Timeout::NonBlocking`].
    ///
    /// # Errors
    /// Those of [`Agent::serve`]; time that runs out is none.
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
    /// [`Error::Forked`] in a forked child.
    pub fn status(&self) -> Result<Status> {
        self.serving.judge_process()?;
        let state = lock(&self.state);
        let region = self.slots.region();
        Ok(Status {
            path: self.path().to_owned(),
            device: self.name.clone(),
            ivposition: self.device.ivposition(),
            uuid: region.uuid(),
            size: region.geometry().size(),
            vectors: self.device.vectors(),
            clients: state
                .clients
                .iter()
                .map(|(&key, client)| ClientStatus {
                    who: client.who,
                    slot: client.slot.to_string(),
                    vector: client.vector,
                    is_shared: state.vectors.is_shared(key),
                    age: client.since.elapsed(),
                })
                .collect(),
            joined: state.joined,
            left: state.left,
            died: state.died,
            refused: state.refused,
        })
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent").field("device", &self.name).finish_non_exhaustive()
    }
}
