//! One client of the ivshmem server, and what it is sent.
//!
//! Nothing here waits: a client that does not read is behind, and that is its own affair. What a
//! client sends is never read; it may fill its own socket's buffer.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use ivsmc_proto::failpoint::reached;
use ivsmc_proto::ivshmem::Descriptor;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net::{self, Credentials};
use ivsmc_shm::poll::EventFd;

use super::ledger::Ledger;
use super::outbox::Outbox;
use crate::socket::{send, Flushed};

/// The eventfds of every id that was given out, whether or not somebody has it now: one for each
/// vector, to receive on and to send on.
pub(super) type EventFds = BTreeMap<u16, Vec<EventFd>>;

/// A socket's account of unread messages below this is none at all: an unread message counts with
/// the kernel's own overhead (several hundred bytes), and one that is just being read with 1.
const NOTHING_UNREAD: usize = 256;

/// A connected client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) socket: Fd,
    /// Who connected, as the kernel says; absent if it does not.
    pub(super) credentials: Option<Credentials>,
    pub(super) since: Instant,
    pub(super) outbox: Outbox,
    /// Tells this client apart from others that had its id before.
    pub(super) serial: u64,
}

impl Client {
    /// Sends the client `id` what may be sent now, noted in `ledger`.
    pub(super) fn flush(
        &mut self,
        id: u16,
        region: BorrowedFd<'_>,
        eventfds: &EventFds,
        ledger: &Ledger,
    ) -> Flushed {
        let vectors = ledger.head().vectors;
        while let Some(step) = self.outbox.next() {
            let Some(message) = step.message(id, vectors) else { break };
            if self.outbox.is_window_full() {
                if !self.has_read_all() {
                    return Flushed::Done;
                }
                self.outbox.all_read();
            }
            let descriptor = match message.descriptor {
                Descriptor::None => None,
                Descriptor::Region => Some(region),
                Descriptor::Vector { peer, vector } => {
                    // There is one: an id that was given out once keeps them.
                    eventfds
                        .get(&peer)
                        .and_then(|all| all.get(usize::from(vector)))
                        .map(EventFd::as_fd)
                }
            };
            let bytes = message.to_bytes();
            let (receipts, at) = ledger.receipt(id);
            ledger.sending(id, step);
            match send(|| net::send_with_receipt(&self.socket, &bytes, descriptor, receipts, at)) {
                Ok(()) => {
                    reached("server.sent");
                    ledger.sent(id, step);
                    self.outbox.sent();
                }
                Err(flushed) => {
                    if flushed == Flushed::Ended {
                        self.outbox.clear();
                    }
                    return flushed;
                }
            }
        }
        Flushed::Done
    }

    fn has_read_all(&self) -> bool {
        net::unsent_bytes(&self.socket).is_ok_and(|unread| unread < NOTHING_UNREAD)
    }
}
