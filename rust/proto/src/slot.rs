//! Peer slots: who is attached, and who alone may say that one of them is dead.
//!
//! A slot's claim word is its whole truth: generation, prover, life. It changes only by
//! compare-exchange, in a circle:
//!
//! ```text
//!   Free(g) --claim_slot--> Live(g+1) --mark_dead--> Dead(g+1) --reclaim--> Free(g+1)
//! ```
//!
//! `mark_dead` is for who has proved it ([`Prover`]) and for a peer that leaves; `reclaim`
//! (module `reclaim`) for anybody who sees a dead slot. Words elsewhere name a slot together with
//! its generation ([`SlotRef`]), so they mean one attachment and never its successor.

use core::fmt;

use crate::failpoint::reached;
use crate::layout::WORD;
use crate::memory::Memory;
use crate::region::Region;
use crate::summary;

/// Offset of the claim word in a slot.
const CLAIM: u64 = 0;
/// Offset of the information word.
const INFO: u64 = 64;
/// Offset of the EID, four words.
const EID: u64 = 72;
/// Offset of the summary bits.
const SUMMARY: u64 = 128;

/// Bits of a slot's generation.
pub const GENERATION_BITS: u32 = 26;
/// The largest generation.
const GENERATIONS: u64 = (1 << GENERATION_BITS) - 1;
/// Shift of the generation in a claim word, and in an information word.
const GENERATION_SHIFT: u32 = 38;
/// Shift of the bit of an information word that says that it has an ivposition.
const HAS_IVPOSITION_SHIFT: u32 = 32;
/// Shift of the bit of an information word that says that it has a vector.
const HAS_VECTOR_SHIFT: u32 = 33;
/// Shift of the prover's kind.
const KIND_SHIFT: u32 = 34;
/// Shift of the life.
const LIFE_SHIFT: u32 = 32;
/// The life of a free slot.
const FREE: u64 = 0;
/// The life of a live slot.
const LIVE: u64 = 1;
/// The life of a dead slot.
const DEAD: u64 = 2;

/// One attachment: a slot in one generation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SlotRef {
    /// Number of the slot, below [`crate::layout::Geometry::slots`] if it is one of this region.
    pub index: u16,
    /// Generation, 1..2^26.
    pub generation: u32,
}

impl fmt::Display for SlotRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.index, self.generation)
    }
}

/// Who may say that a slot is dead; module `proof` says by what.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Prover {
    /// Whoever obtains the OFD lock on the slot's byte, on the boot whose id folds to `boot`.
    Lock {
        /// The boot id, folded to 32 bits, with what else tells apart those who see other locks.
        boot: u32,
    },
    /// The ivshmem server that gave this id.
    IvPosition(u16),
    /// The agent that owns the guest's device with this ivposition, and its own provers.
    Agent(u32),
    /// A successor that opened the VFIO group of the device with this ivposition anew, its ivshmem
    /// server, or a later boot of its machine.
    VfioExclusive(u32),
    /// Nobody but an operator.
    None,
}

impl Prover {
    /// Kind and id as the claim word has them.
    fn encode(self) -> (u64, u32) {
        match self {
            Prover::None => (0, 0),
            Prover::Lock { boot } => (1, boot),
            Prover::IvPosition(id) => (2, u32::from(id)),
            Prover::Agent(id) => (3, id),
            Prover::VfioExclusive(id) => (4, id),
        }
    }

    /// The prover of a claim word. A kind that this version does not know proves nothing to it.
    fn decode(kind: u64, id: u32) -> Prover {
        match (kind, u16::try_from(id)) {
            (1, _) => Prover::Lock { boot: id },
            (2, Ok(id)) => Prover::IvPosition(id),
            (3, _) => Prover::Agent(id),
            (4, _) => Prover::VfioExclusive(id),
            _ => Prover::None,
        }
    }
}

/// What a claim word says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotState {
    /// Nobody's.
    Free {
        /// The generation of its last owner; 0 if there was none.
        generation: u32,
    },
    /// Somebody is attached, as far as anyone knows.
    Live {
        /// Who.
        at: SlotRef,
        /// Who may say that it is dead.
        prover: Prover,
    },
    /// Proved dead, not yet reclaimed.
    Dead {
        /// Who.
        at: SlotRef,
        /// Who could say so.
        prover: Prover,
    },
}

impl SlotState {
    /// Whether the slot is nobody's.
    #[must_use]
    pub fn is_free(&self) -> bool {
        matches!(self, SlotState::Free { .. })
    }
}

/// What a peer says about its slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotInfo {
    /// Its device's id at the ivshmem server, if it has one; 0 is an ordinary one.
    pub ivposition: Option<u16>,
    /// The vector on which it is to be notified, if it has doorbells.
    pub vector: Option<u16>,
    /// Its EID, padded with blanks.
    pub eid: [u8; 32],
}

/// The state in the claim word of slot `index`. A life that does not exist is taken for live:
/// nobody may reuse what it might own.
fn decode(index: u16, word: u64) -> SlotState {
    let generation = generation(word);
    let at = SlotRef { index, generation };
    #[allow(clippy::cast_possible_truncation)] // The low 32 bits are the id.
    let prover = Prover::decode(word >> KIND_SHIFT & 0xf, word as u32);
    match word >> LIFE_SHIFT & 3 {
        FREE => SlotState::Free { generation },
        DEAD => SlotState::Dead { at, prover },
        _ => SlotState::Live { at, prover },
    }
}

/// The generation in a claim or information word.
#[allow(clippy::cast_possible_truncation)] // 26 bits are left.
fn generation(word: u64) -> u32 {
    (word >> GENERATION_SHIFT) as u32
}

/// `word` with another life.
fn with_life(word: u64, life: u64) -> u64 {
    word & !(3 << LIFE_SHIFT) | life << LIFE_SHIFT
}

impl<M: Memory> Region<M> {
    /// The state of slot `index`.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn slot_state(&self, index: u16) -> SlotState {
        decode(index, self.word(self.slot_claim_offset(index)))
    }

    /// All slots with their states.
    pub fn slots(&self) -> impl Iterator<Item = (u16, SlotState)> + '_ {
        (0..self.geometry().slots()).map(|index| (index, self.slot_state(index)))
    }

    /// The slots that nobody owns: those to try [`Region::claim_slot`] on.
    pub fn unclaimed(&self) -> impl Iterator<Item = u16> + '_ {
        self.slots().filter_map(|(index, state)| state.is_free().then_some(index))
    }

    /// The slots that somebody owns or that are dead and not reclaimed, with their provers.
    pub fn claimed(&self) -> impl Iterator<Item = (SlotRef, Prover)> + '_ {
        self.slots().filter_map(|(_, state)| match state {
            SlotState::Free { .. } => None,
            SlotState::Live { at, prover } | SlotState::Dead { at, prover } => Some((at, prover)),
        })
    }

    /// Whether every slot is free: nobody is attached, and nobody died without being reclaimed.
    pub fn is_deserted(&self) -> bool {
        self.slots().all(|(_, state)| state.is_free())
    }

    /// Claims slot `index` for the caller if it is free. A caller with [`Prover::Lock`] holds the
    /// lock on the slot's byte already. `None` if the slot is not free.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn claim_slot(&self, index: u16, prover: Prover) -> Option<SlotRef> {
        let claim = self.slot_claim_offset(index);
        let word = self.word(claim);
        if word >> LIFE_SHIFT & 3 != FREE {
            return None;
        }
        // Wraps past zero: a generation is never 0, so an empty word names nobody.
        let next = u64::from(generation(word)) % GENERATIONS + 1;
        let (kind, id) = prover.encode();
        let new =
            next << GENERATION_SHIFT | kind << KIND_SHIFT | LIVE << LIFE_SHIFT | u64::from(id);
        if !self.replace(claim, word, new) {
            return None;
        }
        reached("slot.claimed");
        for bits in 0..summary::WORDS {
            self.set_word(claim + SUMMARY + bits * WORD, 0);
        }
        reached("slot.cleared");
        Some(SlotRef { index, generation: generation(new) })
    }

    /// Whether `at` is live: neither dead, nor free, nor somebody else's by now.
    pub fn is_live(&self, at: SlotRef) -> bool {
        at.index < self.geometry().slots()
            && matches!(self.slot_state(at.index), SlotState::Live { at: found, .. } if found == at)
    }

    /// Says that `at` is dead: for its prover, and for the leaver itself. Whether this call made
    /// it so. Its memory stays its own until [`Region::reclaim`].
    pub fn mark_dead(&self, at: SlotRef) -> bool {
        if at.index >= self.geometry().slots() {
            return false;
        }
        let claim = self.slot_claim_offset(at.index);
        let word = self.word(claim);
        match decode(at.index, word) {
            SlotState::Live { at: found, .. } if found == at => {
                self.step("slot.dead", claim, word, with_life(word, DEAD))
            }
            _ => false,
        }
    }

    /// Frees the slot of `at` if it is dead. Whether this call did.
    pub(crate) fn free_slot(&self, at: SlotRef) -> bool {
        let claim = self.slot_claim_offset(at.index);
        let word = self.word(claim);
        match decode(at.index, word) {
            SlotState::Dead { at: found, .. } if found == at => {
                let free = u64::from(at.generation) << GENERATION_SHIFT;
                self.step("slot.freed", claim, word, free)
            }
            _ => false,
        }
    }

    /// Says who `at`, the caller, is.
    pub fn set_slot_info(&self, at: SlotRef, info: &SlotInfo) {
        let slot = self.slot_claim_offset(at.index);
        // Zero while it changes: names no generation.
        self.set_word(slot + INFO, 0);
        for (bytes, word) in info.eid.chunks_exact(8).zip((slot + EID..).step_by(8)) {
            let bytes = bytes.try_into().unwrap_or([0; 8]);
            self.set_word(word, u64::from_le_bytes(bytes));
        }
        reached("information.begun");
        let word = u64::from(at.generation) << GENERATION_SHIFT
            | u64::from(info.ivposition.is_some()) << HAS_IVPOSITION_SHIFT
            | u64::from(info.vector.is_some()) << HAS_VECTOR_SHIFT
            | u64::from(info.vector.unwrap_or(0)) << 16
            | u64::from(info.ivposition.unwrap_or(0));
        self.set_word(slot + INFO, word);
        reached("information.written");
    }

    /// What `at` said of itself, if it is live and has.
    #[allow(clippy::cast_possible_truncation)] // Each field is the 16 bits that are asked for.
    pub fn slot_info(&self, at: SlotRef) -> Option<SlotInfo> {
        if !self.is_live(at) {
            return None;
        }
        let slot = self.slot_claim_offset(at.index);
        let word = self.word(slot + INFO);
        if generation(word) != at.generation {
            return None;
        }
        let mut eid = [0; 32];
        for (bytes, word) in eid.chunks_exact_mut(8).zip((slot + EID..).step_by(8)) {
            bytes.copy_from_slice(&self.word(word).to_le_bytes());
        }
        (self.word(slot + INFO) == word).then_some(SlotInfo {
            ivposition: (word >> HAS_IVPOSITION_SHIFT & 1 == 1).then_some(word as u16),
            vector: (word >> HAS_VECTOR_SHIFT & 1 == 1).then_some((word >> 16) as u16),
            eid,
        })
    }

    /// Offset of the claim word of slot `index`: the byte there is the one to lock.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn slot_claim_offset(&self, index: u16) -> u64 {
        let slots = self.geometry().slots();
        assert!(index < slots, "slot {index} of {slots}");
        self.geometry().slot(index) + CLAIM
    }

    /// Sets summary bit `number` of `peer`, before it is notified. A slot that is somebody else's by
    /// now looks in vain.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn set_summary(&self, peer: SlotRef, number: u16) {
        summary::set(self.memory(), self.summary_offset(peer.index), number);
    }

    /// Takes all summary bits of `me`, the caller, who has drained the doorbell before.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn take_summary(&self, me: SlotRef, taken: impl FnMut(u16)) {
        summary::take(self.memory(), self.summary_offset(me.index), taken);
    }

    /// Offset of the summary words of slot `index`.
    fn summary_offset(&self, index: u16) -> u64 {
        self.slot_claim_offset(index) + SUMMARY
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heap::HeapMemory;
    use crate::layout::MIN_REGION;
    use alloc::vec;
    use core::sync::atomic::Ordering;

    fn region() -> Region<HeapMemory> {
        Region::attach(HeapMemory::new(MIN_REGION), 1).unwrap()
    }

    #[test]
    fn a_slot_goes_round_and_its_generation_up() {
        let region = region();
        assert_eq!(region.slot_state(4), SlotState::Free { generation: 0 });
        let prover = Prover::Lock { boot: 0xdead_beef };
        let first = region.claim_slot(4, prover).unwrap();
        assert_eq!(first, SlotRef { index: 4, generation: 1 });
        assert_eq!(region.claim_slot(4, prover), None);
        assert_eq!(region.slot_state(4), SlotState::Live { at: first, prover });
        assert_eq!(region.claimed().collect::<alloc::vec::Vec<_>>(), [(first, prover)]);
        assert!(region.is_live(first) && region.unclaimed().all(|index| index != 4));
        assert!(!region.free_slot(first));
        assert!(region.mark_dead(first) && !region.mark_dead(first) && !region.is_live(first));
        assert_eq!(region.slot_state(4), SlotState::Dead { at: first, prover });
        assert_eq!(region.claim_slot(4, prover), None);
        assert!(region.free_slot(first) && !region.free_slot(first));
        let second = region.claim_slot(4, Prover::None).unwrap();
        assert_eq!(second.generation, 2);
        assert!(!region.mark_dead(first) && region.is_live(second));
        assert!(!region.is_live(SlotRef { index: 999, generation: 1 }));
    }

    #[test]
    fn the_generation_wraps_past_zero_and_words_are_as_documented() {
        let region = region();
        let last = (1u64 << 26) - 1;
        region.memory().store(PAGE_OF_SLOTS, last << 38, Ordering::Relaxed);
        let at = region.claim_slot(0, Prover::IvPosition(7)).unwrap();
        assert_eq!(at.generation, 1);
        let word = region.memory().load(PAGE_OF_SLOTS, Ordering::Relaxed);
        assert_eq!(word, 1 << 38 | 2 << 34 | 1 << 32 | 7);
    }

    /// Slot 0 of any region.
    const PAGE_OF_SLOTS: u64 = crate::layout::PAGE;

    #[test]
    fn provers_survive_the_word_and_unknown_ones_prove_nothing() {
        let provers = [
            Prover::None,
            Prover::Lock { boot: u32::MAX },
            Prover::IvPosition(u16::MAX),
            Prover::Agent(1 << 31),
            Prover::VfioExclusive(0),
        ];
        for prover in provers {
            let (kind, id) = prover.encode();
            assert_eq!(Prover::decode(kind, id), prover);
        }
        assert_eq!(Prover::decode(9, 1), Prover::None);
        assert_eq!(Prover::decode(2, 1 << 16), Prover::None);
        // A life that does not exist is not free.
        assert!(!decode(0, 3 << LIFE_SHIFT).is_free());
    }

    #[test]
    fn information_is_of_one_generation() {
        let region = region();
        let info = SlotInfo {
            ivposition: Some(0),
            vector: None,
            eid: *b"EID                            !",
        };
        let at = region.claim_slot(2, Prover::None).unwrap();
        assert_eq!(region.slot_info(at), None);
        region.set_slot_info(at, &info);
        assert_eq!(region.slot_info(at), Some(info));
        region.set_summary(at, 1023);
        region.reclaim(at);
        assert_eq!(region.slot_info(at), None);
        let next = region.claim_slot(2, Prover::None).unwrap();
        assert_eq!(region.slot_info(next), None);
        // A successor does not look for what its predecessor was notified of.
        region.take_summary(next, |number| panic!("{number}"));
    }

    #[test]
    fn summary_bits_are_the_slots_own() {
        let region = region();
        let slots = [1, 2, 3].map(|index| region.claim_slot(index, Prover::None).unwrap());
        region.set_summary(slots[1], 0);
        region.set_summary(slots[1], 1023);
        let taken = |at| {
            let mut numbers = alloc::vec::Vec::new();
            region.take_summary(at, |number| numbers.push(number));
            numbers
        };
        assert_eq!(slots.map(taken), [vec![], vec![0, 1023], vec![]]);
        assert_eq!(region.slot_state(3), SlotState::Live { at: slots[2], prover: Prover::None });
    }
}
