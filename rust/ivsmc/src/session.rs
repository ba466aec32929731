//! A stream session: one TCP connection, and the two rings it may have got.
//!
//! The data of a session on shared memory never touches its TCP connection; that carries wake
//! bytes and says when the other end is gone. The verdict about the end is in the ring: the
//! writer stores data, `produced`, then flags; the reader looks at flags, then at `produced`.
//!
//! One sender and one receiver run in parallel: each direction has a lock of its own, held for
//! the copy and never while waiting.

use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use ivsmc_proto::control::{
    DONE_WRITING, READER_ABORTED, READER_CLOSED, WRITER_ABORTED, WRITER_CLOSED,
};
use ivsmc_proto::ring::{Consumer, Producer};
use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::net::{self, MSG_DONTWAIT};
use ivsmc_shm::{fork, poll};

use crate::attachment::{Attachment, OwnDmb, PeerDmb};
use crate::fallback::Fallback;
use crate::host::{Deadline, Host, Timeout};
use crate::options::Options;
use crate::reactor::{lock, Key, Source};
use crate::readiness::Readiness;
use crate::runtime::Lease;
use crate::spin;
use crate::wait::{Drained, Sleeper};
use crate::{Error, Result};

pub use ivsmc_shm::net::Shutdown;

/// Bytes copied between two looks at the other side: it starts on the first part of a large
/// message while the rest is copied (measured: up to 15 % for 64 KiB messages).
const PART: usize = 16 << 10;

/// Copies longer than this run without the host's lock (the GIL): dropping it costs more than
/// shorter copies do (`facts`: 256 KiB held 4.8 us, dropped up to 1,283 us under a busy thread).
const LONG_COPY: usize = 256 << 10;

/// This end called `close`.
const CLOSED: u32 = 1;
/// This end shut down sending.
const SEND_SHUT: u32 = 2;
/// This end shut down receiving.
const RECV_SHUT: u32 = 4;
/// The TCP connection is over: a hint to look at the ring's flags.
const ENDED: u32 = 8;

/// How to receive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecvFlags {
    /// Leave the bytes where they are.
    pub peek: bool,
    /// Wait until all of the buffer is filled, the stream ends or an error comes.
    pub wait_all: bool,
}

/// A connected stream, over shared memory or TCP.
///
/// Dropping it closes it. All methods may be called from several threads at once; sends are
/// serialised among themselves, and receives likewise.
pub struct Session {
    inner: Arc<Inner>,
}

struct Inner {
    /// Fork generation of birth.
    generation: u32,
    state: AtomicU32,
    /// Taken by `close`; whoever uses the descriptor meanwhile holds a clone.
    conn: Mutex<Option<Arc<Fd>>>,
    options: Options,
    path: Path,
    lease: Lease,
}

enum Path {
    Tcp(Fallback),
    Smc(Box<Link>),
}

/// The shared-memory part of a session.
struct Link {
    attachment: Arc<Attachment>,
    peer: SlotRef,
    tx: Mutex<Option<Tx>>,
    rx: Mutex<Option<Rx>>,
    sleeper: Sleeper,
    /// `ECONNRESET` was reported; like TCP, once.
    reset_told: AtomicBool,
    /// A readiness descriptor exists.
    armed: AtomicBool,
    readiness: Mutex<Option<Readiness>>,
    key: OnceLock<Key>,
    wakes_sent: AtomicU64,
    wakes_received: AtomicU64,
    sleeps: AtomicU64,
    traffic: Mutex<(u64, u64)>,
}

struct Tx {
    ring: Producer,
    sent: u64,
    _dmb: PeerDmb,
}

struct Rx {
    ring: Consumer,
    received: u64,
    size: u64,
    _dmb: OwnDmb,
}

/// Which condition a thread waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Send { bytes: u64 },
    Receive,
}

/// What receiving can find.
enum Incoming {
    Data,
    End,
    Nothing,
}

/// Counters of one session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionStats {
    /// Payload bytes sent through the ring.
    pub bytes_sent: u64,
    /// Payload bytes received from the ring.
    pub bytes_received: u64,
    /// Wake bytes sent to the peer.
    pub wakes_sent: u64,
    /// Times bytes on the TCP connection woke this end.
    pub wakes_received: u64,
    /// Times a thread of this end went to sleep.
    pub sleeps: u64,
    /// Capacity of the ring this end receives from, in bytes; 0 on TCP.
    pub receive_buffer: u64,
    /// Capacity of the ring this end sends to, in bytes; 0 on TCP.
    pub send_buffer: u64,
    /// The device spec, if on shared memory.
    pub device: Option<String>,
    /// The peer's slot, if on shared memory.
    pub peer: Option<SlotRef>,
}

impl Session {
    /// A session that goes on over TCP, for the reason given.
    pub(crate) fn tcp(conn: Fd, fallback: Fallback, lease: Lease) -> Result<Self> {
        net::set_nonblocking(&conn, false)?;
        Ok(Self {
            inner: Arc::new(Inner {
                generation: fork::generation(),
                state: AtomicU32::new(0),
                conn: Mutex::new(Some(Arc::new(conn))),
                options: Options::plain(),
                path: Path::Tcp(fallback),
                lease,
            }),
        })
    }

    /// A session whose handshake is done: `tx` is the peer's DMB, `rx` our own.
    pub(crate) fn smc(
        conn: Fd,
        attachment: Arc<Attachment>,
        tx: PeerDmb,
        rx: OwnDmb,
        peer: SlotRef,
        lease: Lease,
    ) -> Result<Self> {
        net::set_nonblocking(&conn, true)?;
        let options = Options::for_wakes(&conn)?;
        let conn = Arc::new(conn);
        let link = Link {
            attachment,
            peer,
            tx: Mutex::new(Some(Tx { ring: Producer::new(tx.place()), sent: 0, _dmb: tx })),
            rx: Mutex::new(Some(Rx {
                ring: Consumer::new(rx.place()),
                received: 0,
                size: rx.place().capacity,
                _dmb: rx,
            })),
            sleeper: Sleeper::default(),
            reset_told: AtomicBool::new(false),
            armed: AtomicBool::new(false),
            readiness: Mutex::default(),
            key: OnceLock::new(),
            wakes_sent: AtomicU64::new(0),
            wakes_received: AtomicU64::new(0),
            sleeps: AtomicU64::new(0),
            traffic: Mutex::default(),
        };
        let inner = Arc::new(Inner {
            generation: fork::generation(),
            state: AtomicU32::new(0),
            conn: Mutex::new(Some(Arc::clone(&conn))),
            options,
            path: Path::Smc(Box::new(link)),
            lease,
        });
        let watched = Arc::new(Watched { inner: Arc::downgrade(&inner) });
        let reactor = inner.lease.reactor();
        let key = reactor.register(watched);
        if let Path::Smc(link) = &inner.path {
            let _ = link.key.set(key);
        }
        // Dropping `inner` on an error forgets the key again.
        reactor.watch(key, &*conn, poll::RDHUP | poll::ET)?;
        Ok(Self { inner })
    }

    /// Whether the data goes through shared memory.
    pub fn is_smc(&self) -> bool {
        matches!(self.inner.path, Path::Smc(_))
    }

    /// Why it does not; `None` on shared memory.
    pub fn fallback(&self) -> Option<&Fallback> {
        match &self.inner.path {
            Path::Tcp(fallback) => Some(fallback),
            Path::Smc(_) => None,
        }
    }

    /// Whether this end called [`Session::close`].
    pub fn is_closed(&self) -> bool {
        self.inner.state.load(Ordering::Relaxed) & CLOSED != 0
    }

    /// Sends some of `from`, at least one byte unless it is empty; returns how many.
    ///
    /// # Errors
    /// `WouldBlock` or `TimedOut` if there was no room in time (nothing was sent), `BrokenPipe`
    /// after [`Session::shutdown`] or the peer's close, `Reset` if the peer died.
    pub fn send(&self, from: &[u8], timeout: Timeout, host: &impl Host) -> Result<usize> {
        self.send_until(from, timeout, || timeout.deadline(), host)
    }

    /// Sends all of `from`; the timeout is for the whole.
    ///
    /// # Errors
    /// As [`Session::send`]; an unknown part may have been sent.
    pub fn send_all(&self, from: &[u8], timeout: Timeout, host: &impl Host) -> Result<()> {
        let mut rest = from;
        let mut deadline = None;
        loop {
            let sent =
                self.send_until(rest, timeout, || *deadline.get_or_insert(timeout.deadline()), host)?;
            rest = &rest[sent..];
            if rest.is_empty() {
                return Ok(());
            }
            if deadline.is_none() {
                deadline = Some(timeout.deadline());
            }
        }
    }

    fn send_until(
        &self,
        from: &[u8],
        timeout: Timeout,
        deadline: impl FnOnce() -> Deadline,
        host: &impl Host,
    ) -> Result<usize> {
        let inner = &*self.inner;
        inner.check()?;
        let link = match &inner.path {
            Path::Tcp(_) => return inner.tcp_send(from, timeout, deadline(), host),
            Path::Smc(link) => link,
        };
        let mut deadline = Some(deadline);
        let mut until = None;
        loop {
            let sent = if from.len() > LONG_COPY {
                host.blocking(|| inner.try_send(link, from))?
            } else {
                inner.try_send(link, from)?
            };
            if sent > 0 || from.is_empty() {
                return Ok(sent);
            }
            if timeout == Timeout::NonBlocking {
                return Err(Error::WouldBlock);
            }
            if let Some(make) = deadline.take() {
                until = Some(make());
            }
            let until = until.unwrap_or(Deadline::Never);
            inner.wait(link, Direction::Send { bytes: from.len() as u64 }, until, host)?;
        }
    }

    /// Receives into `into`; returns how many bytes, 0 at the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` or `TimedOut` if nothing came in time, `Reset` if the peer died or closed
    /// with unread data, once all that it sent was read.
    pub fn recv(
        &self,
        into: &mut [MaybeUninit<u8>],
        flags: RecvFlags,
        timeout: Timeout,
        host: &impl Host,
    ) -> Result<usize> {
        let inner = &*self.inner;
        inner.check()?;
        let link = match &inner.path {
            Path::Tcp(_) => return inner.tcp_recv(into, flags, timeout, host),
            Path::Smc(link) => link,
        };
        if into.is_empty() {
            return Ok(0);
        }
        let deadline = std::cell::OnceCell::new();
        let mut got = 0;
        loop {
            let rest = &mut into[got..];
            let step = if rest.len() > LONG_COPY {
                host.blocking(|| inner.try_recv(link, rest, flags.peek))
            } else {
                inner.try_recv(link, rest, flags.peek)
            };
            match step {
                Ok(Some(0)) => return Ok(got),
                Ok(Some(n)) if flags.peek => {
                    // A longer peek sees the same bytes from the start again.
                    if !flags.wait_all || n == into.len() {
                        return Ok(n);
                    }
                }
                Ok(Some(n)) => {
                    got += n;
                    if !flags.wait_all || got == into.len() {
                        return Ok(got);
                    }
                    continue;
                }
                Ok(None) => {}
                Err(error) => return if got > 0 { Ok(got) } else { Err(error) },
            }
            if timeout == Timeout::NonBlocking {
                return if got > 0 { Ok(got) } else { Err(Error::WouldBlock) };
            }
            let until = *deadline.get_or_init(|| timeout.deadline());
            if let Err(error) = inner.wait(link, Direction::Receive, until, host) {
                return if got > 0 { Ok(got) } else { Err(error) };
            }
        }
    }

    /// Waits until something can be received; returns how many bytes are there, 0 at the end
    /// of the stream. On TCP the number is not known: `usize::MAX`.
    ///
    /// # Errors
    /// As [`Session::recv`].
    pub fn readable(&self, timeout: Timeout, host: &impl Host) -> Result<usize> {
        let inner = &*self.inner;
        inner.check()?;
        let Path::Smc(link) = &inner.path else { return Ok(usize::MAX) };
        let mut until = None;
        loop {
            {
                let mut rx = lock(&link.rx);
                let rx = rx.as_mut().ok_or(Error::Closed)?;
                match inner.incoming(link, rx)? {
                    Incoming::Data => {
                        let n = rx.ring.available(inner.memory(link)).map_err(misbehaved)?;
                        return Ok(usize::try_from(n).unwrap_or(usize::MAX));
                    }
                    Incoming::End => return Ok(0),
                    Incoming::Nothing => {}
                }
            }
            if timeout == Timeout::NonBlocking {
                return Err(Error::WouldBlock);
            }
            let until = *until.get_or_insert_with(|| timeout.deadline());
            inner.wait(link, Direction::Receive, until, host)?;
        }
    }

    /// Receives what is there now: `None` if nothing is, `Some(0)` at the end of the stream.
    ///
    /// # Errors
    /// As [`Session::recv`]; `ApiMisuse` on a session that goes over TCP.
    pub fn try_recv(&self, into: &mut [MaybeUninit<u8>], peek: bool) -> Result<Option<usize>> {
        self.inner.check()?;
        match &self.inner.path {
            Path::Smc(link) => self.inner.try_recv(link, into, peek),
            Path::Tcp(_) => Err(Error::ApiMisuse("try_recv is for shared memory".into())),
        }
    }

    /// Ends one or both directions, as `shutdown` of a socket does.
    ///
    /// # Errors
    /// `Closed`, `Forked`, or on TCP what the kernel says.
    pub fn shutdown(&self, how: Shutdown) -> Result<()> {
        let inner = &*self.inner;
        inner.check()?;
        let link = match &inner.path {
            Path::Tcp(_) => return Ok(net::shutdown(&*inner.conn()?, how)?),
            Path::Smc(link) => link,
        };
        if inner.state.load(Ordering::Acquire) & ENDED != 0 {
            // As TCP after a reset: there is nothing left to shut down.
            return Err(Error::Os(std::io::Error::from_raw_os_error(107)));
        }
        if matches!(how, Shutdown::Write | Shutdown::Both) {
            inner.state.fetch_or(SEND_SHUT, Ordering::AcqRel);
            let mut tx = lock(&link.tx);
            let tx = tx.as_mut().ok_or(Error::Closed)?;
            let memory = inner.memory(link);
            tx.ring.set_flags(memory, DONE_WRITING);
            let wake = tx.ring.take_reader_wait(memory);
            if wake {
                inner.notify(link);
            }
        }
        if matches!(how, Shutdown::Read | Shutdown::Both) {
            inner.state.fetch_or(RECV_SHUT, Ordering::AcqRel);
        }
        inner.stir(link);
        Ok(())
    }

    /// Closes: the peer reads what was sent, then the end of the stream; with unread data on
    /// this side it is a reset, as in TCP. Threads inside end with [`Error::Closed`].
    pub fn close(&self) {
        self.inner.close();
    }

    /// A descriptor to poll: level-triggered, readable and writable as a socket is.
    ///
    /// On TCP it is the socket itself; on shared memory a descriptor made for this, whose bytes
    /// are nobody's business.
    ///
    /// # Errors
    /// `Closed`, `Forked`, or no descriptor could be made.
    pub fn fileno(&self) -> Result<RawFd> {
        let inner = &*self.inner;
        inner.check()?;
        let conn = inner.conn()?;
        let Path::Smc(link) = &inner.path else { return Ok(conn.as_raw_fd()) };
        let mut readiness = lock(&link.readiness);
        if let Some(readiness) = readiness.as_ref() {
            return Ok(readiness.descriptor());
        }
        let made = readiness.insert(Readiness::new()?);
        let descriptor = made.descriptor();
        drop(readiness);
        link.armed.store(true, Ordering::SeqCst);
        if let Some(&key) = link.key.get() {
            inner.lease.reactor().rewatch(key, &*conn, poll::IN | poll::RDHUP | poll::ET)?;
        }
        inner.settle(link);
        Ok(descriptor)
    }

    /// Address of this end.
    ///
    /// # Errors
    /// `Closed`, `Forked`, or what the kernel says.
    pub fn local_addr(&self) -> Result<SocketAddr> {
        self.inner.check()?;
        Ok(net::local_addr(&*self.inner.conn()?)?)
    }

    /// Address of the other end.
    ///
    /// # Errors
    /// `Closed`, `Forked`, or what the kernel says.
    pub fn peer_addr(&self) -> Result<SocketAddr> {
        self.inner.check()?;
        Ok(net::peer_addr(&*self.inner.conn()?)?)
    }

    /// Reads a socket option of the TCP connection, as the user sees it; returns its length.
    ///
    /// # Errors
    /// `Closed`, `Forked`, or what the kernel says.
    pub fn get_option(&self, level: i32, name: i32, into: &mut [u8]) -> Result<usize> {
        self.inner.check()?;
        self.inner.options.get(&*self.inner.conn()?, level, name, into)
    }

    /// Sets a socket option of the TCP connection.
    ///
    /// # Errors
    /// `Closed`, `Forked`, or what the kernel says.
    pub fn set_option(&self, level: i32, name: i32, value: &[u8]) -> Result<()> {
        self.inner.check()?;
        self.inner.options.set(&*self.inner.conn()?, level, name, value)
    }

    /// What this session did so far.
    pub fn stats(&self) -> SessionStats {
        let Path::Smc(link) = &self.inner.path else { return SessionStats::default() };
        let mut stats = SessionStats {
            wakes_sent: link.wakes_sent.load(Ordering::Relaxed),
            wakes_received: link.wakes_received.load(Ordering::Relaxed),
            sleeps: link.sleeps.load(Ordering::Relaxed),
            device: Some(link.attachment.spec().to_owned()),
            peer: Some(link.peer),
            ..SessionStats::default()
        };
        if fork::is_current(self.inner.generation) {
            (stats.bytes_sent, stats.bytes_received) = *lock(&link.traffic);
            if let Some(tx) = lock(&link.tx).as_ref() {
                stats.bytes_sent = tx.sent;
                stats.send_buffer = tx.ring.place().capacity;
            }
            if let Some(rx) = lock(&link.rx).as_ref() {
                stats.bytes_received = rx.received;
                stats.receive_buffer = rx.size;
            }
        }
        stats
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.inner.close();
    }
}

impl Inner {
    #[inline]
    fn check(&self) -> Result<()> {
        if !fork::is_current(self.generation) {
            return Err(Error::Forked);
        }
        if self.state.load(Ordering::Relaxed) & CLOSED != 0 {
            return Err(Error::Closed);
        }
        Ok(())
    }

    fn conn(&self) -> Result<Arc<Fd>> {
        lock(&self.conn).clone().ok_or(Error::Closed)
    }

    #[inline]
    fn memory<'a>(&self, link: &'a Link) -> &'a Mapping {
        link.attachment.memory()
    }

    /// Copies what fits; 0 if there is no room.
    fn try_send(&self, link: &Link, from: &[u8]) -> Result<usize> {
        let mut guard = lock(&link.tx);
        let tx = guard.as_mut().ok_or(Error::Closed)?;
        let memory = self.memory(link);
        if self.state.load(Ordering::Acquire) != 0 {
            self.may_send(link, tx)?;
        }
        let mut sent = 0;
        for part in from.chunks(PART) {
            let n = tx.ring.write(memory, part).map_err(misbehaved)?;
            if n == 0 {
                break;
            }
            sent += n;
            if tx.ring.take_reader_wait(memory) {
                self.notify(link);
            }
            if n < part.len() {
                break;
            }
        }
        tx.sent += sent as u64;
        if sent == 0 && !from.is_empty() {
            self.may_send(link, tx)?;
        }
        drop(guard);
        if sent < from.len() {
            self.settle(link);
        }
        Ok(sent)
    }

    /// Refuses to send what nobody will read.
    fn may_send(&self, link: &Link, tx: &Tx) -> Result<()> {
        let state = self.state.load(Ordering::Acquire);
        if state & CLOSED != 0 {
            return Err(Error::Closed);
        }
        if state & SEND_SHUT != 0 {
            return Err(Error::BrokenPipe);
        }
        let flags = tx.ring.reader_flags(self.memory(link));
        if flags & READER_ABORTED != 0 || (state & ENDED != 0 && flags & READER_CLOSED == 0) {
            return Err(self.reset(link));
        }
        if flags & READER_CLOSED != 0 {
            return Err(Error::BrokenPipe);
        }
        Ok(())
    }

    /// `ECONNRESET` the first time, `EPIPE` from then on.
    fn reset(&self, link: &Link) -> Error {
        if link.reset_told.swap(true, Ordering::AcqRel) {
            Error::BrokenPipe
        } else {
            Error::Reset
        }
    }

    fn try_recv(
        &self,
        link: &Link,
        into: &mut [MaybeUninit<u8>],
        peek: bool,
    ) -> Result<Option<usize>> {
        let mut guard = lock(&link.rx);
        let rx = guard.as_mut().ok_or(Error::Closed)?;
        let memory = self.memory(link);
        match self.incoming(link, rx)? {
            Incoming::Data => {}
            Incoming::End => return Ok(Some(0)),
            Incoming::Nothing => {
                drop(guard);
                self.settle(link);
                return Ok(None);
            }
        }
        if peek {
            return Ok(Some(rx.ring.peek(memory, 0, into).map_err(misbehaved)?));
        }
        let mut got = 0;
        for part in into.chunks_mut(PART) {
            let n = rx.ring.read(memory, part).map_err(misbehaved)?;
            got += n;
            if n > 0 && rx.ring.take_writer_wait(memory) {
                self.notify(link);
            }
            if n < part.len() {
                break;
            }
        }
        rx.received += got as u64;
        drop(guard);
        self.settle(link);
        Ok(Some(got))
    }

    /// What there is to receive, judged in the order that loses nothing.
    #[inline]
    fn incoming(&self, link: &Link, rx: &mut Rx) -> Result<Incoming> {
        let memory = self.memory(link);
        if rx.ring.available(memory).map_err(misbehaved)? > 0 {
            return Ok(Incoming::Data);
        }
        // The connection's end comes after the flags, the flags after the data: look in the
        // other order, so that what is seen last was there at least when the first was seen.
        let state = self.state.load(Ordering::Acquire);
        let flags = rx.ring.writer_flags(memory);
        let over = flags & (DONE_WRITING | WRITER_CLOSED | WRITER_ABORTED) != 0;
        if !over && state & (ENDED | RECV_SHUT | CLOSED) == 0 {
            return Ok(Incoming::Nothing);
        }
        if rx.ring.available(memory).map_err(misbehaved)? > 0 {
            return Ok(Incoming::Data);
        }
        if state & CLOSED != 0 {
            return Err(Error::Closed);
        }
        let clean = flags & WRITER_ABORTED == 0 && over;
        if !clean && (over || state & ENDED != 0) {
            if link.reset_told.swap(true, Ordering::AcqRel) {
                return Ok(Incoming::End);
            }
            return Err(Error::Reset);
        }
        Ok(Incoming::End)
    }

    /// Whether a thread waiting for `direction` has something to do, without side effects.
    fn concerns(&self, link: &Link, direction: Direction) -> bool {
        if self.state.load(Ordering::Acquire) & (CLOSED | ENDED) != 0 {
            return true;
        }
        let memory = self.memory(link);
        match direction {
            Direction::Receive => {
                let mut rx = lock(&link.rx);
                let Some(rx) = rx.as_mut() else { return true };
                self.state.load(Ordering::Acquire) & RECV_SHUT != 0
                    || !matches!(rx.ring.available(memory), Ok(0))
                    || rx.ring.writer_flags(memory) != 0
            }
            Direction::Send { .. } => {
                let mut tx = lock(&link.tx);
                let Some(tx) = tx.as_mut() else { return true };
                self.state.load(Ordering::Acquire) & SEND_SHUT != 0
                    || !matches!(tx.ring.room(memory), Ok(0))
                    || tx.ring.reader_flags(memory) != 0
            }
        }
    }

    /// As [`Inner::concerns`], and sets the wait flag before it says no.
    fn arm(&self, link: &Link, direction: Direction) -> Result<bool> {
        let memory = self.memory(link);
        let there = match direction {
            Direction::Receive => {
                let mut rx = lock(&link.rx);
                let rx = rx.as_mut().ok_or(Error::Closed)?;
                rx.ring.want_data(memory, 1).map_err(misbehaved)?
            }
            Direction::Send { bytes } => {
                let mut tx = lock(&link.tx);
                let tx = tx.as_mut().ok_or(Error::Closed)?;
                tx.ring.want_room(memory, bytes).map_err(misbehaved)?
            }
        };
        Ok(there || self.concerns(link, direction))
    }

    /// Takes the wait flag back: the thread that set it is awake.
    fn disarm(&self, link: &Link, direction: Direction) {
        let memory = self.memory(link);
        match direction {
            Direction::Receive => {
                if let Some(rx) = lock(&link.rx).as_mut() {
                    rx.ring.clear_wait(memory);
                }
            }
            Direction::Send { .. } => {
                if let Some(tx) = lock(&link.tx).as_mut() {
                    tx.ring.clear_wait(memory);
                }
            }
        }
    }

    /// Spins, then sleeps, until `direction` has something to do.
    fn wait(
        &self,
        link: &Link,
        direction: Direction,
        deadline: Deadline,
        host: &impl Host,
    ) -> Result<()> {
        if spin::briefly(|| self.concerns(link, direction)) {
            return Ok(());
        }
        loop {
            let slept = host.blocking(|| {
                if spin::fully(deadline, || self.concerns(link, direction)) {
                    return Ok(());
                }
                let conn = self.conn()?;
                link.sleeps.fetch_add(1, Ordering::Relaxed);
                let slept = link.sleeper.sleep(
                    &conn,
                    deadline,
                    || self.arm(link, direction),
                    |drained| self.drained(link, drained),
                );
                self.disarm(link, direction);
                slept
            });
            self.settle(link);
            match slept {
                Err(Error::Interrupted) => host.interrupted()?,
                other => return other,
            }
        }
    }

    /// Wakes the peer: one byte on the connection. A full connection wakes it as well.
    fn notify(&self, link: &Link) {
        if let Ok(conn) = self.conn() {
            link.wakes_sent.fetch_add(1, Ordering::Relaxed);
            // Any other failure is the connection's end, which the background thread sees.
            let _ = net::send(&*conn, &[ivsmc_proto::frame::WAKE], MSG_DONTWAIT);
        }
    }

    fn drained(&self, link: &Link, drained: Drained) {
        link.wakes_received.fetch_add(1, Ordering::Relaxed);
        if drained == Drained::Ended {
            self.state.fetch_or(ENDED, Ordering::AcqRel);
        }
        self.settle(link);
    }

    /// Makes all who wait look again: local state has changed.
    fn stir(&self, link: &Link) {
        link.sleeper.wake_all();
        self.settle(link);
    }

    /// Makes the readiness descriptor, if there is one, show what is so.
    fn settle(&self, link: &Link) {
        if !link.armed.load(Ordering::Relaxed) {
            return;
        }
        let mut guard = lock(&link.readiness);
        let Some(readiness) = guard.as_mut() else { return };
        if self.concerns(link, Direction::Receive) {
            readiness.set_readable(true);
        } else {
            readiness.set_readable(false);
            if self.arm(link, Direction::Receive).unwrap_or(true) {
                readiness.set_readable(true);
            }
        }
        let any = Direction::Send { bytes: 1 };
        if self.concerns(link, any) {
            readiness.set_writable(true);
        } else {
            readiness.set_writable(false);
            if self.arm(link, any).unwrap_or(true) {
                readiness.set_writable(true);
            }
        }
        let state = self.state.load(Ordering::Acquire);
        let flags = lock(&link.rx)
            .as_ref()
            .map_or(0, |rx| rx.ring.writer_flags(self.memory(link)));
        if state & ENDED != 0 || flags != 0 {
            readiness.end_reading();
        }
        // As TCP: a peer that only closed leaves the descriptor writable, not hung up.
        let clean = flags & WRITER_ABORTED == 0 && flags != 0;
        if state & ENDED != 0 && (!clean || state & SEND_SHUT != 0) {
            readiness.hang_up();
        }
    }

    fn close(&self) {
        if !fork::is_current(self.generation)
            || self.state.fetch_or(CLOSED, Ordering::AcqRel) & CLOSED != 0
        {
            return;
        }
        let conn = lock(&self.conn).take();
        if let Path::Smc(link) = &self.path {
            self.close_link(link, conn.as_deref());
        }
        if let Some(conn) = conn {
            // Somebody uses it still, asleep perhaps: the descriptor stays his until he wakes.
            if Arc::strong_count(&conn) > 1 {
                let _ = net::shutdown(&*conn, Shutdown::Both);
            }
        }
    }

    fn close_link(&self, link: &Link, conn: Option<&Fd>) {
        let memory = self.memory(link);
        let mut rx = lock(&link.rx).take();
        let tx = lock(&link.tx).take();
        let unread = rx
            .as_mut()
            .is_some_and(|rx| rx.ring.available(memory).is_ok_and(|unread| unread > 0));
        let abort = unread || self.options.aborts();
        *lock(&link.traffic) = (
            tx.as_ref().map_or(0, |tx| tx.sent),
            rx.as_ref().map_or(0, |rx| rx.received),
        );
        let mut wake = false;
        if let Some(rx) = rx.as_mut() {
            rx.ring.set_flags(memory, if abort { READER_ABORTED } else { READER_CLOSED });
            wake |= rx.ring.take_writer_wait(memory) || rx.ring.place().writer_waits(memory);
        }
        if let Some(mut tx) = tx {
            let flags = if abort { WRITER_ABORTED } else { DONE_WRITING | WRITER_CLOSED };
            tx.ring.set_flags(memory, flags);
            wake |= tx.ring.take_reader_wait(memory);
        }
        if let (true, Some(conn)) = (wake, conn) {
            let _ = net::send(conn, &[ivsmc_proto::frame::WAKE], MSG_DONTWAIT);
        }
        if let Some(&key) = link.key.get() {
            let reactor = self.lease.reactor();
            if let Some(conn) = conn {
                reactor.unwatch(conn);
            }
            reactor.forget(key);
        }
        link.sleeper.wake_all();
        if link.armed.load(Ordering::Relaxed) {
            *lock(&link.readiness) = None;
        }
    }

    fn tcp_send(
        &self,
        from: &[u8],
        timeout: Timeout,
        deadline: Deadline,
        host: &impl Host,
    ) -> Result<usize> {
        let conn = self.conn()?;
        self.tcp(&conn, poll::OUT, timeout, deadline, host, |flags| net::send(&*conn, from, flags))
    }

    fn tcp_recv(
        &self,
        into: &mut [MaybeUninit<u8>],
        flags: RecvFlags,
        timeout: Timeout,
        host: &impl Host,
    ) -> Result<usize> {
        let conn = self.conn()?;
        let mut extra = 0;
        if flags.peek {
            extra |= net::MSG_PEEK;
        }
        if flags.wait_all {
            extra |= net::MSG_WAITALL;
        }
        self.tcp(&conn, poll::IN, timeout, timeout.deadline(), host, |flags| {
            net::recv(&*conn, into, flags | extra)
        })
    }

    /// One call on the TCP connection, as a plain socket does it.
    fn tcp<T: Send>(
        &self,
        conn: &Fd,
        events: u32,
        timeout: Timeout,
        deadline: Deadline,
        host: &impl Host,
        mut call: impl FnMut(i32) -> std::io::Result<T> + Send,
    ) -> Result<T> {
        let flags = if timeout == Timeout::Never { 0 } else { MSG_DONTWAIT };
        loop {
            let result = host.blocking(|| {
                if let Timeout::After(_) = timeout {
                    let left = deadline.left()?;
                    poll::poll(&mut [poll::PollFd::new(conn, events)], left)?;
                }
                Ok(call(flags)?)
            });
            match result {
                Err(Error::Os(error)) if error.raw_os_error() == Some(4) => {
                    host.interrupted()?;
                    self.check()?;
                }
                Err(Error::WouldBlock) if matches!(timeout, Timeout::After(_)) => {}
                Err(_) if self.state.load(Ordering::Relaxed) & CLOSED != 0 => {
                    return Err(Error::Closed)
                }
                other => return other,
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.close();
    }
}

/// What the background thread holds of a session.
struct Watched {
    inner: std::sync::Weak<Inner>,
}

impl Source for Watched {
    fn ready(&self, events: u32) {
        let Some(inner) = self.inner.upgrade() else { return };
        let Path::Smc(link) = &inner.path else { return };
        if events & (poll::RDHUP | poll::HUP | poll::ERR) != 0 {
            inner.state.fetch_or(ENDED, Ordering::AcqRel);
            link.sleeper.wake_all();
            inner.settle(link);
        }
        if events & poll::IN != 0 {
            if let Ok(conn) = inner.conn() {
                link.sleeper.drain_in_background(&conn, |drained| inner.drained(link, drained));
            }
        }
    }
}

fn misbehaved(error: ivsmc_proto::ring::PeerMisbehaved) -> Error {
    Error::PeerMisbehaved(error.to_string())
}
