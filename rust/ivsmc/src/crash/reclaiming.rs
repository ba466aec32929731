//! Processes that die while they take back what another dead one had.

use ivsmc_proto::reclaim::Census;

use super::process::Process;
use super::stage::{Ground, Leaves, Stage, LIVE, NONE};
use crate::attachment::Attachment;

/// What the dead one had: one of everything.
const ALL: Census =
    Census { listeners: 1, intents: 1, extents: 1, dmbs_held: 1, dmbs_attached: 1, ..LIVE };
/// The test's own part: it reads the DMB that the dead one writes.
const OWN: Census = Census { extents: 1, dmbs_held: 1, ..LIVE };

dies_at! {
    the_dead_ones_lock_is_taken: "reap.locked" => |name| reclaims(name, ALL);
    an_entry_is_freed: "reclaim.listener" => |name| {
        reclaims(name, Census { live: 0, dead: 1, listeners: 0, ..ALL });
    };
    an_intent_is_freed: "reclaim.intent" => |name| {
        reclaims(name, Census { live: 0, dead: 1, listeners: 0, intents: 0, ..ALL });
    };
    // One of two: which of them comes first says the order of the extents.
    a_dmb_is_let_go: "reclaim.dmb" => |name| reclaims_to_the_first_dmb(name);
    an_orphan_is_freed:
        "reclaim.extent" => |name| reclaims(name, Census { dead: 1, ..NONE });
}

/// A victim that attaches finds a dead one, and dies on the way.
fn reclaims(name: &str, left: Census) {
    let stage = Stage::new(Ground::File);
    let own = corpse(&stage);
    Process::start(&["join", stage.device()], Some((name, 1))).dies_at(name);
    stage.is_left(Leaves::Exactly(sum(left, OWN)));
    stage.newcomer();
    stage.is_left(Leaves::Exactly(OWN));
    drop(own);
    stage.heals();
}

fn reclaims_to_the_first_dmb(name: &str) {
    // The test's extent is below the dead one's: what the dead one wrote comes first.
    let first = Census { live: 0, dead: 1, listeners: 0, intents: 0, dmbs_attached: 0, ..ALL };
    reclaims(name, first);
}

fn sum(one: Census, other: Census) -> Census {
    Census {
        live: one.live + other.live,
        dead: one.dead + other.dead,
        listeners: one.listeners + other.listeners,
        intents: one.intents + other.intents,
        extents: one.extents + other.extents,
        dmbs_held: one.dmbs_held + other.dmbs_held,
        dmbs_attached: one.dmbs_attached + other.dmbs_attached,
    }
}

/// Leaves a dead one behind; what it wrote into is the result.
fn corpse(stage: &Stage) -> crate::attachment::OwnDmb {
    let reader = Attachment::open(&stage.device().parse().unwrap()).unwrap();
    let me = reader.me();
    // Claims its extent before the dead one does.
    drop(reader.allocate(0, me).unwrap());
    let (index, generation) = (me.index.to_string(), me.generation.to_string());
    let mut corpse = Process::start(&["hold", stage.device(), &index, &generation, "asked"], None);
    let line = corpse.line().unwrap();
    let (index, generation) = line.split_once('.').unwrap();
    let writer = ivsmc_proto::slot::SlotRef {
        index: index.parse().unwrap(),
        generation: generation.parse().unwrap(),
    };
    let own = reader.allocate(0, writer).unwrap();
    corpse.say(&own.token().0.to_string());
    corpse.hear("holding");
    corpse.kill();
    own
}
