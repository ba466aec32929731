//! What one client still has to be told, in order, as a few small values.
//!
//! An id is told once: its eventfds stay what they are, whoever holds it (`ids.rs`). Descriptors are
//! looked up only at the moment they are sent, and of an id that joined and left unheard nothing
//! is said. So a client that does not read costs a bounded amount of memory however many others come
//! and go, and a bounded number of descriptors in flight: see [`Outbox::window`].

use std::collections::{BTreeSet, VecDeque};

use ivsmc_proto::ivshmem::{self, ServerMessage};

/// Messages a client may leave unread, whatever their kind.
const MAX_WINDOW: u16 = 4;

/// One entry of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Note {
    /// The protocol's version.
    Version,
    /// The client's own id.
    OwnId,
    /// The shared memory.
    Region,
    /// The eventfds of this id, one message each; of the client itself: those to receive on.
    Vectors(u16),
}

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) note: Note,
    /// Of a note of several messages, which; else 0.
    pub(super) vector: u16,
}

impl Step {
    /// What must follow, if something must.
    pub(super) fn next(self, vectors: u16) -> Option<Step> {
        let first = |note| Some(Step { note, vector: 0 });
        match self.note {
            Note::Version => first(Note::OwnId),
            Note::OwnId => first(Note::Region),
            Note::Region => None,
            Note::Vectors(_) => {
                let vector = self.vector + 1;
                (vector < vectors).then_some(Step { vector, ..self })
            }
        }
    }

    /// What the client with the id `own` is sent.
    pub(super) fn message(self, own: u16, vectors: u16) -> Option<ServerMessage> {
        let welcome = |index| ivshmem::welcome(own, 0, []).nth(index);
        match self.note {
            Note::Version => welcome(0),
            Note::OwnId => welcome(1),
            Note::Region => welcome(2),
            Note::Vectors(id) => ivshmem::newcomer(id, vectors).nth(usize::from(self.vector)),
        }
    }
}

/// The messages for one client that are not sent yet.
#[derive(Debug)]
pub(super) struct Outbox {
    notes: VecDeque<Note>,
    /// Ids that were told, or stand in `notes`.
    known: BTreeSet<u16>,
    /// Of every client, 1..=[`ivshmem::MAX_VECTORS`].
    vectors: u16,
    /// The next vector to send, 0..vectors, if the front note is [`Note::Vectors`]; else 0.
    next_vector: u16,
    /// Upper bound of the messages sent and not read, 0..=window.
    unread: u16,
}

impl Outbox {
    /// The welcome of the newcomer `own`, to whom `others` are there already.
    pub(super) fn new(own: u16, vectors: u16, others: impl Iterator<Item = u16>) -> Self {
        let begin = Step { note: Note::Version, vector: 0 };
        let mut outbox = Self::resumed(own, vectors, Some(begin), BTreeSet::new(), others);
        outbox.unread = 0;
        outbox
    }

    /// That of the client `own`, who must be told `next` next, knows the ids `told`, and is to know
    /// `others`; how much of it all it has read is not known.
    pub(super) fn resumed(
        own: u16,
        vectors: u16,
        next: Option<Step>,
        told: BTreeSet<u16>,
        others: impl Iterator<Item = u16>,
    ) -> Self {
        let mut outbox = Self {
            notes: VecDeque::new(),
            known: told,
            vectors,
            next_vector: next.map_or(0, |step| step.vector),
            unread: 0,
        };
        let mut begun = next;
        while let Some(Step { note, .. }) = begun {
            outbox.notes.push_back(note);
            if let Note::Vectors(id) = note {
                outbox.known.insert(id);
                break;
            }
            begun = begun.and_then(|step| step.next(vectors));
        }
        others.filter(|&id| id != own).for_each(|id| outbox.joined(id));
        outbox.joined(own);
        outbox.unread = outbox.window();
        outbox
    }

    /// `id` has joined.
    pub(super) fn joined(&mut self, id: u16) {
        if self.known.insert(id) {
            self.notes.push_back(Note::Vectors(id));
        }
    }

    /// `id`, which was there, has left.
    pub(super) fn left(&mut self, id: u16) {
        let Some(at) = self.notes.iter().position(|&note| note == Note::Vectors(id)) else {
            return;
        };
        // Half announced it is announced to the end.
        if at > 0 || self.next_vector == 0 {
            self.notes.remove(at);
            self.known.remove(&id);
        }
    }

    /// The next message, if there is one.
    pub(super) fn next(&self) -> Option<Step> {
        Some(Step { note: *self.notes.front()?, vector: self.next_vector })
    }

    /// The message [`Outbox::next`] gave has been sent.
    pub(super) fn sent(&mut self) {
        self.unread += 1;
        if matches!(self.notes.front(), Some(Note::Vectors(_))) {
            self.next_vector += 1;
            if self.next_vector < self.vectors {
                return;
            }
        }
        self.next_vector = 0;
        self.notes.pop_front();
    }

    /// Messages that may be unread at a time, 2..=[`MAX_WINDOW`].
    ///
    /// Descriptors in flight count against `RLIMIT_NOFILE` of the *user*, over all of its
    /// processes and sockets. One client has at most as many in flight as this process holds open
    /// for it (its socket and its eventfds), so all of them together stay below that limit even if
    /// none of them reads.
    fn window(&self) -> u16 {
        MAX_WINDOW.min(1 + self.vectors)
    }

    /// Whether as many messages may be unread as may be.
    pub(super) fn is_window_full(&self) -> bool {
        self.unread >= self.window()
    }

    /// The client has read all that was sent.
    pub(super) fn all_read(&mut self) {
        self.unread = 0;
    }

    /// Entries that wait; one may stand for several messages.
    pub(super) fn len(&self) -> usize {
        self.notes.len()
    }

    /// Forgets everything: the client is gone.
    pub(super) fn clear(&mut self) {
        self.notes.clear();
        self.next_vector = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ivsmc_proto::ivshmem::Descriptor;

    /// Takes all messages to `own` as `(value, vector)`; -1 for no vector, -2 for the region.
    fn drain_of(own: u16, outbox: &mut Outbox) -> Vec<(i64, i32)> {
        let mut messages = Vec::new();
        while let Some(step) = outbox.next() {
            let message = step.message(own, outbox.vectors).unwrap();
            messages.push((
                message.value,
                match message.descriptor {
                    Descriptor::None => -1,
                    Descriptor::Region => -2,
                    Descriptor::Vector { vector, .. } => i32::from(vector),
                },
            ));
            outbox.sent();
        }
        messages
    }

    fn drain(outbox: &mut Outbox) -> Vec<(i64, i32)> {
        drain_of(7, outbox)
    }

    fn welcomed(own: u16, vectors: u16) -> Outbox {
        let mut outbox = Outbox::new(own, vectors, std::iter::empty());
        drain(&mut outbox);
        outbox
    }

    #[test]
    fn welcome_is_in_the_order_of_the_specification() {
        let mut outbox = Outbox::new(7, 2, [0, 3].into_iter());
        outbox.joined(8);
        outbox.left(0);
        assert_eq!(
            drain(&mut outbox),
            [(0, -1), (7, -1), (-1, -2), (3, 0), (3, 1), (7, 0), (7, 1), (8, 0), (8, 1)]
        );
        assert_eq!(outbox.len(), 0);
    }

    #[test]
    fn who_left_unheard_is_never_mentioned() {
        let mut outbox = welcomed(0, 2);
        outbox.joined(5);
        outbox.left(5);
        assert_eq!(drain(&mut outbox), []);
    }

    #[test]
    fn who_left_half_announced_is_announced_to_the_end_and_once() {
        let mut outbox = welcomed(0, 2);
        outbox.joined(5);
        outbox.joined(6);
        outbox.sent();
        outbox.left(5);
        outbox.joined(5);
        assert_eq!(drain(&mut outbox), [(5, 1), (6, 0), (6, 1)]);
    }

    #[test]
    fn a_reused_id_is_told_once() {
        let mut outbox = welcomed(0, 1);
        outbox.joined(5);
        assert_eq!(drain(&mut outbox), [(5, 0)]);
        outbox.left(5);
        outbox.joined(5);
        outbox.left(5);
        outbox.joined(5);
        assert_eq!(drain(&mut outbox), []);
        // Its own, too, once somebody else has it.
        outbox.joined(0);
        assert_eq!(drain(&mut outbox), []);
    }

    #[test]
    fn memory_stays_bounded_however_many_come_and_go() {
        let mut outbox = Outbox::new(0, 4, std::iter::empty());
        for round in 0..1000 {
            for id in 1..50 {
                outbox.joined(id);
                if round % 3 == 0 && id == 1 {
                    drain(&mut outbox);
                }
            }
            for id in 1..50 {
                outbox.left(id);
            }
        }
        assert!(outbox.len() <= 50, "{} notes", outbox.len());
    }

    #[test]
    fn where_it_was_broken_off_it_goes_on() {
        // All that a client is sent while two leave and two come, broken off after each message.
        let vectors = 2;
        let others = || [0, 3, 9].into_iter();
        let mut whole = Outbox::new(7, vectors, others());
        let mut told = BTreeSet::new();
        let mut begun = whole.next();
        loop {
            let resumed = &mut Outbox::resumed(7, vectors, begun, told.clone(), others());
            let mut rest = Outbox { notes: whole.notes.clone(), known: BTreeSet::new(), ..whole };
            assert_eq!(drain(resumed), drain(&mut rest), "{begun:?}");
            assert_eq!(resumed.known, BTreeSet::from([0, 3, 7, 9]));
            let Some(step) = whole.next() else { break };
            whole.sent();
            begun = step.next(vectors);
            if let (Note::Vectors(id), None) = (step.note, begun) {
                told.insert(id);
            }
        }
        // One that has left while it was told is told to the end; others that left are not.
        let half = Step { note: Note::Vectors(3), vector: 1 };
        let told = BTreeSet::from([0, 7]);
        let mut resumed = Outbox::resumed(7, vectors, Some(half), told, [9].into_iter());
        assert!(resumed.is_window_full());
        assert_eq!(drain(&mut resumed), [(3, 1), (9, 0), (9, 1)]);
    }

    #[test]
    fn the_window_fills_and_empties() {
        for (vectors, window) in [(1, 2), (2, 3), (3, 4), (256, 4)] {
            let mut outbox = Outbox::new(9, vectors, 0..9);
            for _ in 0..window {
                assert!(!outbox.is_window_full());
                outbox.sent();
            }
            assert!(outbox.is_window_full());
            outbox.all_read();
            assert!(!outbox.is_window_full());
        }
    }
}
