//! A region under loom: the real `Region` on words of which those that a model changes are loom's.
//!
//! A region has some hundred thousand words and loom pays for each. So all are plain at first, and
//! stay so while they are only read. The first attempt to change one ends the exploration and begins
//! it anew with that word as one of loom's; and so on, until no execution changes a word that is not.
//!
//! The bytes of a DMB are one cell of loom's for each granule: two accesses to it, one of them
//! writing, that nothing orders end the model ("Causality violation"). That is what two writers of
//! one DMB would be, and memory that is used again while somebody may still write it.

use std::collections::BTreeSet;
use std::mem::MaybeUninit;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use ivsmc_proto::layout::{GRANULE, MIN_REGION, WORD};
use ivsmc_proto::memory::Memory;
use ivsmc_proto::region::Region;
use loom::cell::UnsafeCell;
use loom::sync::atomic::{fence, AtomicU64, Ordering};

use crate::plain::Words;

/// What a memory leaves out, to see that the models notice.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lacks {
    Nothing,
    /// `fence` does nothing.
    Fences,
    /// All accesses are Relaxed.
    Orders,
}

/// Granules whose bytes a model may touch: those of the first two extents.
const GRANULES: u64 = 8;

/// What a model begins with.
struct Start {
    /// All words.
    words: Vec<u64>,
    /// By word: 1 + its number among those of loom, 0 for a plain one.
    numbers: Vec<u16>,
    /// The offsets of those of loom.
    changing: Vec<u64>,
    /// Offset of the first granule.
    data: u64,
    /// The words that are to become loom's, too.
    missed: Arc<Mutex<BTreeSet<u64>>>,
}

/// The memory of one execution.
pub(crate) struct LoomWords {
    start: Arc<Start>,
    words: Vec<AtomicU64>,
    granules: Vec<UnsafeCell<()>>,
    lacks: Lacks,
}

/// The region of one execution, whose threads loom runs on one.
pub(crate) type LoomRegion = Region<LoomWords>;

/// Unwinds from an execution that changed a plain word.
struct Missed;

impl LoomWords {
    fn new(start: &Arc<Start>, lacks: Lacks) -> LoomWords {
        let word = |at: &u64| AtomicU64::new(start.words[index(*at)]);
        LoomWords {
            words: start.changing.iter().map(word).collect(),
            granules: (0..GRANULES).map(|_| UnsafeCell::new(())).collect(),
            start: start.clone(),
            lacks,
        }
    }

    /// The word at `at` if it is one of loom's.
    fn word(&self, at: u64) -> Option<&AtomicU64> {
        let number = usize::from(self.start.numbers[index(at)]);
        Some(&self.words[number.checked_sub(1)?])
    }

    /// The word at `at`, which is about to be changed.
    fn changing(&self, at: u64) -> &AtomicU64 {
        self.word(at).unwrap_or_else(|| {
            self.start.missed.lock().unwrap().insert(at);
            resume_unwind(Box::new(Missed));
        })
    }

    fn order(&self, order: Ordering) -> Ordering {
        match self.lacks {
            Lacks::Orders => Ordering::Relaxed,
            _ => order,
        }
    }

    fn granule(&self, at: u64) -> &UnsafeCell<()> {
        &self.granules[usize::try_from((at - self.start.data) / GRANULE).unwrap()]
    }
}

fn index(at: u64) -> usize {
    usize::try_from(at / WORD).unwrap()
}

impl Memory for LoomWords {
    fn len(&self) -> u64 {
        MIN_REGION
    }
    fn load(&self, at: u64, order: Ordering) -> u64 {
        match self.word(at) {
            Some(word) => word.load(self.order(order)),
            None => self.start.words[index(at)],
        }
    }
    fn store(&self, at: u64, value: u64, order: Ordering) {
        // The same value orders nothing that it did not order before.
        if self.word(at).is_some() || self.start.words[index(at)] != value {
            self.changing(at).store(value, self.order(order));
        }
    }
    fn swap(&self, at: u64, value: u64) -> u64 {
        self.changing(at).swap(value, self.order(Ordering::AcqRel))
    }
    fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64> {
        match self.start.words[index(at)] {
            found if found != current && self.word(at).is_none() => Err(found),
            _ => self.changing(at).compare_exchange(
                current,
                new,
                self.order(Ordering::AcqRel),
                self.order(Ordering::Acquire),
            ),
        }
    }
    fn fetch_or(&self, at: u64, bits: u64) -> u64 {
        self.changing(at).fetch_or(bits, self.order(Ordering::AcqRel))
    }
    fn fence(&self) {
        if self.lacks != Lacks::Fences {
            fence(Ordering::SeqCst);
        }
    }
    fn write(&self, at: u64, _: &[u8]) {
        self.granule(at).with_mut(|_| ());
    }
    fn read(&self, at: u64, _: &mut [MaybeUninit<u8>]) {
        self.granule(at).with(|_| ());
    }
}

/// Explores `model`, to `bound` preemptions, on regions that `prepare` has brought to where the model
/// begins; what that returns the model gets, too.
pub(crate) fn explore<S: Send + Sync + 'static>(
    bound: usize,
    lacks: Lacks,
    prepare: impl Fn(&Region<Words>) -> S,
    model: impl Fn(&Rc<LoomRegion>, &S) + Send + Sync + 'static,
) {
    let prepared = Region::attach(Words::default(), 1).unwrap();
    let state = Arc::new(prepare(&prepared));
    let words: Vec<u64> = (0..MIN_REGION)
        .step_by(8)
        .map(|at| prepared.memory().load(at, Ordering::Relaxed))
        .collect();
    let model = Arc::new(model);
    let missed = Arc::new(Mutex::new(BTreeSet::new()));
    loop {
        let changing: Vec<u64> = missed.lock().unwrap().iter().copied().collect();
        let mut numbers = vec![0; words.len()];
        for (at, number) in changing.iter().zip(1..) {
            numbers[index(*at)] = number;
        }
        let start = Arc::new(Start {
            words: words.clone(),
            numbers,
            data: prepared.geometry().extent_ranges(0).1.start,
            missed: missed.clone(),
            changing,
        });
        let (model, state) = (model.clone(), state.clone());
        let explored = catch_unwind(AssertUnwindSafe(|| {
            crate::explore(bound, move || {
                let region = Region::attach(LoomWords::new(&start, lacks), 1).unwrap();
                model(&Rc::new(region), &state);
            });
        }));
        match explored {
            Ok(()) => return,
            Err(cause) if cause.is::<Missed>() => {}
            Err(cause) => resume_unwind(cause),
        }
    }
}
