//! The ring and its wait words: two threads, rings of 1 to 8 bytes.

use std::sync::Arc;

use ivsmc_proto::control::{DONE_WRITING, READER_CLOSED};
use ivsmc_proto::ring::{Consumer, Look, Producer};
use loom::thread;

use crate::explore;
use crate::ring_memory::{index, place, Descriptor, Lacks, LoomMemory, View, MOST};

/// Preemption bound of these models.
const BOUND: usize = 3;

/// A writer that sends `1..=count` one by one, sleeping for room.
fn send(m: &View, producer: &mut Producer, count: u8, to: &Descriptor, own: &Descriptor) {
    for byte in 1..=count {
        while producer.write(m, &[byte]).unwrap() == 0 {
            if !producer.want_room(m, 1).unwrap() {
                own.sleep_and_drain();
                producer.clear_wait(m);
            }
        }
        if producer.take_reader_wait(m) {
            to.notify();
        }
    }
}

/// A reader that takes `1..=count`, sleeping for data.
fn receive(m: &View, consumer: &mut Consumer, count: u8, to: &Descriptor, own: &Descriptor) {
    let mut next = 1;
    while next <= count {
        let bytes = m.read(consumer, index(MOST));
        if bytes.is_empty() {
            if !consumer.want_data(m, 1).unwrap() {
                own.sleep_and_drain();
                consumer.clear_wait(m);
            }
            continue;
        }
        for byte in bytes {
            assert_eq!(byte, next, "stale or lost byte");
            next += 1;
        }
        if consumer.take_writer_wait(m) {
            to.notify();
        }
    }
}

/// `count` bytes through a ring of `capacity`, both ends sleeping whenever they can do nothing.
fn pass(capacity: u64, count: u8, lacks: Lacks) {
    let memory = Arc::new(LoomMemory::new(1, capacity, lacks));
    let descriptors = Arc::new((Descriptor::default(), Descriptor::default()));
    let writer = {
        let (m, descriptors) = (View::new(&memory), descriptors.clone());
        thread::spawn(move || {
            let mut producer = Producer::new(place(0, capacity));
            send(&m, &mut producer, count, &descriptors.1, &descriptors.0);
        })
    };
    let m = View::new(&memory);
    let mut consumer = Consumer::new(place(0, capacity));
    receive(&m, &mut consumer, count, &descriptors.0, &descriptors.1);
    writer.join().unwrap();
}

#[test]
fn a_sleeping_reader_is_woken() {
    explore(BOUND, || pass(2, 2, Lacks::Nothing));
}

#[test]
fn a_sleeping_writer_and_a_sleeping_reader_are_woken() {
    explore(BOUND, || pass(1, 3, Lacks::Nothing));
}

#[test]
fn places_are_written_again_only_after_they_were_read() {
    explore(BOUND, || pass(2, 4, Lacks::Nothing));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_missing_fence_is_noticed() {
    explore(BOUND, || pass(1, 2, Lacks::Fences));
}

#[test]
#[should_panic(expected = "stale or lost byte")]
fn a_missing_release_is_noticed() {
    explore(BOUND, || pass(2, 2, Lacks::Releases));
}

/// A writer that sends one byte and ends; a reader that sleeps until it sees the end.
fn end_of_stream(lacks: Lacks) {
    let memory = Arc::new(LoomMemory::new(1, 1, lacks));
    let wake = Arc::new(Descriptor::default());
    let writer = {
        let (m, wake) = (View::new(&memory), wake.clone());
        thread::spawn(move || {
            let mut producer = Producer::new(place(0, 1));
            assert_eq!(producer.write(&m, &[1]), Ok(1));
            producer.set_flags(&m, DONE_WRITING);
            if producer.take_reader_wait(&m) {
                wake.notify();
            }
        })
    };
    let m = View::new(&memory);
    let mut consumer = Consumer::new(place(0, 1));
    loop {
        let Look { available, flags } = consumer.look(&m).unwrap();
        if available > 0 {
            assert_eq!(m.read(&mut consumer, 1), [1], "stale byte");
        } else if flags != 0 {
            break;
        } else if !consumer.want_data(&m, 1).unwrap() {
            wake.sleep_and_drain();
            consumer.clear_wait(&m);
        }
    }
    assert_eq!(consumer.consumed(), 1, "end of stream before the data");
    writer.join().unwrap();
}

#[test]
fn no_end_of_stream_before_the_data() {
    explore(BOUND, || end_of_stream(Lacks::Nothing));
}

#[test]
#[should_panic(expected = "end of stream before the data")]
fn flags_without_release_are_noticed() {
    explore(BOUND, || end_of_stream(Lacks::FlagReleases));
}

#[test]
fn a_reader_that_closes_wakes_the_writer() {
    explore(BOUND, || {
        let memory = Arc::new(LoomMemory::new(1, 1, Lacks::Nothing));
        let wake = Arc::new(Descriptor::default());
        let writer = {
            let (m, wake) = (View::new(&memory), wake.clone());
            thread::spawn(move || {
                let mut producer = Producer::new(place(0, 1));
                assert_eq!(producer.write(&m, &[1]), Ok(1));
                while !producer.want_room(&m, 1).unwrap() {
                    wake.sleep_and_drain();
                }
                assert_eq!(producer.reader_flags(&m), READER_CLOSED);
            })
        };
        let m = View::new(&memory);
        let consumer = Consumer::new(place(0, 1));
        consumer.set_flags(&m, READER_CLOSED);
        if consumer.take_writer_wait(&m) {
            wake.notify();
        }
        writer.join().unwrap();
    });
}

/// The stall just under 100 % fill: the ring of 8 is full, the writer asks to be woken at a
/// quarter, the reader frees one byte and sleeps until it can see 8 again.
#[test]
fn a_reader_of_whole_records_and_a_writer_do_not_stall() {
    explore(BOUND, || {
        let memory = Arc::new(LoomMemory::new(1, 8, Lacks::Nothing));
        let descriptors = Arc::new((Descriptor::default(), Descriptor::default()));
        let mut producer = Producer::new(place(0, 8));
        let full = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(producer.write(&View::new(&memory), &full), Ok(8));
        let writer = {
            let (m, descriptors) = (View::new(&memory), descriptors.clone());
            thread::spawn(move || {
                while producer.write(&m, &[9]).unwrap() == 0 {
                    if !producer.want_room(&m, 1).unwrap() {
                        descriptors.0.sleep_and_drain();
                    }
                }
                if producer.take_reader_wait(&m) {
                    descriptors.1.notify();
                }
            })
        };
        let m = View::new(&memory);
        let mut consumer = Consumer::new(place(0, 8));
        assert_eq!(m.read(&mut consumer, 1), [1]);
        if consumer.take_writer_wait(&m) {
            descriptors.0.notify();
        }
        while !consumer.want_data(&m, 8).unwrap() {
            if consumer.take_writer_wait(&m) {
                descriptors.0.notify();
            }
            descriptors.1.sleep_and_drain();
        }
        assert_eq!(m.read(&mut consumer, 8), [2, 3, 4, 5, 6, 7, 8, 9]);
        writer.join().unwrap();
    });
}
