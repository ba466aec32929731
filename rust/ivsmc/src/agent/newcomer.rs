//! Who has connected to an agent, until it is a client or is turned away.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use ivsmc_proto::agent::{self, AgentMessage, Welcome, HEADER_LENGTH};
use ivsmc_proto::failpoint::reached;
use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::{net, poll};

use super::client::{Client, Enclosed, Letter};
use super::{Agent, Event, State, Who};
use crate::socket::descriptors_ended;

/// Newcomers that may be about to say what they want; then the oldest goes.
const NEWCOMERS: usize = 64;

impl Agent {
    /// Hears a newcomer, or says why not.
    pub(super) fn greet(
        &self,
        state: &mut State,
        socket: Fd,
        events: &mut Vec<Event>,
    ) -> Result<(), String> {
        let who = match self.access.judge(&socket) {
            Ok(credentials) => Who::from(credentials),
            Err(reason) => {
                refuse(&socket, &reason);
                return Err(reason);
            }
        };
        if state.newcomers.len() >= NEWCOMERS {
            // Who speaks at once, as every client does, never becomes the oldest.
            if let Some((_, oldest)) = state.newcomers.pop_first() {
                let _ = self.serving.epoll().remove(&oldest.socket);
                state.refuse(format!("{} said nothing while others came", oldest.who), events);
            }
        }
        let key = state.next_key;
        state.next_key += 1;
        self.serving
            .epoll()
            .add(&socket, poll::IN, key)
            .map_err(|error| format!("it cannot be watched: {error}"))?;
        state.newcomers.insert(key, Newcomer::new(socket, who, Instant::now() + self.patience));
        // It has spoken already, as a rule.
        self.hear(state, key, events);
        Ok(())
    }

    /// Hears what the newcomer `key` says.
    pub(super) fn hear(&self, state: &mut State, key: u64, events: &mut Vec<Event>) {
        let Some(newcomer) = state.newcomers.get_mut(&key) else { return };
        let said = newcomer.hear();
        if said == Said::Part {
            return;
        }
        let Some(Newcomer { socket, who, .. }) = state.newcomers.remove(&key) else { return };
        let admitted = match said {
            Said::Wrong(reason) => Err(reason),
            Said::Part | Said::Hello => self.admit(state, key, &socket),
        };
        let reason = match admitted {
            Ok(Admitted { slot, vector, outbox }) => {
                state.joined += 1;
                let is_shared = state.vectors.is_shared(key);
                events.push(Event::Joined { who, slot: slot.to_string(), vector, is_shared });
                let since = Instant::now();
                let client = Client { socket, who, since, slot, vector, outbox };
                state.clients.insert(key, client);
                return self.flush_all(state);
            }
            Err(reason) => reason,
        };
        refuse(&socket, &reason);
        let _ = self.serving.epoll().remove(&socket);
        state.refuse(format!("{who}: {reason}"), events);
    }

    /// Gives a newcomer all that a client has, or says why it cannot be.
    fn admit(&self, state: &mut State, key: u64, socket: &Fd) -> Result<Admitted, String> {
        let count = state.clients.len();
        if count >= self.options.max_clients {
            return Err(format!("{count} processes use it, as many as may (max_clients)"));
        }
        // Edge-triggered: one event each time it reads, one when it ends. What it sends is not read.
        self.serving
            .epoll()
            .modify(socket, poll::OUT | poll::ET, key)
            .map_err(|error| format!("it cannot be watched: {error}"))?;
        let (vector, bells) =
            state.vectors.give(&*self.device, key).map_err(|error| descriptors_ended(&error))?;
        reached("agent.wired");
        let Some(slot) = self.slots.claim() else {
            state.vectors.take_back(&*self.device, key);
            let slots = self.slots.region().geometry().slots();
            return Err(format!(
                "all {slots} peer slots of its region are taken; a larger region has more of them"
            ));
        };
        let welcome = Welcome {
            ivposition: self.device.ivposition(),
            vector,
            slot,
            uuid: self.slots.region().uuid(),
            memory: self.device.memory(),
            registers: self.device.registers(),
            can_map_registers: self.device.can_map_registers(),
        };
        let eventfd = |message, eventfd| Letter::new(&message, Enclosed::EventFd(eventfd));
        let welcome = Letter::new(&AgentMessage::Welcome(welcome), Enclosed::Device);
        let outbox = [welcome, eventfd(AgentMessage::Doorbell, bells.doorbell)]
            .into_iter()
            .chain(bells.departures.map(|bell| eventfd(AgentMessage::Departures, bell)))
            .collect();
        Ok(Admitted { slot, vector, outbox })
    }

    /// Sends newcomers away whose time is over.
    pub(super) fn send_away_late(&self, state: &mut State, now: Instant, events: &mut Vec<Event>) {
        // All have the same patience, so the oldest ones are first.
        while let Some(first) = state.newcomers.first_entry() {
            if first.get().until > now {
                return;
            }
            let Newcomer { socket, who, .. } = first.remove();
            let _ = self.serving.epoll().remove(&socket);
            state.refuse(
                format!("{who} has said nothing for {} s", self.patience.as_secs()),
                events,
            );
        }
    }
}

/// What a newcomer is given.
struct Admitted {
    slot: SlotRef,
    vector: u16,
    outbox: VecDeque<Letter>,
}

/// A connected process that has not said what it wants.
#[derive(Debug)]
pub(super) struct Newcomer {
    socket: Fd,
    who: Who,
    /// When its time is over.
    pub(super) until: Instant,
    said: [u8; HEADER_LENGTH],
    /// Bytes of it, 0..=HEADER_LENGTH.
    length: usize,
}

/// What a newcomer has said.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    /// Not all yet.
    Part,
    /// It wants to be a client.
    Hello,
    /// What cannot be: end the connection. The reason is for the log.
    Wrong(String),
}

impl Newcomer {
    fn new(socket: Fd, who: Who, until: Instant) -> Self {
        Self { socket, who, until, said: [0; HEADER_LENGTH], length: 0 }
    }

    /// Hears what it says now.
    fn hear(&mut self) -> Said {
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
fn refuse(socket: &Fd, reason: &str) {
    let refusal = AgentMessage::Refusal(reason.to_owned());
    // Who does not hear it sees the connection end.
    let _ = net::send_with_fd(socket, &refusal.to_bytes(), None);
}
