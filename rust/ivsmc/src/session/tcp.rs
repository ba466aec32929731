//! A session that goes on over TCP: one system call an operation, as a plain socket does it.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use ivsmc_shm::fd::Fd;
use ivsmc_shm::net::{self, MSG_DONTWAIT};
use ivsmc_shm::poll::{self, PollFd};

use super::{Inner, Path, RecvFlags, SessionStats, CLOSED};
use crate::host::{Deadline, Host, Timeout};
use crate::{Error, Result};

/// Payload bytes so far.
#[derive(Default)]
pub(super) struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
    /// Number of an error that the kernel has told and nobody else has; 0 for none.
    left: AtomicI32,
}

impl Traffic {
    /// Has the next call fail with `error`, where the kernel would not say it again.
    pub(super) fn leave(&self, error: &Error) {
        if let (Error::Reset | Error::Os(_), Some(number)) = (error, error.errno()) {
            self.left.store(number, Ordering::Relaxed);
        }
    }

    fn take_left(&self) -> Result<()> {
        // Most often there is none: a load costs less than a swap.
        match self.left.load(Ordering::Relaxed) {
            0 => Ok(()),
            _ => match self.left.swap(0, Ordering::Relaxed) {
                0 => Ok(()),
                number => Err(std::io::Error::from_raw_os_error(number).into()),
            },
        }
    }

    pub(super) fn stats(&self) -> SessionStats {
        SessionStats {
            bytes_sent: self.sent.load(Ordering::Relaxed),
            bytes_received: self.received.load(Ordering::Relaxed),
            ..SessionStats::default()
        }
    }
}

impl Inner {
    pub(super) fn tcp_send(
        &self,
        from: &[u8],
        timeout: Timeout,
        deadline: Deadline,
        host: &impl Host,
    ) -> Result<usize> {
        let conn = self.conn()?;
        let sent = self.tcp(&conn, poll::OUT, timeout, deadline, host, |flags| {
            net::send(&*conn, from, flags)
        })?;
        self.count(sent, 0);
        Ok(sent)
    }

    pub(super) fn tcp_send_vectored(
        &self,
        from: &[IoSlice<'_>],
        timeout: Timeout,
        host: &impl Host,
    ) -> Result<usize> {
        let conn = self.conn()?;
        let sent = self.tcp(&conn, poll::OUT, timeout, timeout.deadline(), host, |flags| {
            net::send_vectored(&*conn, from, flags)
        })?;
        self.count(sent, 0);
        Ok(sent)
    }

    pub(super) fn tcp_recv(
        &self,
        into: &mut [MaybeUninit<u8>],
        flags: RecvFlags,
        timeout: Timeout,
        host: &impl Host,
    ) -> Result<usize> {
        let conn = self.conn()?;
        let mut extra = 0;
        if flags.peek {
            extra |= net::MSG_PEEK;
        }
        if flags.wait_all {
            extra |= net::MSG_WAITALL;
        }
        let peek = flags.peek;
        let got = self.tcp(&conn, poll::IN, timeout, timeout.deadline(), host, |flags| {
            net::recv(&*conn, into, flags | extra)
        })?;
        if got == 0 && self.state.load(Ordering::Relaxed) & CLOSED != 0 {
            // Not the peer's end of the stream: this end was closed meanwhile.
            return Err(Error::Closed);
        }
        self.count(0, if peek { 0 } else { got });
        Ok(got)
    }

    fn count(&self, sent: usize, received: usize) {
        if let Path::Tcp(_, traffic) = &self.path {
            traffic.sent.fetch_add(sent as u64, Ordering::Relaxed);
            traffic.received.fetch_add(received as u64, Ordering::Relaxed);
        }
    }

    /// One call on the TCP connection, as a plain socket does it.
    fn tcp<T: Send>(
        &self,
        conn: &Fd,
        events: u32,
        timeout: Timeout,
        deadline: Deadline,
        host: &impl Host,
        mut call: impl FnMut(i32) -> std::io::Result<T> + Send,
    ) -> Result<T> {
        if let Path::Tcp(_, traffic) = &self.path {
            traffic.take_left()?;
        }
        let flags = if timeout == Timeout::Never { 0 } else { MSG_DONTWAIT };
        loop {
            let result = host.blocking(|| {
                if let Timeout::After(_) = timeout {
                    let left = deadline.left()?;
                    poll::poll(&mut [PollFd::new(conn, events)], left)?;
                }
                Ok(call(flags)?)
            });
            match result {
                Err(Error::Os(error)) if error.raw_os_error() == Some(4) => {
                    host.interrupted()?;
                    self.check()?;
                }
                Err(Error::WouldBlock) if matches!(timeout, Timeout::After(_)) => {}
                Err(_) if self.state.load(Ordering::Relaxed) & CLOSED != 0 => {
                    return Err(Error::Closed)
                }
                other => return other,
            }
        }
    }
}
