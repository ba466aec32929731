//! The background thread of a process: connection ends, handshakes, timers.
//!
//! It never stands between a wake-up and a thread that waits: sessions sleep by themselves. It
//! holds their TCP connections for FIN and RST only (`RDHUP`, edge-triggered), and for bytes only
//! where a readiness descriptor is armed. It blocks all signals, starts with the first use and
//! ends with the last.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ivsmc_shm::futex;
use ivsmc_shm::poll::{self, Epoll, EpollEvent, EventFd};

use crate::Result;

/// Something the background thread looks after.
pub(crate) trait Source: Send + Sync {
    /// Its descriptor has `events` (epoll bits). Runs on the background thread; must not block.
    fn ready(&self, events: u32);
    /// A time asked for by [`Reactor::at`] has come. Runs on the background thread.
    fn expired(&self) {}
    /// The process ends: what a user would close is to be closed now.
    fn end(&self) {}
}

/// Names a source in the reactor; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key(u64);

/// Whether the background thread is still needed.
pub(crate) enum Need {
    /// Something is open.
    Open,
    /// Nothing is open, but wait until then for something new.
    Until(Instant),
    /// No longer.
    Gone,
}

const WAKE: u64 = 0;

/// The longest [`Reactor::flush`] waits.
const FLUSH: Duration = Duration::from_secs(1);

/// The shared side of the background thread.
pub(crate) struct Reactor {
    epoll: Epoll,
    wake: EventFd,
    next: AtomicU64,
    sources: Mutex<HashMap<Key, Arc<dyn Source>>>,
    timers: Mutex<BTreeSet<(Instant, Key)>>,
    linger: Mutex<Option<Instant>>,
    /// Times the background thread has been through its loop.
    turns: AtomicU32,
    /// Threads inside [`Reactor::flush`].
    flushing: AtomicU32,
}

impl Reactor {
    pub(crate) fn new() -> Result<Self> {
        let epoll = Epoll::new()?;
        let wake = EventFd::new()?;
        epoll.add(&wake, poll::IN, WAKE)?;
        Ok(Self {
            epoll,
            wake,
            next: AtomicU64::new(WAKE + 1),
            sources: Mutex::default(),
            timers: Mutex::default(),
            linger: Mutex::default(),
            turns: AtomicU32::new(0),
            flushing: AtomicU32::new(0),
        })
    }

    /// Registers a source without a descriptor: for timers, or before [`Reactor::watch`].
    pub(crate) fn register(&self, source: Arc<dyn Source>) -> Key {
        let key = Key(self.next.fetch_add(1, Ordering::Relaxed));
        lock(&self.sources).insert(key, source);
        key
    }

    /// Watches `fd` for `events` in the name of `key`.
    pub(crate) fn watch(&self, key: Key, fd: &impl AsFd, events: u32) -> Result<()> {
        Ok(self.epoll.add(fd, events, key.0)?)
    }

    /// Changes what `fd` is watched for.
    pub(crate) fn rewatch(&self, key: Key, fd: &impl AsFd, events: u32) -> Result<()> {
        Ok(self.epoll.modify(fd, events, key.0)?)
    }

    /// Stops watching `fd`, which stays registered.
    pub(crate) fn unwatch(&self, fd: &impl AsFd) {
        // Fails only if it was not watched, which is what is asked for.
        let _ = self.epoll.remove(fd);
    }

    /// Forgets a source. A call that is already running may still finish after this.
    pub(crate) fn forget(&self, key: Key) {
        let gone = lock(&self.sources).remove(&key);
        drop(gone);
    }

    /// Asks for [`Source::expired`] at `when`; several times may be pending for one source.
    pub(crate) fn at(&self, when: Instant, key: Key) {
        let first = {
            let mut timers = lock(&self.timers);
            timers.insert((when, key));
            timers.first().is_some_and(|(first, _)| *first == when)
        };
        if first {
            self.wake();
        }
    }

    /// Tells every source that the process ends.
    pub(crate) fn end_all(&self) {
        let sources: Vec<_> = lock(&self.sources).values().cloned().collect();
        for source in sources {
            source.end();
        }
    }

    /// Makes [`Reactor::run`] ask at `when` whether it is still needed, if it is not to ask anyway.
    pub(crate) fn linger(&self, when: Instant) {
        let mut linger = lock(&self.linger);
        if linger.is_none() {
            *linger = Some(when);
            drop(linger);
            self.wake();
        }
    }

    /// Makes the background thread look at its timers and at whether it is still needed.
    pub(crate) fn wake(&self) {
        // Refused only when 2^64 - 1 notifications are pending.
        let _ = self.wake.notify();
    }

    /// Waits until the background thread is done with what it does now, a moment at most; not
    /// to be called by it.
    pub(crate) fn flush(&self) {
        self.flushing.fetch_add(1, Ordering::SeqCst);
        let before = self.turns.load(Ordering::SeqCst);
        let end = Instant::now() + FLUSH;
        loop {
            let now = self.turns.load(Ordering::SeqCst);
            let left = end.saturating_duration_since(Instant::now());
            // The turn that is under way may have looked already; the one after it has not.
            if now.wrapping_sub(before) >= 2 || left.is_zero() {
                break;
            }
            self.wake();
            // Whatever ends the wait: look again.
            let _ = futex::wait(&self.turns, now, Some(left));
        }
        self.flushing.fetch_sub(1, Ordering::SeqCst);
    }

    /// Serves until `need` says [`Need::Gone`].
    pub(crate) fn run(&self, need: impl Fn() -> Need) {
        let mut events = [EpollEvent::default(); 64];
        loop {
            // SeqCst, as in `flush`: either it sees the new turn or we see it waiting.
            self.turns.fetch_add(1, Ordering::SeqCst);
            if self.flushing.load(Ordering::SeqCst) > 0 {
                futex::wake(&self.turns, u32::MAX);
            }
            let gone = {
                let mut linger = lock(&self.linger);
                let need = need();
                *linger = match need {
                    Need::Until(when) => Some(when),
                    Need::Open | Need::Gone => None,
                };
                matches!(need, Need::Gone)
            };
            if gone {
                // Some of them hold the reactor, which holds them.
                let sources = std::mem::take(&mut *lock(&self.sources));
                drop(sources);
                return;
            }
            let timeout =
                self.next_look().map(|when| when.saturating_duration_since(Instant::now()));
            // An interrupted or failed wait only means to look again; signals are blocked here.
            let Ok(count) = self.epoll.wait(&mut events, timeout) else { continue };
            for event in &events[..count] {
                if event.key() == WAKE {
                    // Only a full counter fails, and that is not empty either.
                    let _ = self.wake.drain();
                    continue;
                }
                let source = lock(&self.sources).get(&Key(event.key())).cloned();
                if let Some(source) = source {
                    source.ready(event.events());
                }
            }
            self.expire();
        }
    }

    fn next_look(&self) -> Option<Instant> {
        let timer = lock(&self.timers).first().map(|&(when, _)| when);
        let linger = *lock(&self.linger);
        match (timer, linger) {
            (Some(timer), Some(linger)) => Some(timer.min(linger)),
            (timer, linger) => timer.or(linger),
        }
    }

    fn expire(&self) {
        let now = Instant::now();
        loop {
            let due = {
                let mut timers = lock(&self.timers);
                match timers.first() {
                    Some(&(when, _)) if when <= now => timers.pop_first(),
                    _ => return,
                }
            };
            let source = due.and_then(|(_, key)| lock(&self.sources).get(&key).cloned());
            if let Some(source) = source {
                source.expired();
            }
        }
    }
}

/// Locks, also after a panic elsewhere: every value guarded in this crate is valid at any time.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
