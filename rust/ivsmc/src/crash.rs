//! Processes that die at every failpoint (`ivsmc_proto::failpoint`), one test for each.
//!
//! A test starts a child, this program once more, that dies by SIGKILL right at the failpoint, while a
//! *neighbour*, a process too, streams over the same region; it looks at what the dead one left and
//! at what its peer was told. A *newcomer* then connects and streams, and after that nothing is
//! left in the region that was not there before. The expected is what `PROTOCOL.md`, "Crash
//! points", says; [`table`] sees to it that the table, the failpoints and the tests are the same.
//!
//! ```text
//!   test:      Stage (listener, echoes)  <---- neighbour: streams all the time
//!                    |                   <---- newcomer: streams after the death
//!                    +-------------------<---> victim: dies at the failpoint
//! ```

/// Tests that die at a failpoint, each with what it does with its name; and the names.
macro_rules! dies_at {
    ($($test:ident: $name:literal => $run:expr;)*) => {
        /// The failpoints that are reached here.
        pub(super) const NAMES: &[&str] = &[$($name),*];
        $(
            #[test]
            fn $test() {
                let run: fn(&'static str) = $run;
                run($name);
                assert!(crate::crash::process::has_seen_die_at($name));
            }
        )*
    };
}

mod agent;
mod connecting;
mod ivshmem_server;
mod joining;
mod leaving;
mod listening;
mod local;
mod notifying;
mod process;
mod reclaiming;
mod roles;
mod stage;
mod streaming;
mod table;
