//! Threads that take no signals, and how many processors there are to run on.

use std::io;
use std::mem::MaybeUninit;
use std::thread::{Builder, JoinHandle};

use crate::call;

/// Starts a thread named `name` with all signals blocked, so that signals meant for the
/// application are handled on the application's threads.
///
/// # Errors
/// Those of starting a thread.
pub fn spawn<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    // A thread starts with its creator's mask: so it is the creator that blocks, for the moment.
    let _blocked = AllBlocked::new()?;
    Builder::new().name(name.to_owned()).spawn(run)
}

/// All signals are blocked on this thread while it lives.
struct AllBlocked {
    before: libc::sigset_t,
    /// The mask belongs to the thread that made it.
    _here: std::marker::PhantomData<*const ()>,
}

impl AllBlocked {
    fn new() -> io::Result<AllBlocked> {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigfillset initialises the set it is given; pthread_sigmask reads that set and,
        // when it succeeds (returns 0), initialises the old one. All are locals.
        let failed = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr())
        };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        Ok(AllBlocked {
            // SAFETY: initialised by the call above, which succeeded.
            before: unsafe { before.assume_init() },
            _here: std::marker::PhantomData,
        })
    }
}

impl Drop for AllBlocked {
    fn drop(&mut self) {
        // SAFETY: pthread_sigmask reads the initialised set; a null old set is allowed.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut());
        }
    }
}

/// Whether this is the thread its process began with, or was forked to.
#[must_use]
pub fn is_main() -> bool {
    // SAFETY: gettid takes nothing and cannot fail. By number: old C libraries have no wrapper.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    u32::try_from(thread) == Ok(std::process::id())
}

/// How many processors this machine runs on: at least 1.
///
/// Not how many this thread may use: a peer on another processor than ours makes progress while we
/// spin, however few are ours.
#[must_use]
pub fn online_cpus() -> usize {
    // SAFETY: sysconf takes a number and returns one.
    let count = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    usize::try_from(count).unwrap_or(1).max(1)
}

/// Processors that a thread may run on, as bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Affinity([u64; AFFINITY_WORDS]);

/// Bits for 16,384 processors, more than any kernel is built for.
const AFFINITY_WORDS: usize = 256;

/// The processors this thread may run on.
///
/// # Errors
/// Those of `sched_getaffinity`.
pub fn affinity() -> io::Result<Affinity> {
    let mut mask = [0_u64; AFFINITY_WORDS];
    // SAFETY: sched_getaffinity writes at most the given size into the mask, a local array.
    let returned =
        unsafe { libc::sched_getaffinity(0, size_of_val(&mask), mask.as_mut_ptr().cast()) };
    call::check(returned)?;
    Ok(Affinity(mask))
}

/// Lets this thread run on those processors only.
///
/// # Errors
/// `InvalidInput` if none of them is there or allowed.
pub fn set_affinity(affinity: &Affinity) -> io::Result<()> {
    let mask = &affinity.0;
    // SAFETY: sched_setaffinity reads the given size from the mask, a borrowed array.
    let returned = unsafe { libc::sched_setaffinity(0, size_of_val(mask), mask.as_ptr().cast()) };
    call::check(returned).map(drop)
}

/// Lets this thread run on processor `cpu` only.
///
/// # Errors
/// `InvalidInput` if it is not there or not allowed.
pub fn pin(cpu: usize) -> io::Result<()> {
    let mut mask = [0; AFFINITY_WORDS];
    let word = mask.get_mut(cpu / 64).ok_or(io::ErrorKind::InvalidInput)?;
    *word = 1 << (cpu % 64);
    set_affinity(&Affinity(mask))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The signals blocked on this thread, as the kernel prints them.
    fn blocked() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    }

    #[test]
    fn the_new_thread_blocks_what_can_be_blocked_and_the_creator_does_not() {
        let before = blocked();
        let (name, inside) =
            spawn("ivsmc-test", || (std::thread::current().name().map(str::to_owned), blocked()))
                .unwrap()
                .join()
                .unwrap();
        assert_eq!(name.as_deref(), Some("ivsmc-test"));
        // Signals 1 to 31 but for KILL and STOP.
        let mut expected: u64 = 0x7fff_ffff;
        expected &= !(1 << (libc::SIGKILL - 1)) & !(1 << (libc::SIGSTOP - 1));
        assert_eq!(inside & 0x7fff_ffff, expected);
        assert_eq!(blocked(), before);
    }

    #[test]
    fn a_thread_that_was_started_is_not_the_main_one() {
        // Nor is this one: the test runner has started it.
        assert!(!is_main());
        assert!(!std::thread::spawn(is_main).join().unwrap());
    }

    #[test]
    fn there_is_a_processor() {
        assert!(online_cpus() >= 1);
    }
}
