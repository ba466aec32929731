//! Decline: the session goes on over TCP, and why.

use alloc::vec::Vec;
use core::fmt;

use super::header::frame;
use super::reader::{Reader, Writer};
use super::{Diagnosis, Eyecatcher, Header, InvalidMessage, MessageType, Mode};

/// What a peer runs on: four bits, 0..=15.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct OsType(pub u8);

impl OsType {
    /// Not told (a Decline of version 1).
    pub const NONE: OsType = OsType(0);
    /// z/OS.
    pub const ZOS: OsType = OsType(1);
    /// Linux.
    pub const LINUX: OsType = OsType(2);
    /// AIX.
    pub const AIX: OsType = OsType(3);
}

impl fmt::Display for OsType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            OsType::NONE => f.write_str("not told"),
            OsType::ZOS => f.write_str("z/OS"),
            OsType::LINUX => f.write_str("Linux"),
            OsType::AIX => f.write_str("AIX"),
            OsType(other) => write!(f, "os type {other}"),
        }
    }
}

/// A refusal. Who receives one does not answer with another.
///
/// ```text
///    0  header 8 (typev1 R; typev2 bit 1: out of sync)
///    8  peer id 8
///   16  diagnosis 4
///   20  os type 4 bits, reserved 28 bits
///   24  4 x diagnosis 4, zero (not in version 1)
///   40  trailer 4
/// ```
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Decline {
    /// Why.
    pub diagnosis: Diagnosis,
    /// The sender's SMC-R id; zero in SMC-D.
    pub peer_id: [u8; 8],
    /// What the sender runs on.
    pub os: OsType,
    /// The receiver's link group is unknown to the sender ([`Diagnosis::SYNCERR`]).
    pub out_of_sync: bool,
}

const LENGTH_V1: usize = 28;
const LENGTH_V2: usize = 44;

impl Decline {
    /// A refusal for the reason `diagnosis`, as Linux sends it.
    #[must_use]
    pub fn new(diagnosis: Diagnosis) -> Decline {
        Decline {
            diagnosis,
            peer_id: [0; 8],
            os: OsType::LINUX,
            out_of_sync: diagnosis == Diagnosis::SYNCERR,
        }
    }

    /// The message's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::default();
        body.bytes(&self.peer_id).u32(self.diagnosis.0).u8(self.os.0 << 4).zeros(3).zeros(16);
        frame(
            Eyecatcher::Smcr,
            MessageType::DECLINE,
            // What Linux sends, by never setting it.
            Mode::R,
            Header::mode_of_flag(self.out_of_sync),
            body.written(),
        )
    }

    pub(super) fn decode(
        header: &Header,
        mut reader: Reader<'_>,
    ) -> Result<Decline, InvalidMessage> {
        if !matches!(header.typev1, Mode::R | Mode::D) {
            return Err(InvalidMessage::BadMode { kind: header.kind, found: header.typev1 });
        }
        let version_1 = header.version == 1;
        let expected = if version_1 { LENGTH_V1 } else { LENGTH_V2 };
        if usize::from(header.length) != expected {
            return Err(InvalidMessage::WrongLength {
                kind: header.kind,
                expected,
                found: usize::from(header.length),
            });
        }
        let peer_id = reader.array("peer id")?;
        let diagnosis = Diagnosis(reader.u32("diagnosis")?);
        let os = OsType(reader.u8("os type")? >> 4);
        reader.skip("reserved", 3)?;
        if !version_1 {
            reader.skip("further diagnoses", 16)?;
        }
        reader.finish()?;
        Ok(Decline { diagnosis, peer_id, os, out_of_sync: header.flag() })
    }
}
