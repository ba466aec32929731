//! What must hold at every change of the shared memory, judged by who really lives.
//!
//! * Only an owner that is dead, or leaves, is marked dead.
//! * Who writes bytes into a DMB, or its cursors, is its attached writer; and only that writer, or its
//!   death, ends the attachment. So a DMB has one writer, ever, also one that was silent for long.
//! * A DMB is made of memory that nobody else has: neither an owner who lives nor a writer who lives.
//! * An extent, a listener or an intent of one who lives is changed by nobody else, but as the protocol
//!   has it.
//!
//! Words are read as `PROTOCOL.md` has them and not by the code under test.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::rc::Rc;

use ivsmc_proto::control::{
    CONSUMED, PRODUCED, READER_FLAGS, SIZE as CONTROL, STATE, WRITER_FLAGS,
};
use ivsmc_proto::layout::{Geometry, GRANULE, MAX_SIZE_CLASS, PAGE};
use ivsmc_proto::slot::SlotRef;

use crate::memory::Words;

/// One process, as it really is.
pub(crate) struct Life {
    pub(crate) pid: usize,
    /// It may still run, if only after a long silence.
    pub(crate) alive: Cell<bool>,
    /// It has stopped using what it has in the region.
    pub(crate) leaving: Cell<bool>,
}

impl Life {
    /// Whether it may still use what it has.
    pub(crate) fn lives(&self) -> bool {
        self.alive.get() && !self.leaving.get()
    }
}

/// What a state word of a DMB says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct State {
    pub(crate) generation: u64,
    pub(crate) held: bool,
    /// 0 none, 1 invited, 2 attached, 3 gone.
    writer_state: u64,
    class: u8,
    writer: SlotRef,
}

impl State {
    fn of(word: u64) -> State {
        State {
            generation: word >> 44,
            held: word >> 43 & 1 == 1,
            writer_state: word >> 41 & 3,
            class: u8::try_from(word >> 38 & 7).unwrap(),
            writer: SlotRef {
                index: u16::try_from(word >> 26 & 0xfff).unwrap(),
                generation: u32::try_from(word & ((1 << 26) - 1)).unwrap(),
            },
        }
    }

    fn is_idle(self) -> bool {
        !self.held && self.writer_state != 2
    }

    /// The attached writer.
    pub(crate) fn attached(self) -> Option<SlotRef> {
        (self.writer_state == 2).then_some(self.writer)
    }
}

/// The judge, and what it knows.
pub(crate) struct Law {
    geometry: Geometry,
    claims: Range<u64>,
    directory: Range<u64>,
    intents: Range<u64>,
    extents: Range<u64>,
    controls: Range<u64>,
    data: u64,
    /// Who each slot in each generation is.
    owners: RefCell<HashMap<SlotRef, Rc<Life>>>,
    /// Owners of directory entries and intents, by their words.
    entries: RefCell<HashMap<u64, Rc<Life>>>,
    /// For whom the next slot is claimed, if not for who claims it.
    pub(crate) claiming_for: RefCell<Option<Rc<Life>>>,
    /// What the next deaths are proved by, for the statistics.
    pub(crate) proof: Cell<&'static str>,
    /// How many slots were marked dead by what proof.
    pub(crate) deaths: RefCell<BTreeMap<&'static str, u32>>,
    /// Changes judged.
    pub(crate) changes: Cell<u64>,
}

impl Law {
    pub(crate) fn new(len: u64) -> Law {
        let geometry = Geometry::of(len).unwrap();
        let slots = u64::from(geometry.slots());
        let claims = PAGE..PAGE + slots * 256;
        let directory = claims.end + slots * 1024..claims.end + slots * (1024 + 4 * 8);
        let intents = directory.end + 4 * slots * 64..directory.end + 4 * slots * (64 + 128);
        let extents = intents.end..intents.end + u64::from(geometry.extents()) * 8;
        let (first, data) = geometry.extent_ranges(0);
        let (last, _) = geometry.extent_ranges(geometry.extents() - 1);
        assert_eq!(first.start, extents.end.next_multiple_of(PAGE), "not as in PROTOCOL.md");
        Law {
            geometry,
            claims,
            directory,
            intents,
            extents,
            controls: first.start..last.end,
            data: data.start,
            owners: RefCell::default(),
            entries: RefCell::default(),
            claiming_for: RefCell::default(),
            proof: Cell::new("other"),
            deaths: RefCell::default(),
            changes: Cell::new(0),
        }
    }

    /// Whether the owner of `at` may still use what it has.
    pub(crate) fn lives(&self, at: SlotRef) -> bool {
        self.owners.borrow().get(&at).is_some_and(|life| life.lives())
    }

    fn is(&self, at: SlotRef, life: &Rc<Life>) -> bool {
        self.owners.borrow().get(&at).is_some_and(|owner| Rc::ptr_eq(owner, life))
    }

    /// Judges that `actor` changes the word at `at`.
    pub(crate) fn judge(&self, words: &Words, actor: &Rc<Life>, at: u64, old: u64, new: u64) {
        self.changes.set(self.changes.get() + 1);
        assert!(actor.alive.get(), "the dead write");
        if self.claims.contains(&at) {
            if (at - self.claims.start) % 256 == 0 {
                self.judge_claim(actor, at, old, new);
            }
        } else if self.directory.contains(&at) {
            self.judge_entry(actor, at, old >> 62 == 0, "listener");
        } else if self.intents.contains(&at) {
            if (at - self.intents.start) % 128 == 0 {
                self.judge_intent(actor, at, old >> 61, new >> 61);
            }
        } else if self.extents.contains(&at) {
            self.judge_extent(words, actor, at, old, new);
        } else if self.controls.contains(&at) {
            let granule = u32::try_from((at - self.controls.start) / CONTROL).unwrap();
            match (at - self.controls.start) % CONTROL {
                STATE => self.judge_state(words, actor, granule, State::of(old), State::of(new)),
                word => self.judge_ring(words, actor, granule, word, new),
            }
        }
    }

    fn judge_claim(&self, actor: &Rc<Life>, at: u64, old: u64, new: u64) {
        let index = u16::try_from((at - self.claims.start) / 256).unwrap();
        let slot = |word: u64| SlotRef { index, generation: u32::try_from(word >> 38).unwrap() };
        match (old >> 32 & 3, new >> 32 & 3) {
            (0, 1) => {
                assert_eq!(slot(new).generation, slot(old).generation + 1);
                let life = self.claiming_for.take().unwrap_or_else(|| actor.clone());
                self.owners.borrow_mut().insert(slot(new), life);
            }
            (1, 2) => {
                assert!(!self.lives(slot(old)), "{} lives and was declared dead", slot(old));
                *self.deaths.borrow_mut().entry(self.proof.get()).or_default() += 1;
            }
            (2, 0) => {}
            other => panic!("a slot goes from {} to {}", other.0, other.1),
        }
    }

    /// A listener's entry, or an intent's: of its owner, while that lives.
    fn judge_entry(&self, actor: &Rc<Life>, at: u64, was_free: bool, what: &str) {
        if was_free {
            self.entries.borrow_mut().insert(at, actor.clone());
            return;
        }
        let entries = self.entries.borrow();
        let owner = entries.get(&at).expect("an owner");
        assert!(Rc::ptr_eq(owner, actor) || !owner.lives(), "a {what} of one who lives is changed");
    }

    fn judge_intent(&self, actor: &Rc<Life>, at: u64, old: u64, new: u64) {
        match (old, new) {
            // The acceptor's part, and that of whoever needs the entry.
            (3, 4) | (4, 6) | (7, 0) => {}
            (0 | 7, 1) => drop(self.entries.borrow_mut().insert(at, actor.clone())),
            _ => self.judge_entry(actor, at, false, "connection"),
        }
    }

    fn owner_in(word: u64) -> Option<SlotRef> {
        (word & 1 == 1).then(|| SlotRef {
            index: u16::try_from(word >> 1 & 0xfff).unwrap(),
            generation: u32::try_from(word >> 13 & ((1 << 26) - 1)).unwrap(),
        })
    }

    fn judge_extent(&self, words: &Words, actor: &Rc<Life>, at: u64, old: u64, new: u64) {
        let extent = u32::try_from((at - self.extents.start) / 8).unwrap();
        let per_extent = self.geometry.granules_per_extent();
        if old == 0 || new == 0 {
            for granule in extent * per_extent..(extent + 1) * per_extent {
                let state = self.state(words, granule);
                assert!(state.is_idle(), "extent {extent} changes hands, DMB {granule}: {state:?}");
            }
        }
        match (Law::owner_in(old), Law::owner_in(new)) {
            (None, Some(owner)) => assert!(self.is(owner, actor), "claimed for another"),
            (Some(owner), None) => {
                assert!(self.is(owner, actor) || !self.lives(owner), "an extent of one who lives");
            }
            (Some(owner), Some(same)) if owner == same => assert!(self.is(owner, actor)),
            other => panic!("an extent goes from one to another: {other:?}"),
        }
    }

    fn judge_state(&self, words: &Words, actor: &Rc<Life>, granule: u32, old: State, new: State) {
        let extent =
            self.extents.start + u64::from(granule / self.geometry.granules_per_extent()) * 8;
        let owner = Law::owner_in(words.get(extent)).expect("a DMB is in an extent of somebody");
        let is_owner = self.is(owner, actor);
        if let Some(writer) = old.attached().filter(|_| new.attached() != old.attached()) {
            let ends = self.is(writer, actor) || !self.lives(writer);
            assert!(ends, "the place of {writer}, who lives, was taken away: DMB {granule}");
        }
        if old.held && !new.held {
            assert!(is_owner || !self.lives(owner), "the DMB of one who lives was let go");
        }
        if !old.held && new.held {
            assert!(old.is_idle() && is_owner, "DMB {granule} was made of {old:?}");
            assert_eq!((new.generation, new.writer_state), (old.generation + 1, 1));
            let other = self.overlapping(words, granule, new.class);
            assert_eq!(other, None, "DMB {granule} lies in another");
        }
        if new.writer_state == 2 && old.writer_state != 2 {
            assert!(self.is(new.writer, actor), "attached in another's name");
            assert!(old == State { writer_state: 1, ..new } && old.held, "not invited: {old:?}");
        }
    }

    /// A DMB in use that shares a granule with one of `class` at `granule`.
    fn overlapping(&self, words: &Words, granule: u32, class: u8) -> Option<u32> {
        let bases = |of: u32| (0..=MAX_SIZE_CLASS).map(move |class| (of >> class << class, class));
        (granule..granule + (1 << class)).flat_map(bases).find_map(|(base, least)| {
            let state = self.state(words, base);
            (base != granule && !state.is_idle() && state.class >= least).then_some(base)
        })
    }

    fn judge_ring(&self, words: &Words, actor: &Rc<Life>, granule: u32, word: u64, new: u64) {
        let state = self.state(words, granule);
        let extent =
            self.extents.start + u64::from(granule / self.geometry.granules_per_extent()) * 8;
        let is_owner = Law::owner_in(words.get(extent)).is_some_and(|owner| self.is(owner, actor));
        let is_writer = state.attached().is_some_and(|writer| self.is(writer, actor));
        let may = match word {
            _ if state.is_idle() => is_owner && new == 0,
            PRODUCED | WRITER_FLAGS => is_writer,
            CONSUMED | READER_FLAGS => is_owner && state.held,
            _ => is_writer || is_owner && state.held,
        };
        assert!(may, "word {word} of DMB {granule} is not {}'s: {state:?}", actor.pid);
    }

    /// Judges that `actor` writes bytes at `at`.
    pub(crate) fn judge_bytes(&self, words: &Words, actor: &Rc<Life>, at: u64) {
        self.changes.set(self.changes.get() + 1);
        assert!(actor.alive.get(), "the dead write");
        let granule = u32::try_from((at - self.data) / GRANULE).unwrap();
        let writers = (0..=MAX_SIZE_CLASS).map(|class| (granule >> class << class, class));
        let mut writers: Vec<SlotRef> = writers
            .filter_map(|(base, least)| {
                self.state(words, base)
                    .attached()
                    .filter(|_| self.state(words, base).class >= least)
            })
            .collect();
        writers.dedup();
        assert_eq!(writers.len(), 1, "granule {granule} has the writers {writers:?}");
        assert!(self.is(writers[0], actor), "two writers: {} and {}", writers[0], actor.pid);
    }

    /// What the state word of `granule` says.
    pub(crate) fn state(&self, words: &Words, granule: u32) -> State {
        State::of(words.get(self.controls.start + u64::from(granule) * CONTROL + STATE))
    }
}
