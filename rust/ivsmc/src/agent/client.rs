//! One client of an agent: what it has, and what it still has to be sent.
//!
//! Nothing here waits. What a client has to be sent fits into its socket's buffer even if it does not read.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use ivsmc_proto::agent::{self, AgentMessage, HEADER_LENGTH};
use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net;
use ivsmc_shm::poll::EventFd;

use super::status::Who;
use crate::socket::{send, Flushed};

/// A connected process that has not said what it wants.
#[derive(Debug)]
pub(super) struct Newcomer {
    pub(super) socket: Fd,
    pub(super) who: Who,
    /// When its time is over.
    pub(super) until: Instant,
    said: [u8; HEADER_LENGTH],
    /// Bytes of it, 0..=HEADER_LENGTH.
    length: usize,
}

/// What a newcomer has said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Not all yet.
    Part,
    /// It wants to be a client.
    Hello,
    /// What cannot be: end the connection. The reason is for the log.
    Wrong(String),
}

impl Newcomer {
    pub(super) fn new(socket: Fd, who: Who, until: Instant) -> Self {
        Self { socket, who, until, said: [0; HEADER_LENGTH], length: 0 }
    }

    /// Hears what it says now.
    pub(super) fn hear(&mut self) -> Said {
        loop {
            let rest = &mut self.said[self.length..];
            // Descriptors that come along are closed by the kernel: nothing takes them.
            match net::recv_bytes(&self.socket, rest, net::MSG_DONTWAIT) {
                Ok(0) => return Said::Wrong("it left without a word".into()),
                Ok(count) => self.length += count,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Said::Part,
                    io::ErrorKind::Interrupted => {}
                    _ => return Said::Wrong(error.to_string()),
                },
            }
            if self.length == HEADER_LENGTH {
                return match agent::read_hello(&self.said) {
                    Ok(agent::VERSION) => Said::Hello,
                    Ok(version) => Said::Wrong(format!(
                        "it speaks version {version} of the agent's protocol, this agent speaks \
                         {}; install the same ivsmc for both",
                        agent::VERSION
                    )),
                    Err(invalid) => Said::Wrong(format!("not a client of an agent: {invalid}")),
                };
            }
        }
    }
}

/// Tells a newcomer why it is turned away, if its buffer has room; the connection ends after that.
pub(super) fn refuse(socket: &Fd, reason: &str) {
    let refusal = AgentMessage::Refusal(reason.to_owned());
    // Who does not hear it sees the connection end.
    let _ = net::send_with_fd(socket, &refusal.to_bytes(), None);
}

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
            match send(&self.socket, &letter.rest, enclosed) {
                Ok(sent) => {
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
