//! Waiting on a word of this process (never of the region: those waits go through descriptors).

use std::io;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use crate::call;

/// Sleeps while `word` is `expected`, until [`wake`], the timeout, or for no reason at all.
///
/// Returns at once if the word is another value. Callers look at their condition again.
///
/// # Errors
/// `TimedOut`, or `Interrupted` by a signal.
pub fn wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.map(call::timespec);
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: FUTEX_WAIT needs an aligned 32-bit word, readable during the call (a borrowed
    // AtomicU32), and a null or valid timespec (a local that outlives the call).
    let returned = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            timeout,
        )
    };
    if returned == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EAGAIN) {
        return Ok(());
    }
    Err(error)
}

/// Wakes up to `count` threads that wait on `word`; returns how many.
pub fn wake(word: &AtomicU32, count: u32) -> usize {
    let count = i32::try_from(count).unwrap_or(i32::MAX);
    // SAFETY: FUTEX_WAKE needs the word's address only, which is valid while borrowed.
    let woken = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            count,
        )
    };
    usize::try_from(woken).unwrap_or(0)
}
