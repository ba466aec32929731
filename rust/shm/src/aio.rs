//! Counting an eventfd up without ever waiting, whoever else has it.
//!
//! `write` waits while the counter is full, unless `O_NONBLOCK` is set; and that flag belongs to the
//! open file, which everybody shares who has the eventfd. Who means ill clears it, fills the
//! counter, and the next writer sleeps for good. To set the flag or to poll before only makes that
//! rare: writes know no `RWF_NOWAIT` here.
//!
//! The kernel itself never waits: its `eventfd_signal` (`fs/eventfd.c`) stops counting at 2^64 - 1.
//! An asynchronous request has it called when it is done (`IOCB_FLAG_RESFD`), and one that polls
//! the eventfd itself (`IOCB_CMD_POLL`, Linux 4.18) is done at once: an eventfd always has something
//! to read or room.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::fork;

/// `struct iocb` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    /// `aio_key` and `aio_rw_flags`, in an order that depends on the machine: both 0.
    key_and_flags: [u32; 2],
    opcode: u16,
    priority: i16,
    fd: u32,
    /// The events that are polled for.
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    /// The eventfd to count up.
    signalled: u32,
}

/// `struct io_event`, of which nothing is of interest.
type Completion = [u64; 4];

const _: () = assert!(size_of::<Request>() == 64 && size_of::<Completion>() == 32);

const IOCB_CMD_POLL: u16 = 5;
const IOCB_FLAG_RESFD: u32 = 1;
/// Completed requests taken out at a time: as many as fit beyond doubt into any ring, which has a
/// page at least.
const REAPED: usize = 64;
/// Other threads may fill the ring as fast as this one empties it.
const ATTEMPTS: u32 = 64;

/// The process's context: its address, with the fork generation in the bits that are 0 in an address
/// of a page. 0: none yet. It is the kernel's to take away, when the process ends; a forked child
/// has none.
static CONTEXT: AtomicUsize = AtomicUsize::new(0);
const GENERATION: usize = 0xfff;

/// Adds 1 to the eventfd `fd`; where the counter is full it stays so.
///
/// # Errors
/// Those of `io_setup` and `io_submit`: this kernel, or a filter of system calls, does not allow
/// it, or `fd` is no eventfd.
pub(crate) fn signal(fd: BorrowedFd<'_>) -> io::Result<()> {
    let context = context()?;
    // A descriptor is never negative.
    let number = fd.as_raw_fd().unsigned_abs();
    let mut request = Request {
        opcode: IOCB_CMD_POLL,
        fd: number,
        // The bits of `poll`, which fit.
        buffer: u64::from(crate::poll::IN | crate::poll::OUT),
        flags: IOCB_FLAG_RESFD,
        signalled: number,
        ..Request::default()
    };
    for _ in 0..ATTEMPTS {
        let mut requests = [&raw mut request];
        // SAFETY: io_submit reads one pointer, and the request behind it, during the call, and
        // writes the key there; both are local and live. A poll request names no memory.
        let submitted = unsafe {
            libc::syscall(libc::SYS_io_submit, context, 1 as libc::c_long, requests.as_mut_ptr())
        };
        if submitted == 1 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::WouldBlock {
            return Err(error);
        }
        // Full of requests that are done.
        let mut completions = [Completion::default(); REAPED];
        // SAFETY: io_getevents writes at most as many completions as it is told there is room for;
        // with a minimum of 0 it does not wait, and reads no time.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                context,
                0 as libc::c_long,
                REAPED as libc::c_long,
                completions.as_mut_ptr(),
                ptr::null_mut::<libc::timespec>(),
            )
        };
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// The context of this process, made on first use.
fn context() -> io::Result<usize> {
    let generation = fork::generation() as usize & GENERATION;
    // Relaxed: the word is all there is to know, the rest is the kernel's.
    let mut known = CONTEXT.load(Ordering::Relaxed);
    loop {
        if known != 0 && known & GENERATION == generation {
            return Ok(known & !GENERATION);
        }
        let mut made: usize = 0;
        // SAFETY: io_setup writes the context's address into a local word, which is 0 as it asks.
        let returned =
            unsafe { libc::syscall(libc::SYS_io_setup, 1 as libc::c_long, &raw mut made) };
        if returned != 0 {
            return Err(io::Error::last_os_error());
        }
        let word = made | generation;
        if made & GENERATION == 0 {
            match CONTEXT.compare_exchange(known, word, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(made),
                Err(other) => known = other,
            }
        } else {
            known = 0;
        }
        // SAFETY: the context was made above, and nobody else has seen it.
        let destroyed = unsafe { libc::syscall(libc::SYS_io_destroy, made) };
        debug_assert_eq!(destroyed, 0);
        if known == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
    }
}
