//! Open file description locks on single bytes: proof that a process lives.
//!
//! Such a lock belongs to the open file, not to the process: it is held as long as a descriptor of
//! that open file or a mapping made from it exists anywhere, and the kernel releases it when the
//! last one is gone, however the process ended. Closing another descriptor of the same file does
//! not release it (as it would with POSIX locks).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::call;

/// Tries to take the exclusive lock on the byte at `offset`; false if another open file has it.
///
/// # Errors
/// Those of `fcntl`, for instance `EBADF` for a descriptor that is not writable.
pub fn try_lock_byte(fd: impl AsFd, offset: u64) -> io::Result<bool> {
    match request(&fd, libc::F_OFD_SETLK, libc::F_WRLCK, offset) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Releases the lock on the byte at `offset`, if this open file has it.
///
/// It releases it for everybody who shares the open file, forked parents included.
///
/// # Errors
/// Those of `fcntl`.
pub fn unlock_byte(fd: impl AsFd, offset: u64) -> io::Result<()> {
    request(&fd, libc::F_OFD_SETLK, libc::F_UNLCK, offset).map(drop)
}

/// Whether another open file holds the lock on the byte at `offset`.
///
/// # Errors
/// Those of `fcntl`.
pub fn is_locked_by_other(fd: impl AsFd, offset: u64) -> io::Result<bool> {
    let found = request(&fd, libc::F_OFD_GETLK, libc::F_WRLCK, offset)?;
    Ok(i32::from(found) != libc::F_UNLCK)
}

/// Whether no other open file of the file behind `fd` exists, anywhere: no descriptor of one, in any
/// process or under way between two, and no mapping. `fd` itself is open for reading and writing.
///
/// The kernel gives a lease for writing only then. False is no proof of the opposite: before Linux
/// 5.3, files of tmpfs never seem to be free.
///
/// # Errors
/// Those of `fcntl(F_SETLEASE)`, for instance `EACCES` if the file is another user's.
pub fn is_only_open_file(fd: impl AsFd) -> io::Result<bool> {
    /// Of `asm-generic/fcntl.h`, which the libc crate does not have.
    const F_SETSIG: libc::c_int = 10;
    let number = fd.as_fd().as_raw_fd();
    // Who opens the file before the lease is given back waits for that, and this process gets a
    // signal: one that is ignored unless it asks for it, not SIGIO, which would end it.
    // SAFETY: all three commands take numbers.
    unsafe {
        call::check(libc::fcntl(number, F_SETSIG, libc::SIGURG))?;
        let leased = call::check(libc::fcntl(number, libc::F_SETLEASE, libc::F_WRLCK));
        match leased {
            Ok(_) => {
                call::check(libc::fcntl(number, libc::F_SETLEASE, libc::F_UNLCK))?;
                Ok(true)
            }
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// One lock call about one byte; returns the lock type the kernel left in the structure.
fn request(
    fd: &impl AsFd,
    command: libc::c_int,
    kind: libc::c_int,
    offset: u64,
) -> io::Result<i16> {
    // The constants are 0 to 2 and SEEK_SET is 0.
    #[allow(clippy::cast_possible_truncation)]
    let mut lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: call::file_offset(offset)?,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the OFD commands need an open descriptor and a pointer to an initialised `flock` with
    // `l_pid` 0, which they may write during the call: `lock` is one, exclusively borrowed.
    call::check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), command, &raw mut lock) })?;
    Ok(lock.l_type)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::fd::Fd;
    use crate::file;

    fn two_open_files() -> (Fd, Fd) {
        let one = file::memfd(c"lock").unwrap();
        let path = format!("/proc/self/fd/{}", one.as_raw_fd());
        let two = OpenOptions::new().read(true).write(true).open(path).unwrap();
        (one, Fd::from(OwnedFd::from(two)))
    }

    #[test]
    fn a_byte_has_one_holder_and_other_bytes_are_free() {
        let (one, two) = two_open_files();
        let far = 1 << 40;
        assert!(try_lock_byte(&one, far).unwrap());
        assert!(try_lock_byte(&one, far).unwrap(), "one's own lock is no obstacle");
        assert!(!is_locked_by_other(&one, far).unwrap());
        assert!(is_locked_by_other(&two, far).unwrap());
        assert!(!try_lock_byte(&two, far).unwrap());
        assert!(!is_locked_by_other(&two, far + 1).unwrap());
        assert!(try_lock_byte(&two, far + 1).unwrap());
        unlock_byte(&one, far).unwrap();
        assert!(try_lock_byte(&two, far).unwrap());
    }

    #[test]
    fn the_lock_goes_with_the_last_descriptor_of_its_open_file() {
        let (one, two) = two_open_files();
        assert!(try_lock_byte(&one, 0).unwrap());
        let clone = one.try_clone().unwrap();
        drop(one);
        assert!(is_locked_by_other(&two, 0).unwrap());
        drop(clone);
        assert!(!is_locked_by_other(&two, 0).unwrap());
    }

    #[test]
    fn an_offset_the_kernel_cannot_have_is_refused() {
        let (one, _two) = two_open_files();
        assert!(try_lock_byte(&one, u64::MAX).is_err());
    }
}
