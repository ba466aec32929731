//! Taking back what a dead peer had; counting what there is.
//!
//! [`Region::reclaim`] takes no lock and may be run by several processes at once, be killed at any
//! point and run again: each step is a compare-exchange of a word that names the dead slot's
//! generation (or, for a held DMB, stands beside one), so a step that somebody else has done, or
//! that came too late, fails and harms nobody. The slot becomes free last; until then whoever sees
//! it dead finishes the work.
//!
//! | killed after | found by others | made good by |
//! | --- | --- | --- |
//! | the slot is marked dead | a dead slot | the next reclaim of it |
//! | entries, intents or DMBs are let go, in part | a dead slot | the next reclaim of it |
//! | an orphan extent is left by its last writer, not freed | an idle extent of no live owner | any later reclaim |
//! | the slot is free | nothing is left but extents with a foreign writer | that writer's detach or reclaim |

use crate::memory::Memory;
use crate::region::Region;
use crate::slot::{SlotRef, SlotState};

/// What one call of [`Region::reclaim`] took back.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Reclaimed {
    /// Directory entries freed.
    pub listeners: u32,
    /// Intents freed.
    pub intents: u32,
    /// DMBs that the dead peer owned, let go.
    pub dmbs_held: u32,
    /// DMBs that it wrote or was invited to write, let go.
    pub dmbs_written: u32,
    /// Extents freed, its own or other orphans.
    pub extents: u32,
    /// Whether this call made the slot free.
    pub slot: bool,
}

/// What is in use in a region, as far as one pass sees it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Census {
    /// Slots that are live.
    pub live: u32,
    /// Slots that are dead and not reclaimed.
    pub dead: u32,
    /// Directory entries.
    pub listeners: u32,
    /// Intents.
    pub intents: u32,
    /// Extents claimed.
    pub extents: u32,
    /// DMBs held by their owners.
    pub dmbs_held: u32,
    /// DMBs with a writer attached.
    pub dmbs_attached: u32,
}

impl<M: Memory> Region<M> {
    /// Takes back all that `dead` had, and frees its slot.
    ///
    /// The caller is the slot's prover and has found it dead, or is the leaver itself, or saw the
    /// slot marked dead. A slot that is no longer `dead`'s is left alone.
    pub fn reclaim(&self, dead: SlotRef) -> Reclaimed {
        let mut done = Reclaimed::default();
        self.mark_dead(dead);
        if !self.is_dead(dead) {
            return done;
        }
        // Pairs with the fence after each claim: what `dead` claims from here on, it undoes
        // itself when it finds itself dead; what it claimed before, the passes below see.
        self.memory().fence();
        done.listeners = self.reclaim_listeners(dead);
        done.intents = self.reclaim_intents(dead);
        let mut unfinished = false;
        for (index, owner) in self.open_extents() {
            let dmbs = self.reclaim_dmbs(index, owner, dead);
            done.dmbs_held += dmbs.held;
            done.dmbs_written += dmbs.written;
            unfinished |= dmbs.unfinished;
        }
        // Pairs with the fence in `detach_dmb`.
        self.memory().fence();
        done.extents =
            self.claimed_extents().map(|(index, _)| u32::from(self.free_orphan(index))).sum();
        done.slot = !unfinished && self.free_slot(dead);
        done
    }

    /// Counts what is in use.
    pub fn census(&self) -> Census {
        let mut census = Census {
            listeners: self.count_listeners(),
            intents: self.count_intents(),
            ..Census::default()
        };
        for (_, state) in self.slots() {
            match state {
                SlotState::Free { .. } => {}
                SlotState::Live { .. } => census.live += 1,
                SlotState::Dead { .. } => census.dead += 1,
            }
        }
        census.extents = self.claimed_extents().map(|_| 1).sum();
        for (index, _) in self.open_extents() {
            let (held, attached) = self.count_dmbs(index);
            census.dmbs_held += held;
            census.dmbs_attached += attached;
        }
        census
    }

    /// Whether the slot of `at` is dead in its generation.
    fn is_dead(&self, at: SlotRef) -> bool {
        at.index < self.geometry().slots()
            && matches!(self.slot_state(at.index), SlotState::Dead { at: found, .. } if found == at)
    }
}

#[cfg(test)]
mod tests;
