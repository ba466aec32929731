//! A hostile agent talks to a client of ours: any messages, any descriptors, a device that is not what
//! the agent says.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use ivsmc_fuzz::wire::{self, Descriptors, Usual};
use ivsmc_fuzz::{memory, Input};
use ivsmc_proto::agent::{AgentMessage, Part, Welcome};
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::Prover;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::{file, net};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 1 << 20;

/// What an honest agent says of a device whose memory is the first bytes of `device`.
fn honest(device: &Fd, vector: u16) -> Option<Welcome> {
    let mapping = Mapping::map(device.try_clone().ok()?, SIZE).ok()?;
    let region = Region::attach(Arc::new(mapping), 7).ok()?;
    let slot = region.claim_slot(0, Prover::Agent(0))?;
    Some(Welcome {
        ivposition: 0,
        vector,
        slot,
        uuid: region.uuid(),
        memory: Part { offset: 0, size: SIZE },
        registers: Part { offset: SIZE, size: 256 },
        can_map_registers: true,
    })
}

/// Says one message, as it is or with some bytes changed; or does something to the device.
fn act(
    input: &mut Input<'_>,
    socket: &Fd,
    device: &Fd,
    welcome: Welcome,
    descriptors: &Descriptors,
) {
    let (message, usual) = match input.below(8) {
        0 | 1 => (AgentMessage::Welcome(welcome), Usual::Memory),
        2 => {
            let welcome = Welcome { can_map_registers: false, ..welcome };
            (AgentMessage::Welcome(welcome), Usual::Memory)
        }
        3 => (AgentMessage::Doorbell, Usual::EventFd),
        4 => (AgentMessage::Departures, Usual::EventFd),
        5 => {
            let length = input.byte();
            let text = String::from_utf8_lossy(input.bytes(length.into())).into_owned();
            (AgentMessage::Refusal(text), Usual::Nothing)
        }
        6 => {
            let fds = descriptors.choose(input, Usual::Nothing);
            let length = input.byte();
            return wire::push(socket, input.bytes(length.into()), &fds);
        }
        _ => {
            let at = u64::from(input.u16()) * 8 % SIZE;
            let at = if input.flip() { SIZE + 8 } else { at };
            let _ = file::write_at(device, at, &input.u64().to_le_bytes());
            return;
        }
    };
    let mut bytes = message.to_bytes();
    for _ in 0..input.below(8).saturating_sub(4) {
        let (at, length) = (input.below(bytes.len()), bytes.len());
        for (to, from) in bytes[at..].iter_mut().zip(input.bytes(8.min(length - at))) {
            *to = *from;
        }
    }
    let fds = descriptors.choose(input, usual);
    wire::send(socket, input, &bytes, &fds);
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let device = memory(SIZE + 4096);
    let Ok(also) = device.try_clone() else { return };
    let descriptors = Descriptors::new(also);
    let Some(welcome) = honest(&device, u16::from(input.byte() % 3)) else { return };
    // A device that ends before what it is said to have.
    if input.below(8) == 0 {
        let _ = file::set_size(&device, u64::from(input.u16()) * 64);
    }
    let Ok((near, far)) = net::socketpair_stream() else { return };
    for _ in 0..input.below(8) {
        act(&mut input, &far, &device, welcome, &descriptors);
    }
    if input.below(4) > 0 {
        let _ = net::shutdown(&far, std::net::Shutdown::Write);
    }
    match ivsmc::fuzzing::agent_client(near, Duration::from_millis(1)) {
        Err(wrong) => assert!(!wrong.to_string().is_empty()),
        Ok(found) => {
            while !input.is_over() {
                act(&mut input, &far, &device, welcome, &descriptors);
                found.notify(input.byte().into(), input.byte().into());
            }
            if let Err(wrong) = found.attach_and_leave() {
                assert!(!wrong.to_string().is_empty());
            }
        }
    }
});
