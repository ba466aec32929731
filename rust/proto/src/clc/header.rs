//! The eight bytes every CLC message begins with, and the eyecatcher it ends with.

use alloc::vec::Vec;
use core::fmt;

use super::reader::Reader;
use super::{InvalidMessage, TRAILER_LENGTH, VERSION};

/// Bytes of a header.
pub const HEADER_LENGTH: usize = 8;

/// The shortest message there is: a Decline of version 1.
pub const MIN_LENGTH: usize = 28;

/// The longest message Linux sends: a Proposal of every kind with eight prefixes, EIDs and entries.
pub const MAX_LENGTH: usize = 652;

/// The four bytes a message begins and ends with, in EBCDIC.
///
/// Linux puts SMCR around Proposal and Decline even where only SMC-D is meant, SMCD around Accept
/// and Confirm of SMC-D, and takes either from a peer (`smc_clc.c`).
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Eyecatcher {
    /// "SMCR"
    Smcr,
    /// "SMCD"
    Smcd,
}

impl Eyecatcher {
    /// The bytes on the wire.
    #[must_use]
    pub const fn bytes(self) -> [u8; 4] {
        match self {
            Eyecatcher::Smcr => [0xE2, 0xD4, 0xC3, 0xD9],
            Eyecatcher::Smcd => [0xE2, 0xD4, 0xC3, 0xC4],
        }
    }

    /// Reads the first four of `bytes`, which are `what` and stand at `at` in their message.
    pub(super) fn decode(
        bytes: &[u8],
        what: &'static str,
        at: usize,
    ) -> Result<Eyecatcher, InvalidMessage> {
        let found = match bytes {
            [a, b, c, d, ..] => [*a, *b, *c, *d],
            _ => return Err(InvalidMessage::Truncated { what, at, needed: 4, found: bytes.len() }),
        };
        [Eyecatcher::Smcr, Eyecatcher::Smcd]
            .into_iter()
            .find(|eyecatcher| eyecatcher.bytes() == found)
            .ok_or(InvalidMessage::BadEyecatcher { what, at, found })
    }
}

/// Which CLC message: the type byte.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct MessageType(pub u8);

impl MessageType {
    /// The client's offer.
    pub const PROPOSAL: MessageType = MessageType(1);
    /// The listening side's choice.
    pub const ACCEPT: MessageType = MessageType(2);
    /// The client's answer to an Accept.
    pub const CONFIRM: MessageType = MessageType(3);
    /// A refusal, from either side.
    pub const DECLINE: MessageType = MessageType(4);
}

impl fmt::Display for MessageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            MessageType::PROPOSAL => f.write_str("Proposal"),
            MessageType::ACCEPT => f.write_str("Accept"),
            MessageType::CONFIRM => f.write_str("Confirm"),
            MessageType::DECLINE => f.write_str("Decline"),
            MessageType(other) => write!(f, "message of type {other}"),
        }
    }
}

/// What kind of SMC a version offers or has chosen: a two-bit code, 0..=3.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct Mode(u8);

impl Mode {
    /// SMC-R only.
    pub const R: Mode = Mode(0);
    /// SMC-D only.
    pub const D: Mode = Mode(1);
    /// Nothing.
    pub const NONE: Mode = Mode(2);
    /// SMC-R and SMC-D.
    pub const BOTH: Mode = Mode(3);

    const fn of_bits(bits: u8) -> Mode {
        Mode(bits & 0b11)
    }

    /// The code, 0..=3.
    #[must_use]
    pub const fn code(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Mode::R => "R",
            Mode::D => "D",
            Mode::NONE => "none",
            _ => "R and D",
        })
    }
}

/// A header whose eyecatcher, type, version and length have been judged.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Which one the message begins with; nothing depends on it.
    pub eyecatcher: Eyecatcher,
    /// One of the four known.
    pub kind: MessageType,
    /// Bytes of the whole message, [`MIN_LENGTH`]..=[`MAX_LENGTH`].
    pub length: u16,
    /// SMC version, 1..=15.
    pub version: u8,
    /// What a Proposal offers in version 1; the chosen mode elsewhere.
    pub typev1: Mode,
    /// What a Proposal offers in version 2; elsewhere [`Mode::NONE`]'s bit is [`Header::flag`].
    pub typev2: Mode,
}

impl Header {
    /// Reads the header at the beginning of `bytes`.
    ///
    /// # Errors
    /// Too few bytes, a wrong eyecatcher, an unknown type, version 0, or a length that no message
    /// of SMC has.
    pub fn decode(bytes: &[u8]) -> Result<Header, InvalidMessage> {
        let mut reader = Reader::new(bytes, 0);
        let eyecatcher = Eyecatcher::decode(reader.bytes("header", 4)?, "header", 0)?;
        let kind = MessageType(reader.u8("message type")?);
        if !(MessageType::PROPOSAL.0..=MessageType::DECLINE.0).contains(&kind.0) {
            return Err(InvalidMessage::UnknownType { at: 4, found: kind });
        }
        let length = reader.u16("message length")?;
        if !(MIN_LENGTH..=MAX_LENGTH).contains(&usize::from(length)) {
            return Err(InvalidMessage::LengthOutOfRange { kind, at: 5, found: length });
        }
        let flags = reader.u8("message flags")?;
        let version = flags >> 4;
        if version == 0 {
            return Err(InvalidMessage::VersionZero { at: 7 });
        }
        Ok(Header {
            eyecatcher,
            kind,
            length,
            version,
            typev1: Mode::of_bits(flags),
            typev2: Mode::of_bits(flags >> 2),
        })
    }

    /// Mask 0x08 of the last byte: *first contact* in Accept and Confirm, *out of sync* in Decline.
    #[must_use]
    pub const fn flag(&self) -> bool {
        self.typev2.0 & 0b10 != 0
    }

    /// `typev2` of an Accept, Confirm or Decline with that flag.
    pub(super) const fn mode_of_flag(flag: bool) -> Mode {
        Mode((flag as u8) << 1)
    }
}

/// Puts header and trailer around `body`, which fits a message.
pub(super) fn frame(
    eyecatcher: Eyecatcher,
    kind: MessageType,
    typev1: Mode,
    typev2: Mode,
    body: &[u8],
) -> Vec<u8> {
    let length = HEADER_LENGTH + body.len() + TRAILER_LENGTH;
    debug_assert!((MIN_LENGTH..=MAX_LENGTH).contains(&length));
    let mut message = Vec::with_capacity(length);
    message.extend_from_slice(&eyecatcher.bytes());
    message.push(kind.0);
    let length = u16::try_from(length).unwrap_or(u16::MAX);
    message.extend_from_slice(&length.to_be_bytes());
    message.push(VERSION << 4 | typev2.0 << 2 | typev1.0);
    message.extend_from_slice(body);
    message.extend_from_slice(&eyecatcher.bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: [u8; 8] = [0xE2, 0xD4, 0xC3, 0xD9, 1, 0, 224, 0x26];

    #[test]
    fn reads_every_field() {
        assert_eq!(
            Header::decode(&HEADER),
            Ok(Header {
                eyecatcher: Eyecatcher::Smcr,
                kind: MessageType::PROPOSAL,
                length: 224,
                version: 2,
                typev1: Mode::NONE,
                typev2: Mode::D,
            })
        );
    }

    #[test]
    fn tells_what_is_wrong() {
        let with = |at: usize, value: u8| {
            let mut bytes = HEADER;
            bytes[at] = value;
            Header::decode(&bytes)
        };
        assert_eq!(
            with(3, 0),
            Err(InvalidMessage::BadEyecatcher {
                what: "header",
                at: 0,
                found: [0xE2, 0xD4, 0xC3, 0]
            })
        );
        for kind in [0, 5, 255] {
            let found = MessageType(kind);
            assert_eq!(with(4, kind), Err(InvalidMessage::UnknownType { at: 4, found }));
        }
        let length =
            |found| InvalidMessage::LengthOutOfRange { kind: MessageType::PROPOSAL, at: 5, found };
        assert_eq!(with(6, 27), Err(length(27)));
        assert!(with(6, 28).is_ok());
        assert_eq!(with(5, 3), Err(length(3 * 256 + 224)));
        assert_eq!(with(7, 0x06), Err(InvalidMessage::VersionZero { at: 7 }));
        for length in 0..8 {
            assert!(matches!(
                Header::decode(&HEADER[..length]),
                Err(InvalidMessage::Truncated { .. })
            ));
        }
    }
}
