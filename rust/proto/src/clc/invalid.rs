//! What can be wrong with a CLC message.

use core::fmt;

use super::{Diagnosis, MessageType, Mode, MAX_LENGTH, MIN_LENGTH};

/// A peer's bytes are no CLC message: what is wrong, and where (`at`: byte of the message).
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum InvalidMessage {
    /// The bytes end inside something.
    Truncated {
        /// What they end in.
        what: &'static str,
        /// Where that begins.
        at: usize,
        /// Bytes it has.
        needed: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// Bytes are left after the end.
    TrailingBytes {
        /// Where they begin.
        at: usize,
        /// How many.
        count: usize,
    },
    /// Neither "SMCR" nor "SMCD" in EBCDIC.
    BadEyecatcher {
        /// Header or trailer.
        what: &'static str,
        /// Where it stands.
        at: usize,
        /// What stands there.
        found: [u8; 4],
    },
    /// No message has that type.
    UnknownType {
        /// Where it stands.
        at: usize,
        /// The type.
        found: MessageType,
    },
    /// No message has that length.
    LengthOutOfRange {
        /// The message's type.
        kind: MessageType,
        /// Where the length stands.
        at: usize,
        /// The length.
        found: u16,
    },
    /// Version 0.
    VersionZero {
        /// Where it stands.
        at: usize,
    },
    /// The message's length does not follow from its counts and flags.
    WrongLength {
        /// The message's type.
        kind: MessageType,
        /// Bytes it would have.
        expected: usize,
        /// Bytes its header says.
        found: usize,
    },
    /// A mode that this message cannot have.
    BadMode {
        /// The message's type.
        kind: MessageType,
        /// The mode.
        found: Mode,
    },
    /// An offset leads elsewhere than to what it is for.
    BadOffset {
        /// The offset's name.
        what: &'static str,
        /// Where it stands.
        at: usize,
        /// The value that leads there.
        expected: u16,
        /// The value found.
        found: u16,
    },
    /// An offset of zero: the extension it is for is not there.
    MissingExtension {
        /// The extension.
        what: &'static str,
        /// Where its offset stands.
        at: usize,
        /// The Decline code for it.
        diagnosis: Diagnosis,
    },
    /// A count above its bound.
    TooMany {
        /// What is counted.
        what: &'static str,
        /// Where the count stands.
        at: usize,
        /// The bound.
        max: u8,
        /// The count.
        found: u8,
    },
    /// A field that must be zero because nothing else is implemented.
    NotZero {
        /// The field.
        what: &'static str,
        /// Where it stands.
        at: usize,
        /// Its value.
        found: u8,
    },
}

impl InvalidMessage {
    /// The code to decline with, where SMC has one: the sender spoke SMC, and TCP can go on.
    ///
    /// `None`: it did not; who received it closes the connection, as Linux does (EPROTO).
    #[must_use]
    pub fn diagnosis(&self) -> Option<Diagnosis> {
        match self {
            InvalidMessage::MissingExtension { diagnosis, .. } => Some(*diagnosis),
            _ => None,
        }
    }
}

impl fmt::Display for InvalidMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            InvalidMessage::Truncated { what, at, needed, found } => write!(
                f,
                "CLC message truncated: {what} at byte {at} needs {needed} bytes, {found} are there"
            ),
            InvalidMessage::TrailingBytes { at, count } => {
                write!(f, "CLC message ends at byte {at}, {count} bytes follow it")
            }
            InvalidMessage::BadEyecatcher { what, at, found } => {
                let [a, b, c, d] = found;
                write!(
                    f,
                    "CLC {what} at byte {at} is {a:02x} {b:02x} {c:02x} {d:02x}, \
                     not the eyecatcher SMCR or SMCD"
                )
            }
            InvalidMessage::UnknownType { at, found } => {
                write!(f, "CLC message type {} at byte {at} is unknown", found.0)
            }
            InvalidMessage::LengthOutOfRange { kind, at, found } => write!(
                f,
                "CLC {kind}: length {found} at byte {at} is not in {MIN_LENGTH}..={MAX_LENGTH}"
            ),
            InvalidMessage::VersionZero { at } => {
                write!(f, "CLC message version at byte {at} is 0")
            }
            InvalidMessage::WrongLength { kind, expected, found } => {
                write!(f, "CLC {kind}: its header says {found} bytes, its contents make {expected}")
            }
            InvalidMessage::BadMode { kind, found } => {
                write!(f, "CLC {kind}: mode {found} at byte 7 cannot be chosen")
            }
            InvalidMessage::BadOffset { what, at, expected, found } => {
                write!(f, "CLC {what} at byte {at} is {found}, not {expected}")
            }
            InvalidMessage::MissingExtension { what, at, .. } => {
                write!(f, "CLC Proposal has no {what}: its offset at byte {at} is 0")
            }
            InvalidMessage::TooMany { what, at, max, found } => {
                write!(f, "CLC Proposal: {found} {what} at byte {at}, at most {max} may be there")
            }
            InvalidMessage::NotZero { what, at, found } => {
                write!(f, "CLC {what} at byte {at} is {found}, not 0")
            }
        }
    }
}

impl core::error::Error for InvalidMessage {}
