//! The loop that serves those who connect to a [`Socket`], on the thread of whoever calls it.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use ivsmc_shm::fd::Fd;
use ivsmc_shm::fork;
use ivsmc_shm::poll::{self, Epoll, EpollEvent, EventFd};

use super::{Admission, Socket};
use crate::host::{Host, Timeout};
use crate::{Error, Result};

/// Keys of the epoll.
const STOP: u64 = 0;
const LISTENER: u64 = 1;
/// Those of a [`Daemon`]'s own descriptors are from here on.
pub(crate) const FIRST_KEY: u64 = 2;

/// Newcomers that are taken in, one after the other, though the time to serve is over.
const LAST_TURNS: u32 = 64;

/// An ivshmem server or an agent: what there is to do when its [`Serving`] has something ready.
pub(crate) trait Daemon {
    /// What it tells its caller.
    type Event;
    /// As people call it.
    const NAME: &'static str;

    /// When to [`Daemon::turn`] though nothing may be ready.
    fn next_look(&self) -> Option<Instant>;
    /// Handles what is ready of its own descriptors, and what it is time for.
    fn turn<'a>(&self, ready: impl Iterator<Item = &'a EpollEvent>, events: &mut Vec<Self::Event>);
    /// Takes a newcomer in, or counts that it was turned away, and why.
    fn meet(&self, arrived: Result<Fd, String>, events: &mut Vec<Self::Event>);
    /// What to tell when nobody is accepted for a while.
    fn paused(reason: String) -> Self::Event;
}

/// A listening socket, and an epoll that watches it together with a [`Daemon`]'s own descriptors.
#[derive(Debug)]
pub(crate) struct Serving {
    epoll: Epoll,
    stop: Arc<EventFd>,
    socket: Socket,
    /// Held by the thread that serves.
    admission: Mutex<Admission>,
    generation: u32,
}

/// Ends [`Serving::run`], from any thread.
#[derive(Clone, Debug)]
pub(crate) struct Stop(Arc<EventFd>);

impl Stop {
    /// Makes [`Serving::run`] return soon; if it does not run now, then its next call at once.
    pub(crate) fn stop(&self) {
        // Fails only in a forked child, where there is nothing to stop.
        let _ = self.0.notify();
    }
}

impl Serving {
    pub(crate) fn new(socket: Socket) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let admission = Mutex::new(Admission::new(&socket, &epoll, LISTENER)?);
        let stop = Arc::new(EventFd::new()?);
        epoll.add(&*stop, poll::IN, STOP)?;
        Ok(Self { epoll, stop, socket, admission, generation: fork::generation() })
    }

    pub(crate) fn stop(&self) -> Stop {
        Stop(Arc::clone(&self.stop))
    }

    /// Where clients connect.
    pub(crate) fn path(&self) -> &Path {
        self.socket.path()
    }

    /// Where clients come in.
    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// What watches a daemon's own descriptors.
    pub(crate) fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// # Errors
    /// [`Error::Forked`] in a forked child.
    pub(crate) fn judge_process(&self) -> Result<()> {
        if fork::is_current(self.generation) {
            Ok(())
        } else {
            Err(Error::Forked)
        }
    }

    /// Has `daemon` serve until [`Stop::stop`], or for `time`: at once, having done what there is to do,
    /// for [`Timeout::NonBlocking`].
    ///
    /// # Errors
    /// Whatever [`Host::interrupted`] gives after a signal; [`Error::ApiMisuse`] if another thread
    /// is serving, [`Error::Forked`] in a forked child, [`Error::Os`] if waiting fails.
    pub(crate) fn run<D: Daemon>(
        &self,
        daemon: &D,
        time: Timeout,
        host: &impl Host,
        mut on_event: impl FnMut(D::Event),
    ) -> Result<()> {
        self.judge_process()?;
        let mut admission = match self.admission.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::ApiMisuse(format!("this {} is being served already", D::NAME)))
            }
        };
        let deadline = time.deadline();
        let mut ready = [EpollEvent::default(); 64];
        let mut events = Vec::new();
        let mut last_turns = 0..LAST_TURNS;
        loop {
            if host.handles_signals() {
                // One that came while an event was told, for instance.
                host.interrupted()?;
            }
            // Over: look once more, without waiting.
            let left = deadline.left().unwrap_or(Some(Duration::ZERO));
            let look = daemon.next_look().into_iter().chain(admission.resumes_at()).min();
            let look = look.map(|when| when.saturating_duration_since(Instant::now()));
            let timeout = look.into_iter().chain(left).min();
            let waited = host.blocking(|| self.epoll.wait(&mut ready, timeout));
            let ready = match waited {
                Ok(count) => &ready[..count],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    host.interrupted()?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let is_ready = |key| ready.iter().any(|event| event.key() == key);
            daemon.turn(ready.iter().filter(|event| event.key() >= FIRST_KEY), &mut events);
            let mut has_met = false;
            // After the leavers, whose slots, vectors, ids and descriptors may be needed.
            if admission.resume(&self.socket, &self.epoll, Instant::now()) || is_ready(LISTENER) {
                let paused = admission.accept(&self.socket, &self.epoll, |arrived| {
                    daemon.meet(arrived, &mut events);
                    has_met = true;
                });
                events.extend(paused.map(D::paused));
            }
            let stopped = is_ready(STOP);
            if stopped {
                // It is drained by the call that obeys it.
                let _ = self.stop.drain();
            }
            events.drain(..).for_each(&mut on_event);
            let is_over = left == Some(Duration::ZERO);
            if stopped || is_over && (!has_met || last_turns.next().is_none()) {
                return Ok(());
            }
        }
    }
}
