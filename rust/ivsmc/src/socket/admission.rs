//! Taking newcomers in, also when descriptors run out: a clear answer is better than one that never
//! comes.

use std::io;
use std::time::{Duration, Instant};

use ivsmc_shm::errno;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::poll::{self, Epoll, EventFd};

use super::Socket;

/// When to accept again after even refusing was not possible.
const RESUME: Duration = Duration::from_secs(1);

/// Accepts from a [`Socket`] that an [`Epoll`] watches.
#[derive(Debug)]
pub(super) struct Admission {
    /// Of the socket, in the epoll.
    key: u64,
    /// Given up for a moment to turn a newcomer away when there are no more descriptors.
    spare: Option<EventFd>,
    /// When to accept again.
    resume: Option<Instant>,
}

/// Who has come.
#[derive(Debug)]
enum Arrival {
    Newcomer(Fd),
    /// One was refused for this reason.
    TurnedAway(String),
    /// Nobody waits, or one that does is found at the next look.
    Nobody,
    /// Nobody is accepted for a while, for this reason.
    Paused(String),
}

impl Admission {
    /// Has `epoll` watch `socket` as `key`.
    pub(super) fn new(socket: &Socket, epoll: &Epoll, key: u64) -> io::Result<Self> {
        epoll.add(socket, poll::IN, key)?;
        Ok(Self { key, spare: Some(EventFd::new()?), resume: None })
    }

    /// Has `meet` take the next one in who waits, or be told why it was turned away. Why nobody is
    /// accepted for a while, if so.
    ///
    /// One at a time: who has left meanwhile leaves its place to the one after, so that somebody who comes
    /// and goes as fast as it can does not take one place after the other.
    pub(super) fn accept(
        &mut self,
        socket: &Socket,
        epoll: &Epoll,
        meet: impl FnOnce(Result<Fd, String>),
    ) -> Option<String> {
        match self.next(socket, epoll) {
            Arrival::Newcomer(newcomer) => meet(Ok(newcomer)),
            Arrival::TurnedAway(reason) => meet(Err(reason)),
            Arrival::Nobody => {}
            Arrival::Paused(reason) => return Some(reason),
        }
        None
    }

    /// Takes the next newcomer, if one waits.
    fn next(&mut self, socket: &Socket, epoll: &Epoll) -> Arrival {
        if self.resume.is_some() {
            return Arrival::Nobody;
        }
        let error = match socket.accept() {
            Ok(newcomer) => return Arrival::Newcomer(newcomer),
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(errno::EAGAIN | errno::EINTR | errno::ECONNABORTED) => Arrival::Nobody,
            Some(errno::EMFILE | errno::ENFILE) => match self.turn_away(socket) {
                Ok(true) => Arrival::TurnedAway(descriptors_ended(&error)),
                Ok(false) => Arrival::Nobody,
                Err(()) => self.pause(socket, epoll, descriptors_ended(&error)),
            },
            _ => self.pause(socket, epoll, error.to_string()),
        }
    }

    /// When [`Admission::resume`] is to be called, if it is.
    pub(super) fn resumes_at(&self) -> Option<Instant> {
        self.resume
    }

    /// Accepts again, if it is time; whether somebody may wait.
    pub(super) fn resume(&mut self, socket: &Socket, epoll: &Epoll, now: Instant) -> bool {
        let due = self.resume.is_some_and(|when| when <= now);
        if due {
            self.resume = None;
        }
        due && epoll.modify(socket, poll::IN, self.key).is_ok()
    }

    /// Ends the connection of the next newcomer, for whom there is no descriptor. Whether there
    /// was a newcomer; an error if it cannot even be turned away.
    fn turn_away(&mut self, socket: &Socket) -> Result<bool, ()> {
        drop(self.spare.take().ok_or(())?);
        let accepted = socket.accept();
        let refused = accepted.is_ok();
        let error = accepted.err().and_then(|error| error.raw_os_error());
        // Another thread may have been faster to take the descriptor; then the next time pauses.
        self.spare = EventFd::new().ok();
        match error {
            Some(errno::EMFILE | errno::ENFILE) => Err(()),
            _ => Ok(refused),
        }
    }

    fn pause(&mut self, socket: &Socket, epoll: &Epoll, reason: String) -> Arrival {
        if self.spare.is_none() {
            self.spare = EventFd::new().ok();
        }
        // The listener would be reported as ready again and again.
        if epoll.modify(socket, 0, self.key).is_err() {
            return Arrival::Nobody;
        }
        self.resume = Some(Instant::now() + RESUME);
        Arrival::Paused(reason)
    }
}

/// What is said where there are no more descriptors.
pub(crate) fn descriptors_ended(error: &io::Error) -> String {
    format!("{error}; raise the limit of open files (ulimit -n, LimitNOFILE=)")
}
