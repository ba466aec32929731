//! What the models of rings share: a memory of loom's words and bytes, and descriptors to sleep on.

use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::sync::Arc;

use ivsmc_proto::control::{RING_WORDS, SIZE};
use ivsmc_proto::memory::Memory;
use ivsmc_proto::ring::{Consumer, Place};
use loom::sync::atomic::{fence, AtomicU64, AtomicU8, Ordering};
use loom::sync::{Condvar, Mutex};

/// What a memory leaves out, to see that the models notice.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lacks {
    Nothing,
    /// `fence` does nothing.
    Fences,
    /// What should be Release is Relaxed.
    Releases,
    /// As `Releases`, for the flags alone.
    FlagReleases,
}

/// The words of two control blocks and the bytes of two rings.
pub(crate) struct LoomMemory {
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
pub(crate) const SUMMARY: u64 = 2048;
pub(crate) const DATA: u64 = 4096;
pub(crate) const MOST: u64 = 8;

/// Ring `number` (0 or 1), of `capacity` bytes.
pub(crate) fn place(number: u64, capacity: u64) -> Place {
    assert!(capacity <= MOST);
    Place::new(number * SIZE, DATA + number * MOST, capacity)
}

impl LoomMemory {
    /// As many rings as a model uses; loom pays for each atomic.
    pub(crate) fn new(rings: usize, capacity: u64, lacks: Lacks) -> LoomMemory {
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
pub(crate) struct View {
    memory: Arc<LoomMemory>,
    taken: RefCell<Vec<u8>>,
}

impl View {
    pub(crate) fn new(memory: &Arc<LoomMemory>) -> View {
        View { memory: memory.clone(), taken: RefCell::default() }
    }

    /// Reads at most `most` bytes.
    pub(crate) fn read(&self, consumer: &mut Consumer, most: usize) -> Vec<u8> {
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
pub(crate) fn index(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

/// A descriptor: wake bytes arrive, whoever sleeps on it drains them all.
#[derive(Default)]
pub(crate) struct Descriptor {
    bytes: Mutex<usize>,
    arrived: Condvar,
}

impl Descriptor {
    pub(crate) fn notify(&self) {
        *self.bytes.lock().unwrap() += 1;
        self.arrived.notify_one();
    }

    pub(crate) fn drain(&self) {
        *self.bytes.lock().unwrap() = 0;
    }

    pub(crate) fn sleep_and_drain(&self) {
        let mut bytes = self.bytes.lock().unwrap();
        while *bytes == 0 {
            bytes = self.arrived.wait(bytes).unwrap();
        }
        *bytes = 0;
    }
}
