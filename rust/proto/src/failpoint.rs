//! Failpoints: where a test has its process die.
//!
//! [`reached`] stands right behind each step that changes what others see. `PROTOCOL.md` has a table
//! of them, "Crash points": what a death right there leaves, who finds it, how it heals. Without the
//! cargo feature `failpoints`, which only tests have, it is nothing at all.

/// What is called at every failpoint, with its name.
#[cfg(feature = "failpoints")]
static ON_REACH: std::sync::OnceLock<fn(&'static str)> = std::sync::OnceLock::new();

/// Has `call` called at every failpoint from now on. Only the first call of this counts.
#[cfg(feature = "failpoints")]
pub fn on_reach(call: fn(&'static str)) {
    let _ = ON_REACH.set(call);
}

/// The process is at the failpoint `name`.
#[inline(always)]
pub fn reached(name: &'static str) {
    #[cfg(feature = "failpoints")]
    if let Some(call) = ON_REACH.get() {
        call(name);
    }
    #[cfg(not(feature = "failpoints"))]
    let _ = name;
}
