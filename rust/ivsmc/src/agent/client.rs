//! One client of an agent: what it has, and what it still has to be sent.
//!
//! Nothing here waits. What a client has to be sent fits into its socket's buffer even if it does not read.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use ivsmc_proto::agent::AgentMessage;
use ivsmc_proto::failpoint::reached;
use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net;
use ivsmc_shm::poll::EventFd;

use super::status::Who;
use crate::socket::{send, Flushed};

/// A client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) socket: Fd,
    pub(super) who: Who,
    pub(super) since: Instant,
    pub(super) slot: SlotRef,
    pub(super) vector: u16,
    pub(super) outbox: VecDeque<Letter>,
}

/// A message, as far as it is not sent.
#[derive(Debug)]
pub(super) struct Letter {
    /// Of the first byte that is not sent, and all after it.
    rest: Vec<u8>,
    /// Goes along with the first byte.
    enclosed: Option<Enclosed>,
}

/// Which descriptor goes along.
#[derive(Debug)]
pub(super) enum Enclosed {
    Device,
    EventFd(Arc<EventFd>),
}

impl Letter {
    pub(super) fn new(message: &AgentMessage, enclosed: Enclosed) -> Self {
        Self { rest: message.to_bytes(), enclosed: Some(enclosed) }
    }
}

impl Client {
    /// Sends what can be sent now.
    ///
    /// Descriptors in flight count against `RLIMIT_NOFILE` of the user. One client has at most
    /// three, as many as the agent holds open for it, so all together stay below that limit.
    pub(super) fn flush(&mut self, device: BorrowedFd<'_>) -> Flushed {
        while let Some(letter) = self.outbox.front_mut() {
            let enclosed = letter.enclosed.as_ref().map(|enclosed| match enclosed {
                Enclosed::Device => device,
                Enclosed::EventFd(eventfd) => eventfd.as_fd(),
            });
            match send(|| net::send_with_fd(&self.socket, &letter.rest, enclosed)) {
                Ok(sent) => {
                    reached("agent.sent");
                    letter.enclosed = None;
                    letter.rest.drain(..sent);
                    if letter.rest.is_empty() {
                        self.outbox.pop_front();
                    }
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
}
