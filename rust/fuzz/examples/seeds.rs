//! Writes inputs to begin with, made by the real encoders: `seeds DIRECTORY` makes one folder for each
//! target that would otherwise take long to find its way in.

use std::path::{Path, PathBuf};

use ivsmc_proto::clc::{
    AcceptConfirm, Chid, Decline, Device, Diagnosis, Eid, FirstContact, Gid, Hostname, Proposal,
};
use ivsmc_proto::frame::WAKE;

fn main() {
    let directory = std::env::args_os().nth(1).expect("usage: seeds DIRECTORY");
    let directory = PathBuf::from(directory);
    write(&directory, "clc", &clc());
    write(&directory, "frames", &frames());
    write(&directory, "devices", &devices());
    write(&directory, "ivshmem_client", &[ivshmem_client()]);
    write(
        &directory,
        "agent_client",
        &[agent_client(&[0, 1]), agent_client(&[1, 1]), short_device()],
    );
    write(&directory, "region", &[restless_bound()]);
    write(&directory, "handshake", &[client(), server()]);
}

fn write(directory: &Path, target: &str, seeds: &[Vec<u8>]) {
    let folder = directory.join(target);
    std::fs::create_dir_all(&folder).expect("a folder for the seeds");
    for (number, seed) in seeds.iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{number}")), seed).expect("a file for a seed");
    }
}

/// Every message, in every form that this end writes.
fn clc() -> Vec<Vec<u8>> {
    let uuid = 7 << 64 | 9;
    let device = Device { chid: Chid::of_region(uuid), gid: Gid::of_slot(uuid, 3, 1) };
    let [none, one, many] = [0, 1, 4].map(|count| {
        let eids = vec![Eid::DEFAULT; count];
        Proposal::new(vec![device; count], eids).encode()
    });
    let accept = AcceptConfirm {
        gid: device.gid,
        token: 1 << 32,
        size_class: 4,
        linkid: 1,
        chid: device.chid,
        eid: Eid::DEFAULT,
        first_contact: Some(FirstContact::new(Hostname::new("host"))),
    };
    let later = AcceptConfirm { first_contact: None, ..accept };
    vec![
        none,
        one,
        many,
        accept.encode_accept(),
        accept.encode_confirm(),
        later.encode_accept(),
        later.encode_confirm(),
        Decline::new(Diagnosis::NOUEID).encode(),
    ]
}

/// Eight cuts, then a stream.
fn frames() -> Vec<Vec<u8>> {
    let mut with_body =
        vec![1, 2, 3, 4, 5, 6, 7, 8, WAKE, 0x01, 0x80, 0, 3, 0, 0, 0, WAKE, 0xff, 0, 0];
    let wakes = with_body[..9].to_vec();
    let short = with_body.clone();
    with_body.extend([0x81, 0xff, 0xff]);
    vec![wakes, short, with_body]
}

fn devices() -> Vec<Vec<u8>> {
    let lists =
        ["none", "local,file:/dev/shm/region", "vfio:0000:00:05.0, pci:06.1", "agent:/a,host:b"];
    lists.map(|list| list.as_bytes().to_vec()).into()
}

/// Choices of a target that are none: the usual descriptors, in one piece.
const USUAL: [u8; 2] = [0, 1];

/// A welcome with two vectors, as the target reads it.
fn ivshmem_client() -> Vec<u8> {
    // The region's size; as many messages; what each is: version, id, region, vectors.
    let mut seed = vec![0, 7];
    let messages: [&[u8]; 7] = [&[0], &[2, 7], &[1], &[5, 3], &[5, 3], &[5, 7], &[5, 7]];
    for message in messages {
        seed.extend_from_slice(message);
        seed.extend_from_slice(&USUAL);
    }
    // It ends; later peer 3 leaves.
    seed.extend([1, 2, 3, 0, 1, 1, 3, 0]);
    seed
}

/// What an agent says: first the vector, and whether the device is as large as said.
fn agent_client(device: &[u8]) -> Vec<u8> {
    let mut seed = [device, &[3]].concat();
    for message in [0, 3, 4] {
        seed.extend([message, 0]);
        seed.extend_from_slice(&USUAL);
    }
    seed.push(1);
    seed
}

/// Of a device without the registers that it is said to have.
fn short_device() -> Vec<u8> {
    agent_client(&[0, 0, 0x00, 0x40])
}

/// Two who listen; while the second one enters the directory somebody keeps taking its bound back.
fn restless_bound() -> Vec<u8> {
    let listen = [1, 0, 0, 0, 80];
    let mut seed = vec![0, 3, 0, 0, 0, 0, 3];
    seed.extend(listen);
    seed.extend([0, 2]);
    for value in [0_u64, 1] {
        seed.extend([6, 32, 0]);
        seed.extend(value.to_le_bytes());
    }
    seed.extend(listen);
    seed
}

/// Who connects, is matched, commits, and sends a Proposal and a Confirm.
fn client() -> Vec<u8> {
    vec![1, 1, 1, 1, 0, 0, 1, 1, 4, 2, 0, 2, 0, 1, 1]
}

/// Who listens, and answers with an Accept.
fn server() -> Vec<u8> {
    vec![0, 0, 3, 2, 0, 2, 0, 1]
}
