//! Stream sessions over ivshmem shared memory, set up as SMC-D is, with TCP fallback.
//!
//! A [`Session`] is made by [`connect()`] or [`Listener::accept`]. It behaves as a TCP socket does;
//! whether its bytes go through shared memory is decided at set-up and told by
//! [`Session::fallback`].
#![forbid(unsafe_code)]

mod accept;
mod acceptor;
pub mod agent;
mod attachment;
mod bare;
mod boot;
mod connect;
#[cfg(test)]
mod crash;
mod device;
mod devices;
mod error;
mod fallback;
#[cfg(fuzzing)]
pub mod fuzzing;
mod handshake;
mod host;
mod listen;
mod options;
mod reactor;
mod readiness;
mod retry;
mod runtime;
pub mod server;
mod session;
mod setting;
mod setup;
mod slots;
mod socket;
mod source;
mod spin;
mod wait;

pub use attachment::{AttachmentStats, DoorbellStats};
pub use bare::{limit, Limit};
pub use connect::{connect, ConnectOptions, Require};
pub use device::{Kind, MemoryType};
pub use devices::{devices, open_device, Device, DeviceInfo, RegionInfo};
pub use error::{Error, Result};
pub use fallback::{Fallback, Reason, Side};
pub use handshake::set_match_wait;
pub use host::{Deadline, Host, Plain, Timeout};
pub use listen::{ListenOptions, Listener, ListenerStats};
pub use runtime::{close_all, release_unused};
pub use session::{RecvFlags, Session, SessionStats, Shutdown};
pub use slots::SlotReport;
pub use spin::set_spin;
