//! What happened in a world, so that a test can see that it did.

use std::cell::Cell;
use std::fmt;

/// How often.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) sessions: Cell<u32>,
    /// Bytes read that were as written.
    pub(crate) bytes: Cell<u32>,
    /// Killed at an access to memory.
    pub(crate) killed_within: Cell<u32>,
    /// Others went on at an access to memory.
    pub(crate) silent_within: Cell<u32>,
    /// Went on after they had been stopped, or their machine.
    pub(crate) returns: Cell<u32>,
    pub(crate) leaves: Cell<u32>,
    /// Attached at once.
    pub(crate) most: Cell<usize>,
}

impl Counts {
    /// Panics unless all of it happened often enough for a test to mean something.
    pub(crate) fn assert_enough(&self, peers: usize) {
        assert!(self.most.get() >= peers, "no more than {} peers at once", self.most.get());
        for (what, count) in [
            ("sessions", &self.sessions),
            ("bytes", &self.bytes),
            ("returns", &self.returns),
            ("leaves", &self.leaves),
            ("killed within a call", &self.killed_within),
            ("silent within a call", &self.silent_within),
        ] {
            assert!(count.get() > 15, "{what}: {}", count.get());
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { sessions, bytes, killed_within, silent_within, returns, leaves, most } = self;
        write!(
            f,
            "{} peers at once, {} sessions, {} bytes, {} killed and {} interrupted within a call, \
             {} silent and back, {} left",
            most.get(),
            sessions.get(),
            bytes.get(),
            killed_within.get(),
            silent_within.get(),
            returns.get(),
            leaves.get()
        )
    }
}

/// Adds one.
pub(crate) fn count(counter: &Cell<u32>) {
    counter.set(counter.get() + 1);
}
