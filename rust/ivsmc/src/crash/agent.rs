//! Agents that die: the next one takes back what they gave and what they had begun to take back.

use std::path::PathBuf;

use ivsmc_proto::reclaim::Census;

use super::process::Process;
use super::stage::{Ground, Leaves, Stage, LIVE, NONE};
use crate::agent::tests::stand_in::IVPOSITION;
use crate::attachment::Attachment;

dies_at! {
    a_vector_is_wired: "agent.wired" => |name| {
        is_asked(name, 1, NONE);
        // What it does next.
        is_asked("slot.claimed", 1, LIVE);
    };
    it_has_sent_a_message: "agent.sent" => |name| {
        // Without the eventfd of its doorbell a client does not attach.
        is_asked(name, 1, LIVE);
        is_asked(name, 2, LIVE);
    };
    it_has_taken_back_what_a_client_had: "agent.taken_back" => |name| {
        is_left(name, NONE);
        is_left("slot.dead", Census { dead: 1, ..NONE });
    };
}

fn socket(stage: &Stage) -> PathBuf {
    stage.scratch().path().join("agent.sock")
}

/// An agent over the region of the stage, in a process, to die at `name` once it is armed.
fn start(stage: &Stage, name: &str) -> Process {
    let directory = stage.scratch().path().to_str().unwrap();
    let region = stage.path();
    let role = ["agent", directory, region.to_str().unwrap()];
    // As our ivshmem server says it: nobody else who lives has the id of the device. Else a slot
    // without a record, as an agent leaves it, could be another machine's.
    stage.observer().set_ids_given(u32::from(IVPOSITION) + 1);
    let mut agent = Process::start(&role, Some((name, 0)));
    agent.hear("serving");
    agent
}

fn goes_on(stage: Stage) {
    stage.neighbour_goes_on();
    // That it has the device proves that nobody has it from the one before.
    let next = start(&stage, "");
    stage.is_left(Leaves::Nothing);
    let device = format!("agent:{}", socket(&stage).display());
    let mut client = Process::start(&["join", &device], None);
    client.hear("joined");
    stage.is_left(Leaves::Exactly(LIVE));
    client.ends();
    stage.is_left(Leaves::Nothing);
    next.ends();
    stage.heals();
}

/// It dies while it gives a client what that needs.
fn is_asked(name: &str, nth: usize, left: Census) {
    let stage = Stage::new(Ground::AgentsFile);
    let mut agent = start(&stage, name);
    agent.arm(nth);
    let device = format!("agent:{}", socket(&stage).display()).parse().unwrap();
    let refused = Attachment::open(&device).err().unwrap().sentence;
    assert!(refused.contains("agent"), "{refused}");
    agent.dies_at(name);
    stage.is_left(Leaves::Exactly(left));
    goes_on(stage);
}

/// It dies while it takes back what a client that was killed had.
fn is_left(name: &str, left: Census) {
    let stage = Stage::new(Ground::AgentsFile);
    let mut agent = start(&stage, name);
    let device = format!("agent:{}", socket(&stage).display());
    let mut client = Process::start(&["join", &device], None);
    client.hear("joined");
    agent.arm(1);
    client.kill();
    agent.dies_at(name);
    stage.is_left(Leaves::Exactly(left));
    goes_on(stage);
}
