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
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
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
    if count == 0 {
        // The kernel would wake one.
        return 0;
    }
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

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    #[test]
    fn a_word_that_has_changed_is_not_waited_for() {
        wait(&AtomicU32::new(1), 0, None).unwrap();
    }

    #[test]
    fn a_timeout_is_said() {
        let word = AtomicU32::new(0);
        let error = wait(&word, 0, Some(Duration::from_millis(1))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn a_waiter_is_woken() {
        let word = AtomicU32::new(0);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| wait(&word, 0, None));
            // None until it sleeps; it may also wake for no reason and be gone.
            while wake(&word, 1) == 0 && !waiter.is_finished() {
                std::thread::yield_now();
            }
            waiter.join().unwrap().unwrap();
        });
        assert_eq!(wake(&word, 1), 0);
    }
}
