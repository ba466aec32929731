//! Looking again a few times before sleeping: a peer that answers at once costs no system call.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

use ivsmc_shm::thread::online_cpus;

use crate::host::Deadline;
use crate::setting::Setting;

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

/// Microseconds that [`fully`] looks.
static BUDGET: Setting = Setting::new("IVSMC_SPIN_US", 0, "whole microseconds, 0 to sleep at once");

/// Refuses an environment that asks for nonsense.
///
/// # Errors
/// `ApiMisuse`, in words.
pub(crate) fn judge_environment() -> crate::Result<()> {
    BUDGET.judge()
}

/// Sets how long every wait of this process looks before it sleeps, from now on; `None` is what
/// the environment says. For measuring both ways in one run.
pub fn set_spin(budget: Option<Duration>) {
    BUDGET.set(budget.map(micros), fitting);
}

/// What suits the machine.
fn fitting() -> u64 {
    // A peer of this machine cannot run while we look; who has one elsewhere may say so.
    if online_cpus() == 1 {
        return 0;
    }
    micros(DEFAULT)
}

fn micros(budget: Duration) -> u64 {
    u64::try_from(budget.as_micros()).unwrap_or(u64::MAX)
}

#[inline]
fn budget() -> Duration {
    Duration::from_micros(BUDGET.get(fitting))
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
