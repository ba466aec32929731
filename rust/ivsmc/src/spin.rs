//! Looking again a few times before sleeping: a peer that answers at once costs no system call.

use std::ffi::OsStr;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ivsmc_shm::thread::online_cpus;

use crate::host::Deadline;
use crate::Error;

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

/// The variable that says for how long instead.
const VARIABLE: &str = "IVSMC_SPIN_US";

/// Microseconds that [`fully`] looks; [`UNSET`] until somebody asks.
static BUDGET: AtomicU64 = AtomicU64::new(UNSET);
const UNSET: u64 = u64::MAX;

/// What the variable said when it was first looked at; `None` if it said nothing.
fn chosen() -> &'static Result<Option<Duration>, String> {
    static CHOSEN: OnceLock<Result<Option<Duration>, String>> = OnceLock::new();
    CHOSEN.get_or_init(|| parse(&std::env::var_os(VARIABLE).unwrap_or_default()))
}

fn parse(text: &OsStr) -> Result<Option<Duration>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let micros = text.to_str().and_then(|text| text.trim().parse().ok());
    micros.map(|micros| Some(Duration::from_micros(micros))).ok_or_else(|| {
        let text = text.to_string_lossy();
        format!(
            "{VARIABLE}={text} is no number; give whole microseconds, 0 to sleep at once, or \
             unset it"
        )
    })
}

/// Refuses an environment that asks for nonsense.
///
/// # Errors
/// `ApiMisuse`, in words.
pub(crate) fn judge_environment() -> crate::Result<()> {
    chosen().as_ref().map(|_| ()).map_err(|wrong| Error::ApiMisuse(wrong.clone()))
}

/// Sets how long every wait of this process looks before it sleeps, from now on; `None` is what
/// the environment says. For measuring both ways in one run.
pub fn set_spin(budget: Option<Duration>) {
    let budget = budget.unwrap_or_else(configured);
    BUDGET.store(micros(budget), Ordering::Relaxed); // Relaxed: a number by itself
}

/// What the environment says, else what suits the machine.
fn configured() -> Duration {
    match chosen() {
        Ok(Some(budget)) => *budget,
        // A peer of this machine cannot run while we look; who has one elsewhere may say so.
        _ if online_cpus() == 1 => Duration::ZERO,
        _ => DEFAULT,
    }
}

fn micros(budget: Duration) -> u64 {
    u64::try_from(budget.as_micros()).unwrap_or(u64::MAX).min(UNSET - 1)
}

fn budget() -> Duration {
    let now = BUDGET.load(Ordering::Relaxed); // Relaxed: as above
    if now == UNSET {
        let budget = configured();
        // Not over what `set_spin` has put there meanwhile.
        let _ =
            BUDGET.compare_exchange(UNSET, micros(budget), Ordering::Relaxed, Ordering::Relaxed);
        return budget;
    }
    Duration::from_micros(now)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_whole_microseconds_or_refused() {
        let parse = |text| parse(OsStr::new(text));
        assert_eq!(parse(""), Ok(None));
        assert_eq!(parse("0"), Ok(Some(Duration::ZERO)));
        assert_eq!(parse(" 200 "), Ok(Some(Duration::from_micros(200))));
        for text in ["-1", "1.5", "50us", "never"] {
            let wrong = parse(text).expect_err(text);
            assert!(wrong.starts_with(&format!("IVSMC_SPIN_US={text} ")), "{wrong}");
        }
    }
}
