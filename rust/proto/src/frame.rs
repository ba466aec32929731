//! What travels on a session's TCP connection after the handshake.
//!
//! ```text
//!   0x00..=0x7f   a whole frame; 0x00 is WAKE
//!   0x80..=0xff   type 1, length 2 (big-endian), body `length`
//! ```
//!
//! Frames of a type not known are passed over, so a later version can say more to an older one.
//! The peer may send anything, in any pieces; the decoder keeps no bytes, only where it is.

/// A whole frame that says: look at the ring.
pub const WAKE: u8 = 0x00;

/// The first of the types that have a length and a body.
const WITH_BODY: u8 = 0x80;

/// Reads frames from a stream of bytes that arrives in pieces.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct FrameDecoder {
    next: Next,
}

/// What the next byte is.
#[derive(Copy, Clone, PartialEq, Eq, Default, Debug)]
enum Next {
    #[default]
    Type,
    LengthHigh,
    LengthLow {
        high: u8,
    },
    /// The rest of a body; 1..=65535 bytes.
    Body {
        left: u16,
    },
}

impl FrameDecoder {
    /// A decoder at the beginning of a frame.
    #[must_use]
    pub fn new() -> FrameDecoder {
        FrameDecoder::default()
    }

    /// Takes the next bytes of the stream; says how many WAKE frames were in them.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let mut wakes = 0;
        let mut rest = bytes;
        while let [byte, after @ ..] = rest {
            rest = after;
            self.next = match self.next {
                Next::Type if *byte == WAKE => {
                    wakes += 1;
                    Next::Type
                }
                Next::Type if *byte < WITH_BODY => Next::Type,
                Next::Type => Next::LengthHigh,
                Next::LengthHigh => Next::LengthLow { high: *byte },
                Next::LengthLow { high } => Next::body(u16::from_be_bytes([high, *byte])),
                Next::Body { left } => {
                    // This byte and as much of the rest as the body has.
                    let more = rest.len().min(usize::from(left - 1));
                    rest = &rest[more..];
                    #[allow(clippy::cast_possible_truncation)] // more < left, a u16
                    let more = more as u16;
                    Next::body(left - 1 - more)
                }
            };
        }
        wakes
    }

    /// Whether the stream stands between two frames; an end of stream elsewhere cut one off.
    #[must_use]
    pub fn is_between_frames(&self) -> bool {
        self.next == Next::Type
    }
}

impl Next {
    fn body(left: u16) -> Next {
        match left {
            0 => Next::Type,
            left => Next::Body { left },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    #[test]
    fn counts_wakes_and_passes_over_the_rest() {
        let mut decoder = FrameDecoder::new();
        assert_eq!(decoder.push(&[]), 0);
        assert_eq!(decoder.push(&[WAKE]), 1);
        assert_eq!(decoder.push(&[WAKE, 0x01, 0x7F, WAKE]), 2);
        // A body of zeros is no wake, an empty body is a whole frame.
        assert_eq!(decoder.push(&[0x80, 0, 3, 0, 0, 0, WAKE]), 1);
        assert_eq!(decoder.push(&[0xFF, 0, 0, WAKE]), 1);
        assert!(decoder.is_between_frames());
    }

    #[test]
    fn keeps_its_place_between_pieces() {
        let mut stream = vec![WAKE, 0x81, 1, 0];
        stream.extend([0; 256]);
        stream.extend([WAKE, 0x05, 0x80, 0, 1, 0, WAKE]);
        for size in 1..stream.len() {
            let mut decoder = FrameDecoder::new();
            let wakes: usize = stream.chunks(size).map(|piece| decoder.push(piece)).sum();
            assert_eq!((wakes, decoder.is_between_frames()), (3, true), "{size}");
        }
    }

    #[test]
    fn longest_body() {
        let mut decoder = FrameDecoder::new();
        assert_eq!(decoder.push(&[0x80, 0xFF, 0xFF]), 0);
        let body: Vec<u8> = vec![0; 65_535];
        assert_eq!(decoder.push(&body[..65_534]), 0);
        assert!(!decoder.is_between_frames());
        assert_eq!(decoder.push(&[0, WAKE]), 1);
    }
}
