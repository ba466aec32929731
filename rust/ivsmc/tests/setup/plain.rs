//! One end is a plain socket, or the set-up is switched off.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use ivsmc::{ConnectOptions, Error, Plain, Timeout};
use ivsmc_proto::intent::IntentKey;

use super::peers::*;

const MIB: u64 = 1 << 20;

#[test]
fn a_plain_client_gets_plain_tcp_at_once() {
    let file = RegionFile::new(16 * MIB);
    let listener = listen(file.device());
    // Accepted by the calling thread, and by the background.
    for background in [false, true] {
        let mut client = TcpStream::connect(listener.local_addr()).unwrap();
        if background {
            listener.fileno().unwrap();
            until("the background", || (listener.stats().unwrap().ready == 1).then_some(()));
        }
        let server = accept(&listener);
        assert_eq!(reason(&server), "PLAIN_CLIENT");
        send(&server, b"220 ready");
        let mut greeting = [0; 9];
        client.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"220 ready");
        exercise_plain(server, client);
    }
}

#[test]
fn a_plain_server_gets_plain_tcp_and_not_one_byte_more() {
    let file = RegionFile::new(16 * MIB);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = connect(server.local_addr().unwrap(), file.device()).unwrap();
    let fallback = client.fallback().unwrap().clone();
    assert_eq!(fallback.reason.name(), "PEER_NO_SMC");
    assert!(fallback.sentence.contains(&file.device().unwrap()), "{}", fallback.sentence);
    exercise_plain(client, server.accept().unwrap().0);
}

#[test]
fn without_a_device_there_is_plain_tcp() {
    let listener = listen(Some("none".into()));
    let file = RegionFile::new(16 * MIB);
    let client = connect(listener.local_addr(), file.device()).unwrap();
    assert_eq!(reason(&client), "PEER_NO_SMC");
    let server = accept(&listener);
    assert_eq!(reason(&server), "DISABLED");
    exercise(client, server);
    let missing = connect(listener.local_addr(), Some("file:/does/not/exist".into()));
    assert!(matches!(missing, Err(Error::Device { .. })));
}

#[test]
fn without_room_for_an_intent_there_is_plain_tcp() {
    let file = RegionFile::new(MIB);
    let listener = listen(file.device());
    let peer = file.peer();
    // Where an intent may be depends on the client's port.
    let intents: Vec<_> = (1..=u16::MAX)
        .filter_map(|port| {
            let key = IntentKey {
                client: SocketAddr::from(([127, 0, 0, 1], port)).into(),
                server: SocketAddr::from(([127, 0, 0, 1], 9)).into(),
            };
            peer.region.publish_intent(peer.me, &key)
        })
        .collect();
    assert_eq!(u32::try_from(intents.len()), Ok(peer.region.census().intents));
    let client = connect(listener.local_addr(), file.device()).unwrap();
    let server = accept(&listener);
    assert_eq!((reason(&client), reason(&server)), ("INTENTS_FULL", "PLAIN_CLIENT"));
    exercise(client, server);
    for intent in intents {
        peer.region.withdraw_intent(&intent).unwrap();
    }
    let client = connect(listener.local_addr(), file.device()).unwrap();
    assert_eq!(reason(&client), "none");
    exercise(client, accept(&listener));
}

#[test]
fn errors_of_tcp_are_errors() {
    let file = RegionFile::new(16 * MIB);
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let entry = file.peer().register(&socket);
    drop(socket);
    // Also where somebody claims to listen.
    for device in [Some("none".into()), file.device()] {
        let refused = connect(address, device).err().unwrap();
        assert_eq!(refused.errno(), Some(111), "{refused}");
    }
    let _ = entry;
    let options = ConnectOptions { timeout: Timeout::NonBlocking, ..options(None) };
    assert!(matches!(ivsmc::connect(address, &options, &Plain), Err(Error::WouldBlock)));
    let source = Some("192.0.2.1:0".parse().unwrap());
    let options = ConnectOptions { source, ..super::peers::options(Some("none".into())) };
    let not_mine = ivsmc::connect(address, &options, &Plain).err().unwrap();
    assert_eq!(not_mine.errno(), Some(99), "{not_mine}");
}

#[test]
fn a_listener_that_does_not_accept_is_asked_twice() {
    let file = RegionFile::new(16 * MIB);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let peer = file.peer();
    peer.register(&server);
    for expected in ["NOT_MATCHED", "NOT_MATCHED", "RECENTLY_NOT_MATCHED"] {
        let client = connect(address, file.device()).unwrap();
        assert_eq!(reason(&client), expected);
        exercise_plain(client, server.accept().unwrap().0);
    }
    assert_eq!(peer.region.census().intents, 0);
}

#[test]
fn waiting_for_a_match_takes_half_of_the_callers_time() {
    let file = RegionFile::new(16 * MIB);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    file.peer().register(&server);
    let timeout = Timeout::After(Duration::from_millis(40));
    let options = ConnectOptions { timeout, ..options(file.device()) };
    let client = ivsmc::connect(server.local_addr().unwrap(), &options, &Plain).unwrap();
    assert_eq!(reason(&client), "NOT_MATCHED");
}

#[test]
fn a_translated_address_is_a_plain_connection_to_both() {
    let file = RegionFile::new(16 * MIB);
    let listener = listen(file.device());
    // The client connects to a relay that passes the bytes on from an address of its own.
    let relay = TcpListener::bind("127.0.0.1:0").unwrap();
    file.peer().register(&relay);
    let target = listener.local_addr();
    let relay_address = relay.local_addr().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut near = relay.accept().unwrap().0;
            let mut far = TcpStream::connect(target).unwrap();
            let (mut near_2, mut far_2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            let back = std::thread::spawn(move || {
                let _ = std::io::copy(&mut far_2, &mut near_2);
                let _ = near_2.shutdown(std::net::Shutdown::Write);
            });
            let _ = std::io::copy(&mut near, &mut far);
            let _ = far.shutdown(std::net::Shutdown::Write);
            back.join().unwrap();
        });
        let client = connect(relay_address, file.device()).unwrap();
        let server = accept(&listener);
        assert_eq!((reason(&client), reason(&server)), ("NOT_MATCHED", "PLAIN_CLIENT"));
        exercise(client, server);
    });
}

#[test]
fn a_server_that_speaks_first_is_plain_at_once() {
    let file = RegionFile::new(16 * MIB);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    file.peer().register(&server);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut conn = server.accept().unwrap().0;
            conn.write_all(b"220 ready").unwrap();
            assert_eq!(conn.read(&mut [0; 64]).unwrap(), 0, "a byte for a plain server");
        });
        let client = connect(address, file.device()).unwrap();
        assert_eq!(reason(&client), "PEER_SPOKE_FIRST");
        assert_eq!(recv(&client, 9), b"220 ready");
        client.close();
    });
}
