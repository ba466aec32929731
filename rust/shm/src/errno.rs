//! Error numbers by name, for [`std::io::Error::raw_os_error`] in crates without `libc`.

pub use libc::{
    EACCES, EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EAGAIN, EBADF, EBUSY, ECONNABORTED,
    ECONNREFUSED, ECONNRESET, EDQUOT, EEXIST, EHOSTUNREACH, EINPROGRESS, EINTR, EINVAL, EISCONN,
    EISDIR, ELOOP, EMFILE, EMSGSIZE, ENETUNREACH, ENFILE, ENOBUFS, ENODEV, ENOENT, ENOMEM,
    ENOPROTOOPT, ENOSPC, ENOTCONN, ENOTDIR, ENOTSOCK, ENOTTY, ENXIO, EOPNOTSUPP, EPERM, EPIPE,
    EPROTO, EROFS, ESHUTDOWN, ETIMEDOUT, ETOOMANYREFS,
};

use std::io;

/// The error of number `number`.
#[must_use]
pub fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// Whether `error` is the system's error of number `number`.
#[must_use]
pub fn is(error: &io::Error, number: i32) -> bool {
    error.raw_os_error() == Some(number)
}
