//! One sleeper per descriptor: leader and followers.
//!
//! The peer wakes a session by one byte on its TCP connection. Of the threads that wait on a
//! session one leads and sleeps on the connection; the others sleep on a process-private futex.
//! Two threads asleep on one TCP connection lose nearly every second wake-up (measured), so the
//! leader drains the bytes for all: it ends its turn, and each follower looks at its own
//! condition again, one of them leading next. No thread stands in between.
//!
//! ```text
//!   seen := turn             turn counts ended turns twice, and is odd while somebody leads
//!   ready()?                 sets the wait flag, looks again
//!   even: lead := CAS(seen, seen + 1), poll the connection, drain, turn += 1, wake followers
//!   odd:  futex_wait(turn, seen)
//! ```
//!
//! Where the attachment has a doorbell, the leader is one of those that sleep on that
//! (`attachment::doorbell`), and polls it, too, while it leads them all.
//!
//! One word says both, so whoever saw `seen` before its `ready` neither sleeps past the end of a
//! turn nor leads after one that may have drained its byte (`proto`'s loom models show it).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ivsmc_proto::frame::FrameDecoder;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net::{self, MSG_DONTWAIT};
use ivsmc_shm::poll::{self, EventFd, PollFd};
use ivsmc_shm::{futex, mem};

use crate::attachment::{Ear, BACKSTOP};
use crate::host::Deadline;
use crate::reactor::lock;
use crate::{Error, Result};

/// Most reads of one drain: a peer that floods the connection costs bounded time per turn.
const READS_PER_DRAIN: usize = 16;

/// What leaders are woken with from within this process; lent for one sleep, kept for the next.
#[derive(Default)]
pub(crate) struct Bells(Mutex<Vec<Arc<EventFd>>>);

impl Bells {
    fn take(&self) -> Result<Arc<EventFd>> {
        match lock(&self.0).pop() {
            Some(bell) => Ok(bell),
            None => Ok(Arc::new(EventFd::new()?)),
        }
    }

    fn put(&self, bell: Arc<EventFd>) {
        lock(&self.0).push(bell);
    }

    /// Closes those that are not lent.
    pub(crate) fn clear(&self) {
        lock(&self.0).clear();
    }
}

/// The waiting of one session.
#[derive(Default)]
pub(crate) struct Sleeper {
    /// Twice the ended turns, plus 1 while somebody leads. Followers sleep on it.
    turn: AtomicU32,
    /// The background thread found bytes while somebody led.
    missed: AtomicBool,
    followers: AtomicU32,
    frames: Mutex<FrameDecoder>,
    /// Wakes the thread that sleeps on the connection, from within this process.
    bell: Mutex<Option<Arc<EventFd>>>,
}

/// What a drain found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drained {
    /// The connection goes on.
    Open,
    /// End of stream, reset or another error: the connection is over.
    Ended,
    /// Not the connection, but a doorbell that is about this session.
    Doorbell,
}

/// What ended a leader's sleep.
enum Woken {
    /// Another thread of this process, or nothing.
    Bell,
    /// Something on the connection.
    Connection,
    /// A doorbell about this session.
    Doorbell,
}

impl Sleeper {
    /// Sleeps until `ready`, which sets the wait flag and looks again before it says no.
    ///
    /// `drained` is told what woke the leader; once that is the end of the connection, `ready` must
    /// say yes. `ear` is the doorbell of the session's attachment.
    ///
    /// # Errors
    /// `TimedOut` at the deadline, `Interrupted` by a signal, or what `ready` reports.
    pub(crate) fn sleep(
        &self,
        conn: &Fd,
        bells: &Bells,
        ear: Option<&Ear>,
        deadline: Deadline,
        mut ready: impl FnMut() -> Result<bool>,
        mut drained: impl FnMut(Drained),
    ) -> Result<()> {
        loop {
            // SeqCst here and below: one order of turns, followers and `missed` for all.
            let seen = self.turn.load(Ordering::SeqCst);
            if ready()? {
                return Ok(());
            }
            let left = deadline.left()?;
            if seen % 2 == 1 {
                self.follow(seen, left)?;
                continue;
            }
            if !self.lead(seen) {
                continue;
            }
            let polled = self.poll(conn, bells, ear, left, seen + 1);
            match polled {
                Ok(Woken::Bell) => {}
                Ok(Woken::Connection) => drained(self.drain(conn)),
                Ok(Woken::Doorbell) => drained(Drained::Doorbell),
                Err(error) => {
                    self.end_turn(conn, &mut drained);
                    return Err(error);
                }
            }
            self.end_turn(conn, &mut drained);
        }
    }

    /// Drains in the name of the background thread: at once, or through whoever leads now.
    pub(crate) fn drain_in_background(&self, conn: &Fd, mut drained: impl FnMut(Drained)) {
        self.missed.store(true, Ordering::SeqCst);
        if self.lead_if_nobody_does() {
            self.end_turn(conn, &mut drained);
        }
    }

    /// Sleeps on the connection as the leader, whose turn is `mine`; on the doorbell, too, while this
    /// thread leads on that.
    fn poll(
        &self,
        conn: &Fd,
        bells: &Bells,
        ear: Option<&Ear>,
        left: Option<Duration>,
        mine: u32,
    ) -> Result<Woken> {
        let bell = bells.take()?;
        *lock(&self.bell) = Some(Arc::clone(&bell));
        let polled = self.poll_until(conn, &bell, ear, left, mine);
        *lock(&self.bell) = None;
        // It may have been rung meanwhile: whoever has it next looks once in vain.
        bells.put(bell);
        match polled {
            Ok(woken) => Ok(woken),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {
                Err(Error::Interrupted)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn poll_until(
        &self,
        conn: &Fd,
        bell: &Arc<EventFd>,
        ear: Option<&Ear>,
        left: Option<Duration>,
        mine: u32,
    ) -> std::io::Result<Woken> {
        // Only a sleep that is cut into pieces needs to know when it ends.
        let end = ear.and(left).and_then(|left| Instant::now().checked_add(left));
        let mut left = left;
        let seat = ear.map(|ear| ear.enter(bell));
        // `wake_all` changes the turn, then looks for the bell and rings it; we have set the bell,
        // and look at the turn before each sleep, after the bell was drained. (The locks of `bell`
        // order the two.) So it is with the lead, which is given before the bell is rung.
        while self.turn.load(Ordering::SeqCst) == mine {
            let doorbell = seat.as_ref().and_then(|seat| Some((seat, seat.doorbell()?)));
            let mut fds = [
                PollFd::new(conn, poll::IN | poll::RDHUP),
                PollFd::new(&**bell, poll::IN),
                PollFd::new(doorbell.map_or(&**bell, |(_, doorbell)| doorbell), poll::IN),
            ];
            let (fds, timeout) = match doorbell {
                Some(_) => (&mut fds[..], Some(left.map_or(BACKSTOP, |left| left.min(BACKSTOP)))),
                None => (&mut fds[..2], left),
            };
            let found = poll::poll(fds, timeout)?;
            if fds[1].revents() != 0 {
                // An eventfd of our own does not fail.
                let _ = bell.drain();
            }
            // Also where the connection has something: what came with it is not to be found late.
            let concerned = doorbell.is_some_and(|(seat, _)| {
                if fds[2].revents() != 0 {
                    seat.drain()
                } else {
                    // Whoever waits for less has others look, who wait for more.
                    found == 0 && timeout == Some(BACKSTOP) && seat.look()
                }
            });
            if fds[0].revents() != 0 {
                return Ok(Woken::Connection);
            }
            if concerned {
                return Ok(Woken::Doorbell);
            }
            if let Some(end) = end {
                let rest = end.saturating_duration_since(Instant::now());
                if rest.is_zero() {
                    break;
                }
                left = Some(rest);
            } else if found == 0 && doorbell.is_none() {
                break;
            }
        }
        Ok(Woken::Bell)
    }

    /// Makes every thread inside look at its condition again.
    pub(crate) fn wake_all(&self) {
        self.turn.fetch_add(2, Ordering::SeqCst);
        self.wake_followers();
        if let Some(bell) = lock(&self.bell).as_ref() {
            // An eventfd refuses only when 2^64 - 1 notifications are pending.
            let _ = bell.notify();
        }
    }

    /// Sleeps until the turn is no longer `seen`.
    fn follow(&self, seen: u32, left: Option<Duration>) -> Result<()> {
        self.followers.fetch_add(1, Ordering::SeqCst);
        let slept = futex::wait(&self.turn, seen, left);
        self.followers.fetch_sub(1, Ordering::SeqCst);
        match slept {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {
                Err(Error::Interrupted)
            }
            // Whatever else it was: look again.
            _ => Ok(()),
        }
    }

    /// Takes the lead, unless the turn is no longer `seen`.
    fn lead(&self, seen: u32) -> bool {
        self.turn.compare_exchange(seen, seen + 1, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    fn lead_if_nobody_does(&self) -> bool {
        loop {
            let seen = self.turn.load(Ordering::SeqCst);
            if seen % 2 == 1 {
                return false;
            }
            if self.lead(seen) {
                return true;
            }
        }
    }

    fn end_turn(&self, conn: &Fd, drained: &mut impl FnMut(Drained)) {
        loop {
            if self.missed.swap(false, Ordering::SeqCst) {
                drained(self.drain(conn));
            }
            self.turn.fetch_add(1, Ordering::SeqCst);
            self.wake_followers();
            // The background thread sets `missed`, then looks who leads; we stop leading, then
            // look at `missed`: one of us sees the other.
            if !self.missed.load(Ordering::SeqCst) || !self.lead_if_nobody_does() {
                return;
            }
        }
    }

    fn wake_followers(&self) {
        if self.followers.load(Ordering::SeqCst) > 0 {
            futex::wake(&self.turn, u32::MAX);
        }
    }

    fn drain(&self, conn: &Fd) -> Drained {
        let mut frames = lock(&self.frames);
        let mut buffer = [0; 64];
        for _ in 0..READS_PER_DRAIN {
            match mem::with_uninit(&mut buffer, |into| net::recv(conn, into, MSG_DONTWAIT)) {
                Ok(0) => return Drained::Ended,
                Ok(n) => {
                    frames.push(&buffer[..n]);
                    if n < buffer.len() {
                        return Drained::Open;
                    }
                }
                Err(error) => {
                    return match error.kind() {
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted => {
                            Drained::Open
                        }
                        _ => Drained::Ended,
                    }
                }
            }
        }
        Drained::Open
    }
}
