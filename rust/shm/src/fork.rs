//! What a forked child gives up: inherited descriptors are closed, mappings become private zeros.
//!
//! A child that kept them would hold the parent's locks, keep the parent's connections open after
//! the parent died, and could write into sessions that are not its own. So a handler that the C
//! library runs in the child, before `fork` returns there,
//!
//! 1. counts the process *generation* up, so that objects made before know that they are foreign;
//! 2. maps private zero pages over every registered mapping, at the same address, so that what
//!    still points there stays valid and reaches nobody;
//! 3. closes every registered descriptor. It never unlocks: an unlock in the child would release
//!    the parent's lock, a close does not.
//!
//! The other threads of the parent do not exist in the child, and what they held stays held, so the
//! handler takes no lock and allocates nothing: it reads a bitmap of descriptor numbers and a
//! fixed table of mappings, both kept with atomics.
//!
//! Limits. A descriptor is registered right after the system call that made it; a fork on another
//! thread between the two leaks it into that child (mappings have no such gap). Numbers from
//! 2^20 on are not registered. A child made by a bare `clone` or by `vfork` runs no handlers;
//! such children are expected to exec at once, and every descriptor here is close-on-exec.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use crate::call;

/// Descriptor numbers below this one are registered; the kernel's default upper limit.
const MAX_FDS: usize = 1 << 20;
const WORDS: usize = MAX_FDS / 64;
/// Mappings that may be registered at once.
const MAX_MAPPINGS: usize = 4096;

/// Zero in the process that loaded the code, one in its forked child, and so on.
static GENERATION: AtomicU32 = AtomicU32::new(0);
/// Forks of this process since the handlers were installed.
static FORKS: AtomicU32 = AtomicU32::new(0);
static INSTALLED: AtomicBool = AtomicBool::new(false);
/// One bit per descriptor number.
static FDS: [AtomicU64; WORDS] = [const { AtomicU64::new(0) }; WORDS];
/// Words of `FDS` that were ever used: `0..=WORDS`.
static FD_WORDS_USED: AtomicUsize = AtomicUsize::new(0);
static MAPPINGS: [Entry; MAX_MAPPINGS] = [const { Entry::new() }; MAX_MAPPINGS];

/// One registered mapping. `address` 0 is free, 1 is being filled in.
struct Entry {
    address: AtomicUsize,
    length: AtomicUsize,
}

impl Entry {
    const FREE: usize = 0;
    const TAKEN: usize = 1;

    const fn new() -> Entry {
        Entry { address: AtomicUsize::new(Entry::FREE), length: AtomicUsize::new(0) }
    }
}

/// The generation of this process: changes exactly when the code finds itself in a forked child.
#[inline]
#[must_use]
pub fn generation() -> u32 {
    // Relaxed: it is written only while a new process has a single thread, by that thread.
    GENERATION.load(Ordering::Relaxed)
}

/// How often this process has forked: changes when a child may have inherited what it has open.
#[inline]
#[must_use]
pub fn count() -> u32 {
    // Relaxed: a hint to other threads; the forking thread sees its own store.
    FORKS.load(Ordering::Relaxed)
}

extern "C" fn in_parent() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// Whether an object made in `generation` belongs to this process, and not to one it was forked from.
#[inline]
#[must_use]
pub fn is_current(generation: u32) -> bool {
    self::generation() == generation
}

/// Installs the handler, once; every registration does it by itself.
///
/// # Panics
/// If the C library has no memory for the entry.
#[inline]
pub fn install() {
    // Acquire: pairs with the Release in `install_now`. Threads that race here each install the
    // handler before they go on; a handler that runs twice finds nothing left the second time.
    // (A `Once` would be a lock, held for ever in a child forked in the middle.)
    if !INSTALLED.load(Ordering::Acquire) {
        install_now();
    }
}

#[cold]
fn install_now() {
    // SAFETY: pthread_atfork needs handlers with C's calling convention that stay loaded; the
    // parent handler counts, and the child handler is a function of this crate that restricts itself to what a child of a process
    // with threads may do: atomics, `close` and `mmap`.
    let failed = unsafe { libc::pthread_atfork(None, Some(in_parent), Some(in_child)) };
    assert!(failed == 0, "no memory to install the fork handler");
    // Release: pairs with the Acquire in `install`.
    INSTALLED.store(true, Ordering::Release);
}

/// Notes that the child must close `fd`. False if it is noted already (it has an owner).
pub(crate) fn register_fd(fd: RawFd) -> bool {
    install();
    let Some((word, bit)) = place_of(fd) else {
        return true;
    };
    // All Relaxed: the reader is the forking thread's copy in the child, made by `fork`, which
    // orders what this thread did; what other threads do at that moment is a race either way.
    if FD_WORDS_USED.load(Ordering::Relaxed) <= word {
        FD_WORDS_USED.fetch_max(word + 1, Ordering::Relaxed);
    }
    FDS[word].fetch_or(bit, Ordering::Relaxed) & bit == 0
}

/// Takes the note back; to be called before `fd` is closed or given away.
pub(crate) fn unregister_fd(fd: RawFd) {
    if let Some((word, bit)) = place_of(fd) {
        // Relaxed: see `register_fd`.
        FDS[word].fetch_and(!bit, Ordering::Relaxed);
    }
}

fn place_of(fd: RawFd) -> Option<(usize, u64)> {
    let fd = usize::try_from(fd).ok().filter(|fd| *fd < MAX_FDS)?;
    Some((fd / 64, 1 << (fd % 64)))
}

/// A registered mapping's place in the table.
#[derive(Debug)]
pub(crate) struct MappingEntry(usize);

/// Notes that the child must map private zeros over `address..address + length`.
///
/// # Safety
/// The range is whole pages that belong to the caller until it unregisters them.
pub(crate) unsafe fn register_mapping(address: usize, length: usize) -> io::Result<MappingEntry> {
    install();
    for (index, entry) in MAPPINGS.iter().enumerate() {
        // Relaxed everywhere but for the address: see `register_fd`. Release of the address pairs
        // with the Acquire in `in_child`: whoever sees it sees the length.
        let free = entry.address.compare_exchange(
            Entry::FREE,
            Entry::TAKEN,
            Ordering::Acquire,
            Ordering::Relaxed,
        );
        if free.is_ok() {
            entry.length.store(length, Ordering::Relaxed);
            entry.address.store(address, Ordering::Release);
            return Ok(MappingEntry(index));
        }
    }
    Err(io::Error::other("too many mappings in one process (4096)"))
}

/// Takes the note back; to be called while the pages still belong to the caller.
pub(crate) fn unregister_mapping(entry: &MappingEntry) {
    // Release: pairs with the Acquire in `register_mapping`; the length is not touched afterwards.
    MAPPINGS[entry.0].address.store(Entry::FREE, Ordering::Release);
}

/// Runs in the child, on its only thread, before `fork` returns. Takes no lock, allocates nothing.
extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    for entry in &MAPPINGS {
        // Acquire: pairs with the Release in `register_mapping`.
        let address = entry.address.swap(Entry::FREE, Ordering::Acquire);
        if address > Entry::TAKEN {
            give_up_mapping(address, entry.length.load(Ordering::Relaxed));
        }
    }
    let used = FD_WORDS_USED.swap(0, Ordering::Relaxed);
    for (index, word) in FDS.iter().enumerate().take(used) {
        let mut bits = word.load(Ordering::Relaxed);
        if bits == 0 {
            continue;
        }
        word.store(0, Ordering::Relaxed);
        while bits != 0 {
            let number = index * 64 + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            if let Ok(fd) = RawFd::try_from(number) {
                // SAFETY: close needs a descriptor that nobody uses afterwards: a set bit means
                // that an `Fd` of the parent owned this number when it forked; that object sees
                // the new generation and neither closes nor lends the number again.
                let _ = call::check(unsafe { libc::close(fd) });
            }
        }
    }
}

fn give_up_mapping(address: usize, length: usize) {
    let zeros = |protection| {
        // SAFETY: mmap with MAP_FIXED needs a range whose former content nobody needs: it was
        // registered by `register_mapping`'s caller, who owns it, and whose accesses are valid on
        // any readable and writable pages. The address is no pointer Rust derives anything from.
        let at = unsafe {
            libc::mmap(
                address as *mut libc::c_void,
                length,
                protection,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        at != libc::MAP_FAILED
    };
    // Without memory for zeros (strict overcommit), pages that fault are better than the parent's.
    if !zeros(libc::PROT_READ | libc::PROT_WRITE) {
        zeros(libc::PROT_NONE);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::fd::{AsFd, AsRawFd, OwnedFd};
    use std::sync::atomic::Ordering;

    use ivsmc_proto::memory::Memory;

    use super::*;
    use crate::fd::Fd;
    use crate::mapping::Mapping;
    use crate::{file, lock, net};

    /// A forked child that runs `check` and exits with its result; `check` must only do what a child
    /// of a process with threads may do.
    struct Child(libc::pid_t);

    impl Child {
        fn fork(check: impl FnOnce() -> i32) -> Child {
            // SAFETY: the child only runs `check`, restricted as said above, and `_exit`.
            unsafe {
                match libc::fork() {
                    -1 => panic!("fork: {}", io::Error::last_os_error()),
                    0 => libc::_exit(check()),
                    pid => Child(pid),
                }
            }
        }

        fn exit_code(self) -> i32 {
            let mut status = 0;
            // SAFETY: waitpid stores the status of our own child into a local.
            unsafe { assert_eq!(libc::waitpid(self.0, &raw mut status, 0), self.0) };
            assert!(libc::WIFEXITED(status), "child ended by status {status:#x}");
            libc::WEXITSTATUS(status)
        }

        fn kill(self) {
            // SAFETY: both calls are about our own child, which is not reaped yet.
            unsafe {
                libc::kill(self.0, libc::SIGKILL);
                libc::waitpid(self.0, std::ptr::null_mut(), 0);
            }
        }
    }

    fn is_open(number: RawFd) -> bool {
        // SAFETY: F_GETFD takes any number and touches no memory.
        unsafe { libc::fcntl(number, libc::F_GETFD) != -1 }
    }

    /// A mapping that holds the lock on byte 5, and another open file of the same memory.
    fn locked_region() -> (Mapping, Fd) {
        let fd = file::memfd(c"region").unwrap();
        file::set_size(&fd, 8192).unwrap();
        assert!(lock::try_lock_byte(&fd, 5).unwrap());
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let other = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let other = Fd::from(OwnedFd::from(other));
        let mapping = Mapping::map(fd, 8192).unwrap();
        assert!(lock::is_locked_by_other(&other, 5).unwrap());
        (mapping, other)
    }

    #[test]
    fn a_child_has_zeros_and_no_descriptors_and_the_parent_loses_nothing() {
        let before = generation();
        assert!(is_current(before));
        let (mapping, other) = locked_region();
        mapping.store(4096, 7, Ordering::Relaxed);
        let (ours, theirs) = net::socketpair_stream().unwrap();
        let lent = mapping.fd().as_raw_fd();
        let numbers = [lent, other.as_raw_fd(), ours.as_raw_fd(), theirs.as_raw_fd()];
        let child = Child::fork(|| {
            if is_current(before) || generation() != before + 1 || mapping.is_current() {
                return 1;
            }
            if numbers.iter().any(|number| is_open(*number)) {
                return 2;
            }
            if mapping.load(4096, Ordering::Relaxed) != 0 {
                return 3;
            }
            mapping.store(4096, 99, Ordering::Relaxed);
            if mapping.load(4096, Ordering::Relaxed) != 99 {
                return 4;
            }
            if mapping.fd().as_raw_fd() != RawFd::MAX || ours.as_raw_fd() != RawFd::MAX {
                return 5;
            }
            if net::send(&ours, b"x", libc::MSG_DONTWAIT).is_ok() {
                return 6;
            }
            0
        });
        assert_eq!(child.exit_code(), 0);
        assert_eq!(generation(), before);
        assert_eq!(mapping.load(4096, Ordering::Relaxed), 7);
        assert!(lock::is_locked_by_other(&other, 5).unwrap());
        net::send(&ours, b"x", 0).unwrap();
        assert_eq!(net::recv_bytes(&theirs, &mut [0], 0).unwrap(), 1);
    }

    #[test]
    fn dropping_in_the_child_closes_and_unmaps_nothing_that_is_new_there() {
        let (mapping, other) = locked_region();
        let (ours, theirs) = net::socketpair_stream().unwrap();
        let numbers = [ours.as_raw_fd(), other.as_raw_fd()];
        let child = Child::fork(move || {
            for number in numbers {
                // SAFETY: dup2 takes numbers; these are closed here, as the other test shows.
                if unsafe { libc::dup2(2, number) } != number {
                    return 1;
                }
            }
            drop((mapping, other, ours, theirs));
            if numbers.iter().all(|number| is_open(*number)) {
                0
            } else {
                2
            }
        });
        assert_eq!(child.exit_code(), 0);
    }

    #[test]
    fn what_the_parent_gives_up_is_gone_while_its_child_lives() {
        let (mapping, other) = locked_region();
        let (ours, theirs) = net::socketpair_stream().unwrap();
        let (ready, told) = net::socketpair_stream().unwrap();
        let told = told.into_owned().unwrap();
        let child = Child::fork(|| {
            // Once it runs, the handler has run.
            if net::send(&told, b"x", 0).is_err() {
                return 1;
            }
            loop {
                // SAFETY: pause takes nothing.
                unsafe { libc::pause() };
            }
        });
        net::recv_bytes(&ready, &mut [0], 0).unwrap();
        drop(mapping);
        drop(ours);
        let locked = lock::is_locked_by_other(&other, 5);
        let end = net::recv_bytes(&theirs, &mut [0], libc::MSG_DONTWAIT);
        child.kill();
        assert!(!locked.unwrap());
        assert_eq!(end.unwrap(), 0);
    }

    #[test]
    fn owned_descriptors_and_those_given_up_are_inherited() {
        let (ours, theirs) = net::socketpair_stream().unwrap();
        let ours = ours.into_owned().unwrap();
        let theirs = theirs.into_raw();
        let child =
            Child::fork(
                || {
                    if is_open(ours.as_fd().as_raw_fd()) && is_open(theirs) {
                        0
                    } else {
                        1
                    }
                },
            );
        assert_eq!(child.exit_code(), 0);
        drop(Fd::adopt(theirs).unwrap());
    }

    #[test]
    fn a_grandchild_counts_on() {
        let before = generation();
        let child = Child::fork(|| {
            let grandchild = Child::fork(|| i32::from(generation() != before + 2));
            let mut status = 0;
            // SAFETY: waitpid stores the status of our own child into a local.
            unsafe { libc::waitpid(grandchild.0, &raw mut status, 0) };
            i32::from(status != 0 || generation() != before + 1)
        });
        assert_eq!(child.exit_code(), 0);
    }
}
