//! Pages of a file in this process's memory, which a forked child has no part in.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use crate::call;
use crate::fd::Fd;
use crate::file;
use crate::fork::{self, MappingEntry};

/// A shared mapping with the descriptor it was made from.
///
/// In a forked child it becomes private zero pages, which are as valid as the shared ones.
#[derive(Debug)]
pub(crate) struct Pages {
    /// Start of `length` readable and writable bytes, page-aligned, until drop.
    base: NonNull<u8>,
    /// Bytes, 1..=isize::MAX.
    length: usize,
    entry: MappingEntry,
    generation: u32,
    fd: Fd,
}

// SAFETY: Send and Sync need that any thread may use and drop it: the pages belong to the process,
// nothing here touches what is in them, and the remaining fields are Send and Sync. Who does touch
// them (`mapping`, `mmio`) argues that at its place.
unsafe impl Send for Pages {}
// SAFETY: as for Send.
unsafe impl Sync for Pages {}

impl Pages {
    /// Maps `length` bytes of `fd` from `offset` on, shared, readable and writable.
    ///
    /// # Errors
    /// `InvalidInput` if a regular file has no page at the end of the range: accesses there would raise
    /// SIGBUS. Those of `mmap`: `InvalidInput` if `length` is 0 or `offset` not a multiple of the page
    /// size, `OutOfMemory` for more than an address space has.
    pub(crate) fn map(fd: Fd, offset: u64, length: u64) -> io::Result<Pages> {
        let status = file::status(&fd)?;
        // Up to the end of its last page: sysfs says of registers, which have a page, their bytes.
        let pages = status.size.checked_next_multiple_of(file::page_size());
        let ends_behind = |pages| offset.checked_add(length).is_none_or(|end| end > pages);
        if status.is_regular() && pages.is_none_or(ends_behind) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("cannot map {length} bytes at {offset} of a file of {}", status.size),
            ));
        }
        let offset = call::file_offset(offset)?;
        let length = usize::try_from(length)
            .ok()
            .filter(|length| isize::try_from(*length).is_ok())
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // First pages that reach nobody, then the note for the fork handler, then the file over
        // them: a fork at any moment leaves the child without the shared pages.
        let base = anonymous(std::ptr::null_mut(), length, 0)?;
        let unmap = |error| {
            // SAFETY: munmap needs pages nobody uses: they were mapped above and never lent.
            unsafe { libc::munmap(base.as_ptr().cast(), length) };
            Err(error)
        };
        // SAFETY: the pages belong to this function, then to the value it returns, which
        // unregisters them before it gives them up.
        let entry = match unsafe { fork::register_mapping(base.as_ptr() as usize, length) } {
            Ok(entry) => entry,
            Err(error) => return unmap(error),
        };
        // SAFETY: mmap with MAP_FIXED needs a range whose content nobody needs: it was mapped
        // above for this purpose. The descriptor is open; the result is checked.
        let mapped = unsafe {
            libc::mmap(
                base.as_ptr().cast(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                fd.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            fork::unregister_mapping(&entry);
            return unmap(error);
        }
        Ok(Pages { base, length, entry, generation: fork::generation(), fd })
    }

    /// The first of the mapped bytes; all of them stay mapped, readable and writable while `self`
    /// lives, in a forked child as well.
    #[inline]
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// The descriptor they were mapped from.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether they were mapped in this process, and not in one that this process was forked from.
    #[inline]
    pub(crate) fn is_current(&self) -> bool {
        fork::is_current(self.generation)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.is_current() {
            // The reverse of `map`: leave the shared pages, take the note back while the range is
            // still ours, give it up. If the first step has no memory, the last one still does it.
            let _ = anonymous(self.base.as_ptr(), self.length, libc::MAP_FIXED);
            fork::unregister_mapping(&self.entry);
        }
        // SAFETY: munmap needs pages nobody uses afterwards: `self` owned the range, shared or, in
        // a forked child, as the private pages put there, and lent nothing that outlives it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// Inaccessible private pages: `length` of them anywhere, or over `at` with MAP_FIXED.
fn anonymous(at: *mut u8, length: usize, fixed: libc::c_int) -> io::Result<NonNull<u8>> {
    // SAFETY: mmap without MAP_FIXED touches no existing mapping; with it, the callers own the
    // range and need its content no longer.
    let base = unsafe {
        libc::mmap(
            at.cast(),
            length,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned address 0"))
}
