//! CLC messages byte for byte.
//!
//! The vectors are laid out by hand after the kernel's structures in `net/smc/smc_clc.h`, one
//! field a line; no captured message of another implementation for an emulated device was at hand.

use ivsmc_proto::clc::{
    decode, expected_length, AcceptConfirm, Chid, Decline, Device, Diagnosis, Eid, FirstContact,
    Gid, Hostname, InvalidMessage, Message, MessageType, Mode, OsType, Proposal,
};

fn bytes(fields: &[&str]) -> Vec<u8> {
    let digits: String = fields.concat().split_whitespace().collect();
    (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
        .collect()
}

const SMCR: &str = "e2d4c3d9";
const SMCD: &str = "e2d4c3c4";
const ZERO_8: &str = "0000000000000000";
const ZERO_16: &str = "00000000000000000000000000000000";
/// "IVSMC" and 27 blanks.
const IVSMC: &str = "4956534d43 202020202020202020202020202020202020202020202020202020";
/// "VM-1" and 28 blanks.
const VM_1: &str = "564d2d31 20202020202020202020202020202020202020202020202020202020";

const UUID: u128 = 0x0123_4567_89AB_4DEF_8123_4567_89AB_CDEF;

fn gid() -> Gid {
    Gid::of_slot(UUID, 5, 3)
}

/// `smc_clc_msg_proposal`, `smc_clc_msg_smcd`, `smc_clc_v2_extension`, `smc_clc_smcd_v2_extension`,
/// `smc_clc_smcd_gid_chid` twice, `smc_clc_msg_trail`: one EID, one emulated device, 224 bytes.
fn proposal_bytes() -> Vec<u8> {
    bytes(&[
        SMCR,
        "01",               // hdr.type
        "00e0",             // hdr.length 224
        "26",               // hdr.version 2, typev2 D, typev1 N
        ZERO_8,             // lcl.id_for_peer
        ZERO_16,            // lcl.gid
        "000000000000",     // lcl.mac
        "0000",             // iparea_offset
        ZERO_8,             // ism.gid
        "0000",             // ism.chid
        "001c",             // v2_ext_offset
        "000000",           // vendor_oui
        "0000000000",       // vendor_exp_options
        ZERO_16,            // reserved 20
        "00000000",         //
        "01",               // hdr.eid_cnt
        "02",               // hdr.ism_gid_cnt
        "00",               // reserved1
        "10",               // flag.release 1, seid 0
        "0000",             // reserved2
        "0040",             // smcd_v2_ext_offset
        ZERO_16,            // roce
        "00",               // max_conns
        "00",               // max_links
        "0001",             // feature_mask
        "000000000000",     // reserved3 12
        "000000000000",     //
        IVSMC,              // user_eids[0]
        ZERO_16,            // system_eid 32
        ZERO_16,            //
        ZERO_16,            // reserved
        "0000000000030005", // gidchid[0].gid
        "ff01",             // gidchid[0].chid
        "0123456789ab4def", // gidchid[1].gid: gid_ext
        "ff01",             // gidchid[1].chid
        SMCR,
    ])
}

fn proposal() -> Proposal {
    let device = Device { chid: Chid::of_region(UUID), gid: gid() };
    Proposal::new(vec![device], vec![Eid::DEFAULT])
}

/// `smc_clc_msg_accept_confirm_v2` (d1), `smc_clc_first_contact_ext_v2x`, `smc_clc_msg_trail`.
fn accept_bytes(kind: &str) -> Vec<u8> {
    bytes(&[
        SMCD,
        kind,               // hdr.type
        "0082",             // hdr.length 130
        "29",               // hdr.version 2, first contact, typev1 D
        "0000000000030005", // d0.gid
        "00000000000abcde", // d0.token
        "00",               // d0.dmbe_idx
        "40",               // d0.dmbe_size 4: 256 KiB
        "0000",             // d0.reserved4
        "00000100",         // d0.linkid
        "ff01",             // chid
        IVSMC,              // eid
        "0123456789ab4def", // gid_ext
        "00",               // fce.v2_direct
        "21",               // fce.os_type Linux, release 1
        "0000",             // fce.reserved2
        VM_1,               // fce.hostname
        "00",               // max_conns
        "00",               // max_links
        "0001",             // feature_mask
        "00000000",         // vendor_exp_options
        ZERO_8,             // reserved4
        SMCD,
    ])
}

fn accept() -> AcceptConfirm {
    AcceptConfirm {
        gid: gid(),
        token: 0xA_BCDE,
        size_class: 4,
        linkid: 0x100,
        chid: Chid::of_region(UUID),
        eid: Eid::DEFAULT,
        first_contact: Some(FirstContact::new(Hostname::new("VM-1"))),
    }
}

/// `smc_clc_msg_decline_v2`.
fn decline_bytes() -> Vec<u8> {
    bytes(&[
        SMCR, "04",       // hdr.type
        "002c",     // hdr.length 44
        "20",       // hdr.version 2, typev1 R: never set by Linux
        ZERO_8,     // id_for_peer
        "03030007", // peer_diagnosis NOSMCD2DEV
        "20",       // os_type Linux
        "000000",   // reserved
        ZERO_16,    // peer_diagnosis_v2
        SMCR,
    ])
}

fn header_of(message: &[u8]) -> [u8; 8] {
    message[..8].try_into().unwrap()
}

#[test]
fn proposal_of_one_device() {
    let golden = proposal_bytes();
    assert_eq!(golden.len(), 224);
    assert_eq!(proposal().encode(), golden);
    assert_eq!(decode(&golden), Ok(Message::Proposal(proposal())));
    assert_eq!(expected_length(&header_of(&golden)), Ok(224));
}

#[test]
fn accept_and_confirm_with_first_contact() {
    let golden = accept_bytes("02");
    assert_eq!(golden.len(), 130);
    assert_eq!(accept().encode_accept(), golden);
    assert_eq!(decode(&golden), Ok(Message::Accept(accept())));
    assert_eq!(expected_length(&header_of(&golden)), Ok(130));

    let golden = accept_bytes("03");
    assert_eq!(accept().encode_confirm(), golden);
    assert_eq!(decode(&golden), Ok(Message::Confirm(accept())));
}

#[test]
fn accept_without_first_contact_and_with_release_0() {
    let mut short = accept();
    short.first_contact = None;
    let mut golden = accept_bytes("02");
    golden.drain(74..126);
    golden[6] = 78;
    golden[7] = 0x21;
    assert_eq!(short.encode_accept(), golden);
    assert_eq!(decode(&golden), Ok(Message::Accept(short)));

    let mut release_0 = accept();
    let first_contact = release_0.first_contact.as_mut().unwrap();
    first_contact.release = 0;
    first_contact.feature_mask = 0;
    let mut golden = accept_bytes("02");
    golden.drain(110..126);
    golden[6] = 114;
    golden[75] = 0x20;
    assert_eq!(release_0.encode_accept(), golden);
    assert_eq!(decode(&golden), Ok(Message::Accept(release_0)));
}

#[test]
fn decline() {
    let golden = decline_bytes();
    assert_eq!(golden.len(), 44);
    let decline = Decline::new(Diagnosis::NOSMCD2DEV);
    assert_eq!(decline.encode(), golden);
    assert_eq!(decode(&golden), Ok(Message::Decline(decline)));
    assert_eq!(expected_length(&header_of(&golden)), Ok(44));

    // smc_clc_send_decline: the out-of-sync bit goes with SYNCERR.
    let out_of_sync = Decline::new(Diagnosis::SYNCERR).encode();
    assert_eq!((out_of_sync[7], out_of_sync[16]), (0x28, 4));

    // smc_clc_msg_decline, version 1: 28 bytes.
    let golden = bytes(&[SMCR, "04 001c 10", "0102030405060708", "05000000", "00000000", SMCR]);
    let expected = Decline {
        diagnosis: Diagnosis::PEERDECL,
        peer_id: [1, 2, 3, 4, 5, 6, 7, 8],
        os: OsType::NONE,
        out_of_sync: false,
    };
    assert_eq!(decode(&golden), Ok(Message::Decline(expected)));
}

#[test]
fn either_eyecatcher_stands_at_either_end() {
    for golden in [proposal_bytes(), accept_bytes("02"), decline_bytes()] {
        let message = decode(&golden).unwrap();
        for at in [3, golden.len() - 1] {
            let mut other = golden.clone();
            other[at] ^= 0xD9 ^ 0xC4;
            assert_eq!(decode(&other).as_ref(), Ok(&message));
        }
    }
}

#[test]
fn other_kinds_of_smc_are_unsupported() {
    let unsupported =
        |kind, version, typev1, typev2| Ok(Message::Unsupported { kind, version, typev1, typev2 });
    let with_flags = |mut message: Vec<u8>, flags: u8| {
        message[7] = flags;
        decode(&message)
    };
    // Proposals of version 1 SMC-D, of both versions, of SMC-R, of both kinds; of version 3.
    let proposal = MessageType::PROPOSAL;
    for (flags, version, typev1, typev2) in [
        (0x11, 1, Mode::D, Mode::R),
        (0x25, 2, Mode::D, Mode::D),
        (0x22, 2, Mode::NONE, Mode::R),
        (0x2E, 2, Mode::NONE, Mode::BOTH),
        (0x36, 3, Mode::NONE, Mode::D),
    ] {
        assert_eq!(
            with_flags(proposal_bytes(), flags),
            unsupported(proposal, version, typev1, typev2)
        );
    }
    // smcr_clc_msg_accept_confirm: 68 bytes in version 1.
    let mut accept_r = bytes(&[SMCR, "02 0044 10"]);
    accept_r.resize(64, 0xAA);
    accept_r.extend(bytes(&[SMCR]));
    assert_eq!(decode(&accept_r), unsupported(MessageType::ACCEPT, 1, Mode::R, Mode::R));
    // smcd_clc_msg_accept_confirm, version 1: 48 bytes.
    let mut confirm_v1 = bytes(&[SMCD, "03 0030 11"]);
    confirm_v1.resize(44, 0);
    confirm_v1.extend(bytes(&[SMCD]));
    assert_eq!(decode(&confirm_v1), unsupported(MessageType::CONFIRM, 1, Mode::D, Mode::R));
    // Nobody can choose "none" or "both".
    for (flags, found) in [(0x22, Mode::NONE), (0x23, Mode::BOTH)] {
        assert_eq!(
            with_flags(accept_bytes("02"), flags),
            Err(InvalidMessage::BadMode { kind: MessageType::ACCEPT, found })
        );
        assert!(matches!(with_flags(decline_bytes(), flags), Err(InvalidMessage::BadMode { .. })));
    }
}

/// `message` with its bytes from `at` on replaced by `new`.
fn with(mut message: Vec<u8>, at: usize, new: &[u8]) -> Vec<u8> {
    message[at..at + new.len()].copy_from_slice(new);
    message
}

#[test]
fn every_fault_is_told_apart() {
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "CLC message truncated: header at byte 0 needs 4 bytes, 0 are there"),
        (
            proposal_bytes()[..6].to_vec(),
            "CLC message truncated: message length at byte 5 needs 2 bytes, 1 are there",
        ),
        (
            proposal_bytes()[..223].to_vec(),
            "CLC message truncated: message at byte 0 needs 224 bytes, 223 are there",
        ),
        ([proposal_bytes(), vec![0]].concat(), "CLC message ends at byte 224, 1 bytes follow it"),
        (
            b"HTTP/1.1".to_vec(),
            "CLC header at byte 0 is 48 54 54 50, not the eyecatcher SMCR or SMCD",
        ),
        (
            with(proposal_bytes(), 223, &[0]),
            "CLC trailer at byte 220 is e2 d4 c3 00, not the eyecatcher SMCR or SMCD",
        ),
        (with(proposal_bytes(), 4, &[9]), "CLC message type 9 at byte 4 is unknown"),
        (
            with(proposal_bytes(), 5, &[0xFF, 0xFF]),
            "CLC Proposal: length 65535 at byte 5 is not in 28..=652",
        ),
        (with(proposal_bytes(), 7, &[0x06]), "CLC message version at byte 7 is 0"),
        (with(proposal_bytes(), 38, &[0, 40]), "CLC iparea_offset at byte 38 is 40, not 0"),
        (with(proposal_bytes(), 50, &[0, 29]), "CLC v2_ext_offset at byte 50 is 29, not 28"),
        (
            with(proposal_bytes(), 50, &[0, 0]),
            "CLC Proposal has no v2 extension: its offset at byte 50 is 0",
        ),
        (
            with(proposal_bytes(), 86, &[0xFF, 0xFF]),
            "CLC smcd_v2_ext_offset at byte 86 is 65535, not 64",
        ),
        (
            with(proposal_bytes(), 86, &[0, 0]),
            "CLC Proposal has no SMC-Dv2 extension: its offset at byte 86 is 0",
        ),
        (
            with(proposal_bytes(), 80, &[9]),
            "CLC Proposal: 9 EIDs at byte 80, at most 8 may be there",
        ),
        (
            with(proposal_bytes(), 81, &[255]),
            "CLC Proposal: 255 GID entries at byte 81, at most 8 may be there",
        ),
        (
            with(proposal_bytes(), 81, &[3]),
            "CLC Proposal: its header says 224 bytes, its contents make 234",
        ),
        (with(accept_bytes("02"), 24, &[1]), "CLC DMB element at byte 24 is 1, not 0"),
        (
            with(accept_bytes("03"), 7, &[0x21]),
            "CLC Confirm: its header says 130 bytes, its contents make 78",
        ),
        (
            with(accept_bytes("02"), 75, &[0x20]),
            "CLC Accept: its header says 130 bytes, its contents make 114",
        ),
        (with(accept_bytes("02"), 7, &[0x22]), "CLC Accept: mode none at byte 7 cannot be chosen"),
        (
            with(decline_bytes(), 7, &[0x10]),
            "CLC Decline: its header says 44 bytes, its contents make 28",
        ),
        // A length that the header says and the bytes have, but no Proposal fits in.
        (
            bytes(&[SMCR, "01 001c 26", ZERO_16, SMCR]),
            "CLC message truncated: SMC-R part at byte 8 needs 30 bytes, 16 are there",
        ),
    ];
    let mut texts = Vec::new();
    for (message, text) in cases {
        let error = decode(&message).unwrap_err();
        assert_eq!(error.to_string(), text);
        assert!(!texts.contains(&text), "{text}");
        texts.push(text);
    }
}

#[test]
fn missing_extensions_have_their_diagnoses() {
    let diagnosis =
        |at, value: &[u8]| decode(&with(proposal_bytes(), at, value)).unwrap_err().diagnosis();
    assert_eq!(diagnosis(50, &[0, 0]), Some(Diagnosis::NOV2EXT));
    assert_eq!(diagnosis(86, &[0, 0]), Some(Diagnosis::NOV2DEXT));
    assert_eq!(diagnosis(86, &[0, 1]), None);
}

/// A Proposal with one EID and these GID entries.
fn with_entries(entries: &[(u64, u16)]) -> Vec<u8> {
    let mut message = proposal_bytes();
    message.truncate(200);
    for (gid, chid) in entries {
        message.extend(gid.to_be_bytes());
        message.extend(chid.to_be_bytes());
    }
    message.extend(bytes(&[SMCR]));
    message[81] = u8::try_from(entries.len()).unwrap();
    message[6] = u8::try_from(message.len() & 0xFF).unwrap();
    message[5] = u8::try_from(message.len() >> 8).unwrap();
    message
}

#[test]
fn lone_and_mismatched_entries_are_passed_over() {
    // af_smc.c, smc_find_ism_v2_device_serv.
    let device =
        |chid, gid, gid_ext| Device { chid: Chid(chid), gid: Gid::from_halves(gid, gid_ext) };
    type Entries = &'static [(u64, u16)];
    let cases: [(Entries, &[Device]); 7] = [
        (&[], &[]),
        (&[(1, 0xFF00)], &[]),
        (&[(1, 0xFF00), (2, 0xFF01)], &[]),
        (&[(1, 0xFF00), (2, 0xFF01), (3, 0xFF01)], &[device(0xFF01, 2, 3)]),
        (&[(1, 0xFF01), (2, 0xFF01), (3, 0xFF01)], &[device(0xFF01, 1, 2)]),
        // A hardware device has one entry, and none is here.
        (&[(9, 0x07C0), (1, 0xFFFF), (2, 0xFFFF), (9, 0x07C0)], &[device(0xFFFF, 1, 2)]),
        (
            &[(1, 0xFF01), (2, 0xFF01), (3, 0xFF01), (4, 0xFF01)],
            &[device(0xFF01, 1, 2), device(0xFF01, 3, 4)],
        ),
    ];
    for (entries, devices) in cases {
        match decode(&with_entries(entries)) {
            Ok(Message::Proposal(proposal)) => assert_eq!(proposal.devices, devices),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn reserved_bytes_and_unknown_values_are_no_faults() {
    // RoCE parts, vendor options, reserved bytes: ignored.
    let mut noisy = proposal_bytes();
    for range in [8..38, 40..50, 52..80, 82..83, 84..86, 88..106, 108..120] {
        noisy[range].fill(0xA5);
    }
    assert_eq!(decode(&noisy), Ok(Message::Proposal(proposal())));
    // An unknown release, features, operating system, diagnosis: kept.
    let Ok(Message::Proposal(later)) = decode(&with(proposal_bytes(), 83, &[0xF0])) else {
        panic!()
    };
    assert_eq!(later.release, 15);
    let Ok(Message::Accept(other)) = decode(&with(accept_bytes("02"), 75, &[0xFE])) else {
        panic!()
    };
    let first_contact = other.first_contact.unwrap();
    assert_eq!((first_contact.os, first_contact.release), (OsType(15), 14));
    let Ok(Message::Decline(unknown)) = decode(&with(decline_bytes(), 16, &[0x77])) else {
        panic!()
    };
    assert_eq!(unknown.diagnosis, Diagnosis(0x7703_0007));
}

#[test]
fn a_system_eid_needs_its_flag() {
    let mut with_seid = proposal();
    with_seid.seid = Some(Eid(*b"IBM-SYSZ-ISMSEID0000000012343906"));
    let golden = with_seid.encode();
    assert_eq!(golden[83], 0x11);
    assert_eq!(decode(&golden), Ok(Message::Proposal(with_seid)));
    assert_eq!(decode(&with(golden, 83, &[0x10])), Ok(Message::Proposal(proposal())));
}

#[test]
fn the_first_common_eid_is_chosen() {
    let eid = |name| Eid::new(name).unwrap();
    let offer = Proposal::new(vec![], vec![eid("A"), eid("B"), eid("C")]);
    assert_eq!(offer.choose_eid(&[eid("C"), eid("B")]), Some(eid("B")));
    assert_eq!(offer.choose_eid(&[eid("D")]), None);
    assert_eq!(offer.choose_eid(&[]), None);
}

#[test]
fn too_many_devices_and_eids_are_not_sent() {
    let mut offer = proposal();
    offer.devices = vec![offer.devices[0]; 6];
    offer.eids = vec![Eid::DEFAULT; 12];
    let Ok(Message::Proposal(sent)) = decode(&offer.encode()) else { panic!() };
    assert_eq!((sent.devices.len(), sent.eids.len()), (4, 8));
}
