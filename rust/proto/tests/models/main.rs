//! The words of a region under loom: every order in which two or three threads can run the real code,
//! with every value that a weak memory may let them see.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p ivsmc-proto --release --test models
//! ```
//!
//! A lost wake-up shows as loom's "deadlock", a missing order as a wrong byte or as two accesses to
//! one DMB that nothing orders ("Causality violation"). That they are found is shown: the
//! `..._is_noticed` tests run the same models with a part taken out.
//!
//! **Bounds.** loom takes a thread off that could go on only so many times in one execution; switches
//! at a thread that sleeps or ends are not counted. Each module says how many threads and how many of
//! these preemptions its models have. With `LOOM_MAX_PREEMPTIONS` all have as many as that says.
//!
//! loom 0.7 treats sequentially consistent accesses as acquire-release ones but models the fence; the
//! code relies on nothing but the fence. A compare-exchange that fails sees the newest value.
//!
//! Descriptors and futexes are modelled by loom's mutex and condition variable: as in the kernel,
//! what was done before the notification is seen after it.
#![cfg(loom)]

mod claims;
mod directory;
mod dmb;
mod doorbell;
mod extent;
mod intent;
#[allow(dead_code)] // Shared with the search of intents, which needs a little more of it.
#[path = "../intent_search/words.rs"]
mod plain;
mod region;
mod ring;
mod ring_memory;
mod slot;
mod waiters;

/// Explores `model` to `bound` preemptions, or as many as the environment says, and says how much
/// that was.
fn explore(bound: usize, model: impl Fn() + Sync + Send + 'static) {
    let executions = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = executions.clone();
    let start = std::time::Instant::now();
    let mut builder = loom::model::Builder::new();
    let bound = *builder.preemption_bound.get_or_insert(bound);
    builder.check(move || {
        counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    });
    println!(
        "{} executions to bound {bound}, {:?}",
        executions.load(std::sync::atomic::Ordering::Relaxed),
        start.elapsed()
    );
}
