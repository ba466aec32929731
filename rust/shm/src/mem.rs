//! Buffers whose bytes need not be initialised yet, for callers that may not write `unsafe`.

use std::arch::asm;
use std::mem::MaybeUninit;

/// Lends `into` to `fill` as bytes that may be uninitialised.
///
/// It is a function around a closure, and not one that returns the slice, because of a hole in
/// the latter: `as_uninit(buffer)[0] = MaybeUninit::uninit()` is safe code and would leave a
/// `&mut [u8]` with an uninitialised byte, whose every read is undefined behaviour. Here the bytes
/// pass through an opaque block after `fill`, also when it panics, so that whatever it did they
/// count as initialised again. That block has no instructions.
#[inline]
pub fn with_uninit<R>(into: &mut [u8], fill: impl FnOnce(&mut [MaybeUninit<u8>]) -> R) -> R {
    struct Initialised<'a>(&'a mut [MaybeUninit<u8>]);
    impl Drop for Initialised<'_> {
        #[inline]
        fn drop(&mut self) {
            // SAFETY: inline assembly must behave like some Rust code that is allowed here. This
            // one behaves like code that stores arbitrary bytes into the whole slice: it is given
            // the pointer, and without `nomem` and `readonly` it may write what the pointer
            // reaches. The slice is exclusively borrowed and writable, so that code is allowed;
            // after it every byte is initialised, with a value the compiler knows nothing about.
            // That the values are those `fill` stored follows from the machine, on which no
            // instruction changed them. (It would not do for memory that never was initialised:
            // the kernel may change pages given back with MADV_FREE. This memory was a `[u8]`.)
            unsafe {
                asm!("/* {0} */", in(reg) self.0.as_mut_ptr(), options(nostack, preserves_flags));
            }
        }
    }
    let length = into.len();
    // SAFETY: `from_raw_parts_mut` needs a pointer valid for `length` elements, aligned, and not
    // used otherwise during the borrow: it comes from the exclusive slice `into`, which is not
    // used again, and `MaybeUninit<u8>` has the layout of `u8`. Uninitialised bytes do not outlive
    // this function: `Initialised` is not handed out, so its drop cannot be skipped.
    let bytes = unsafe { std::slice::from_raw_parts_mut(into.as_mut_ptr().cast(), length) };
    let guard = Initialised(bytes);
    fill(&mut *guard.0)
}

/// `bytes` as they may be given to a reader of uninitialised buffers of a known size.
///
/// The array starts uninitialised; use it with the count that the reader returned.
#[must_use]
pub const fn uninit<const N: usize>() -> [MaybeUninit<u8>; N] {
    [const { MaybeUninit::uninit() }; N]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_written_inside_are_there_afterwards() {
        let mut buffer = [7_u8; 4];
        let written = with_uninit(&mut buffer, |bytes| {
            bytes[0].write(1);
            bytes[3].write(4);
            2
        });
        assert_eq!(written, 2);
        assert_eq!(buffer, [1, 7, 7, 4]);
    }

    #[test]
    fn deinitialised_bytes_are_some_bytes() {
        let mut buffer = [7_u8; 2];
        with_uninit(&mut buffer, |bytes| bytes[0] = MaybeUninit::uninit());
        assert!(u32::from(buffer[0]) < 256);
        assert_eq!(buffer[1], 7);
    }
}
