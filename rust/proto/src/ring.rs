//! One direction of a session: a ring of bytes in the reader's DMB.
//!
//! ```text
//!               in_flight                     room
//!        |<---------------------->|<------------------------>|
//!   -----+========================+--------------------------+-----> bytes since the start
//!     consumed                 produced            consumed + capacity
//!   byte n of the stream lies at data + n % capacity
//! ```
//!
//! [`Producer`] is the writing end, [`Consumer`] the reading end; each is one thread at a time
//! (`&mut self`). Neither locks, allocates or waits. Bytes are published by one Release store of
//! a cursor; an end keeps a copy of the other's cursor and looks at the shared one only when the
//! copy says that the ring may be full (or empty).
//!
//! **Against whom.** The other end may be hostile. A shared word is read once and then judged:
//! `produced` is accepted only in `[last accepted, consumed + capacity]`, `consumed` only in
//! `[last accepted, produced]`. Anything else poisons this end: this and every later call that
//! would touch bytes returns the same [`PeerMisbehaved`] and touches nothing. Own cursors are
//! never read back. Flag bits that this version does not know are not looked at.
//!
//! **Sleeping.** An end that finds nothing to do calls [`Producer::want_room`] or
//! [`Consumer::want_data`]: set the wait word, full fence, look again. `true` means do not sleep
//! (the wait word is cleared again). An end that did something calls
//! [`Producer::take_reader_wait`] or [`Consumer::take_writer_wait`] afterwards: full fence, look
//! at the wait word, take it. `true` means: notify the peer. One of the two fences comes first;
//! if it is the sleeper's, the other end sees the wait word, else the sleeper sees what was done.
//! An end that leaves without having been woken (time-out, signal) calls `clear_wait`. A wake-up
//! may be spurious; whoever wakes looks again. Both ends change a wait word only by swap, so its
//! changes have one order and each takes over from the one before.
//!
//! **How much is worth a wake-up.** A writer asleep on a full ring is woken when what it has to
//! write is free, but not before a quarter and not after half of the ring is
//! ([`Producer::want_room`]). With a reader taking single bytes that is one wake-up per quarter,
//! not per byte; and the reader still has half the ring to read while the writer wakes up, however
//! much that wants to write. There is no stall just under 100 % fill:
//!
//! * A writer goes to sleep only on a full ring; less than a useful part is used at once when the
//!   writer is awake.
//! * The threshold is never above `produced`: a reader that takes all there is always reaches it.
//! * A reader may sleep with bytes unread (one that wants a whole record, or peeks for more) and
//!   less than a useful part freed since the writer fell asleep. Then the threshold would hold
//!   both asleep; so a reader that waits wakes the writer at *any* fill:
//!   [`Consumer::take_writer_wait`] after [`Consumer::want_data`] takes the wait word whatever it
//!   says. And a full ring satisfies every reader.
//!
//! **The end.** Writer: data, `produced`, then flags (Release). Reader: flags (Acquire), then
//! `produced` ([`Consumer::look`]); so an end flag is never seen before the data it follows.

use core::fmt;
use core::sync::atomic::Ordering;

use crate::control::{READER_FLAGS, READER_HEARD, READER_WAIT, WRITER_WAIT};
use crate::failpoint::reached;
use crate::memory::Memory;

mod consumer;
mod producer;
#[cfg(test)]
mod tests;

pub use consumer::{Consumer, Look};
pub use producer::Producer;

/// Where one ring lies in the region. Judged before it is made: all of it is inside the memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Place {
    /// Offset of the control block, in bytes from the start of the region, 8-aligned.
    pub control: u64,
    /// Offset of the ring's bytes.
    pub data: u64,
    /// Size of the ring in bytes, a power of two.
    pub capacity: u64,
}

impl Place {
    /// A ring of `capacity` bytes at `data` with its control block at `control`.
    ///
    /// # Panics
    /// If `capacity` is not a power of two or `control` is not 8-aligned.
    #[must_use]
    pub const fn new(control: u64, data: u64, capacity: u64) -> Place {
        assert!(capacity.is_power_of_two(), "capacity is no power of two");
        assert!(control % 8 == 0, "control block is not 8-aligned");
        Place { control, data, capacity }
    }

    /// Whether the reader's wait word is still set: it wants waking, and nobody took that on.
    ///
    /// For the thread that drained a wake-up and asks whom it concerned: a waiter of this process
    /// whose word is no longer set has been notified. Needs no `Consumer`, which the waiter holds.
    #[inline]
    pub fn reader_waits<M: Memory>(&self, m: &M) -> bool {
        // Acquire: pairs with the swap in `Producer::take_reader_wait`.
        m.load(self.control + READER_WAIT, Ordering::Acquire) != 0
    }

    /// Whether the writer's wait word is still set; see [`Place::reader_waits`].
    #[inline]
    pub fn writer_waits<M: Memory>(&self, m: &M) -> bool {
        // Acquire: pairs with the swap in `Consumer::take_writer_wait`.
        m.load(self.control + WRITER_WAIT, Ordering::Acquire) != 0
    }

    /// Says that the reader has received a doorbell of the writer. For the thread of the reader's
    /// process that drained it; needs no `Consumer`, which another thread may hold.
    #[inline]
    pub fn set_heard<M: Memory>(&self, m: &M) {
        // Read by `Producer::is_heard`, which needs no order.
        m.fetch_or(self.control + READER_FLAGS, READER_HEARD);
        reached("ring.heard");
    }

    /// Takes [`Place::set_heard`] back: a doorbell got lost. No matter if it fails, as it may while
    /// somebody else changes the flags.
    #[cold]
    pub fn withdraw_heard<M: Memory>(&self, m: &M) {
        let at = self.control + READER_FLAGS;
        let flags = m.load(at, Ordering::Relaxed);
        if m.compare_exchange(at, flags, flags & !READER_HEARD).is_ok() {
            reached("ring.unheard");
        }
    }

    /// Offset of stream byte `cursor`, and how many of `count` bytes lie before the wrap.
    #[inline]
    fn split(&self, cursor: u64, count: usize) -> (u64, usize) {
        let offset = cursor & (self.capacity - 1);
        let before_wrap = bounded(self.capacity - offset, count);
        (self.data + offset, before_wrap)
    }
}

/// The peer set a shared word to a value that the protocol rules out; the ring is poisoned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerMisbehaved {
    /// The word, and the rule that it breaks.
    pub what: &'static str,
    /// The value found.
    pub value: u64,
}

impl fmt::Display for PeerMisbehaved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the peer broke the ring: {} ({})", self.what, self.value)
    }
}

impl core::error::Error for PeerMisbehaved {}

/// The smaller of `number` and `limit`.
#[inline]
fn bounded(number: u64, limit: usize) -> usize {
    usize::try_from(number).map_or(limit, |number| number.min(limit))
}
