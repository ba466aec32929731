//! What accepts for a listener in one process.
//!
//! A thread inside `accept` takes connections from the socket itself: plain ones it returns at
//! once, those with an intent go to the background ([`Handshake`]) and come back as sessions. While
//! no thread is inside, the background thread takes them, once this process has begun to accept.
//! What is in hand (shaking hands, or a session nobody has fetched) is limited.

mod background;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ivsmc_proto::clc::{Eid, Hostname};
use ivsmc_proto::directory::ListenerEntry;
use ivsmc_proto::host::Endpoint;
use ivsmc_proto::intent::{IntentKey, IntentState};
use ivsmc_shm::fd::Fd;
use ivsmc_shm::poll::{self, Epoll, EventFd, PollFd};
use ivsmc_shm::{fork, net};

use crate::accept::{plain_client, Announcement, Handshake};
use crate::attachment::Attachment;
use crate::connect::Require;
use crate::fallback::Fallback;
use crate::handshake;
use crate::host::{Deadline, Host, Timeout};
use crate::listen::Listening;
use crate::reactor::{lock, Key, Reactor};
use crate::runtime::{Lease, Runtime};
use crate::session::Session;
use crate::setup::{Regions, Setup};
use crate::{Error, Result};

use background::Background;

/// The background begins to take connections this long after the last thread has left `accept`, so
/// that a thread that accepts in a loop pays nothing for it.
const TAKE_OVER: Duration = Duration::from_millis(2);

/// Slow clients that a process shakes hands with at most, where others accept from the same socket:
/// when they come to an end they wait for this process, and no other.
const SLOW: usize = 3;

/// Time between two looks whether there is room again.
const FULL: Duration = Duration::from_millis(10);

/// Time between two looks at the deadlines of handshakes.
const SWEEP: Duration = Duration::from_millis(100);

/// Key of the listening socket, and of the event of finished handshakes, in the descriptor that
/// applications wait on; they never see it.
const ANY_KEY: u64 = 0;

/// A finished connection, or why it may not be handed out.
pub(crate) type Accepted = Result<(Session, SocketAddr)>;

/// What accepts for a listener in one process.
pub(crate) struct Acceptor {
    generation: u32,
    /// Forks of this process when it was made.
    forks: u32,
    listening: Listening,
    regions: Vec<Arc<Attachment>>,
    region_names: String,
    /// Why there is no region, if there is none: this end's reason for every connection.
    without: Option<Fallback>,
    hostname: Hostname,
    size_class: u8,
    lease: Lease,
    /// Readable while `State::ready` has something.
    ready: EventFd,
    /// Readable once it is closed.
    closed: EventFd,
    state: Mutex<State>,
    /// Held by the background while it has a connection that is not in `State` yet; taken before
    /// `state`.
    taking: Mutex<()>,
}

struct State {
    /// `None` once closed.
    socket: Option<Arc<OwnedFd>>,
    key: Option<Key>,
    entries: Vec<(Arc<Attachment>, ListenerEntry)>,
    ready: VecDeque<Accepted>,
    shaking: HashMap<Key, Arc<Handshake>>,
    /// Threads waiting inside `accept`.
    inside: usize,
    /// Forks of this process when it last began to accept, or accepted; `None` before.
    accepting: Option<u32>,
    /// The background watches the socket.
    watching: bool,
    /// It must not before the timer has run out.
    paused: bool,
    /// It has left a connection to other processes for a while, or need not.
    yielded: bool,
    /// When the deadlines of handshakes are next looked at.
    sweep: Option<Instant>,
    /// The descriptor applications wait on, and whether the socket is in it.
    readiness: Option<(Arc<Epoll>, bool)>,
    accepted_smc: u64,
    accepted_tcp: u64,
}

/// Counters of a listener in one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListenerStats {
    /// Sessions on shared memory so far.
    pub accepted_smc: u64,
    /// Sessions on TCP so far.
    pub accepted_tcp: u64,
    /// Connections shaking hands now.
    pub handshakes: usize,
    /// Sessions waiting to be accepted now.
    pub ready: usize,
}

impl Acceptor {
    /// Registers the listener in every region of this process.
    pub(crate) fn start(socket: Arc<OwnedFd>, listening: Listening) -> Result<Arc<Self>> {
        let setup = Setup::current()?;
        let lease = Runtime::current()?.lease()?;
        let options = &listening.options;
        let regions = Regions::open(&lease, options.device.as_deref())?;
        if regions.attachments.is_empty() && options.require == Require::Smc {
            return Err(Error::Required(Box::new(regions.fallback())));
        }
        let (ready, closed) = (EventFd::new()?, EventFd::new()?);
        let mut entries = Vec::new();
        for attachment in &regions.attachments {
            attachment.refresh_addresses();
            let entry = attachment.region().register_listener(
                attachment.me(),
                listening.bound,
                listening.local.port(),
            );
            // In a full directory it is not found: its clients use plain TCP.
            entries.extend(entry.map(|entry| (Arc::clone(attachment), entry)));
        }
        let acceptor = Arc::new(Self {
            generation: fork::generation(),
            forks: fork::count(),
            region_names: regions.names(),
            without: regions.attachments.is_empty().then(|| regions.fallback()),
            regions: regions.attachments,
            hostname: setup.hostname(),
            size_class: handshake::size_class(options.buffer),
            ready,
            closed,
            state: Mutex::new(State {
                socket: Some(socket),
                key: None,
                entries,
                ready: VecDeque::new(),
                shaking: HashMap::new(),
                inside: 0,
                accepting: None,
                watching: false,
                paused: false,
                yielded: false,
                sweep: None,
                readiness: None,
                accepted_smc: 0,
                accepted_tcp: 0,
            }),
            taking: Mutex::default(),
            lease,
            listening,
        });
        let key = acceptor.reactor().register(Arc::new(Background(Arc::clone(&acceptor))));
        lock(&acceptor.state).key = Some(key);
        Ok(acceptor)
    }

    pub(crate) fn port(&self) -> u16 {
        self.listening.local.port()
    }

    /// Whether a child that was forked since may accept from the same socket.
    pub(crate) fn has_heirs(&self) -> bool {
        fork::count() != self.forks
    }

    pub(crate) fn lease(&self) -> &Lease {
        &self.lease
    }

    pub(crate) fn reactor(&self) -> &Arc<Reactor> {
        self.lease.reactor()
    }

    pub(crate) fn attachments(&self) -> &[Arc<Attachment>] {
        &self.regions
    }

    /// The names of the regions, for a fallback's sentence.
    pub(crate) fn regions(&self) -> &str {
        &self.region_names
    }

    pub(crate) fn hostname(&self) -> Hostname {
        self.hostname
    }

    pub(crate) fn size_class(&self) -> u8 {
        self.size_class
    }

    pub(crate) fn eids(&self) -> Result<Vec<Eid>> {
        handshake::own_eids(self.listening.options.eid.as_deref())
    }

    pub(crate) fn stats(&self) -> ListenerStats {
        let state = lock(&self.state);
        ListenerStats {
            accepted_smc: state.accepted_smc,
            accepted_tcp: state.accepted_tcp,
            handshakes: state.shaking.len(),
            ready: state.ready.len(),
        }
    }

    /// Has the background take connections while no thread is inside `accept`.
    pub(crate) fn begin(&self) {
        let mut state = lock(&self.state);
        state.accepting = Some(fork::count());
        self.settle(&mut state);
    }

    /// As [`Acceptor::begin`], before this process connects here.
    pub(crate) fn begin_for_itself(&self) {
        let mut state = lock(&self.state);
        state.accepting = Some(fork::count());
        state.yielded = true;
        self.settle(&mut state);
    }

    pub(crate) fn accept(self: &Arc<Self>, timeout: Timeout, host: &impl Host) -> Accepted {
        if timeout == Timeout::NonBlocking {
            self.begin();
            return host.blocking(|| self.next(false))?.ok_or(Error::WouldBlock);
        }
        let deadline = timeout.deadline();
        let _inside = Inside::enter(self);
        loop {
            match host.blocking(|| self.wait(deadline)) {
                Err(error) if error.errno() == Error::Interrupted.errno() => {
                    host.interrupted()?;
                    // Clients that announce themselves and get no further end no wait.
                    deadline.left()?;
                }
                other => return other,
            }
        }
    }

    fn wait(self: &Arc<Self>, deadline: Deadline) -> Accepted {
        loop {
            if let Some(found) = self.next(true)? {
                return Ok(found);
            }
            let (socket, room) = {
                let state = lock(&self.state);
                let socket = state.socket.clone().ok_or(Error::Closed)?;
                (socket, self.has_room(&state))
            };
            let mut fds = [
                PollFd::new(&self.ready, poll::IN),
                PollFd::new(&self.closed, poll::IN),
                PollFd::new(&*socket, poll::IN),
            ];
            let left = deadline.left()?;
            // No notice comes of a handshake that ends without a connection, and makes room.
            let (watched, left) = if room {
                (&mut fds[..], left)
            } else {
                (&mut fds[..2], Some(left.map_or(FULL, |left| left.min(FULL))))
            };
            if poll::poll(watched, left)? == 0 {
                deadline.left()?;
            }
        }
    }

    /// The next connection that can be handed out now; or a moment later, if the thread `waits`.
    fn next(self: &Arc<Self>, waits: bool) -> Result<Option<(Session, SocketAddr)>> {
        loop {
            let socket = {
                let mut state = lock(&self.state);
                let socket = state.socket.clone().ok_or(Error::Closed)?;
                if let Some(found) = state.ready.pop_front() {
                    if state.ready.is_empty() {
                        self.ready.drain()?;
                    }
                    self.settle(&mut state);
                    return found.map(Some);
                }
                if !self.has_room(&state) {
                    return Ok(None);
                }
                socket
            };
            match self.take(&socket, waits)? {
                Taken::Nothing => {
                    // Where the socket was readable, the background has been faster.
                    drop(lock(&self.taking));
                    if lock(&self.state).ready.is_empty() {
                        return Ok(None);
                    }
                }
                Taken::Connection(accepted) => return accepted.map(Some),
                // A signal may have been what ended the thread's part of the handshake.
                Taken::Announced if waits => return Err(Error::Interrupted),
                Taken::Announced => {}
            }
        }
    }

    /// Takes one connection from the socket.
    fn take(self: &Arc<Self>, socket: &OwnedFd, waits: bool) -> Result<Taken> {
        let (conn, peer) = match net::accept(socket) {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return Ok(Taken::Nothing);
            }
            Err(error) => return Err(error.into()),
        };
        let Some(announcement) = self.announcement(&conn, peer) else {
            return Ok(Taken::Connection(self.plain(conn, peer, self.unannounced())));
        };
        let result = Handshake::start(self, conn, peer, announcement, waits.then_some(socket));
        Ok(result.map_or(Taken::Announced, Taken::Connection))
    }

    /// The intent of a client for the connection, in any region.
    fn announcement(&self, conn: &Fd, peer: SocketAddr) -> Option<Announcement> {
        if self.regions.is_empty() {
            return None;
        }
        let local = if self.listening.local.ip().is_unspecified() {
            net::local_addr(conn).ok()?
        } else {
            self.listening.local
        };
        let key = IntentKey { client: Endpoint::from(peer), server: Endpoint::from(local) };
        self.regions.iter().find_map(|attachment| {
            let (intent, state) = attachment.region().find_intent(&key)?;
            // Further on it is about a connection that somebody else has, or had.
            matches!(state, IntentState::Announced | IntentState::Pending)
                .then(|| Announcement { attachment: Arc::clone(attachment), intent })
        })
    }

    /// Why a connection without an intent is plain TCP.
    fn unannounced(&self) -> Fallback {
        self.without.clone().unwrap_or_else(plain_client)
    }

    /// Hands out a connection as plain TCP, if that is allowed.
    pub(crate) fn plain(&self, conn: Fd, peer: SocketAddr, fallback: Fallback) -> Accepted {
        if self.listening.options.require == Require::Smc {
            return Err(Error::Required(Box::new(fallback)));
        }
        let session = Session::tcp(conn, fallback, self.lease.clone())?;
        lock(&self.state).accepted_tcp += 1;
        Ok((session, peer))
    }

    /// Takes a handshake in; false if the listener is closed.
    pub(crate) fn begin_handshake(&self, key: Key, handshake: &Arc<Handshake>) -> bool {
        let mut state = lock(&self.state);
        if state.socket.is_none() {
            return false;
        }
        state.shaking.insert(key, Arc::clone(handshake));
        if state.sweep.is_none() {
            self.sweep_later(&mut state);
        }
        self.settle(&mut state);
        true
    }

    /// A handshake is over; returns its connection, if the listener is still open.
    pub(crate) fn end_handshake(&self, key: Key, result: Option<Accepted>) -> Option<Accepted> {
        self.end_and(key, result, |_, accepted| Some(accepted))
    }

    /// A handshake is over; its connection is for the next who accepts.
    pub(crate) fn hand_out(&self, key: Key, result: Option<Accepted>) {
        self.end_and(key, result, |state, accepted| {
            state.ready.push_back(accepted);
            // Only a full counter fails, and that wakes as well.
            let _ = self.ready.notify();
            None
        });
    }

    fn end_and(
        &self,
        key: Key,
        result: Option<Accepted>,
        deliver: impl FnOnce(&mut State, Accepted) -> Option<Accepted>,
    ) -> Option<Accepted> {
        let mut state = lock(&self.state);
        let over = state.shaking.remove(&key);
        let is_open = state.socket.is_some();
        let mut delivered = None;
        let mut refused = None;
        match result {
            Some(accepted) if is_open => {
                let is_smc = accepted.as_ref().is_ok_and(|(session, _)| session.is_smc());
                state.accepted_smc += u64::from(is_smc);
                delivered = deliver(&mut state, accepted);
            }
            other => refused = other,
        }
        self.settle(&mut state);
        drop(state);
        // Outside the lock: they close connections.
        drop(over);
        reset(refused);
        delivered
    }

    /// The descriptor applications wait on.
    pub(crate) fn readiness(&self) -> Result<Arc<Epoll>> {
        let mut state = lock(&self.state);
        if state.socket.is_none() {
            return Err(Error::Closed);
        }
        if state.readiness.is_none() {
            let epoll = Epoll::new()?;
            epoll.add(&self.ready, poll::IN, ANY_KEY)?;
            state.readiness = Some((Arc::new(epoll), false));
        }
        state.accepting = Some(fork::count());
        self.settle(&mut state);
        state.readiness.as_ref().map(|(epoll, _)| Arc::clone(epoll)).ok_or(Error::Closed)
    }

    pub(crate) fn close(&self) {
        if !fork::is_current(self.generation) {
            return;
        }
        let (socket, entries, ready, shaking, readiness, key) = {
            let mut state = lock(&self.state);
            let state = &mut *state;
            let socket = state.socket.take();
            if let (Some(socket), true) = (&socket, state.watching) {
                self.reactor().unwatch(socket);
            }
            state.watching = false;
            (
                socket,
                std::mem::take(&mut state.entries),
                std::mem::take(&mut state.ready),
                std::mem::take(&mut state.shaking),
                state.readiness.take(),
                state.key.take(),
            )
        };
        for (attachment, entry) in entries {
            attachment.region().unregister_listener(entry);
        }
        // Only a full counter fails, and that wakes as well.
        let _ = self.closed.notify();
        if let (Some(socket), Some((epoll, true))) = (&socket, &readiness) {
            // A child may still have the socket, and would keep it in there.
            let _ = epoll.remove(socket);
        }
        for handshake in shaking.into_values() {
            handshake.abort();
        }
        if let Some(key) = key {
            self.reactor().forget(key);
        }
        drop((socket, readiness));
        reset(ready);
    }

    /// Whether one more connection may be in hand. Where others accept from the same socket that is
    /// one at a time, which they could have had; but a slow client must not hold this process up.
    fn has_room(&self, state: &State) -> bool {
        if self.is_shared() {
            state.ready.is_empty()
                && state.shaking.len() < SLOW
                && state.shaking.values().all(|handshake| handshake.is_slow())
        } else {
            state.ready.len() + state.shaking.len() < self.listening.limit
        }
    }

    /// Whether other processes may accept from the same socket.
    fn is_shared(&self) -> bool {
        self.listening.shared || self.has_heirs()
    }

    /// Whether this process has begun to accept. What it did before it forked does not count: it
    /// may have left accepting to the child. An application that waits on the descriptor goes on.
    fn is_accepting(state: &State) -> bool {
        state.accepting.is_some_and(|forks| forks == fork::count() || state.readiness.is_some())
    }

    /// Makes who watches the socket follow from the state.
    fn settle(&self, state: &mut State) {
        let (Some(socket), Some(key)) = (state.socket.clone(), state.key) else { return };
        let room = self.has_room(state);
        let watch = room && Self::is_accepting(state) && state.inside == 0 && !state.paused;
        if watch != state.watching {
            if !watch {
                self.reactor().unwatch(&socket);
                state.watching = false;
            } else if self.reactor().watch(key, &socket, poll::IN).is_ok() {
                state.watching = true;
            }
        }
        if let Some((epoll, shown)) = &mut state.readiness {
            if room != *shown {
                let changed = if room {
                    epoll.add(&socket, poll::IN, ANY_KEY)
                } else {
                    epoll.remove(&socket)
                };
                *shown = if changed.is_ok() { room } else { *shown };
            }
        }
    }

    /// Whether a connection waits to be accepted.
    fn has_waiting(&self, state: &State) -> bool {
        state.socket.as_ref().is_some_and(|socket| {
            poll::poll(&mut [PollFd::new(&**socket, poll::IN)], Some(Duration::ZERO))
                .is_ok_and(|ready| ready > 0)
        })
    }

    /// Keeps the background off the socket for `time`.
    fn pause(&self, state: &mut State, time: Duration) {
        if let (false, Some(key)) = (state.paused, state.key) {
            state.paused = true;
            self.reactor().at(Instant::now() + time, key);
        }
        self.settle(state);
    }

    fn sweep_later(&self, state: &mut State) {
        state.sweep = state.key.map(|key| {
            let when = Instant::now() + SWEEP;
            self.reactor().at(when, key);
            when
        });
    }
}

/// Closes connections that nobody will accept, as the kernel does with those in its own queue.
fn reset(unaccepted: impl IntoIterator<Item = Accepted>) {
    let at_once: Vec<u8> = [1_i32, 0].into_iter().flat_map(i32::to_ne_bytes).collect();
    for (session, _) in unaccepted.into_iter().flatten() {
        // It fails where the connection is over anyway.
        let _ = session.set_option(net::SOL_SOCKET, net::SO_LINGER, &at_once);
    }
}

/// What came from the socket.
enum Taken {
    Nothing,
    Connection(Accepted),
    /// A handshake has begun.
    Announced,
}

/// A thread is inside `accept`.
struct Inside<'a>(&'a Acceptor);

impl<'a> Inside<'a> {
    fn enter(acceptor: &'a Acceptor) -> Self {
        let mut state = lock(&acceptor.state);
        state.inside += 1;
        state.accepting = Some(fork::count());
        acceptor.settle(&mut state);
        Self(acceptor)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if !fork::is_current(self.0.generation) {
            return;
        }
        let mut state = lock(&self.0.state);
        state.inside -= 1;
        if state.inside == 0 {
            self.0.pause(&mut state, TAKE_OVER);
        }
    }
}
