//! A stream session: one TCP connection, and the two rings it may have got.
//!
//! The data of a session on shared memory never touches its TCP connection; that carries wake
//! bytes and says when the other end is gone. The verdict about the end is in the ring: the
//! writer stores data, `produced`, then flags; the reader looks at flags, then at `produced`.
//!
//! One sender and one receiver run in parallel: each direction has a lock of its own, held for
//! the copy and never while waiting.

mod ends;
mod notify;
mod smc;
mod tcp;

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::{fork, net, poll};

use self::smc::{Direction, Incoming, Link, Watched, ANY_DATA};
use crate::attachment::{OwnDmb, PeerDmb};
use crate::fallback::Fallback;
use crate::host::{Deadline, Host, Timeout};
use crate::options::Options;
use crate::reactor::{lock, Reactor};
use crate::readiness::Readiness;
use crate::runtime::{Lease, Runtime};
use crate::{Error, Result};

pub use std::net::Shutdown;

/// Copies longer than this run without the host's lock (the GIL): dropping it costs more than
/// shorter copies do (`facts`: 256 KiB held 4.8 us, dropped up to 1,283 us under a busy thread).
const LONG_COPY: usize = 256 << 10;

/// Bytes a receive of all waits for at a time, if it wants that many.
const GATHER: usize = 16 << 10;

/// This end called `close`.
const CLOSED: u32 = 1;
/// This end shut down sending.
const SEND_SHUT: u32 = 2;
/// This end shut down receiving.
const RECV_SHUT: u32 = 4;
/// The TCP connection is over: a hint to look at the ring's flags.
const ENDED: u32 = 8;
/// The peer's flags say that it closed: sending is to look at them, too.
const PEER_CLOSED: u32 = 16;

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
    /// Given up by `close`.
    lease: Mutex<Option<Lease>>,
}

enum Path {
    Tcp(Fallback, tcp::Traffic),
    Smc(Box<Link>),
}

/// Counters of one session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionStats {
    /// Payload bytes sent.
    pub bytes_sent: u64,
    /// Payload bytes received.
    pub bytes_received: u64,
    /// Wake bytes sent to the peer.
    pub wakes_sent: u64,
    /// Times bytes on the TCP connection woke this end.
    pub wakes_received: u64,
    /// Doorbells sent to the peer.
    pub doorbells_sent: u64,
    /// Times a doorbell was about this session, or about one with the same summary bit.
    pub doorbells_received: u64,
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
    /// A session that goes on over TCP, for the reason given; `conn` must be blocking.
    pub(crate) fn tcp(conn: Fd, fallback: Fallback, lease: Lease) -> Result<Self> {
        Ok(Self {
            inner: Arc::new(Inner {
                generation: fork::generation(),
                state: AtomicU32::new(0),
                conn: Mutex::new(Some(Arc::new(conn))),
                options: Options::plain(),
                path: Path::Tcp(fallback, tcp::Traffic::default()),
                lease: Mutex::new(Some(lease)),
            }),
        })
    }

    /// A session whose handshake is done: `tx` is the peer's DMB, `rx` our own.
    pub(crate) fn smc(
        conn: Fd,
        tx: PeerDmb,
        rx: OwnDmb,
        peer: SlotRef,
        lease: Lease,
    ) -> Result<Self> {
        net::set_nonblocking(&conn, true)?;
        let options = Options::for_wakes(&conn)?;
        let conn = Arc::new(conn);
        let link = Link::new(tx, rx, peer);
        let inner = Arc::new(Inner {
            generation: fork::generation(),
            state: AtomicU32::new(0),
            conn: Mutex::new(Some(Arc::clone(&conn))),
            options,
            path: Path::Smc(Box::new(link)),
            lease: Mutex::new(Some(lease)),
        });
        let watched = Arc::new(Watched { inner: Arc::downgrade(&inner) });
        let reactor = inner.reactor().ok_or(Error::Closed)?;
        let key = reactor.register(watched);
        if let Path::Smc(link) = &inner.path {
            let _ = link.key.set(key);
        }
        // Dropping `inner` on an error forgets the key again.
        reactor.watch(key, &*conn, poll::RDHUP | poll::ET)?;
        if let Path::Smc(link) = &inner.path {
            inner.begin_to_hear(link);
        }
        Ok(Self { inner })
    }

    /// Whether the data goes through shared memory.
    pub fn is_smc(&self) -> bool {
        matches!(self.inner.path, Path::Smc(_))
    }

    /// Why it does not; `None` on shared memory.
    pub fn fallback(&self) -> Option<&Fallback> {
        match &self.inner.path {
            Path::Tcp(fallback, _) => Some(fallback),
            Path::Smc(_) => None,
        }
    }

    /// Whether this end called [`Session::close`], or has left it to the parent of this process.
    pub fn is_closed(&self) -> bool {
        !fork::is_current(self.inner.generation)
            || self.inner.state.load(Ordering::Relaxed) & CLOSED != 0
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
            let sent = self.send_until(
                rest,
                timeout,
                || *deadline.get_or_insert(timeout.deadline()),
                host,
            )?;
            rest = &rest[sent..];
            if rest.is_empty() {
                return Ok(());
            }
            if deadline.is_none() {
                deadline = Some(timeout.deadline());
            }
            // While the peer keeps up this thread does not sleep.
            host.interrupted()?;
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
            Path::Tcp(..) => return inner.tcp_send(from, timeout, deadline(), host),
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

    /// Sends some of `from`, in order, as one; returns how many bytes.
    ///
    /// # Errors
    /// As [`Session::send`].
    pub fn send_vectored(
        &self,
        from: &[IoSlice<'_>],
        timeout: Timeout,
        host: &impl Host,
    ) -> Result<usize> {
        let inner = &*self.inner;
        inner.check()?;
        if let Path::Tcp(..) = &inner.path {
            return inner.tcp_send_vectored(from, timeout, host);
        }
        let mut sent = 0;
        let mut timeout = timeout;
        for part in from {
            match self.send(part, timeout, host) {
                Ok(n) => {
                    sent += n;
                    if n < part.len() {
                        break;
                    }
                }
                Err(error) if sent > 0 => {
                    inner.leave(&error);
                    break;
                }
                Err(error) => return Err(error),
            }
            if sent > 0 {
                timeout = Timeout::NonBlocking;
            }
        }
        Ok(sent)
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
        if into.is_empty() {
            // The kernel would wait for a byte that does not fit.
            return Ok(0);
        }
        let link = match &inner.path {
            Path::Tcp(..) => return inner.tcp_recv(into, flags, timeout, host),
            Path::Smc(link) => link,
        };
        let deadline = std::cell::OnceCell::new();
        let mut got = 0;
        loop {
            let rest = &mut into[got..];
            // Looked at before the bytes: what came in between is not the last.
            let is_last = flags.peek && flags.wait_all && inner.is_over(link);
            let step = if rest.len() > LONG_COPY {
                host.blocking(|| inner.try_recv(link, rest, flags.peek))
            } else {
                inner.try_recv(link, rest, flags.peek)
            };
            match step {
                Ok(Some(0)) => return Ok(got),
                Ok(Some(n)) if flags.peek => {
                    // A longer peek sees the same bytes from the start again.
                    if !flags.wait_all || n == into.len() || is_last || inner.is_full(link, n) {
                        return Ok(n);
                    }
                }
                Ok(Some(n)) => {
                    got += n;
                    if !flags.wait_all || got == into.len() {
                        return Ok(got);
                    }
                    // While the peer keeps up this thread does not sleep.
                    host.interrupted()?;
                    continue;
                }
                Ok(None) => {}
                Err(error) if got > 0 => {
                    inner.leave(&error);
                    return Ok(got);
                }
                Err(error) => return Err(error),
            }
            if timeout == Timeout::NonBlocking {
                return if got > 0 { Ok(got) } else { Err(Error::WouldBlock) };
            }
            let until = *deadline.get_or_init(|| timeout.deadline());
            // A peek for all waits for all to be there. A receive of all takes what comes, but not
            // byte by byte; other calls have enough with one.
            let least = match flags {
                RecvFlags { wait_all: true, peek: true } => into.len(),
                RecvFlags { wait_all: true, peek: false } => (into.len() - got).min(GATHER),
                RecvFlags { wait_all: false, .. } => 1,
            } as u64;
            match inner.wait(link, Direction::Receive { least }, until, host) {
                Ok(()) => {}
                // What a signal handler raised must not get lost; what was received may, as on
                // a socket.
                Err(Error::Interrupted) => return Err(Error::Interrupted),
                Err(_) if got > 0 => return Ok(got),
                Err(Error::TimedOut) if flags.peek => {
                    return match inner.try_recv(link, into, true)? {
                        Some(n) if n > 0 => Ok(n),
                        _ => Err(Error::TimedOut),
                    }
                }
                Err(error) => return Err(error),
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
                        let n = rx.available()?;
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
            inner.wait(link, ANY_DATA, until, host)?;
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
            Path::Tcp(..) => Err(Error::ApiMisuse("try_recv is for shared memory".into())),
        }
    }

    /// Ends one or both directions, as `shutdown` of a socket does.
    ///
    /// # Errors
    /// `Closed`, `Forked`, or on TCP what the kernel says.
    pub fn shutdown(&self, how: Shutdown) -> Result<()> {
        let inner = &*self.inner;
        inner.check()?;
        match &inner.path {
            Path::Tcp(..) => Ok(net::shutdown(&*inner.conn()?, how)?),
            Path::Smc(link) => inner.shutdown_link(link, how),
        }
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
        if let Some((readiness, _)) = readiness.as_ref() {
            return Ok(readiness.descriptor());
        }
        // `close` marks the session, then takes what is here: it sees this, or this sees the mark.
        inner.check()?;
        let made = Readiness::new()?;
        let descriptor = made.descriptor();
        *readiness = Some((made, link.arm_doorbell()));
        drop(readiness);
        link.armed.store(true, Ordering::SeqCst);
        if let (Some(&key), Some(reactor)) = (link.key.get(), inner.reactor()) {
            let watched = reactor.rewatch(key, &*conn, poll::IN | poll::RDHUP | poll::ET);
            // It fails when `close` was faster.
            inner.check()?;
            watched?;
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

    /// Leaves an error of [`Session::recv`] to the next call, as the kernel does, for a caller that
    /// returns what it has received before instead. A reset is told once: it would be lost, and
    /// the stream would seem to end properly.
    pub fn leave_error(&self, error: &Error) {
        self.inner.leave(error);
    }

    /// What this session did so far; on TCP only the bytes.
    pub fn stats(&self) -> SessionStats {
        match &self.inner.path {
            Path::Tcp(_, traffic) => traffic.stats(),
            Path::Smc(link) => link.stats(fork::is_current(self.inner.generation)),
        }
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

    fn leave(&self, error: &Error) {
        match &self.path {
            Path::Tcp(_, traffic) => traffic.leave(error),
            Path::Smc(link) => link.leave(error),
        }
    }

    /// The background thread; `None` once closed.
    fn reactor(&self) -> Option<Arc<Reactor>> {
        lock(&self.lease).as_ref().map(|lease| Arc::clone(lease.reactor()))
    }

    fn runtime(&self) -> Option<&'static Runtime> {
        lock(&self.lease).as_ref().map(Lease::runtime)
    }

    fn conn(&self) -> Result<Arc<Fd>> {
        lock(&self.conn).clone().ok_or(Error::Closed)
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
        let lease = lock(&self.lease).take();
        drop(lease);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.close();
    }
}
