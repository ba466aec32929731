//! The ring and its wait words under loom: every order in which two or three threads can run the
//! real `Producer` and `Consumer`, with every value a weak memory may let them see.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p ivsmc-proto --release --test ring_loom
//! ```
//!
//! A lost wake-up shows as loom's "deadlock", a missing order as a wrong byte. Both are shown to
//! be found: the `..._is_noticed` tests run the same models with a part taken out.
//!
//! **Bounds.** Models with two threads are explored to a preemption bound of [`BOUND_OF_TWO`],
//! those with two waiters on one end (three threads) to [`BOUND_OF_THREE`]: that many times per
//! execution loom takes a thread off that could go on; switches at a thread that sleeps or ends
//! are not counted. Rings are 1 to 8 bytes. loom 0.7 treats sequentially consistent accesses as
//! acquire-release ones but models the fence; the ring relies on nothing but the fence.
//!
//! Descriptors and futexes are modelled by loom's mutex and condition variable: as in the kernel,
//! what was done before the notification is seen after it.
#![cfg(loom)]

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::sync::Arc;

use ivsmc_proto::control::{DONE_WRITING, READER_CLOSED, RING_WORDS, SIZE};
use ivsmc_proto::memory::Memory;
use ivsmc_proto::ring::{Consumer, Look, Place, Producer};
use ivsmc_proto::summary;
use loom::sync::atomic::{fence, AtomicU32, AtomicU64, AtomicU8, Ordering};
use loom::sync::{Condvar, Mutex};
use loom::thread;

/// Preemption bound of the models with two threads.
const BOUND_OF_TWO: usize = 3;
/// Preemption bound of the models with three threads.
const BOUND_OF_THREE: usize = 3;

/// What a memory leaves out, to see that the models notice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lacks {
    Nothing,
    /// `fence` does nothing.
    Fences,
    /// What should be Release is Relaxed.
    Releases,
    /// As `Releases`, for the flags alone.
    FlagReleases,
}

/// The words of two control blocks and the bytes of two rings.
struct LoomMemory {
    words: Vec<AtomicU64>,
    bytes: Vec<AtomicU8>,
    /// How often each byte was read. A reader counts after it read; a writer looks before it
    /// writes again, and may see an old count unless the reading is over as far as it can know.
    /// (loom lets no load see a later store, so the byte alone would not show it.)
    reads: Vec<AtomicU8>,
    /// How often each byte was written; not shared as far as loom knows.
    writes: std::sync::Mutex<Vec<u8>>,
    /// The first summary word; the others stay zero.
    summary: AtomicU64,
    /// For the other summary words.
    zero: AtomicU64,
    lacks: Lacks,
}

/// Offset of the summary words.
const SUMMARY: u64 = 2048;
const DATA: u64 = 4096;
const MOST: u64 = 8;

/// Ring `number` (0 or 1), of `capacity` bytes.
fn place(number: u64, capacity: u64) -> Place {
    assert!(capacity <= MOST);
    Place::new(number * SIZE, DATA + number * MOST, capacity)
}

impl LoomMemory {
    /// As many rings as a model uses; loom pays for each atomic.
    fn new(rings: usize, capacity: u64, lacks: Lacks) -> LoomMemory {
        let size = index((rings as u64 - 1) * MOST + capacity);
        LoomMemory {
            words: (0..rings * RING_WORDS.len()).map(|_| AtomicU64::new(0)).collect(),
            bytes: (0..size).map(|_| AtomicU8::new(0)).collect(),
            reads: (0..size).map(|_| AtomicU8::new(0)).collect(),
            writes: std::sync::Mutex::new(vec![0; size]),
            summary: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            lacks,
        }
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        if at >= SUMMARY {
            return if at == SUMMARY { &self.summary } else { &self.zero };
        }
        let ring = index(at / SIZE);
        let word = RING_WORDS.iter().position(|offset| *offset == at % SIZE);
        &self.words[ring * RING_WORDS.len() + word.expect("a word of a ring")]
    }

    fn release(&self) -> Ordering {
        match self.lacks {
            Lacks::Releases => Ordering::Relaxed,
            _ => Ordering::AcqRel,
        }
    }
}

/// One thread's sight of the memory: remembers the bytes it copied out, as safe code cannot look
/// into a `[MaybeUninit<u8>]`.
struct View {
    memory: Arc<LoomMemory>,
    taken: RefCell<Vec<u8>>,
}

impl View {
    fn new(memory: &Arc<LoomMemory>) -> View {
        View { memory: memory.clone(), taken: RefCell::default() }
    }

    /// Reads at most `most` bytes.
    fn read(&self, consumer: &mut Consumer, most: usize) -> Vec<u8> {
        self.taken.borrow_mut().clear();
        let mut into = vec![MaybeUninit::uninit(); most];
        let count = consumer.read(self, &mut into).unwrap();
        let taken = self.taken.take();
        assert_eq!(taken.len(), count);
        taken
    }
}

impl Memory for View {
    fn len(&self) -> u64 {
        DATA + 2 * MOST
    }
    fn load(&self, at: u64, order: Ordering) -> u64 {
        self.memory.word(at).load(order)
    }
    fn store(&self, at: u64, value: u64, order: Ordering) {
        let order = match self.memory.lacks {
            Lacks::Releases => Ordering::Relaxed,
            _ => order,
        };
        self.memory.word(at).store(value, order);
    }
    fn swap(&self, at: u64, value: u64) -> u64 {
        self.memory.word(at).swap(value, self.memory.release())
    }
    fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64> {
        self.memory.word(at).compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
    }
    fn fetch_or(&self, at: u64, bits: u64) -> u64 {
        let order = match self.memory.lacks {
            Lacks::FlagReleases => Ordering::Relaxed,
            _ => self.memory.release(),
        };
        self.memory.word(at).fetch_or(bits, order)
    }
    fn fence(&self) {
        if self.memory.lacks != Lacks::Fences {
            fence(Ordering::SeqCst);
        }
    }
    fn write(&self, at: u64, from: &[u8]) {
        for (i, byte) in (index(at - DATA)..).zip(from) {
            let reads = self.memory.reads[i].load(Ordering::Relaxed);
            let mut writes = self.memory.writes.lock().unwrap();
            assert_eq!(reads, writes[i], "byte written again before it was read");
            writes[i] += 1;
            drop(writes);
            self.memory.bytes[i].store(*byte, Ordering::Relaxed);
        }
    }
    fn read(&self, at: u64, into: &mut [MaybeUninit<u8>]) {
        for (i, slot) in (index(at - DATA)..).zip(into) {
            let byte = self.memory.bytes[i].load(Ordering::Relaxed);
            self.memory.reads[i].fetch_add(1, Ordering::Relaxed);
            slot.write(byte);
            self.taken.borrow_mut().push(byte);
        }
    }
}

/// A number of the model as an index.
fn index(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

/// A descriptor: wake bytes arrive, whoever sleeps on it drains them all.
#[derive(Default)]
struct Descriptor {
    bytes: Mutex<usize>,
    arrived: Condvar,
}

impl Descriptor {
    fn notify(&self) {
        *self.bytes.lock().unwrap() += 1;
        self.arrived.notify_one();
    }

    fn sleep_and_drain(&self) {
        let mut bytes = self.bytes.lock().unwrap();
        while *bytes == 0 {
            bytes = self.arrived.wait(bytes).unwrap();
        }
        *bytes = 0;
    }
}

/// Explores `model` to `bound` preemptions and says how much that was.
fn explore(bound: usize, model: impl Fn() + Sync + Send + 'static) {
    let executions = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = executions.clone();
    let start = std::time::Instant::now();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(bound);
    builder.check(move || {
        counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    });
    println!(
        "{} executions to bound {bound}, {:?}",
        executions.load(std::sync::atomic::Ordering::Relaxed),
        start.elapsed()
    );
}

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
    explore(BOUND_OF_TWO, || pass(2, 2, Lacks::Nothing));
}

#[test]
fn a_sleeping_writer_and_a_sleeping_reader_are_woken() {
    explore(BOUND_OF_TWO, || pass(1, 3, Lacks::Nothing));
}

#[test]
fn places_are_written_again_only_after_they_were_read() {
    explore(BOUND_OF_TWO, || pass(2, 4, Lacks::Nothing));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_missing_fence_is_noticed() {
    explore(BOUND_OF_TWO, || pass(1, 2, Lacks::Fences));
}

#[test]
#[should_panic(expected = "stale or lost byte")]
fn a_missing_release_is_noticed() {
    explore(BOUND_OF_TWO, || pass(2, 2, Lacks::Releases));
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
    explore(BOUND_OF_TWO, || end_of_stream(Lacks::Nothing));
}

#[test]
#[should_panic(expected = "end of stream before the data")]
fn flags_without_release_are_noticed() {
    explore(BOUND_OF_TWO, || end_of_stream(Lacks::FlagReleases));
}

#[test]
fn a_reader_that_closes_wakes_the_writer() {
    explore(BOUND_OF_TWO, || {
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
    explore(BOUND_OF_TWO, || {
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

/// What the waiters of one end leave out, to see that the models notice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slip {
    None,
    /// A leader leaves without waking the followers.
    WakesNobody,
    /// A thread leads although a turn has ended since it looked at its condition.
    LeadsUnlooked,
}

/// One end of a session on which several threads wait, as the runtime has it: one leads and
/// sleeps on the descriptor, the others follow on a private futex.
///
/// `turn` is twice the number of turns that ended, plus 1 while somebody leads. Who would wait
/// loads it, looks at its own condition, and then either leads (compare-exchange from what it
/// loaded) or follows (futex on what it loaded): both fail if a turn has ended in between, and
/// then that turn may have drained this thread's byte.
struct End {
    descriptor: Descriptor,
    turn: AtomicU32,
    /// The kernel's side of the futex on `turn`.
    bucket: Mutex<()>,
    woken: Condvar,
    slip: Slip,
}

impl End {
    fn new(slip: Slip) -> End {
        End {
            descriptor: Descriptor::default(),
            turn: AtomicU32::new(0),
            bucket: Mutex::default(),
            woken: Condvar::default(),
            slip,
        }
    }

    /// Sleeps until `ready`, which sets the wait word and looks again before it says no.
    fn sleep(&self, mut ready: impl FnMut() -> bool) {
        loop {
            // Acquire: pairs with the Release of `end_turn`.
            let seen = self.turn.load(Ordering::Acquire);
            if ready() {
                return;
            }
            if seen & 1 == 1 {
                self.futex_wait(seen);
            } else if self.lead(seen) {
                self.descriptor.sleep_and_drain();
                self.end_turn();
            }
        }
    }

    fn lead(&self, seen: u32) -> bool {
        if self.slip == Slip::LeadsUnlooked {
            return self.turn.fetch_or(1, Ordering::AcqRel) & 1 == 0;
        }
        self.turn.compare_exchange(seen, seen + 1, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The leader leaves: whoever sleeps looks at its own condition, and one may lead.
    fn end_turn(&self) {
        // Odd to the next even number. Release: pairs with the Acquire in `sleep` and `lead`.
        self.turn.fetch_add(1, Ordering::AcqRel);
        if self.slip != Slip::WakesNobody {
            self.futex_wake();
        }
    }

    /// Makes every thread inside look at its condition again (a `close` by another thread).
    fn wake_all(&self) {
        self.turn.fetch_add(2, Ordering::AcqRel);
        self.futex_wake();
        self.descriptor.notify();
    }

    fn futex_wait(&self, expected: u32) {
        let bucket = self.bucket.lock().unwrap();
        if self.turn.load(Ordering::Acquire) == expected {
            drop(self.woken.wait(bucket).unwrap());
        }
    }

    fn futex_wake(&self) {
        drop(self.bucket.lock().unwrap());
        self.woken.notify_all();
    }
}

/// A sender that waits for room on ring 0 and a receiver that waits for data on ring 1, on one
/// end; the peer gives both, in the order of `room_first`.
fn two_waiters(room_first: bool, slip: Slip) {
    let memory = Arc::new(LoomMemory::new(2, 1, Lacks::Nothing));
    let end = Arc::new(End::new(slip));
    let mut sender = Producer::new(place(0, 1));
    assert_eq!(sender.write(&View::new(&memory), &[1]), Ok(1));
    let sending = {
        let (m, end) = (View::new(&memory), end.clone());
        thread::spawn(move || {
            end.sleep(|| sender.want_room(&m, 1).unwrap());
            assert_eq!(sender.write(&m, &[2]), Ok(1));
        })
    };
    let receiving = {
        let (m, end) = (View::new(&memory), end.clone());
        thread::spawn(move || {
            let mut receiver = Consumer::new(place(1, 1));
            end.sleep(|| receiver.want_data(&m, 1).unwrap());
            assert_eq!(m.read(&mut receiver, 1), [7]);
        })
    };
    let m = View::new(&memory);
    let mut peer = (Consumer::new(place(0, 1)), Producer::new(place(1, 1)));
    for give_room in [room_first, !room_first] {
        let notify = if give_room {
            assert_eq!(m.read(&mut peer.0, 1), [1]);
            peer.0.take_writer_wait(&m)
        } else {
            assert_eq!(peer.1.write(&m, &[7]), Ok(1));
            peer.1.take_reader_wait(&m)
        };
        if notify {
            end.descriptor.notify();
        }
    }
    sending.join().unwrap();
    receiving.join().unwrap();
}

/// As [`two_waiters`], but the receiver gets no data: it leaves because the session is closed
/// for reading by another thread, while the sender goes on waiting for its room.
fn a_waiter_leaves(slip: Slip) {
    let memory = Arc::new(LoomMemory::new(2, 1, Lacks::Nothing));
    let end = Arc::new(End::new(slip));
    let closed = Arc::new(AtomicU32::new(0));
    let mut sender = Producer::new(place(0, 1));
    assert_eq!(sender.write(&View::new(&memory), &[1]), Ok(1));
    let sending = {
        let (m, end) = (View::new(&memory), end.clone());
        thread::spawn(move || {
            end.sleep(|| sender.want_room(&m, 1).unwrap());
            assert_eq!(sender.write(&m, &[2]), Ok(1));
        })
    };
    let receiving = {
        let (m, end, closed) = (View::new(&memory), end.clone(), closed.clone());
        thread::spawn(move || {
            let mut receiver = Consumer::new(place(1, 1));
            end.sleep(|| closed.load(Ordering::Acquire) == 1 || receiver.want_data(&m, 1).unwrap());
            receiver.clear_wait(&m);
        })
    };
    closed.store(1, Ordering::Release);
    end.wake_all();
    let m = View::new(&memory);
    let mut peer = Consumer::new(place(0, 1));
    assert_eq!(m.read(&mut peer, 1), [1]);
    if peer.take_writer_wait(&m) {
        end.descriptor.notify();
    }
    sending.join().unwrap();
    receiving.join().unwrap();
}

#[test]
fn two_waiters_on_one_end_are_woken_room_first() {
    explore(BOUND_OF_THREE, || two_waiters(true, Slip::None));
}

#[test]
fn two_waiters_on_one_end_are_woken_data_first() {
    explore(BOUND_OF_THREE, || two_waiters(false, Slip::None));
}

#[test]
fn a_waiter_that_leaves_hands_the_lead_on() {
    explore(BOUND_OF_THREE, || a_waiter_leaves(Slip::None));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_leader_that_wakes_nobody_is_noticed() {
    explore(BOUND_OF_THREE, || two_waiters(true, Slip::WakesNobody));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_lead_taken_without_a_look_is_noticed() {
    explore(BOUND_OF_THREE, || two_waiters(true, Slip::LeadsUnlooked));
}

/// What is left out or turned round around the doorbell, to see that the models notice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// The doorbell is notified before the bit is set.
    NotifiesFirst,
    /// The bits are taken before the doorbell is drained.
    TakesFirst,
    /// A leader leaves and nobody leads after it.
    LeavesTheLead,
}

/// Two sessions of one process, each with a thread that sleeps, and one doorbell for both, as the
/// runtime has it: one thread leads, drains and wakes the other by its bell.
struct Door {
    /// What the kernel has: the doorbell's count, and that of either thread's bell.
    counts: Mutex<(usize, [usize; 2])>,
    arrived: Condvar,
    /// Who sleeps, and who of them leads.
    sleepers: Mutex<([bool; 2], Option<usize>)>,
    fault: Fault,
}

impl Door {
    fn new(fault: Fault) -> Door {
        Door {
            counts: Mutex::new((0, [0; 2])),
            arrived: Condvar::new(),
            sleepers: Mutex::new(([false; 2], None)),
            fault,
        }
    }

    fn notify(&self, m: &View, number: u16) {
        if self.fault != Fault::NotifiesFirst {
            summary::set(m, SUMMARY, number);
        }
        self.counts.lock().unwrap().0 += 1;
        self.arrived.notify_all();
        if self.fault == Fault::NotifiesFirst {
            summary::set(m, SUMMARY, number);
        }
    }

    fn ring(&self, bell: usize) {
        self.counts.lock().unwrap().1[bell] += 1;
        self.arrived.notify_all();
    }

    /// Polls the own bell, and the doorbell if this thread leads; whether either has something.
    fn poll(&self, me: usize, leads: bool) -> (bool, bool) {
        let mut counts = self.counts.lock().unwrap();
        while counts.1[me] == 0 && (!leads || counts.0 == 0) {
            counts = self.arrived.wait(counts).unwrap();
        }
        let rung = std::mem::take(&mut counts.1[me]) > 0;
        (rung, leads && counts.0 > 0)
    }

    /// Wakes whom the doorbell concerns; whether that is the caller.
    fn drain(&self, m: &View, me: usize) -> bool {
        let mut taken = [false; 2];
        let mut take = || summary::take(m, SUMMARY, |number| taken[usize::from(number)] = true);
        if self.fault == Fault::TakesFirst {
            take();
            self.counts.lock().unwrap().0 = 0;
        } else {
            self.counts.lock().unwrap().0 = 0;
            take();
        }
        if taken[1 - me] {
            self.ring(1 - me);
        }
        taken[me]
    }

    /// Sleeps until `ready`, which sets the wait word and looks again before it says no.
    fn sleep(&self, m: &View, me: usize, mut ready: impl FnMut() -> bool) {
        while !ready() {
            {
                let mut sleepers = self.sleepers.lock().unwrap();
                sleepers.0[me] = true;
                sleepers.1.get_or_insert(me);
            }
            loop {
                let leads = self.sleepers.lock().unwrap().1 == Some(me);
                let (rung, doorbell) = self.poll(me, leads);
                if doorbell && self.drain(m, me) {
                    break;
                }
                // Another leader woke this thread, or left the lead to it.
                if rung && ready() {
                    break;
                }
            }
            let next = {
                let mut sleepers = self.sleepers.lock().unwrap();
                sleepers.0[me] = false;
                if sleepers.1 == Some(me) && self.fault != Fault::LeavesTheLead {
                    sleepers.1 = sleepers.0[1 - me].then_some(1 - me);
                    sleepers.1
                } else {
                    None
                }
            };
            if let Some(next) = next {
                self.ring(next);
            }
        }
    }
}

/// The peer sends one byte on either session; each thread waits for its own.
fn two_sessions_and_one_doorbell(fault: Fault) {
    let memory = Arc::new(LoomMemory::new(2, 1, Lacks::Nothing));
    let door = Arc::new(Door::new(fault));
    let receive = |session: u16| {
        let (m, door) = (View::new(&memory), door.clone());
        move || {
            let mut consumer = Consumer::new(place(u64::from(session), 1));
            door.sleep(&m, usize::from(session), || consumer.want_data(&m, 1).unwrap());
            assert_eq!(m.read(&mut consumer, 1), [7]);
        }
    };
    let threads = [thread::spawn(receive(0)), thread::spawn(receive(1))];
    let m = View::new(&memory);
    for session in [0, 1] {
        let mut producer = Producer::new(place(u64::from(session), 1));
        assert_eq!(producer.write(&m, &[7]), Ok(1));
        if producer.take_reader_wait(&m) {
            door.notify(&m, session);
        }
    }
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_doorbell_wakes_the_session_it_is_about() {
    explore(BOUND_OF_THREE, || two_sessions_and_one_doorbell(Fault::None));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_doorbell_before_its_bit_is_noticed() {
    explore(BOUND_OF_THREE, || two_sessions_and_one_doorbell(Fault::NotifiesFirst));
}

#[test]
#[should_panic(expected = "deadlock")]
fn bits_taken_before_the_doorbell_is_drained_are_noticed() {
    explore(BOUND_OF_THREE, || two_sessions_and_one_doorbell(Fault::TakesFirst));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_doorbell_that_nobody_leads_on_is_noticed() {
    explore(BOUND_OF_THREE, || two_sessions_and_one_doorbell(Fault::LeavesTheLead));
}
