//! Hostile clients of an agent: they come and go, say what they like, do not read, and scribble over
//! the region. Afterwards an honest one gets an answer.
#![no_main]

use std::path::Path;

use ivsmc::agent::Agent;
use ivsmc::{Plain, Timeout};
use ivsmc_fuzz::wire::{self, Descriptors, Usual};
use ivsmc_fuzz::{memory, Input, Scratch};
use ivsmc_proto::agent::{self, AgentMessage, ClientProtocol};
use ivsmc_shm::fd::Fd;
use ivsmc_shm::{file, net};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 1 << 20;

fn turn(agent: &Agent) {
    agent.serve_for(Timeout::NonBlocking, &Plain, |event| drop(event.to_string())).expect("a turn");
}

fn connect(path: &Path) -> Option<Fd> {
    net::unix_connect_nonblocking(path).ok()
}

/// What one of the clients does.
fn act(input: &mut Input<'_>, client: &Fd, device: &Fd, descriptors: &Descriptors) -> bool {
    match input.below(8) {
        0..=2 => {
            let mut hello = agent::hello();
            if input.below(4) == 0 {
                hello[input.below(agent::HEADER_LENGTH)] = input.byte();
            }
            let fds = descriptors.choose(input, Usual::Nothing);
            wire::send(client, input, &hello, &fds);
        }
        3 => {
            let fds = descriptors.choose(input, Usual::Nothing);
            let length = input.byte();
            wire::push(client, input.bytes(length.into()), &fds);
        }
        4 => {
            let ways =
                [std::net::Shutdown::Read, std::net::Shutdown::Write, std::net::Shutdown::Both];
            let _ = net::shutdown(client, ways[input.below(ways.len())]);
        }
        5 => {
            let at = u64::from(input.u16()) * 8 % SIZE;
            let _ = file::write_at(device, at, &input.u64().to_le_bytes());
            return true;
        }
        _ => {
            let mut bytes = [0; 64];
            let length = input.below(64);
            let _ = net::recv_with_fd(client, &mut bytes[..length], net::MSG_DONTWAIT);
        }
    }
    false
}

/// A client that keeps the rules is answered, and taken in if the region is as it was.
fn answer(agent: &Agent, is_sound: bool) {
    let client = connect(agent.path()).expect("a place in the queue");
    wire::push(&client, &agent::hello(), &[]);
    let mut protocol = ClientProtocol::new();
    let mut looks = 0;
    while protocol.wants() > 0 {
        let mut piece = vec![0; protocol.wants()];
        match net::recv_with_fd(&client, &mut piece, net::MSG_DONTWAIT) {
            Ok((count, passed)) => {
                assert_eq!(count, piece.len(), "the answer is cut");
                match protocol.take(&piece, passed.one().is_some()) {
                    Ok(Some(AgentMessage::Refusal(text))) => assert!(!is_sound, "{text}"),
                    Ok(_) => {}
                    Err(wrong) => panic!("{wrong}"),
                }
            }
            Err(_) => {
                turn(agent);
                looks += 1;
                assert!(looks < 1000, "an honest client waits for an answer");
            }
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let scratch = Scratch::new();
    let device = memory(SIZE + 4096);
    let vectors = 1 + u16::from(input.byte() % 4);
    let Ok(also) = device.try_clone() else { return };
    let agent =
        ivsmc::fuzzing::agent(&scratch.path("socket"), also, SIZE, vectors).expect("an agent");
    let descriptors = Descriptors::new(memory(4096));
    let mut clients: Vec<Fd> = Vec::new();
    let mut is_sound = true;
    while !input.is_over() {
        match input.below(8) {
            0 | 1 => clients.extend(connect(agent.path())),
            2 => turn(&agent),
            3 if !clients.is_empty() => {
                drop(clients.swap_remove(input.below(clients.len().min(256))))
            }
            _ if clients.is_empty() => {}
            _ => {
                let which = input.below(clients.len().min(256));
                is_sound &= !act(&mut input, &clients[which], &device, &descriptors);
                if input.flip() {
                    turn(&agent);
                }
            }
        }
        if clients.len() > 100 {
            turn(&agent);
            clients.drain(..50);
        }
        let status = agent.status().expect("a status");
        assert_eq!(status.joined - status.left, status.clients.len() as u64);
    }
    drop(clients);
    turn(&agent);
    turn(&agent);
    answer(&agent, is_sound);
});
