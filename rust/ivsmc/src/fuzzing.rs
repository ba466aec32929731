//! Ways for the fuzz targets (`rust/fuzz`) into what is private; in no other build.
//!
//! Each hands the real code a connection or a text of the target's own making.

pub use crate::agent::fuzzing::agent;
pub use crate::device::fuzzing::{agent_client, device_list, ivshmem_client, Found};
