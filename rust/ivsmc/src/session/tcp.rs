//! A session that goes on over TCP: one system call an operation, as a plain socket does it.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;

use ivsmc_shm::fd::Fd;
use ivsmc_shm::net::{self, MSG_DONTWAIT};
use ivsmc_shm::poll::{self, PollFd};

use super::{Inner, RecvFlags, CLOSED};
use crate::host::{Deadline, Host, Timeout};
use crate::{Error, Result};

impl Inner {
    pub(super) fn tcp_send(
        &self,
        from: &[u8],
        timeout: Timeout,
        deadline: Deadline,
        host: &impl Host,
    ) -> Result<usize> {
        let conn = self.conn()?;
        self.tcp(&conn, poll::OUT, timeout, deadline, host, |flags| net::send(&*conn, from, flags))
    }

    pub(super) fn tcp_send_vectored(
        &self,
        from: &[IoSlice<'_>],
        timeout: Timeout,
        host: &impl Host,
    ) -> Result<usize> {
        let conn = self.conn()?;
        self.tcp(&conn, poll::OUT, timeout, timeout.deadline(), host, |flags| {
            net::send_vectored(&*conn, from, flags)
        })
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
        self.tcp(&conn, poll::IN, timeout, timeout.deadline(), host, |flags| {
            net::recv(&*conn, into, flags | extra)
        })
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
