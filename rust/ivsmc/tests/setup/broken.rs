//! The other end breaks the rules, at every step.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use ivsmc::{ConnectOptions, Error, ListenOptions, Listener, Plain, Timeout};
use ivsmc_proto::clc::{
    self, AcceptConfirm, Chid, Decline, Device, Diagnosis, Eid, Gid, Message, Proposal,
};
use ivsmc_proto::intent::IntentState;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net;

use super::peers::*;

const MIB: u64 = 1 << 20;

fn read_message(conn: &mut TcpStream) -> Message {
    let mut header = [0; clc::HEADER_LENGTH];
    conn.read_exact(&mut header).unwrap();
    let mut bytes = vec![0; clc::expected_length(&header).unwrap()];
    bytes[..header.len()].copy_from_slice(&header);
    conn.read_exact(&mut bytes[header.len()..]).unwrap();
    clc::decode(&bytes).unwrap()
}

/// A client of ivsmc, and a server that matches its intent and then does `answer`.
fn client_of(answer: impl FnOnce(&Peer, &mut TcpStream, Proposal) + Send) -> String {
    let file = RegionFile::new(16 * MIB);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let peer = file.peer();
    peer.register(&server);
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let mut conn = server.accept().unwrap().0;
            peer.match_and_wait(&conn);
            let Message::Proposal(proposal) = read_message(&mut conn) else {
                panic!("no Proposal")
            };
            answer(&peer, &mut conn, proposal);
            conn
        });
        let client = connect(address, file.device()).unwrap();
        let reason = reason(&client);
        let conn = served.join().unwrap();
        let conn = if reason == "HANDSHAKE_FAILED" { server.accept().unwrap().0 } else { conn };
        exercise_plain(client, conn);
        assert_eq!(peer.region.census().intents, 0);
        reason.to_owned()
    })
}

#[test]
fn a_decline_leaves_the_connection() {
    for (diagnosis, reason) in [
        (Diagnosis::NOUEID, "EID_MISMATCH"),
        (Diagnosis::NOSMCD2DEV, "NO_COMMON_REGION"),
        (Diagnosis::MAX_DMB, "REGION_FULL"),
        (Diagnosis::CNFERR, "PEER_DECLINED"),
    ] {
        let found = client_of(|_, conn, _| {
            conn.write_all(&Decline::new(diagnosis).encode()).unwrap();
        });
        assert_eq!(found, reason);
    }
}

#[test]
fn garbage_instead_of_an_accept_leads_to_a_new_connection() {
    let found = client_of(|_, conn, _| conn.write_all(b"HTTP/1.1 400 Bad Request").unwrap());
    assert_eq!(found, "HANDSHAKE_FAILED");
}

#[test]
fn the_end_instead_of_an_accept_leads_to_a_new_connection() {
    let found = client_of(|_, conn, _| conn.shutdown(Shutdown::Both).unwrap());
    assert_eq!(found, "HANDSHAKE_FAILED");
}

#[test]
fn a_reset_instead_of_an_accept_leads_to_a_new_connection() {
    // What the kernel does with the connections of a listener that is killed.
    let found = client_of(|_, conn, _| {
        net::set_linger(&*conn, Some(0)).unwrap();
        let elsewhere = TcpListener::bind("127.0.0.1:0").unwrap();
        *conn = TcpStream::connect(elsewhere.local_addr().unwrap()).unwrap();
    });
    assert_eq!(found, "HANDSHAKE_FAILED");
}

#[test]
fn silence_instead_of_an_accept_leads_to_a_new_connection() {
    let file = RegionFile::new(16 * MIB);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let peer = file.peer();
    peer.register(&server);
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let conn = server.accept().unwrap().0;
            peer.match_and_wait(&conn);
            (conn, server.accept().unwrap().0)
        });
        // Half of it is for the first connection.
        let timeout = Timeout::After(Duration::from_secs(1));
        let options = ConnectOptions { timeout, ..options(file.device()) };
        let client = ivsmc::connect(address, &options, &Plain).unwrap();
        assert_eq!(reason(&client), "HANDSHAKE_FAILED");
        let (silent, conn) = served.join().unwrap();
        exercise_plain(client, conn);
        drop(silent);
    });
    assert_eq!(peer.region.census().intents, 0);
}

/// Two processes accept from one socket; the one that got the connection breaks off.
#[test]
fn the_application_sees_only_the_connection_made_anew() {
    let (file, elsewhere) = (RegionFile::new(16 * MIB), RegionFile::new(16 * MIB));
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let peer = file.peer();
    peer.register(&socket);
    let shared = Fd::from(OwnedFd::from(socket.try_clone().unwrap()));
    // Not to be found by the client, so that it does not accept by itself.
    let options = ListenOptions { shared: true, device: elsewhere.device(), ..Default::default() };
    let listener = Listener::adopt(shared, options).unwrap();
    for answer in [&b""[..], b"HTTP/1.1 400 Bad Request"] {
        std::thread::scope(|scope| {
            let client = scope.spawn(|| connect(address, file.device()).unwrap());
            let mut first = until("the connection", || socket.accept().ok()).0;
            peer.match_and_wait(&first);
            first.write_all(answer).unwrap();
            drop(first);
            let server = accept(&listener);
            let client = client.join().unwrap();
            assert_eq!((reason(&client), reason(&server)), ("HANDSHAKE_FAILED", "PLAIN_CLIENT"));
            exercise(client, server);
        });
    }
    assert_eq!(listener.stats().unwrap().accepted_tcp, 2);
}

#[test]
fn a_proposal_back_leads_to_a_new_connection() {
    let found = client_of(|_, conn, proposal| conn.write_all(&proposal.encode()).unwrap());
    assert_eq!(found, "HANDSHAKE_FAILED");
}

#[test]
fn an_accept_of_nonsense_leads_to_a_new_connection() {
    type Change = fn(&mut AcceptConfirm);
    let changes: [Change; 5] = [
        |_| {},
        |accept| accept.token = u64::MAX,
        |accept| accept.gid = Gid(u128::MAX),
        |accept| accept.chid = Chid(0xFFFF),
        |accept| accept.eid = Eid::new("OTHER").unwrap(),
    ];
    for change in changes {
        let found = client_of(|peer, conn, _| {
            let uuid = peer.region.uuid();
            let mut accept = AcceptConfirm {
                gid: Gid::of_slot(uuid, peer.me.index, peer.me.generation),
                token: 0,
                size_class: 4,
                linkid: 0,
                chid: Chid::of_region(uuid),
                eid: Eid::DEFAULT,
                first_contact: None,
            };
            change(&mut accept);
            conn.write_all(&accept.encode_accept()).unwrap();
        });
        assert_eq!(found, "HANDSHAKE_FAILED");
    }
}

#[test]
fn a_broken_handshake_is_an_error_where_shared_memory_is_required() {
    let file = RegionFile::new(16 * MIB);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let peer = file.peer();
    peer.register(&server);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let conn = server.accept().unwrap().0;
            peer.match_and_wait(&conn);
        });
        let require = ivsmc::Require::Smc;
        let options = ivsmc::ConnectOptions { require, ..options(file.device()) };
        let error = ivsmc::connect(address, &options, &Plain);
        let Err(Error::Required(fallback)) = error else { panic!("it fell back") };
        assert_eq!(fallback.reason.name(), "HANDSHAKE_FAILED");
    });
}

/// A refusal before the client has agreed leaves the connection.
#[test]
fn a_refusal_leaves_the_connection() {
    let file = RegionFile::new(16 * MIB);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let peer = file.peer();
    peer.register(&server);
    // The client may be faster than the refusal; then it is a broken handshake, asked anew.
    for _ in 0..50 {
        let found = std::thread::scope(|scope| {
            let served = scope.spawn(|| {
                let conn = server.accept().unwrap().0;
                let intent = peer.intent(&conn);
                peer.region.match_intent(&intent).unwrap();
                let refused = peer.region.refuse_intent(&intent).is_ok();
                (conn, refused)
            });
            let client = std::thread::scope(|_| {
                let device = file.device();
                std::thread::spawn(move || connect(address, device).unwrap())
            });
            let (conn, refused) = served.join().unwrap();
            let conn = if refused {
                conn
            } else {
                drop(conn);
                server.accept().unwrap().0
            };
            let client = client.join().unwrap();
            let reason = reason(&client);
            assert_eq!(reason, if refused { "REFUSED" } else { "HANDSHAKE_FAILED" });
            exercise_plain(client, conn);
            refused
        });
        if found {
            return;
        }
    }
    panic!("never refused in time");
}

/// Clients that announce themselves and then do something else.
struct Clients {
    file: RegionFile,
    listener: ivsmc::Listener,
    peer: Peer,
}

impl Clients {
    fn new() -> Self {
        let file = RegionFile::new(16 * MIB);
        let listener = listen(file.device());
        listener.fileno().unwrap();
        let peer = file.peer();
        Self { file, listener, peer }
    }

    /// The listener serves others as ever, and has nothing in hand.
    fn still_works(self) {
        let client = connect(self.listener.local_addr(), self.file.device()).unwrap();
        let server = accept(&self.listener);
        assert_eq!((reason(&client), reason(&server)), ("none", "none"));
        exercise(client, server);
        let nothing = self.listener.accept(Timeout::NonBlocking, &Plain).err().unwrap();
        assert!(matches!(nothing, Error::WouldBlock));
        assert_eq!(self.listener.stats().unwrap().handshakes, 0);
    }
}

#[test]
fn bytes_before_the_commitment_are_the_applications() {
    let clients = Clients::new();
    let (mut conn, intent) = clients.peer.announce(clients.listener.local_addr());
    clients.peer.wait_for(&intent, Some(IntentState::Matched));
    conn.write_all(b"GET / HTTP/1.1").unwrap();
    let server = accept(&clients.listener);
    assert_eq!(reason(&server), "REFUSED");
    clients.peer.wait_for(&intent, Some(IntentState::Refused));
    assert_eq!(recv(&server, 14), b"GET / HTTP/1.1");
    exercise_plain(server, conn);
    clients.peer.region.withdraw_intent(&intent).unwrap();
    clients.still_works();
}

#[test]
fn silence_before_the_commitment_is_plain_after_a_while() {
    let clients = Clients::new();
    let (conn, intent) = clients.peer.announce(clients.listener.local_addr());
    let server = accept(&clients.listener);
    assert_eq!(reason(&server), "REFUSED");
    exercise_plain(server, conn);
    clients.peer.region.withdraw_intent(&intent).unwrap();
    clients.still_works();
}

#[test]
fn a_client_that_gives_up_is_plain() {
    let clients = Clients::new();
    let (conn, intent) = clients.peer.announce(clients.listener.local_addr());
    clients.peer.wait_for(&intent, Some(IntentState::Matched));
    clients.peer.region.withdraw_intent(&intent).unwrap();
    let server = accept(&clients.listener);
    assert_eq!(reason(&server), "NOT_MATCHED");
    exercise_plain(server, conn);
    clients.still_works();
}

#[test]
fn a_client_that_ends_before_its_commitment_is_plain_and_ended() {
    let clients = Clients::new();
    let (conn, intent) = clients.peer.announce(clients.listener.local_addr());
    clients.peer.wait_for(&intent, Some(IntentState::Matched));
    drop(conn);
    let server = accept(&clients.listener);
    assert_eq!(reason(&server), "REFUSED");
    assert_eq!(recv(&server, 1), b"");
    clients.peer.region.withdraw_intent(&intent).unwrap();
    clients.still_works();
}

#[test]
fn an_announcement_that_is_never_finished_is_plain() {
    let clients = Clients::new();
    let key_of = |conn: &TcpStream| ivsmc_proto::intent::IntentKey {
        client: conn.local_addr().unwrap().into(),
        server: conn.peer_addr().unwrap().into(),
    };
    // The background has it in hand before it is announced: plain at once.
    let conn = TcpStream::connect(clients.listener.local_addr()).unwrap();
    let intent = clients.peer.region.publish_intent(clients.peer.me, &key_of(&conn)).unwrap();
    let server = accept(&clients.listener);
    let reason = reason(&server);
    assert!(matches!(reason, "PLAIN_CLIENT" | "REFUSED"), "{reason}");
    exercise_plain(server, conn);
    clients.peer.region.withdraw_intent(&intent).unwrap();
    clients.still_works();
}

#[test]
fn a_plain_program_on_a_committed_port_keeps_its_bytes() {
    let clients = Clients::new();
    let (mut conn, intent) = clients.peer.commit(clients.listener.local_addr());
    conn.write_all(b"GET / HTTP/1.1").unwrap();
    let server = accept(&clients.listener);
    assert_eq!(recv(&server, 14), b"GET / HTTP/1.1");
    exercise_plain(server, conn);
    clients.peer.region.finish_intent(&intent).unwrap();
    clients.still_works();
}

#[test]
fn a_broken_proposal_never_reaches_the_application() {
    let clients = Clients::new();
    let uuid = clients.peer.region.uuid();
    let me = clients.peer.me;
    let device =
        Device { chid: Chid::of_region(uuid), gid: Gid::of_slot(uuid, me.index, me.generation) };
    let proposal = Proposal::new(vec![device], vec![Eid::DEFAULT]).encode();
    let mut wrong_trailer = proposal.clone();
    *wrong_trailer.last_mut().unwrap() ^= 1;
    let mut unknown_type = proposal.clone();
    unknown_type[4] = 9;
    for bytes in [&wrong_trailer[..], &unknown_type, &proposal[..100], &[]] {
        let (mut conn, intent) = clients.peer.commit(clients.listener.local_addr());
        conn.write_all(bytes).unwrap();
        // It may have been closed already.
        let _ = conn.shutdown(Shutdown::Write);
        assert_eq!(conn.read(&mut [0; 8]).unwrap_or(0), 0);
        clients.peer.region.finish_intent(&intent).unwrap();
    }
    clients.still_works();
}

#[test]
fn a_broken_confirm_never_reaches_the_application() {
    let clients = Clients::new();
    let uuid = clients.peer.region.uuid();
    let me = clients.peer.me;
    let device =
        Device { chid: Chid::of_region(uuid), gid: Gid::of_slot(uuid, me.index, me.generation) };
    let proposal = Proposal::new(vec![device], vec![Eid::DEFAULT]).encode();
    let confirm = AcceptConfirm {
        gid: device.gid,
        token: 0,
        size_class: 0,
        linkid: 0,
        chid: device.chid,
        eid: Eid::DEFAULT,
        first_contact: None,
    };
    let foreign = AcceptConfirm { gid: Gid(u128::MAX), ..confirm };
    for bytes in [
        confirm.encode_confirm(),
        foreign.encode_confirm(),
        confirm.encode_accept(),
        proposal.clone(),
        b"GET / HTTP/1.1".to_vec(),
        Vec::new(),
    ] {
        let (mut conn, intent) = clients.peer.commit(clients.listener.local_addr());
        conn.write_all(&proposal).unwrap();
        assert!(matches!(read_message(&mut conn), Message::Accept(_)));
        clients.peer.region.finish_intent(&intent).unwrap();
        conn.write_all(&bytes).unwrap();
        // It may have been closed already.
        let _ = conn.shutdown(Shutdown::Write);
        assert_eq!(conn.read(&mut [0; 8]).unwrap_or(0), 0);
    }
    until("the DMBs of the offers", || (clients.peer.region.census().dmbs_held == 0).then_some(()));
    clients.still_works();
}

#[test]
fn a_client_may_decline_the_accept() {
    let clients = Clients::new();
    let uuid = clients.peer.region.uuid();
    let me = clients.peer.me;
    let device =
        Device { chid: Chid::of_region(uuid), gid: Gid::of_slot(uuid, me.index, me.generation) };
    let (mut conn, intent) = clients.peer.commit(clients.listener.local_addr());
    let proposal = Proposal::new(vec![device], vec![Eid::DEFAULT]);
    conn.write_all(&proposal.encode()).unwrap();
    assert!(matches!(read_message(&mut conn), Message::Accept(_)));
    let mut bytes = Decline::new(Diagnosis::MAX_DMB).encode();
    bytes.extend_from_slice(b"right behind it");
    conn.write_all(&bytes).unwrap();
    clients.peer.region.finish_intent(&intent).unwrap();
    let server = accept(&clients.listener);
    assert_eq!(reason(&server), "REGION_FULL");
    assert_eq!(recv(&server, 15), b"right behind it");
    exercise_plain(server, conn);
    clients.still_works();
}

#[test]
fn a_proposal_in_somebody_elses_name_is_declined() {
    let clients = Clients::new();
    let other = clients.file.peer();
    let uuid = other.region.uuid();
    let gid = Gid::of_slot(uuid, other.me.index, other.me.generation);
    let device = Device { chid: Chid::of_region(uuid), gid };
    let (mut conn, intent) = clients.peer.commit(clients.listener.local_addr());
    conn.write_all(&Proposal::new(vec![device], vec![Eid::DEFAULT]).encode()).unwrap();
    let Message::Decline(decline) = read_message(&mut conn) else { panic!("accepted") };
    assert_eq!(decline.diagnosis, Diagnosis::NOSMCD2DEV);
    clients.peer.region.finish_intent(&intent).unwrap();
    let server = accept(&clients.listener);
    assert_eq!(reason(&server), "NO_COMMON_REGION");
    exercise_plain(server, conn);
    clients.still_works();
}

#[test]
fn a_slow_client_holds_nobody_up() {
    let clients = Clients::new();
    let (conn, intent) = clients.peer.commit(clients.listener.local_addr());
    let client = connect(clients.listener.local_addr(), clients.file.device()).unwrap();
    let server = clients.listener.accept(Timeout::After(Duration::from_secs(2)), &Plain).unwrap().0;
    assert_eq!((reason(&client), reason(&server)), ("none", "none"));
    assert_eq!(clients.listener.stats().unwrap().handshakes, 1);
    clients.listener.close();
    assert_eq!((&conn).read(&mut [0; 8]).unwrap_or(0), 0);
    clients.peer.region.finish_intent(&intent).unwrap();
    exercise(client, server);
}

#[test]
fn a_slow_client_holds_nobody_up_where_others_accept_as_well() {
    let file = RegionFile::new(16 * MIB);
    let options = ListenOptions { shared: true, device: file.device(), ..Default::default() };
    let listener = listen_on("127.0.0.1:0", options).unwrap();
    // By the background, and by a thread inside.
    listener.fileno().unwrap();
    let peer = file.peer();
    let (_first, first) = peer.commit(listener.local_addr());
    let (_second, second) = peer.commit(listener.local_addr());
    let client = connect(listener.local_addr(), file.device()).unwrap();
    assert_eq!((reason(&client), reason(&accept(&listener))), ("none", "none"));
    std::thread::scope(|scope| {
        let accepted = scope.spawn(|| accept(&listener));
        let client = connect(listener.local_addr(), file.device()).unwrap();
        exercise(client, accepted.join().unwrap());
    });
    assert_eq!(listener.stats().unwrap().handshakes, 2);
    listener.close();
    for intent in [first, second] {
        peer.region.finish_intent(&intent).unwrap();
    }
}

#[test]
fn a_handshake_that_fails_makes_room_for_a_thread_that_waits() {
    let file = RegionFile::new(16 * MIB);
    let options = ListenOptions { backlog: 1, device: file.device(), ..Default::default() };
    let listener = listen_on("127.0.0.1:0", options).unwrap();
    let address = listener.local_addr();
    let peer = file.peer();
    std::thread::scope(|scope| {
        let accepted = scope.spawn(|| accept(&listener));
        let (silent, _intent) = peer.commit(address);
        let plain = TcpStream::connect(address).unwrap();
        // Until the thread has left the handshake to the background, and sleeps.
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(listener.stats().unwrap().handshakes, 1);
        drop(silent);
        exercise_plain(accepted.join().unwrap(), plain);
    });
}
