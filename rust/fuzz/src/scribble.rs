//! A memory in which somebody else writes whatever they like, between any two accesses of ours.
//!
//! Who scribbles follows a script, which is played again and again: so a loop that goes on as long as the
//! other end keeps changing a word goes on for ever here, and is found by its number of accesses.

use std::cell::{Cell, RefCell};
use std::iter;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::Ordering;

use ivsmc_proto::heap::HeapMemory;
use ivsmc_proto::memory::Memory;

/// Bytes of a word.
const WORD: u64 = 8;

/// Accesses that one call may make: several times what the longest takes in the smallest region.
const ACCESSES: u64 = 200_000;

/// One thing done to a word just before it, or one near it, is accessed.
#[derive(Clone, Copy, Debug)]
enum Scribble {
    /// Nothing.
    Rest,
    /// The word accessed becomes this.
    Set(u64),
    /// Of the word accessed these bits change.
    Flip(u64),
    /// To the word accessed this is added.
    Add(u64),
    /// The word accessed becomes what some word was before.
    Stale(u8),
    /// The word at this place becomes this.
    Elsewhere(u64, u64),
}

/// What the other end does.
#[derive(Clone, Debug, Default)]
pub struct Script(Vec<Scribble>);

impl Script {
    /// Reads a script; places are below `len`.
    #[must_use]
    pub fn read(input: &mut crate::Input<'_>, len: u64) -> Self {
        let count = input.below(64);
        let one = |_| match input.below(16) {
            0 => Scribble::Set(input.u64()),
            1 => Scribble::Set(u64::from(input.byte())),
            2 => Scribble::Flip(1 << input.below(64)),
            3 => Scribble::Add(u64::from(input.byte())),
            4 => Scribble::Add(u64::from(input.byte()).wrapping_neg()),
            5 => Scribble::Stale(input.byte()),
            6 => {
                let at = u64::from(input.u16()) * WORD % (len - WORD + 1) / WORD * WORD;
                Scribble::Elsewhere(at, input.u64())
            }
            _ => Scribble::Rest,
        };
        Self((0..count).map(one).collect())
    }
}

/// Memory that follows a [`Script`] while [`Scribbled::under`] runs.
///
/// Any access outside panics, as the memory of `ivsmc_proto` does.
#[derive(Debug)]
pub struct Scribbled {
    memory: HeapMemory,
    /// Words that may be other than 0.
    touched: RefCell<Vec<u64>>,
    /// Values that words had.
    stale: RefCell<Vec<u64>>,
    script: RefCell<Vec<Scribble>>,
    next: Cell<usize>,
    accesses: Cell<u64>,
    /// What the code under test may access.
    allowed: RefCell<Vec<Range<u64>>>,
}

impl Scribbled {
    /// `len` zero bytes, and nobody scribbles.
    #[must_use]
    pub fn new(len: u64) -> Self {
        Self {
            memory: HeapMemory::new(len),
            touched: RefCell::default(),
            stale: RefCell::default(),
            script: RefCell::default(),
            next: Cell::default(),
            accesses: Cell::default(),
            allowed: RefCell::new(iter::once(0..len).collect()),
        }
    }

    /// All zero again, without making it anew; everything is allowed.
    pub fn reset(&self) {
        for at in self.touched.borrow_mut().drain(..) {
            self.memory.store(at, 0, Ordering::Relaxed);
        }
        self.stale.borrow_mut().clear();
        *self.allowed.borrow_mut() = iter::once(0..self.memory.len()).collect();
    }

    /// From now on accesses elsewhere panic.
    pub fn allow(&self, ranges: &[Range<u64>]) {
        *self.allowed.borrow_mut() = ranges.to_vec();
    }

    /// Runs one call of the code under test while somebody follows `script`.
    ///
    /// # Panics
    /// If it makes so many accesses that it would not end.
    pub fn under<T>(&self, script: &Script, call: impl FnOnce() -> T) -> T {
        self.script.borrow_mut().clone_from(&script.0);
        self.next.set(0);
        self.accesses.set(0);
        let result = call();
        self.script.borrow_mut().clear();
        result
    }

    /// The other end stores a word.
    pub fn scribble(&self, at: u64, value: u64) {
        self.touched.borrow_mut().push(at);
        let old = self.memory.swap(at, value);
        let mut stale = self.stale.borrow_mut();
        if stale.len() < 256 {
            stale.push(old);
        }
    }

    /// Notes an access to `at..at + length`, and lets the other end go first.
    fn access(&self, at: u64, length: u64) {
        let inside = |range: &Range<u64>| range.start <= at && at + length <= range.end;
        assert!(self.allowed.borrow().iter().any(inside), "{length} bytes at {at} are not its own");
        self.accesses.set(self.accesses.get() + 1);
        assert!(self.accesses.get() < ACCESSES, "spins at {at}");
        let scribble = {
            let script = self.script.borrow();
            if script.is_empty() {
                return;
            }
            let next = self.next.get() % script.len();
            self.next.set(next + 1);
            script[next]
        };
        let word = at / WORD * WORD;
        let now = || self.memory.load(word, Ordering::Relaxed);
        match scribble {
            Scribble::Rest => {}
            Scribble::Set(value) => self.scribble(word, value),
            Scribble::Flip(bits) => self.scribble(word, now() ^ bits),
            Scribble::Add(number) => self.scribble(word, now().wrapping_add(number)),
            Scribble::Stale(which) => {
                let value = self.stale.borrow().iter().cycle().nth(which.into()).copied();
                self.scribble(word, value.unwrap_or(0));
            }
            Scribble::Elsewhere(at, value) => self.scribble(at, value),
        }
    }

    /// As [`Scribbled::access`], of who changes it.
    fn change(&self, at: u64, length: u64) {
        self.access(at, length);
        let mut touched = self.touched.borrow_mut();
        touched.extend((at / WORD..(at + length).div_ceil(WORD)).map(|word| word * WORD));
    }
}

impl Memory for Scribbled {
    fn len(&self) -> u64 {
        self.memory.len()
    }

    fn load(&self, at: u64, order: Ordering) -> u64 {
        self.access(at, WORD);
        self.memory.load(at, order)
    }

    fn store(&self, at: u64, value: u64, order: Ordering) {
        self.change(at, WORD);
        self.memory.store(at, value, order);
    }

    fn swap(&self, at: u64, value: u64) -> u64 {
        self.change(at, WORD);
        self.memory.swap(at, value)
    }

    fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64> {
        self.change(at, WORD);
        self.memory.compare_exchange(at, current, new)
    }

    fn fetch_or(&self, at: u64, bits: u64) -> u64 {
        self.change(at, WORD);
        self.memory.fetch_or(at, bits)
    }

    fn fence(&self) {
        self.memory.fence();
    }

    fn write(&self, at: u64, from: &[u8]) {
        self.change(at, from.len() as u64);
        self.memory.write(at, from);
    }

    fn read(&self, at: u64, into: &mut [MaybeUninit<u8>]) {
        self.access(at, into.len() as u64);
        self.memory.read(at, into);
    }
}
