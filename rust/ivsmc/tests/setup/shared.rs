//! Both ends speak ivsmc.

use std::time::Duration;

use ivsmc::{ConnectOptions, Error, ListenOptions, Plain, Require, Timeout};
use ivsmc_shm::poll::{self, PollFd};

use super::peers::*;

const MIB: u64 = 1 << 20;

#[test]
fn both_ends_get_shared_memory() {
    let file = RegionFile::new(16 * MIB);
    let listener = listen(file.device());
    let address = listener.local_addr();
    let client = std::thread::spawn({
        let device = file.device();
        move || connect(address, device).unwrap()
    });
    let (server, peer) = listener.accept(LONG, &Plain).unwrap();
    let client = client.join().unwrap();
    assert_eq!((reason(&client), reason(&server)), ("none", "none"));
    assert_eq!(client.local_addr().unwrap(), peer);
    exercise(client, server);
    assert_eq!(listener.stats().unwrap().accepted_smc, 1);
}

#[test]
fn connect_then_accept_in_one_thread() {
    let file = RegionFile::new(16 * MIB);
    let listener = listen(file.device());
    for _ in 0..3 {
        let client = connect(listener.local_addr(), file.device()).unwrap();
        let server = accept(&listener);
        assert_eq!((reason(&client), reason(&server)), ("none", "none"));
        exercise(server, client);
    }
}

#[test]
fn a_wildcard_listener_is_found_by_every_name_of_loopback() {
    let file = RegionFile::new(16 * MIB);
    let options = ListenOptions { device: file.device(), ..Default::default() };
    let listener = listen_on("[::]:0", options).unwrap();
    let port = listener.local_addr().port();
    for ip in ["127.0.0.1", "127.0.1.1", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]"] {
        let client = connect(format!("{ip}:{port}").parse().unwrap(), file.device()).unwrap();
        let server = accept(&listener);
        assert_eq!((reason(&client), reason(&server)), ("none", "none"), "{ip}");
        exercise(client, server);
    }
}

#[test]
fn the_first_region_that_both_have_is_used() {
    let (one, two) = (RegionFile::new(16 * MIB), RegionFile::new(16 * MIB));
    let both = format!("{},{}", one.device().unwrap(), two.device().unwrap());
    let listener = listen(two.device());
    let client = connect(listener.local_addr(), Some(both)).unwrap();
    let server = accept(&listener);
    assert_eq!(client.stats().device, two.device());
    exercise(client, server);
}

#[test]
fn a_source_address_is_kept() {
    let file = RegionFile::new(16 * MIB);
    let listener = listen(file.device());
    let free = std::net::TcpListener::bind("127.0.0.3:0").unwrap().local_addr().unwrap();
    for source in ["127.0.0.2:0".parse().unwrap(), free] {
        let options = ConnectOptions { source: Some(source), ..options(file.device()) };
        let client = ivsmc::connect(listener.local_addr(), &options, &Plain).unwrap();
        let (server, peer) = listener.accept(LONG, &Plain).unwrap();
        assert_eq!(peer.ip(), source.ip());
        assert!(source.port() == 0 || peer.port() == source.port());
        assert_eq!((reason(&client), reason(&server)), ("none", "none"));
    }
}

#[test]
fn buffer_chooses_the_size_of_the_own_ring() {
    let file = RegionFile::new(64 * MIB);
    let listener = listen(file.device());
    let options = ConnectOptions { buffer: Some(20_000), ..options(file.device()) };
    let client = ivsmc::connect(listener.local_addr(), &options, &Plain).unwrap();
    let _server = accept(&listener);
    let stats = client.stats();
    assert_eq!((stats.receive_buffer, stats.send_buffer), (32 << 10, 256 << 10));
}

#[test]
fn a_full_region_falls_back() {
    let file = RegionFile::new(MIB);
    let listener = listen(file.device());
    let mut open = Vec::new();
    let full = (0..200).find_map(|_| {
        let client = connect(listener.local_addr(), file.device()).unwrap();
        let server = accept(&listener);
        let reasons = (reason(&client), reason(&server));
        if reasons == ("none", "none") {
            open.push((client, server));
            return None;
        }
        Some((client, server, reasons))
    });
    let (client, server, reasons) = full.expect("a region of 1 MiB fills up");
    assert_eq!(reasons, ("REGION_FULL", "REGION_FULL"));
    exercise(client, server);
    for (client, server) in open {
        exercise(client, server);
    }
    let client = connect(listener.local_addr(), file.device()).unwrap();
    let server = accept(&listener);
    assert_eq!((reason(&client), reason(&server)), ("none", "none"));
}

#[test]
fn ends_without_a_common_eid_fall_back() {
    let file = RegionFile::new(16 * MIB);
    let eid = |name: &str| Some(name.to_owned());
    let listener = listen_on(
        "127.0.0.1:0",
        ListenOptions { device: file.device(), eid: eid("BLUE,GREEN"), ..Default::default() },
    )
    .unwrap();
    for (eids, expected) in [("RED", "EID_MISMATCH"), ("RED,GREEN", "none")] {
        let options = ConnectOptions { eid: eid(eids), ..options(file.device()) };
        let client = ivsmc::connect(listener.local_addr(), &options, &Plain).unwrap();
        let server = accept(&listener);
        assert_eq!((reason(&client), reason(&server)), (expected, expected));
        exercise(client, server);
    }
    let options = ConnectOptions { eid: eid("a_b"), ..options(file.device()) };
    let wrong = ivsmc::connect(listener.local_addr(), &options, &Plain).err().unwrap();
    assert!(matches!(wrong, Error::ApiMisuse(_)), "{wrong}");
}

#[test]
fn what_is_required_is_not_fallen_back_from() {
    let file = RegionFile::new(16 * MIB);
    let listener = listen_on(
        "127.0.0.1:0",
        ListenOptions { device: file.device(), require: Require::Smc, ..Default::default() },
    )
    .unwrap();
    let plain = connect(listener.local_addr(), Some("none".into())).unwrap();
    assert_eq!(reason(&plain), "DISABLED");
    let refused = listener.accept(LONG, &Plain).err().unwrap();
    assert!(matches!(refused, Error::Required(_)), "{refused}");
    assert_eq!(recv(&plain, 1), b"");

    let required = |device| ConnectOptions { require: Require::Smc, ..options(device) };
    let client = ivsmc::connect(listener.local_addr(), &required(file.device()), &Plain).unwrap();
    exercise(client, accept(&listener));
    let other = RegionFile::new(MIB);
    let error = ivsmc::connect(listener.local_addr(), &required(other.device()), &Plain);
    let Err(Error::Required(fallback)) = error else { panic!("it fell back") };
    assert_eq!(fallback.reason.name(), "PEER_NO_SMC");
}

#[test]
fn many_clients_at_once() {
    let file = RegionFile::new(64 * MIB);
    let listener = listen(file.device());
    let address = listener.local_addr();
    std::thread::scope(|scope| {
        for n in 0..4_u8 {
            let device = file.device();
            scope.spawn(move || {
                for _ in 0..50 {
                    let client = connect(address, device.clone()).unwrap();
                    assert_eq!(reason(&client), "none");
                    send(&client, &[n]);
                    assert_eq!(recv(&client, 1), [n]);
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..100 {
                    let server = accept(&listener);
                    let bytes = recv(&server, 1);
                    send(&server, &bytes);
                    assert_eq!(recv(&server, 1), b"");
                }
            });
        }
    });
}

#[test]
fn a_client_that_closes_at_once_is_accepted_with_all_it_sent() {
    let file = RegionFile::new(16 * MIB);
    let listener = listen(file.device());
    for round in 0..300_u32 {
        let client = connect(listener.local_addr(), file.device()).unwrap();
        if round % 3 != 0 {
            send(&client, &round.to_le_bytes());
        }
        drop(client);
        let server = accept(&listener);
        assert_eq!(reason(&server), "none");
        let sent = if round % 3 == 0 { Vec::new() } else { round.to_le_bytes().to_vec() };
        assert_eq!(recv(&server, 4), sent);
        assert_eq!(recv(&server, 1), b"");
        // As on TCP, the first ones may go nowhere.
        let error = until("an error", || server.send(b"x", LONG, &Plain).err());
        assert!(matches!(error, Error::BrokenPipe), "{error}");
    }
    let region = file.peer().region;
    until("all DMBs", || (region.census().dmbs_held == 0).then_some(()));
}

#[test]
fn accept_keeps_its_timeout() {
    let listener = listen(RegionFile::new(MIB).device());
    let nothing = listener.accept(Timeout::NonBlocking, &Plain).err().unwrap();
    assert!(matches!(nothing, Error::WouldBlock), "{nothing}");
    let nothing = listener.accept(Timeout::After(Duration::from_millis(5)), &Plain).err().unwrap();
    assert!(matches!(nothing, Error::TimedOut), "{nothing}");
}

#[test]
fn closing_wakes_those_who_accept_and_frees_the_port() {
    let file = RegionFile::new(MIB);
    let listener = listen(file.device());
    let address = listener.local_addr();
    std::thread::scope(|scope| {
        let inside: Vec<_> =
            (0..2).map(|_| scope.spawn(|| listener.accept(Timeout::Never, &Plain))).collect();
        // Whether they are inside already or come later: they end.
        listener.close();
        for thread in inside {
            let error = thread.join().unwrap().err().unwrap();
            assert!(matches!(error, Error::Closed), "{error}");
        }
    });
    assert!(matches!(listener.fileno(), Err(Error::Closed)));
    std::net::TcpListener::bind(address).unwrap();
    let gone = connect(address, file.device()).err().unwrap();
    assert_eq!(gone.errno(), Some(111), "{gone}");
}

#[test]
fn fileno_is_readable_when_there_is_something_to_accept() {
    let file = RegionFile::new(16 * MIB);
    let listener = listen(file.device());
    let descriptor = listener.readiness().unwrap();
    let readable = |wait: Duration| {
        poll::poll(&mut [PollFd::new(&descriptor, poll::IN)], Some(wait)).unwrap() == 1
    };
    assert!(!readable(Duration::ZERO));
    for device in [file.device(), Some("none".into())] {
        let client = connect(listener.local_addr(), device).unwrap();
        let server = until("a connection", || {
            assert!(readable(Duration::from_secs(20)));
            match listener.accept(Timeout::NonBlocking, &Plain) {
                Err(Error::WouldBlock) => None,
                accepted => Some(accepted.unwrap().0),
            }
        });
        assert_eq!(client.is_smc(), server.is_smc());
        exercise(client, server);
        assert!(!readable(Duration::ZERO));
    }
}

#[test]
fn the_embedded_default_needs_nothing() {
    let directory = PrivateDirectory::new();
    std::env::set_var("IVSMC_LOCAL_DIR", directory.path());
    std::env::set_var("IVSMC_LOCAL_SIZE", "16777216");
    let listener = listen(Some("local".into()));
    let client = connect(listener.local_addr(), Some("local".into())).unwrap();
    let server = accept(&listener);
    assert_eq!((reason(&client), reason(&server)), ("none", "none"));
    assert_eq!(client.stats().device.as_deref(), Some("local"));
    exercise(client, server);
}
