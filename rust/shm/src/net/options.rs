//! Socket options and the state of sockets.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

pub use libc::{
    IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, IPV6_V6ONLY, SOL_SOCKET, SO_ACCEPTCONN, SO_DOMAIN,
    SO_ERROR, SO_KEEPALIVE, SO_LINGER, SO_PROTOCOL, SO_RCVBUF, SO_RCVTIMEO, SO_REUSEADDR,
    SO_REUSEPORT, SO_SNDBUF, SO_SNDTIMEO, SO_TYPE, TCP_KEEPCNT, TCP_KEEPIDLE, TCP_KEEPINTVL,
    TCP_NODELAY, TCP_USER_TIMEOUT,
};

use crate::call::{self, socklen_of};

/// `SO_NETNS_COOKIE` of Linux 5.14, for every architecture with the generic numbers.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// `tcp_info.tcpi_state` of an established connection (`TCP_ESTABLISHED` of `tcp_states.h`).
pub const TCP_STATE_ESTABLISHED: u8 = 1;
/// `tcp_info.tcpi_state` of a closed connection (`TCP_CLOSE`).
pub const TCP_STATE_CLOSE: u8 = 7;
/// `tcp_info.tcpi_state` after the other end's FIN (`TCP_CLOSE_WAIT`).
pub const TCP_STATE_CLOSE_WAIT: u8 = 8;
/// `tcp_info.tcpi_state` of a listener (`TCP_LISTEN`).
pub const TCP_STATE_LISTEN: u8 = 10;

/// Reads an option into `into`; returns how many bytes it has (at most `into.len()`).
///
/// # Errors
/// Those of `getsockopt`; `ENOPROTOOPT` for options with pointers inside.
pub fn get_option(fd: impl AsFd, level: i32, name: i32, into: &mut [u8]) -> io::Result<usize> {
    refuse_pointers(level, name)?;
    let mut length = libc::socklen_t::try_from(into.len()).unwrap_or(libc::socklen_t::MAX);
    // SAFETY: getsockopt writes at most `length` bytes, which is at most the slice's length, into
    // an exclusively borrowed slice, and the length it used into a local. Options that make it
    // write elsewhere are refused above.
    call::check(unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            into.as_mut_ptr().cast(),
            &raw mut length,
        )
    })?;
    Ok((length as usize).min(into.len()))
}

/// Sets an option to bytes.
///
/// # Errors
/// Those of `setsockopt`; `ENOPROTOOPT` for options with pointers inside.
pub fn set_option(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    refuse_pointers(level, name)?;
    let length = libc::socklen_t::try_from(value.len())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: setsockopt reads `length` bytes of a borrowed slice and does not keep the pointer. An
    // option that attaches a program (SO_ATTACH_FILTER) reads further pointers out of the bytes
    // during the call, which the kernel checks; options that make it write are refused above.
    call::check(unsafe {
        libc::setsockopt(fd.as_fd().as_raw_fd(), level, name, value.as_ptr().cast(), length)
    })
    .map(drop)
}

/// Refuses the options whose bytes hold pointers that the kernel *writes* through: they would let
/// safe code change any memory of the process. (Programs pass option numbers on from their users.)
fn refuse_pointers(level: i32, name: i32) -> io::Result<()> {
    /// `linux/tcp.h`: fills the buffer at `copybuf_address`.
    const TCP_ZEROCOPY_RECEIVE: i32 = 35;
    /// `IPT_SO_SET_REPLACE`, `ARPT_SO_SET_REPLACE`, `EBT_SO_SET_ENTRIES`: fill `counters`.
    const REPLACE_TABLES: [i32; 3] = [64, 96, 128];
    let refused = match level {
        libc::IPPROTO_TCP => name == TCP_ZEROCOPY_RECEIVE,
        libc::IPPROTO_IP | libc::IPPROTO_IPV6 => REPLACE_TABLES.contains(&name),
        _ => false,
    };
    if refused {
        return Err(io::Error::from_raw_os_error(libc::ENOPROTOOPT));
    }
    Ok(())
}

/// Reads an option that is one `int`.
///
/// # Errors
/// Those of `getsockopt`.
pub fn get_option_int(fd: impl AsFd, level: i32, name: i32) -> io::Result<i32> {
    let mut bytes = [0; 4];
    // An option of fewer bytes leaves the upper ones 0.
    get_option(fd, level, name, &mut bytes)?;
    Ok(i32::from_ne_bytes(bytes))
}

/// Sets an option that is one `int`.
///
/// # Errors
/// Those of `setsockopt`.
pub fn set_option_int(fd: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_option(fd, level, name, &value.to_ne_bytes())
}

/// Takes the socket's pending error (`SO_ERROR`) off it.
///
/// # Errors
/// The pending error, or that of `getsockopt`.
pub fn take_error(fd: impl AsFd) -> io::Result<()> {
    match get_option_int(fd, libc::SOL_SOCKET, libc::SO_ERROR)? {
        0 => Ok(()),
        number => Err(io::Error::from_raw_os_error(number)),
    }
}

/// The TCP state of a connection: `TCP_STATE_*`.
///
/// # Errors
/// Those of `getsockopt(TCP_INFO)`.
pub fn tcp_info_state(fd: impl AsFd) -> io::Result<u8> {
    // The state is the structure's first byte, and the kernel gives as much as is asked for.
    let mut state = [0];
    get_option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut state)?;
    Ok(state[0])
}

/// Bytes received that nobody has read yet.
///
/// # Errors
/// Those of `ioctl(SIOCINQ)`: `InvalidInput` for a listener.
pub fn unread_bytes(fd: impl AsFd) -> io::Result<usize> {
    queue(&fd, libc::FIONREAD)
}

/// Bytes sent that the other end has not acknowledged (TCP) or not read (AF_UNIX, by memory used).
///
/// # Errors
/// Those of `ioctl(SIOCOUTQ)`: `InvalidInput` for a listener.
pub fn unsent_bytes(fd: impl AsFd) -> io::Result<usize> {
    queue(&fd, libc::TIOCOUTQ)
}

fn queue(fd: &impl AsFd, request: libc::Ioctl) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: both requests store one int, into a local.
    call::check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw mut bytes) })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// The cookie of the network namespace the socket is in; unique until the next boot.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 5.14.
pub fn netns_cookie(fd: impl AsFd) -> io::Result<u64> {
    let mut bytes = [0; 8];
    get_option(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE, &mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Makes the open file non-blocking, or blocking (for all descriptors that share it).
///
/// # Errors
/// Those of `ioctl(FIONBIO)`.
pub fn set_nonblocking(fd: impl AsFd, nonblocking: bool) -> io::Result<()> {
    let mut on = libc::c_int::from(nonblocking);
    // SAFETY: FIONBIO reads one int, a local.
    call::check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONBIO, &raw mut on) })
        .map(drop)
}

/// Whether the open file is non-blocking.
///
/// # Errors
/// Those of `fcntl(F_GETFL)`.
pub fn is_nonblocking(fd: impl AsFd) -> io::Result<bool> {
    // SAFETY: F_GETFL takes no argument.
    let flags = call::check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GETFL) })?;
    Ok(flags & libc::O_NONBLOCK != 0)
}

/// Seconds that `close` may wait for unsent data, or `None` for not at all (`SO_LINGER`).
///
/// `Some(0)` makes `close` a reset.
///
/// # Errors
/// Those of `setsockopt`.
pub fn set_linger(fd: impl AsFd, seconds: Option<i32>) -> io::Result<()> {
    let mut bytes = [0; socklen_of::<libc::linger>() as usize];
    bytes[..4].copy_from_slice(&i32::from(seconds.is_some()).to_ne_bytes());
    bytes[4..].copy_from_slice(&seconds.unwrap_or(0).to_ne_bytes());
    set_option(fd, libc::SOL_SOCKET, libc::SO_LINGER, &bytes)
}
