//! CLC: the messages that set a session up, on the TCP connection, before any user data.
//!
//! The messages are those of SMC-Dv2.1 for an emulated ISM device, as Linux sends and checks them
//! (`net/smc/smc_clc.h`, `smc_clc.c`, `smc_ism.h`); nothing else of SMC is spoken here. What is
//! well-formed SMC but not that (SMC-R, SMC-Dv1, a later version) decodes to
//! [`Message::Unsupported`], so that the receiver can decline it by name. Anything else is an
//! [`InvalidMessage`] saying what is wrong and where.
//!
//! ```text
//!   +------------+------+--------+-------+----------------------------+---------+
//!   | eyecatcher | type | length | flags | body                       | trailer |
//!   | 4          | 1    | 2      | 1     | length - 12                | 4       |
//!   +------------+------+--------+-------+----------------------------+---------+
//! ```
//!
//! All numbers are big-endian. The bytes come from a peer: [`decode`] reads within bounds, judges
//! every count and offset before use, and never panics. Reserved bytes are sent as zero and
//! ignored when received; unknown codes survive in newtypes.

mod accept;
mod decline;
mod diagnosis;
mod eid;
mod gid;
mod header;
mod invalid;
mod proposal;
mod reader;

pub use accept::{AcceptConfirm, FirstContact, Hostname};
pub use decline::{Decline, OsType};
pub use diagnosis::Diagnosis;
pub use eid::{Eid, InvalidEid};
pub use gid::{Chid, Gid};
pub use header::{Eyecatcher, Header, MessageType, Mode, HEADER_LENGTH, MAX_LENGTH, MIN_LENGTH};
pub use invalid::InvalidMessage;
pub use proposal::{Device, Proposal, FEATURE_EMULATED_ISM, MAX_DEVICES, MAX_EIDS, RELEASE};

use reader::Reader;

/// SMC version of the messages sent here.
pub const VERSION: u8 = 2;

const TRAILER_LENGTH: usize = 4;

/// A whole CLC message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// From the client: its devices and EIDs.
    Proposal(Proposal),
    /// From the ivsmc peer that listens: the chosen device and its DMB.
    Accept(AcceptConfirm),
    /// From the client: its DMB.
    Confirm(AcceptConfirm),
    /// From either: the session goes on over TCP.
    Decline(Decline),
    /// Well-formed in its outer shape, but no SMC-Dv2 message: SMC-R, SMC-Dv1, a later version.
    Unsupported {
        /// Proposal, Accept or Confirm.
        kind: MessageType,
        /// SMC version, 1..=15.
        version: u8,
        /// What a Proposal offers in version 1; the chosen mode in Accept and Confirm.
        typev1: Mode,
        /// What a Proposal offers in version 2.
        typev2: Mode,
    },
}

impl Message {
    /// Which message this is.
    #[must_use]
    pub fn kind(&self) -> MessageType {
        match self {
            Message::Proposal(_) => MessageType::PROPOSAL,
            Message::Accept(_) => MessageType::ACCEPT,
            Message::Confirm(_) => MessageType::CONFIRM,
            Message::Decline(_) => MessageType::DECLINE,
            Message::Unsupported { kind, .. } => *kind,
        }
    }
}

/// How many bytes the message has that begins with `header`, [`MIN_LENGTH`]..=[`MAX_LENGTH`].
///
/// For a receiver that peeks at the header and then reads exactly the message: bytes after it
/// belong to somebody else.
///
/// # Errors
/// What [`Header::decode`] finds wrong.
pub fn expected_length(header: &[u8; HEADER_LENGTH]) -> Result<usize, InvalidMessage> {
    Header::decode(header).map(|header| usize::from(header.length))
}

/// Decodes one whole message: not a byte less, not a byte more.
///
/// # Errors
/// What is wrong with it, and where.
pub fn decode(bytes: &[u8]) -> Result<Message, InvalidMessage> {
    let header = Header::decode(bytes)?;
    let length = usize::from(header.length);
    if bytes.len() < length {
        return Err(InvalidMessage::Truncated {
            what: "message",
            at: 0,
            needed: length,
            found: bytes.len(),
        });
    }
    if bytes.len() > length {
        return Err(InvalidMessage::TrailingBytes { at: length, count: bytes.len() - length });
    }
    let (body, trailer) = bytes.split_at(length - TRAILER_LENGTH);
    Eyecatcher::decode(trailer, "trailer", body.len())?;

    let reader = Reader::new(body, HEADER_LENGTH);
    match header.kind {
        // A Decline ends a handshake whatever version it is written in.
        MessageType::DECLINE => Decline::decode(&header, reader).map(Message::Decline),
        MessageType::PROPOSAL if Proposal::is_supported(&header) => {
            Proposal::decode(&header, reader).map(Message::Proposal)
        }
        MessageType::ACCEPT if AcceptConfirm::is_supported(&header)? => {
            AcceptConfirm::decode(&header, reader).map(Message::Accept)
        }
        MessageType::CONFIRM if AcceptConfirm::is_supported(&header)? => {
            AcceptConfirm::decode(&header, reader).map(Message::Confirm)
        }
        kind => Ok(Message::Unsupported {
            kind,
            version: header.version,
            typev1: header.typev1,
            typev2: header.typev2,
        }),
    }
}
