//! Accept and Confirm: who, through which device, into which DMB.

use alloc::vec::Vec;
use core::fmt;

use super::eid::padded;
use super::header::frame;
use super::reader::{Reader, Writer};
use super::{
    Chid, Eid, Eyecatcher, Gid, Header, InvalidMessage, MessageType, Mode, OsType,
    FEATURE_EMULATED_ISM, RELEASE,
};

const LENGTH: usize = 78;
const FIRST_CONTACT_LENGTH: usize = 36;
const FIRST_CONTACT_21_LENGTH: usize = 52;

/// The body that Accept (from the listening side) and Confirm (from the client) share.
///
/// ```text
///    0  header 8: typev1 D; typev2 bit 1: first contact
///    8  gid 8
///   16  DMB token 8
///   24  element 1: zero
///   25  size class 4 bits, reserved 20 bits
///   28  linkid 4
///   32  chid 2
///   34  EID 32
///   66  gid_ext 8
///   74  first-contact extension 36, of release 1 on 52 (only with the flag)
///    .  trailer 4
/// ```
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct AcceptConfirm {
    /// The sender, on the chosen device.
    pub gid: Gid,
    /// Names the sender's DMB, which the receiver will write.
    pub token: u64,
    /// The DMB has 2^(14 + class) bytes; 0..=15 here, judged by who attaches it.
    pub size_class: u8,
    /// The sender's number of the link group, opaque.
    pub linkid: u32,
    /// The chosen device.
    pub chid: Chid,
    /// The chosen EID.
    pub eid: Eid,
    /// Present at the first contact of two peers on a device.
    pub first_contact: Option<FirstContact>,
}

impl AcceptConfirm {
    /// The bytes of an Accept.
    #[must_use]
    pub fn encode_accept(&self) -> Vec<u8> {
        self.encode(MessageType::ACCEPT)
    }

    /// The bytes of a Confirm.
    #[must_use]
    pub fn encode_confirm(&self) -> Vec<u8> {
        self.encode(MessageType::CONFIRM)
    }

    fn encode(&self, kind: MessageType) -> Vec<u8> {
        let (gid, gid_ext) = self.gid.halves();
        let mut body = Writer::default();
        body.u64(gid)
            .u64(self.token)
            .u8(0)
            .u8(self.size_class << 4)
            .zeros(2)
            .u32(self.linkid)
            .u16(self.chid.0)
            .bytes(&self.eid.0)
            .u64(gid_ext);
        if let Some(first_contact) = &self.first_contact {
            first_contact.encode(&mut body);
        }
        frame(
            Eyecatcher::Smcd,
            kind,
            Mode::D,
            Header::mode_of_flag(self.first_contact.is_some()),
            body.written(),
        )
    }

    /// Whether this is of SMC-Dv2.
    ///
    /// # Errors
    /// A mode that nobody can choose.
    pub(super) fn is_supported(header: &Header) -> Result<bool, InvalidMessage> {
        match header.typev1 {
            Mode::D => Ok(header.version == super::VERSION),
            Mode::R => Ok(false),
            found => Err(InvalidMessage::BadMode { kind: header.kind, found }),
        }
    }

    pub(super) fn decode(
        header: &Header,
        mut reader: Reader<'_>,
    ) -> Result<AcceptConfirm, InvalidMessage> {
        let gid = reader.u64("gid")?;
        let token = reader.u64("DMB token")?;
        let at = reader.at();
        let element = reader.u8("DMB element")?;
        if element != 0 {
            return Err(InvalidMessage::NotZero { what: "DMB element", at, found: element });
        }
        let size_class = reader.u8("size class")? >> 4;
        reader.skip("reserved", 2)?;
        let linkid = reader.u32("linkid")?;
        let chid = Chid(reader.u16("chid")?);
        let eid = Eid(reader.array("EID")?);
        let gid_ext = reader.u64("gid_ext")?;
        let (first_contact, expected) = if header.flag() {
            let first_contact = FirstContact::decode(&mut reader)?;
            (Some(first_contact), LENGTH + FirstContact::length(first_contact.release))
        } else {
            (None, LENGTH)
        };
        if usize::from(header.length) != expected {
            return Err(InvalidMessage::WrongLength {
                kind: header.kind,
                expected,
                found: usize::from(header.length),
            });
        }
        reader.finish()?;
        Ok(AcceptConfirm {
            gid: Gid::from_halves(gid, gid_ext),
            token,
            size_class,
            linkid,
            chid,
            eid,
            first_contact,
        })
    }
}

/// First-contact extension: what two peers tell each other once.
///
/// ```text
///    0  reserved 1, os type 4 bits, release 4 bits, reserved 2
///    4  host name 32
///   36  max_conns 1, max_links 1: zero      from here on only of release 1 and later
///   38  feature mask 2
///   40  vendor and reserved 12
/// ```
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct FirstContact {
    /// What the sender runs on.
    pub os: OsType,
    /// The release both sides speak, 0..=15; the Confirm repeats the Accept's.
    pub release: u8,
    /// The sender's host, for people.
    pub hostname: Hostname,
    /// The features both sides have; zero in release 0, which has no room for it.
    pub feature_mask: u16,
}

impl FirstContact {
    /// The extension of this implementation on the host `hostname`.
    #[must_use]
    pub fn new(hostname: Hostname) -> FirstContact {
        FirstContact {
            os: OsType::LINUX,
            release: RELEASE,
            hostname,
            feature_mask: FEATURE_EMULATED_ISM,
        }
    }

    const fn length(release: u8) -> usize {
        if release == 0 {
            FIRST_CONTACT_LENGTH
        } else {
            FIRST_CONTACT_21_LENGTH
        }
    }

    fn encode(&self, body: &mut Writer) {
        body.u8(0).u8(self.os.0 << 4 | self.release & 0xF).zeros(2).bytes(&self.hostname.0);
        if self.release != 0 {
            body.zeros(2).u16(self.feature_mask).zeros(12);
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<FirstContact, InvalidMessage> {
        reader.skip("first-contact extension", 1)?;
        let both = reader.u8("os type and release")?;
        reader.skip("reserved", 2)?;
        let hostname = Hostname(reader.array("host name")?);
        let release = both & 0xF;
        let feature_mask = if release == 0 {
            0
        } else {
            reader.skip("SMC-R part", 2)?;
            let feature_mask = reader.u16("feature mask")?;
            reader.skip("reserved", 12)?;
            feature_mask
        };
        Ok(FirstContact { os: OsType(both >> 4), release, hostname, feature_mask })
    }
}

/// A host's name: 32 bytes of ASCII, padded with blanks. For people; nothing depends on it.
#[derive(Copy, Clone, PartialEq, Eq, Hash)]
pub struct Hostname(pub [u8; 32]);

impl Hostname {
    /// The first 32 characters of `name`; what is not printable ASCII becomes `?`.
    #[must_use]
    pub fn new(name: &str) -> Hostname {
        let mut bytes = [b' '; 32];
        for (byte, character) in bytes.iter_mut().zip(name.chars()) {
            *byte = u8::try_from(character).ok().filter(u8::is_ascii_graphic).unwrap_or(b'?');
        }
        Hostname(bytes)
    }
}

impl fmt::Display for Hostname {
    /// The name without its padding; what is not printable is escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", padded(&self.0).escape_ascii())
    }
}

impl fmt::Debug for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hostname(\"{self}\")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn host_names_are_made_printable() {
        assert_eq!(Hostname::new("node-1.lab").to_string(), "node-1.lab");
        assert_eq!(Hostname::new("a b\u{0}ü").to_string(), "a?b??");
        assert_eq!(Hostname::new(&"x".repeat(40)).0, [b'x'; 32]);
        assert_eq!(Hostname([0x1B; 32]).to_string(), "\\x1b".repeat(32));
    }
}
