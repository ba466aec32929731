//! A [`Memory`] on the heap, for tests and simulations.
//!
//! Bytes live inside relaxed atomic words, so this is safe code without data races whatever its
//! users do at once; an ordering that is missing in `proto` shows here as wrong bytes (on a
//! weakly ordered machine, or under loom with a memory of its own), never as undefined behaviour.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::mem::MaybeUninit;
use core::ops::Range;
use core::sync::atomic::{fence, AtomicU64, Ordering};

use crate::memory::Memory;

/// Bytes of one word.
const WORD: u64 = 8;

/// Shared memory on the heap, all zero when made.
#[derive(Debug)]
pub struct HeapMemory {
    /// The bytes, eight to a word, little-endian; the last word may reach over `len`.
    words: Box<[AtomicU64]>,
    /// Size in bytes.
    len: u64,
}

impl HeapMemory {
    /// A memory of `len` zero bytes.
    #[must_use]
    pub fn new(len: u64) -> HeapMemory {
        HeapMemory { words: (0..len.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect(), len }
    }

    /// A copy of the bytes at `at..at + length`.
    ///
    /// # Panics
    /// If they are not all inside the memory.
    #[must_use]
    pub fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length);
        self.each_word(at, length, |word, within, _| {
            let value = word.load(Ordering::Relaxed).to_le_bytes();
            bytes.extend_from_slice(&value[within]);
        });
        bytes
    }

    /// The word at `at`.
    fn word(&self, at: u64) -> &AtomicU64 {
        assert!(at % WORD == 0, "word at {at} is not 8-aligned");
        assert!(
            at <= self.len && self.len - at >= WORD,
            "word at {at} outside the {} bytes of memory",
            self.len
        );
        &self.words[index(at / WORD)]
    }

    /// Calls `visit` with each word that holds some of `at..at + length`, the bytes of the word
    /// that are meant, and how many bytes came before.
    fn each_word(
        &self,
        at: u64,
        length: usize,
        mut visit: impl FnMut(&AtomicU64, Range<usize>, usize),
    ) {
        assert!(
            at <= self.len && self.len - at >= length as u64,
            "bytes at {at} (+{length}) outside the {} bytes of memory",
            self.len
        );
        let mut done = 0;
        while done < length {
            let position = at + done as u64;
            let first = index(position % WORD);
            let last = index(WORD).min(first + (length - done));
            visit(&self.words[index(position / WORD)], first..last, done);
            done += last - first;
        }
    }
}

/// A number known to lie inside the memory, as an index.
fn index(number: u64) -> usize {
    usize::try_from(number).expect("the memory is in this address space")
}

impl Memory for HeapMemory {
    fn len(&self) -> u64 {
        self.len
    }

    fn load(&self, at: u64, order: Ordering) -> u64 {
        self.word(at).load(order)
    }

    fn store(&self, at: u64, value: u64, order: Ordering) {
        self.word(at).store(value, order);
    }

    fn swap(&self, at: u64, value: u64) -> u64 {
        self.word(at).swap(value, Ordering::AcqRel)
    }

    fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64> {
        self.word(at).compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
    }

    fn fetch_or(&self, at: u64, bits: u64) -> u64 {
        self.word(at).fetch_or(bits, Ordering::AcqRel)
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn write(&self, at: u64, from: &[u8]) {
        self.each_word(at, from.len(), |word, within, done| {
            let bytes = &from[done..done + within.len()];
            if let Ok(whole) = <[u8; 8]>::try_from(bytes) {
                word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
                return;
            }
            // Part of a word: a compare-exchange, so that a neighbour's bytes survive.
            let changed = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
                let mut value = old.to_le_bytes();
                value[within.clone()].copy_from_slice(bytes);
                Some(u64::from_le_bytes(value))
            });
            debug_assert!(changed.is_ok());
        });
    }

    fn read(&self, at: u64, into: &mut [MaybeUninit<u8>]) {
        let length = into.len();
        self.each_word(at, length, |word, within, done| {
            let value = word.load(Ordering::Relaxed).to_le_bytes();
            for (slot, byte) in into[done..].iter_mut().zip(&value[within]) {
                slot.write(*byte);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_words_are_the_same_little_endian_memory() {
        let memory = HeapMemory::new(24);
        memory.store(8, 0x0807_0605_0403_0201, Ordering::Relaxed);
        assert_eq!(memory.bytes(7, 10), [0, 1, 2, 3, 4, 5, 6, 7, 8, 0]);
        memory.write(6, &[0xaa; 4]);
        assert_eq!(memory.load(8, Ordering::Relaxed), 0x0807_0605_0403_aaaa);
        assert_eq!(memory.load(0, Ordering::Relaxed), 0xaaaa_0000_0000_0000);
        assert_eq!(memory.load(16, Ordering::Relaxed), 0);
    }

    #[test]
    fn a_length_that_is_no_multiple_of_eight_is_kept() {
        let memory = HeapMemory::new(13);
        assert_eq!(memory.len(), 13);
        memory.write(11, &[1, 2]);
        assert_eq!(memory.bytes(10, 3), [0, 1, 2]);
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn bytes_outside_panic() {
        HeapMemory::new(16).write(10, &[0; 7]);
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn a_word_outside_panics() {
        HeapMemory::new(12).load(8, Ordering::Relaxed);
    }

    #[test]
    #[should_panic(expected = "8-aligned")]
    fn a_word_between_words_panics() {
        HeapMemory::new(16).load(4, Ordering::Relaxed);
    }
}
