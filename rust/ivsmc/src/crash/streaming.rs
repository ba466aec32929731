//! Clients that die between two steps of a ring, or while they close.

use ivsmc_proto::reclaim::Census;

use super::stage::{Ground, Leaves, Stage, LIVE};

/// A live slot with an extent.
const EXTENT: Census = Census { extents: 1, ..LIVE };
/// With the DMB that it read, which nobody writes.
const HELD: Census = Census { dmbs_held: 1, ..EXTENT };
/// With the session of a peer that has not heard of the close.
const UNHEARD: Census = Census { dmbs_held: 2, dmbs_attached: 1, ..EXTENT };

dies_at! {
    // Bytes that were not published are no bytes.
    data_is_copied: "ring.data" => |name| streams(name, "smc 0 reset");
    data_is_published: "ring.produced" => |name| streams(name, "smc 8192 reset");
    data_is_consumed: "ring.consumed" => |name| streams(name, "smc * reset");
    the_readers_wait_is_taken: "ring.reader_wait_taken" => |name| streams(name, "smc * reset");
    the_writers_wait_is_taken: "ring.writer_wait_taken" => |name| streams(name, "smc * reset");
    it_waits_for_data: "ring.reader_waits" => |name| streams(name, "smc * reset");
    it_waits_for_room: "ring.writer_waits" => |name| streams(name, "smc * reset");
    it_waits_for_data_no_more: "ring.reader_waits_no_more" => |name| streams(name, "smc * reset");
    it_waits_for_room_no_more: "ring.writer_waits_no_more" => |name| streams(name, "smc * reset");
    // A close is one when the writer's flags say so.
    the_readers_flags_are_set:
        "ring.reader_flags" => |name| closes(name, "smc 80000 reset");
    the_writers_flags_are_set:
        "ring.writer_flags" => |name| closes(name, "smc 80000 eof");
    // Its peer has not been notified: it sleeps, or has seen the end of the stream on its way there.
    the_peers_dmb_is_detached: "dmb.detached" => |name| lets_go(name, &[HELD, UNHEARD]);
    the_own_dmb_is_released: "dmb.released" => |name| lets_go(name, &[EXTENT]);
}

/// Streams until it dies.
fn streams(name: &str, end: &str) {
    let stage = Stage::new(Ground::File);
    stage.victim(0, name).dies_at(name);
    stage.hears(&[end]);
    // The listener's end of the session finds its peer dead.
    stage.is_left(Leaves::Nothing);
    stage.heals();
}

/// Streams two rounds, and dies while it closes.
fn closes(name: &str, end: &str) {
    let stage = Stage::new(Ground::File);
    stage.victim(2, name).dies_at(name);
    stage.hears(&[end]);
    stage.is_left(Leaves::Nothing);
    stage.heals();
}

/// The same. Held until all is seen: its peer, which had its DMB in limbo a moment ago, may find it dead
/// at once.
fn lets_go(name: &str, left: &[Census]) {
    let stage = Stage::new(Ground::File);
    let mut victim = stage.held_victim(2, name);
    victim.comes_to(name);
    stage.is_left_one_of(left);
    victim.kill_at(name);
    stage.hears(&["smc 80000 eof"]);
    stage.heals();
}
