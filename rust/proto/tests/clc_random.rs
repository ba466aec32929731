//! CLC messages by chance: what is encoded decodes to itself, and no bytes make the decoder panic.

use ivsmc_proto::clc::{
    decode, expected_length, AcceptConfirm, Chid, Decline, Device, Diagnosis, Eid, FirstContact,
    Gid, Hostname, Message, OsType, Proposal,
};

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        core::array::from_fn(|_| self.byte())
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.bytes())
    }

    fn gid(&mut self) -> Gid {
        Gid::from_halves(self.next(), self.next())
    }

    fn chid(&mut self) -> Chid {
        Chid(0xFF00 | u16::from(self.byte()))
    }

    fn proposal(&mut self) -> Proposal {
        let devices =
            (0..self.below(5)).map(|_| Device { chid: self.chid(), gid: self.gid() }).collect();
        let eids = (0..self.below(9)).map(|_| Eid(self.bytes())).collect();
        Proposal {
            devices,
            eids,
            seid: (self.below(2) == 0).then(|| Eid(self.bytes())),
            release: self.byte() >> 4,
            feature_mask: self.u16(),
        }
    }

    fn accept(&mut self) -> AcceptConfirm {
        let release = self.byte() >> 4;
        let first_contact = FirstContact {
            os: OsType(self.byte() >> 4),
            release,
            hostname: Hostname(self.bytes()),
            feature_mask: if release == 0 { 0 } else { self.u16() },
        };
        AcceptConfirm {
            gid: self.gid(),
            token: self.next(),
            size_class: self.byte() >> 4,
            linkid: u32::from_be_bytes(self.bytes()),
            chid: Chid(self.u16()),
            eid: Eid(self.bytes()),
            first_contact: (self.below(2) == 0).then_some(first_contact),
        }
    }

    fn decline(&mut self) -> Decline {
        Decline {
            diagnosis: Diagnosis(u32::from_be_bytes(self.bytes())),
            peer_id: self.bytes(),
            os: OsType(self.byte() >> 4),
            out_of_sync: self.below(2) == 0,
        }
    }

    fn message(&mut self) -> (Message, Vec<u8>) {
        match self.below(4) {
            0 => {
                let proposal = self.proposal();
                let bytes = proposal.encode();
                (Message::Proposal(proposal), bytes)
            }
            1 => {
                let accept = self.accept();
                (Message::Accept(accept), accept.encode_accept())
            }
            2 => {
                let confirm = self.accept();
                (Message::Confirm(confirm), confirm.encode_confirm())
            }
            _ => {
                let decline = self.decline();
                (Message::Decline(decline), decline.encode())
            }
        }
    }

    /// Changes a few bytes, cuts off or adds some, and may make the length right again.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..self.below(4) {
            let at = self.below(bytes.len());
            bytes[at] = match self.below(3) {
                0 => self.byte(),
                1 => bytes[at] ^ 1 << self.below(8),
                _ => [0, 1, 0x7F, 0x80, 0xFF][self.below(5)],
            };
        }
        match self.below(4) {
            0 => bytes.truncate(self.below(bytes.len() + 1)),
            1 => {
                let at = self.below(bytes.len() + 1);
                let count = self.below(60);
                bytes.splice(at..at, (0..count).map(|_| 0));
            }
            _ => {}
        }
        if bytes.len() >= 12 && self.below(2) == 0 {
            let length = u16::try_from(bytes.len()).unwrap();
            bytes[5..7].copy_from_slice(&length.to_be_bytes());
            let end = bytes.len() - 4;
            bytes[end..].copy_from_slice(&[0xE2, 0xD4, 0xC3, 0xD9]);
        }
    }
}

#[test]
fn what_is_encoded_decodes_to_itself() {
    let mut random = Random(1);
    for round in 0..20_000 {
        let (message, bytes) = random.message();
        assert_eq!(decode(&bytes).as_ref(), Ok(&message), "round {round}");
        assert_eq!(message.kind().0, bytes[4]);
        let header = bytes[..8].try_into().unwrap();
        assert_eq!(expected_length(header), Ok(bytes.len()));
    }
}

#[test]
fn every_beginning_of_a_message_is_truncated() {
    let mut random = Random(2);
    for _ in 0..200 {
        let (_, bytes) = random.message();
        for length in 0..bytes.len() {
            let error = decode(&bytes[..length]).unwrap_err();
            assert!(error.to_string().contains("truncated"), "{length}: {error}");
        }
    }
}

#[test]
fn no_bytes_make_the_decoder_panic() {
    const ROUNDS: u32 = 250_000;
    let mut random = Random(3);
    let (mut messages, mut errors) = (0_u32, 0_u32);
    for round in 0..ROUNDS {
        let bytes = if round % 5 == 0 {
            let mut bytes = random.bytes::<700>().to_vec();
            bytes.truncate(random.below(701));
            if random.below(2) == 0 && bytes.len() >= 4 {
                bytes[..4].copy_from_slice(&[0xE2, 0xD4, 0xC3, 0xC4]);
            }
            bytes
        } else {
            let (_, mut bytes) = random.message();
            random.mutate(&mut bytes);
            bytes
        };
        match decode(&bytes) {
            Ok(message) => {
                messages += 1;
                // What was understood is said again in the same meaning.
                let again = match &message {
                    Message::Proposal(proposal) => proposal.encode(),
                    Message::Accept(accept) => accept.encode_accept(),
                    Message::Confirm(confirm) => confirm.encode_confirm(),
                    Message::Decline(decline) => decline.encode(),
                    Message::Unsupported { .. } => continue,
                };
                assert_eq!(decode(&again), Ok(message), "round {round}");
            }
            Err(error) => {
                errors += 1;
                assert!(error.to_string().starts_with("CLC "), "round {round}");
            }
        }
    }
    // Both outcomes are there in numbers, so the mutations reach deep.
    assert!(messages > ROUNDS / 10 && errors > ROUNDS / 10, "{messages} {errors}");
}
