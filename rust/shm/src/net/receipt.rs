//! Sending with a receipt that survives the sender.
//!
//! A process that is killed just after `sendmsg` has told nobody that it sent. `sendmmsg` stores the
//! length of what was sent into its caller's memory before it returns, and a signal, SIGKILL too, ends a
//! process only where a call returns. So where that memory is shared with whoever comes after, the
//! message and its receipt are one step: both are there, or neither.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::transfer::empty_message;
use super::unix::Control;
use crate::mapping::Mapping;

/// Bytes of a receipt. It may start at any multiple of 8.
pub const RECEIPT_BYTES: u64 = size_of::<libc::mmsghdr>() as u64;

/// Offset, within a receipt, of the word that says how many bytes were sent.
pub const RECEIPT_COUNT: u64 = std::mem::offset_of!(libc::mmsghdr, msg_len) as u64;

const _: () = assert!(RECEIPT_COUNT % 8 == 0 && RECEIPT_BYTES == RECEIPT_COUNT + 8);

/// As [`send_with_fd`](super::send_with_fd), and the word [`RECEIPT_COUNT`] bytes after `at` in
/// `receipts` becomes the number of bytes sent.
///
/// The caller has stored 0 there. If this process is killed, the word is 0 only if nothing was sent.
/// (That leaves out a kill in the moment in which the kernel has the page moved elsewhere.)
/// Nobody else writes to the receipt meanwhile.
///
/// # Errors
/// As `send_with_fd`; the word is left as it is.
///
/// # Panics
/// If the receipt is not inside `receipts` or not 8-aligned.
pub fn send_with_receipt(
    fd: impl AsFd,
    from: &[u8],
    passed: Option<BorrowedFd<'_>>,
    receipts: &Mapping,
    at: u64,
) -> io::Result<()> {
    assert!(at % 8 == 0, "a receipt at {at} is not 8-aligned");
    let receipt = receipts.bytes(at, size_of::<libc::mmsghdr>()).cast::<libc::mmsghdr>();
    let mut control = Control::new();
    let mut part = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let mut message = empty_message();
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if let Some(passed) = passed {
        control.enclose(&mut message, passed);
    }
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: `write` needs `receipt.msg_hdr` writable and aligned: `bytes` judged that the structure
    // is inside the mapping, whose base is page-aligned, and `at` is a multiple of its alignment.
    // Nothing in Rust refers to it, and the mapping's own accesses, atomics and the opaque copy, are
    // made for races. sendmmsg is given one structure; it reads the header, through it the buffer (a
    // borrowed slice) and the control data (a local), all alive during the call, and writes `msg_len`.
    // What others who have the memory may store into it meanwhile the caller answers for. Not the C
    // library's function: musl's sends first and stores then.
    let sent = unsafe {
        (&raw mut (*receipt).msg_hdr).write(message);
        libc::syscall(libc::SYS_sendmmsg, fd.as_fd().as_raw_fd(), receipt, 1, flags)
    };
    match sent {
        1 => Ok(()),
        0 => Err(io::ErrorKind::WouldBlock.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::sync::atomic::Ordering;

    use ivsmc_proto::memory::Memory;

    use super::*;
    use crate::fd::Fd;
    use crate::{file, net};

    fn receipts() -> Mapping {
        let fd = file::memfd(c"receipts").unwrap();
        file::set_size(&fd, 4096).unwrap();
        Mapping::map(fd, 4096).unwrap()
    }

    fn count(receipts: &Mapping, at: u64) -> u64 {
        receipts.load(at + RECEIPT_COUNT, Ordering::Acquire)
    }

    #[test]
    fn a_message_with_its_descriptor_leaves_a_receipt_in_shared_memory() {
        let (near, far) = net::socketpair_stream().unwrap();
        let receipts = receipts();
        let other = Mapping::map(Fd::from(receipts.fd().try_clone_to_owned().unwrap()), 4096);
        let passed = file::memfd(c"passed").unwrap();
        let at = 4096 - RECEIPT_BYTES;
        send_with_receipt(&near, b"12345678", Some(passed.as_fd()), &receipts, at).unwrap();
        assert_eq!(count(&other.unwrap(), at), 8);
        let mut bytes = [0; 9];
        let (length, came) = net::recv_with_fd(&far, &mut bytes, 0).unwrap();
        assert_eq!(&bytes[..length], b"12345678");
        assert_eq!(file::status(came.one().unwrap()).unwrap(), file::status(&passed).unwrap());
        // Without one: it needs none.
        send_with_receipt(&near, b"9", None, &receipts, 0).unwrap();
        assert!(matches!(net::recv_with_fd(&far, &mut bytes, 0), Ok((1, net::Passed::Nothing))));
        assert_eq!(count(&receipts, 0), 1);
    }

    #[test]
    fn what_is_not_sent_has_none() {
        let (near, far) = net::socketpair_stream().unwrap();
        let receipts = receipts();
        let error = loop {
            receipts.store(RECEIPT_COUNT, 0, Ordering::Release);
            if let Err(error) = send_with_receipt(&near, &[0; 4096], None, &receipts, 0) {
                break error;
            }
            assert_eq!(count(&receipts, 0), 4096);
        };
        assert_eq!((error.kind(), count(&receipts, 0)), (ErrorKind::WouldBlock, 0));
        drop(far);
        let error = send_with_receipt(&near, b"x", None, &receipts, 0).unwrap_err();
        assert_eq!((error.kind(), count(&receipts, 0)), (ErrorKind::BrokenPipe, 0));
    }

    #[test]
    fn a_receipt_outside_or_askew_panics() {
        let (near, _far) = net::socketpair_stream().unwrap();
        let receipts = receipts();
        for at in [4, 4096 - RECEIPT_BYTES + 8, u64::MAX - 7] {
            let send = || send_with_receipt(&near, b"x", None, &receipts, at);
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(send)).is_err(), "{at}");
        }
    }
}
