//! Proposal: what the client offers.

use alloc::vec::Vec;

use super::header::frame;
use super::reader::{Reader, Writer};
use super::{Chid, Diagnosis, Eid, Eyecatcher, Gid, Header, InvalidMessage, MessageType, Mode};

/// SMC-Dv2 release spoken here: 2.1, the first with emulated ISM devices.
pub const RELEASE: u8 = 1;

/// Bit of a feature mask: emulated ISM devices, with GIDs of 128 bits, are understood.
pub const FEATURE_EMULATED_ISM: u16 = 1;

/// Devices in one Proposal: two entries each, and eight entries fit Linux's receive buffer.
pub const MAX_DEVICES: usize = MAX_ENTRIES / 2;

/// User EIDs in one Proposal: the size of Linux's receive buffer.
pub const MAX_EIDS: usize = 8;

const MAX_ENTRIES: usize = 8;

/// Bytes from the start of the message to the v2 extension.
const V2_AT: usize = 80;
/// Bytes of the v2 extension before its EIDs.
const V2_LENGTH: usize = 40;
/// Bytes of the SMC-D v2 extension before its entries.
const V2D_LENGTH: usize = 48;
const ENTRY_LENGTH: usize = 10;

/// `v2_ext_offset` counts from its own end, byte 52.
const V2_OFFSET: u16 = 28;
const V2_OFFSET_AT: usize = 50;
/// `smcd_v2_ext_offset` counts from its own end, byte 8 of the v2 extension; EIDs come between.
const V2D_OFFSET: u16 = 32;

const _: () = assert!(V2_AT == V2_OFFSET_AT + 2 + V2_OFFSET as usize);
const _: () = assert!(V2_LENGTH == 8 + V2D_OFFSET as usize);
const _: () = assert!(length(MAX_EIDS, MAX_ENTRIES) <= super::MAX_LENGTH);

/// An emulated ISM device: the region as `chid`, the proposing peer in it as `gid`.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct Device {
    /// The fabric; an emulated one (0xFF00..=0xFFFF).
    pub chid: Chid,
    /// The peer on it.
    pub gid: Gid,
}

/// The client's offer: SMC-Dv2 through any of `devices`, as a member of any of `eids`.
///
/// ```text
///     0  header 8: typev1 none, typev2 D
///     8  SMC-R id 8, GID 16, MAC 6: zero      (no SMC-R)
///    38  iparea_offset 2: zero                (no prefix area: that is version 1)
///    40  ISM gid 8, chid 2: zero              (no device of version 1)
///    50  v2_ext_offset 2: 28
///    52  vendor and reserved 28
///    80  eid count 1, entry count 1, reserved 1, release 4 bits, 3 bits, SEID valid 1 bit
///    84  reserved 2, smcd_v2_ext_offset 2: 32 + 32 * eids
///    88  RoCEv2 GID 16, max_conns 1, max_links 1: zero
///   106  feature mask 2, reserved 12
///   120  eids, 32 each
///     .  SEID 32, reserved 16
///     .  entries, 10 each: gid 8, chid 2; then gid_ext 8, the same chid 2
///     .  trailer 4
/// ```
///
/// This is Linux's form of a Proposal without version 1, to the byte; Wireshark shows it whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Proposal {
    /// Preferred first; the first [`MAX_DEVICES`] are sent.
    pub devices: Vec<Device>,
    /// Preferred first; the first [`MAX_EIDS`] are sent.
    pub eids: Vec<Eid>,
    /// The system EID, where the sender has one.
    pub seid: Option<Eid>,
    /// SMC-Dv2 release of the sender, 0..=15.
    pub release: u8,
    /// Features of the sender.
    pub feature_mask: u16,
}

impl Proposal {
    /// An offer of this implementation.
    #[must_use]
    pub fn new(devices: Vec<Device>, eids: Vec<Eid>) -> Proposal {
        Proposal { devices, eids, seid: None, release: RELEASE, feature_mask: FEATURE_EMULATED_ISM }
    }

    /// The EID to answer with: the first one offered that is among `ours`.
    ///
    /// `None` calls for [`Diagnosis::NOUEID`].
    #[must_use]
    pub fn choose_eid(&self, ours: &[Eid]) -> Option<Eid> {
        self.eids.iter().find(|eid| ours.contains(eid)).copied()
    }

    /// The message's bytes.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // counts are at most 8
    pub fn encode(&self) -> Vec<u8> {
        let devices = &self.devices[..self.devices.len().min(MAX_DEVICES)];
        let eids = &self.eids[..self.eids.len().min(MAX_EIDS)];
        let mut body = Writer::default();
        body.zeros(30) // SMC-R
            .u16(0) // iparea_offset
            .zeros(10) // SMC-Dv1
            .u16(V2_OFFSET)
            .zeros(28);

        body.u8(eids.len() as u8)
            .u8(2 * devices.len() as u8)
            .u8(0)
            .u8(self.release << 4 | u8::from(self.seid.is_some()))
            .zeros(2)
            .u16(v2d_offset(eids.len() as u8))
            .zeros(18) // SMC-Rv2
            .u16(self.feature_mask)
            .zeros(12);
        for eid in eids {
            body.bytes(&eid.0);
        }

        body.bytes(&self.seid.map_or([0; 32], |seid| seid.0)).zeros(16);
        for device in devices {
            let (gid, gid_ext) = device.gid.halves();
            body.u64(gid).u16(device.chid.0);
            body.u64(gid_ext).u16(device.chid.0);
        }
        frame(Eyecatcher::Smcr, MessageType::PROPOSAL, Mode::NONE, Mode::D, body.written())
    }

    /// Only SMC-Dv2, with nothing else offered beside it.
    pub(super) fn is_supported(header: &Header) -> bool {
        header.version == super::VERSION && header.typev1 == Mode::NONE && header.typev2 == Mode::D
    }

    pub(super) fn decode(
        header: &Header,
        mut reader: Reader<'_>,
    ) -> Result<Proposal, InvalidMessage> {
        reader.skip("SMC-R part", 30)?;
        expect_offset("iparea_offset", &mut reader, 0)?;
        reader.skip("SMC-D part", 10)?;
        match expect_offset("v2_ext_offset", &mut reader, V2_OFFSET) {
            Err(InvalidMessage::BadOffset { at, found: 0, .. }) => {
                return Err(InvalidMessage::MissingExtension {
                    what: "v2 extension",
                    at,
                    diagnosis: Diagnosis::NOV2EXT,
                })
            }
            other => other?,
        }
        reader.skip("reserved", 28)?;

        let eid_count = count("EIDs", &mut reader, MAX_EIDS)?;
        let entry_count = count("GID entries", &mut reader, MAX_ENTRIES)?;
        reader.skip("reserved", 1)?;
        let flags = reader.u8("release")?;
        reader.skip("reserved", 2)?;
        match expect_offset("smcd_v2_ext_offset", &mut reader, v2d_offset(eid_count)) {
            Err(InvalidMessage::BadOffset { at, found: 0, .. }) => {
                return Err(InvalidMessage::MissingExtension {
                    what: "SMC-Dv2 extension",
                    at,
                    diagnosis: Diagnosis::NOV2DEXT,
                })
            }
            other => other?,
        }
        let expected = length(usize::from(eid_count), usize::from(entry_count));
        if usize::from(header.length) != expected {
            return Err(InvalidMessage::WrongLength {
                kind: header.kind,
                expected,
                found: usize::from(header.length),
            });
        }
        reader.skip("SMC-Rv2 part", 18)?;
        let feature_mask = reader.u16("feature mask")?;
        reader.skip("reserved", 12)?;
        let mut eids = Vec::with_capacity(usize::from(eid_count));
        for _ in 0..eid_count {
            eids.push(Eid(reader.array("EID")?));
        }

        let seid = Eid(reader.array("SEID")?);
        reader.skip("reserved", 16)?;
        let mut entries = Vec::with_capacity(usize::from(entry_count));
        for _ in 0..entry_count {
            entries.push((reader.u64("gid")?, Chid(reader.u16("chid")?)));
        }
        reader.finish()?;
        Ok(Proposal {
            devices: devices_of(&entries),
            eids,
            seid: (flags & 1 != 0).then_some(seid),
            release: flags >> 4,
            feature_mask,
        })
    }
}

/// The emulated devices among `entries`: two in a row with one chid.
///
/// A lone or mismatched entry of an emulated device is passed over, as `af_smc.c` does; so are
/// the single entries of hardware devices, of which there are none here.
fn devices_of(entries: &[(u64, Chid)]) -> Vec<Device> {
    let mut devices = Vec::with_capacity(entries.len() / 2);
    let mut rest = entries;
    while let [(gid, chid), after @ ..] = rest {
        rest = after;
        if !chid.is_emulated() {
            continue;
        }
        if let [(gid_ext, second), after @ ..] = rest {
            if second == chid {
                rest = after;
                devices.push(Device { chid: *chid, gid: Gid::from_halves(*gid, *gid_ext) });
            }
        }
    }
    devices
}

/// Bytes of a Proposal with so many EIDs and entries.
const fn length(eids: usize, entries: usize) -> usize {
    V2_AT + V2_LENGTH + eids * Eid::LENGTH + V2D_LENGTH + entries * ENTRY_LENGTH + 4
}

/// `smcd_v2_ext_offset` of a Proposal with `eids` EIDs, at most 255.
const fn v2d_offset(eids: u8) -> u16 {
    V2D_OFFSET + 32 * eids as u16
}

fn expect_offset(
    what: &'static str,
    reader: &mut Reader<'_>,
    expected: u16,
) -> Result<(), InvalidMessage> {
    let at = reader.at();
    let found = reader.u16(what)?;
    if found == expected {
        Ok(())
    } else {
        Err(InvalidMessage::BadOffset { what, at, expected, found })
    }
}

#[allow(clippy::cast_possible_truncation)] // the bounds are 8
fn count(what: &'static str, reader: &mut Reader<'_>, max: usize) -> Result<u8, InvalidMessage> {
    let at = reader.at();
    let found = reader.u8(what)?;
    if usize::from(found) <= max {
        Ok(found)
    } else {
        Err(InvalidMessage::TooMany { what, at, max: max as u8, found })
    }
}
