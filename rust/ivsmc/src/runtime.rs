//! What a process has one of: background thread, device table, memory of missed intents.
//!
//! It lives while somebody holds a [`Lease`]; one second after the last one has gone the
//! attachments leave their regions and the thread ends, so an idle process holds nothing.
//! A forked child starts with a runtime of its own and never touches its parent's.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::{fork, net, thread};

use crate::devices::DeviceTable;
use crate::handshake;
use crate::reactor::{lock, Need, Reactor};
use crate::spin;
use crate::wait::Bells;
use crate::{Error, Result};

/// How long an unused runtime stays, so that a client connecting in a loop attaches once.
const LINGER: Duration = Duration::from_secs(1);

/// One cell for each fork generation: a child must not wait for a lock that a thread of its
/// parent held. A chain of more forks than this, each child forking the next, is refused.
static RUNTIMES: [OnceLock<Runtime>; 1024] = [const { OnceLock::new() }; 1024];

/// Everything a process has one of.
pub(crate) struct Runtime {
    state: Mutex<State>,
    devices: DeviceTable,
    misses: Mutex<HashMap<(SocketAddr, SlotRef), Miss>>,
    bells: Bells,
}

#[derive(Default)]
struct State {
    reactor: Option<Arc<Reactor>>,
    thread: Option<JoinHandle<()>>,
    leases: usize,
    unused_since: Option<Instant>,
}

struct Miss {
    in_a_row: u32,
    last: Instant,
}

/// Two misses in a row are remembered this long (DESIGN, deadlines).
const MISS_MEMORY: Duration = Duration::from_secs(10);

impl Runtime {
    /// The runtime of this process.
    pub(crate) fn current() -> Result<&'static Runtime> {
        fork::install();
        let cell = RUNTIMES.get(fork::generation() as usize).ok_or_else(|| {
            Error::ApiMisuse("too many nested forks; exec a fresh process instead".into())
        })?;
        Ok(cell.get_or_init(|| Runtime {
            state: Mutex::default(),
            devices: DeviceTable::new(),
            misses: Mutex::default(),
            bells: Bells::default(),
        }))
    }

    /// Keeps the background thread and the attachments while it lives.
    pub(crate) fn lease(&'static self) -> Result<Lease> {
        let mut state = lock(&self.state);
        let reactor = match &state.reactor {
            Some(reactor) => Arc::clone(reactor),
            None => {
                spin::judge_environment()?;
                handshake::judge_environment()?;
                let reactor = Arc::new(Reactor::new()?);
                let served = Arc::clone(&reactor);
                state.thread = Some(thread::spawn("ivsmc", move || {
                    served.run(|| self.need(&served));
                })?);
                state.reactor = Some(Arc::clone(&reactor));
                reactor
            }
        };
        state.leases += 1;
        state.unused_since = None;
        Ok(Lease { runtime: self, reactor, generation: fork::generation() })
    }

    pub(crate) fn bells(&self) -> &Bells {
        &self.bells
    }

    pub(crate) fn devices(&self) -> &DeviceTable {
        &self.devices
    }

    /// Leaves all regions and ends the background thread now, if nothing is open.
    ///
    /// Returns whether everything is released.
    pub(crate) fn release_unused(&self) -> bool {
        let busy = {
            let state = lock(&self.state);
            (state.leases > 0).then(|| state.reactor.clone()).flatten()
        };
        if let Some(reactor) = busy {
            // What was closed just now may still be in the background thread's hands.
            reactor.flush();
        }
        let (reactor, thread) = {
            let mut state = lock(&self.state);
            if state.leases > 0 {
                return false;
            }
            self.release_all();
            (state.reactor.take(), state.thread.take())
        };
        if let Some(reactor) = reactor {
            reactor.wake();
        }
        if let Some(thread) = thread {
            // It only fails if a source panicked, which was printed then.
            let _ = thread.join();
        }
        true
    }

    fn release_all(&self) {
        self.devices.detach_all();
        net::close_kept_sockets();
        self.bells.clear();
    }

    /// Asked by the background thread whenever it wakes.
    fn need(&self, mine: &Arc<Reactor>) -> Need {
        let mut state = lock(&self.state);
        if !state.reactor.as_ref().is_some_and(|current| Arc::ptr_eq(current, mine)) {
            return Need::Gone;
        }
        match state.unused_since {
            None => Need::Open,
            Some(since) if since.elapsed() < LINGER => Need::Until(since + LINGER),
            Some(_) => {
                self.release_all();
                state.reactor = None;
                Need::Gone
            }
        }
    }

    /// Whether connects to `address` at `listener` were missed twice in a row just now.
    pub(crate) fn recently_missed(&self, address: SocketAddr, listener: SlotRef) -> bool {
        lock(&self.misses)
            .get(&(address, listener))
            .is_some_and(|miss| miss.in_a_row >= 2 && miss.last.elapsed() < MISS_MEMORY)
    }

    /// Remembers how a connect with an intent ended.
    pub(crate) fn note_match(&self, address: SocketAddr, listener: SlotRef, matched: bool) {
        let mut misses = lock(&self.misses);
        if matched {
            if !misses.is_empty() {
                misses.remove(&(address, listener));
            }
            return;
        }
        misses.retain(|_, miss| miss.last.elapsed() < MISS_MEMORY);
        let miss =
            misses.entry((address, listener)).or_insert(Miss { in_a_row: 0, last: Instant::now() });
        miss.in_a_row = miss.in_a_row.saturating_add(1);
        miss.last = Instant::now();
    }
}

/// A reason for the runtime to stay; held by every session, listener and device handle.
pub(crate) struct Lease {
    runtime: &'static Runtime,
    reactor: Arc<Reactor>,
    generation: u32,
}

impl Lease {
    pub(crate) fn reactor(&self) -> &Arc<Reactor> {
        &self.reactor
    }

    pub(crate) fn runtime(&self) -> &'static Runtime {
        self.runtime
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        if fork::is_current(self.generation) {
            lock(&self.runtime.state).leases += 1;
        }
        Self {
            runtime: self.runtime,
            reactor: Arc::clone(&self.reactor),
            generation: self.generation,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !fork::is_current(self.generation) {
            return;
        }
        let now = Instant::now();
        let last = {
            let mut state = lock(&self.runtime.state);
            state.leases -= 1;
            if state.leases == 0 {
                state.unused_since = Some(now);
            }
            state.leases == 0
        };
        // Outside the lock: the background thread takes the two in the other order.
        if last {
            self.reactor.linger(now + LINGER);
        }
    }
}

/// Leaves every region and ends the background thread now, if nothing is open; returns whether
/// that is so. It happens by itself a second after the last session, listener or device closed.
pub fn release_unused() -> bool {
    Runtime::current().map_or(true, Runtime::release_unused)
}

/// Closes every session and listener of this process that is on shared memory and leaves every
/// region: what the kernel does for sockets when a process ends. To be called then; peers read
/// what was sent, and the end of the stream.
///
/// A process that ends without it looks killed to its peers: they see a reset.
pub fn close_all() {
    let Ok(runtime) = Runtime::current() else { return };
    let reactor = lock(&runtime.state).reactor.clone();
    let Some(reactor) = reactor else { return };
    reactor.end_all();
    if !runtime.release_unused() {
        runtime.devices.leave_all();
    }
}
