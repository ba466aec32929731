//! Jobs that the background thread tries again until they are done, at growing intervals.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use crate::reactor::{lock, Key, Reactor, Source};

/// The longest interval.
const LONGEST: Duration = Duration::from_secs(5);

/// What a job says about itself after a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tried {
    Done,
    Again,
}

struct Retry {
    reactor: Weak<Reactor>,
    key: OnceLock<Key>,
    /// The next interval, in nanoseconds.
    interval: AtomicU64,
    job: Mutex<Box<dyn FnMut() -> Tried + Send>>,
}

/// Runs `job` on the background thread after `first`, then after intervals twice as long each,
/// until it is [`Tried::Done`]. It must not block, and must not keep the runtime.
pub(crate) fn retry(
    reactor: &Arc<Reactor>,
    first: Duration,
    job: impl FnMut() -> Tried + Send + 'static,
) {
    let retry = Arc::new(Retry {
        reactor: Arc::downgrade(reactor),
        key: OnceLock::new(),
        interval: AtomicU64::new(u64::try_from(first.as_nanos()).unwrap_or(u64::MAX)),
        job: Mutex::new(Box::new(job)),
    });
    let key = reactor.register(Arc::clone(&retry) as Arc<dyn Source>);
    let _ = retry.key.set(key);
    retry.schedule();
}

impl Retry {
    fn schedule(&self) {
        let (Some(reactor), Some(&key)) = (self.reactor.upgrade(), self.key.get()) else { return };
        // Relaxed: only the background thread changes it once the timer runs.
        let interval = Duration::from_nanos(self.interval.load(Ordering::Relaxed)).min(LONGEST);
        let next = u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX).saturating_mul(2);
        self.interval.store(next, Ordering::Relaxed);
        reactor.at(Instant::now() + interval, key);
    }
}

impl Source for Retry {
    fn ready(&self, _events: u32) {}

    fn expired(&self) {
        match lock(&self.job)() {
            Tried::Again => self.schedule(),
            Tried::Done => {
                if let (Some(reactor), Some(&key)) = (self.reactor.upgrade(), self.key.get()) {
                    reactor.forget(key);
                }
            }
        }
    }
}
