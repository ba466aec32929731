//! Who dies while it leaves.

use ivsmc_proto::reclaim::Census;

use super::process::Process;
use super::stage::{Ground, Leaves, Stage, LIVE, NONE};

dies_at! {
    an_extent_is_given_back: "extent.freed" => |name| leaves(name, LIVE);
    the_slot_is_marked_dead: "slot.dead" => |name| {
        leaves(name, Census { dead: 1, ..NONE });
        leaves_after_a_session(name);
    };
    the_slot_is_free: "slot.freed" => |name| {
        leaves(name, NONE);
        leaves_after_a_session(name);
    };
    the_slots_lock_is_given_back: "slot.unlocked" => |name| leaves(name, NONE);
}

/// Has had memory, and nothing in it.
fn leaves(name: &str, left: Census) {
    let stage = Stage::new(Ground::File);
    Process::start(&["allocate", stage.device()], Some((name, 1))).dies_at(name);
    stage.is_left(Leaves::Exactly(left));
    stage.heals();
}

/// Has had a session: its peer may let go of its memory before it leaves, or after that.
fn leaves_after_a_session(name: &str) {
    let stage = Stage::new(Ground::File);
    stage.victim(1, name).dies_at(name);
    stage.hears(&["smc 40000 eof"]);
    stage.heals();
}
