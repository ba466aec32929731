//! Clients of an ivshmem server that die between the steps of a doorbell.

use super::stage::{until, Ground, Leaves, Stage};

dies_at! {
    // The peer is told by the end of the connection, or by the ivshmem server.
    a_summary_bit_is_set: "summary.set" => |name| streams(name);
    summary_bits_are_taken: "summary.taken" => |name| streams(name);
    it_has_heard: "ring.heard" => |name| streams(name);
    it_no_longer_hears: "ring.unheard" => loses_a_doorbell;
}

fn streams(name: &str) {
    let stage = Stage::new(Ground::Host);
    stage.victim(0, name).dies_at(name);
    stage.hears(&["smc * reset"]);
    stage.is_left(Leaves::Nothing);
    stage.heals();
}

/// Sleeps, and finds summary bits without a doorbell.
fn loses_a_doorbell(name: &str) {
    let stage = Stage::new(Ground::Host);
    let before: Vec<_> = stage.observer().claimed().map(|(at, _)| at).collect();
    let mut victim = stage.sleeper(name);
    victim.hear("connected smc");
    victim.hear("sleeping");
    let newer = stage.observer().claimed().find(|(at, _)| !before.contains(at));
    let (slot, _) = newer.unwrap();
    // Of whichever session: what it had was told by doorbell, and this is not.
    until("its death", || {
        (0..1024).for_each(|number| stage.observer().set_summary(slot, number));
        (!victim.is_running()).then_some(())
    });
    victim.dies_at(name);
    stage.hears(&["smc 120000 reset"]);
    stage.is_left(Leaves::Nothing);
    stage.heals();
}
