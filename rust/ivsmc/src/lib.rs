//! Stream sessions over ivshmem shared memory.
#![forbid(unsafe_code)]
