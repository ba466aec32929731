//! What somebody hostile sends over a Unix socket: bytes, cut anywhere, and any descriptors.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use ivsmc_shm::fd::Fd;
use ivsmc_shm::net;
use ivsmc_shm::poll::EventFd;
use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::Input;

/// Descriptors that go along at most.
const MOST: usize = 4;

/// Descriptors to choose from.
#[derive(Debug)]
pub struct Descriptors {
    memory: Fd,
    eventfd: Fd,
    socket: (Fd, Fd),
    file: std::fs::File,
}

impl Descriptors {
    /// `memory` is the region.
    ///
    /// # Panics
    /// If there are no more descriptors.
    #[must_use]
    pub fn new(memory: Fd) -> Self {
        Self {
            memory,
            eventfd: EventFd::new().expect("an eventfd").into_fd(),
            socket: net::socketpair_stream().expect("two sockets"),
            file: std::fs::File::open("/dev/zero").expect("/dev/zero"),
        }
    }

    /// None, or what the input says; `usual` is what an honest one sends here.
    pub fn choose(&self, input: &mut Input<'_>, usual: Usual) -> Vec<BorrowedFd<'_>> {
        let usual = match usual {
            Usual::Nothing => vec![],
            Usual::Memory => vec![self.memory.as_fd()],
            Usual::EventFd => vec![self.eventfd.as_fd()],
        };
        match input.below(16) {
            0..=8 => usual,
            9 => vec![],
            10 => vec![self.memory.as_fd()],
            11 => vec![self.eventfd.as_fd()],
            12 => vec![self.socket.0.as_fd()],
            13 => vec![self.file.as_fd()],
            count => vec![self.eventfd.as_fd(); 2 + count % 3],
        }
    }
}

/// What an honest one sends along.
#[derive(Clone, Copy, Debug)]
pub enum Usual {
    /// No descriptor.
    Nothing,
    /// The region.
    Memory,
    /// An eventfd.
    EventFd,
}

/// Sends, in one piece or in two that the input cuts; who is gone hears nothing.
pub fn send(socket: &Fd, input: &mut Input<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    if input.below(8) > 0 {
        return push(socket, bytes, fds);
    }
    let (first, second) = bytes.split_at(input.below(256).min(bytes.len()));
    push(socket, first, fds);
    let again = if input.flip() { fds } else { &[] };
    push(socket, second, again);
}

/// Sends `bytes` and `fds` at once.
pub fn push(socket: &Fd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds[..fds.len().min(MOST)]));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    // The other end may be gone, or its buffer full.
    let _ = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags);
}
