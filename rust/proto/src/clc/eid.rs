//! EID: the name of a group of peers that may use SMC-D among themselves.

use core::fmt;

/// An enterprise id: 32 bytes, letters, digits, `.` and `-`, padded with blanks.
///
/// A Proposal lists those the client belongs to; the listening side chooses one of its own. What a
/// peer sent is kept as it is and only compared; [`Eid::new`] judges what a user wrote.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Eid(pub [u8; Eid::LENGTH]);

impl Eid {
    /// Bytes of an EID.
    pub const LENGTH: usize = 32;

    /// The EID of who did not choose one.
    pub const DEFAULT: Eid = Eid(*b"IVSMC                           ");

    /// The EID named `name`; small letters count as capitals.
    ///
    /// # Errors
    /// A name that SMC does not allow: empty, longer than 32, not begun by a letter or digit, with
    /// two dots in a row, or with a character other than letters, digits, `.` and `-`.
    pub fn new(name: &str) -> Result<Eid, InvalidEid> {
        let bytes = name.as_bytes();
        if bytes.is_empty() {
            return Err(InvalidEid::Empty);
        }
        let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
        if let Some((at, character)) =
            name.char_indices().find(|(at, _)| bytes.get(*at).is_none_or(|byte| !allowed(byte)))
        {
            return Err(InvalidEid::Character { at, character });
        }
        if !bytes[0].is_ascii_alphanumeric() {
            return Err(InvalidEid::Start);
        }
        if let Some(at) = bytes.windows(2).position(|two| two == b"..") {
            return Err(InvalidEid::TwoDots { at });
        }
        let mut eid = [b' '; Eid::LENGTH];
        eid.get_mut(..bytes.len())
            .ok_or(InvalidEid::TooLong { length: bytes.len() })?
            .copy_from_slice(bytes);
        eid.make_ascii_uppercase();
        Ok(Eid(eid))
    }
}

impl fmt::Display for Eid {
    /// The name without its padding; bytes that no EID has are escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", padded(&self.0).escape_ascii())
    }
}

impl fmt::Debug for Eid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Eid(\"{self}\")")
    }
}

/// A blank- or zero-padded text without its padding.
pub(super) fn padded(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|byte| !matches!(byte, b' ' | 0)).map_or(0, |last| last + 1);
    &bytes[..end]
}

/// Why a name is no EID.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum InvalidEid {
    /// It has no character.
    Empty,
    /// It has more than 32 characters.
    TooLong {
        /// How many.
        length: usize,
    },
    /// It does not begin with a letter or digit.
    Start,
    /// Two dots stand in a row.
    TwoDots {
        /// Where.
        at: usize,
    },
    /// A character that is not allowed.
    Character {
        /// Where it stands.
        at: usize,
        /// The character.
        character: char,
    },
}

impl fmt::Display for InvalidEid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            InvalidEid::Empty => f.write_str("an EID has at least one character"),
            InvalidEid::TooLong { length } => {
                write!(f, "an EID has at most {} characters, not {length}", Eid::LENGTH)
            }
            InvalidEid::Start => f.write_str("an EID begins with a letter or a digit"),
            InvalidEid::TwoDots { at } => {
                write!(f, "an EID has no two dots in a row (at character {at})")
            }
            InvalidEid::Character { at, character } => write!(
                f,
                "an EID has letters, digits, '.' and '-', not {character:?} (at character {at})"
            ),
        }
    }
}

impl core::error::Error for InvalidEid {}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn pads_and_capitalises() {
        let eid = Eid::new("Tenant-7.lab").unwrap();
        assert_eq!(&eid.0, b"TENANT-7.LAB                    ");
        assert_eq!(eid.to_string(), "TENANT-7.LAB");
        assert_eq!(Eid::new("IVSMC"), Ok(Eid::DEFAULT));
        assert!(Eid::new(&"A".repeat(32)).is_ok());
    }

    #[test]
    fn refuses_what_smc_refuses() {
        let character = |at, character| Err(InvalidEid::Character { at, character });
        assert_eq!(Eid::new(""), Err(InvalidEid::Empty));
        assert_eq!(Eid::new("-A"), Err(InvalidEid::Start));
        assert_eq!(Eid::new("A..B"), Err(InvalidEid::TwoDots { at: 1 }));
        assert_eq!(Eid::new("A B"), character(1, ' '));
        assert_eq!(Eid::new("AÄ"), character(1, 'Ä'));
        assert_eq!(Eid::new("A_"), character(1, '_'));
        assert_eq!(Eid::new(&"A".repeat(33)), Err(InvalidEid::TooLong { length: 33 }));
    }

    #[test]
    fn shows_foreign_bytes_escaped() {
        let mut eid = Eid::DEFAULT;
        eid.0[0] = 0xFF;
        assert_eq!(eid.to_string(), "\\xffVSMC");
        assert_eq!(Eid([0; 32]).to_string(), "");
    }
}
