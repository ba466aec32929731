//! The memory of the simulated region, as each process sees it: every access may be the last one of
//! its process, or the last for a long time, and every change is judged by [`Law`].

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::convert::Infallible;
use std::mem::MaybeUninit;
use std::rc::{Rc, Weak};
use std::sync::atomic::Ordering;

use ivsmc_proto::judge::Locks;
use ivsmc_proto::memory::Memory;

use crate::law::{Law, Life};
use crate::world::World;

/// The words: zeros, that take no memory until they are written.
pub(crate) struct Words(RefCell<Vec<u64>>);

impl Words {
    fn new(len: u64) -> Words {
        Words(RefCell::new(vec![0; usize::try_from(len / 8).unwrap()]))
    }

    fn len(&self) -> u64 {
        self.0.borrow().len() as u64 * 8
    }

    pub(crate) fn get(&self, at: u64) -> u64 {
        debug_assert!(at % 8 == 0);
        self.0.borrow()[usize::try_from(at / 8).unwrap()]
    }

    fn set(&self, at: u64, value: u64) {
        self.0.borrow_mut()[usize::try_from(at / 8).unwrap()] = value;
    }

    /// The word of byte `at`, and how far the byte is shifted in it.
    fn byte(at: u64) -> (u64, u64) {
        (at / 8 * 8, at % 8 * 8)
    }
}

/// What all processes share.
pub(crate) struct Shared {
    pub(crate) words: Words,
    pub(crate) law: Law,
    /// Accesses, and of them changes, until the running process is interrupted.
    accesses_left: Cell<u32>,
    changes_left: Cell<u32>,
    /// Who holds the lock on a byte of a file.
    locks: RefCell<HashMap<(u32, u64), usize>>,
    pub(crate) world: RefCell<Weak<World>>,
}

/// When a process is interrupted: after so many accesses, or changes.
pub(crate) type Alarm = (u32, u32);

/// Never.
pub(crate) const NEVER: Alarm = (u32::MAX, u32::MAX);

impl Shared {
    pub(crate) fn new(len: u64) -> Rc<Shared> {
        Rc::new(Shared {
            words: Words::new(len),
            law: Law::new(len),
            accesses_left: Cell::new(u32::MAX),
            changes_left: Cell::new(u32::MAX),
            locks: RefCell::default(),
            world: RefCell::default(),
        })
    }

    /// Sets when the process that runs is interrupted; what was set before.
    pub(crate) fn set_alarm(&self, alarm: Alarm) -> Alarm {
        (self.accesses_left.replace(alarm.0), self.changes_left.replace(alarm.1))
    }

    /// Releases the locks of a process that has ended.
    pub(crate) fn release_locks(&self, pid: usize) {
        self.locks.borrow_mut().retain(|_, holder| *holder != pid);
    }

    /// Whether somebody else than `pid` holds a lock.
    pub(crate) fn is_locked_by_other(&self, file: u32, at: u64, pid: usize) -> bool {
        self.locks.borrow().get(&(file, at)).is_some_and(|holder| *holder != pid)
    }
}

/// The file of the host that the region's memory is.
pub(crate) const HOST_FILE: u32 = 0;

/// The locks of one process on the file through which it has the region.
pub(crate) struct FileLocks<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) file: u32,
    pub(crate) pid: usize,
}

impl Locks for FileLocks<'_> {
    type Error = Infallible;

    fn try_lock(&self, at: u64) -> Result<bool, Infallible> {
        let mut locks = self.shared.locks.borrow_mut();
        Ok(*locks.entry((self.file, at)).or_insert(self.pid) == self.pid)
    }

    fn unlock(&self, at: u64) -> Result<(), Infallible> {
        let mut locks = self.shared.locks.borrow_mut();
        if locks.get(&(self.file, at)) == Some(&self.pid) {
            locks.remove(&(self.file, at));
        }
        Ok(())
    }
}

/// The memory as one process sees it.
pub(crate) struct View {
    pub(crate) shared: Rc<Shared>,
    pub(crate) life: Rc<Life>,
    /// The bytes last copied out, as safe code cannot look into a `[MaybeUninit<u8>]`.
    pub(crate) taken: RefCell<Vec<u8>>,
}

impl View {
    fn before(&self, changes: u32) {
        let accesses = self.shared.accesses_left.get();
        let left = self.shared.changes_left.get();
        if accesses == 0 || (left == 0 && changes > 0) {
            let world = self.shared.world.borrow().upgrade();
            self.shared.set_alarm(NEVER);
            world.expect("the world is there").interrupt(self.life.pid);
            return;
        }
        if accesses != u32::MAX {
            self.shared.accesses_left.set(accesses - 1);
        }
        if left != u32::MAX {
            self.shared.changes_left.set(left - changes);
        }
    }

    fn change(&self, at: u64, old: u64, new: u64) {
        self.shared.law.judge(&self.shared.words, &self.life, at, old, new);
        self.shared.words.set(at, new);
    }
}

impl Memory for View {
    fn len(&self) -> u64 {
        self.shared.words.len()
    }
    fn load(&self, at: u64, _: Ordering) -> u64 {
        self.before(0);
        self.shared.words.get(at)
    }
    fn store(&self, at: u64, value: u64, _: Ordering) {
        self.swap(at, value);
    }
    fn swap(&self, at: u64, value: u64) -> u64 {
        self.before(1);
        let found = self.shared.words.get(at);
        self.change(at, found, value);
        found
    }
    fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64> {
        self.before(1);
        let found = self.shared.words.get(at);
        if found != current {
            return Err(found);
        }
        self.change(at, found, new);
        Ok(found)
    }
    fn fetch_or(&self, at: u64, bits: u64) -> u64 {
        self.before(1);
        let found = self.shared.words.get(at);
        self.change(at, found, found | bits);
        found
    }
    fn fence(&self) {}
    fn write(&self, at: u64, from: &[u8]) {
        self.before(1);
        self.shared.law.judge_bytes(&self.shared.words, &self.life, at);
        for (at, byte) in (at..).zip(from) {
            let (word, shift) = Words::byte(at);
            let found = self.shared.words.get(word);
            self.shared.words.set(word, found & !(0xff << shift) | u64::from(*byte) << shift);
        }
    }
    fn read(&self, at: u64, into: &mut [MaybeUninit<u8>]) {
        self.before(0);
        for (at, slot) in (at..).zip(into) {
            let (word, shift) = Words::byte(at);
            let byte =
                self.shared.words.get(word).to_le_bytes()[usize::try_from(shift / 8).unwrap()];
            slot.write(byte);
            self.taken.borrow_mut().push(byte);
        }
    }
}
