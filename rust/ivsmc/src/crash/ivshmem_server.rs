//! Ivshmem servers that die: their clients stream on, and the next one goes on with the region.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use ivsmc_proto::reclaim::Census;

use super::process::Process;
use super::roles::SIZE;
use super::stage::{serve, Leaves, Stage, LIVE, NONE};
use crate::device::tests::Scratch;

dies_at! {
    it_may_take_the_path: "socket.turn_taken" => begins;
    the_dead_ones_socket_is_removed: "socket.stale_removed" => begins;
    its_socket_has_its_name: "socket.bound" => begins;
    its_file_is_made: "region.made" => |name| begins_at_all(name, None);
    its_file_has_its_memory: "region.reserved" => |name| begins_at_all(name, None);
    it_has_the_lock: "marker.locked" => begins;
    it_says_that_it_marks: "marker.set" => begins;
    its_socket_has_no_name_any_more: "socket.removed" => ends;
    it_no_longer_says_so: "marker.cleared" => ends;
    it_says_how_many_ids_are_given: "ids.set" => |name| {
        begins_at_all(name, Some(SIZE));
        is_joined(name, 1);
    };
    it_has_sent_a_message: "server.sent" => |name| {
        // The version, the id, the region, a vector of another, an own one.
        (1..=5).for_each(|nth| is_joined(name, nth));
    };
    it_has_taken_back_what_a_leaver_had: "server.taken_back" => |name| {
        is_left(name, NONE);
        is_left("slot.dead", Census { dead: 1, ..NONE });
        is_left("slot.freed", NONE);
    };
}

fn socket(scratch: &Scratch) -> PathBuf {
    scratch.path().join("ivs.sock")
}

/// A process that serves "region" in this directory.
fn start(directory: &Path, at: Option<(&str, usize)>) -> Process {
    let path = |name| directory.join(name).to_str().unwrap().to_owned();
    Process::start(&["ivshmem server", &path("ivs.sock"), &path("region")], at)
}

/// An ivshmem server with clients that stream, to die at `name` once it is armed.
fn served(name: &str) -> (Process, Stage) {
    let scratch = Scratch::new();
    scratch.file("region", SIZE);
    let mut server = start(scratch.path(), Some((name, 0)));
    server.hear("serving");
    let device = format!("host:{}", socket(&scratch).display());
    (server, Stage::with(scratch, device))
}

/// The next one serves, who comes now streams with those of before, and nothing is left.
fn goes_on(stage: Stage) {
    stage.neighbour_goes_on();
    let served = serve(socket(stage.scratch()), stage.path());
    assert!(!stage.scratch().path().join("ivs.sock.lock").exists());
    stage.heals_by(served);
}

/// The second of three dies when it begins.
fn begins(name: &str) {
    let (first, stage) = served(name);
    first.kill();
    start(stage.scratch().path(), Some((name, 1))).dies_at(name);
    goes_on(stage);
}

/// The first of all dies when it begins, on a file of this size.
fn begins_at_all(name: &str, size: Option<u64>) {
    let scratch = Scratch::new();
    if let Some(size) = size {
        scratch.file("region", size);
    }
    start(scratch.path(), Some((name, 1))).dies_at(name);
    let (served, device) = super::stage::host(&scratch);
    Stage::with(scratch, device).heals_by(served);
}

fn ends(name: &str) {
    let (mut server, stage) = served(name);
    server.arm(1);
    server.ends_its_input();
    server.dies_at(name);
    goes_on(stage);
}

/// It dies at the n-th message to a newcomer, or before.
fn is_joined(name: &str, nth: usize) {
    let (mut server, stage) = served(name);
    server.arm(nth);
    let mut newcomer = UnixStream::connect(socket(stage.scratch())).unwrap();
    // More than a few messages it is sent only as it reads.
    io::copy(&mut newcomer, &mut io::sink()).unwrap();
    server.dies_at(name);
    stage.is_left(Leaves::Nothing);
    goes_on(stage);
}

/// It dies while it takes back what a client that was killed had.
fn is_left(name: &str, left: Census) {
    let (mut server, stage) = served(name);
    let mut leaver = Process::start(&["join", stage.device()], None);
    leaver.hear("joined");
    stage.is_left(Leaves::Exactly(LIVE));
    server.arm(1);
    leaver.kill();
    server.dies_at(name);
    stage.is_left(Leaves::Exactly(left));
    goes_on(stage);
}
