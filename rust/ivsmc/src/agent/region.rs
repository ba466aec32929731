//! The region behind the agent's device, and its word on which of its clients have ended.

use ivsmc_proto::proof::Witness;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotRef, SlotState};
use ivsmc_shm::mapping::Mapping;

/// The region, with slots for the agent's clients.
#[derive(Debug)]
pub(super) struct Slots {
    region: Region<Mapping>,
    prover: Prover,
    witness: Witness,
}

impl Slots {
    /// Slots that name the device `ivposition` as their prover. By what `witness` knows now, those of
    /// former owners are taken back; later on clients have the device too.
    pub(super) fn new(region: Region<Mapping>, ivposition: u16, witness: Witness) -> Self {
        take_back_dead(&region, &witness);
        let witness = Witness { is_exclusive: false, ..witness };
        Self { region, prover: Prover::Agent(ivposition.into()), witness }
    }

    pub(super) fn region(&self) -> &Region<Mapping> {
        &self.region
    }

    /// Claims a slot for a client; `None` if all are taken.
    pub(super) fn claim(&self) -> Option<SlotRef> {
        let claim =
            || self.region.unclaimed().find_map(|index| self.region.claim_slot(index, self.prover));
        claim().or_else(|| {
            // Those of the dead may be the only free ones.
            take_back_dead(&self.region, &self.witness);
            claim()
        })
    }

    /// Takes back what `at` held, whose client has ended; whether it had not left by itself.
    pub(super) fn take_back(&self, at: SlotRef) -> bool {
        let died = self.region.mark_dead(at);
        self.region.reclaim(at);
        died
    }
}

/// Takes back what those held who are proved dead, and finishes what others began to take back.
fn take_back_dead(region: &Region<Mapping>, witness: &Witness) {
    for (_, state) in region.slots() {
        let dead = match state {
            SlotState::Free { .. } => None,
            SlotState::Dead { at, .. } => Some(at),
            SlotState::Live { at, prover } => witness.proves(region, at, prover).then_some(at),
        };
        if let Some(at) = dead {
            region.reclaim(at);
        }
    }
}
