//! The ivshmem server's protocol, both ends, without sockets.
//!
//! Every message is [`MESSAGE_LENGTH`] bytes, a little-endian signed number, with at most one
//! descriptor beside it; all go from the ivshmem server to a client
//! (QEMU `docs/specs/ivshmem-spec.rst`, "Client-Server protocol"):
//!
//! ```text
//!   0           -             protocol version
//!   id          -             the client's own id, 0..=65535
//!   -1          region        the shared memory
//!   other id    eventfd       one per vector of a peer that is there, in order
//!   own id      eventfd       one per own vector, in order
//!   later:
//!   id          eventfd       the next vector of a newcomer
//!   id          -             that peer has left
//! ```
//!
//! [`ClientProtocol`] is the client; [`welcome`], [`newcomer`] and [`left`] are what an ivshmem
//! server sends.

use alloc::collections::BTreeMap;
use core::fmt;

/// Bytes of a message.
pub const MESSAGE_LENGTH: usize = 8;

/// The protocol version there is.
pub const VERSION: i64 = 0;

/// Vectors one peer can have: QEMU keeps eight bits of a vector's number.
pub const MAX_VECTORS: u16 = 256;

const REGION: i64 = -1;

/// What an ivshmem server tells its client; a message with a descriptor hands it over.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum ClientEvent {
    /// The server speaks the version known here.
    Version,
    /// The client's own id.
    OwnId(u16),
    /// The descriptor is the region.
    Region,
    /// The descriptor is an eventfd that interrupts `peer` on `vector`.
    PeerVector {
        /// The peer's id.
        peer: u16,
        /// 0.., in order.
        vector: u16,
    },
    /// The descriptor is an eventfd on which `vector` of the client itself is received.
    OwnVector {
        /// 0.., in order.
        vector: u16,
    },
    /// The peer has left; its id may be given to another.
    PeerLeft {
        /// The peer's id.
        peer: u16,
    },
}

/// A client of an ivshmem server: takes its messages one by one.
///
/// The server is believed in what it says, not in how: a message out of order, without its
/// descriptor or with one too many ends the protocol with an error, and stays so.
#[derive(Clone, Debug)]
pub struct ClientProtocol {
    state: State,
    /// Vectors seen so far of each id that is there.
    vectors: BTreeMap<u16, u16>,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum State {
    Version,
    OwnId,
    Region { own: u16 },
    Peers { own: u16 },
    Failed(InvalidMessage),
}

impl Default for ClientProtocol {
    fn default() -> ClientProtocol {
        ClientProtocol::new()
    }
}

impl ClientProtocol {
    /// A client that has received nothing yet.
    #[must_use]
    pub fn new() -> ClientProtocol {
        ClientProtocol { state: State::Version, vectors: BTreeMap::new() }
    }

    /// Takes the next message: its number and whether a descriptor came with it.
    ///
    /// # Errors
    /// The message is not one that can come now. Every later call returns the same error.
    pub fn message(&mut self, value: i64, has_fd: bool) -> Result<ClientEvent, InvalidMessage> {
        let taken = self.take(value, has_fd);
        if let Err(error) = taken {
            self.state = State::Failed(error);
        }
        taken
    }

    /// Whether version, own id and region are not all there yet.
    #[must_use]
    pub fn is_starting(&self) -> bool {
        !matches!(self.state, State::Peers { .. })
    }

    fn take(&mut self, value: i64, has_fd: bool) -> Result<ClientEvent, InvalidMessage> {
        match self.state {
            State::Failed(error) => Err(error),
            State::Version => {
                without_descriptor("protocol version", value, has_fd)?;
                if value != VERSION {
                    return Err(InvalidMessage::WrongVersion { found: value });
                }
                self.state = State::OwnId;
                Ok(ClientEvent::Version)
            }
            State::OwnId => {
                without_descriptor("own id", value, has_fd)?;
                let own = id("own id", value)?;
                self.state = State::Region { own };
                Ok(ClientEvent::OwnId(own))
            }
            State::Region { own } => {
                if value != REGION {
                    return Err(InvalidMessage::NotTheRegion { found: value });
                }
                if !has_fd {
                    return Err(InvalidMessage::DescriptorMissing { what: "region", value });
                }
                self.state = State::Peers { own };
                Ok(ClientEvent::Region)
            }
            State::Peers { own } => {
                let peer = id("peer id", value)?;
                if has_fd {
                    return self.vector(own, peer);
                }
                if peer == own {
                    return Err(InvalidMessage::DescriptorMissing { what: "own vector", value });
                }
                self.vectors.remove(&peer);
                Ok(ClientEvent::PeerLeft { peer })
            }
        }
    }

    fn vector(&mut self, own: u16, peer: u16) -> Result<ClientEvent, InvalidMessage> {
        let seen = self.vectors.entry(peer).or_insert(0);
        let vector = *seen;
        if vector == MAX_VECTORS {
            return Err(InvalidMessage::TooManyVectors { peer });
        }
        *seen += 1;
        Ok(if peer == own {
            ClientEvent::OwnVector { vector }
        } else {
            ClientEvent::PeerVector { peer, vector }
        })
    }
}

fn id(what: &'static str, value: i64) -> Result<u16, InvalidMessage> {
    u16::try_from(value).map_err(|_| InvalidMessage::NoId { what, value })
}

fn without_descriptor(what: &'static str, value: i64, has_fd: bool) -> Result<(), InvalidMessage> {
    if has_fd {
        Err(InvalidMessage::UnexpectedDescriptor { what, value })
    } else {
        Ok(())
    }
}

/// The other end of a socket does not speak the ivshmem server's protocol: what it said instead.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum InvalidMessage {
    /// The first message is not the version known here.
    WrongVersion {
        /// What it is.
        found: i64,
    },
    /// Where an id belongs stands no id.
    NoId {
        /// Whose id belongs there.
        what: &'static str,
        /// What stands there.
        value: i64,
    },
    /// Where the region belongs stands something else.
    NotTheRegion {
        /// What stands there.
        found: i64,
    },
    /// A descriptor belongs to that message, and none came.
    DescriptorMissing {
        /// What it would be.
        what: &'static str,
        /// The message.
        value: i64,
    },
    /// A descriptor came where none belongs.
    UnexpectedDescriptor {
        /// The message it came with.
        what: &'static str,
        /// The message's number.
        value: i64,
    },
    /// A peer has more than [`MAX_VECTORS`] vectors.
    TooManyVectors {
        /// The peer.
        peer: u16,
    },
}

impl fmt::Display for InvalidMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not an ivshmem server: ")?;
        match *self {
            InvalidMessage::WrongVersion { found } => {
                write!(f, "the first message is {found}, not protocol version {VERSION}")
            }
            InvalidMessage::NoId { what, value } => {
                write!(f, "{value} stands where the {what} (0..=65535) belongs")
            }
            InvalidMessage::NotTheRegion { found } => {
                write!(f, "{found} stands where the region ({REGION}) belongs")
            }
            InvalidMessage::DescriptorMissing { what, value } => {
                write!(f, "no descriptor came with the {what} (message {value})")
            }
            InvalidMessage::UnexpectedDescriptor { what, value } => {
                write!(f, "a descriptor came with the {what} (message {value})")
            }
            InvalidMessage::TooManyVectors { peer } => {
                write!(f, "peer {peer} has more than {MAX_VECTORS} vectors")
            }
        }
    }
}

impl core::error::Error for InvalidMessage {}

/// A message of an ivshmem server.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct ServerMessage {
    /// Its number.
    pub value: i64,
    /// What goes along with it.
    pub descriptor: Descriptor,
}

impl ServerMessage {
    /// The bytes on the socket.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; MESSAGE_LENGTH] {
        self.value.to_le_bytes()
    }
}

/// Which descriptor goes along with a message.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Descriptor {
    /// None.
    None,
    /// The shared memory.
    Region,
    /// The eventfd that interrupts `peer` on `vector`; the same one for it and for all others.
    Vector {
        /// The peer's id.
        peer: u16,
        /// 0.., in order.
        vector: u16,
    },
}

/// What a newcomer with id `own` and `vectors` eventfds is sent, in order.
///
/// `others` are id and number of vectors of the peers that are there.
pub fn welcome(
    own: u16,
    vectors: u16,
    others: impl IntoIterator<Item = (u16, u16)>,
) -> impl Iterator<Item = ServerMessage> {
    let message = |value, descriptor| ServerMessage { value, descriptor };
    [
        message(VERSION, Descriptor::None),
        message(i64::from(own), Descriptor::None),
        message(REGION, Descriptor::Region),
    ]
    .into_iter()
    .chain(others.into_iter().flat_map(|(id, vectors)| newcomer(id, vectors)))
    .chain(newcomer(own, vectors))
}

/// What the others are sent about a newcomer with id `id` and `vectors` eventfds, in order.
pub fn newcomer(id: u16, vectors: u16) -> impl Iterator<Item = ServerMessage> {
    (0..vectors).map(move |vector| ServerMessage {
        value: i64::from(id),
        descriptor: Descriptor::Vector { peer: id, vector },
    })
}

/// What the others are sent when the peer `id` has left.
#[must_use]
pub const fn left(id: u16) -> ServerMessage {
    ServerMessage { value: id as i64, descriptor: Descriptor::None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec;
    use alloc::vec::Vec;

    fn started() -> ClientProtocol {
        let mut client = ClientProtocol::new();
        for (value, has_fd) in [(0, false), (7, false), (-1, true)] {
            assert!(client.is_starting());
            client.message(value, has_fd).unwrap();
        }
        assert!(!client.is_starting());
        client
    }

    #[test]
    fn client_understands_the_messages_of_the_specification() {
        // QEMU docs/specs/ivshmem-spec.rst: two vectors each, peers 0 and 3 are there.
        let script = [
            (0, false, ClientEvent::Version),
            (7, false, ClientEvent::OwnId(7)),
            (-1, true, ClientEvent::Region),
            (0, true, ClientEvent::PeerVector { peer: 0, vector: 0 }),
            (0, true, ClientEvent::PeerVector { peer: 0, vector: 1 }),
            (3, true, ClientEvent::PeerVector { peer: 3, vector: 0 }),
            (3, true, ClientEvent::PeerVector { peer: 3, vector: 1 }),
            (7, true, ClientEvent::OwnVector { vector: 0 }),
            (7, true, ClientEvent::OwnVector { vector: 1 }),
            (3, false, ClientEvent::PeerLeft { peer: 3 }),
            (3, true, ClientEvent::PeerVector { peer: 3, vector: 0 }),
        ];
        let mut client = ClientProtocol::new();
        for (value, has_fd, event) in script {
            assert_eq!(client.message(value, has_fd), Ok(event));
        }
    }

    #[test]
    fn both_ends_agree() {
        let mut messages: Vec<ServerMessage> = welcome(2, 3, [(0, 1), (65_535, 2)]).collect();
        messages.extend(newcomer(9, 2));
        messages.push(left(0));
        let mut client = ClientProtocol::new();
        let mut descriptors = vec![];
        for message in messages {
            let value = i64::from_le_bytes(message.to_bytes());
            let has_fd = message.descriptor != Descriptor::None;
            let vector = match client.message(value, has_fd).unwrap() {
                ClientEvent::PeerVector { peer, vector } => Some((peer, vector)),
                ClientEvent::OwnVector { vector } => Some((2, vector)),
                _ => None,
            };
            if let Descriptor::Vector { peer, vector: sent } = message.descriptor {
                assert_eq!(vector, Some((peer, sent)));
                descriptors.push((peer, sent));
            }
        }
        let all = [(0, 0), (65_535, 0), (65_535, 1), (2, 0), (2, 1), (2, 2), (9, 0), (9, 1)];
        assert_eq!(descriptors, all);
    }

    #[test]
    fn messages_are_little_endian() {
        assert_eq!(left(0x0102).to_bytes(), [2, 1, 0, 0, 0, 0, 0, 0]);
        let region = welcome(0, 0, []).nth(2).unwrap();
        assert_eq!(region.to_bytes(), [0xFF; 8]);
    }

    #[test]
    fn refuses_what_cannot_come_now() {
        let start = ClientProtocol::new;
        let after = |count: usize| {
            let mut client = start();
            for (value, has_fd) in [(0, false), (7, false), (-1, true)].into_iter().take(count) {
                client.message(value, has_fd).unwrap();
            }
            client
        };
        let cases = [
            (0, 5, false, "the first message is 5, not protocol version 0"),
            (0, 0, true, "a descriptor came with the protocol version (message 0)"),
            (1, -1, false, "-1 stands where the own id (0..=65535) belongs"),
            (1, 7, true, "a descriptor came with the own id (message 7)"),
            (2, 7, true, "7 stands where the region (-1) belongs"),
            (2, -1, false, "no descriptor came with the region (message -1)"),
            (3, 65_536, true, "65536 stands where the peer id (0..=65535) belongs"),
            (
                3,
                i64::MIN,
                false,
                "-9223372036854775808 stands where the peer id (0..=65535) belongs",
            ),
            (3, 7, false, "no descriptor came with the own vector (message 7)"),
        ];
        for (count, value, has_fd, text) in cases {
            let mut client = after(count);
            let error = client.message(value, has_fd).unwrap_err();
            assert_eq!(error.to_string().strip_prefix("not an ivshmem server: "), Some(text));
            // It stays refused.
            assert_eq!(client.message(0, false), Err(error));
        }
    }

    #[test]
    fn bounds_the_vectors_of_a_peer() {
        let mut client = started();
        for vector in 0..MAX_VECTORS {
            let event = ClientEvent::PeerVector { peer: 1, vector };
            assert_eq!(client.message(1, true), Ok(event));
        }
        assert_eq!(client.message(1, true), Err(InvalidMessage::TooManyVectors { peer: 1 }));
    }

    #[test]
    fn a_peer_never_announced_may_leave() {
        assert_eq!(started().message(1, false), Ok(ClientEvent::PeerLeft { peer: 1 }));
    }
}
