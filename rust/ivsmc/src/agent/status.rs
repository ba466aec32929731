//! What an agent tells about itself.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use ivsmc_shm::net::Credentials;

/// A local process, as the kernel says who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who {
    /// Its id; 0 if it is in another namespace.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
}

impl From<Credentials> for Who {
    fn from(credentials: Credentials) -> Self {
        Self { pid: credentials.pid, uid: credentials.uid }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} of user {}", self.pid, self.uid)
    }
}

/// What happened to an agent, for its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A client was taken in.
    Joined {
        /// Who.
        who: Who,
        /// Its peer slot, "index.generation".
        slot: String,
        /// The vector on which it is notified.
        vector: u16,
        /// Others are notified on the same vector.
        is_shared: bool,
    },
    /// A client has left the region by itself.
    Left {
        /// Who.
        who: Who,
    },
    /// A client ended without leaving: what it held was taken back.
    Died {
        /// Who.
        who: Who,
        /// The peer slot it had, "index.generation".
        slot: String,
    },
    /// A newcomer was turned away.
    Refused {
        /// Why, and what mends it.
        reason: String,
    },
    /// Nobody can join for a moment.
    Paused {
        /// Why, and what mends it.
        reason: String,
    },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Joined { who, slot, vector, is_shared } => {
                write!(f, "{who} joined as slot {slot} on vector {vector}")?;
                f.write_str(if *is_shared { ", which it shares" } else { "" })
            }
            Self::Left { who } => write!(f, "{who} left"),
            Self::Died { who, slot } => {
                write!(f, "{who} died; what it held as slot {slot} is taken back")
            }
            Self::Refused { reason } => write!(f, "a newcomer was turned away: {reason}"),
            Self::Paused { reason } => write!(f, "nobody can join for a moment: {reason}"),
        }
    }
}

/// One client as [`Agent::status`](super::Agent::status) shows it.
#[derive(Clone, Debug)]
pub struct ClientStatus {
    /// Who.
    pub who: Who,
    /// Its peer slot, "index.generation".
    pub slot: String,
    /// The vector on which it is notified.
    pub vector: u16,
    /// Others are notified on the same vector.
    pub is_shared: bool,
    /// How long it has been there.
    pub age: Duration,
}

/// An agent at one moment.
#[derive(Clone, Debug)]
pub struct Status {
    /// Where clients connect.
    pub path: PathBuf,
    /// The device it owns.
    pub device: String,
    /// The device's id at the ivshmem server.
    pub ivposition: u16,
    /// Names the region.
    pub uuid: u128,
    /// Bytes of the region.
    pub size: u64,
    /// Vectors of the device.
    pub vectors: u16,
    /// In the order they came.
    pub clients: Vec<ClientStatus>,
    /// Clients taken in since the start.
    pub joined: u64,
    /// Clients that left or died since the start.
    pub left: u64,
    /// Those of them that died.
    pub died: u64,
    /// Newcomers turned away since the start.
    pub refused: u64,
}
