//! What can go wrong, sorted by whose fault it is.

use std::fmt;
use std::io;

use crate::fallback::Fallback;

/// Result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation failed.
///
/// [`Error::errno`] gives the number a stream socket would have reported, so that callers used
/// to sockets need not know about shared memory.
#[derive(Debug)]
pub enum Error {
    /// The operation would have to wait and was told not to.
    WouldBlock,
    /// The time the caller gave ran out; nothing was transferred.
    TimedOut,
    /// The host asked to stop waiting (a signal handler raised).
    Interrupted,
    /// The session or listener is closed in this process.
    Closed,
    /// The session was made before a `fork` and belongs to the parent.
    Forked,
    /// The peer ended without closing: killed, reset, or it closed with unread data.
    Reset,
    /// Sending after this end shut down sending, or after the peer closed.
    BrokenPipe,
    /// The peer broke the rules of the ring or of the handshake; the session is poisoned.
    PeerMisbehaved(String),
    /// The caller asked for something a session does not do; names it and what to do instead.
    ApiMisuse(String),
    /// Shared memory was required and cannot be used.
    Required(Box<Fallback>),
    /// A device cannot be used: its spec and the reason with its cure.
    Device {
        /// The device spec as given.
        spec: String,
        /// What was found and what mends it.
        reason: String,
    },
    /// What is behind a device is not a region, or not one of this version.
    Region {
        /// The device spec as given.
        spec: String,
        /// What was found and what mends it.
        reason: String,
    },
    /// The operating system refused.
    Os(io::Error),
}

impl Error {
    /// A [`Error::Device`] about `spec`.
    pub fn device(spec: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Device { spec: spec.into(), reason: reason.into() }
    }

    /// A [`Error::Region`] about `spec`.
    pub fn region(spec: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Region { spec: spec.into(), reason: reason.into() }
    }

    /// The errno a stream socket would have given, if one fits.
    pub fn errno(&self) -> Option<i32> {
        // The numbers are Linux's, equal on every architecture this crate supports.
        Some(match self {
            Self::WouldBlock => 11,
            Self::Interrupted => 4,
            Self::TimedOut => 110,
            Self::Closed => 9,
            Self::Reset => 104,
            Self::BrokenPipe => 32,
            Self::PeerMisbehaved(_) => 71,
            Self::ApiMisuse(_) => 95,
            Self::Os(error) => return error.raw_os_error(),
            Self::Forked | Self::Required(_) | Self::Device { .. } | Self::Region { .. } => {
                return None
            }
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WouldBlock => f.write_str("the operation would block"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Interrupted => f.write_str("interrupted by a signal"),
            Self::Closed => f.write_str("the session is closed"),
            Self::Forked => f.write_str(
                "this session was opened before fork() and belongs to the parent process; \
                 accept or connect in the child instead",
            ),
            Self::Reset => f.write_str("connection reset by peer"),
            Self::BrokenPipe => f.write_str("broken pipe"),
            Self::PeerMisbehaved(what) => write!(f, "the peer broke the protocol: {what}"),
            Self::ApiMisuse(what) => f.write_str(what),
            Self::Required(why) => {
                write!(f, "shared memory is required (require=\"smc\") but cannot be used: {why}")
            }
            Self::Device { spec, reason } => write!(f, "device {spec}: {reason}"),
            Self::Region { spec, reason } => write!(f, "region of device {spec}: {reason}"),
            Self::Os(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Os(error) => Some(error),
            _ => None,
        }
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(11) => Self::WouldBlock,
            Some(32) => Self::BrokenPipe,
            Some(104) => Self::Reset,
            _ => Self::Os(error),
        }
    }
}
