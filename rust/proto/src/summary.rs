//! Summary bits: which sessions of a process a doorbell is about.
//!
//! A doorbell says nothing but that it was notified, and all sessions of an attachment share one.
//! So whoever notifies sets a bit first, in the slot of the one who is notified, and whoever wakes
//! takes all bits and looks at the sessions they stand for. Both ends know a session's bit without
//! telling each other: it follows from the DMB that the notified end reads ([`number`]).
//!
//! ```text
//!   notifies                                     is notified
//!     publish, full fence                          set the wait word, full fence, look, sleep
//!     take the wait word                           drain the doorbell
//!     set the bit        -- AcqRel --              take the bits
//!     notify the doorbell                          wake the sessions of the bits: they look
//! ```
//!
//! The doorbell is drained *before* the bits are taken: a bit that comes too late for this look has
//! its doorbell still ahead. A bit may stand for several sessions, and anyone may set any bit at any
//! time: it costs those sessions one look each, at most so many per drain as there are bits.

use core::sync::atomic::Ordering;

use crate::failpoint::reached;
use crate::layout::WORD;
use crate::memory::Memory;

/// Words of summary bits of a slot.
pub const WORDS: u64 = 16;

/// Summary bits of a slot.
const BITS: u32 = 1024;
const _: () = assert!(BITS as u64 == WORDS * 64);

/// The number, below 1024, of the session whose notified end reads the DMB of `size_class` at
/// `granule`: neighbours of one size have different ones.
#[inline]
#[must_use]
#[allow(clippy::cast_possible_truncation)] // It is below 1024.
pub const fn number(granule: u32, size_class: u8) -> u16 {
    // A class that does not exist shifts to nothing: only to a wrong bit.
    (match granule.checked_shr(size_class as u32) {
        Some(number) => number % BITS,
        None => 0,
    }) as u16
}

/// Sets bit `number` (modulo 1024) of the summary words at `at`; the caller notifies afterwards.
#[inline]
pub fn set<M: Memory>(m: &M, at: u64, number: u16) {
    let number = u64::from(number) % u64::from(BITS);
    // Its Release pairs with the Acquire of the swap in `take`: who takes the bit, and whom that
    // one wakes, sees what was published before.
    m.fetch_or(at + number / 64 * WORD, 1 << (number % 64));
    reached("summary.set");
}

/// Takes all bits of the summary words at `at`, and says which numbers they were. The caller has
/// drained the doorbell before.
#[inline]
pub fn take<M: Memory>(m: &M, at: u64, mut taken: impl FnMut(u16)) {
    for word in 0..WORDS {
        let at = at + word * WORD;
        // Relaxed: a look that saves the swap. What was set before the doorbell that the caller
        // drained is there; the kernel has ordered the two.
        if m.load(at, Ordering::Relaxed) == 0 {
            continue;
        }
        // Its Acquire pairs with the Release of `set`.
        let mut bits = m.swap(at, 0);
        reached("summary.taken");
        while bits != 0 {
            #[allow(clippy::cast_possible_truncation)] // Both are small.
            taken((word * 64) as u16 + bits.trailing_zeros() as u16);
            bits &= bits - 1;
        }
    }
}

#[cfg(all(test, feature = "heap"))]
mod tests {
    use super::*;
    use crate::heap::HeapMemory;
    use alloc::vec::Vec;

    fn all(m: &HeapMemory, at: u64) -> Vec<u16> {
        let mut numbers = Vec::new();
        take(m, at, |number| numbers.push(number));
        numbers
    }

    #[test]
    fn bits_are_taken_once_and_touch_nothing_else() {
        let m = HeapMemory::new(4096);
        let at = 128;
        for number in [0, 63, 64, 1023, 64, 1024 + 5] {
            set(&m, at, number);
        }
        assert_eq!(all(&m, at), [0, 5, 63, 64, 1023]);
        assert_eq!(all(&m, at), []);
        set(&m, at, 1023);
        assert_eq!(m.load(at + 15 * WORD, Ordering::Relaxed), 1 << 63);
        let elsewhere = (0..4096).step_by(8).filter(|word| *word != at + 15 * WORD);
        assert!(elsewhere.into_iter().all(|word| m.load(word, Ordering::Relaxed) == 0));
    }

    #[test]
    fn a_drain_ends_whatever_is_set() {
        let m = HeapMemory::new(4096);
        for word in 0..WORDS {
            m.store(word * WORD, u64::MAX, Ordering::Relaxed);
        }
        assert_eq!(all(&m, 0), (0..1024).collect::<Vec<_>>());
    }

    #[test]
    fn neighbours_of_one_size_differ() {
        assert_eq!((number(0, 0), number(1023, 0), number(1024, 0)), (0, 1023, 0));
        assert_eq!((number(16, 4), number(32, 4), number(u32::MAX, 6)), (1, 2, 1023));
        assert_eq!(number(7, u8::MAX), 0);
    }
}
