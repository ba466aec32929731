//! The protocol of an agent, both ends, without sockets.
//!
//! An agent owns a device of a virtual machine and lets the other processes of that machine use it.
//! On one connection, which lasts as long as the client's attachment:
//!
//! ```text
//!   client                                   agent
//!     HELLO           ------------------->
//!                     <-------------------     WELCOME      device
//!                     <-------------------     DOORBELL     eventfd of the client's vector
//!                     <-------------------     DEPARTURES   eventfd; not if the vector is 0
//!              or     <-------------------     REFUSAL
//! ```
//!
//! A message is a header of [`HEADER_LENGTH`] bytes and a body, with at most one descriptor beside
//! its first byte. Both ends are of one machine: numbers are little-endian.
//!
//! [`ClientProtocol`] is the client; [`read_hello`] and [`AgentMessage::to_bytes`] are what an agent
//! needs.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::slot::{SlotRef, GENERATION_BITS};

/// Bytes of a header: magic 8, version 2, kind 2, length of the body 4.
pub const HEADER_LENGTH: usize = 16;

/// The protocol version there is.
pub const VERSION: u16 = 1;

/// Bytes of a refusal's text, at most.
pub const MAX_REFUSAL: usize = 512;

/// The least bytes of registers: the doorbell is the last one known.
const MIN_REGISTERS: u64 = 16;

const MAGIC: [u8; 8] = *b"ivsmcagt";
const HELLO: u16 = 1;
const WELCOME: u16 = 2;
const DOORBELL: u16 = 3;
const DEPARTURES: u16 = 4;
const REFUSAL: u16 = 5;

/// Bytes of a welcome's body.
const WELCOME_LENGTH: usize = 64;
/// The flag of a welcome: the registers can be mapped.
const CAN_MAP: u16 = 1;

/// A part of the device's descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Where it begins.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// What a client is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Welcome {
    /// The id of the device at the ivshmem server.
    pub ivposition: u16,
    /// The vector on which the client is notified; it may have to share it.
    pub vector: u16,
    /// The peer slot that the agent has claimed for the client.
    pub slot: SlotRef,
    /// Name of the region in which that slot is.
    pub uuid: u128,
    /// The shared memory.
    pub memory: Part,
    /// The registers.
    pub registers: Part,
    /// The registers can be mapped; else they are read and written.
    pub can_map_registers: bool,
}

/// What an agent says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AgentMessage {
    /// The client is taken in. The device's descriptor comes along.
    Welcome(Welcome),
    /// The eventfd on which the client's vector counts comes along.
    Doorbell,
    /// An eventfd comes along that is notified when peers have left.
    Departures,
    /// The client is not taken in: why, and what mends it. The agent ends the connection.
    Refusal(String),
}

impl AgentMessage {
    fn kind(&self) -> u16 {
        match self {
            AgentMessage::Welcome(_) => WELCOME,
            AgentMessage::Doorbell => DOORBELL,
            AgentMessage::Departures => DEPARTURES,
            AgentMessage::Refusal(_) => REFUSAL,
        }
    }

    /// The bytes on the socket. A refusal's text is cut to [`MAX_REFUSAL`] bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            AgentMessage::Welcome(welcome) => message(self.kind(), &welcome.to_bytes()),
            AgentMessage::Doorbell | AgentMessage::Departures => message(self.kind(), &[]),
            AgentMessage::Refusal(text) => {
                let cut = (0..=text.len().min(MAX_REFUSAL)).rev();
                let end = cut.into_iter().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
                message(self.kind(), &text.as_bytes()[..end])
            }
        }
    }
}

impl Welcome {
    fn to_bytes(self) -> [u8; WELCOME_LENGTH] {
        let mut body = [0; WELCOME_LENGTH];
        let mut put = |at: usize, bytes: &[u8]| body[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.ivposition.to_le_bytes());
        put(2, &self.vector.to_le_bytes());
        put(4, &(if self.can_map_registers { CAN_MAP } else { 0 }).to_le_bytes());
        put(6, &self.slot.index.to_le_bytes());
        put(8, &self.slot.generation.to_le_bytes());
        put(16, &self.uuid.to_le_bytes());
        put(32, &self.memory.offset.to_le_bytes());
        put(40, &self.memory.size.to_le_bytes());
        put(48, &self.registers.offset.to_le_bytes());
        put(56, &self.registers.size.to_le_bytes());
        body
    }

    /// What the body says, if it can be.
    fn from_bytes(body: &[u8]) -> Result<Welcome, InvalidMessage> {
        let u64_at = |at| u64::from_le_bytes(array(body, at));
        let u16_at = |at| u16::from_le_bytes(array(body, at));
        let welcome = Welcome {
            ivposition: u16_at(0),
            vector: u16_at(2),
            slot: SlotRef { index: u16_at(6), generation: u32::from_le_bytes(array(body, 8)) },
            uuid: u128::from_le_bytes(array(body, 16)),
            memory: Part { offset: u64_at(32), size: u64_at(40) },
            registers: Part { offset: u64_at(48), size: u64_at(56) },
            can_map_registers: u16_at(4) & CAN_MAP != 0,
        };
        let generations = 1..1 << GENERATION_BITS;
        if !generations.contains(&welcome.slot.generation) {
            return Err(InvalidMessage::Impossible { what: "slot" });
        }
        let fits = |part: &Part| part.offset.checked_add(part.size).is_some();
        if !fits(&welcome.memory) {
            return Err(InvalidMessage::Impossible { what: "memory" });
        }
        if !fits(&welcome.registers)
            || welcome.registers.size < MIN_REGISTERS
            || (welcome.registers.size | welcome.registers.offset) % 4 != 0
        {
            return Err(InvalidMessage::Impossible { what: "registers" });
        }
        Ok(welcome)
    }
}

/// What a client says.
#[must_use]
pub fn hello() -> [u8; HEADER_LENGTH] {
    header(HELLO, 0)
}

/// What a client has said: the version that it speaks.
///
/// # Errors
/// It is no hello.
pub fn read_hello(bytes: &[u8; HEADER_LENGTH]) -> Result<u16, InvalidMessage> {
    let (version, kind, length) = read_header(bytes)?;
    if kind != HELLO || length != 0 {
        return Err(InvalidMessage::Unexpected { kind });
    }
    Ok(version)
}

fn message(kind: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LENGTH + body.len());
    bytes.extend_from_slice(&header(kind, body.len()));
    bytes.extend_from_slice(body);
    bytes
}

#[allow(clippy::cast_possible_truncation)] // No body is longer than MAX_REFUSAL.
fn header(kind: u16, length: usize) -> [u8; HEADER_LENGTH] {
    let mut bytes = [0; HEADER_LENGTH];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    bytes[10..12].copy_from_slice(&kind.to_le_bytes());
    bytes[12..].copy_from_slice(&(length as u32).to_le_bytes());
    bytes
}

/// Version, kind, and length of the body.
fn read_header(bytes: &[u8]) -> Result<(u16, u16, u32), InvalidMessage> {
    if array(bytes, 0) != MAGIC {
        return Err(InvalidMessage::NoMagic { found: array(bytes, 0) });
    }
    Ok((
        u16::from_le_bytes(array(bytes, 8)),
        u16::from_le_bytes(array(bytes, 10)),
        u32::from_le_bytes(array(bytes, 12)),
    ))
}

/// `N` bytes at `at`; zeros where `bytes` ends, which it does nowhere here.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).unwrap_or([0; N])
}

/// A client of an agent: takes what the agent says piece by piece.
///
/// The agent is believed in what it says, not in how: a message out of order, without its
/// descriptor or with one too many ends the protocol with an error, and stays so.
#[derive(Clone, Debug, Default)]
pub struct ClientProtocol {
    expected: Expected,
    /// Kind and length of the message whose body is to come.
    body: Option<(u16, usize)>,
    failed: Option<InvalidMessage>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Expected {
    #[default]
    Answer,
    Doorbell {
        departures: bool,
    },
    Departures,
    Nothing,
}

impl ClientProtocol {
    /// A client that has said [`hello`] and received nothing yet.
    #[must_use]
    pub fn new() -> ClientProtocol {
        ClientProtocol::default()
    }

    /// Bytes of the next piece: of a header, or of the body that follows it. 0 when all has been
    /// said.
    #[must_use]
    pub fn wants(&self) -> usize {
        match (self.body, self.expected) {
            (Some((_, length)), _) => length,
            (None, Expected::Nothing) => 0,
            (None, _) => HEADER_LENGTH,
        }
    }

    /// Takes the next piece, of as many bytes as were wanted, and whether a descriptor came with it;
    /// gives the message that is complete with it, if one is.
    ///
    /// # Errors
    /// The message is not one that can come now. Every later call returns the same error.
    pub fn take(
        &mut self,
        piece: &[u8],
        has_fd: bool,
    ) -> Result<Option<AgentMessage>, InvalidMessage> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let taken = match self.body.take() {
            None => self.take_header(piece, has_fd),
            Some((kind, _)) if has_fd => Err(InvalidMessage::UnexpectedDescriptor { kind }),
            Some((REFUSAL, _)) => {
                self.expected = Expected::Nothing;
                Ok(Some(AgentMessage::Refusal(String::from_utf8_lossy(piece).into_owned())))
            }
            Some(_) => Welcome::from_bytes(piece).map(|welcome| {
                self.expected = Expected::Doorbell { departures: welcome.vector != 0 };
                Some(AgentMessage::Welcome(welcome))
            }),
        };
        if let Err(error) = taken {
            self.failed = Some(error);
        }
        taken
    }

    fn take_header(
        &mut self,
        piece: &[u8],
        has_fd: bool,
    ) -> Result<Option<AgentMessage>, InvalidMessage> {
        let (version, kind, length) = read_header(piece)?;
        // Of a refusal only the version may be another: it may be the reason.
        if version != VERSION && kind != REFUSAL {
            return Err(InvalidMessage::WrongVersion { found: version });
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let (lengths, wants_fd, next) = match (self.expected, kind) {
            (Expected::Answer, WELCOME) => (WELCOME_LENGTH..=WELCOME_LENGTH, true, None),
            (Expected::Answer, REFUSAL) => (1..=MAX_REFUSAL, false, None),
            (Expected::Doorbell { departures }, DOORBELL) => {
                let next = if departures { Expected::Departures } else { Expected::Nothing };
                (0..=0, true, Some((AgentMessage::Doorbell, next)))
            }
            (Expected::Departures, DEPARTURES) => {
                (0..=0, true, Some((AgentMessage::Departures, Expected::Nothing)))
            }
            _ => return Err(InvalidMessage::Unexpected { kind }),
        };
        if !lengths.contains(&length) {
            return Err(InvalidMessage::WrongLength { kind, found: length });
        }
        match (wants_fd, has_fd) {
            (true, false) => return Err(InvalidMessage::DescriptorMissing { kind }),
            (false, true) => return Err(InvalidMessage::UnexpectedDescriptor { kind }),
            _ => {}
        }
        Ok(match next {
            Some((message, next)) => {
                self.expected = next;
                Some(message)
            }
            None => {
                self.body = Some((kind, length));
                None
            }
        })
    }
}

/// The other end of a socket does not speak this protocol: what it said instead.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum InvalidMessage {
    /// The message does not begin as all do.
    NoMagic {
        /// How it begins.
        found: [u8; 8],
    },
    /// The message is not of the version known here.
    WrongVersion {
        /// Its version.
        found: u16,
    },
    /// A message of this kind cannot come now.
    Unexpected {
        /// The kind.
        kind: u16,
    },
    /// The body cannot be that long.
    WrongLength {
        /// The kind of the message.
        kind: u16,
        /// The length, bytes.
        found: usize,
    },
    /// A descriptor belongs to that message, and none came.
    DescriptorMissing {
        /// The kind of the message.
        kind: u16,
    },
    /// A descriptor came where none belongs.
    UnexpectedDescriptor {
        /// The kind of the message.
        kind: u16,
    },
    /// What the welcome says of this cannot be.
    Impossible {
        /// Of what.
        what: &'static str,
    },
}

impl fmt::Display for InvalidMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            InvalidMessage::NoMagic { found } => {
                let text = String::from_utf8_lossy(&found);
                write!(f, "the first bytes of a message are {text:?}")
            }
            InvalidMessage::WrongVersion { found } => {
                write!(f, "it speaks version {found} of the agent's protocol, not {VERSION}")
            }
            InvalidMessage::Unexpected { kind } => {
                write!(f, "a message of kind {kind} cannot come now")
            }
            InvalidMessage::WrongLength { kind, found } => {
                write!(f, "a message of kind {kind} has a body of {found} bytes")
            }
            InvalidMessage::DescriptorMissing { kind } => {
                write!(f, "no descriptor came with the message of kind {kind}")
            }
            InvalidMessage::UnexpectedDescriptor { kind } => {
                write!(f, "a descriptor came with the message of kind {kind}")
            }
            InvalidMessage::Impossible { what } => {
                write!(f, "what the welcome says of the {what} cannot be")
            }
        }
    }
}

impl core::error::Error for InvalidMessage {}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::borrow::ToOwned;
    use alloc::string::ToString;
    use alloc::vec;

    fn welcome(vector: u16) -> Welcome {
        Welcome {
            ivposition: 0x0102,
            vector,
            slot: SlotRef { index: 0x0304, generation: (1 << 26) - 1 },
            uuid: 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100,
            memory: Part { offset: 2 << 40, size: 1 << 28 },
            registers: Part { offset: 0, size: 256 },
            can_map_registers: true,
        }
    }

    /// Gives `bytes` of one message to `client`, the descriptor with the first piece.
    fn give(
        client: &mut ClientProtocol,
        bytes: &[u8],
        has_fd: bool,
    ) -> Result<Vec<AgentMessage>, InvalidMessage> {
        let (mut rest, mut has_fd, mut messages) = (bytes, has_fd, vec![]);
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(client.wants().min(rest.len()));
            messages.extend(client.take(piece, core::mem::take(&mut has_fd))?);
            rest = after;
        }
        Ok(messages)
    }

    #[test]
    fn both_ends_agree() {
        assert_eq!(read_hello(&hello()), Ok(VERSION));
        for vector in [0, 3] {
            let mut script = vec![AgentMessage::Welcome(welcome(vector)), AgentMessage::Doorbell];
            script.extend((vector != 0).then_some(AgentMessage::Departures));
            let mut client = ClientProtocol::new();
            for message in &script {
                assert!(client.wants() > 0);
                let got = give(&mut client, &message.to_bytes(), true).unwrap();
                assert_eq!(got, core::slice::from_ref(message));
            }
            assert_eq!(client.wants(), 0);
        }
        let refusal = AgentMessage::Refusal("all 64 vectors are taken".into());
        let mut client = ClientProtocol::new();
        assert_eq!(give(&mut client, &refusal.to_bytes(), false).unwrap(), [refusal]);
        assert_eq!(client.wants(), 0);
    }

    #[test]
    fn bytes_are_as_documented() {
        assert_eq!(&hello(), b"ivsmcagt\x01\0\x01\0\0\0\0\0");
        let bytes = AgentMessage::Welcome(welcome(7)).to_bytes();
        assert_eq!(bytes.len(), HEADER_LENGTH + 64);
        assert_eq!(&bytes[..16], b"ivsmcagt\x01\0\x02\0\x40\0\0\0");
        assert_eq!(bytes[16..28], [2, 1, 7, 0, 1, 0, 4, 3, 0xff, 0xff, 0xff, 3]);
        assert_eq!(bytes[28..32], [0; 4]);
        assert_eq!(bytes[32..48], core::array::from_fn::<u8, 16, _>(|n| u8::try_from(n).unwrap()));
        assert_eq!(bytes[48..64], [0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0]);
        assert_eq!(bytes[64..], [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_long_refusal_is_cut_between_characters() {
        let text = "x".to_owned() + &"ä".repeat(MAX_REFUSAL);
        let bytes = AgentMessage::Refusal(text.clone()).to_bytes();
        assert_eq!(bytes.len(), HEADER_LENGTH + MAX_REFUSAL - 1);
        let got = give(&mut ClientProtocol::new(), &bytes, false).unwrap();
        assert_eq!(got, [AgentMessage::Refusal(text[..MAX_REFUSAL - 1].into())]);
    }

    #[test]
    fn what_cannot_come_is_refused_and_stays_so() {
        let good = AgentMessage::Welcome(welcome(1)).to_bytes();
        let with = |at: usize, bytes: &[u8]| {
            let mut changed = good.clone();
            changed[at..at + bytes.len()].copy_from_slice(bytes);
            changed
        };
        let cases = [
            (
                b"HTTP/1.1 400 Bad Request".to_vec(),
                false,
                "first bytes of a message are \"HTTP/1.1",
            ),
            (with(8, &[2]), true, "version 2"),
            (with(10, &[1]), true, "kind 1 cannot come now"),
            (AgentMessage::Doorbell.to_bytes(), true, "kind 3 cannot come now"),
            (with(12, &[65]), true, "body of 65 bytes"),
            (with(12, &[0xff; 4]), true, "body of 4294967295 bytes"),
            (good.clone(), false, "no descriptor came"),
            (AgentMessage::Refusal("x".into()).to_bytes(), true, "a descriptor came"),
            (AgentMessage::Refusal(String::new()).to_bytes(), false, "body of 0 bytes"),
            (with(24, &[0; 4]), true, "the slot cannot be"),
            (with(27, &[4]), true, "the slot cannot be"),
            (with(48, &[0xff; 8]), true, "the memory cannot be"),
            (with(64, &[0xff; 8]), true, "the registers cannot be"),
            (with(72, &[12, 0]), true, "the registers cannot be"),
            (with(72, &[2, 1]), true, "the registers cannot be"),
        ];
        for (bytes, has_fd, text) in cases {
            let mut client = ClientProtocol::new();
            let error = give(&mut client, &bytes, has_fd).unwrap_err();
            assert!(error.to_string().contains(text), "{error} and not {text}");
            assert_eq!(client.take(&[0; HEADER_LENGTH], false), Err(error));
        }
        // The agent may say so because of the version.
        let mut refusal = AgentMessage::Refusal("too old".into()).to_bytes();
        refusal[8] = 9;
        assert!(give(&mut ClientProtocol::new(), &refusal, false).is_ok());
    }

    #[test]
    fn a_descriptor_in_the_middle_of_a_message_is_refused() {
        let bytes = AgentMessage::Welcome(welcome(1)).to_bytes();
        let mut client = ClientProtocol::new();
        assert_eq!(client.take(&bytes[..HEADER_LENGTH], true), Ok(None));
        assert_eq!(client.wants(), 64);
        let error = client.take(&bytes[HEADER_LENGTH..], true).unwrap_err();
        assert_eq!(error, InvalidMessage::UnexpectedDescriptor { kind: WELCOME });
    }

    #[test]
    fn what_is_no_hello_is_refused() {
        let mut bytes = hello();
        bytes[8] = 7;
        assert_eq!(read_hello(&bytes), Ok(7));
        assert!(read_hello(b"GET / HTTP/1.1\r\n").is_err());
        for (at, byte) in [(0, b'I'), (10, 2), (12, 1)] {
            let mut bytes = hello();
            bytes[at] = byte;
            assert!(read_hello(&bytes).is_err(), "{at}");
        }
    }
}
