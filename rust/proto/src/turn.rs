//! Leader and followers: one sleeper per descriptor.
//!
//! Of the threads of a process that wait on one session, one *leads* and sleeps on the session's
//! connection; the others *follow*, asleep on the word of the [`Turns`] (a futex). What the leader
//! drains may be about any of them, so when its turn ends all look at their own conditions again, and
//! one of them leads next.
//!
//! ```text
//!   seen := turn             turn counts ended turns twice, and is odd while somebody leads
//!   ready?                   sets the wait word, looks again
//!   even: lead := CAS(seen, seen + 1), sleep on the connection, drain, turn += 1, wake followers
//!   odd:  sleep while turn = seen
//! ```
//!
//! One word says both, so whoever saw `seen` before its look neither sleeps past the end of a turn
//! nor leads after one that may have drained its byte.
//!
//! Here is who leads and who is woken; how to sleep, to wake and to drain is the caller's.

#[cfg(not(loom))]
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Whose turn it is to sleep on one descriptor.
#[derive(Debug)]
pub struct Turns {
    /// Twice the ended turns, plus 1 while somebody leads. Followers sleep on it.
    turn: AtomicU32,
    /// Threads that follow, or are about to.
    followers: AtomicU32,
    /// Somebody found bytes while another led.
    missed: AtomicBool,
}

/// What one thread saw of the turns before it looked at its own condition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen(u32);

impl Seen {
    /// Whether somebody led: then follow, else lead.
    #[must_use]
    pub fn is_led(self) -> bool {
        self.0 % 2 == 1
    }
}

/// The turn of the thread that leads. It ends with [`Turns::end`].
#[must_use = "a turn that is not ended keeps all others from leading"]
#[derive(Debug)]
pub struct Lead(u32);

impl Default for Turns {
    fn default() -> Turns {
        Turns::new()
    }
}

impl Turns {
    /// Nobody leads.
    #[must_use]
    pub fn new() -> Turns {
        Turns {
            turn: AtomicU32::new(0),
            followers: AtomicU32::new(0),
            missed: AtomicBool::new(false),
        }
    }

    /// To be called before the look at the caller's own condition.
    pub fn see(&self) -> Seen {
        // Acquire: pairs with the Release of `end` and `disturb`: the look comes after what was
        // drained, or changed, before.
        Seen(self.turn.load(Ordering::Acquire))
    }

    /// Takes the lead, unless there was a change since `seen`, or somebody leads.
    pub fn lead(&self, seen: Seen) -> Option<Lead> {
        if seen.is_led() {
            return None;
        }
        let mine = seen.0.wrapping_add(1);
        let led = self.turn.compare_exchange(seen.0, mine, Ordering::AcqRel, Ordering::Acquire);
        led.is_ok().then_some(Lead(mine))
    }

    /// Whether nobody has disturbed this turn. The leader looks before each sleep.
    pub fn lasts(&self, lead: &Lead) -> bool {
        self.turn.load(Ordering::Acquire) == lead.0
    }

    /// Follows: `sleep` is to sleep on the word while it has the value given, as a futex.
    pub fn follow<T>(&self, seen: Seen, sleep: impl FnOnce(&AtomicU32, u32) -> T) -> T {
        // Pairs with the read-modify-write in `wake`: either that sees us, or what it follows, the
        // change of `turn`, comes before our look at the word.
        self.followers.fetch_add(1, Ordering::AcqRel);
        let slept = sleep(&self.turn, seen.0);
        self.followers.fetch_sub(1, Ordering::AcqRel);
        slept
    }

    /// Ends a turn, after the leader has drained what woke it. `wake` is to wake all that sleep on the
    /// word; `drain` drains once more, in the name of somebody who found bytes meanwhile.
    pub fn end(&self, lead: Lead, wake: impl Fn(&AtomicU32), mut drain: impl FnMut()) {
        let mut lead = Some(lead);
        while lead.take().is_some() {
            if self.missed.swap(false, Ordering::AcqRel) {
                drain();
            }
            self.turn.fetch_add(1, Ordering::AcqRel);
            self.wake(&wake);
            // Pairs with the swap in `miss`. Who finds bytes sets `missed`, then looks who leads; we
            // stop leading, then look at `missed`, each by a read-modify-write: one of us sees the
            // other.
            if self.missed.fetch_or(false, Ordering::AcqRel) {
                lead = self.lead_if_nobody_does();
            }
        }
    }

    /// For who finds bytes and does not wait itself: has the leader drain them, or, if there is none,
    /// says that the caller leads now; it ends the turn at once.
    pub fn miss(&self) -> Option<Lead> {
        self.missed.swap(true, Ordering::AcqRel);
        self.lead_if_nobody_does()
    }

    /// Makes every thread look at its condition again; the caller then wakes the leader, too.
    pub fn disturb(&self, wake: impl Fn(&AtomicU32)) {
        self.turn.fetch_add(2, Ordering::AcqRel);
        self.wake(&wake);
    }

    fn lead_if_nobody_does(&self) -> Option<Lead> {
        loop {
            let seen = self.see();
            if seen.is_led() {
                return None;
            }
            let lead = self.lead(seen);
            if lead.is_some() {
                return lead;
            }
        }
    }

    fn wake(&self, wake: &impl Fn(&AtomicU32)) {
        // Pairs with the one in `follow`; a load might see none of them.
        if self.followers.fetch_add(0, Ordering::AcqRel) > 0 {
            wake(&self.turn);
        }
    }
}
