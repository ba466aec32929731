//! Shared memory as `proto` sees it: words and bytes by offset.
//!
//! Nothing here knows that memory is mapped. [`Memory`] promises that any offset the caller
//! has judged (`at + length <= len()`, words 8-aligned) is readable and writable at any time,
//! and that words are atomic. It promises nothing about *values*: the other end may be hostile.
//! An offset outside the memory is a bug of the caller and panics; it never reaches a peer's bytes.

use core::mem::MaybeUninit;
use core::sync::atomic::Ordering;

/// A shared memory that several processes read and write at once.
///
/// Words are 64-bit little-endian and 8-aligned. Bytes may be torn; words never are.
pub trait Memory {
    /// Size in bytes; constant over the life of the memory.
    fn len(&self) -> u64;
    /// Whether the memory has no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Loads the word at `at`.
    fn load(&self, at: u64, order: Ordering) -> u64;
    /// Stores the word at `at`.
    fn store(&self, at: u64, value: u64, order: Ordering);
    /// Replaces the word at `at` (`AcqRel`) and returns the old value.
    fn swap(&self, at: u64, value: u64) -> u64;
    /// Replaces the word at `at` if it is `current` (`AcqRel` on success, `Acquire` on failure);
    /// returns the old value as `Ok` or `Err`.
    ///
    /// # Errors
    /// The value found, if it was not `current`.
    fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64>;
    /// Sets the bits of `bits` in the word at `at` (`AcqRel`) and returns the old value.
    fn fetch_or(&self, at: u64, bits: u64) -> u64;
    /// A sequentially consistent fence.
    fn fence(&self);
    /// Copies `from` to `at..at + from.len()`.
    fn write(&self, at: u64, from: &[u8]);
    /// Copies `at..at + into.len()` to `into` and initialises all of it.
    fn read(&self, at: u64, into: &mut [MaybeUninit<u8>]);
}

impl<M: Memory + ?Sized> Memory for &M {
    #[inline]
    fn len(&self) -> u64 {
        (**self).len()
    }
    #[inline]
    fn load(&self, at: u64, order: Ordering) -> u64 {
        (**self).load(at, order)
    }
    #[inline]
    fn store(&self, at: u64, value: u64, order: Ordering) {
        (**self).store(at, value, order);
    }
    #[inline]
    fn swap(&self, at: u64, value: u64) -> u64 {
        (**self).swap(at, value)
    }
    #[inline]
    fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64> {
        (**self).compare_exchange(at, current, new)
    }
    #[inline]
    fn fetch_or(&self, at: u64, bits: u64) -> u64 {
        (**self).fetch_or(at, bits)
    }
    #[inline]
    fn fence(&self) {
        (**self).fence();
    }
    #[inline]
    fn write(&self, at: u64, from: &[u8]) {
        (**self).write(at, from);
    }
    #[inline]
    fn read(&self, at: u64, into: &mut [MaybeUninit<u8>]) {
        (**self).read(at, into);
    }
}

impl<M: Memory + ?Sized> Memory for alloc::sync::Arc<M> {
    #[inline]
    fn len(&self) -> u64 {
        (**self).len()
    }
    #[inline]
    fn load(&self, at: u64, order: Ordering) -> u64 {
        (**self).load(at, order)
    }
    #[inline]
    fn store(&self, at: u64, value: u64, order: Ordering) {
        (**self).store(at, value, order);
    }
    #[inline]
    fn swap(&self, at: u64, value: u64) -> u64 {
        (**self).swap(at, value)
    }
    #[inline]
    fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64> {
        (**self).compare_exchange(at, current, new)
    }
    #[inline]
    fn fetch_or(&self, at: u64, bits: u64) -> u64 {
        (**self).fetch_or(at, bits)
    }
    #[inline]
    fn fence(&self) {
        (**self).fence();
    }
    #[inline]
    fn write(&self, at: u64, from: &[u8]) {
        (**self).write(at, from);
    }
    #[inline]
    fn read(&self, at: u64, into: &mut [MaybeUninit<u8>]) {
        (**self).read(at, into);
    }
}
