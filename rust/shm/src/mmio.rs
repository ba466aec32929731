//! Device registers in this process's memory.
//!
//! A register is not memory: a load or store acts on the device, so each is made exactly once, with
//! exactly its 32 bits, by a volatile access. Registers are never touched by the functions for
//! shared memory, nor the other way round.
//!
//! **Order.** A store to a register may tell another machine to look at shared memory.
//! [`Registers::store`] therefore comes after a full fence. What was stored to shared memory before
//! it is then visible before the register's store is: on x86 stores are seen in program order anyway,
//! whatever the memory type, and the fence keeps the compiler from changing that (a volatile access
//! alone is not ordered with others that are not volatile); on aarch64 the fence is `dmb ish`, which
//! orders normal memory before device memory for all observers of the inner shareable domain. The one
//! who carries the doorbell on, the hypervisor, is one: the store traps on the same processor.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{fence, Ordering};

use crate::fd::Fd;
use crate::file;
use crate::pages::Pages;

/// The registers of a device: a range of 32-bit words.
///
/// In a forked child they are words of private memory, and stores reach no device.
#[derive(Debug)]
pub struct Registers {
    access: Access,
    /// Bytes, a multiple of 4.
    len: u64,
}

#[derive(Debug)]
enum Access {
    /// Mapped; they begin this many bytes behind the start of the pages, a multiple of 4.
    Mapped(Pages, usize),
    /// Through a descriptor that has them at this offset: one system call for each access. For
    /// registers that share their page with another device's.
    Called(Fd, u64),
}

/// Bytes of a register.
const REGISTER: u64 = 4;

impl Registers {
    /// Maps `len` bytes of registers that `fd` has at `offset`, which may be in the middle of a page.
    ///
    /// # Errors
    /// `InvalidInput` for numbers that are not multiples of 4; else those of `mmap`.
    pub fn map(fd: Fd, offset: u64, len: u64) -> io::Result<Registers> {
        if offset % REGISTER != 0 || len % REGISTER != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let skip = offset % file::page_size();
        let length = skip.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let pages = Pages::map(fd, offset - skip, length)?;
        // Below the size of a page.
        #[allow(clippy::cast_possible_truncation)]
        let skip = skip as usize;
        Ok(Registers { access: Access::Mapped(pages, skip), len })
    }

    /// Registers that cannot be mapped: reads and writes `len` bytes of `fd` at `offset`.
    #[must_use]
    pub fn through(fd: Fd, offset: u64, len: u64) -> Registers {
        Registers { access: Access::Called(fd, offset), len }
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The descriptor they were made from.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        match &self.access {
            Access::Mapped(pages, _) => pages.fd(),
            Access::Called(fd, _) => fd.as_fd(),
        }
    }

    /// Loads the register at `at`.
    ///
    /// # Errors
    /// `InvalidInput` if there is none at `at`; else those of `pread`.
    pub fn load(&self, at: u64) -> io::Result<u32> {
        self.judge(at)?;
        match &self.access {
            Access::Mapped(pages, skip) => {
                let register = register(pages, *skip, at);
                // SAFETY: `read_volatile` needs a valid, aligned, readable, initialised u32: judged
                // by `judge` and argued in `register`; any bits are a u32. No Rust object is there.
                Ok(unsafe { register.read_volatile() })
            }
            Access::Called(fd, offset) => {
                let mut bytes = [0; 4];
                file::read_at(fd, offset + at, &mut bytes)?;
                Ok(u32::from_le_bytes(bytes))
            }
        }
    }

    /// Stores `value` into the register at `at`, after all that this thread stored before.
    ///
    /// # Errors
    /// `InvalidInput` if there is none at `at`; else those of `pwrite`.
    pub fn store(&self, at: u64, value: u32) -> io::Result<()> {
        self.judge(at)?;
        // See "Order" at the top of the module.
        fence(Ordering::SeqCst);
        match &self.access {
            Access::Mapped(pages, skip) => {
                let register = register(pages, *skip, at);
                // SAFETY: `write_volatile` needs a valid, aligned, writable u32: judged by `judge`
                // and argued in `register`. Other threads may store to it at the same time: on the
                // machine these are two whole 32-bit stores to a device, and no Rust object is
                // there that a compiler could know of.
                unsafe { register.write_volatile(value) };
                Ok(())
            }
            Access::Called(fd, offset) => file::write_at(fd, offset + at, &value.to_le_bytes()),
        }
    }

    fn judge(&self, at: u64) -> io::Result<()> {
        if at % REGISTER == 0 && at < self.len && self.len - at >= REGISTER {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("no register at {at} of {} bytes", self.len),
        ))
    }
}

/// The address of the register at `at`, which [`Registers::judge`] allows.
#[inline]
fn register(pages: &Pages, skip: usize, at: u64) -> *mut u32 {
    // Below the length of the pages, which fits.
    #[allow(clippy::cast_possible_truncation)]
    let at = at as usize;
    // SAFETY: `add` needs an offset inside the pages: `skip + len` bytes were mapped and
    // `at + 4 <= len` was judged. The pages stay mapped while `self` lives. The sum is a multiple of
    // 4 and the base page-aligned, so the pointer is aligned for a u32.
    #[allow(clippy::cast_ptr_alignment)]
    unsafe {
        pages.base().as_ptr().add(skip + at).cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(skip: u64) -> (Registers, Registers) {
        let fd = file::memfd(c"registers").unwrap();
        let page = file::page_size();
        file::set_size(&fd, 2 * page).unwrap();
        let mapped = Registers::map(fd.try_clone().unwrap(), page + skip, 256).unwrap();
        (mapped, Registers::through(fd, page + skip, 256))
    }

    #[test]
    fn both_ways_reach_the_same_registers() {
        for skip in [0, 256, file::page_size() - 256] {
            let (mapped, called) = registers(skip);
            mapped.store(12, 0x0003_0001).unwrap();
            assert_eq!(called.load(12).unwrap(), 0x0003_0001);
            called.store(252, 7).unwrap();
            assert_eq!(mapped.load(252).unwrap(), 7);
            assert_eq!((mapped.load(8).unwrap(), mapped.len()), (0, 256));
        }
    }

    #[test]
    fn what_is_no_register_is_refused_and_touches_nothing() {
        let (mapped, called) = registers(0);
        for at in [1, 2, 254, 256, 260, u64::MAX, u64::MAX - 3] {
            for registers in [&mapped, &called] {
                let error = registers.store(at, 1).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{at}");
                assert!(registers.load(at).is_err(), "{at}");
            }
        }
        let fd = || {
            let fd = file::memfd(c"askew").unwrap();
            file::set_size(&fd, 128).unwrap();
            fd
        };
        const HUGE: u64 = u64::MAX - 3;
        for (offset, len) in [(2, 256), (0, 3), (0, 4100), (4096, 256), (0, HUGE), (4, HUGE)] {
            assert!(Registers::map(fd(), offset, len).is_err(), "{offset} {len}");
        }
        // As sysfs has them: the file has as many bytes as the registers, which begin inside of a page.
        assert!(Registers::map(fd(), 256, 128).is_ok());
    }
}
