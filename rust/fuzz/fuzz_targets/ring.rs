//! Both ends of a ring whose words somebody scribbles over: bytes, or the error of a broken rule, and
//! never a byte of memory beside the ring.
#![no_main]

use std::mem::MaybeUninit;

use ivsmc_fuzz::scribble::{Scribbled, Script};
use ivsmc_fuzz::Input;
use ivsmc_proto::control;
use ivsmc_proto::ring::{Consumer, PeerMisbehaved, Place, Producer};
use ivsmc_shm::mem::with_uninit;
use libfuzzer_sys::fuzz_target;

const CONTROL: u64 = 320;
const DATA: u64 = 1024;

thread_local! {
    static MEMORY: Scribbled = Scribbled::new(4096);
}

fn place(input: &mut Input<'_>) -> Place {
    Place::new(CONTROL, DATA, 1 << input.below(9))
}

/// Writes or reads somewhat, and judges what an end says of itself.
fn producer(
    producer: &mut Producer,
    m: &Scribbled,
    input: &mut Input<'_>,
) -> Result<(), PeerMisbehaved> {
    let capacity = producer.place().capacity;
    match input.below(8) {
        0 => assert!(producer.room(m)? <= capacity),
        1 => assert!(producer.in_flight(m)? <= capacity),
        2..=4 => {
            let bytes = [7; 256];
            let before = producer.produced();
            let from = &bytes[..input.below(257)];
            let count = producer.write(m, from)? as u64;
            assert!(count <= capacity.min(from.len() as u64));
            assert_eq!(producer.produced(), before.wrapping_add(count));
        }
        5 => {
            producer.take_reader_wait(m);
        }
        6 => {
            producer.want_room(m, input.u64())?;
        }
        _ => {
            producer.clear_wait(m);
            producer.reader_flags(m);
            producer.is_heard(m);
            producer.set_flags(m, u64::from(input.byte()));
        }
    }
    Ok(())
}

fn consumer(
    consumer: &mut Consumer,
    m: &Scribbled,
    input: &mut Input<'_>,
) -> Result<(), PeerMisbehaved> {
    let capacity = consumer.place().capacity;
    let mut bytes = [0; 256];
    let before = consumer.consumed();
    match input.below(8) {
        0 => assert!(consumer.available(m)? <= capacity),
        1 => assert!(consumer.look(m)?.available <= capacity),
        2..=3 => {
            let length = input.below(257);
            let count = with_uninit(&mut bytes[..length], |into: &mut [MaybeUninit<u8>]| {
                consumer.read(m, into)
            })?;
            assert!(count as u64 <= capacity && count <= length);
            assert_eq!(consumer.consumed(), before.wrapping_add(count as u64));
        }
        4 => {
            let (skip, length) = (input.u64(), input.below(257));
            let count = with_uninit(&mut bytes[..length], |into| consumer.peek(m, skip, into))?;
            assert!(count <= length && consumer.consumed() == before);
        }
        5 => {
            let count = input.u64();
            let skipped = consumer.skip(m, count)?;
            assert!(skipped <= count.min(capacity));
            assert_eq!(consumer.consumed(), before.wrapping_add(skipped));
        }
        6 => {
            consumer.want_data(m, input.u64())?;
            consumer.take_writer_wait(m);
        }
        _ => {
            consumer.clear_wait(m);
            consumer.take_writer_wait(m);
            consumer.writer_flags(m);
            consumer.set_flags(m, u64::from(input.byte()));
        }
    }
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    MEMORY.with(|m| {
        m.reset();
        let mut input = Input::new(bytes);
        let place = place(&mut input);
        m.allow(&[CONTROL..CONTROL + control::SIZE, DATA..DATA + place.capacity]);
        let (mut writes, mut reads) = (Producer::new(place), Consumer::new(place));
        while !input.is_over() {
            let script =
                if input.flip() { Script::read(&mut input, 4096) } else { Script::default() };
            let writer = input.flip();
            let done = m.under(&script, || match input.below(16) {
                0 => {
                    place.reader_waits(m);
                    place.writer_waits(m);
                    place.set_heard(m);
                    place.withdraw_heard(m);
                    Ok(())
                }
                _ if writer => producer(&mut writes, m, &mut input),
                _ => consumer(&mut reads, m, &mut input),
            });
            // Once broken it stays so, with the same words.
            if let Err(wrong) = done {
                let (poisoned, again) = if writer {
                    (writes.poisoned(), writes.room(m).err())
                } else {
                    (reads.poisoned(), reads.available(m).err())
                };
                assert_eq!((poisoned, again), (Some(wrong), Some(wrong)));
            }
        }
    });
});
