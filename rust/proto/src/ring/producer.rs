//! The writing end of a ring.

use core::sync::atomic::Ordering;

use super::{bounded, PeerMisbehaved, Place};
use crate::control::{
    CONSUMED, PRODUCED, READER_ENDS, READER_FLAGS, READER_HEARD, READER_WAIT, WRITER_FLAGS,
    WRITER_WAIT,
};
use crate::failpoint::reached;
use crate::memory::Memory;

/// The writing end of a ring in the peer's DMB; one thread at a time.
#[derive(Debug)]
pub struct Producer {
    place: Place,
    /// Bytes written, as the shared word says; `consumed..=consumed + capacity`.
    pub(super) produced: u64,
    /// The last accepted `consumed` of the peer; it may be further by now.
    pub(super) consumed: u64,
    /// What the peer did, once it broke the rules.
    poisoned: Option<PeerMisbehaved>,
}

impl Producer {
    /// The writing end of a ring whose control words are zero ([`crate::control::RING_WORDS`]).
    #[must_use]
    pub const fn new(place: Place) -> Producer {
        Producer { place, produced: 0, consumed: 0, poisoned: None }
    }

    /// Where the ring lies.
    #[inline]
    #[must_use]
    pub const fn place(&self) -> Place {
        self.place
    }

    /// Bytes written since the start.
    #[inline]
    #[must_use]
    pub const fn produced(&self) -> u64 {
        self.produced
    }

    /// What the peer did, if it broke the rules.
    #[inline]
    #[must_use]
    pub const fn poisoned(&self) -> Option<PeerMisbehaved> {
        self.poisoned
    }

    /// Bytes that can be written now, `0..=capacity`, by a fresh look at `consumed`.
    ///
    /// # Errors
    /// [`PeerMisbehaved`] if the peer broke the rules, now or before.
    #[inline]
    pub fn room<M: Memory>(&mut self, m: &M) -> Result<u64, PeerMisbehaved> {
        self.sound()?;
        // Acquire: pairs with the Release in `Consumer::release`. The reader's copies out of the
        // bytes it gave back are over before they are written again.
        let seen = m.load(self.place.control + CONSUMED, Ordering::Acquire);
        let ahead = seen.wrapping_sub(self.consumed);
        if ahead > self.produced.wrapping_sub(self.consumed) {
            return Err(self.poison(seen));
        }
        self.consumed = seen;
        Ok(self.known_room())
    }

    /// Bytes written that the peer has not read yet, by a fresh look at `consumed`.
    ///
    /// # Errors
    /// As [`Producer::room`].
    #[inline]
    pub fn in_flight<M: Memory>(&mut self, m: &M) -> Result<u64, PeerMisbehaved> {
        Ok(self.place.capacity - self.room(m)?)
    }

    /// Copies as much of `from` as there is room for, publishes it, and says how much; 0 when the
    /// ring is full. All of it becomes visible at once: a caller with much to write that wants
    /// the reader to start early writes in pieces.
    ///
    /// # Errors
    /// As [`Producer::room`]; nothing was copied or published.
    #[inline]
    pub fn write<M: Memory>(&mut self, m: &M, from: &[u8]) -> Result<usize, PeerMisbehaved> {
        self.sound()?;
        let mut room = self.known_room();
        if room < from.len() as u64 {
            room = self.room(m)?;
        }
        let count = bounded(room, from.len());
        if count == 0 {
            return Ok(0);
        }
        let (at, before_wrap) = self.place.split(self.produced, count);
        let (first, second) = from[..count].split_at(before_wrap);
        m.write(at, first);
        if !second.is_empty() {
            m.write(self.place.data, second);
        }
        reached("ring.data");
        self.produced = self.produced.wrapping_add(count as u64);
        // Release: pairs with the Acquire in `Consumer::available`. Who sees the cursor sees the
        // bytes.
        m.store(self.place.control + PRODUCED, self.produced, Ordering::Release);
        reached("ring.produced");
        Ok(count)
    }

    /// Whether the reader is to be notified of what was published or flagged before this call;
    /// takes its wait word, so one sleep is notified once.
    #[inline]
    pub fn take_reader_wait<M: Memory>(&self, m: &M) -> bool {
        // Pairs with the fence in `Consumer::want_data`: between what was published before and
        // the look at the wait word.
        m.fence();
        let wait = self.place.control + READER_WAIT;
        // Relaxed: the fence orders it. The swap pairs with the Acquire in `Place::reader_waits`.
        if m.load(wait, Ordering::Relaxed) == 0 || m.swap(wait, 0) == 0 {
            return false;
        }
        reached("ring.reader_wait_taken");
        true
    }

    /// Gets ready to sleep until there is room: `true` means do not sleep, there is some or the
    /// reader has ended; look at both. `false` means: the ring is full, sleep, the wait word is
    /// set; after a sleep that no notification ended, call [`Producer::clear_wait`].
    ///
    /// `bytes` is how much the caller has to write; any number will do. The reader notifies when
    /// so much is free, but not before a quarter and not after half of the ring is; the
    /// [module](super) says why that neither wakes byte by byte nor stalls.
    ///
    /// # Errors
    /// As [`Producer::room`].
    #[inline]
    pub fn want_room<M: Memory>(&mut self, m: &M, bytes: u64) -> Result<bool, PeerMisbehaved> {
        if self.room(m)? > 0 {
            return Ok(true);
        }
        // `useful` bytes are free once `consumed` is here: above the present `consumed`, as the
        // ring is full, hence not zero (short of 2^64 bytes, where a wake-up that comes early
        // does no harm).
        let capacity = self.place.capacity;
        let useful = bytes.clamp(capacity / 4, capacity / 2).max(1);
        let threshold = self.produced.wrapping_sub(capacity - useful);
        m.swap(self.place.control + WRITER_WAIT, threshold.max(1));
        reached("ring.writer_waits");
        // Pairs with the fence in `Consumer::take_writer_wait`: between the wait word and the
        // second look.
        m.fence();
        if self.room(m)? > 0 || self.reader_flags(m) != 0 {
            self.clear_wait(m);
            return Ok(true);
        }
        Ok(false)
    }

    /// Takes the wait word back: this end is not, or no longer, going to sleep. A notification
    /// may be on its way all the same.
    #[inline]
    pub fn clear_wait<M: Memory>(&self, m: &M) {
        m.swap(self.place.control + WRITER_WAIT, 0);
        reached("ring.writer_waits_no_more");
    }

    /// Adds end flags, after all bytes that belong before them; then the caller looks at
    /// [`Producer::take_reader_wait`]. Works on a poisoned ring.
    #[inline]
    pub fn set_flags<M: Memory>(&self, m: &M, bits: u64) {
        // Its Release pairs with the Acquire in `Consumer::writer_flags`: who sees the flags sees
        // the last `produced`.
        m.fetch_or(self.place.control + WRITER_FLAGS, bits);
        reached("ring.writer_flags");
    }

    /// The reader's end flags, those this version knows. Any of them ends this direction.
    #[inline]
    pub fn reader_flags<M: Memory>(&self, m: &M) -> u64 {
        // Acquire: pairs with the Release in `Consumer::set_flags`.
        m.load(self.place.control + READER_FLAGS, Ordering::Acquire) & READER_ENDS
    }

    /// Whether the reader has received a doorbell of this end: the next one will come, too.
    #[inline]
    pub fn is_heard<M: Memory>(&self, m: &M) -> bool {
        // Relaxed: nothing is read because of it. Set by `Place::set_heard`.
        m.load(self.place.control + READER_FLAGS, Ordering::Relaxed) & READER_HEARD != 0
    }

    /// Room by the last accepted `consumed`; there may be more.
    #[inline]
    fn known_room(&self) -> u64 {
        // Cannot go below zero: `produced` is at most `consumed + capacity`.
        self.place.capacity - self.produced.wrapping_sub(self.consumed)
    }

    #[inline]
    fn sound(&self) -> Result<(), PeerMisbehaved> {
        self.poisoned.map_or(Ok(()), Err)
    }

    #[cold]
    fn poison(&mut self, value: u64) -> PeerMisbehaved {
        *self.poisoned.insert(PeerMisbehaved {
            what: "`consumed` is behind where it was, or ahead of what was written",
            value,
        })
    }
}
