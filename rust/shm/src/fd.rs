//! Owned descriptors that a forked child does not keep.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use crate::{call, fork};

/// A number that can never be an open descriptor: the kernel's own limit is below it.
const NEVER_OPEN: RawFd = RawFd::MAX;

/// An owned descriptor, closed on drop, and closed in every child forked while it is open.
///
/// In such a child the object still exists, but its number no longer means the same file. There it
/// lends a number that is never open, so that every call answers `EBADF`, and its drop closes
/// nothing. Wrap a descriptor in [`OwnedFd`] instead where a child is meant to inherit it.
pub struct Fd {
    number: RawFd,
    generation: u32,
}

impl Fd {
    /// Takes over the descriptor `raw`, which came from outside, for instance from Python.
    ///
    /// The caller vouches that nobody else is going to close it. What can be checked is: the number
    /// is open, and is not already owned by another [`Fd`].
    ///
    /// # Errors
    /// `EBADF` if the number is not open; `InvalidInput` if another [`Fd`] owns it.
    pub fn adopt(raw: RawFd) -> io::Result<Fd> {
        // SAFETY: F_GETFD takes any number and touches no memory.
        call::check(unsafe { libc::fcntl(raw, libc::F_GETFD) })?;
        if !fork::register_fd(raw) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("descriptor {raw} is already owned by an open ivsmc object"),
            ));
        }
        Ok(Fd { number: raw, generation: fork::generation() })
    }

    /// Takes over the descriptor `raw` that this process was started with; programs that it starts
    /// do not get it.
    ///
    /// # Errors
    /// As [`Fd::adopt`].
    pub fn inherit(raw: RawFd) -> io::Result<Fd> {
        let fd = Fd::adopt(raw)?;
        // SAFETY: F_SETFD takes a number.
        call::check(unsafe { libc::fcntl(raw, libc::F_SETFD, libc::FD_CLOEXEC) })?;
        Ok(fd)
    }

    /// Whether it was opened in this process, and not in one that this process was forked from.
    #[inline]
    #[must_use]
    pub fn is_current(&self) -> bool {
        fork::is_current(self.generation)
    }

    /// Another descriptor of the same open file (close-on-exec).
    ///
    /// # Errors
    /// Those of `fcntl(F_DUPFD_CLOEXEC)`.
    pub fn try_clone(&self) -> io::Result<Fd> {
        self.as_fd().try_clone_to_owned().map(Fd::from)
    }

    /// The descriptor as one that forked children inherit.
    ///
    /// # Errors
    /// `EBADF` in a forked child.
    pub fn into_owned(self) -> io::Result<OwnedFd> {
        if !self.is_current() {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        let number = self.into_raw();
        // SAFETY: `from_raw_fd` needs an open descriptor with no other owner: `self` owned it, in
        // this generation, and gave it up just now.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }

    /// Gives the descriptor up: the caller must close it. Forked children keep it from now on.
    ///
    /// In a forked child the number is one that is never open.
    #[must_use]
    pub fn into_raw(self) -> RawFd {
        let number = self.as_raw_fd();
        if self.is_current() {
            fork::unregister_fd(number);
        }
        std::mem::forget(self);
        number
    }

    /// Takes over a descriptor that a system call has just returned.
    ///
    /// # Safety
    /// `number` is open and has no other owner.
    pub(crate) unsafe fn from_call(number: RawFd) -> Fd {
        fork::register_fd(number);
        Fd { number, generation: fork::generation() }
    }
}

impl From<OwnedFd> for Fd {
    fn from(owned: OwnedFd) -> Fd {
        // SAFETY: `from_call` needs an open descriptor without another owner: `OwnedFd` was its
        // owner and gives it up here.
        unsafe { Fd::from_call(owned.into_raw_fd()) }
    }
}

impl AsRawFd for Fd {
    #[inline]
    fn as_raw_fd(&self) -> RawFd {
        if self.is_current() {
            self.number
        } else {
            NEVER_OPEN
        }
    }
}

impl AsFd for Fd {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `borrow_raw` needs a number other than -1 that stays open while borrowed: in its
        // own generation `self` keeps it open; in a forked child it is a number that is never
        // open, so it can never be somebody else's file.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        if self.is_current() {
            // Before the close: afterwards the number may already be another thread's.
            fork::unregister_fd(self.number);
            // SAFETY: close needs a descriptor nobody uses afterwards: `self` is its only owner.
            // Its errors say nothing about the number, which is free on Linux in any case.
            let _ = call::check(unsafe { libc::close(self.number) });
        }
    }
}

impl fmt::Debug for Fd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_current() {
            write!(f, "Fd({})", self.number)
        } else {
            write!(f, "Fd(closed by fork)")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file;

    fn is_open(number: RawFd) -> bool {
        // SAFETY: F_GETFD takes any number and touches no memory.
        unsafe { libc::fcntl(number, libc::F_GETFD) != -1 }
    }

    #[test]
    fn a_number_that_is_not_open_cannot_be_adopted() {
        for number in [-1, NEVER_OPEN] {
            let error = Fd::adopt(number).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        }
    }

    #[test]
    fn a_number_has_one_owner() {
        let fd = file::memfd(c"owner").unwrap();
        let error = Fd::adopt(fd.as_raw_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let adopted = Fd::adopt(fd.into_raw()).unwrap();
        let owned = adopted.into_owned().unwrap();
        assert!(is_open(owned.as_raw_fd()));
        let again = Fd::from(owned);
        assert!(Fd::adopt(again.as_raw_fd()).is_err());
    }

    #[test]
    fn what_is_inherited_is_not_passed_on() {
        let number = file::memfd(c"inherited").unwrap().into_raw();
        // SAFETY: F_SETFD and F_GETFD take numbers.
        let flags = |fd| unsafe { libc::fcntl(fd, libc::F_GETFD) };
        // SAFETY: as above.
        assert_eq!(unsafe { libc::fcntl(number, libc::F_SETFD, 0) }, 0);
        let fd = Fd::inherit(number).unwrap();
        assert_eq!(flags(fd.as_raw_fd()), libc::FD_CLOEXEC);
        assert!(Fd::inherit(number).is_err());
    }

    #[test]
    fn a_clone_is_the_same_file_and_close_on_exec() {
        let fd = file::memfd(c"clone").unwrap();
        let clone = fd.try_clone().unwrap();
        assert_ne!(fd.as_raw_fd(), clone.as_raw_fd());
        assert_eq!(file::status(&fd).unwrap(), file::status(&clone).unwrap());
        // SAFETY: F_GETFD takes any number and touches no memory.
        let flags = unsafe { libc::fcntl(clone.as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags, libc::FD_CLOEXEC);
    }

    #[test]
    fn dropping_closes() {
        let (ours, theirs) = crate::net::socketpair_stream().unwrap();
        drop(ours);
        assert_eq!(crate::net::recv_bytes(&theirs, &mut [0], 0).unwrap(), 0);
    }
}
