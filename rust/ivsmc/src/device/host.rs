//! `host:/run/ivsmc/ivs0.sock`: a process of the host, or a container, as a client of an ivshmem
//! server; of any one that speaks QEMU's protocol.
//!
//! The ivshmem server sends the same open file description to all its clients, and a lock on that
//! proves nothing. So the region is opened anew through `/proc/self/fd`; where that is not allowed
//! there is no lock, and nobody but the ivshmem server can say that this client is dead.
//!
//! The connection stays open as long as the attachment lives: its end is what tells the ivshmem
//! server that this client has left, and must never come earlier. What the ivshmem server says
//! later is read by the background thread, so that it never waits for this client.
//!
//! The vectors this client is notified on come last in the welcome, in messages of their own, and
//! nothing says how many they are. As a process says in the region on which vector it is to be
//! notified, they are waited for, shortly: an ivshmem server may have none to give. One that marks
//! leavers has at least one, and as many for each; if it was killed meanwhile, they come all the same.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use ivsmc_proto::ivshmem::{ClientEvent, ClientProtocol, MESSAGE_LENGTH};
use ivsmc_proto::marker;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net::{self, Passed};
use ivsmc_shm::poll::{self, EventFd, PollFd};
use ivsmc_shm::{errno, file as files};

use super::{Backing, Doorbells, Opened, Unusable};
use crate::reactor::{lock, Key, Reactor, Source};
use crate::socket::descriptors_ended;

/// Longest wait for the ivshmem server to send the region.
const PATIENCE: Duration = Duration::from_secs(2);

/// Longest wait for the first own vector, since the last message: one that has none costs this much.
const FIRST_VECTOR: Duration = Duration::from_millis(250);

/// Longest wait for the second own vector, since the first, where no other client's show how many
/// each has. If it comes later, it is not used.
const SECOND_VECTOR: Duration = Duration::from_millis(20);

/// Own vectors that are used: for departures, and for sessions.
const OWN_VECTORS: usize = 2;

/// Messages taken in one turn of the background thread, which has others to serve.
const TURN: usize = 1024;

/// Descriptors of peers that are kept; those beyond are closed at once, and such peers are woken
/// over TCP. A process has 1,024 descriptors by default.
const KEPT: usize = 256;

/// Connects to the ivshmem server and maps its region.
pub(super) fn open(path: &Path) -> Result<Opened, Unusable> {
    open_within(path, PATIENCE)
}

/// [`open`] with another patience.
pub(super) fn open_within(path: &Path, patience: Duration) -> Result<Opened, Unusable> {
    let until = Instant::now() + patience;
    let join = || -> Result<_, Unusable> {
        let socket = connect(path, until).map_err(|error| Unusable::device(refusal(&error)))?;
        let mut hearing = Hearing::default();
        let welcomed = welcome(&socket, &mut hearing, until)?;
        Ok((socket, hearing, welcomed))
    };
    // An ivshmem server that was killed just when it accepted this client is back soon; one that takes
    // no more clients says the same twice.
    let (socket, hearing, welcomed) = match join()? {
        (.., None) => join()?,
        joined => joined,
    };
    map(socket, hearing, welcomed, until)
}

/// What [`open`] makes of the ivshmem server at the other end of `socket`, without asking it twice.
#[cfg(fuzzing)]
pub(super) fn over(socket: Fd, until: Instant) -> Result<Opened, Unusable> {
    let mut hearing = Hearing::default();
    let welcomed = welcome(&socket, &mut hearing, until)?;
    map(socket, hearing, welcomed, until)
}

/// Maps the region that came with the own id; `None` if the connection ended before.
fn map(
    socket: Fd,
    mut hearing: Hearing,
    welcomed: Option<(u16, Fd)>,
    until: Instant,
) -> Result<Opened, Unusable> {
    let Some((id, region)) = welcomed else {
        return Err(Unusable::device(
            "no ivshmem server, or one that takes no more clients: it ended the connection before \
             it sent a region",
        ));
    };
    let (fd, lockable) = match reopen(&region) {
        Ok(fd) => (fd, true),
        Err(_) => (region, false),
    };
    let status = files::status(&fd)
        .map_err(|error| Unusable::region(format!("its size cannot be told: {error}")))?;
    if !status.is_regular() {
        return Err(Unusable::region("what the ivshmem server sent as its region is not a file"));
    }
    let file_system = super::file_system(&fd)?;
    super::judge_file_system(&file_system)?;
    let (mapping, whole) = super::map(fd, &status, &file_system)?;
    hearing.await_own_vectors(&socket, until, marker::is_there(&*mapping));
    let link = Link {
        socket,
        id,
        own: std::mem::take(&mut hearing.own),
        peers: Arc::clone(&hearing.peers),
        hearing: Mutex::new(hearing),
        gone: AtomicBool::new(false),
        watched: Mutex::default(),
    };
    Ok(Opened { mapping, whole, lockable, backing: Backing::Host(Arc::new(link)) })
}

/// Connects to the listener at `path`, whose queue may be full for a while.
pub(super) fn connect(path: &Path, until: Instant) -> io::Result<Fd> {
    loop {
        match net::unix_connect_nonblocking(path) {
            // Its queue of newcomers is full.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

fn refusal(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "there is no such socket; is the ivshmem server running (\"ivsmc server\")?".to_owned()
        }
        io::ErrorKind::ConnectionRefused => "nobody listens at this path: the ivshmem server has \
             ended, or it is not a socket; start \"ivsmc server\" there"
            .to_owned(),
        io::ErrorKind::PermissionDenied => "this process has no permission to connect to this \
             socket; its owner can give it, with chmod or chgrp"
            .to_owned(),
        io::ErrorKind::WouldBlock => "the ivshmem server accepts nobody; is it stopped?".to_owned(),
        _ => format!("cannot connect to this socket: {error}"),
    }
}

/// Waits for the own id and the region; `None` if the connection ends before.
fn welcome(
    socket: &Fd,
    hearing: &mut Hearing,
    until: Instant,
) -> Result<Option<(u16, Fd)>, Unusable> {
    let mut id = None;
    loop {
        match hearing.next(socket) {
            Ok(Heard::Event(ClientEvent::OwnId(own), _)) => id = Some(own),
            Ok(Heard::Event(ClientEvent::Region, Passed::One(fd))) => {
                if let Some(id) = id {
                    return Ok(Some((id, fd)));
                }
            }
            Ok(Heard::Event(ClientEvent::Region, Passed::Lost)) => return Err(no_room()),
            Ok(Heard::Event(..)) => {}
            Ok(Heard::Nothing) => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(Unusable::device(
                        "no ivshmem server, or a stopped one: it has not sent a region in time",
                    ));
                }
                // An interrupted wait only means to look again.
                let _ = poll::poll(&mut [PollFd::new(socket, poll::IN)], Some(left));
            }
            Ok(Heard::End) => return Ok(None),
            Err(what) => return Err(Unusable::device(what)),
        }
    }
}

/// This process may not have as many descriptors open as it was sent.
pub(super) fn no_room() -> Unusable {
    Unusable::device(descriptors_ended(&errno::error(errno::EMFILE)))
}

/// The file behind `fd` through an open file description of our own.
fn reopen(fd: &Fd) -> io::Result<Fd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    Ok(Fd::from(OwnedFd::from(file)))
}

/// The connection to an ivshmem server.
pub(crate) struct Link {
    socket: Fd,
    /// What this client's own ivposition would be, were it a guest.
    id: u16,
    /// Own vectors that came with the welcome, the first of them vector 0.
    own: Vec<EventFd>,
    peers: Arc<Peers>,
    hearing: Mutex<Hearing>,
    /// The ivshmem server has ended the connection.
    gone: AtomicBool,
    watched: Mutex<Option<(Weak<Reactor>, Key)>>,
}

impl Link {
    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    /// The ivshmem server has ended the connection: newcomers go to its successor.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Has the background thread read what the ivshmem server says.
    pub(crate) fn watch(self: &Arc<Self>, reactor: &Arc<Reactor>) -> crate::Result<()> {
        let key = reactor.register(Arc::clone(self) as Arc<dyn Source>);
        *lock(&self.watched) = Some((Arc::downgrade(reactor), key));
        reactor.watch(key, &self.socket, poll::IN | poll::RDHUP)
    }

    /// Takes it away from the background thread; the connection ends with the last reference.
    pub(crate) fn close(&self) {
        if let Some((reactor, key)) = lock(&self.watched).take() {
            if let Some(reactor) = reactor.upgrade() {
                reactor.unwatch(&self.socket);
                reactor.forget(key);
            }
        }
    }
}

impl Doorbells for Link {
    fn ivposition(&self) -> u16 {
        self.id
    }

    fn own(&self) -> Option<(u16, &EventFd)> {
        let (vector, eventfd) = (0..).zip(&self.own).last()?;
        Some((vector, eventfd))
    }

    fn departures(&self) -> Option<&EventFd> {
        self.own.first().filter(|_| self.own.len() > 1)
    }

    fn notify(&self, ivposition: u16, vector: u16) -> bool {
        if ivposition == self.id {
            return self
                .own
                .get(usize::from(vector))
                .is_some_and(|own| own.notify_shared().is_ok());
        }
        // The lock is for the look-up alone: others notify, too, and the ivshmem server is listened to.
        let eventfd = {
            let peers = lock(&self.peers);
            peers.get(&ivposition).and_then(|them| them.get(usize::from(vector))).cloned()
        };
        eventfd.is_some_and(|eventfd| eventfd.notify_shared().is_ok())
    }
}

impl Source for Link {
    fn ready(&self, _events: u32) {
        if lock(&self.hearing).take(&self.socket, TURN) {
            return;
        }
        self.gone.store(true, Ordering::Relaxed);
        // Else the end of the connection would be reported for ever. The socket stays open.
        if let Some((reactor, _)) = &*lock(&self.watched) {
            if let Some(reactor) = reactor.upgrade() {
                reactor.unwatch(&self.socket);
            }
        }
    }
}

/// What an ivshmem server has said so far.
#[derive(Default)]
struct Hearing {
    protocol: ClientProtocol,
    /// The beginning of a message, and the descriptor that came with it.
    partial: [u8; MESSAGE_LENGTH],
    length: usize,
    descriptor: Passed,
    /// It broke its protocol after the welcome: read and thrown away from now on. Leaving instead
    /// would give this client's id to others while it still uses the region.
    deaf: bool,
    /// At most [`OWN_VECTORS`].
    own: Vec<EventFd>,
    /// Own vectors that came, kept or not.
    own_vectors: u16,
    peers: Arc<Peers>,
    kept: usize,
}

/// The eventfds of other clients, by id and vector.
type Peers = Mutex<BTreeMap<u16, Vec<Arc<EventFd>>>>;

enum Heard {
    Event(ClientEvent, Passed),
    Nothing,
    End,
}

impl Hearing {
    /// Takes up to `most` messages without waiting; false at the end of the connection.
    fn take(&mut self, socket: &Fd, most: usize) -> bool {
        for _ in 0..most {
            if self.deaf {
                let mut thrown_away = [0; 512];
                match net::recv_with_fd(socket, &mut thrown_away, net::MSG_DONTWAIT) {
                    Ok((0, _)) => return false,
                    Ok(_) => continue,
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => continue,
                    Err(error) => return is_passing(&error),
                }
            }
            match self.next(socket) {
                Ok(Heard::Event(event, passed)) => self.keep(event, passed),
                Ok(Heard::Nothing) => return true,
                Ok(Heard::End) => return false,
                Err(_) => self.deaf = true,
            }
        }
        true
    }

    /// The next message, if all of it has come.
    fn next(&mut self, socket: &Fd) -> Result<Heard, String> {
        loop {
            let rest = &mut self.partial[self.length..];
            let (got, passed) = match net::recv_with_fd(socket, rest, net::MSG_DONTWAIT) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return Err(format!("not an ivshmem server: {error}"));
                }
                Err(error) if is_passing(&error) => return Ok(Heard::Nothing),
                Err(_) => return Ok(Heard::End),
            };
            if !matches!(passed, Passed::Nothing) {
                if !matches!(self.descriptor, Passed::Nothing) {
                    return Err(
                        "not an ivshmem server: two descriptors came with one message".into()
                    );
                }
                self.descriptor = passed;
            }
            if got == 0 {
                return Ok(Heard::End);
            }
            self.length += got;
            if self.length == MESSAGE_LENGTH {
                self.length = 0;
                let passed = std::mem::replace(&mut self.descriptor, Passed::Nothing);
                let has_fd = !matches!(passed, Passed::Nothing);
                let event = self
                    .protocol
                    .message(i64::from_le_bytes(self.partial), has_fd)
                    .map_err(|invalid| invalid.to_string())?;
                return Ok(Heard::Event(event, passed));
            }
        }
    }

    /// Waits for what is left of the welcome, but not longer than `until`: the vectors of others, and
    /// the own ones, of which each client has as many if the ivshmem server `is_marking` leavers.
    fn await_own_vectors(&mut self, socket: &Fd, until: Instant, is_marking: bool) {
        let mut heard = 0;
        let mut since = Instant::now();
        loop {
            if !self.take(socket, TURN) || self.deaf || self.own_vectors >= 2 {
                return;
            }
            let (others, most) = {
                let peers = lock(&self.peers);
                let vectors = peers.values().map(Vec::len);
                (vectors.clone().sum::<usize>(), vectors.max().unwrap_or(0))
            };
            let patience = match self.own_vectors {
                0 => FIRST_VECTOR,
                own if most > 0 && most <= usize::from(own) => return,
                _ => SECOND_VECTOR,
            };
            // More has come: it goes on. An interrupted wait only means to look again.
            if others + usize::from(self.own_vectors) > heard {
                heard = others + usize::from(self.own_vectors);
                since = Instant::now();
            }
            let is_sure = is_marking && most.max(1) > usize::from(self.own_vectors);
            let end = if is_sure { until } else { (since + patience).min(until) };
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let _ = poll::poll(&mut [PollFd::new(socket, poll::IN)], Some(left));
        }
    }

    /// Keeps the doorbells of an event.
    fn keep(&mut self, event: ClientEvent, passed: Passed) {
        // Whose eventfd is lost is woken over TCP.
        let fd = passed.one();
        match event {
            ClientEvent::PeerLeft { peer } => {
                let doorbells = lock(&self.peers).remove(&peer).unwrap_or_default();
                self.kept -= doorbells.len();
            }
            ClientEvent::PeerVector { peer, vector } => {
                let adopted =
                    fd.filter(|_| self.kept < KEPT).and_then(|fd| EventFd::adopt(fd).ok());
                let mut peers = lock(&self.peers);
                let doorbells = peers.entry(peer).or_default();
                // Without a gap: the place in the list is the vector's number.
                if let Some(doorbell) = adopted.filter(|_| doorbells.len() == usize::from(vector)) {
                    doorbells.push(Arc::new(doorbell));
                    self.kept += 1;
                }
            }
            ClientEvent::OwnVector { vector } => {
                let is_next = self.own.len() == usize::from(vector) && self.own.len() < OWN_VECTORS;
                let fd = fd.filter(|fd| is_next && is_eventfd(fd));
                self.own.extend(fd.and_then(|fd| EventFd::adopt(fd).ok()));
                self.own_vectors = vector + 1;
            }
            ClientEvent::Version | ClientEvent::OwnId(_) | ClientEvent::Region => {}
        }
    }
}

/// Whether `fd` is an eventfd, as far as it can be told. This process sleeps on it, and would not
/// sleep on something that always has bytes.
fn is_eventfd(fd: &Fd) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map_or(true, |name| name.as_os_str() == "anon_inode:[eventfd]")
}

/// Whether a failed read says nothing about the connection.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
