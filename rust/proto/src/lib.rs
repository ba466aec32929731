//! The memory and wire protocol of ivsmc, without IO, clock or unsafe code.
//!
//! `PROTOCOL.md` beside this crate is the normative description; each module implements one
//! section of it over [`memory::Memory`], so that a mapping, a heap block and loom's model run
//! the same code.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(feature = "failpoints")]
extern crate std;

pub mod agent;
pub mod allocator;
pub mod clc;
pub mod control;
pub mod directory;
pub mod dmb;
pub mod extent;
pub mod failpoint;
pub mod frame;
#[cfg(any(test, feature = "heap"))]
pub mod heap;
pub mod host;
pub mod intent;
pub mod ivshmem;
pub mod judge;
pub mod layout;
pub mod marker;
pub mod memory;
pub mod proof;
pub mod reclaim;
pub mod region;
pub mod ring;
pub mod slot;
pub mod summary;
pub mod turn;
