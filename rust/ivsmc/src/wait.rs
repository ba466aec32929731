//! One sleeper per descriptor: leader and followers.
//!
//! The peer wakes a session by one byte on its TCP connection. Of the threads that wait on a
//! session one leads and sleeps on the connection; the others sleep on a process-private futex.
//! Two threads asleep on one TCP connection lose nearly every second wake-up (measured), so the
//! leader drains the bytes for all: it ends its turn, and each follower looks at its own
//! condition again, one of them leading next. No thread stands in between. Who leads is in
//! `ivsmc_proto::turn`; here is how they sleep.
//!
//! Where the attachment has a doorbell, the leader is one of those that sleep on that
//! (`attachment::doorbell`), and polls it, too, while it leads them all.

use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ivsmc_proto::frame::FrameDecoder;
use ivsmc_proto::turn::{Lead, Seen, Turns};
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
    turns: Turns,
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
            let seen = self.turns.see();
            if ready()? {
                return Ok(());
            }
            let left = deadline.left()?;
            if seen.is_led() {
                self.follow(seen, left)?;
                continue;
            }
            let Some(lead) = self.turns.lead(seen) else { continue };
            let polled = self.poll(conn, bells, ear, left, &lead);
            match polled {
                Ok(Woken::Bell) | Err(_) => {}
                Ok(Woken::Connection) => drained(self.drain(conn)),
                Ok(Woken::Doorbell) => drained(Drained::Doorbell),
            }
            self.end_turn(lead, conn, &mut drained);
            polled?;
        }
    }

    /// Drains in the name of the background thread: at once, or through whoever leads now.
    pub(crate) fn drain_in_background(&self, conn: &Fd, mut drained: impl FnMut(Drained)) {
        if let Some(lead) = self.turns.miss() {
            self.end_turn(lead, conn, &mut drained);
        }
    }

    /// Sleeps on the connection as the leader; on the doorbell, too, while this thread leads on that.
    fn poll(
        &self,
        conn: &Fd,
        bells: &Bells,
        ear: Option<&Ear>,
        left: Option<Duration>,
        lead: &Lead,
    ) -> Result<Woken> {
        let bell = bells.take()?;
        *lock(&self.bell) = Some(Arc::clone(&bell));
        let polled = self.poll_until(conn, &bell, ear, left, lead);
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
        lead: &Lead,
    ) -> std::io::Result<Woken> {
        // Only a sleep that is cut into pieces needs to know when it ends.
        let end = ear.and(left).and_then(|left| Instant::now().checked_add(left));
        let mut left = left;
        let seat = ear.map(|ear| ear.enter(bell));
        // `wake_all` changes the turn, then looks for the bell and rings it; we have set the bell,
        // and look at the turn before each sleep, after the bell was drained. (The locks of `bell`
        // order the two.) So it is with the lead, which is given before the bell is rung.
        while self.turns.lasts(lead) {
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
        self.turns.disturb(wake_all);
        if let Some(bell) = lock(&self.bell).as_ref() {
            // An eventfd refuses only when 2^64 - 1 notifications are pending.
            let _ = bell.notify();
        }
    }

    /// Sleeps until something has changed since `seen`.
    fn follow(&self, seen: Seen, left: Option<Duration>) -> Result<()> {
        match self.turns.follow(seen, |word, value| futex::wait(word, value, left)) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {
                Err(Error::Interrupted)
            }
            // Whatever else it was: look again.
            _ => Ok(()),
        }
    }

    fn end_turn(&self, lead: Lead, conn: &Fd, drained: &mut impl FnMut(Drained)) {
        self.turns.end(lead, wake_all, || drained(self.drain(conn)));
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

/// Wakes all that sleep on the word.
fn wake_all(word: &AtomicU32) {
    futex::wake(word, u32::MAX);
}
