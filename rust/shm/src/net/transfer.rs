//! Sending and receiving bytes.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

use crate::call;

pub use libc::{MSG_DONTWAIT, MSG_OOB, MSG_PEEK, MSG_TRUNC, MSG_WAITALL};

/// The kernel takes at most this many buffers in one call (`UIO_MAXIOV`).
const MAX_BUFFERS: usize = 1024;

/// Receives bytes; the first ones of `into`, as many as returned, are initialised afterwards.
///
/// 0 is the end of the stream (or an empty `into`).
///
/// # Errors
/// Those of `recv`: `WouldBlock`, `Interrupted`, `ConnectionReset`, ...
#[inline]
pub fn recv(fd: impl AsFd, into: &mut [MaybeUninit<u8>], flags: i32) -> io::Result<usize> {
    if flags & MSG_TRUNC != 0 {
        // For TCP this flag throws bytes away instead of storing them, and counts them all the
        // same; the promise about `into` holds nevertheless.
        into.fill(MaybeUninit::new(0));
    }
    // SAFETY: recv writes at most the given number of bytes into an exclusively borrowed slice, for
    // which any bytes are valid.
    let got =
        unsafe { libc::recv(fd.as_fd().as_raw_fd(), into.as_mut_ptr().cast(), into.len(), flags) };
    // With MSG_TRUNC the kernel may count more bytes than there was room for.
    Ok(call::check_count(got)?.min(into.len()))
}

/// As [`recv`], into bytes that are initialised already.
///
/// # Errors
/// As [`recv`].
#[inline]
pub fn recv_bytes(fd: impl AsFd, into: &mut [u8], flags: i32) -> io::Result<usize> {
    // SAFETY: as in `recv`; the kernel stores initialised bytes only.
    let got =
        unsafe { libc::recv(fd.as_fd().as_raw_fd(), into.as_mut_ptr().cast(), into.len(), flags) };
    // With MSG_TRUNC the kernel may count more bytes than there was room for.
    Ok(call::check_count(got)?.min(into.len()))
}

/// Sends bytes; returns how many the kernel took.
///
/// # Errors
/// Those of `send`: `WouldBlock`, `Interrupted`, `BrokenPipe` (without SIGPIPE), ...
#[inline]
pub fn send(fd: impl AsFd, from: &[u8], flags: i32) -> io::Result<usize> {
    // SAFETY: send reads the given number of bytes of a borrowed slice.
    let sent = unsafe {
        libc::send(
            fd.as_fd().as_raw_fd(),
            from.as_ptr().cast(),
            from.len(),
            flags | libc::MSG_NOSIGNAL,
        )
    };
    call::check_count(sent)
}

/// Receives bytes into several buffers, in order; of more than 1024 buffers, into the first 1024.
///
/// # Errors
/// As [`recv`].
pub fn recv_vectored(fd: impl AsFd, into: &mut [IoSliceMut<'_>], flags: i32) -> io::Result<usize> {
    let mut message = empty_message();
    message.msg_iov = into.as_mut_ptr().cast();
    message.msg_iovlen = into.len().min(MAX_BUFFERS) as _;
    // SAFETY: recvmsg writes into the buffers of `msg_iov`: `IoSliceMut` is defined to have the
    // layout of `iovec`, and every buffer is exclusively borrowed. It asks for no address and no
    // control data.
    call::check_count(unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &raw mut message, flags) })
}

/// Sends the bytes of several buffers, in order; of more than 1024 buffers, of the first 1024.
///
/// # Errors
/// As [`send`].
pub fn send_vectored(fd: impl AsFd, from: &[IoSlice<'_>], flags: i32) -> io::Result<usize> {
    let mut message = empty_message();
    message.msg_iov = from.as_ptr().cast_mut().cast();
    message.msg_iovlen = from.len().min(MAX_BUFFERS) as _;
    let flags = flags | libc::MSG_NOSIGNAL;
    // SAFETY: sendmsg only reads the buffers of `msg_iov`: `IoSlice` is defined to have the layout
    // of `iovec`, and every buffer is borrowed. It sends to no address and has no control data.
    call::check_count(unsafe { libc::sendmsg(fd.as_fd().as_raw_fd(), &raw const message, flags) })
}

/// A message header that names nothing yet.
pub(super) fn empty_message() -> libc::msghdr {
    // SAFETY: `msghdr` is integers, padding and pointers, for which all zeros are valid.
    unsafe { MaybeUninit::zeroed().assume_init() }
}
