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
mod options;
mod region;
mod status;
#[cfg(test)]
mod tests;
mod vectors;
mod vfio;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use ivsmc_proto::agent::{AgentMessage, Welcome};
use ivsmc_proto::proof::Witness;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::file;
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::poll::{self, EpollEvent};

use self::access::Access;
use self::client::{refuse, Client, Enclosed, Letter, Newcomer, Said};
use self::device::OwnedDevice;
use self::region::Slots;
use self::vectors::Vectors;
use crate::boot;
use crate::device::Kind;
use crate::host::{Host, Timeout};
use crate::reactor::lock;
use crate::socket::{descriptors_ended, Daemon, Retry, Serving, Socket, Stop, FIRST_KEY};
use crate::{Error, Result};

pub use self::options::AgentOptions;
pub(crate) use self::options::{is_socket_name, socket_name};
pub use self::status::{ClientStatus, Event, Status, Who};

/// See [`Agent::patience`].
const PATIENCE: Duration = Duration::from_secs(5);
/// Newcomers that may be about to say what they want; then the oldest goes.
const NEWCOMERS: usize = 64;

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

impl Daemon for Agent {
    type Event = Event;
    const NAME: &'static str = "agent";

    fn next_look(&self) -> Option<Instant> {
        let state = lock(&self.state);
        let late = state.newcomers.first_key_value().map(|(_, newcomer)| newcomer.until);
        state.retry.at().into_iter().chain(late).min()
    }

    fn turn<'a>(&self, ready: impl Iterator<Item = &'a EpollEvent>, events: &mut Vec<Event>) {
        let mut state = lock(&self.state);
        let state = &mut *state;
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

    fn flush_all(&self, state: &mut State) {
        for client in state.clients.values_mut() {
            state.retry.note(client.flush(self.device.descriptor()));
        }
    }

    /// Hears a newcomer, or says why not.
    fn greet(&self, state: &mut State, socket: Fd, events: &mut Vec<Event>) -> Result<(), String> {
        let who = match self.access.judge(&socket) {
            Ok(credentials) => Who::from(credentials),
            Err(reason) => {
                refuse(&socket, &reason);
                return Err(reason);
            }
        };
        if state.newcomers.len() >= NEWCOMERS {
            // Who speaks at once, as every client does, never becomes the oldest.
            if let Some((_, oldest)) = state.newcomers.pop_first() {
                let _ = self.serving.epoll().remove(&oldest.socket);
                state.refuse(format!("{} said nothing while others came", oldest.who), events);
            }
        }
        let key = state.next_key;
        state.next_key += 1;
        self.serving
            .epoll()
            .add(&socket, poll::IN, key)
            .map_err(|error| format!("it cannot be watched: {error}"))?;
        state.newcomers.insert(key, Newcomer::new(socket, who, Instant::now() + self.patience));
        // It has spoken already, as a rule.
        self.hear(state, key, events);
        Ok(())
    }

    /// Hears what the newcomer `key` says.
    fn hear(&self, state: &mut State, key: u64, events: &mut Vec<Event>) {
        let Some(newcomer) = state.newcomers.get_mut(&key) else { return };
        let said = newcomer.hear();
        if said == Said::Part {
            return;
        }
        let Some(Newcomer { socket, who, .. }) = state.newcomers.remove(&key) else { return };
        let admitted = match said {
            Said::Wrong(reason) => Err(reason),
            Said::Part | Said::Hello => self.admit(state, key, &socket),
        };
        let reason = match admitted {
            Ok(Admitted { slot, vector, outbox }) => {
                state.joined += 1;
                let is_shared = state.vectors.is_shared(key);
                events.push(Event::Joined { who, slot: slot.to_string(), vector, is_shared });
                let since = Instant::now();
                let client = Client { socket, who, since, slot, vector, outbox };
                state.clients.insert(key, client);
                return self.flush_all(state);
            }
            Err(reason) => reason,
        };
        refuse(&socket, &reason);
        let _ = self.serving.epoll().remove(&socket);
        state.refuse(format!("{who}: {reason}"), events);
    }

    /// Gives a newcomer all that a client has, or says why it cannot be.
    fn admit(&self, state: &mut State, key: u64, socket: &Fd) -> Result<Admitted, String> {
        let count = state.clients.len();
        if count >= self.options.max_clients {
            return Err(format!("{count} processes use it, as many as may (max_clients)"));
        }
        // Edge-triggered: one event each time it reads, one when it ends. What it sends is not read.
        self.serving
            .epoll()
            .modify(socket, poll::OUT | poll::ET, key)
            .map_err(|error| format!("it cannot be watched: {error}"))?;
        let (vector, bells) =
            state.vectors.give(&*self.device, key).map_err(|error| descriptors_ended(&error))?;
        let Some(slot) = self.slots.claim() else {
            state.vectors.take_back(&*self.device, key);
            let slots = self.slots.region().geometry().slots();
            return Err(format!(
                "all {slots} peer slots of its region are taken; a larger region has more of them"
            ));
        };
        let welcome = Welcome {
            ivposition: self.device.ivposition(),
            vector,
            slot,
            uuid: self.slots.region().uuid(),
            memory: self.device.memory(),
            registers: self.device.registers(),
            can_map_registers: self.device.can_map_registers(),
        };
        let eventfd = |message, eventfd| Letter::new(&message, Enclosed::EventFd(eventfd));
        let welcome = Letter::new(&AgentMessage::Welcome(welcome), Enclosed::Device);
        let outbox = [welcome, eventfd(AgentMessage::Doorbell, bells.doorbell)]
            .into_iter()
            .chain(bells.departures.map(|bell| eventfd(AgentMessage::Departures, bell)))
            .collect();
        Ok(Admitted { slot, vector, outbox })
    }

    /// Sends newcomers away whose time is over.
    fn send_away_late(&self, state: &mut State, now: Instant, events: &mut Vec<Event>) {
        // All have the same patience, so the oldest ones are first.
        while let Some(first) = state.newcomers.first_entry() {
            if first.get().until > now {
                return;
            }
            let Newcomer { socket, who, .. } = first.remove();
            let _ = self.serving.epoll().remove(&socket);
            state.refuse(
                format!("{who} has said nothing for {} s", self.patience.as_secs()),
                events,
            );
        }
    }
}

/// What a newcomer is given.
struct Admitted {
    slot: SlotRef,
    vector: u16,
    outbox: VecDeque<Letter>,
}

impl State {
    fn refuse(&mut self, reason: String, events: &mut Vec<Event>) {
        self.refused += 1;
        events.push(Event::Refused { reason });
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent").field("device", &self.name).finish_non_exhaustive()
    }
}
