//! The reading end of a ring.

use core::mem::MaybeUninit;
use core::sync::atomic::Ordering;

use super::{bounded, PeerMisbehaved, Place};
use crate::control::{
    CONSUMED, PRODUCED, READER_ENDS, READER_FLAGS, READER_WAIT, WRITER_FLAGS, WRITER_FLAGS_KNOWN,
    WRITER_WAIT,
};
use crate::failpoint::reached;
use crate::memory::Memory;

/// The reading end of a ring in a DMB of this process; one thread at a time.
#[derive(Debug)]
pub struct Consumer {
    place: Place,
    /// Bytes read, as the shared word says.
    pub(super) consumed: u64,
    /// The last accepted `produced` of the peer, `consumed..=consumed + capacity`; it may be
    /// further by now.
    pub(super) produced: u64,
    /// What the peer did, once it broke the rules.
    poisoned: Option<PeerMisbehaved>,
}

/// What a reader sees: the flags, and the data as of no earlier than the flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Look {
    /// Bytes that can be read, `0..=capacity`. With an end flag set there come no more.
    pub available: u64,
    /// The writer's end flags, those this version knows.
    pub flags: u64,
}

impl Consumer {
    /// The reading end of a ring whose control words are zero ([`crate::control::RING_WORDS`]).
    #[must_use]
    pub const fn new(place: Place) -> Consumer {
        Consumer { place, consumed: 0, produced: 0, poisoned: None }
    }

    /// Where the ring lies.
    #[inline]
    #[must_use]
    pub const fn place(&self) -> Place {
        self.place
    }

    /// Bytes read since the start.
    #[inline]
    #[must_use]
    pub const fn consumed(&self) -> u64 {
        self.consumed
    }

    /// What the peer did, if it broke the rules.
    #[inline]
    #[must_use]
    pub const fn poisoned(&self) -> Option<PeerMisbehaved> {
        self.poisoned
    }

    /// Bytes that can be read now, `0..=capacity`, by a fresh look at `produced`.
    ///
    /// # Errors
    /// [`PeerMisbehaved`] if the peer broke the rules, now or before.
    #[inline]
    pub fn available<M: Memory>(&mut self, m: &M) -> Result<u64, PeerMisbehaved> {
        self.sound()?;
        // Acquire: pairs with the Release in `Producer::write`. Who sees the cursor sees the
        // bytes.
        let seen = m.load(self.place.control + PRODUCED, Ordering::Acquire);
        let in_flight = seen.wrapping_sub(self.consumed);
        if in_flight > self.place.capacity || in_flight < self.known_available() {
            return Err(self.poison(seen));
        }
        self.produced = seen;
        Ok(in_flight)
    }

    /// The writer's flags and then the bytes that can be read: nothing available and an end flag
    /// together mean that all was read.
    ///
    /// # Errors
    /// As [`Consumer::available`].
    #[inline]
    pub fn look<M: Memory>(&mut self, m: &M) -> Result<Look, PeerMisbehaved> {
        let flags = self.writer_flags(m);
        let available = self.available(m)?;
        Ok(Look { available, flags })
    }

    /// Copies what can be read, at most `into.len()` bytes, gives their place back to the writer,
    /// and says how many: the first so many of `into` are initialised. 0 when the ring is empty.
    /// A caller with much to read that wants the writer to go on early reads in pieces.
    ///
    /// # Errors
    /// As [`Consumer::available`]; nothing was copied or given back.
    #[inline]
    pub fn read<M: Memory>(
        &mut self,
        m: &M,
        into: &mut [MaybeUninit<u8>],
    ) -> Result<usize, PeerMisbehaved> {
        let count = self.peek(m, 0, into)?;
        self.release(m, count as u64);
        Ok(count)
    }

    /// Copies as [`Consumer::read`], from `skip` bytes on, and leaves all of it in the ring.
    ///
    /// # Errors
    /// As [`Consumer::available`]; nothing was copied.
    #[inline]
    pub fn peek<M: Memory>(
        &mut self,
        m: &M,
        skip: u64,
        into: &mut [MaybeUninit<u8>],
    ) -> Result<usize, PeerMisbehaved> {
        self.sound()?;
        let wanted = skip.saturating_add(into.len() as u64);
        let mut available = self.known_available();
        if available < wanted {
            available = self.available(m)?;
        }
        let count = bounded(available.saturating_sub(skip), into.len());
        if count == 0 {
            return Ok(0);
        }
        let (at, before_wrap) = self.place.split(self.consumed.wrapping_add(skip), count);
        let (first, second) = into[..count].split_at_mut(before_wrap);
        m.read(at, first);
        if !second.is_empty() {
            m.read(self.place.data, second);
        }
        Ok(count)
    }

    /// Gives back up to `count` bytes without copying them, and says how many.
    ///
    /// # Errors
    /// As [`Consumer::available`]; nothing was given back.
    #[inline]
    pub fn skip<M: Memory>(&mut self, m: &M, count: u64) -> Result<u64, PeerMisbehaved> {
        self.sound()?;
        let mut available = self.known_available();
        if available < count {
            available = self.available(m)?;
        }
        let count = count.min(available);
        self.release(m, count);
        Ok(count)
    }

    /// Whether the writer is to be notified of what was given back or flagged before this call;
    /// takes its wait word, so one sleep is notified once.
    ///
    /// It is when `consumed` has come as far as the writer asked for, when this end has set an
    /// end flag, or when this end waits itself ([`Consumer::want_data`]). Any number a hostile
    /// writer puts there is one of "wake" and "do not".
    #[inline]
    pub fn take_writer_wait<M: Memory>(&self, m: &M) -> bool {
        // Pairs with the fence in `Producer::want_room`: between what was published before and
        // the look at the wait word.
        m.fence();
        let wait = self.place.control + WRITER_WAIT;
        // Relaxed: the fence orders it.
        let threshold = m.load(wait, Ordering::Relaxed);
        if threshold == 0 || (self.consumed < threshold && !self.wakes_at_any_fill(m)) {
            return false;
        }
        // What is taken may be newer than what was looked at: then the writer is woken early and
        // asks again. Pairs with the Acquire in `Place::writer_waits`.
        if m.swap(wait, 0) == 0 {
            return false;
        }
        reached("ring.writer_wait_taken");
        true
    }

    /// Gets ready to sleep until there is data: `true` means do not sleep, there are `least`
    /// bytes or the writer has ended; [`Consumer::look`]. `false` means: sleep, the wait word is
    /// set; after a sleep that no notification ended, call [`Consumer::clear_wait`].
    ///
    /// `least` is taken as `1..=capacity`: 1 for a stream. A caller with more, who may sleep with
    /// bytes unread, calls [`Consumer::take_writer_wait`] between a `false` and the sleep: a
    /// writer asleep on a nearly full ring has to go on. (With 1 the last read has done it.)
    ///
    /// # Errors
    /// As [`Consumer::available`].
    #[inline]
    pub fn want_data<M: Memory>(&mut self, m: &M, least: u64) -> Result<bool, PeerMisbehaved> {
        let least = least.clamp(1, self.place.capacity);
        if self.available(m)? >= least {
            return Ok(true);
        }
        m.swap(self.place.control + READER_WAIT, 1);
        reached("ring.reader_waits");
        // Pairs with the fence in `Producer::take_reader_wait`: between the wait word and the
        // second look.
        m.fence();
        let Look { available, flags } = self.look(m)?;
        if available >= least || flags != 0 {
            self.clear_wait(m);
            return Ok(true);
        }
        Ok(false)
    }

    /// Takes the wait word back: this end is not, or no longer, going to sleep. A notification
    /// may be on its way all the same.
    #[inline]
    pub fn clear_wait<M: Memory>(&self, m: &M) {
        m.swap(self.place.control + READER_WAIT, 0);
        reached("ring.reader_waits_no_more");
    }

    /// Adds end flags; then the caller looks at [`Consumer::take_writer_wait`]. Works on a
    /// poisoned ring.
    #[inline]
    pub fn set_flags<M: Memory>(&self, m: &M, bits: u64) {
        // Its Release pairs with the Acquire in `Producer::reader_flags`.
        m.fetch_or(self.place.control + READER_FLAGS, bits);
        reached("ring.reader_flags");
    }

    /// The writer's end flags, those this version knows. Any of them says that no byte follows;
    /// read them before a last look at the data ([`Consumer::look`] does both).
    #[inline]
    pub fn writer_flags<M: Memory>(&self, m: &M) -> u64 {
        // Acquire: pairs with the Release in `Producer::set_flags`: the `produced` looked at next
        // is the last one.
        m.load(self.place.control + WRITER_FLAGS, Ordering::Acquire) & WRITER_FLAGS_KNOWN
    }

    /// Gives `count` bytes back to the writer, at most those known to be available.
    #[inline]
    fn release<M: Memory>(&mut self, m: &M, count: u64) {
        if count == 0 {
            return;
        }
        self.consumed = self.consumed.wrapping_add(count);
        // Release: pairs with the Acquire in `Producer::room`. The copies out of these bytes are
        // over before the writer sees that it may write them.
        m.store(self.place.control + CONSUMED, self.consumed, Ordering::Release);
        reached("ring.consumed");
    }

    /// Whether this end has ended or waits itself, so that the writer goes on whatever is free.
    ///
    /// Own words read back from shared memory: a peer that changed them changes only when it is
    /// notified itself.
    #[inline]
    fn wakes_at_any_fill<M: Memory>(&self, m: &M) -> bool {
        // Relaxed: this end wrote them.
        m.load(self.place.control + READER_WAIT, Ordering::Relaxed) != 0
            || m.load(self.place.control + READER_FLAGS, Ordering::Relaxed) & READER_ENDS != 0
    }

    /// Bytes available by the last accepted `produced`; there may be more.
    #[inline]
    fn known_available(&self) -> u64 {
        self.produced.wrapping_sub(self.consumed)
    }

    #[inline]
    fn sound(&self) -> Result<(), PeerMisbehaved> {
        self.poisoned.map_or(Ok(()), Err)
    }

    #[cold]
    fn poison(&mut self, value: u64) -> PeerMisbehaved {
        *self.poisoned.insert(PeerMisbehaved {
            what: "`produced` is behind where it was, or further than the ring is large",
            value,
        })
    }
}
