//! What kind of memory a guest's region is: measured, because nothing tells.
//!
//! BAR2 is RAM, and under KVM normally cached as RAM is, although the kernel asks for an uncached
//! mapping. Where it is not, each access goes all the way to memory: sessions would crawl, and locked
//! operations lock the bus for all processors. So a few hundred accesses are timed against the same
//! accesses to ordinary memory of this process: the ratio tells, whatever the processor or its emulation.
//!
//! First plain loads, of what is there; only if those are fast, stores and then atomics, to a part of
//! the superblock that means nothing. Of each kind the fastest of several rounds counts, so neither a
//! first touch nor an interruption does harm.

use std::hint::black_box;
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ivsmc_proto::memory::Memory;
use ivsmc_proto::region::SCRATCH;
use ivsmc_shm::file as files;
use ivsmc_shm::mapping::Mapping;

use super::Unusable;
use crate::fallback::Reason;

/// The variable that has an uncached region used all the same, by the word `allow`.
const VARIABLE: &str = "IVSMC_UNCACHED";

/// Accesses of a round, one for each cache line of the superblock.
const ACCESSES: u64 = 64;
/// Rounds of each kind; the first one warms up.
const ROUNDS: usize = 6;
/// Times that slow stores are measured anew: another newcomer may be at it just now.
const TRIES: usize = 3;

/// From this ratio on memory is uncached: that is a hundred times slower, and noise less than twice.
const UNCACHED: f64 = 8.0;

/// What kind of memory a region is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryType {
    /// It is not cached, for loads or for stores.
    pub is_uncached: bool,
    /// How many times slower its slowest kind of access is than in ordinary memory; about 1 if it
    /// is ordinary memory.
    pub ratio: f64,
}

impl MemoryType {
    /// `write-back` or `uncached`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        if self.is_uncached {
            "uncached"
        } else {
            "write-back"
        }
    }
}

/// The same accesses to the region and to ordinary memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pair {
    region: Duration,
    ordinary: Duration,
}

impl Pair {
    fn ratio(self) -> f64 {
        // A clock that does not tick in between says nothing about either.
        self.region.as_secs_f64() / self.ordinary.as_secs_f64().max(1e-9)
    }
}

/// What was measured; what is not there was not tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Timings {
    loads: Pair,
    stores: Option<Pair>,
    atomics: Option<Pair>,
}

fn judge(timings: &Timings) -> MemoryType {
    let plain = timings.loads.ratio().max(timings.stores.map_or(0.0, Pair::ratio));
    // Atomics on cached memory may be slow for a while, when others use the same line.
    let ratio = plain.max(timings.atomics.map_or(0.0, Pair::ratio));
    MemoryType { is_uncached: plain >= UNCACHED, ratio }
}

/// A measurement under way.
pub(crate) struct Probe {
    ordinary: Mapping,
    timings: Timings,
}

impl Probe {
    /// Times loads from what may be a region.
    ///
    /// # Errors
    /// [`Reason::RegionUncached`], if that is not allowed; then nothing was stored.
    pub(crate) fn loads(region: &Mapping) -> Result<Self, Unusable> {
        let ordinary = ordinary().map_err(|error| {
            Unusable::device(format!("no memory to compare its memory with: {error}"))
        })?;
        let loads = pair(region, &ordinary, |memory, line| {
            black_box(memory.load(line * 64, Ordering::Relaxed));
        });
        let probe = Self { ordinary, timings: Timings { loads, ..Timings::default() } };
        probe.judged()?;
        Ok(probe)
    }

    /// Times stores and atomics too, in the scratch area of what is a region by now.
    ///
    /// # Errors
    /// [`Reason::RegionUncached`], if that is not allowed.
    pub(crate) fn stores(mut self, region: &Mapping) -> Result<MemoryType, Unusable> {
        if !self.judged()?.is_uncached {
            // A line that hardly anybody else uses at the same time.
            let lines = (SCRATCH.end - SCRATCH.start) / 64;
            let at = SCRATCH.start + u64::from(std::process::id()) % lines * 64;
            let stores = (0..TRIES).map(|_| {
                pair(region, &self.ordinary, |memory, n| {
                    memory.store(at + n % 8 * 8, 0, Ordering::Relaxed);
                })
            });
            let fast = stores.min_by(|one, other| one.ratio().total_cmp(&other.ratio()));
            self.timings.stores = fast;
            if !self.judged()?.is_uncached {
                let atomics = pair(region, &self.ordinary, |memory, n| {
                    black_box(memory.fetch_or(at + n % 8 * 8, 0));
                });
                self.timings.atomics = Some(atomics);
            }
        }
        self.judged()
    }

    fn judged(&self) -> Result<MemoryType, Unusable> {
        let found = judge(&self.timings);
        if found.is_uncached && !std::env::var(VARIABLE).is_ok_and(|word| word.trim() == "allow") {
            return Err(refusal(found));
        }
        Ok(found)
    }
}

fn refusal(found: MemoryType) -> Unusable {
    let sentence = format!(
        "its memory is not cached (accesses take {:.0} times as long as in ordinary memory), so TCP is \
         faster; look at its host for a device that is passed through, or at virtual MTRRs; \
         {VARIABLE}=allow has it used all the same",
        found.ratio
    );
    Unusable { reason: Reason::RegionUncached, is_region: true, sentence }
}

/// Memory of this process only, reached as a region is.
fn ordinary() -> io::Result<Mapping> {
    let fd = files::memfd(c"ivsmc-probe")?;
    files::set_size(&fd, SCRATCH.end)?;
    Mapping::map(fd, SCRATCH.end)
}

/// Times a round of accesses to each, in turn.
fn pair(region: &Mapping, ordinary: &Mapping, access: impl Fn(&Mapping, u64)) -> Pair {
    let round = |memory: &Mapping| {
        let began = Instant::now();
        (0..ACCESSES).for_each(|n| access(memory, n));
        began.elapsed()
    };
    let mut best = Pair { region: round(region), ordinary: round(ordinary) };
    for _ in 1..ROUNDS {
        best.region = best.region.min(round(region));
        best.ordinary = best.ordinary.min(round(ordinary));
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As measured, nanoseconds for a round.
    fn timings(loads: (u64, u64), stores: Option<(u64, u64)>) -> Timings {
        let pair = |(region, ordinary)| Pair {
            region: Duration::from_nanos(region),
            ordinary: Duration::from_nanos(ordinary),
        };
        Timings { loads: pair(loads), stores: stores.map(pair), atomics: None }
    }

    #[test]
    fn slow_loads_or_slow_stores_are_uncached() {
        let cases = [
            (timings((90, 80), Some((60, 70))), false),
            // A neighbour on the same processor.
            (timings((300, 80), Some((200, 70))), false),
            // Under emulation all is slow, and equally so.
            (timings((900_000, 800_000), Some((900_000, 700_000))), false),
            (timings((25_000, 80), None), true),
            // Write-combining: only loads are slow. Write-through: only stores are.
            (timings((20_000, 80), Some((60, 70))), true),
            (timings((80, 80), Some((9_000, 70))), true),
            // A clock too coarse to see ordinary memory.
            (timings((0, 0), Some((0, 0))), false),
        ];
        for (timings, is_uncached) in cases {
            let found = judge(&timings);
            assert_eq!(found.is_uncached, is_uncached, "{timings:?}: {found:?}");
        }
    }

    #[test]
    fn atomics_count_for_the_ratio_only() {
        let slow = Pair { region: Duration::from_micros(9), ordinary: Duration::from_nanos(300) };
        let found = judge(&Timings { atomics: Some(slow), ..timings((80, 80), Some((70, 70))) });
        assert_eq!((found.name(), found.ratio.round()), ("write-back", 30.0));
    }

    #[test]
    fn a_refusal_gives_the_ratio_and_the_way_out() {
        let refused = refusal(judge(&timings((25_000, 80), None)));
        assert_eq!(refused.reason, Reason::RegionUncached);
        assert!(refused.sentence.contains(" 31"), "{}", refused.sentence);
        assert!(refused.sentence.contains("IVSMC_UNCACHED=allow"), "{}", refused.sentence);
    }

    #[test]
    fn ordinary_memory_is_cached_and_stays_as_it_is() {
        let region = ordinary().unwrap();
        region.store(0, 7, Ordering::Relaxed);
        let found = Probe::loads(&region).unwrap().stores(&region).unwrap();
        assert_eq!(found.name(), "write-back");
        assert!(found.ratio > 0.0);
        assert_eq!(region.load(0, Ordering::Relaxed), 7);
        assert!(SCRATCH.step_by(8).all(|at| region.load(at, Ordering::Relaxed) == 0));
    }
}
