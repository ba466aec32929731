//! AF_UNIX stream sockets, and descriptors sent over them.

use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::address::{family, RawAddress};
use super::tcp::{accept_raw, bind_raw, connect_raw, listen, socket};
use super::transfer::empty_message;
use crate::call::{self, socklen_of};
use crate::fd::Fd;

/// Who is at the other end, as it was when the connection was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Credentials {
    /// Process id, in this process's namespace; 0 if it has none there.
    pub pid: i32,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
}

/// Two connected stream sockets, blocking.
///
/// # Errors
/// Those of `socketpair`.
pub fn socketpair_stream() -> io::Result<(Fd, Fd)> {
    let mut pair: [RawFd; 2] = [-1; 2];
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: socketpair stores two descriptors into a local array of two; when it succeeds they
    // are new and without an owner.
    unsafe {
        call::check(libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr()))?;
        Ok((Fd::from_call(pair[0]), Fd::from_call(pair[1])))
    }
}

/// A listening socket at `path`, which must not exist.
///
/// # Errors
/// `InvalidInput` for a path of more than 107 bytes; `AddrInUse` if it exists; those of `listen`.
pub fn unix_listen(path: &Path, backlog: i32) -> io::Result<Fd> {
    let fd = socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    bind_raw(&fd, &unix_address(path)?)?;
    listen(&fd, backlog)?;
    Ok(fd)
}

/// Connects to the listener at `path`; blocking.
///
/// # Errors
/// `InvalidInput` for a path of more than 107 bytes; those of `connect`.
pub fn unix_connect(path: &Path) -> io::Result<Fd> {
    let fd = socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    connect_raw(&fd, &unix_address(path)?)?;
    Ok(fd)
}

/// Connects to the listener at `path`, or fails at once; a non-blocking socket.
///
/// # Errors
/// `InvalidInput` for a path of more than 107 bytes; `WouldBlock` if the listener's queue is full;
/// those of `connect`.
pub fn unix_connect_nonblocking(path: &Path) -> io::Result<Fd> {
    let fd = socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    connect_raw(&fd, &unix_address(path)?)?;
    Ok(fd)
}

/// A datagram socket whose messages go to that of the name `name`, as `$NOTIFY_SOCKET` has it: a
/// path, or `@` and a name that is none of the file system's.
///
/// # Errors
/// `InvalidInput` for a name of more than 107 bytes; those of `connect`.
pub fn unix_datagram_to(name: &OsStr) -> io::Result<Fd> {
    let fd = socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0)?;
    let address = match name.as_bytes() {
        [b'@', name @ ..] => abstract_address(name)?,
        _ => unix_address(Path::new(name))?,
    };
    connect_raw(&fd, &address)?;
    Ok(fd)
}

/// Takes the next connection, as a blocking socket.
///
/// # Errors
/// Those of `accept4`: `WouldBlock` if the listener is non-blocking and nobody waits.
pub fn unix_accept(fd: impl AsFd) -> io::Result<Fd> {
    Ok(accept_raw(&fd)?.0)
}

fn unix_address(path: &Path) -> io::Result<RawAddress> {
    let bytes = path.as_os_str().as_bytes();
    let mut address = libc::sockaddr_un { sun_family: family(libc::AF_UNIX), sun_path: [0; 108] };
    // One byte stays 0, the end; an empty path or one with a zero byte would name another socket.
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a socket path has 1 to 107 bytes, none zero: {}", path.display()),
        ));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(address.into())
}

/// The address of a name that is none of the file system's: a zero byte and the name, without an end.
fn abstract_address(name: &[u8]) -> io::Result<RawAddress> {
    let mut address = libc::sockaddr_un { sun_family: family(libc::AF_UNIX), sun_path: [0; 108] };
    if name.is_empty() || name.len() >= address.sun_path.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "such a name has 1 to 107 bytes"));
    }
    for (to, from) in address.sun_path[1..].iter_mut().zip(name) {
        *to = *from as libc::c_char;
    }
    let unused = address.sun_path.len() - 1 - name.len();
    Ok(RawAddress::from(address).shortened(unused))
}

/// Who is at the other end of a connected AF_UNIX socket.
///
/// # Errors
/// Those of `getsockopt(SO_PEERCRED)`.
pub fn peer_credentials(fd: impl AsFd) -> io::Result<Credentials> {
    let mut bytes = [0; socklen_of::<libc::ucred>() as usize];
    super::get_option(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut bytes)?;
    let word = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
    Ok(Credentials {
        pid: i32::from_ne_bytes(word(0)),
        uid: u32::from_ne_bytes(word(4)),
        gid: u32::from_ne_bytes(word(8)),
    })
}

/// The supplementary groups of who is at the other end of a connected AF_UNIX socket, as they were
/// when the connection was made.
///
/// # Errors
/// Those of `getsockopt(SO_PEERGROUPS)`.
pub fn peer_groups(fd: impl AsFd) -> io::Result<Vec<u32>> {
    // As many as a process can have (NGROUPS_MAX), at the second try.
    for most in [64, 65_536] {
        let mut bytes = vec![0; most * size_of::<libc::gid_t>()];
        match super::get_option(&fd, libc::SOL_SOCKET, libc::SO_PEERGROUPS, &mut bytes) {
            Ok(length) => {
                let words = bytes[..length].chunks_exact(4);
                return Ok(words.map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]])).collect());
            }
            Err(error) if error.raw_os_error() == Some(libc::ERANGE) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(libc::ERANGE))
}

/// Control data: room for one header and some descriptors' bytes, aligned as the header needs.
#[repr(C)]
pub(super) union Control {
    header: libc::cmsghdr,
    bytes: [u8; 64],
}

impl Control {
    pub(super) const fn new() -> Control {
        Control { bytes: [0; 64] }
    }

    /// Has `message` carry `passed`. It points to `self` then, which must not be moved or used
    /// before it has been sent.
    pub(super) fn enclose(&mut self, message: &mut libc::msghdr, passed: BorrowedFd<'_>) {
        message.msg_control = (&raw mut *self).cast();
        message.msg_controllen = ONE_FD_SPACE as _;
        // SAFETY: CMSG_FIRSTHDR reads the message and gives a pointer to its control data, or null
        // if that is too short for a header, which it is not. The header and the descriptor behind
        // it lie in the `ONE_FD_SPACE` bytes of `self`, as asserted, whose alignment is the
        // header's; the descriptor is written unaligned.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const *message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(socklen_of::<RawFd>()) as _;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(passed.as_raw_fd());
        }
    }
}

/// Bytes of control data that carry one descriptor.
// SAFETY: CMSG_SPACE only computes.
const ONE_FD_SPACE: usize = unsafe { libc::CMSG_SPACE(socklen_of::<RawFd>()) } as usize;
const _: () = assert!(ONE_FD_SPACE <= size_of::<Control>());

/// Sends bytes, with a copy of the descriptor `passed` attached to the first one; never waits.
///
/// # Errors
/// Those of `sendmsg`: `WouldBlock`, `BrokenPipe`, `ETOOMANYREFS` when too many descriptors of this
/// user are on their way.
pub fn send_with_fd(
    fd: impl AsFd,
    from: &[u8],
    passed: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let mut control = Control::new();
    let mut part = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let mut message = empty_message();
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if let Some(passed) = passed {
        control.enclose(&mut message, passed);
    }
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: sendmsg reads the buffer (a borrowed slice) and the control data (a local), both
    // alive during the call.
    call::check_count(unsafe { libc::sendmsg(fd.as_fd().as_raw_fd(), &raw const message, flags) })
}

/// What came beside the bytes of a message.
#[derive(Debug, Default)]
pub enum Passed {
    /// No descriptor.
    #[default]
    Nothing,
    /// One.
    One(Fd),
    /// One that is lost, because this process may not have another one open.
    Lost,
}

impl Passed {
    /// The descriptor, if there is one.
    #[must_use]
    pub fn one(self) -> Option<Fd> {
        match self {
            Self::One(fd) => Some(fd),
            Self::Nothing | Self::Lost => None,
        }
    }
}

/// Receives bytes, and the descriptor that came with them.
///
/// The kernel never joins the bytes of two messages that each carry a descriptor. 0 bytes is the end
/// of the stream.
///
/// # Errors
/// Those of `recvmsg`; `InvalidData` if more than one descriptor came (those are closed).
pub fn recv_with_fd(fd: impl AsFd, into: &mut [u8], flags: i32) -> io::Result<(usize, Passed)> {
    let mut control = MaybeUninit::<Control>::zeroed();
    let mut part = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let mut message = empty_message();
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of::<Control>() as _;
    let flags = flags | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: recvmsg writes at most `iov_len` bytes into an exclusively borrowed slice and at most
    // `msg_controllen` bytes into `control`, both alive during the call.
    let got = call::check_count(unsafe {
        libc::recvmsg(fd.as_fd().as_raw_fd(), &raw mut message, flags)
    })?;
    let mut received = received_fds(&message);
    // There was room for more than one; so the first was not kept out for want of it.
    let is_cut = message.msg_flags & libc::MSG_CTRUNC != 0;
    match (received.pop(), is_cut) {
        (None, false) => Ok((got, Passed::Nothing)),
        (None, true) => Ok((got, Passed::Lost)),
        (Some(fd), false) if received.is_empty() => Ok((got, Passed::One(fd))),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a message came with several descriptors",
        )),
    }
}

/// Takes over all descriptors in the control data of a received message.
fn received_fds(message: &libc::msghdr) -> Vec<Fd> {
    let mut received = Vec::new();
    // SAFETY: the CMSG functions walk the control data of a message that recvmsg filled in: every
    // header they return lies inside `msg_controllen`, as does its data up to `cmsg_len`, both
    // set by the kernel. Descriptors there are open in this process, new, and without an owner.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            let is_rights =
                (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS;
            if is_rights {
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                let bytes = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                for index in 0..bytes / size_of::<RawFd>() {
                    received.push(Fd::from_call(data.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    received
}
