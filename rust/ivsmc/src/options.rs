//! Socket options of a session: the TCP connection's, less what the session needs for itself.
//!
//! On shared memory the connection is kept alive by probes of our own and sends its wake bytes at
//! once. The user neither sees these settings nor changes them: what he sets is remembered and
//! shown to him. All other options are the connection's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;

use ivsmc_shm::fd::Fd;
use ivsmc_shm::net::{
    self, IPPROTO_TCP, SOL_SOCKET, SO_ERROR, SO_KEEPALIVE, SO_LINGER, TCP_KEEPCNT, TCP_KEEPIDLE,
    TCP_KEEPINTVL, TCP_NODELAY,
};

use crate::reactor::lock;
use crate::Result;

/// Seconds of silence before the first probe, between probes, and how many go unanswered before
/// the connection is over: a killed VM is noticed, one paused for ten minutes survives.
const IDLE: i32 = 30;
const INTERVAL: i32 = 15;
const PROBES: i32 = 40;

/// The options the session sets for itself, and what to.
const OURS: [(i32, i32, i32); 5] = [
    (SOL_SOCKET, SO_KEEPALIVE, 1),
    (IPPROTO_TCP, TCP_KEEPIDLE, IDLE),
    (IPPROTO_TCP, TCP_KEEPINTVL, INTERVAL),
    (IPPROTO_TCP, TCP_KEEPCNT, PROBES),
    (IPPROTO_TCP, TCP_NODELAY, 1),
];

/// The options of one session.
pub(crate) struct Options {
    /// What the user would see of [`OURS`] on a plain socket; empty on TCP.
    hidden: Mutex<Vec<(i32, i32, i32)>>,
    smc: bool,
    /// The user asked for `SO_LINGER` with time zero: closing is a reset.
    abort: AtomicBool,
}

impl Options {
    /// For a session on TCP: everything is the connection's.
    pub(crate) fn plain() -> Self {
        Self { hidden: Mutex::default(), smc: false, abort: AtomicBool::new(false) }
    }

    /// Sets `conn` up for wake bytes and notices of death.
    pub(crate) fn for_wakes(conn: &Fd) -> Result<Self> {
        let mut hidden = Vec::with_capacity(OURS.len());
        for (level, name, value) in OURS {
            hidden.push((level, name, net::get_option_int(conn, level, name)?));
            net::set_option_int(conn, level, name, value)?;
        }
        Ok(Self { hidden: Mutex::new(hidden), smc: true, abort: AtomicBool::new(false) })
    }

    /// Whether `close` is to be a reset.
    pub(crate) fn aborts(&self) -> bool {
        self.abort.load(Ordering::Relaxed)
    }

    pub(crate) fn get(&self, conn: &Fd, level: i32, name: i32, into: &mut [u8]) -> Result<usize> {
        let hidden = lock(&self.hidden)
            .iter()
            .find(|(l, n, _)| (*l, *n) == (level, name))
            .map(|&(_, _, value)| value);
        if let Some(value) = hidden {
            return Ok(fill(into, value));
        }
        if self.smc && (level, name) == (SOL_SOCKET, SO_ERROR) {
            // An unread wake byte makes the kernel report a reset that is none; the ring tells.
            return Ok(fill(into, 0));
        }
        Ok(net::get_option(conn, level, name, into)?)
    }

    pub(crate) fn set(&self, conn: &Fd, level: i32, name: i32, value: &[u8]) -> Result<()> {
        let mut hidden = lock(&self.hidden);
        if let Some(entry) = hidden.iter_mut().find(|(l, n, _)| (*l, *n) == (level, name)) {
            let bytes = value
                .first_chunk()
                .ok_or_else(|| crate::Error::Os(std::io::Error::from_raw_os_error(22)))?;
            let value = i32::from_ne_bytes(*bytes);
            let flag = matches!(name, SO_KEEPALIVE) || (level, name) == (IPPROTO_TCP, TCP_NODELAY);
            entry.2 = if flag { i32::from(value != 0) } else { value };
            return Ok(());
        }
        drop(hidden);
        net::set_option(conn, level, name, value)?;
        if (level, name) == (SOL_SOCKET, SO_LINGER) {
            // struct linger: two ints, whether it is on and for how many seconds.
            let on = value.first_chunk().is_some_and(|on| i32::from_ne_bytes(*on) != 0);
            let zero = value.get(4..8).is_some_and(|seconds| seconds == [0; 4]);
            self.abort.store(on && zero, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn fill(into: &mut [u8], value: i32) -> usize {
    let bytes = value.to_ne_bytes();
    let n = bytes.len().min(into.len());
    into[..n].copy_from_slice(&bytes[..n]);
    n
}
