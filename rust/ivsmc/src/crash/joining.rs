//! Who dies while it attaches.

use super::process::Process;
use super::roles::SIZE;
use super::stage::{Ground, Leaves, Stage, LIVE, NONE};
use crate::device::tests::Scratch;

dies_at! {
    the_slots_lock_is_taken: "slot.locked" => |name| joins(name, Leaves::Exactly(NONE));
    the_slot_is_claimed: "slot.claimed" => |name| joins(name, Leaves::Exactly(LIVE));
    the_summary_is_cleared: "slot.cleared" => |name| joins(name, Leaves::Exactly(LIVE));
    the_information_is_half_written:
        "information.begun" => |name| joins(name, Leaves::Exactly(LIVE));
    the_information_is_written:
        "information.written" => |name| joins(name, Leaves::Exactly(LIVE));
    the_record_is_half_written: "record.begun" => |name| {
        joins(name, Leaves::Exactly(LIVE));
        writes_its_record_anew(name);
    };
    the_record_is_written: "record.written" => |name| {
        joins(name, Leaves::Exactly(LIVE));
        writes_its_record_anew(name);
    };
    the_magic_is_set: "format.magic" => |name| formats(name, 1);
    some_words_of_the_superblock_are_set: "format.word" => |name| {
        // The version; one half of the uuid; all.
        for nth in [2, 5, 17] {
            formats(name, nth);
        }
    };
}

/// The next that attaches finds it, and may take the very slot.
fn joins(name: &str, leaves: Leaves) {
    let stage = Stage::new(Ground::File);
    Process::start(&["join", stage.device()], Some((name, 1))).dies_at(name);
    stage.is_left(leaves);
    stage.heals();
}

fn writes_its_record_anew(name: &str) {
    let stage = Stage::new(Ground::File);
    Process::start(&["join again", stage.device()], Some((name, 2))).dies_at(name);
    stage.is_left(Leaves::Exactly(LIVE));
    stage.heals();
}

/// The next that attaches goes on with it.
fn formats(name: &str, nth: usize) {
    let scratch = Scratch::new();
    let path = scratch.file("region", SIZE);
    let device = format!("file:{}", path.display());
    Process::start(&["join", &device], Some((name, nth))).dies_at(name);
    let stage = Stage::on(scratch, Ground::File);
    stage.heals();
}
