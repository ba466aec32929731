//! What children do.

use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use ivsmc_proto::directory::Bound;
use ivsmc_proto::dmb::Token;
use ivsmc_proto::host::Endpoint;
use ivsmc_proto::intent::IntentKey;
use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::mem::with_uninit;

use super::process::{arm, PATIENCE};
use crate::agent::tests::stand_in::{options as agent_options, Served};
use crate::attachment::Attachment;
use crate::server::{Backing, Server, ServerOptions};
use crate::{ConnectOptions, ListenOptions, Listener, Plain, RecvFlags, Session, Timeout};

/// Bytes that go there and back at a time: more than one ring holds, not more than both and what
/// is in hand, so that each end waits for room and for data.
pub(super) const BLOCK: usize = 40_000;
/// Bytes of a region.
pub(super) const SIZE: u64 = 16 << 20;
/// Bytes of a ring.
pub(super) const RING: u32 = 16 << 10;

/// Between two blocks.
const PAUSE: Duration = Duration::from_millis(1);
const LONG: Timeout = Timeout::After(PATIENCE);

/// Byte `position` of the stream that begins with `seed`.
pub(super) fn byte(seed: u8, position: u64) -> u8 {
    (position.wrapping_mul(0x9e37_79b9) >> 13).to_le_bytes()[0] ^ seed
}

pub(super) fn play(role: &str, arguments: &[&str]) {
    crate::set_match_wait(Some(PATIENCE));
    match (role, arguments) {
        ("join", [device]) => join(device),
        ("join again", [device]) => join_again(device),
        ("hold", [device, index, generation, token]) => hold(device, index, generation, token),
        ("allocate", [device]) => allocate(device),
        ("client", [device, address, seed, rounds]) => {
            client(device, address, seed, rounds.parse().unwrap());
        }
        ("misser", [device, address]) => miss(device, address),
        ("sleeper", [device, address, seed]) => sleep(device, address, seed),
        ("listener", [device]) => listen(device, None),
        ("listener", [device, eid]) => listen(device, Some((*eid).to_owned())),
        ("local", [directory, role]) => {
            std::env::set_var("IVSMC_LOCAL_DIR", directory);
            std::env::set_var("IVSMC_LOCAL_SIZE", "4M");
            play(role, &["local"]);
        }
        ("ivshmem server", [socket, file]) => serve(socket, file),
        ("agent", [directory, region]) => agent(directory, region),
        _ => panic!("no such role: {role} {arguments:?}"),
    }
}

/// Waits for the end of the input; a line is a number for [`arm`].
fn wait_for_end() {
    for line in std::io::stdin().lines() {
        arm(line.unwrap().parse().unwrap());
    }
}

fn attach(device: &str) -> Arc<Attachment> {
    Attachment::open(&device.parse().unwrap()).unwrap_or_else(|why| panic!("{}", why.sentence))
}

/// Attaches, and leaves at the end.
fn join(device: &str) {
    let attachment = attach(device);
    println!("child joined {}", attachment.me());
    wait_for_end();
}

/// Attaches, and writes its record anew.
fn join_again(device: &str) {
    let attachment = attach(device);
    attachment.region().write_host_record(attachment.me(), &attachment.record());
    wait_for_end();
}

/// Attaches, takes memory, and gives it back.
fn allocate(device: &str) {
    let attachment = attach(device);
    drop(attachment.allocate(0, attachment.me()).unwrap());
}

/// Has one of everything that there is in a region, as owner and as the writer of `token`.
fn hold(device: &str, index: &str, generation: &str, token: &str) {
    let attachment = attach(device);
    let (region, me) = (attachment.region(), attachment.me());
    let peer = SlotRef { index: index.parse().unwrap(), generation: generation.parse().unwrap() };
    region.register_listener(me, Bound::Any4, 1).unwrap();
    let end = |port| Endpoint::from(SocketAddr::from(([127, 0, 0, 1], port)));
    region.publish_intent(me, &IntentKey { client: end(2), server: end(1) }).unwrap();
    let own = attachment.allocate(0, peer).unwrap();
    println!("child {me}");
    // Its peer invites it when it knows who it is.
    let mut line = String::new();
    assert_eq!(token, "asked");
    std::io::stdin().read_line(&mut line).unwrap();
    let written = attachment.attach(Token(line.trim().parse().unwrap()), 0, peer).unwrap();
    println!("child holding");
    wait_for_end();
    drop((own, written));
}

/// Streams to `address` and back, for so many rounds; 0: to the end of the input.
fn client(device: &str, address: &str, seed: &str, rounds: u64) {
    let ended = Arc::new(AtomicBool::new(false));
    if rounds == 0 {
        let ended = Arc::clone(&ended);
        std::thread::spawn(move || {
            wait_for_end();
            ended.store(true, Ordering::Relaxed);
        });
    }
    let (session, seed) = (connect(device, address), seed.parse().unwrap());
    for round in (0..).take_while(|round| rounds == 0 || *round < rounds) {
        stream(&session, seed, round);
        // Leaves others, and other tests, time.
        std::thread::sleep(PAUSE);
        if ended.load(Ordering::Relaxed) {
            break;
        }
    }
    drop(session);
    crate::close_all();
}

/// Streams to `address` and back, and waits for more.
fn sleep(device: &str, address: &str, seed: &str) {
    let session = connect(device, address);
    (0..3).for_each(|round| stream(&session, seed.parse().unwrap(), round));
    println!("child sleeping");
    recv(&session, &mut [0]).unwrap();
}

fn connect(device: &str, address: &str) -> Session {
    let options = connect_options(device);
    let session = crate::connect(address.parse().unwrap(), &options, &Plain).unwrap();
    let fallback = session.fallback();
    println!("child connected {}", fallback.map_or("smc", |fallback| &fallback.sentence));
    session
}

/// Connects to `address`, where nobody accepts, for not longer than is usual.
fn miss(device: &str, address: &str) {
    crate::set_match_wait(None);
    crate::connect(address.parse().unwrap(), &connect_options(device), &Plain).unwrap();
}

/// One block there and back.
fn stream(session: &Session, seed: u8, round: u64) {
    let first = round * BLOCK as u64;
    let block: Vec<_> = (0..BLOCK as u64).map(|n| byte(seed, first + n)).collect();
    session.send_all(&block, LONG, &Plain).unwrap();
    let (mut back, mut got) = (vec![0; BLOCK], 0);
    while got < BLOCK {
        let count = recv(session, &mut back[got..]).unwrap();
        assert!(count > 0, "the stream ended");
        got += count;
    }
    assert!(back == block, "other bytes came back");
}

pub(super) fn recv(session: &Session, into: &mut [u8]) -> crate::Result<usize> {
    let flags = RecvFlags::default();
    with_uninit(into, |into: &mut [MaybeUninit<u8>]| session.recv(into, flags, LONG, &Plain))
}

/// How to connect: from a loopback address of this process's own, whose ports are free.
pub(super) fn connect_options(device: &str) -> ConnectOptions {
    let [_, _, a, b] = std::process::id().to_be_bytes();
    ConnectOptions {
        timeout: LONG,
        device: Some(device.to_owned()),
        source: Some(SocketAddr::from(([127, 65, a, b], 0))),
        buffer: Some(RING),
        ..ConnectOptions::default()
    }
}

pub(super) fn listen_options(device: &str) -> ListenOptions {
    ListenOptions { device: Some(device.to_owned()), buffer: Some(RING), ..Default::default() }
}

/// Accepts one after the other and reads to the end.
fn listen(device: &str, eid: Option<String>) {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    // Before anybody can know it otherwise.
    println!("child at address {}", socket.local_addr().unwrap());
    let options = ListenOptions { eid, ..listen_options(device) };
    let listener = Arc::new(Listener::adopt(Fd::from(OwnedFd::from(socket)), options).unwrap());
    println!("child listening");
    let closing = std::thread::spawn({
        let listener = Arc::clone(&listener);
        move || {
            wait_for_end();
            listener.close();
        }
    });
    while let Ok((session, _)) = listener.accept(Timeout::Never, &Plain) {
        while recv(&session, &mut [0; 4096]).is_ok_and(|count| count > 0) {}
    }
    // Leaves behind all steps of the close: whoever dies in that has not left.
    closing.join().unwrap();
    crate::close_all();
}

/// An ivshmem server on `file`, made if it is not there.
fn serve(socket: &str, file: &str) {
    let backing = Backing::File { path: file.into(), size: Some(SIZE) };
    let server = Server::new(ServerOptions { backing, ..ServerOptions::new(socket) }).unwrap();
    println!("child serving");
    let handle = server.handle();
    std::thread::spawn(move || {
        wait_for_end();
        handle.stop();
    });
    server.serve(&Plain, |_| {}).unwrap();
}

/// An agent over a device in the file `region`.
fn agent(directory: &str, region: &str) {
    let options = agent_options(Path::new(directory));
    let _served = Served::with(options, Path::new(region), 4, PATIENCE);
    println!("child serving");
    wait_for_end();
}
