//! DMBs: buffers that one peer owns and reads, and one other peer writes.
//!
//! The state word in the control block says who holds on to a DMB. It changes only by
//! compare-exchange of the whole word, which names the DMB's generation and its writer:
//!
//! ```text
//!                      invite               attach                detach
//!   idle ------------> held, invited -----> held, attached -----> held, gone
//!    ^                    | release           | release              | release
//!    |<-------------------+                   v                      |
//!    |<------- detach ---- let go, attached   |                      |
//!    |<--------------------------------------------------------------+
//! ```
//!
//! The memory is free only when idle: when both have let go, or the other was reclaimed, dead. So
//! what an attached writer may still write, however long it was paused, reaches nobody else.
//!
//! The word does not name the owner; the extent's does. Whoever acts on an owner's part loads the
//! state word first, then the extent word (again): if that still names the owner, the state word was
//! written under it, and the compare-exchange on it fails if it has changed since.

use core::fmt;

use crate::control::{RING_WORDS, STATE};
use crate::failpoint::reached;
use crate::memory::Memory;
use crate::region::Region;
pub use crate::ring::Place;
use crate::slot::{SlotRef, GENERATION_BITS};

/// Shift of the DMB's generation.
const DMB_SHIFT: u32 = 44;
/// The largest generation of a DMB.
const DMB_GENERATIONS: u64 = (1 << 20) - 1;
/// Bit: the owner holds the DMB.
const HELD: u64 = 1 << 43;
/// Shift of the writer's state.
const WRITER_SHIFT: u32 = 41;
/// Shift of the size class.
const CLASS_SHIFT: u32 = 38;
/// Shift of the writer's slot; its generation is below.
const SLOT_SHIFT: u32 = GENERATION_BITS;
/// Mask of the writer's slot and generation.
const WRITER: u64 = (1 << CLASS_SHIFT) - 1;

/// The state of a writer that there is not.
const NONE: u64 = 0;
/// The state of a writer that may attach.
const INVITED: u64 = 1;
/// The state of a writer that may write.
const ATTACHED: u64 = 2;
/// The state of a writer that has let go before the owner.
const GONE: u64 = 3;

/// How often a change of a state word is tried; by the rules it changes twice meanwhile at most.
const TRIES: usize = 8;

/// The name of a DMB in one generation; travels in CLC messages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Token(pub u64);

impl Token {
    /// The token of `granule` in `generation`.
    fn new(granule: u32, generation: u64) -> Token {
        Token(generation << 32 | u64::from(granule))
    }

    /// The DMB's first granule.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // The low half is the granule.
    pub fn granule(self) -> u32 {
        self.0 as u32
    }

    /// The DMB's generation. A peer's token may hold one that does not exist; no word equals it.
    fn generation(self) -> u64 {
        self.0 >> 32
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.granule(), self.generation())
    }
}

/// Why a DMB cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DmbError {
    /// No DMB of this size can lie there.
    NoSuchPlace,
    /// The extent is not open, or is another's.
    NotTheOwners,
    /// The control block is in use.
    Busy,
    /// The DMB is of another generation, size or writer, or its owner has let go.
    NotInvited,
    /// The caller is no longer live in this region.
    NotLive,
}

impl fmt::Display for DmbError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DmbError::NoSuchPlace => "no DMB of this size can lie at this place of the region",
            DmbError::NotTheOwners => "the DMB is not in an extent of its owner",
            DmbError::Busy => "the control block is still in use",
            DmbError::NotInvited => "the DMB does not expect this writer",
            DmbError::NotLive => "this process was declared dead in the region",
        })
    }
}

impl core::error::Error for DmbError {}

/// What the owner's letting go left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Release {
    /// The DMB is idle: its memory may be used again.
    Free,
    /// The writer is still attached: the memory must rest until [`Region::dmb_is_idle`].
    WriterThere,
}

/// What a state word says of the writer.
fn writer_state(word: u64) -> u64 {
    word >> WRITER_SHIFT & 3
}

/// `word` with another state of the writer.
fn with_writer_state(word: u64, state: u64) -> u64 {
    word & !(3 << WRITER_SHIFT) | state << WRITER_SHIFT
}

/// `word` without the owner: the writer stays only if it is attached.
fn without_owner(word: u64) -> u64 {
    let word = word & !HELD;
    match writer_state(word) {
        ATTACHED => word,
        _ => with_writer_state(word, NONE),
    }
}

/// `word` without the writer, whom an owner that holds on sees gone.
fn without_writer(word: u64) -> u64 {
    with_writer_state(word, if word & HELD != 0 { GONE } else { NONE })
}

/// Whether `word` names `peer` as a writer that may write or is about to.
fn is_writer(word: u64, peer: SlotRef) -> bool {
    word & WRITER == writer_bits(peer) && matches!(writer_state(word), INVITED | ATTACHED)
}

/// The writer as a word has it.
fn writer_bits(writer: SlotRef) -> u64 {
    u64::from(writer.index) << SLOT_SHIFT | u64::from(writer.generation)
}

/// Whether nobody holds on.
fn is_idle(word: u64) -> bool {
    word & HELD == 0 && writer_state(word) != ATTACHED
}

/// What a reclaim did to DMBs.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct DmbsReclaimed {
    /// DMBs that the dead peer owned.
    pub(crate) held: u32,
    /// DMBs that it wrote.
    pub(crate) written: u32,
    /// Whether a word changed too often to be reclaimed.
    pub(crate) unfinished: bool,
}

impl<M: Memory> Region<M> {
    /// Owner: makes a DMB of `size_class` at `granule`, idle and in an extent of its own, and
    /// invites `writer`.
    ///
    /// # Errors
    /// Which of that is not so; nothing was changed.
    pub fn invite_dmb(
        &self,
        granule: u32,
        size_class: u8,
        writer: SlotRef,
    ) -> Result<(Token, Place), DmbError> {
        let place = self.geometry().place(granule, size_class);
        let place = place.ok_or(DmbError::NoSuchPlace)?;
        let extent = self.geometry().extent_of(granule);
        let owner = self.open_extent_owner(extent).ok_or(DmbError::NotTheOwners)?;
        let idle = self.word(place.control + STATE);
        if !is_idle(idle) {
            return Err(DmbError::Busy);
        }
        for word in RING_WORDS {
            // Seen by whoever sees the compare-exchange below.
            self.set_word(place.control + word, 0);
        }
        reached("dmb.cleared");
        // Wraps past zero, so that no token is 0.
        let generation = (idle >> DMB_SHIFT) % DMB_GENERATIONS + 1;
        let word = generation << DMB_SHIFT
            | HELD
            | INVITED << WRITER_SHIFT
            | u64::from(size_class) << CLASS_SHIFT
            | writer_bits(writer);
        if !self.replace(place.control + STATE, idle, word) {
            return Err(DmbError::Busy);
        }
        reached("dmb.invited");
        let token = Token::new(granule, generation);
        // Pairs with the fence in `reclaim`: either it finds the DMB, or we find us dead.
        self.memory().fence();
        if self.is_live(owner) {
            Ok((token, place))
        } else {
            self.release_dmb(token);
            // Who reclaims may have found the extent in use because of this DMB alone. Pairs with
            // the fence in `reclaim`, as in `detach_dmb`.
            self.memory().fence();
            self.free_orphan(extent);
            Err(DmbError::NotLive)
        }
    }

    /// Writer: attaches to the DMB that `owner` named by `token` and `size_class`, numbers of a
    /// peer. Until [`Region::detach_dmb`] its memory stays for the caller, `me`, to write.
    ///
    /// # Errors
    /// What the DMB is not; nothing was changed.
    pub fn attach_dmb(
        &self,
        token: Token,
        size_class: u8,
        me: SlotRef,
        owner: SlotRef,
    ) -> Result<Place, DmbError> {
        let place = self.geometry().place(token.granule(), size_class);
        let place = place.ok_or(DmbError::NoSuchPlace)?;
        let extent = self.geometry().extent_of(token.granule());
        if self.open_extent_owner(extent) != Some(owner) {
            return Err(DmbError::NotTheOwners);
        }
        let invited = self.word(place.control + STATE);
        // Again, after the state word: see the module's words on owners.
        if self.open_extent_owner(extent) != Some(owner) {
            return Err(DmbError::NotTheOwners);
        }
        let expected = token.generation() << DMB_SHIFT
            | HELD
            | INVITED << WRITER_SHIFT
            | u64::from(size_class) << CLASS_SHIFT
            | writer_bits(me);
        let generation = 1..=DMB_GENERATIONS;
        if invited != expected || !generation.contains(&token.generation()) {
            return Err(DmbError::NotInvited);
        }
        let attached = with_writer_state(invited, ATTACHED);
        if !self.replace(place.control + STATE, invited, attached) {
            return Err(DmbError::NotInvited);
        }
        reached("dmb.attached");
        // Pairs with the fence in `reclaim`: either it finds the writer, or we find us dead.
        self.memory().fence();
        if self.is_live(me) {
            Ok(place)
        } else {
            self.detach_dmb(token, me);
            Err(DmbError::NotLive)
        }
    }

    /// Writer: lets go of a DMB that it attached to. Whether it had it. The last writer of an
    /// extent whose owner is dead frees that.
    pub fn detach_dmb(&self, token: Token, me: SlotRef) -> bool {
        let Some(found) = self.change_dmb(token, |word| {
            let attached = is_writer(word, me) && writer_state(word) == ATTACHED;
            attached.then(|| without_writer(word))
        }) else {
            return false;
        };
        reached("dmb.detached");
        if found & HELD == 0 {
            // Pairs with the fence in `reclaim`: of its look at this DMB and ours at the others,
            // the second sees all that is done.
            self.memory().fence();
            self.free_orphan(self.geometry().extent_of(token.granule()));
        }
        true
    }

    /// Owner: lets go of the DMB.
    pub fn release_dmb(&self, token: Token) -> Release {
        let found = self.change_dmb(token, |word| (word & HELD != 0).then(|| without_owner(word)));
        if found.is_some() {
            reached("dmb.released");
        }
        match found.map(writer_state) {
            Some(NONE | INVITED | GONE) => Release::Free,
            // Not held means that somebody broke the word: what it says then decides.
            _ => Release::WriterThere,
        }
    }

    /// Whether nobody holds on to the DMB of this control block. The extent is open.
    ///
    /// # Panics
    /// If there is no such granule.
    pub fn dmb_is_idle(&self, granule: u32) -> bool {
        let granules = self.geometry().granules();
        assert!(granule < granules, "granule {granule} of {granules}");
        is_idle(self.state_word(granule))
    }

    /// Changes the state word of the DMB `token` to what `change` makes of it, if that is
    /// something; what it was.
    fn change_dmb(&self, token: Token, change: impl Fn(u64) -> Option<u64>) -> Option<u64> {
        if token.granule() >= self.geometry().granules() {
            return None;
        }
        // A control block that was never backed by memory must not be touched.
        self.open_extent_owner(self.geometry().extent_of(token.granule()))?;
        for _ in 0..TRIES {
            let word = self.state_word(token.granule());
            if word >> DMB_SHIFT != token.generation() {
                return None;
            }
            if self.replace_state(token.granule(), word, change(word)?) {
                return Some(word);
            }
        }
        None
    }

    /// Takes `dead` out of the DMBs of extent `index`, which `owner` had open.
    pub(crate) fn reclaim_dmbs(&self, index: u32, owner: SlotRef, dead: SlotRef) -> DmbsReclaimed {
        let mut done = DmbsReclaimed::default();
        for granule in self.geometry().granules_of(index) {
            done.unfinished |= !self.reclaim_dmb(granule, owner, dead, &mut done);
        }
        done
    }

    /// Takes `dead` out of one DMB. Whether it is out.
    fn reclaim_dmb(
        &self,
        granule: u32,
        owner: SlotRef,
        dead: SlotRef,
        done: &mut DmbsReclaimed,
    ) -> bool {
        for _ in 0..TRIES {
            let word = self.state_word(granule);
            let writes = is_writer(word, dead);
            let holds = owner == dead && word & HELD != 0;
            if !writes && !holds {
                return true;
            }
            // After the state word: see the module's words on owners.
            if holds && self.extent_owner(self.geometry().extent_of(granule)) != Some(dead) {
                return true;
            }
            let mut new = word;
            if writes {
                new = without_writer(new);
            }
            if holds {
                new = without_owner(new);
            }
            if self.replace_state(granule, word, new) {
                reached("reclaim.dmb");
                done.written += u32::from(writes);
                done.held += u32::from(holds);
                return true;
            }
        }
        false
    }

    /// How many DMBs of extent `index` are held, and how many have a writer attached.
    pub(crate) fn count_dmbs(&self, index: u32) -> (u32, u32) {
        let words = self.geometry().granules_of(index);
        words.map(|granule| self.state_word(granule)).fold((0, 0), |(held, attached), word| {
            (
                held + u32::from(word & HELD != 0),
                attached + u32::from(writer_state(word) == ATTACHED),
            )
        })
    }

    /// The state word of `granule`, which exists.
    fn state_word(&self, granule: u32) -> u64 {
        self.word(self.geometry().control_block(granule) + STATE)
    }

    /// Replaces the state word of `granule` if it is `current`.
    fn replace_state(&self, granule: u32, current: u64, new: u64) -> bool {
        let at = self.geometry().control_block(granule) + STATE;
        self.replace(at, current, new)
    }
}

#[cfg(test)]
mod tests;
