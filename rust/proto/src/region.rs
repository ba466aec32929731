//! A region: memory whose superblock says that it is one.
//!
//! **All-zero memory is a valid empty region but for the superblock**, and each word of that is
//! set by a compare-exchange from zero. So any number of attachers may format at once, each may
//! die at any point, and the next completes what is missing: there is no half-formatted state.
//! Memory that is neither zero nor begins with the magic belongs to somebody else and is refused
//! untouched.

use core::fmt;
use core::ops::Range;
use core::sync::atomic::Ordering;

use crate::failpoint::reached;
use crate::layout::{Geometry, MIN_REGION, PAGE, WORD};
use crate::memory::Memory;

/// The first word of a region: "ivsmcrgn", little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"ivsmcrgn");

/// The version of the memory format.
pub const VERSION: u64 = 1;

/// Offset of the version.
const AT_VERSION: u64 = WORD;
/// Offset of the size in bytes.
const AT_SIZE: u64 = 2 * WORD;
/// Offset of the feature bits.
const AT_FEATURES: u64 = 3 * WORD;
/// Offset of the low and, after it, the high half of the uuid.
const AT_UUID: u64 = 4 * WORD;
/// Offset of the first of the layout words ([`Geometry::described`]).
const AT_LAYOUT: u64 = 6 * WORD;

/// The one feature bit of this version, always set: a features word is never zero.
const FEATURE_SET: u64 = 1;

/// Part of the superblock that means nothing: newcomers time stores of zeros there.
pub const SCRATCH: Range<u64> = 2048..PAGE;

/// A region in a memory.
#[derive(Debug)]
pub struct Region<M> {
    /// The memory; `geometry.size()` bytes of it or more.
    memory: M,
    /// Where everything lies.
    geometry: Geometry,
    /// Names the region for its whole life.
    uuid: u128,
}

impl<M: Memory> Region<M> {
    /// Attaches to the region in `memory`, formatting it if it is all zero and completing what a
    /// killed attacher left. `uuid_if_new` becomes its uuid if it has none; the halves of two
    /// attachers who format at once may mix, but all see the same one.
    ///
    /// [`Geometry::fixed_range`] must be backed by memory.
    ///
    /// # Errors
    /// What is wrong with the memory; nothing was changed, but words that were zero may be set.
    pub fn attach(memory: M, uuid_if_new: u128) -> Result<Region<M>, RegionError> {
        let geometry = Geometry::of(memory.len())?;
        claim_magic(&memory)?;
        let found = settle(&memory, AT_VERSION, VERSION);
        if found != VERSION {
            return Err(RegionError::WrongVersion { found });
        }
        let actual = geometry.size();
        let found = settle(&memory, AT_SIZE, actual);
        if found != actual {
            return Err(RegionError::WrongSize { found, actual });
        }
        let found = settle(&memory, AT_FEATURES, FEATURE_SET);
        if found != FEATURE_SET {
            return Err(RegionError::UnknownFeatures { found });
        }
        let low = settle(&memory, AT_UUID, half(uuid_if_new));
        let high = settle(&memory, AT_UUID + WORD, half(uuid_if_new >> 64));
        for (at, expected) in (AT_LAYOUT..).step_by(8).zip(geometry.described()) {
            let found = settle(&memory, at, expected);
            if found != expected {
                return Err(RegionError::WrongLayout { at, found, expected });
            }
        }
        Ok(Region { memory, geometry, uuid: u128::from(high) << 64 | u128::from(low) })
    }

    /// The memory.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Where everything lies.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The name of the region, chosen when it was formatted; neither half is zero.
    pub fn uuid(&self) -> u128 {
        self.uuid
    }

    /// Loads the word at `at`.
    ///
    /// Acquire: pairs with the compare-exchange (or Release store) of whoever wrote it, so that
    /// what was written before a word changed is seen by whoever sees the change.
    #[inline]
    pub(crate) fn word(&self, at: u64) -> u64 {
        self.memory.load(at, Ordering::Acquire)
    }

    /// Stores the word at `at`, which only one process writes at this time.
    ///
    /// Release: pairs with the Acquire in [`Region::word`]. Also keeps a seqlock's stores behind
    /// the store that made its word odd.
    #[inline]
    pub(crate) fn set_word(&self, at: u64, value: u64) {
        self.memory.store(at, value, Ordering::Release);
    }

    /// Replaces the word at `at` if it is `current`; whether it was.
    #[inline]
    pub(crate) fn replace(&self, at: u64, current: u64, new: u64) -> bool {
        self.memory.compare_exchange(at, current, new).is_ok()
    }

    /// As [`Region::replace`]; that it was done is the failpoint `name`.
    #[inline(always)] // Without failpoints there are no names.
    pub(crate) fn step(&self, name: &'static str, at: u64, current: u64, new: u64) -> bool {
        let done = self.replace(at, current, new);
        if done {
            reached(name);
        }
        done
    }
}

/// Sets the word at `at` if it is zero; what it is then.
fn settle<M: Memory>(memory: &M, at: u64, value: u64) -> u64 {
    match memory.compare_exchange(at, 0, value) {
        Ok(_) => {
            reached("format.word");
            value
        }
        Err(found) => found,
    }
}

/// Finds the magic, or sets it if the first page is all zero.
fn claim_magic<M: Memory>(memory: &M) -> Result<(), RegionError> {
    // Acquire: pairs with the compare-exchange that set it.
    let first = || memory.load(0, Ordering::Acquire);
    if first() == MAGIC {
        return Ok(());
    }
    let used = (0..PAGE).step_by(8).find(|at| memory.load(*at, Ordering::Acquire) != 0);
    match used {
        None => match settle(memory, 0, MAGIC) {
            MAGIC => {
                reached("format.magic");
                Ok(())
            }
            found => Err(RegionError::NotARegion { at: 0, found }),
        },
        // Another attacher may have set the magic and more since the first look.
        Some(_) if first() == MAGIC => Ok(()),
        Some(at) => Err(RegionError::NotARegion { at, found: memory.load(at, Ordering::Acquire) }),
    }
}

/// The low half of a uuid; zero stands for "not set", so it becomes one.
#[allow(clippy::cast_possible_truncation)] // The low half is what is asked for.
fn half(uuid: u128) -> u64 {
    (uuid as u64).max(1)
}

/// Why memory is no region that this process can use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RegionError {
    /// The memory is too small.
    TooSmall {
        /// Its size in whole pages, bytes.
        found: u64,
    },
    /// The memory holds something that is no region.
    NotARegion {
        /// Offset of the first word that is not zero.
        at: u64,
        /// That word.
        found: u64,
    },
    /// The region has another version of the format.
    WrongVersion {
        /// That version.
        found: u64,
    },
    /// The region was made in a memory of another size.
    WrongSize {
        /// The size it was made with, bytes.
        found: u64,
        /// The size of the memory, bytes.
        actual: u64,
    },
    /// The region uses features that this version does not know.
    UnknownFeatures {
        /// The features word.
        found: u64,
    },
    /// A layout word of the superblock is wrong.
    WrongLayout {
        /// Offset of the word.
        at: u64,
        /// The word.
        found: u64,
        /// What it should be.
        expected: u64,
    },
}

impl fmt::Display for RegionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegionError::TooSmall { found } => write!(
                f,
                "the memory is too small for a region: {found} bytes in whole pages, at least \
                 {MIN_REGION} are needed; make it larger"
            ),
            RegionError::NotARegion { at, found } => write!(
                f,
                "the memory is not an ivsmc region and not empty (word {found:#018x} at offset \
                 {at}); give a fresh, all-zero one"
            ),
            RegionError::WrongVersion { found } => write!(
                f,
                "the region has version {found} of the memory format, this ivsmc has {VERSION}; \
                 use the same ivsmc everywhere or make a fresh region"
            ),
            RegionError::WrongSize { found, actual } => write!(
                f,
                "the region was made with {found} bytes, but the memory has {actual}; it was cut \
                 or grown: restore its size or make a fresh region"
            ),
            RegionError::UnknownFeatures { found } => write!(
                f,
                "the region has features this ivsmc does not know ({found:#x}); use the same \
                 ivsmc everywhere or make a fresh region"
            ),
            RegionError::WrongLayout { at, found, expected } => write!(
                f,
                "the region's superblock is damaged: {found} at offset {at}, expected {expected}; \
                 make a fresh region"
            ),
        }
    }
}

impl core::error::Error for RegionError {}

#[cfg(test)]
pub(crate) mod tests;
