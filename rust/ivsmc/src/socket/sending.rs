//! Sending to a client without ever waiting for it.

use std::io;
use std::time::{Duration, Instant};

use ivsmc_shm::errno;

/// When to send again after the kernel had no room for reasons beyond a client.
const AGAIN: Duration = Duration::from_millis(100);

/// How far sending got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// As far as it can go before the client reads or ends; its socket tells when.
    Done,
    /// The client has ended; its socket tells so, and then it is taken care of.
    Ended,
    /// The kernel has no room for reasons beyond this client; nothing tells when it has again.
    Retry,
}

/// Sends by `attempt`, which does not wait: what that gives, or why nothing was sent.
pub(crate) fn send<T>(mut attempt: impl FnMut() -> io::Result<T>) -> Result<T, Flushed> {
    loop {
        let error = match attempt() {
            Ok(sent) => return Ok(sent),
            Err(error) => error,
        };
        return Err(match error.raw_os_error() {
            Some(errno::EINTR) => continue,
            Some(errno::EAGAIN) => Flushed::Done,
            Some(errno::EPIPE | errno::ECONNRESET) => Flushed::Ended,
            // ETOOMANYREFS: other processes of this user keep too many in flight.
            _ => Flushed::Retry,
        });
    }
}

/// When to send to all clients again, if nothing else tells when.
#[derive(Debug, Default)]
pub(crate) struct Retry(Option<Instant>);

impl Retry {
    /// Notes how far sending to one client got.
    pub(crate) fn note(&mut self, flushed: Flushed) {
        if flushed == Flushed::Retry {
            self.0.get_or_insert_with(|| Instant::now() + AGAIN);
        }
    }

    /// When [`Retry::is_due`] will be so, if it will.
    pub(crate) fn at(&self) -> Option<Instant> {
        self.0
    }

    /// Whether it is time; it is said once.
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        self.0.take_if(|when| *when <= now).is_some()
    }
}
