//! Looking again a few times before sleeping: a peer that answers at once costs no system call.

use std::hint::spin_loop;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ivsmc_shm::thread::online_cpus;

use crate::host::Deadline;

/// Looks of [`briefly`], about two microseconds: short enough to keep the host's lock (the GIL).
const BRIEF: u32 = 48;

/// The first looks follow each other at once: between two busy ends the answer comes within less
/// than a pause instruction takes (140 cycles on Intel since Skylake).
const EAGER: u32 = 16;

/// Looks between two readings of the clock.
const BATCH: u32 = 32;

/// How long [`fully`] looks, unless `IVSMC_SPIN_US` says otherwise: somewhat less than a sleep
/// and its wake-up cost (65 to 75 us on virtual CPUs, `facts`).
const DEFAULT: Duration = Duration::from_micros(50);

fn budget() -> Duration {
    static BUDGET: OnceLock<Duration> = OnceLock::new();
    *BUDGET.get_or_init(|| {
        if online_cpus() == 1 {
            // The peer cannot run while we look.
            return Duration::ZERO;
        }
        std::env::var("IVSMC_SPIN_US")
            .ok()
            .and_then(|text| text.parse().ok())
            .map_or(DEFAULT, Duration::from_micros)
    })
}

/// Looks for a moment; returns whether `there` said yes.
#[inline]
pub(crate) fn briefly(mut there: impl FnMut() -> bool) -> bool {
    if budget().is_zero() {
        return false;
    }
    for look in 0..BRIEF {
        if there() {
            return true;
        }
        if look >= EAGER {
            spin_loop();
        }
    }
    false
}

/// Looks for the whole budget, or until `deadline`; returns whether `there` said yes.
pub(crate) fn fully(deadline: Deadline, mut there: impl FnMut() -> bool) -> bool {
    let budget = budget();
    if budget.is_zero() {
        return false;
    }
    let end = deadline.earlier(Instant::now() + budget);
    loop {
        for _ in 0..BATCH {
            if there() {
                return true;
            }
            spin_loop();
        }
        if end.left().is_err() {
            return false;
        }
    }
}
