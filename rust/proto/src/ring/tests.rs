//! The ring over heap memory: against a model, against a hostile peer, between two threads.

extern crate std;

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::mem::MaybeUninit;
use core::sync::atomic::Ordering;

use super::{Consumer, Look, PeerMisbehaved, Place, Producer};
use crate::control::{self, *};
use crate::heap::HeapMemory;
use crate::memory::Memory;

/// A heap memory that remembers which bytes it copied to where: safe code cannot look at what a
/// `[MaybeUninit<u8>]` holds.
struct Tap {
    memory: Arc<HeapMemory>,
    /// Address copied to, and the bytes.
    taken: RefCell<Vec<(usize, Vec<u8>)>>,
}

impl Tap {
    fn new(memory: &Arc<HeapMemory>) -> Tap {
        Tap { memory: memory.clone(), taken: RefCell::default() }
    }

    /// What `copy` put into a buffer of `length` bytes, as it says how many.
    fn bytes(
        &self,
        length: usize,
        copy: impl FnOnce(&mut [MaybeUninit<u8>]) -> Result<usize, PeerMisbehaved>,
    ) -> Result<Vec<u8>, PeerMisbehaved> {
        self.taken.borrow_mut().clear();
        let mut into = vec![MaybeUninit::uninit(); length];
        let base = into.as_ptr() as usize;
        let count = copy(&mut into)?;
        let mut bytes = Vec::new();
        for (address, piece) in self.taken.borrow().iter() {
            assert_eq!(*address, base + bytes.len(), "pieces follow each other");
            bytes.extend_from_slice(piece);
        }
        assert_eq!(bytes.len(), count);
        Ok(bytes)
    }
}

impl Memory for Tap {
    fn len(&self) -> u64 {
        self.memory.len()
    }
    fn load(&self, at: u64, order: Ordering) -> u64 {
        self.memory.load(at, order)
    }
    fn store(&self, at: u64, value: u64, order: Ordering) {
        self.memory.store(at, value, order);
    }
    fn swap(&self, at: u64, value: u64) -> u64 {
        self.memory.swap(at, value)
    }
    fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64> {
        self.memory.compare_exchange(at, current, new)
    }
    fn fetch_or(&self, at: u64, bits: u64) -> u64 {
        self.memory.fetch_or(at, bits)
    }
    fn fence(&self) {
        self.memory.fence();
    }
    fn write(&self, at: u64, from: &[u8]) {
        self.memory.write(at, from);
    }
    fn read(&self, at: u64, into: &mut [MaybeUninit<u8>]) {
        self.memory.read(at, into);
        let piece = self.memory.bytes(at, into.len());
        self.taken.borrow_mut().push((into.as_ptr() as usize, piece));
    }
}

/// Offsets as in a region: control blocks apart from the bytes.
const CONTROL: u64 = 64;
const DATA: u64 = 512;

fn pair(capacity: u64) -> (Tap, Producer, Consumer) {
    let memory = Arc::new(HeapMemory::new(DATA + capacity + 64));
    let place = Place::new(CONTROL, DATA, capacity);
    (Tap::new(&memory), Producer::new(place), Consumer::new(place))
}

fn read(m: &Tap, consumer: &mut Consumer, length: usize) -> Vec<u8> {
    m.bytes(length, |into| consumer.read(m, into)).unwrap()
}

fn peek(m: &Tap, consumer: &mut Consumer, skip: u64, length: usize) -> Vec<u8> {
    m.bytes(length, |into| consumer.peek(m, skip, into)).unwrap()
}

fn word(m: &Tap, offset: u64) -> u64 {
    m.load(CONTROL + offset, Ordering::Relaxed)
}

fn set_word(m: &Tap, offset: u64, value: u64) {
    m.store(CONTROL + offset, value, Ordering::Relaxed);
}

/// xorshift64*: sizes from a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % limit
    }

    fn size(&mut self, limit: u64) -> usize {
        usize::try_from(self.below(limit)).unwrap()
    }
}

#[test]
fn agrees_with_a_queue_over_many_wraps() {
    for (seed, capacity) in [(1, 1), (2, 2), (3, 16), (4, 64), (5, 256), (6, 4096)] {
        let mut random = Random(seed);
        let (m, mut producer, mut consumer) = pair(capacity);
        let mut model: VecDeque<u8> = VecDeque::new();
        let mut next: u8 = 0;
        while producer.produced() < 50 * capacity + 1000 {
            match random.below(5) {
                0 | 1 => {
                    let data: Vec<u8> = (0..random.size(capacity * 3 / 2 + 2))
                        .map(|i| next.wrapping_add(i.to_le_bytes()[0]))
                        .collect();
                    let room = usize::try_from(capacity).unwrap() - model.len();
                    let written = producer.write(&m, &data).unwrap();
                    assert_eq!(written, room.min(data.len()), "seed {seed}");
                    model.extend(&data[..written]);
                    next = next.wrapping_add(written.to_le_bytes()[0]);
                }
                2 => {
                    let wanted = random.size(capacity * 3 / 2 + 2);
                    let expected: Vec<u8> = model.drain(..wanted.min(model.len())).collect();
                    assert_eq!(read(&m, &mut consumer, wanted), expected, "seed {seed}");
                }
                3 => {
                    let skip = random.below(capacity + 2);
                    let wanted = random.size(capacity + 2);
                    let expected: Vec<u8> = model
                        .iter()
                        .skip(usize::try_from(skip).unwrap())
                        .take(wanted)
                        .copied()
                        .collect();
                    assert_eq!(peek(&m, &mut consumer, skip, wanted), expected);
                }
                _ => {
                    let wanted = random.below(capacity / 2 + 2);
                    let skipped = consumer.skip(&m, wanted).unwrap();
                    assert_eq!(skipped, wanted.min(model.len() as u64));
                    model.drain(..usize::try_from(skipped).unwrap());
                }
            }
            let held = model.len() as u64;
            assert_eq!(producer.room(&m), Ok(capacity - held));
            assert_eq!(producer.in_flight(&m), Ok(held));
            assert_eq!(consumer.available(&m), Ok(held));
        }
        assert_eq!(m.memory.bytes(DATA + capacity, 64), [0; 64], "beyond");
        assert_eq!(m.memory.bytes(384, 128), [0; 128], "before");
    }
}

#[test]
fn the_other_cursor_is_looked_at_only_when_needed() {
    let (m, mut producer, mut consumer) = pair(16);
    assert_eq!(producer.write(&m, &[1; 8]), Ok(8));
    set_word(&m, CONSUMED, 99);
    assert_eq!(producer.write(&m, &[2; 8]), Ok(8), "8 bytes known to fit");
    set_word(&m, CONSUMED, 0);
    assert_eq!(read(&m, &mut consumer, 4), [1; 4]);
    set_word(&m, PRODUCED, 99);
    assert_eq!(read(&m, &mut consumer, 4), [1; 4]);
    assert_eq!(consumer.skip(&m, 8), Ok(8), "16 bytes known to be there");
}

/// Everything an end could change, to see that it did not.
fn everything(m: &Tap) -> Vec<u8> {
    m.memory.bytes(0, usize::try_from(m.len()).unwrap())
}

#[test]
fn a_consumed_out_of_range_poisons_the_producer() {
    // 100 bytes written, 60 read, 60 accepted; capacity 64: 60..=100 is right.
    for hostile in [0, 59, 101, 124, 164, u64::MAX, u64::MAX - 63, 1 << 63] {
        let (m, mut producer, mut consumer) = pair(64);
        for _ in 0..5 {
            producer.write(&m, &[7; 12]).unwrap();
            read(&m, &mut consumer, 12);
        }
        producer.room(&m).unwrap();
        producer.write(&m, &[7; 40]).unwrap();
        set_word(&m, CONSUMED, hostile);
        let before = everything(&m);
        let error = producer.write(&m, &[1; 30]).unwrap_err();
        assert_eq!(error.value, hostile);
        set_word(&m, CONSUMED, 60);
        assert_eq!(producer.write(&m, &[1]), Err(error));
        assert_eq!(producer.write(&m, &[]), Err(error));
        assert_eq!(producer.room(&m), Err(error));
        assert_eq!(producer.in_flight(&m), Err(error));
        assert_eq!(producer.want_room(&m, 1), Err(error));
        assert_eq!(producer.poisoned(), Some(error));
        set_word(&m, CONSUMED, hostile);
        assert_eq!(everything(&m), before, "nothing touched");
        producer.set_flags(&m, WRITER_ABORTED);
        assert_eq!(consumer.writer_flags(&m), WRITER_ABORTED);
    }
}

#[test]
fn a_produced_out_of_range_poisons_the_consumer() {
    // 60 bytes read, 100 accepted; capacity 64: 100..=124 is right.
    for hostile in [0, 59, 60, 99, 125, 164, u64::MAX, 1 << 63] {
        let (m, mut producer, mut consumer) = pair(64);
        for _ in 0..5 {
            producer.write(&m, &[7; 12]).unwrap();
            read(&m, &mut consumer, 12);
        }
        producer.write(&m, &[7; 40]).unwrap();
        consumer.available(&m).unwrap();
        set_word(&m, PRODUCED, hostile);
        let before = everything(&m);
        let mut into = [MaybeUninit::uninit(); 41];
        let error = consumer.read(&m, &mut into).unwrap_err();
        assert_eq!(error.value, hostile);
        set_word(&m, PRODUCED, 100);
        assert_eq!(consumer.read(&m, &mut into[..1]), Err(error));
        assert_eq!(consumer.read(&m, &mut []), Err(error));
        assert_eq!(consumer.peek(&m, 0, &mut into), Err(error));
        assert_eq!(consumer.skip(&m, 1), Err(error));
        assert_eq!(consumer.available(&m), Err(error));
        assert_eq!(consumer.look(&m), Err(error));
        assert_eq!(consumer.want_data(&m, 1), Err(error));
        assert_eq!(consumer.poisoned(), Some(error));
        assert_eq!(m.taken.borrow().iter().filter(|t| t.1.len() > 12).count(), 0);
        set_word(&m, PRODUCED, hostile);
        assert_eq!(everything(&m), before, "nothing touched");
        consumer.set_flags(&m, READER_ABORTED);
        assert_eq!(producer.reader_flags(&m), READER_ABORTED);
    }
}

#[test]
fn every_value_in_range_is_accepted() {
    for right in 60..=100 {
        let (m, mut producer, mut consumer) = pair(64);
        producer.write(&m, &[7; 60]).unwrap();
        consumer.skip(&m, 60).unwrap();
        producer.room(&m).unwrap();
        producer.write(&m, &[7; 40]).unwrap();
        set_word(&m, CONSUMED, right);
        assert_eq!(producer.in_flight(&m), Ok(100 - right));
    }
    for right in 100..=124 {
        let (m, mut producer, mut consumer) = pair(64);
        producer.write(&m, &[7; 60]).unwrap();
        consumer.skip(&m, 60).unwrap();
        producer.write(&m, &[7; 40]).unwrap();
        consumer.available(&m).unwrap();
        set_word(&m, PRODUCED, right);
        assert_eq!(consumer.available(&m), Ok(right - 60));
    }
}

#[test]
fn cursors_past_the_end_of_u64_do_not_panic() {
    let (m, mut producer, mut consumer) = pair(16);
    let start = u64::MAX - 20;
    (producer.produced, producer.consumed) = (start, start);
    (consumer.produced, consumer.consumed) = (start, start);
    set_word(&m, PRODUCED, start);
    set_word(&m, CONSUMED, start);
    for round in 0..20 {
        assert_eq!(producer.write(&m, &[round; 20]), Ok(16));
        assert_eq!(producer.want_room(&m, 1), Ok(false));
        assert_eq!(read(&m, &mut consumer, 20), [round; 16]);
        consumer.take_writer_wait(&m);
        assert_eq!(consumer.want_data(&m, 16), Ok(false));
        consumer.clear_wait(&m);
        producer.clear_wait(&m);
    }
}

#[test]
fn the_writer_is_woken_once_a_quarter_is_free() {
    let (m, mut producer, mut consumer) = pair(64);
    producer.write(&m, &[1; 64]).unwrap();
    assert_eq!(producer.want_room(&m, 1), Ok(false));
    assert!(producer.place().writer_waits(&m));
    let mut woken_at = Vec::new();
    for taken in 1..=64 {
        consumer.skip(&m, 1).unwrap();
        if consumer.take_writer_wait(&m) {
            woken_at.push(taken);
            assert!(!producer.place().writer_waits(&m));
        }
    }
    assert_eq!(woken_at, [16]);
}

#[test]
fn the_writer_is_woken_between_a_quarter_and_half() {
    for (bytes, at) in [(0, 16), (1, 16), (17, 17), (32, 32), (33, 32), (u64::MAX, 32)] {
        let (m, mut producer, mut consumer) = pair(64);
        producer.write(&m, &[1; 64]).unwrap();
        assert_eq!(producer.want_room(&m, bytes), Ok(false));
        assert_eq!(word(&m, WRITER_WAIT), at);
        consumer.skip(&m, at - 1).unwrap();
        assert!(!consumer.take_writer_wait(&m), "{bytes} bytes");
        consumer.skip(&m, 1).unwrap();
        assert!(consumer.take_writer_wait(&m), "{bytes} bytes");
        assert!(!consumer.take_writer_wait(&m), "taken once");
    }
}

#[test]
fn the_smallest_rings_wake_at_one_byte() {
    for capacity in [1, 2, 4] {
        let (m, mut producer, mut consumer) = pair(capacity);
        assert_eq!(producer.write(&m, &[1; 9]), Ok(usize::try_from(capacity).unwrap()));
        assert_eq!(producer.want_room(&m, 1), Ok(false));
        consumer.skip(&m, 1).unwrap();
        assert!(consumer.take_writer_wait(&m));
    }
}

#[test]
fn a_writer_that_finds_room_does_not_wait() {
    let (m, mut producer, mut consumer) = pair(64);
    assert_eq!(producer.want_room(&m, 99), Ok(true));
    producer.write(&m, &[1; 64]).unwrap();
    assert_eq!(producer.want_room(&m, 99), Ok(false));
    assert!(producer.place().writer_waits(&m));
    producer.clear_wait(&m);
    assert!(!producer.place().writer_waits(&m));
    consumer.skip(&m, 1).unwrap();
    assert_eq!(producer.want_room(&m, 99), Ok(true), "one byte is used");
    assert!(!producer.place().writer_waits(&m));
}

#[test]
fn a_reader_that_waits_wakes_the_writer_at_any_fill() {
    let (m, mut producer, mut consumer) = pair(64);
    producer.write(&m, &[1; 64]).unwrap();
    assert_eq!(producer.want_room(&m, 1), Ok(false));
    consumer.skip(&m, 1).unwrap();
    assert!(!consumer.take_writer_wait(&m));
    assert_eq!(consumer.want_data(&m, 64), Ok(false), "63 of 64");
    assert!(consumer.take_writer_wait(&m));
    assert_eq!(producer.write(&m, &[2; 9]), Ok(1));
    assert!(producer.take_reader_wait(&m));
    assert_eq!(consumer.want_data(&m, 64), Ok(true));
    assert_eq!(word(&m, READER_WAIT), 0);
}

#[test]
fn hostile_thresholds_wake_or_do_not_and_nothing_else() {
    for threshold in [0, 1, 8, 9, 1000, 1 << 63, u64::MAX] {
        let (m, mut producer, mut consumer) = pair(64);
        producer.write(&m, &[1; 64]).unwrap();
        consumer.skip(&m, 8).unwrap();
        set_word(&m, WRITER_WAIT, threshold);
        let wakes = (1..=8).contains(&threshold);
        assert_eq!(consumer.take_writer_wait(&m), wakes, "{threshold}");
        assert_eq!(word(&m, WRITER_WAIT), if wakes { 0 } else { threshold });
        consumer.set_flags(&m, READER_CLOSED);
        assert_eq!(consumer.take_writer_wait(&m), !wakes && threshold != 0);
    }
}

#[test]
fn the_reader_is_woken_by_any_publication_once() {
    let (m, mut producer, mut consumer) = pair(64);
    assert!(!producer.take_reader_wait(&m));
    assert_eq!(consumer.want_data(&m, 1), Ok(false));
    assert!(consumer.place().reader_waits(&m));
    producer.write(&m, &[1]).unwrap();
    assert!(producer.take_reader_wait(&m));
    assert!(!producer.take_reader_wait(&m));
    assert!(!consumer.place().reader_waits(&m));
    assert_eq!(consumer.want_data(&m, 1), Ok(true));
    assert_eq!(word(&m, READER_WAIT), 0, "not set, or cleared again");
}

#[test]
fn end_flags_keep_both_ends_from_sleeping() {
    let (m, mut producer, mut consumer) = pair(64);
    assert_eq!(consumer.want_data(&m, 1), Ok(false));
    producer.set_flags(&m, DONE_WRITING);
    assert!(producer.take_reader_wait(&m));
    assert_eq!(consumer.want_data(&m, 1), Ok(true));
    let end = Look { available: 0, flags: DONE_WRITING };
    assert_eq!(consumer.look(&m), Ok(end));
    producer.set_flags(&m, WRITER_CLOSED);
    assert_eq!(consumer.writer_flags(&m), DONE_WRITING | WRITER_CLOSED);

    producer.write(&m, &[1; 64]).unwrap();
    assert_eq!(producer.want_room(&m, 1), Ok(false));
    consumer.set_flags(&m, READER_CLOSED);
    assert!(consumer.take_writer_wait(&m));
    assert_eq!(producer.want_room(&m, 1), Ok(true));
    assert_eq!(producer.reader_flags(&m), READER_CLOSED);
}

#[test]
fn unknown_flags_are_not_looked_at() {
    let (m, mut producer, mut consumer) = pair(64);
    producer.write(&m, &[1; 64]).unwrap();
    set_word(&m, WRITER_FLAGS, !WRITER_FLAGS_KNOWN);
    set_word(&m, READER_FLAGS, !READER_ENDS);
    assert_eq!(consumer.writer_flags(&m), 0);
    assert_eq!(producer.reader_flags(&m), 0);
    assert_eq!(producer.want_room(&m, 1), Ok(false), "no spinning on them");
    consumer.skip(&m, 64).unwrap();
    assert_eq!(consumer.want_data(&m, 1), Ok(false), "no spinning on them");
}

#[test]
fn the_control_words_are_where_the_protocol_says() {
    let (m, mut producer, mut consumer) = pair(64);
    producer.write(&m, &[1; 5]).unwrap();
    consumer.skip(&m, 3).unwrap();
    assert_eq!((word(&m, PRODUCED), word(&m, CONSUMED)), (5, 3));
    assert_eq!(word(&m, STATE), 0);
    assert_eq!(control::SIZE, 320);
    assert_eq!((PRODUCED, WRITER_FLAGS), (64, 72));
    assert_eq!((CONSUMED, READER_FLAGS), (128, 136));
    assert_eq!((READER_WAIT, WRITER_WAIT), (192, 256));
}

#[test]
#[should_panic(expected = "power of two")]
fn a_capacity_that_is_no_power_of_two_panics() {
    let _ = Place::new(0, 512, 48);
}

/// Byte `n` of the stream of the two-thread test.
fn pattern(n: u64) -> u8 {
    (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56).to_le_bytes()[0]
}

#[test]
fn two_threads_pass_millions_of_bytes() {
    const TOTAL: u64 = 4 << 20;
    let (m, mut producer, mut consumer) = pair(4096);
    let memory = m.memory.clone();
    let writer = std::thread::spawn(move || {
        let mut random = Random(11);
        while producer.produced() < TOTAL {
            let start = producer.produced();
            let size = (random.below(3000) + 1).min(TOTAL - start);
            let data: Vec<u8> = (start..start + size).map(pattern).collect();
            if producer.write(&memory, &data).unwrap() == 0 {
                std::thread::yield_now();
            }
        }
    });
    let mut random = Random(13);
    while consumer.consumed() < TOTAL {
        let start = consumer.consumed();
        let bytes = read(&m, &mut consumer, random.size(3000) + 1);
        for (i, byte) in (start..).zip(&bytes) {
            assert_eq!(*byte, pattern(i), "byte {i}");
        }
        if bytes.is_empty() {
            std::thread::yield_now();
        }
    }
    writer.join().unwrap();
}

#[test]
fn two_threads_that_sleep_always_wake() {
    // Park and unpark are the notification: a lost one hangs the test.
    const TOTAL: u64 = 1 << 20;
    let (m, mut producer, mut consumer) = pair(256);
    let memory = m.memory.clone();
    let reader = std::thread::current();
    let writer = std::thread::spawn(move || {
        while producer.produced() < TOTAL {
            let start = producer.produced();
            let size = (TOTAL - start).min(100);
            let data: Vec<u8> = (start..start + size).map(pattern).collect();
            let written = producer.write(&memory, &data).unwrap();
            if producer.take_reader_wait(&memory) {
                reader.unpark();
            }
            if written == 0 && !producer.want_room(&memory, 1).unwrap() {
                std::thread::park();
                producer.clear_wait(&memory);
            }
        }
        producer.set_flags(&memory, DONE_WRITING);
        if producer.take_reader_wait(&memory) {
            reader.unpark();
        }
    });
    loop {
        let Look { available, flags } = consumer.look(&m).unwrap();
        if available == 0 && flags == DONE_WRITING {
            break;
        }
        let start = consumer.consumed();
        let bytes = read(&m, &mut consumer, 77);
        if consumer.take_writer_wait(&m) {
            writer.thread().unpark();
        }
        for (i, byte) in (start..).zip(&bytes) {
            assert_eq!(*byte, pattern(i), "byte {i}");
        }
        if bytes.is_empty() && !consumer.want_data(&m, 1).unwrap() {
            std::thread::park();
            consumer.clear_wait(&m);
        }
    }
    assert_eq!(consumer.consumed(), TOTAL);
    writer.join().unwrap();
}
