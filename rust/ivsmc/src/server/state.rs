//! What changes while an ivshmem server serves.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use ivsmc_shm::errno;
use ivsmc_shm::fd::Fd;

use super::client::{Client, EventFds};
use super::holder::{Holder, Name};
use super::ids::Ids;
use super::ledger::Ledger;
use super::Event;
use crate::socket::Retry;

/// What changes while serving.
#[derive(Debug)]
pub(super) struct State {
    pub(super) clients: BTreeMap<u16, Client>,
    /// Of those ids, and of all that were given out before.
    pub(super) eventfds: EventFds,
    /// Of ids that nobody was given, because the holder took no more than these.
    pub(super) begun: EventFds,
    pub(super) ids: Ids,
    /// Ids of clients that may live, and whose end nobody sees.
    pub(super) lost: BTreeSet<u16>,
    pub(super) ledger: Ledger,
    pub(super) holder: Option<Holder>,
    /// Whose connections are kept already, by serial: they wait to be taken in.
    pub(super) newcomers: Vec<(u64, Fd)>,
    /// Of the next client, from 1; no two of which anything is kept have the same. The key of a
    /// client in the epoll is `serial << 16 | id`, so of no other descriptor.
    pub(super) next_serial: u64,
    /// Not told yet.
    pub(super) events: Vec<Event>,
    pub(super) retry: Retry,
    pub(super) joined: u64,
    pub(super) left: u64,
    pub(super) refused: u64,
}

impl State {
    pub(super) fn next_look(&self) -> Option<Instant> {
        let is_waiting = !self.events.is_empty() || !self.newcomers.is_empty();
        let now = is_waiting.then(Instant::now);
        self.retry.at().into_iter().chain(now).min()
    }

    pub(super) fn refuse(&mut self, reason: String, events: &mut Vec<Event>) {
        self.refused += 1;
        events.push(Event::Refused { reason });
    }

    /// Has the holder keep `fd`, if there is one, or says why it does not.
    pub(super) fn keep(
        &mut self,
        name: Name,
        fd: impl AsFd,
        events: &mut Vec<Event>,
    ) -> Result<(), String> {
        let Some(holder) = &mut self.holder else { return Ok(()) };
        let kept = holder.keep(name, fd);
        self.judge_holder(kept, events).map_err(|error| format!("it cannot be kept: {error}"))
    }

    /// Has the holder no longer keep what it keeps as `name`.
    pub(super) fn forget(&mut self, name: Name, events: &mut Vec<Event>) {
        let Some(holder) = &mut self.holder else { return };
        let dropped = holder.drop(name);
        // At worst it keeps a connection that has ended, and the next one has it dropped.
        let _ = self.judge_holder(dropped, events);
    }

    /// Does without the holder, if it is gone.
    fn judge_holder(&mut self, said: io::Result<()>, events: &mut Vec<Event>) -> io::Result<()> {
        match said {
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(errno::ECONNREFUSED | errno::ENOTCONN | errno::EPIPE)
                ) =>
            {
                self.holder = None;
                events.push(Event::Unheld { reason: error.to_string() });
                Ok(())
            }
            said => said,
        }
    }
}
