//! Wireshark's SMC dissector sees the messages as what they are, whole and well-formed.
//!
//! Needs `tshark` and `text2pcap`. Where they are not installed it passes with a word on stderr, and
//! fails with `IVSMC_REQUIRE_TOOLS=1`.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ivsmc_proto::clc::{
    AcceptConfirm, Chid, Decline, Device, Diagnosis, Eid, FirstContact, Gid, Hostname, Proposal,
};

const UUID: u128 = 0x0123_4567_89AB_4DEF_8123_4567_89AB_CDEF;

/// Which way a segment goes.
#[derive(Copy, Clone)]
enum From {
    Client,
    Listener,
}

fn proposal(devices: usize, eids: &[Eid]) -> Vec<u8> {
    let device = Device { chid: Chid::of_region(UUID), gid: Gid::of_slot(UUID, 5, 3) };
    Proposal::new(vec![device; devices], eids.to_vec()).encode()
}

fn accept(first_contact: bool) -> AcceptConfirm {
    AcceptConfirm {
        gid: Gid::of_slot(UUID, 6, 1),
        token: 0xA_BCDE,
        size_class: 4,
        linkid: 0x100,
        chid: Chid::of_region(UUID),
        eid: Eid::DEFAULT,
        first_contact: first_contact.then(|| FirstContact::new(Hostname::new("VM-1"))),
    }
}

/// Writes the segments as a capture of one TCP connection; `None` if the tool is not there.
fn capture(name: &str, segments: &[(From, Vec<u8>)]) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (text, pcap) = (folder.join(format!("{name}.txt")), folder.join(format!("{name}.pcap")));
    let mut dump = String::new();
    for (from, bytes) in segments {
        dump.push_str(match from {
            From::Client => "O\n",
            From::Listener => "I\n",
        });
        for (line, row) in bytes.chunks(16).enumerate() {
            write!(dump, "{:06x}", line * 16).unwrap();
            for byte in row {
                write!(dump, " {byte:02x}").unwrap();
            }
            dump.push('\n');
        }
        dump.push('\n');
    }
    std::fs::write(&text, dump).unwrap();
    let made = Command::new("text2pcap")
        .args(["-q", "-D", "-T", "40000,9000", "-4", "10.0.0.1,10.0.0.2"])
        .args([&text, &pcap])
        .output();
    let made = output_of("text2pcap", made)?;
    assert!(made.status.success(), "{made:?}");
    Some(pcap)
}

/// What tshark prints about a capture; `None` if it is not there.
fn tshark(pcap: &Path, arguments: &[&str]) -> Option<String> {
    let seen = Command::new("tshark").arg("-r").arg(pcap).args(arguments).output();
    let seen = output_of("tshark", seen)?;
    assert!(seen.status.success(), "{seen:?}");
    Some(String::from_utf8(seen.stdout).unwrap())
}

/// What a tool gave; `None` if it is not there and need not be.
fn output_of(tool: &str, given: io::Result<Output>) -> Option<Output> {
    let missing = match given {
        Ok(output) => return Some(output),
        Err(error) => format!("{tool} cannot be run: {error}"),
    };
    // The name that the tests in Python go by, too.
    assert!(std::env::var_os("IVSMC_REQUIRE_TOOLS").is_none_or(|set| set != "1"), "{missing}");
    eprintln!("skipped: {missing}");
    None
}

const WRONG: &str = "_ws.malformed || _ws.expert.group == \"Malformed\" || _ws.short";

#[test]
fn accept_path() {
    let segments = [
        (From::Client, proposal(4, &[Eid::DEFAULT; 8])),
        (From::Listener, accept(true).encode_accept()),
        (From::Client, accept(true).encode_confirm()),
        // What follows on the connection is nobody's message.
        (From::Listener, vec![0]),
        (From::Client, vec![0; 9]),
    ];
    let Some(pcap) = capture("accept", &segments) else {
        return;
    };
    let Some(kinds) = tshark(&pcap, &["-T", "fields", "-e", "smc.clc_msg"]) else {
        return;
    };
    assert_eq!(kinds.lines().collect::<Vec<_>>(), ["1", "2", "3", "", ""]);
    assert_eq!(tshark(&pcap, &["-Y", WRONG]).unwrap(), "");

    let columns = tshark(&pcap, &["-T", "fields", "-e", "_ws.col.Info"]).unwrap();
    for (line, kind) in columns.lines().zip(["Proposal", "Accept", "Confirm"]) {
        assert!(line.contains(&format!("[SMC-Dv2-{kind}]")), "{line}");
    }

    let all = tshark(&pcap, &["-O", "smc"]).unwrap();
    let lines = |text: &str| all.lines().filter(|line| line.contains(text)).count();
    assert_eq!(lines("EID Count: 8"), 1);
    assert_eq!(lines("ISMv2 GID Count: 8"), 1);
    assert_eq!(lines("  EID: IVSMC"), 8);
    assert_eq!(lines("ISM GID: 0x0000000000030005"), 4);
    assert_eq!(lines("ISM GID: 0x0123456789ab4def"), 4);
    // Eight entries, one Accept, one Confirm.
    assert_eq!(lines("ISMv2 CHID: 0xff01"), 10);
    assert_eq!(lines("DMB Token: 0x00000000000abcde"), 2);
    assert_eq!(lines("Negotiated EID: IVSMC"), 2);
    assert_eq!(lines("Peer Host Name: VM-1"), 2);
}

#[test]
fn decline_path_and_the_shortest_messages() {
    let segments = [
        (From::Client, proposal(0, &[])),
        (From::Listener, Decline::new(Diagnosis::NOSMCD2DEV).encode()),
        (From::Client, proposal(1, &[Eid::DEFAULT])),
        (From::Listener, accept(false).encode_accept()),
        (From::Client, Decline::new(Diagnosis::MAX_DMB).encode()),
    ];
    let Some(pcap) = capture("decline", &segments) else {
        return;
    };
    let fields = ["-T", "fields", "-e", "smc.clc_msg", "-E", "occurrence=a"];
    let Some(kinds) = tshark(&pcap, &fields) else {
        return;
    };
    assert_eq!(kinds.lines().collect::<Vec<_>>(), ["1", "4", "1", "2", "4"]);
    assert_eq!(tshark(&pcap, &["-Y", WRONG]).unwrap(), "");
    let all = tshark(&pcap, &["-O", "smc"]).unwrap();
    assert!(all.contains("Peer Diagnosis Information: 0x03030007"));
    assert!(all.contains("Peer Diagnosis Information: 0x030d0000"));
}

#[test]
fn a_message_in_two_segments() {
    let bytes = proposal(1, &[Eid::DEFAULT]);
    let segments = [(From::Client, bytes[..100].to_vec()), (From::Client, bytes[100..].to_vec())];
    let Some(pcap) = capture("segments", &segments) else {
        return;
    };
    let Some(seen) = tshark(&pcap, &["-O", "smc"]) else {
        return;
    };
    assert!(seen.contains("CLC Message: Proposal (1)"), "{seen}");
    assert_eq!(seen.matches("ISMv2 CHID: 0xff01").count(), 2);
    assert_eq!(tshark(&pcap, &["-Y", WRONG]).unwrap(), "");
}
