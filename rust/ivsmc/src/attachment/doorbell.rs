//! The doorbell of an attachment: one for all its sessions.
//!
//! A doorbell says nothing but that it was notified; the summary bits say which sessions it is
//! about (`ivsmc_proto::summary`). Of the threads that sleep on sessions of one attachment, one
//! *leads* and sleeps on the doorbell too, beside its TCP connection:
//!
//! ```text
//!   thread of session 1   polls  connection 1, bell 1, doorbell      leads
//!   thread of session 2   polls  connection 2, bell 2
//!   thread of session 3   polls  connection 3, bell 3
//! ```
//!
//! Whoever drains the doorbell takes all bits and wakes the sessions they stand for; its own it
//! just looks at. A leader that leaves hands the lead to whoever has slept longest, by its bell. What
//! comes while nobody leads stays in the eventfd for the next one. The background thread drains, too,
//! while a readiness descriptor is armed.
//!
//! **A lost doorbell** costs time, never a hang: whoever leads looks at the bits every [`BACKSTOP`].
//! A session found so is asked to be woken over TCP until a doorbell has come through again.
//!
//! **Departures.** The ivshmem server notifies vector 0 when it has marked a leaver. The background
//! thread drains it where it is a vector of its own, else whoever drains the doorbell looks; and the
//! sessions whose peer's slot is no longer live are told.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use ivsmc_proto::ring::Place;
use ivsmc_proto::slot::SlotRef;
use ivsmc_proto::summary;
use ivsmc_shm::poll::{self, EventFd};

use super::{Attachment, OwnDmb};
use crate::device::Doorbells;
use crate::reactor::{lock, Key, Reactor, Source};

/// How often the summary bits are looked at without a doorbell, while somebody sleeps on it.
pub(crate) const BACKSTOP: Duration = Duration::from_millis(500);

/// Whom a doorbell is about: a session.
pub(crate) trait Notified: Send + Sync {
    /// A doorbell came with its bit: all that wait look again. Must not block.
    fn notified(&self);
    /// The slot of its peer is no longer live. Must not block.
    fn departed(&self);
}

/// Counters of the doorbell of an attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DoorbellStats {
    /// The vector on which this process is notified of sessions.
    pub vector: u16,
    /// Times it was drained.
    pub received: u64,
    /// Times the summary bits were found set without it.
    pub lost: u64,
    /// Peers it said have departed.
    pub departures: u64,
}

/// The process's side of the doorbell of an attachment.
pub(super) struct Doorbell {
    table: Mutex<Table>,
    sleepers: Mutex<Sleepers>,
    /// By slot: the generation that a doorbell has come from, 0 for none.
    heard: Box<[AtomicU32]>,
    background: Mutex<Background>,
    received: AtomicU64,
    lost: AtomicU64,
    departures: AtomicU64,
}

/// Who is to be told.
#[derive(Default)]
struct Table {
    /// The DMBs of this process, by their number in the summary.
    dmbs: HashMap<u16, Vec<Entry>>,
    /// The writers of those that are not known to be dead, with how many DMBs they write.
    writers: HashMap<SlotRef, usize>,
}

/// One DMB of this process.
struct Entry {
    granule: u32,
    place: Place,
    writer: SlotRef,
    /// Said in the DMB's control block.
    heard: bool,
    /// Its session, once it has one.
    session: Option<Weak<dyn Notified>>,
}

/// The threads that sleep, by when they began to.
#[derive(Default)]
struct Sleepers {
    next: u64,
    bells: BTreeMap<u64, Arc<EventFd>>,
    leader: Option<u64>,
}

/// What the background thread does.
#[derive(Default)]
struct Background {
    departures: Option<Key>,
    doorbell: Option<Key>,
    /// Readiness descriptors.
    armed: usize,
}

/// What a look at the summary bits found.
#[derive(Clone, Copy, Default)]
struct Found {
    any: bool,
    /// The asking session's own bit.
    own: bool,
}

impl Doorbell {
    pub(super) fn new(slots: u16) -> Self {
        Self {
            table: Mutex::default(),
            sleepers: Mutex::default(),
            heard: (0..slots).map(|_| AtomicU32::new(0)).collect(),
            background: Mutex::default(),
            received: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            departures: AtomicU64::new(0),
        }
    }
}

impl Attachment {
    /// The doorbells of the device, to notify others.
    pub(crate) fn doorbells(&self) -> Option<&dyn Doorbells> {
        self.backing.doorbells()
    }

    /// Counters, if this process can be notified by doorbell.
    pub(crate) fn doorbell_stats(&self) -> Option<DoorbellStats> {
        let doorbell = self.doorbell.as_ref()?;
        let (vector, _) = self.doorbells().and_then(Doorbells::own)?;
        Some(DoorbellStats {
            vector,
            received: doorbell.received.load(Ordering::Relaxed),
            lost: doorbell.lost.load(Ordering::Relaxed),
            departures: doorbell.departures.load(Ordering::Relaxed),
        })
    }

    /// From now on doorbells may be about the DMB at `granule`, which `writer` does not know yet.
    pub(super) fn expect_doorbells(
        &self,
        granule: u32,
        size_class: u8,
        place: Place,
        writer: SlotRef,
    ) {
        let Some(doorbell) = &self.doorbell else { return };
        // Relaxed: what is read of the writer's slot does not depend on it.
        let heard = doorbell
            .heard
            .get(usize::from(writer.index))
            .is_some_and(|generation| generation.load(Ordering::Relaxed) == writer.generation);
        if heard {
            place.set_heard(self.memory());
        }
        let mut table = lock(&doorbell.table);
        *table.writers.entry(writer).or_default() += 1;
        let entry = Entry { granule, place, writer, heard, session: None };
        table.dmbs.entry(summary::number(granule, size_class)).or_default().push(entry);
    }

    /// No doorbell is about the DMB at `granule` any more; its control block is touched no more.
    pub(super) fn expect_no_doorbells(&self, granule: u32, size_class: u8) {
        let Some(doorbell) = &self.doorbell else { return };
        let mut table = lock(&doorbell.table);
        let Table { dmbs, writers } = &mut *table;
        let number = summary::number(granule, size_class);
        let Some(entries) = dmbs.get_mut(&number) else { return };
        let Some(at) = entries.iter().position(|entry| entry.granule == granule) else { return };
        let writer = entries.swap_remove(at).writer;
        if entries.is_empty() {
            dmbs.remove(&number);
        }
        if let Some(count) = writers.get_mut(&writer) {
            *count -= 1;
            if *count == 0 {
                writers.remove(&writer);
            }
        }
    }

    /// The eventfd on which this process is notified of sessions.
    fn own_doorbell(&self) -> Option<&EventFd> {
        self.doorbells().and_then(Doorbells::own).map(|(_, eventfd)| eventfd)
    }

    /// Drains the doorbell, which `came` or may have got lost, and wakes whom it concerns but `own`;
    /// whether it concerns that.
    fn drain_doorbell(&self, own: Option<u32>, came: bool) -> bool {
        let (Some(doorbell), Some(eventfd)) = (&self.doorbell, self.own_doorbell()) else {
            return false;
        };
        // Before the bits are taken: one that is set later has its doorbell still ahead. Who was told
        // of it and finds it empty was overtaken by another that drains, and looks all the same.
        let drained = eventfd.drain().is_ok_and(|count| count > 0);
        if drained {
            doorbell.received.fetch_add(1, Ordering::Relaxed);
        }
        let came = came || drained;
        let found = self.take_summary(doorbell, own, came);
        if found.any && !came {
            doorbell.lost.fetch_add(1, Ordering::Relaxed);
        }
        if came && self.doorbells().and_then(Doorbells::departures).is_none() {
            self.look_for_departures(doorbell);
        }
        found.own
    }

    fn take_summary(&self, doorbell: &Doorbell, own: Option<u32>, came: bool) -> Found {
        let mut found = Found::default();
        // Woken outside the lock: closing a session, which any of them may do, takes it.
        let mut concerned = Vec::new();
        {
            let mut table = lock(&doorbell.table);
            self.region.take_summary(self.me, |number| {
                found.any = true;
                let Some(entries) = table.dmbs.get_mut(&number) else { return };
                let writer = entries[0].writer;
                let is_clear = entries.iter().all(|entry| entry.writer == writer);
                for entry in entries {
                    // Of several writers with one number nobody knows whose it was; what got lost may
                    // have been anybody's.
                    if entry.heard != came && (is_clear || !came) {
                        self.set_heard(doorbell, entry, came);
                    }
                    if Some(entry.granule) == own {
                        found.own = true;
                    } else {
                        concerned.extend(entry.session.as_ref().and_then(Weak::upgrade));
                    }
                }
            });
        }
        for session in concerned {
            session.notified();
        }
        found
    }

    /// Says whether doorbells of the writer of `entry` come through, for this session and for later
    /// ones with the same peer.
    fn set_heard(&self, doorbell: &Doorbell, entry: &mut Entry, heard: bool) {
        entry.heard = heard;
        if heard {
            entry.place.set_heard(self.memory());
        } else {
            entry.place.withdraw_heard(self.memory());
        }
        if let Some(generation) = doorbell.heard.get(usize::from(entry.writer.index)) {
            // Relaxed: a hint; read when a DMB is made.
            generation.store(if heard { entry.writer.generation } else { 0 }, Ordering::Relaxed);
        }
    }

    /// Tells the sessions whose peer's slot is no longer live.
    fn look_for_departures(&self, doorbell: &Doorbell) {
        let mut concerned = Vec::new();
        {
            let mut table = lock(&doorbell.table);
            let Table { dmbs, writers } = &mut *table;
            let before = writers.len();
            writers.retain(|&writer, _| self.region.is_live(writer));
            let departed = before - writers.len();
            if departed == 0 {
                return;
            }
            doorbell.departures.fetch_add(departed as u64, Ordering::Relaxed);
            for entry in dmbs.values().flatten() {
                if !writers.contains_key(&entry.writer) {
                    concerned.extend(entry.session.as_ref().and_then(Weak::upgrade));
                }
            }
        }
        for session in concerned {
            session.departed();
        }
    }

    /// Has the background thread drain the vector of departures.
    pub(super) fn watch_departures(self: &Arc<Self>, reactor: &Arc<Reactor>) -> crate::Result<()> {
        let Some(doorbell) = &self.doorbell else { return Ok(()) };
        let Some(eventfd) = self.doorbells().and_then(Doorbells::departures) else { return Ok(()) };
        let key = reactor.register(Arc::new(Departures(Arc::downgrade(self))));
        lock(&doorbell.background).departures = Some(key);
        reactor.watch(key, eventfd, poll::IN | poll::ET)
    }

    /// Has the background thread drain the doorbell as long as the result lives; `None` if there is
    /// no doorbell.
    pub(crate) fn arm_doorbell(self: &Arc<Self>) -> Option<Armed> {
        let (doorbell, eventfd) = (self.doorbell.as_ref()?, self.own_doorbell()?);
        let reactor = self.reactor.get()?.upgrade()?;
        let mut background = lock(&doorbell.background);
        if background.armed == 0 {
            let listener = Arc::new(Listener {
                attachment: Arc::downgrade(self),
                key: OnceLock::new(),
                received: AtomicU64::new(0),
            });
            let key = reactor.register(Arc::clone(&listener) as Arc<dyn Source>);
            let _ = listener.key.set(key);
            // Without it the back-stop is all there is: slow, and still right.
            let _ = reactor.watch(key, eventfd, poll::IN | poll::ET);
            reactor.at(Instant::now() + BACKSTOP, key);
            background.doorbell = Some(key);
        }
        background.armed += 1;
        drop(background);
        Some(Armed(Arc::clone(self)))
    }

    /// Takes the doorbell away from the background thread. An eventfd that others have, too, is
    /// not forgotten by being closed.
    pub(super) fn unwatch_doorbell(&self) {
        let Some(doorbell) = &self.doorbell else { return };
        let (departures, listener) = {
            let mut background = lock(&doorbell.background);
            (background.departures.take(), background.doorbell.take())
        };
        let Some(reactor) = self.reactor.get().and_then(Weak::upgrade) else { return };
        let watched = [
            (departures, self.doorbells().and_then(Doorbells::departures)),
            (listener, self.own_doorbell()),
        ];
        for (key, eventfd) in watched {
            if let (Some(key), Some(eventfd)) = (key, eventfd) {
                reactor.unwatch(eventfd);
                reactor.forget(key);
            }
        }
    }
}

/// Keeps the background thread listening to the doorbell.
pub(crate) struct Armed(Arc<Attachment>);

impl Drop for Armed {
    fn drop(&mut self) {
        if !self.0.is_current() {
            return;
        }
        let Some(doorbell) = &self.0.doorbell else { return };
        let key = {
            let mut background = lock(&doorbell.background);
            background.armed -= 1;
            if background.armed > 0 {
                return;
            }
            // Under the lock: the next one adds it anew.
            let key = background.doorbell.take();
            if let (Some(_), Some(reactor), Some(eventfd)) =
                (key, self.0.reactor.get().and_then(Weak::upgrade), self.0.own_doorbell())
            {
                reactor.unwatch(eventfd);
            }
            key
        };
        if let (Some(key), Some(reactor)) = (key, self.0.reactor.get().and_then(Weak::upgrade)) {
            reactor.forget(key);
        }
    }
}

/// The background thread's ear on the doorbell.
struct Listener {
    attachment: Weak<Attachment>,
    key: OnceLock<Key>,
    /// [`DoorbellStats::received`] at the last back-stop.
    received: AtomicU64,
}

impl Source for Listener {
    fn ready(&self, _events: u32) {
        if let Some(attachment) = self.attachment.upgrade() {
            attachment.drain_doorbell(None, true);
        }
    }

    /// The back-stop; it ends with the source.
    fn expired(&self) {
        let Some(attachment) = self.attachment.upgrade() else { return };
        if let Some(doorbell) = &attachment.doorbell {
            let received = doorbell.received.load(Ordering::Relaxed);
            // Whoever drained it since has taken all bits; those that are set now have theirs ahead.
            if self.received.swap(received, Ordering::Relaxed) == received {
                attachment.drain_doorbell(None, false);
            }
        }
        let reactor = attachment.reactor.get().and_then(Weak::upgrade);
        if let (Some(&key), Some(reactor)) = (self.key.get(), reactor) {
            reactor.at(Instant::now() + BACKSTOP, key);
        }
    }
}

/// The background thread's ear on the vector of departures.
struct Departures(Weak<Attachment>);

impl Source for Departures {
    fn ready(&self, _events: u32) {
        let Some(attachment) = self.0.upgrade() else { return };
        if let Some(eventfd) = attachment.doorbells().and_then(Doorbells::departures) {
            // Before the look: what comes later is told anew.
            let _ = eventfd.drain();
        }
        if let Some(doorbell) = &attachment.doorbell {
            attachment.look_for_departures(doorbell);
        }
    }
}

/// What a session needs to sleep on the doorbell of its attachment.
pub(crate) struct Ear {
    attachment: Arc<Attachment>,
    granule: u32,
}

impl OwnDmb {
    /// The doorbell of the process that reads this DMB; `None` if it has none.
    pub(crate) fn ear(&self) -> Option<Ear> {
        self.attachment.doorbell.as_ref()?;
        Some(Ear { attachment: Arc::clone(&self.attachment), granule: self.granule })
    }

    /// Has doorbells about this DMB told to `session`; false if its writer has departed before there
    /// was somebody to tell.
    pub(crate) fn tell(&self, session: Weak<dyn Notified>) -> bool {
        let Some(doorbell) = &self.attachment.doorbell else { return true };
        let number = summary::number(self.granule, self.size_class);
        let writer = {
            let mut table = lock(&doorbell.table);
            let entries = table.dmbs.get_mut(&number);
            let Some(entry) =
                entries.and_then(|entries| entries.iter_mut().find(|e| e.granule == self.granule))
            else {
                return true;
            };
            entry.session = Some(session);
            entry.writer
        };
        self.attachment.region.is_live(writer)
    }
}

impl Ear {
    /// Joins those that sleep; `bell` is rung when this thread is to lead.
    pub(crate) fn enter(&self, bell: &Arc<EventFd>) -> Seat<'_> {
        let mut id = 0;
        if let Some(doorbell) = &self.attachment.doorbell {
            let mut sleepers = lock(&doorbell.sleepers);
            id = sleepers.next;
            sleepers.next += 1;
            sleepers.bells.insert(id, Arc::clone(bell));
            sleepers.leader.get_or_insert(id);
        }
        Seat { ear: self, id }
    }
}

/// A thread's place among those that sleep; leaving it hands the lead on.
pub(crate) struct Seat<'a> {
    ear: &'a Ear,
    id: u64,
}

impl Seat<'_> {
    /// The doorbell, if this thread leads now.
    pub(crate) fn doorbell(&self) -> Option<&EventFd> {
        let doorbell = self.ear.attachment.doorbell.as_ref()?;
        let leads = lock(&doorbell.sleepers).leader == Some(self.id);
        self.ear.attachment.own_doorbell().filter(|_| leads)
    }

    /// The doorbell has something: wakes whom it concerns; whether that is this thread's session.
    pub(crate) fn drain(&self) -> bool {
        self.ear.attachment.drain_doorbell(Some(self.ear.granule), true)
    }

    /// The back-stop: as [`Seat::drain`], where none came for [`BACKSTOP`].
    pub(crate) fn look(&self) -> bool {
        self.ear.attachment.drain_doorbell(Some(self.ear.granule), false)
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let Some(doorbell) = &self.ear.attachment.doorbell else { return };
        let next = {
            let mut sleepers = lock(&doorbell.sleepers);
            sleepers.bells.remove(&self.id);
            if sleepers.leader != Some(self.id) {
                return;
            }
            let next = sleepers.bells.first_key_value().map(|(&id, bell)| (id, Arc::clone(bell)));
            sleepers.leader = next.as_ref().map(|&(id, _)| id);
            next
        };
        if let Some((_, bell)) = next {
            // It may have woken and lent its bell to another by now, who looks in vain. An eventfd
            // refuses only when 2^64 - 1 notifications are pending.
            let _ = bell.notify();
        }
    }
}
