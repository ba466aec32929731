//! A region of shared memory mapped into this process.
//!
//! The law: no reference or slice points into the mapping. Words are touched by aligned
//! atomics, bytes by the one function of `copy.rs`, both after a bounds check. So whatever the
//! other processes store, at any time, it is only ever a value.
//!
//! One thing a mapping cannot defend against: a file that somebody truncates under it raises
//! SIGBUS. Sealed memfds cannot be truncated; for other files the directory's permissions decide
//! who could.

use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{fence, AtomicU64, Ordering};

use ivsmc_proto::memory::Memory;

use crate::copy;
use crate::fd::Fd;
use crate::file::{self, FileIdentity};
use crate::pages::Pages;

/// A shared mapping of a file or of a device's memory, with the descriptor it was made from.
///
/// In a forked child it becomes private zero pages, which are as valid as the shared ones.
///
/// An open file description lock taken through its descriptor lives as long as it or the mapping.
// Any thread may use it (`Pages` is Send and Sync): every access through `&self` is an aligned atomic
// or the opaque copy, both made for races.
#[derive(Debug)]
pub struct Mapping {
    /// `len` bytes of them are the memory.
    pages: Pages,
    /// Bytes, 1..=isize::MAX.
    len: u64,
    /// Whole words: `len / 8`.
    words: u64,
    identity: FileIdentity,
}

impl Mapping {
    /// Maps the first `size` bytes of `fd`, shared, readable and writable.
    ///
    /// # Errors
    /// Those of [`Mapping::map_at`].
    pub fn map(fd: Fd, size: u64) -> io::Result<Mapping> {
        Self::map_at(fd, 0, size)
    }

    /// Maps `size` bytes of the device memory that `fd` has at `offset`: of a VFIO device. Its
    /// memory is there already, so nothing is reserved or given back, and its descriptor takes no
    /// locks: all such devices are one anonymous inode to the kernel.
    ///
    /// Whoever can take the memory away (unplug the device, switch its memory off) makes accesses
    /// raise SIGBUS.
    ///
    /// # Errors
    /// Those of `mmap`: `InvalidInput` if `size` is 0, the range not inside the file or the device's
    /// memory, or `offset` not a multiple of the page size.
    pub fn map_at(fd: Fd, offset: u64, size: u64) -> io::Result<Mapping> {
        let identity = file::status(&fd)?.identity;
        let pages = Pages::map(fd, offset, size)?;
        Ok(Mapping { pages, len: size, words: size / 8, identity })
    }

    /// Which file is mapped, as it was when it was mapped.
    #[must_use]
    pub fn file_identity(&self) -> FileIdentity {
        self.identity
    }

    /// The descriptor the mapping was made from.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.pages.fd()
    }

    /// Whether it was mapped in this process, and not in one that this process was forked from.
    #[inline]
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.pages.is_current()
    }

    /// Reserves memory for `range`, so that stores there cannot raise SIGBUS for want of space.
    ///
    /// # Errors
    /// `StorageFull` if there is no room (fall back), `InvalidInput` for a range outside.
    pub fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        self.judge(&range)?;
        file::allocate(self.fd(), range)
    }

    /// Gives the memory of `range` back; it reads as zeros from now on.
    ///
    /// # Errors
    /// `InvalidInput` for a range outside, else those of `fallocate`.
    pub fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.judge(&range)?;
        file::punch_hole(self.fd(), range)
    }

    fn judge(&self, range: &Range<u64>) -> io::Result<()> {
        if range.start < range.end && range.end <= self.len {
            Ok(())
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("range {range:?} is not inside a mapping of {} bytes", self.len),
            ))
        }
    }

    /// The word at `at`, for the length of one operation.
    #[inline]
    fn word(&self, at: u64) -> &AtomicU64 {
        // Rotating by 3 divides an aligned offset by 8 and makes any other one huge: both checks
        // are one comparison.
        if at.rotate_right(3) >= self.words {
            bad_word(at, self.len);
        }
        // SAFETY: `add` needs an offset inside the mapping: `at + 8 <= len <= isize::MAX`, judged
        // above, and `usize` has 64 bits. `from_ptr` needs an aligned pointer (the base is
        // page-aligned, `at` a multiple of 8), valid for reads and writes while borrowed (the
        // pages stay mapped while `self` lives), and no other than atomic accesses to it at the
        // same time: Rust code has none, other processes and the opaque copy act on the machine,
        // where an aligned 64-bit access is whole. AtomicU64 is an UnsafeCell, so the reference
        // lets the compiler assume nothing about the value; it does not outlive the operation.
        unsafe { AtomicU64::from_ptr(self.pages.base().as_ptr().add(native(at)).cast()) }
    }

    /// The start of `at..at + length`: readable and writable while `self` lives.
    #[inline]
    pub(crate) fn bytes(&self, at: u64, length: usize) -> *mut u8 {
        if at > self.len || length as u64 > self.len - at {
            bad_bytes(at, length, self.len);
        }
        // SAFETY: `add` needs an offset inside the mapping or at its end: judged above.
        unsafe { self.pages.base().as_ptr().add(native(at)) }
    }
}

impl Memory for Mapping {
    #[inline]
    fn len(&self) -> u64 {
        self.len
    }

    #[inline]
    fn load(&self, at: u64, order: Ordering) -> u64 {
        self.word(at).load(order)
    }

    #[inline]
    fn store(&self, at: u64, value: u64, order: Ordering) {
        self.word(at).store(value, order);
    }

    #[inline]
    fn swap(&self, at: u64, value: u64) -> u64 {
        self.word(at).swap(value, Ordering::AcqRel)
    }

    #[inline]
    fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64> {
        self.word(at).compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
    }

    #[inline]
    fn fetch_or(&self, at: u64, bits: u64) -> u64 {
        self.word(at).fetch_or(bits, Ordering::AcqRel)
    }

    #[inline]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    #[inline]
    fn write(&self, at: u64, from: &[u8]) {
        let to = self.bytes(at, from.len());
        // SAFETY: `copy` needs `from` readable (a slice), `to` writable for as many bytes (judged
        // by `bytes`), without overlap (no slice points into the mapping), and the shared side
        // touched only by it and by atomics (the law of this module).
        unsafe { copy::copy(from.as_ptr(), to, from.len()) };
    }

    #[inline]
    fn read(&self, at: u64, into: &mut [MaybeUninit<u8>]) {
        let from = self.bytes(at, into.len());
        // SAFETY: as in `write`, with the roles changed; `into` is exclusively borrowed.
        unsafe { copy::copy(from, into.as_mut_ptr().cast(), into.len()) };
    }
}

/// An offset as `usize`, which has 64 bits (`lib.rs` demands it).
#[inline]
#[allow(clippy::cast_possible_truncation)] // see above
fn native(offset: u64) -> usize {
    offset as usize
}

#[cold]
#[inline(never)]
fn bad_word(at: u64, len: u64) -> ! {
    panic!("word at {at} is outside a mapping of {len} bytes or not 8-aligned");
}

#[cold]
#[inline(never)]
fn bad_bytes(at: u64, length: usize, len: u64) -> ! {
    panic!("{length} bytes at {at} are outside a mapping of {len} bytes");
}

#[cfg(test)]
mod tests {
    use std::panic::{catch_unwind, AssertUnwindSafe};

    use super::*;
    use crate::mem;

    const SIZE: u64 = 3 * 4096 + 100;

    fn memory() -> Mapping {
        let fd = file::memfd(c"mapping").unwrap();
        file::set_size(&fd, SIZE).unwrap();
        Mapping::map(fd, SIZE).unwrap()
    }

    fn read(mapping: &Mapping, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        mem::with_uninit(&mut bytes, |bytes| mapping.read(at, bytes));
        bytes
    }

    #[test]
    fn words_and_bytes_are_the_same_memory_in_all_mappings() {
        let one = memory();
        let two = Mapping::map(Fd::from(one.fd().try_clone_to_owned().unwrap()), SIZE).unwrap();
        assert_eq!(one.file_identity(), two.file_identity());
        one.store(8, 0x0807_0605_0403_0201, Ordering::Release);
        assert_eq!(two.load(8, Ordering::Acquire), 0x0807_0605_0403_0201);
        assert_eq!(read(&two, 7, 10), [0, 1, 2, 3, 4, 5, 6, 7, 8, 0]);
        two.write(SIZE - 5, b"hello");
        assert_eq!(read(&one, SIZE - 5, 5), b"hello");
        assert_eq!(one.swap(8, 1), 0x0807_0605_0403_0201);
        assert_eq!(two.compare_exchange(8, 1, 2), Ok(1));
        assert_eq!(two.compare_exchange(8, 1, 3), Err(2));
        assert_eq!(one.fetch_or(8, 5), 2);
        assert_eq!(two.load(8, Ordering::Relaxed), 7);
        one.fence();
    }

    #[test]
    fn what_is_outside_or_askew_panics_and_touches_nothing() {
        let mapping = memory();
        let whole_words = SIZE & !7;
        mapping.store(whole_words - 8, 1, Ordering::Relaxed);
        for at in [1, 4, 9, whole_words, whole_words + 8, u64::MAX, u64::MAX - 7, 1 << 63] {
            let load = || mapping.load(at, Ordering::Relaxed);
            assert!(catch_unwind(AssertUnwindSafe(load)).is_err(), "word at {at}");
        }
        mapping.write(SIZE, b"");
        for (at, length) in [(SIZE, 1), (SIZE - 1, 2), (SIZE + 1, 0), (u64::MAX, 1)] {
            let write = || mapping.write(at, &vec![0; length]);
            assert!(catch_unwind(AssertUnwindSafe(write)).is_err(), "{length} at {at}");
        }
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let fd = file::memfd(c"short").unwrap();
        file::set_size(&fd, 4096).unwrap();
        let error = Mapping::map(fd.try_clone().unwrap(), 4097).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(Mapping::map(fd.try_clone().unwrap(), 0).is_err());
        // As of a device that an agent says to be larger than it is.
        for (offset, size) in [(4096, 4096), (0, 8192), (4096, u64::MAX)] {
            assert!(Mapping::map_at(fd.try_clone().unwrap(), offset, size).is_err(), "{offset}");
        }
        assert!(Mapping::map(fd, u64::MAX).is_err());
    }

    #[test]
    fn reserved_memory_can_be_given_back() {
        let mapping = memory();
        let reserved = || file::status(mapping.fd()).unwrap().reserved;
        assert_eq!(reserved(), 0);
        mapping.reserve(4096..3 * 4096).unwrap();
        assert_eq!(reserved(), 2 * 4096);
        mapping.write(4096, b"gone soon");
        mapping.punch_hole(4096..3 * 4096).unwrap();
        assert_eq!(reserved(), 0);
        assert_eq!(read(&mapping, 4096, 4), [0; 4]);
        for range in [0..SIZE + 1, SIZE..SIZE, u64::MAX - 1..u64::MAX] {
            let error = mapping.reserve(range).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn the_table_of_mappings_does_not_fill_up() {
        let fd = file::memfd(c"many").unwrap();
        file::set_size(&fd, 4096).unwrap();
        for _ in 0..5000 {
            Mapping::map(fd.try_clone().unwrap(), 4096).unwrap();
        }
    }

    #[test]
    fn two_threads_may_tear_bytes_but_not_words() {
        let mapping = memory();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..20_000_u64 {
                    let byte = if round % 2 == 0 { 0x55 } else { 0xaa };
                    mapping.store(0, u64::from_ne_bytes([byte; 8]), Ordering::Release);
                    mapping.write(64, &[byte; 256]);
                }
            });
            for _ in 0..20_000 {
                let word = mapping.load(0, Ordering::Acquire).to_ne_bytes();
                assert!(word.iter().all(|byte| *byte == word[0]));
                let bytes = read(&mapping, 64, 256);
                assert!(bytes.iter().all(|byte| [0, 0x55, 0xaa].contains(byte)));
            }
        });
    }
}
