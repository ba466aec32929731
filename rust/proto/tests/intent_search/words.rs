//! The memory of the search.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;

use ivsmc_proto::layout::{MIN_REGION, PAGE};
use ivsmc_proto::memory::Memory;

/// A memory of which only the words that are not zero are kept.
#[derive(Default)]
pub(crate) struct Words {
    words: RefCell<BTreeMap<u64, u64>>,
}

impl Words {
    /// The words behind the superblock.
    pub(crate) fn save(&self) -> Vec<(u64, u64)> {
        self.words.borrow().range(PAGE..).map(|(at, word)| (*at, *word)).collect()
    }

    /// Makes the words behind the superblock these.
    pub(crate) fn restore(&self, saved: &[(u64, u64)]) {
        let mut words = self.words.borrow_mut();
        words.split_off(&PAGE);
        words.extend(saved.iter().copied());
    }

    /// Frees every abandoned intent.
    pub(crate) fn free_abandoned(&self) {
        for word in self.words.borrow_mut().range_mut(PAGE..).map(|(_, word)| word) {
            if *word >> 61 == 7 {
                *word = ((*word >> 38 & 0x7f_ffff) + 1) << 38;
            }
        }
    }
}

impl Memory for Words {
    fn len(&self) -> u64 {
        MIN_REGION
    }
    fn load(&self, at: u64, _: Ordering) -> u64 {
        self.words.borrow().get(&at).copied().unwrap_or(0)
    }
    fn store(&self, at: u64, value: u64, _: Ordering) {
        if value == 0 {
            self.words.borrow_mut().remove(&at);
        } else {
            self.words.borrow_mut().insert(at, value);
        }
    }
    fn swap(&self, at: u64, value: u64) -> u64 {
        let found = self.load(at, Ordering::Relaxed);
        self.store(at, value, Ordering::Relaxed);
        found
    }
    fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64> {
        let found = self.load(at, Ordering::Relaxed);
        if found != current {
            return Err(found);
        }
        self.store(at, new, Ordering::Relaxed);
        Ok(found)
    }
    fn fetch_or(&self, at: u64, bits: u64) -> u64 {
        self.swap(at, self.load(at, Ordering::Relaxed) | bits)
    }
    fn fence(&self) {}
    fn write(&self, _: u64, _: &[u8]) {
        unreachable!("intents are words");
    }
    fn read(&self, _: u64, _: &mut [MaybeUninit<u8>]) {
        unreachable!("intents are words");
    }
}
