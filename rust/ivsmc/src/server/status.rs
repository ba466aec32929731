//! What an ivshmem server tells about itself.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// What happened to an ivshmem server, for its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A client has joined.
    Joined {
        /// Its id.
        id: u16,
        /// Its process; absent or 0 if the kernel does not tell.
        pid: Option<i32>,
        /// Its user.
        uid: Option<u32>,
    },
    /// A client has left.
    Left {
        /// Its id.
        id: u16,
        /// Peer slots that were marked dead with it; 0 if it had given them up by itself.
        slots: usize,
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
            Self::Joined { id, pid: Some(pid), uid: Some(uid) } => {
                write!(f, "peer {id} joined (process {pid}, user {uid})")
            }
            Self::Joined { id, .. } => write!(f, "peer {id} joined"),
            Self::Left { id, slots: 0 } => write!(f, "peer {id} left"),
            Self::Left { id, slots } => {
                write!(f, "peer {id} left, {slots} of its slots marked dead")
            }
            Self::Refused { reason } => write!(f, "a newcomer was turned away: {reason}"),
            Self::Paused { reason } => write!(f, "nobody can join for a moment: {reason}"),
        }
    }
}

/// One client as [`Server::status`](super::Server::status) shows it.
#[derive(Clone, Debug)]
pub struct ClientStatus {
    /// Its id.
    pub id: u16,
    /// Its process; absent or 0 if the kernel does not tell.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: Option<u32>,
    /// How long it has been there.
    pub age: Duration,
    /// Things it has not been told yet because it does not read.
    pub behind: usize,
}

/// An ivshmem server at one moment.
#[derive(Clone, Debug)]
pub struct Status {
    /// Where clients connect.
    pub path: PathBuf,
    /// The region's file; absent for a memfd.
    pub file: Option<PathBuf>,
    /// Names the region.
    pub uuid: u128,
    /// Bytes of the region.
    pub size: u64,
    /// Eventfds of each client.
    pub vectors: u16,
    /// By id.
    pub clients: Vec<ClientStatus>,
    /// Ids that are not given out because slots in the region still name them, and no client of
    /// this ivshmem server has them: of clients of an earlier one on the same file.
    pub held_ids: Vec<u16>,
    /// Clients that have joined since the start.
    pub joined: u64,
    /// Clients that have left since the start.
    pub left: u64,
    /// Newcomers turned away since the start.
    pub refused: u64,
}
