//! The shared-memory side of a session: rings, waiting, readiness, the verdict about the end.

use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use ivsmc_proto::control::{
    DONE_WRITING, READER_ABORTED, READER_CLOSED, WRITER_ABORTED, WRITER_CLOSED,
};
use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::poll;

use super::ends::{Rx, Tx};
use super::notify::Outlet;
use super::{Inner, Path, SessionStats, CLOSED, ENDED, PEER_CLOSED, RECV_SHUT, SEND_SHUT};
use crate::attachment::{Armed, Ear, OwnDmb, PeerDmb};
use crate::host::{Deadline, Host};
use crate::reactor::{lock, Key, Reactor, Source};
use crate::readiness::Readiness;
use crate::retry::{retry, Tried};
use crate::spin;
use crate::wait::{Drained, Sleeper};
use crate::{Error, Result};

/// Bytes copied between two publications: the other side starts on the first part of a large
/// message while the rest is copied. At 16 KiB and above the C library's `memcpy` changes to
/// `rep movsb`, which is slower between two cores (measured, two pinned threads and a ring of
/// 256 KiB: 13.5 GB/s in parts of 4 and 8 KiB, 9.6 GB/s in parts of 16 to 64 KiB).
const PART: usize = 8 << 10;

/// Bytes copied between two looks at whether the other side sleeps. The fence before the look
/// waits until the processor has stored all that was copied: too dear after every part.
const STRETCH: usize = 64 << 10;

/// How often a peer whose connection broke is asked for proof of its death: 1, 2, 4 ... ms, in
/// all half a second.
const DEATH_TRIES: u32 = 9;

/// The shared-memory part of a session.
pub(super) struct Link {
    /// The spec of the device.
    device: String,
    pub(super) peer: SlotRef,
    pub(super) tx: Mutex<Option<Tx>>,
    pub(super) rx: Mutex<Option<Rx>>,
    pub(super) sleeper: Sleeper,
    /// The way to notify the peer by doorbell.
    pub(super) outlet: Option<Outlet>,
    /// Threads that sleep for data, and for room: each direction has one wait word for all.
    sleeping: [AtomicU32; 2],
    /// `ECONNRESET` was reported; like TCP, once.
    reset_told: AtomicBool,
    /// A readiness descriptor exists.
    pub(super) armed: AtomicBool,
    /// With what has the background thread listen to the doorbell.
    pub(super) readiness: Mutex<Option<(Readiness, Option<Armed>)>>,
    pub(super) key: OnceLock<Key>,
    pub(super) wakes_sent: AtomicU64,
    wakes_received: AtomicU64,
    pub(super) doorbells_sent: AtomicU64,
    pub(super) doorbells_received: AtomicU64,
    sleeps: AtomicU64,
    traffic: Mutex<(u64, u64)>,
}

impl Link {
    pub(super) fn new(tx: PeerDmb, rx: OwnDmb, peer: SlotRef) -> Self {
        Self {
            device: rx.attachment().spec().to_owned(),
            peer,
            outlet: Outlet::to(&tx, peer),
            tx: Mutex::new(Some(Tx::new(tx))),
            rx: Mutex::new(Some(Rx::new(rx))),
            sleeper: Sleeper::default(),
            sleeping: Default::default(),
            reset_told: AtomicBool::new(false),
            armed: AtomicBool::new(false),
            readiness: Mutex::default(),
            key: OnceLock::new(),
            wakes_sent: AtomicU64::new(0),
            wakes_received: AtomicU64::new(0),
            doorbells_sent: AtomicU64::new(0),
            doorbells_received: AtomicU64::new(0),
            sleeps: AtomicU64::new(0),
            traffic: Mutex::default(),
        }
    }

    /// Has a reset told again that a call has taken and not passed on.
    pub(super) fn leave(&self, error: &Error) {
        if let Error::Reset = error {
            self.reset_told.store(false, Ordering::Release);
        }
    }

    /// The connection ended: if the peer did not close, it may be dead, and what it held is to
    /// be given back. The kernel ends its connections before its locks, so ask more than once.
    fn look_after_the_dead(&self, reactor: &Arc<Reactor>) {
        let attachment = match lock(&self.rx).as_ref() {
            Some(rx) if rx.writer_flags() & (WRITER_CLOSED | WRITER_ABORTED) == 0 => {
                Arc::downgrade(rx.dmb().attachment())
            }
            _ => return,
        };
        let peer = self.peer;
        let mut tries = 0;
        retry(reactor, Duration::from_millis(1), move || {
            tries += 1;
            match attachment.upgrade() {
                Some(attachment) if attachment.is_peer_alive(peer) && tries < DEATH_TRIES => {
                    Tried::Again
                }
                Some(attachment) => {
                    attachment.sweep();
                    Tried::Done
                }
                None => Tried::Done,
            }
        });
    }

    /// The doorbell of this end; `None` if its device has none, or the session is closed.
    fn ear(&self) -> Option<Ear> {
        lock(&self.rx).as_ref().and_then(|rx| rx.dmb().ear())
    }

    /// Has the background thread listen to the doorbell for the readiness descriptor.
    pub(super) fn arm_doorbell(&self) -> Option<Armed> {
        let attachment = lock(&self.rx).as_ref().map(|rx| Arc::clone(rx.dmb().attachment()));
        attachment.and_then(|attachment| attachment.arm_doorbell())
    }

    /// Threads that sleep for `direction`.
    fn sleeping(&self, direction: Direction) -> &AtomicU32 {
        match direction {
            Direction::Receive { .. } => &self.sleeping[0],
            Direction::Send { .. } => &self.sleeping[1],
        }
    }

    /// The counters; `ours` unless it is the parent's session in a forked child, whose locks
    /// may be held for ever.
    pub(super) fn stats(&self, ours: bool) -> SessionStats {
        let mut stats = SessionStats {
            wakes_sent: self.wakes_sent.load(Ordering::Relaxed),
            wakes_received: self.wakes_received.load(Ordering::Relaxed),
            doorbells_sent: self.doorbells_sent.load(Ordering::Relaxed),
            doorbells_received: self.doorbells_received.load(Ordering::Relaxed),
            sleeps: self.sleeps.load(Ordering::Relaxed),
            device: Some(self.device.clone()),
            peer: Some(self.peer),
            ..SessionStats::default()
        };
        if !ours {
            return stats;
        }
        (stats.bytes_sent, stats.bytes_received) = *lock(&self.traffic);
        if let Some(tx) = lock(&self.tx).as_ref() {
            stats.bytes_sent = tx.sent;
            stats.send_buffer = tx.capacity();
        }
        if let Some(rx) = lock(&self.rx).as_ref() {
            stats.bytes_received = rx.received;
            stats.receive_buffer = rx.capacity();
        }
        stats
    }
}

/// Which condition a thread waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// Room for some of so many bytes.
    Send { bytes: u64 },
    /// So many bytes, or as many as fit.
    Receive { least: u64 },
}

/// What makes a session readable, and writable.
pub(super) const ANY_DATA: Direction = Direction::Receive { least: 1 };
const ANY_ROOM: Direction = Direction::Send { bytes: 1 };

/// What receiving can find.
pub(super) enum Incoming {
    Data,
    End,
    Nothing,
}

impl Inner {
    /// Copies what fits; 0 if there is no room.
    pub(super) fn try_send(&self, link: &Link, from: &[u8]) -> Result<usize> {
        let mut guard = lock(&link.tx);
        let tx = guard.as_mut().ok_or(Error::Closed)?;
        if self.state.load(Ordering::Acquire) != 0 {
            self.may_send(link, tx)?;
        }
        let mut sent = 0;
        for stretch in from.chunks(STRETCH) {
            let before = sent;
            for part in stretch.chunks(PART) {
                let n = tx.write(part)?;
                sent += n;
                if n < part.len() {
                    break;
                }
            }
            if sent > before && tx.take_reader_wait() {
                self.notify(link);
            }
            if sent - before < stretch.len() {
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
    pub(super) fn may_send(&self, link: &Link, tx: &Tx) -> Result<()> {
        let state = self.state.load(Ordering::Acquire);
        if state & CLOSED != 0 {
            return Err(Error::Closed);
        }
        if state & SEND_SHUT != 0 {
            return Err(Error::BrokenPipe);
        }
        let flags = tx.reader_flags();
        if flags & READER_ABORTED != 0 || (state & ENDED != 0 && flags & READER_CLOSED == 0) {
            return Err(self.reset(link));
        }
        if flags & READER_CLOSED != 0 {
            return Err(Error::BrokenPipe);
        }
        Ok(())
    }

    /// `ECONNRESET` the first time, `EPIPE` from then on.
    pub(super) fn reset(&self, link: &Link) -> Error {
        if link.reset_told.swap(true, Ordering::AcqRel) {
            Error::BrokenPipe
        } else {
            Error::Reset
        }
    }

    pub(super) fn try_recv(
        &self,
        link: &Link,
        into: &mut [MaybeUninit<u8>],
        peek: bool,
    ) -> Result<Option<usize>> {
        let mut guard = lock(&link.rx);
        let rx = guard.as_mut().ok_or(Error::Closed)?;
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
            return Ok(Some(rx.peek(into)?));
        }
        let mut got = 0;
        for stretch in into.chunks_mut(STRETCH) {
            let (before, length) = (got, stretch.len());
            for part in stretch.chunks_mut(PART) {
                let n = rx.read(part)?;
                got += n;
                if n < part.len() {
                    break;
                }
            }
            if got > before && rx.take_writer_wait() {
                self.notify(link);
            }
            if got - before < length {
                break;
            }
        }
        rx.received += got as u64;
        drop(guard);
        self.settle(link);
        Ok(Some(got))
    }

    /// Whether nothing more comes than what is there.
    pub(super) fn is_over(&self, link: &Link) -> bool {
        self.state.load(Ordering::Acquire) & (CLOSED | ENDED | RECV_SHUT) != 0
            || lock(&link.rx).as_ref().is_none_or(|rx| rx.writer_flags() != 0)
    }

    /// Whether no more than `n` bytes fit.
    pub(super) fn is_full(&self, link: &Link, n: usize) -> bool {
        lock(&link.rx).as_ref().is_none_or(|rx| n as u64 >= rx.capacity())
    }

    /// What there is to receive, judged in the order that loses nothing.
    #[inline]
    pub(super) fn incoming(&self, link: &Link, rx: &mut Rx) -> Result<Incoming> {
        if rx.available()? > 0 {
            return Ok(Incoming::Data);
        }
        // The connection's end comes after the flags, the flags after the data: look in the
        // other order, so that what is seen last was there at least when the first was seen.
        let state = self.state.load(Ordering::Acquire);
        let flags = rx.writer_flags();
        let over = flags & (DONE_WRITING | WRITER_CLOSED | WRITER_ABORTED) != 0;
        if !over && state & (ENDED | RECV_SHUT | CLOSED) == 0 {
            return Ok(Incoming::Nothing);
        }
        if rx.available()? > 0 {
            return Ok(Incoming::Data);
        }
        if state & CLOSED != 0 {
            return Err(Error::Closed);
        }
        if flags & (WRITER_CLOSED | WRITER_ABORTED) != 0 {
            self.state.fetch_or(PEER_CLOSED, Ordering::AcqRel);
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
    pub(super) fn concerns(&self, link: &Link, direction: Direction) -> bool {
        if self.state.load(Ordering::Acquire) & (CLOSED | ENDED) != 0 {
            return true;
        }
        match direction {
            Direction::Receive { least } => {
                let mut rx = lock(&link.rx);
                let Some(rx) = rx.as_mut() else { return true };
                let least = least.min(rx.capacity());
                self.state.load(Ordering::Acquire) & RECV_SHUT != 0
                    || rx.available().map_or(true, |available| available >= least)
                    || rx.writer_flags() != 0
            }
            Direction::Send { bytes } => {
                let mut tx = lock(&link.tx);
                let Some(tx) = tx.as_mut() else { return true };
                self.state.load(Ordering::Acquire) & SEND_SHUT != 0
                    || tx.room().map_or(true, |room| room >= bytes.min(PART as u64))
                    || tx.reader_flags() != 0
            }
        }
    }

    /// As [`Inner::concerns`], and sets the wait flag before it says no. `itself` counts the
    /// caller among those that sleep for `direction`.
    fn arm(&self, link: &Link, direction: Direction, itself: u32) -> Result<bool> {
        let there = match direction {
            Direction::Receive { least } => {
                let mut rx = lock(&link.rx);
                let rx = rx.as_mut().ok_or(Error::Closed)?;
                let there = rx.want_data(least.min(rx.capacity()))?;
                // A reader that waits for more than is there may have to wake the writer first.
                if !there && least > 1 && rx.take_writer_wait() {
                    self.notify(link);
                }
                there
            }
            Direction::Send { bytes } => {
                let mut tx = lock(&link.tx);
                let tx = tx.as_mut().ok_or(Error::Closed)?;
                tx.want_room(bytes)?
            }
        };
        // That took the flag back, on which others may rely: they look and set it again.
        if there && link.sleeping(direction).load(Ordering::SeqCst) > itself {
            link.sleeper.wake_all();
        }
        Ok(there || self.concerns(link, direction))
    }

    pub(super) fn shutdown_link(&self, link: &Link, how: Shutdown) -> Result<()> {
        let state = self.state.load(Ordering::Acquire);
        let flags = lock(&link.rx).as_ref().map_or(0, |rx| rx.writer_flags());
        let half_open = state & SEND_SHUT == 0
            && flags & (DONE_WRITING | WRITER_CLOSED) != 0
            && flags & WRITER_ABORTED == 0;
        if state & ENDED != 0 && !half_open {
            // ENOTCONN, as TCP after the end of both directions: nothing is left to shut down.
            return Err(Error::Os(std::io::Error::from_raw_os_error(107)));
        }
        if matches!(how, Shutdown::Write | Shutdown::Both) {
            self.state.fetch_or(SEND_SHUT, Ordering::AcqRel);
            let mut tx = lock(&link.tx);
            let tx = tx.as_mut().ok_or(Error::Closed)?;
            tx.set_flags(DONE_WRITING);
            if tx.take_reader_wait() {
                self.notify(link);
            }
        }
        if matches!(how, Shutdown::Read | Shutdown::Both) {
            self.state.fetch_or(RECV_SHUT, Ordering::AcqRel);
        }
        link.sleeper.wake_all();
        self.settle(link);
        Ok(())
    }

    /// A thread that slept is awake: the last one takes the wait flag back.
    fn disarm(&self, link: &Link, direction: Direction) {
        // Under the lock under which others set the flag, after they were counted.
        let is_last = || link.sleeping(direction).fetch_sub(1, Ordering::SeqCst) == 1;
        match direction {
            Direction::Receive { .. } => {
                let rx = lock(&link.rx);
                if let (true, Some(rx)) = (is_last(), rx.as_ref()) {
                    rx.clear_wait();
                }
            }
            Direction::Send { .. } => {
                let tx = lock(&link.tx);
                if let (true, Some(tx)) = (is_last(), tx.as_ref()) {
                    tx.clear_wait();
                }
            }
        }
    }

    /// Spins, then sleeps, until `direction` has something to do.
    pub(super) fn wait(
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
            if host.blocking(|| spin::fully(deadline, || self.concerns(link, direction))) {
                return Ok(());
            }
            // A signal that came meanwhile does not interrupt the sleep.
            if host.handles_signals() {
                host.interrupted()?;
            }
            let slept = host.blocking(|| {
                let conn = self.conn()?;
                let runtime = self.runtime().ok_or(Error::Closed)?;
                let ear = link.ear();
                link.sleeps.fetch_add(1, Ordering::Relaxed);
                link.sleeping(direction).fetch_add(1, Ordering::SeqCst);
                let slept = link.sleeper.sleep(
                    &conn,
                    runtime.bells(),
                    ear.as_ref(),
                    deadline,
                    || self.arm(link, direction, 1),
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

    pub(super) fn drained(&self, link: &Link, drained: Drained) {
        let counter = match drained {
            Drained::Open | Drained::Ended => &link.wakes_received,
            Drained::Doorbell => &link.doorbells_received,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if drained == Drained::Ended {
            self.ended(link);
        }
        self.settle(link);
    }

    /// The connection is over, or the peer. Whoever sees it first, the background thread or one that waits,
    /// has it looked whether the peer is dead.
    pub(super) fn ended(&self, link: &Link) {
        if self.state.fetch_or(ENDED, Ordering::AcqRel) & ENDED == 0 {
            if let Some(reactor) = self.reactor() {
                link.look_after_the_dead(&reactor);
            }
        }
    }

    /// Makes the readiness descriptor, if there is one, show what is so.
    pub(super) fn settle(&self, link: &Link) {
        if !link.armed.load(Ordering::Relaxed) {
            return;
        }
        let mut guard = lock(&link.readiness);
        let Some((readiness, _)) = guard.as_mut() else { return };
        if self.concerns(link, ANY_DATA) {
            readiness.set_readable(true);
        } else {
            readiness.set_readable(false);
            if self.arm(link, ANY_DATA, 0).unwrap_or(true) {
                readiness.set_readable(true);
            }
        }
        if self.concerns(link, ANY_ROOM) {
            readiness.set_writable(true);
        } else {
            readiness.set_writable(false);
            if self.arm(link, ANY_ROOM, 0).unwrap_or(true) {
                readiness.set_writable(true);
            }
        }
        let state = self.state.load(Ordering::Acquire);
        let flags = lock(&link.rx).as_ref().map_or(0, |rx| rx.writer_flags());
        if state & ENDED != 0 || flags != 0 {
            readiness.end_reading();
        }
        // As TCP: a peer that only closed leaves the descriptor writable, not hung up.
        let clean = flags & WRITER_ABORTED == 0 && flags != 0;
        if state & ENDED != 0 && (!clean || state & SEND_SHUT != 0) {
            readiness.hang_up();
        }
    }

    pub(super) fn close_link(&self, link: &Link, conn: Option<&Fd>) {
        let mut rx = lock(&link.rx).take();
        let tx = lock(&link.tx).take();
        let unread = rx.as_mut().is_some_and(|rx| rx.available().is_ok_and(|unread| unread > 0));
        let abort = unread || self.options.aborts();
        *lock(&link.traffic) =
            (tx.as_ref().map_or(0, |tx| tx.sent), rx.as_ref().map_or(0, |rx| rx.received));
        let mut wake = false;
        // As long as the DMB that says so is the peer's for this session.
        let heard = tx.is_some() && self.is_heard(link);
        if let Some(rx) = rx.as_mut() {
            rx.set_flags(if abort { READER_ABORTED } else { READER_CLOSED });
            wake |= rx.take_writer_wait();
        }
        if let Some(tx) = tx {
            let flags = if abort { WRITER_ABORTED } else { DONE_WRITING | WRITER_CLOSED };
            tx.set_flags(flags);
            wake |= tx.take_reader_wait();
        }
        if let (true, Some(conn)) = (wake, conn) {
            self.wake_peer(link, conn, heard);
        }
        if let Some(&key) = link.key.get() {
            if let Some(reactor) = self.reactor() {
                if let Some(conn) = conn {
                    reactor.unwatch(conn);
                }
                reactor.forget(key);
            }
        }
        link.sleeper.wake_all();
        let readiness = lock(&link.readiness).take();
        drop(readiness);
    }
}

/// What the background thread holds of a session.
pub(super) struct Watched {
    pub(super) inner: Weak<Inner>,
}

impl Source for Watched {
    fn end(&self) {
        if let Some(inner) = self.inner.upgrade() {
            inner.close();
        }
    }

    fn ready(&self, events: u32) {
        let Some(inner) = self.inner.upgrade() else { return };
        let Path::Smc(link) = &inner.path else { return };
        if events & (poll::RDHUP | poll::HUP | poll::ERR) != 0 {
            inner.ended(link);
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
