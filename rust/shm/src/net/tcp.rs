//! Making TCP connections.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

use super::address::{filled_in, RawAddress};
use crate::call;
use crate::fd::Fd;

/// The protocol family of a TCP socket.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6, and IPv4 too unless `IPV6_V6ONLY` is set.
    V6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub fn of(address: &SocketAddr) -> Family {
        if address.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        }
    }

    /// The kernel's number: `AF_INET` or `AF_INET6`.
    #[must_use]
    pub fn number(self) -> i32 {
        match self {
            Family::V4 => libc::AF_INET,
            Family::V6 => libc::AF_INET6,
        }
    }
}

/// A new TCP socket, blocking.
///
/// # Errors
/// Those of `socket`.
pub fn tcp_socket(family: Family) -> io::Result<Fd> {
    socket(family.number(), libc::SOCK_STREAM, 0)
}

/// A new socket of any kind, close-on-exec.
pub(super) fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<Fd> {
    // SAFETY: socket takes numbers; a descriptor it returns is new and without an owner.
    unsafe {
        let number = call::check(libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol))?;
        Ok(Fd::from_call(number))
    }
}

/// Gives the socket its local address.
///
/// # Errors
/// Those of `bind`: `AddrInUse`, `AddrNotAvailable`, ...
pub fn bind(fd: impl AsFd, address: &SocketAddr) -> io::Result<()> {
    bind_raw(&fd, &RawAddress::from(address))
}

pub(super) fn bind_raw(fd: &impl AsFd, raw: &RawAddress) -> io::Result<()> {
    // SAFETY: bind reads an initialised address of the given length, a borrowed local.
    call::check(unsafe { libc::bind(fd.as_fd().as_raw_fd(), raw.as_ptr(), raw.length()) }).map(drop)
}

/// Connects the socket.
///
/// A non-blocking socket answers `EINPROGRESS` ([`errno`](crate::errno)): wait for
/// [`OUT`](crate::poll::OUT), then [`take_error`](super::take_error). A blocking one that a signal
/// interrupts goes on connecting in the same way.
///
/// # Errors
/// Those of `connect`.
pub fn connect(fd: impl AsFd, address: &SocketAddr) -> io::Result<()> {
    connect_raw(&fd, &RawAddress::from(address))
}

pub(super) fn connect_raw(fd: &impl AsFd, raw: &RawAddress) -> io::Result<()> {
    // SAFETY: connect reads an initialised address of the given length, a borrowed local.
    call::check(unsafe { libc::connect(fd.as_fd().as_raw_fd(), raw.as_ptr(), raw.length()) })
        .map(drop)
}

/// Lets connections come in; `backlog` of them wait to be accepted (at least 0; the kernel caps it).
///
/// # Errors
/// Those of `listen`.
pub fn listen(fd: impl AsFd, backlog: i32) -> io::Result<()> {
    // SAFETY: listen takes numbers.
    call::check(unsafe { libc::listen(fd.as_fd().as_raw_fd(), backlog) }).map(drop)
}

/// Takes the next connection, as a blocking socket, and the peer's address.
///
/// # Errors
/// Those of `accept4`: `WouldBlock` if the listener is non-blocking and nobody waits.
pub fn accept(fd: impl AsFd) -> io::Result<(Fd, SocketAddr)> {
    let (accepted, raw) = accept_raw(&fd)?;
    Ok((accepted, raw.to_socket_addr()?))
}

pub(super) fn accept_raw(fd: &impl AsFd) -> io::Result<(Fd, RawAddress)> {
    let (number, raw) = filled_in(|address, length| {
        // SAFETY: accept4 writes an address of at most `*length` bytes, and its length.
        unsafe { libc::accept4(fd.as_fd().as_raw_fd(), address, length, libc::SOCK_CLOEXEC) }
    })?;
    // SAFETY: the returned descriptor is new and without an owner.
    Ok((unsafe { Fd::from_call(number) }, raw))
}

/// The socket's own address.
///
/// # Errors
/// Those of `getsockname`; `InvalidInput` if it is not an internet socket.
pub fn local_addr(fd: impl AsFd) -> io::Result<SocketAddr> {
    filled_in(|address, length| {
        // SAFETY: getsockname writes an address of at most `*length` bytes, and its length.
        unsafe { libc::getsockname(fd.as_fd().as_raw_fd(), address, length) }
    })?
    .1
    .to_socket_addr()
}

/// The address of the other end.
///
/// # Errors
/// Those of `getpeername`: `NotConnected`; `InvalidInput` if it is not an internet socket.
pub fn peer_addr(fd: impl AsFd) -> io::Result<SocketAddr> {
    filled_in(|address, length| {
        // SAFETY: getpeername writes an address of at most `*length` bytes, and its length.
        unsafe { libc::getpeername(fd.as_fd().as_raw_fd(), address, length) }
    })?
    .1
    .to_socket_addr()
}

/// Ends one direction of a connection, or both.
///
/// # Errors
/// Those of `shutdown`: `NotConnected`.
pub fn shutdown(fd: impl AsFd, how: Shutdown) -> io::Result<()> {
    let how = match how {
        Shutdown::Read => libc::SHUT_RD,
        Shutdown::Write => libc::SHUT_WR,
        Shutdown::Both => libc::SHUT_RDWR,
    };
    // SAFETY: shutdown takes numbers.
    call::check(unsafe { libc::shutdown(fd.as_fd().as_raw_fd(), how) }).map(drop)
}
