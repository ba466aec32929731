//! Who runs the session: how a call may sleep, and how long.

use std::time::{Duration, Instant};

use crate::Result;

/// How a caller's runtime wants waiting done.
///
/// Rust programs use [`Plain`]; the Python module drops the GIL around [`Host::blocking`] and
/// runs signal handlers in [`Host::interrupted`].
pub trait Host {
    /// Runs `f`, which may sleep or copy for long.
    fn blocking<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T;
    /// A signal arrived while waiting.
    ///
    /// # Errors
    /// [`crate::Error::Interrupted`] to end the call; `Ok` to go on waiting.
    fn interrupted(&self) -> Result<()>;
    /// Whether signals are handled on this thread, by [`Host::interrupted`]: it is then asked once
    /// more before the thread sleeps, for a signal that came while it was awake.
    fn handles_signals(&self) -> bool {
        false
    }
}

/// Waits as an ordinary thread does, and goes on after signals.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

impl Host for Plain {
    fn blocking<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        f()
    }

    fn interrupted(&self) -> Result<()> {
        Ok(())
    }
}

/// How long a call may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timeout {
    /// Not at all: [`crate::Error::WouldBlock`] instead.
    NonBlocking,
    /// At most this long: [`crate::Error::TimedOut`] then.
    After(Duration),
    /// For ever.
    Never,
}

impl Timeout {
    /// The moment the wait ends, if it does.
    pub fn deadline(self) -> Deadline {
        match self {
            Self::NonBlocking => Deadline::At(Instant::now()),
            // A duration past the clock's end is for ever.
            Self::After(time) => {
                Instant::now().checked_add(time).map_or(Deadline::Never, Deadline::At)
            }
            Self::Never => Deadline::Never,
        }
    }
}

/// A [`Timeout`] that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// Ends at this moment.
    At(Instant),
    /// Does not end.
    Never,
}

impl Deadline {
    /// Time left: `Ok(None)` for ever, `Err(TimedOut)` when it is over.
    ///
    /// # Errors
    /// [`crate::Error::TimedOut`] once the moment has passed.
    pub fn left(self) -> Result<Option<Duration>> {
        match self {
            Self::Never => Ok(None),
            Self::At(when) => {
                let left = when.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    Err(crate::Error::TimedOut)
                } else {
                    Ok(Some(left))
                }
            }
        }
    }

    /// The earlier of this and `other`.
    #[must_use]
    pub fn earlier(self, other: Instant) -> Self {
        match self {
            Self::At(when) if when <= other => self,
            _ => Self::At(other),
        }
    }
}
