//! From C's return conventions to [`io::Result`], and numbers into C's types.

use std::io;
use std::time::Duration;

/// `Err(errno)` for a negative return value, as most calls report failure.
#[inline]
pub(crate) fn check(returned: libc::c_int) -> io::Result<libc::c_int> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(returned)
    }
}

/// `Err(errno)` for a negative return value, else the count.
#[inline]
pub(crate) fn check_count(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// The size of `T` as the kernel's `socklen_t`.
pub(crate) const fn socklen_of<T>() -> libc::socklen_t {
    let size = size_of::<T>();
    assert!(size <= 4096, "socket structures are small");
    // Not truncated: at most 4096, asserted above.
    #[allow(clippy::cast_possible_truncation)]
    {
        size as libc::socklen_t
    }
}

/// An offset in a file as the kernel's signed type.
pub(crate) fn file_offset(at: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(at)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "file offset beyond 2^63"))
}

/// A duration as the kernel's; one beyond the range of seconds becomes the longest possible.
pub(crate) fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: libc::time_t::try_from(duration.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(duration.subsec_nanos()),
    }
}
