//! A hostile ivshmem server talks to a client of ours: any messages, any descriptors, a region with
//! anything in it.
#![no_main]

use std::time::Duration;

use ivsmc_fuzz::wire::{self, Descriptors, Usual};
use ivsmc_fuzz::{memory, Input};
use ivsmc_shm::fd::Fd;
use ivsmc_shm::{file, net};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 1 << 20;

/// What is said, or done to the region.
fn act(input: &mut Input<'_>, socket: &Fd, region: &Fd, descriptors: &Descriptors) {
    let (value, usual) = match input.below(16) {
        0 => (0, Usual::Nothing),
        1 => (-1, Usual::Memory),
        2..=4 => (i64::from(input.byte()), Usual::Nothing),
        5..=11 => (i64::from(input.byte()), Usual::EventFd),
        12 => (i64::from(input.u16()), Usual::EventFd),
        13 => (input.u64().cast_signed(), Usual::EventFd),
        14 => {
            let fds = descriptors.choose(input, Usual::Nothing);
            let length = input.below(32);
            return wire::push(socket, input.bytes(length), &fds);
        }
        _ => {
            let at = u64::from(input.u16()) * 8 % SIZE;
            let _ = file::write_at(region, at, &input.u64().to_le_bytes());
            return;
        }
    };
    let fds = descriptors.choose(input, usual);
    wire::send(socket, input, &value.to_le_bytes(), &fds);
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let sizes = [SIZE, SIZE, SIZE, SIZE + 4096, SIZE - 1, 4096, 0];
    let region = memory(sizes[input.below(sizes.len())]);
    let Ok(also) = region.try_clone() else { return };
    let descriptors = Descriptors::new(also);
    let Ok((near, far)) = net::socketpair_stream() else { return };
    for _ in 0..input.below(32) {
        act(&mut input, &far, &region, &descriptors);
    }
    if input.below(4) > 0 {
        let _ = net::shutdown(&far, std::net::Shutdown::Write);
    }
    let found = match ivsmc::fuzzing::ivshmem_client(near, Duration::from_millis(1)) {
        Ok(found) => found,
        Err(wrong) => return assert!(!wrong.to_string().is_empty()),
    };
    while !input.is_over() {
        act(&mut input, &far, &region, &descriptors);
        if input.flip() {
            found.hear();
            found.notify(input.byte().into(), input.byte().into());
        }
    }
    drop(far);
    found.hear();
    if let Err(wrong) = found.attach_and_leave() {
        assert!(!wrong.to_string().is_empty());
    }
});
