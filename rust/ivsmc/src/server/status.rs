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
    /// It goes on where one before it was broken off.
    Resumed {
        /// Clients that one had.
        clients: usize,
    },
    /// It goes on otherwise than its options say.
    Unlike {
        /// In what.
        what: String,
    },
    /// A client that may still be there was not kept: nobody sees its end, its id is not given again.
    Lost {
        /// Its id.
        id: u16,
    },
    /// Nobody keeps its descriptors any more: its end would be that of its clients' connections.
    Unheld {
        /// Why.
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
            Self::Resumed { clients } => write!(f, "goes on, with {clients} peers as before"),
            Self::Unlike { what } => write!(f, "{what} until it is stopped and starts anew"),
            Self::Lost { id } => write!(
                f,
                "peer {id} may live, but its connection was not kept: its id is not given again \
                 until it is stopped and starts anew"
            ),
            Self::Unheld { reason } => {
                write!(f, "nobody keeps its descriptors any more, a restart loses them: {reason}")
            }
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
    /// this ivshmem server has them: of clients of an earlier one on the same file, or that were
    /// not kept over a restart.
    pub held_ids: Vec<u16>,
    /// Clients that have joined since the start.
    pub joined: u64,
    /// Clients that have left since the start.
    pub left: u64,
    /// Newcomers turned away since the start.
    pub refused: u64,
}
