//! A descriptor that shows a session's readiness to `select`, `poll` and `epoll`.
//!
//! It is one end of a Unix stream socket pair: the user holds A, this process keeps B. A byte on
//! B's way makes A readable; A filled to its brim is not writable; shutting B's sending side down
//! shows `RDHUP`, closing B shows `HUP`. All level-triggered, changed only on transitions, and
//! made only once `fileno()` was asked for. Reading or writing A oneself is a misuse that shows
//! as the session's error.

use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};

use ivsmc_shm::fd::Fd;
use ivsmc_shm::net::{self, MSG_DONTWAIT};

use crate::Result;

/// One write of this size fills the smallest send buffer the kernel gives (it rounds
/// `SO_SNDBUF` = 1 up to 4,608 bytes and calls a socket writable below a quarter of it).
const FILL: usize = 4096;

pub(crate) struct Readiness {
    /// What the user polls.
    user: Fd,
    engine: Option<Fd>,
    readable: bool,
    writable: bool,
    read_ended: bool,
}

impl Readiness {
    /// A descriptor that is writable and not readable.
    pub(crate) fn new() -> Result<Self> {
        let (user, engine) = net::socketpair_stream()?;
        net::set_nonblocking(&user, true)?;
        net::set_nonblocking(&engine, true)?;
        net::set_option_int(&user, net::SOL_SOCKET, net::SO_SNDBUF, 1)?;
        Ok(Self { user, engine: Some(engine), readable: false, writable: true, read_ended: false })
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.user.as_raw_fd()
    }

    pub(crate) fn set_readable(&mut self, readable: bool) {
        let Some(engine) = &self.engine else { return };
        if readable == self.readable || self.read_ended {
            return;
        }
        // Failures mean that the user reads or writes the descriptor; it then shows what it shows.
        if readable {
            let _ = net::send(engine, &[0], MSG_DONTWAIT);
        } else {
            let _ = net::recv(&self.user, &mut [MaybeUninit::uninit(); 1], MSG_DONTWAIT);
        }
        self.readable = readable;
    }

    pub(crate) fn set_writable(&mut self, writable: bool) {
        let Some(engine) = &self.engine else { return };
        if writable == self.writable {
            return;
        }
        if writable {
            let mut sink = [MaybeUninit::uninit(); FILL];
            while net::recv(engine, &mut sink, MSG_DONTWAIT).is_ok_and(|n| n > 0) {}
        } else {
            let _ = net::send(&self.user, &[0; FILL], MSG_DONTWAIT);
        }
        self.writable = writable;
    }

    /// The peer sends no more: readable for good, with `RDHUP`.
    pub(crate) fn end_reading(&mut self) {
        if let (Some(engine), false) = (&self.engine, self.read_ended) {
            let _ = net::shutdown(engine, Shutdown::Write);
            self.read_ended = true;
        }
    }

    /// Both directions are over: `HUP`, readable and writable for good.
    pub(crate) fn hang_up(&mut self) {
        self.set_writable(true);
        self.engine = None;
    }
}
