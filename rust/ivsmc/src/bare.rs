//! What the machine itself allows: a word there and back, and one ring, between two cores.
//!
//! No protocol, no waiting, no other process: two threads that spin. Everything that sessions do
//! comes on top, so their figures are best read as shares of these from the same run.

use std::hint::spin_loop;
use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ivsmc_proto::memory::Memory;
use ivsmc_proto::ring::{Consumer, Place, Producer};
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::{file, thread};

use crate::Result;

/// Offsets in a memory of its own: two words on lines apart, a control block, the ring.
const THERE: u64 = 0;
const BACK: u64 = 256;
const CONTROL: u64 = 4096;
const DATA: u64 = 8192;
/// Bytes of the ring: the default of sessions, and as fast as any here.
const CAPACITY: u64 = 256 << 10;
/// Bytes copied at a time, as sessions do.
const PART: usize = 8 << 10;
/// Bytes of one message.
const MESSAGE: usize = 64 << 10;

/// What a machine allows.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// A word there and back between two cores: the median of batches.
    pub round_trip: Duration,
    /// Bytes in a second through one ring, copied in and copied out.
    pub bytes_per_second: f64,
}

/// Measures the limit between the processors `cores` with `round_trips` and `bytes`; the calling
/// thread runs on the first of them meanwhile.
///
/// # Errors
/// No memory, or no such processors.
pub fn limit(cores: (usize, usize), round_trips: u32, bytes: u64) -> Result<Limit> {
    let memory = file::memfd(c"ivsmc-bare")?;
    file::set_size(&memory, DATA + CAPACITY)?;
    let memory = &Mapping::map(memory, DATA + CAPACITY)?;
    memory.reserve(0..DATA + CAPACITY)?;
    let before = thread::affinity()?;
    // Neither may find out later, while the other spins.
    if let Err(error) = thread::pin(cores.1).and_then(|()| thread::pin(cores.0)) {
        thread::set_affinity(&before)?;
        return Err(error.into());
    }
    let measured = std::thread::scope(|scope| {
        let trips = round_trips.max(BATCHES) / BATCHES * BATCHES;
        let other = scope.spawn(move || {
            // It was there a moment ago; on another one the figures are worse, no more.
            let _ = thread::pin(cores.1);
            echo(memory, trips);
            drain(memory, bytes);
        });
        let round_trip = ask(memory, trips);
        let bytes_per_second = fill(memory, bytes);
        // It does not panic.
        let _ = other.join();
        Limit { round_trip, bytes_per_second }
    });
    thread::set_affinity(&before)?;
    Ok(measured)
}

const BATCHES: u32 = 20;

fn ask(memory: &Mapping, trips: u32) -> Duration {
    let per_batch = trips / BATCHES;
    let mut batches = [Duration::ZERO; BATCHES as usize];
    let mut number = 0;
    for batch in &mut batches {
        let begin = Instant::now();
        for _ in 0..per_batch {
            number += 1;
            // Release and Acquire pair with those of `echo`, and the other way round.
            memory.store(THERE, number, Ordering::Release);
            while memory.load(BACK, Ordering::Acquire) != number {
                spin_loop();
            }
        }
        *batch = begin.elapsed() / per_batch;
    }
    batches.sort_unstable();
    batches[batches.len() / 2]
}

fn echo(memory: &Mapping, trips: u32) {
    for number in 1..=u64::from(trips) {
        while memory.load(THERE, Ordering::Acquire) != number {
            spin_loop();
        }
        memory.store(BACK, number, Ordering::Release);
    }
}

fn fill(memory: &Mapping, bytes: u64) -> f64 {
    let mut ring = Producer::new(Place::new(CONTROL, DATA, CAPACITY));
    let message = vec![7; MESSAGE];
    let begin = Instant::now();
    let mut left = bytes;
    while left > 0 {
        for part in message.chunks(PART) {
            let mut rest = &part[..part.len().min(usize::try_from(left).unwrap_or(usize::MAX))];
            left -= rest.len() as u64;
            while !rest.is_empty() {
                // Both ends are ours: nothing is out of range.
                let n = ring.write(memory, rest).unwrap_or(rest.len());
                rest = &rest[n..];
            }
        }
    }
    while ring.in_flight(memory).is_ok_and(|n| n > 0) {
        spin_loop();
    }
    #[allow(clippy::cast_precision_loss, reason = "a figure to print")]
    let bytes = bytes as f64;
    bytes / begin.elapsed().as_secs_f64()
}

fn drain(memory: &Mapping, bytes: u64) {
    let mut ring = Consumer::new(Place::new(CONTROL, DATA, CAPACITY));
    let mut into = vec![MaybeUninit::uninit(); MESSAGE];
    let mut left = bytes;
    while left > 0 {
        for part in into.chunks_mut(PART) {
            let n = ring.read(memory, part).unwrap_or(0);
            left = left.saturating_sub(n as u64);
            if n < part.len() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_something_and_gives_the_thread_back() {
        let before = thread::affinity().unwrap();
        let last = thread::online_cpus() - 1;
        let limit = limit((0, last), 100, 100_001).unwrap();
        assert!(limit.bytes_per_second > 0.0 && !limit.round_trip.is_zero());
        assert_eq!(thread::affinity().unwrap(), before);
    }

    #[test]
    fn processors_that_are_not_there_are_refused() {
        let before = thread::affinity().unwrap();
        for cores in [(0, 1 << 12), (1 << 12, 0)] {
            assert!(limit(cores, 100, 1).is_err(), "{cores:?}");
            assert_eq!(thread::affinity().unwrap(), before);
        }
    }
}
