//! The ivshmem server, with real clients on its socket.

mod client;
mod process;
mod restart;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use ivsmc::server::{Backing, Event, IdOrder, Server, ServerOptions};
use ivsmc::{Error, Plain, Timeout};
use ivsmc_proto::slot::SlotState;
use ivsmc_shm::poll::EventFd;
use ivsmc_shm::{file, lock, net};

use client::{reopened, Client, Scratch, Served, MIB};

#[test]
fn messages_come_in_the_order_of_qemus_specification() {
    let scratch = Scratch::new();
    let served = Served::start(ServerOptions { vectors: 2, ..scratch.options() });
    let path = served.server.path().to_owned();

    let mut first = Client::connect(&path);
    let welcome: Vec<_> = (0..5).map(|_| first.read()).collect();
    assert_eq!(welcome, [(0, false), (0, false), (-1, true), (0, true), (0, true)]);

    let mut second = Client::connect(&path);
    let welcome: Vec<_> = (0..7).map(|_| second.read()).collect();
    let expected = [(0, false), (1, false), (-1, true), (0, true), (0, true), (1, true), (1, true)];
    assert_eq!(welcome, expected);
    assert_eq!([first.read(), first.read()], [(1, true), (1, true)]);

    let third = Client::join(&path, 2);
    assert_eq!(third.peers.keys().copied().collect::<Vec<_>>(), [0, 1]);
    assert_eq!([first.read(), first.read()], [(2, true), (2, true)]);
    assert_eq!([second.read(), second.read()], [(2, true), (2, true)]);

    // Of who leaves, and of who gets its id and its eventfds, nothing is said.
    drop(second);
    served.wait_for_clients(2);
    let fourth = Client::join(&path, 2);
    assert_eq!(fourth.id, 1);
    assert_eq!(first.read_ready(), 0);
    first.peers[&1][1].notify_shared().unwrap();
    assert_eq!(fourth.own[1].drain().unwrap(), 1);
    assert!(matches!(served.event(), Event::Joined { id: 0, pid: Some(pid), .. }
        if u32::try_from(pid) == Ok(std::process::id())));
}

#[test]
fn eventfds_lead_to_their_vector() {
    let scratch = Scratch::new();
    let served = Served::start(ServerOptions { vectors: 3, ..scratch.options() });
    let mut first = Client::join(served.server.path(), 3);
    let second = Client::join(served.server.path(), 3);
    first.read_until_peers(1, 3);
    first.peers[&1][2].notify().unwrap();
    second.peers[&0][1].notify().unwrap();
    let counts = |client: &Client| -> Vec<u64> {
        client.own.iter().map(|vector| vector.drain().unwrap()).collect()
    };
    assert_eq!(counts(&first), [0, 1, 0]);
    assert_eq!(counts(&second), [0, 0, 1]);
}

#[test]
fn the_region_is_sealed_reserved_formatted_and_marked() {
    let scratch = Scratch::new();
    let served = Served::start(scratch.options());
    let client = Client::join(served.server.path(), 1);
    let fd = client.region.as_ref().unwrap();
    let status = file::status(fd).unwrap();
    assert_eq!(status.size, MIB);
    assert!(status.reserved >= MIB, "{} bytes reserved", status.reserved);
    assert!(file::is_sealed_against_shrinking(fd));
    assert!(file::set_size(fd, MIB - 4096).is_err());
    assert!(file::set_size(fd, MIB + 4096).is_err());

    let region = client.attach();
    let status = served.server.status().unwrap();
    assert_eq!((region.uuid(), region.geometry().size()), (status.uuid, status.size));
    assert!(region.marking_server().is_some());
    let at = region.marking_server_offset();
    assert!(lock::is_locked_by_other(reopened(fd), at).unwrap());
    // Also through the open file that the server handed out: it is not the one with the lock.
    assert!(lock::is_locked_by_other(fd, at).unwrap());

    let server = served.stop();
    assert!(region.marking_server().is_some());
    drop(server);
    assert_eq!(region.marking_server(), None);
    assert!(!lock::is_locked_by_other(fd, at).unwrap());
}

#[test]
fn a_leaver_is_marked_before_anybody_hears_of_it() {
    let scratch = Scratch::new();
    let served = Served::start(scratch.options());
    let mut witness = Client::join(served.server.path(), 1);
    let region = witness.attach();
    let own = witness.claim(&region);
    for round in 1..=20 {
        let leaver = Client::join(served.server.path(), 1);
        witness.read_until_peers(1, 1);
        // The same each time: the one before was marked.
        assert_eq!(leaver.id, 1);
        let slots = [leaver.claim(&region), leaver.claim(&region)];
        assert!(region.claim_extent(slots[0]).is_some());
        drop(leaver);
        served.wait_for_clients(1);
        for slot in slots {
            assert!(!region.is_live(slot));
            let state = region.slot_state(slot.index);
            assert!(matches!(state, SlotState::Free { .. }), "round {round}: {state:?}");
        }
        assert!((0..region.geometry().extents()).all(|index| region.extent_owner(index).is_none()));
        // The witness itself is not harmed, and is rung to look.
        assert!(region.is_live(own));
        while witness.own[0].drain().unwrap() == 0 {
            std::thread::yield_now();
        }
    }
    drop(served.server.status());
    let events: Vec<_> = served.past_events().collect();
    let left = events.iter().filter(|event| matches!(event, Event::Left { id: 1, slots: 2 }));
    assert!(left.count() >= 19, "{events:?}");
}

#[test]
fn who_left_by_itself_rings_nobody() {
    let scratch = Scratch::new();
    let served = Served::start(scratch.options());
    let mut witness = Client::join(served.server.path(), 1);
    drop(Client::join(served.server.path(), 1));
    witness.read_until_peers(1, 1);
    served.wait_for_clients(1);
    drop(served);
    assert_eq!(witness.own[0].drain().unwrap(), 0);
}

#[test]
fn who_comes_and_goes_before_it_is_taken_in_leaves_its_id_to_the_next() {
    let scratch = Scratch::new();
    let server = Server::new(scratch.options()).unwrap();
    // All wait when it begins to serve; none but the last does when it is taken in.
    (0..5).for_each(|_| drop(Client::connect(server.path())));
    let mut last = Client::connect(server.path());
    // What there is to do is more than one newcomer.
    server.serve_for(Timeout::NonBlocking, &Plain, |_| ()).unwrap();
    assert_eq!(server.status().unwrap().joined, 6);
    let _served = Served::run(Arc::new(server));
    last.read_until(|client| client.own.len() == 1);
    assert_eq!(last.id, 0);
}

#[test]
fn rolling_ids_rest_as_long_as_they_can() {
    let scratch = Scratch::new();
    let served = Served::start(ServerOptions { ids: IdOrder::Rolling, ..scratch.options() });
    for round in 0..3 {
        for id in 0..64 {
            assert_eq!(join(&served).id, id, "{round}");
            served.wait_for_clients(0);
        }
    }
}

#[test]
fn many_that_come_and_go_beside_one_that_stays_use_up_no_ids() {
    const JOINS: usize = 3_000;
    let scratch = Scratch::new();
    let backing = Backing::File { path: scratch.path("region"), size: Some(MIB) };
    let served = Served::start(ServerOptions { backing, ..scratch.options() });
    let mut resident = join(&served);
    let region = resident.attach();
    let open_files = || fs::read_dir("/proc/self/fd").unwrap().count();
    let mut before = 0;
    for round in 0..JOINS {
        let (one, other) = (join(&served), join(&served));
        assert_eq!((one.id, other.id), (1, 2), "{round}");
        if round == 0 {
            resident.read_until_peers(2, 1);
            before = open_files();
        }
        // What the resident has been told once leads to whoever has the id now, with nothing left
        // over from who had it before.
        assert_eq!((one.own[0].drain().unwrap(), other.own[0].drain().unwrap()), (0, 0));
        resident.peers[&2][0].notify_shared().unwrap();
        assert_eq!(other.own[0].drain().unwrap(), 1);
        resident.peers[&1][0].notify_shared().unwrap();
        drop((one, other));
        served.wait_for_clients(1);
    }
    assert_eq!(region.ids_given(), 3);
    // Neither messages nor descriptors.
    assert_eq!(resident.read_ready(), 0);
    let after = open_files();
    // Other tests of this process open and close some.
    assert!(after < before + JOINS / 2, "{before} open files, then {after}");
    let newcomer = join(&served);
    assert_eq!(newcomer.peers.keys().copied().collect::<Vec<_>>(), [0]);
}

#[test]
fn a_file_that_nobody_has_any_more_is_served_from_the_first_id_on() {
    let scratch = Scratch::new();
    let backing = Backing::File { path: scratch.path("region"), size: Some(MIB) };
    let serve = || Served::start(ServerOptions { backing: backing.clone(), ..scratch.options() });
    let served = serve();
    let guest = join(&served);
    let region = guest.attach();
    let slot = guest.claim(&region);
    // As if others had been there before, whose end nobody has seen.
    region.set_ids_given(1 << 16);
    drop(served);

    // A mapping without a descriptor is enough; so is a descriptor.
    let Client { region: fd, socket, .. } = guest;
    drop(socket);
    let is_refused = || {
        let served = serve();
        let refused = Client::connect(served.server.path());
        assert!(refused.raw(0).unwrap().is_none());
        let Event::Refused { reason } = served.event() else { panic!("not refused") };
        assert!(reason.contains("stop whatever has the file"), "{reason}");
        assert_eq!(served.server.status().unwrap().held_ids, [0]);
    };
    is_refused();
    assert!(region.is_live(slot));
    drop(region);
    is_refused();
    drop(fd);

    let served = serve();
    assert_eq!(served.server.status().unwrap().held_ids, []);
    let first = join(&served);
    let region = first.attach();
    assert_eq!((first.id, region.ids_given()), (0, 1));
    assert!(!region.is_live(slot));
}

/// Clears `O_NONBLOCK` and fills the counter: who writes to it next waits for ever.
fn spoil(eventfd: &EventFd) {
    net::set_nonblocking(eventfd, false).unwrap();
    let fd = eventfd.as_fd().try_clone_to_owned().unwrap();
    assert_eq!(fs::File::from(fd).write(&(u64::MAX - 1).to_ne_bytes()).unwrap(), 8);
}

#[test]
fn who_fills_an_eventfd_and_makes_it_wait_holds_up_nobody() {
    let scratch = Scratch::new();
    let served = Served::start(scratch.options());
    let mut hostile = join(&served);
    let mut healthy = join(&served);
    let region = healthy.attach();
    hostile.read_until_peers(1, 1);
    for round in 0..20 {
        // Its own one, and that of another.
        for eventfd in [&hostile.own[0], &hostile.peers[&1][0]] {
            net::set_nonblocking(eventfd, false).unwrap();
            eventfd.drain().unwrap();
            spoil(eventfd);
        }
        let leaver = join(&served);
        let slot = leaver.claim(&region);
        drop(leaver);
        served.wait_for_clients(2);
        assert!(!region.is_live(slot), "{round}");
        assert!(healthy.own[0].drain().unwrap() >= u64::MAX - 1);
        // Nothing is there, and it does not wait for something.
        assert_eq!(healthy.own[0].drain().unwrap(), 0);
    }
    // Who gets the id next has none of it.
    drop(hostile);
    served.wait_for_clients(1);
    let next = join(&served);
    assert_eq!((next.id, next.own[0].drain().unwrap()), (0, 0));
    healthy.read_until_peers(2, 1);
}

#[test]
fn an_id_that_a_slot_names_is_not_given_out() {
    let scratch = Scratch::new();
    let backing = Backing::File { path: scratch.path("region"), size: Some(MIB) };
    let serve = || Served::start(ServerOptions { backing: backing.clone(), ..scratch.options() });
    let served = serve();
    let uuid = served.server.status().unwrap().uuid;
    let guest = Client::join(served.server.path(), 1);
    let region = guest.attach();
    let slot = guest.claim(&region);
    // The server ends; the guest lives on, and nobody can tell any more when it dies.
    drop(served);
    drop(guest);

    let served = serve();
    let status = served.server.status().unwrap();
    assert_eq!((status.uuid, status.held_ids), (uuid, vec![0]));
    assert_eq!(Client::join(served.server.path(), 1).id, 1);
    while !served.server.status().unwrap().clients.is_empty() {
        std::thread::yield_now();
    }
    assert!(region.is_live(slot));
    // An operator says that the slot is dead. Its machine may live all the same, and claim another.
    assert!(region.mark_dead(slot));
    region.reclaim(slot);
    assert_eq!(Client::join(served.server.path(), 1).id, 1);
}

#[test]
fn an_id_is_not_given_again_by_the_next_server_while_its_holder_may_live() {
    let scratch = Scratch::new();
    let backing = Backing::File { path: scratch.path("region"), size: Some(MIB) };
    let serve = || Served::start(ServerOptions { backing: backing.clone(), ..scratch.options() });
    let served = serve();
    let region = Client::join(served.server.path(), 1).attach();
    drop(Client::join(served.server.path(), 1));
    while region.ids_given() > 0 {
        std::thread::yield_now();
    }
    drop(served);
    // All were seen to leave: ids begin anew.
    let served = serve();
    let (first, second) = (join(&served), join(&served));
    assert_eq!((first.id, second.id, region.ids_given()), (0, 1, 2));
    drop(served);

    // Two machines live on without an ivshmem server, and have not claimed a slot yet.
    let served = serve();
    let third = join(&served);
    assert_eq!((third.id, region.ids_given()), (2, 3));
    drop(third);
    while region.ids_given() > 2 {
        std::thread::yield_now();
    }
    assert_eq!(join(&served).id, 2);
}

fn join(served: &Served) -> Client {
    Client::join(served.server.path(), 1)
}

#[test]
fn a_client_that_never_reads_is_only_behind() {
    let scratch = Scratch::new();
    let served = Served::start(ServerOptions { vectors: 2, ..scratch.options() });
    let path = served.server.path().to_owned();
    // One never reads a thing, one stops after its welcome, one is healthy.
    let mut mute = Client::connect(&path);
    assert!(matches!(served.event(), Event::Joined { id: 0, .. }));
    let mut stopped = Client::join(&path, 2);
    let mut healthy = Client::join(&path, 2);
    for _ in 0..100 {
        let others: Vec<_> = (0..3).map(|_| Client::join(&path, 2)).collect();
        healthy.read_until_peers(5, 2);
        drop(others);
        served.wait_for_clients(3);
    }
    let staying: Vec<_> = (0..2).map(|_| Client::join(&path, 2)).collect();
    assert_eq!(healthy.read_ready(), 0);

    // While it does not serve, what it has sent is all there is.
    let server = served.stop();
    let status = server.status().unwrap();
    assert_eq!((status.clients.len(), status.joined, status.left), (5, 305, 300));
    for client in &status.clients {
        assert!(client.behind <= 20, "{client:?}");
    }
    assert!((1..=4).contains(&mute.read_ready()));
    assert!((1..=4).contains(&stopped.read_ready()));

    // Now they read, and get to know exactly who is there.
    let _served = Served::run(server);
    let everybody: BTreeSet<u16> = status.clients.iter().map(|client| client.id).collect();
    assert!(staying.iter().all(|client| everybody.contains(&client.id)));
    for client in [&mut mute, &mut stopped] {
        client.read_until(|client| {
            let others = client.peers.keys().chain([&client.id]).copied().collect::<BTreeSet<_>>();
            others == everybody
                && client.own.len() == 2
                && client.peers.values().all(|all| all.len() == 2)
        });
    }
}

#[test]
fn what_a_client_sends_harms_nobody() {
    let scratch = Scratch::new();
    let served = Served::start(scratch.options());
    let mut noisy = Client::join(served.server.path(), 1);
    noisy.socket.set_nonblocking(true).unwrap();
    while noisy.socket.write(&[0xff; 4096]).is_ok() {}
    noisy.socket.set_nonblocking(false).unwrap();
    // It is a member still, and its end is seen.
    let mut other = Client::join(served.server.path(), 1);
    noisy.read_until_peers(1, 1);
    drop(noisy);
    served.wait_for_clients(1);
    assert_eq!(other.read_ready(), 0);
}

#[test]
fn more_than_max_clients_are_turned_away() {
    let scratch = Scratch::new();
    let served = Served::start(ServerOptions { max_clients: 1, ..scratch.options() });
    let first = Client::join(served.server.path(), 1);
    assert!(matches!(served.event(), Event::Joined { .. }));
    let second = Client::connect(served.server.path());
    assert!(second.raw(0).unwrap().is_none());
    let Event::Refused { reason } = served.event() else { panic!("not refused") };
    assert!(reason.contains("max_clients"), "{reason}");
    drop(first);
    assert!(matches!(served.event(), Event::Left { id: 0, .. }));
    Client::join(served.server.path(), 1);
}

fn reason(result: ivsmc::Result<Server>) -> String {
    match result {
        Err(error @ (Error::Device { .. } | Error::Region { .. } | Error::ApiMisuse(_))) => {
            error.to_string()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_live_socket_is_never_replaced() {
    let scratch = Scratch::new();
    let served = Served::start(scratch.options());
    let text = reason(Server::new(scratch.options()));
    assert!(text.contains("a server is listening there already"), "{text}");
    Client::join(served.server.path(), 1);

    // Somebody else's, that does not accept.
    let path = scratch.path("other.sock");
    let other = UnixListener::bind(&path).unwrap();
    let at_other = ServerOptions { path: path.clone(), ..scratch.options() };
    let text = reason(Server::new(at_other.clone()));
    assert!(text.contains("a server is listening there already"), "{text}");
    drop(other);
    // Now it is a dead one's.
    drop(Server::new(at_other).unwrap());
    assert_eq!(scratch.names(), BTreeSet::from(["ivs.sock".to_owned()]));
}

#[test]
fn of_many_servers_that_start_at_once_one_listens() {
    let scratch = Scratch::new();
    for _ in 0..20 {
        // What a dead server leaves.
        drop(UnixListener::bind(scratch.path("ivs.sock")).unwrap());
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let options = scratch.options();
                std::thread::spawn(move || Server::new(options))
            })
            .collect();
        let made: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        let mut listening: Vec<_> = made.into_iter().filter_map(Result::ok).collect();
        assert_eq!(listening.len(), 1);
        let served = Served::run(Arc::new(listening.remove(0)));
        Client::join(served.server.path(), 1);
        drop(served);
        drop(listening);
        assert!(scratch.names().is_empty(), "{:?}", scratch.names());
    }
}

#[test]
fn the_socket_has_the_group_asked_for() {
    let scratch = Scratch::new();
    let own = fs::metadata("/proc/self").unwrap().gid();
    // Only root gives files to any group.
    let group = if fs::metadata("/proc/self").unwrap().uid() == 0 { own + 1 } else { own };
    let options = ServerOptions { group: Some(group), mode: 0o660, ..scratch.options() };
    let server = Server::new(options).unwrap();
    assert_eq!(fs::metadata(server.path()).unwrap().gid(), group);
    drop(server);
    let server = Server::new(scratch.options()).unwrap();
    assert_eq!(fs::metadata(server.path()).unwrap().gid(), own);
}

#[test]
fn the_socket_has_the_mode_asked_for() {
    let scratch = Scratch::new();
    for mode in [0o600, 0o660, 0o666] {
        let server = Server::new(ServerOptions { mode, ..scratch.options() }).unwrap();
        let found = fs::metadata(server.path()).unwrap().permissions().mode();
        assert_eq!(found & 0o7777, mode);
    }
    assert!(scratch.names().is_empty());
}

#[test]
fn one_file_has_one_server() {
    let scratch = Scratch::new();
    let made = Backing::File { path: scratch.path("region"), size: Some(MIB) };
    let first = Server::new(ServerOptions { backing: made, ..scratch.options() }).unwrap();
    let second = ServerOptions {
        backing: Backing::File { path: scratch.path("region"), size: None },
        ..ServerOptions::new(scratch.path("second.sock"))
    };
    let text = reason(Server::new(second.clone()));
    assert!(text.contains("another ivshmem server hands it out already"), "{text}");
    assert!(!scratch.names().contains("second.sock"));
    drop(first);
    drop(Server::new(second).unwrap());
    assert_eq!(scratch.names(), BTreeSet::from(["region".to_owned()]));
}

#[test]
fn refuses_in_words_what_cannot_be() {
    let scratch = Scratch::new();
    fs::write(scratch.path("text"), "x".repeat(1 << 20)).unwrap();
    fs::write(scratch.path("odd"), "x".repeat(3 << 19)).unwrap();
    std::os::unix::fs::symlink(scratch.path("text"), scratch.path("link")).unwrap();
    let before = scratch.names();
    let with = |change: &dyn Fn(&mut ServerOptions)| {
        let mut options = scratch.options();
        change(&mut options);
        reason(Server::new(options))
    };
    let file = |name: &str, size: Option<u64>| {
        let path = scratch.path(name);
        with(&|options| options.backing = Backing::File { path: path.clone(), size })
    };
    let cases = [
        (with(&|options| options.path = scratch.path("text")), "not a socket"),
        (with(&|options| options.path = scratch.path("no/where")), "its directory does not exist"),
        (with(&|options| options.path = scratch.path(&"x".repeat(120))), "107 bytes"),
        (with(&|options| options.vectors = 0), "vectors=0"),
        (with(&|options| options.vectors = 257), "vectors=257"),
        (with(&|options| options.mode = 0o4755), "permissions"),
        (with(&|options| options.max_clients = 0), "max_clients=0"),
        (with(&|options| options.backing = Backing::Memfd { size: 3 * MIB }), "take 4 MiB"),
        (with(&|options| options.backing = Backing::Memfd { size: 1 }), "take 1 MiB"),
        (with(&|options| options.backing = Backing::Memfd { size: 1 << 50 }), "take 33554432 MiB"),
        (file("text", None), "not an ivsmc region"),
        (file("text", Some(2 * MIB)), "it has 1048576 bytes, not 2097152"),
        (file("odd", None), "take 2 MiB"),
        (file("link", None), "cannot open it"),
        (file("new", None), "give a size"),
        (file("new", Some(5)), "take 1 MiB"),
        (file("no/where", Some(MIB)), "its directory does not exist"),
        (file(".", None), "cannot open it"),
    ];
    for (text, part) in cases {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
    // Nothing is left behind.
    assert_eq!(scratch.names(), before);
}

#[test]
fn serving_is_for_one_thread_and_ends_when_told() {
    let scratch = Scratch::new();
    let server = Arc::new(Server::new(scratch.options()).unwrap());
    // Told before it began.
    server.handle().stop();
    server.serve(&Plain, |_| {}).unwrap();

    let served = Served::run(Arc::clone(&server));
    let client = Client::join(server.path(), 1);
    let second = server.serve(&Plain, |_| {});
    assert!(matches!(second, Err(Error::ApiMisuse(_))), "{second:?}");
    // The client stays through a break.
    drop(served);
    let _served = Served::run(Arc::clone(&server));
    let other = Client::join(server.path(), 1);
    assert_eq!((client.id, other.id), (0, 1));
}

#[test]
fn serving_for_a_time_does_what_there_is_to_do() {
    let scratch = Scratch::new();
    let server = Server::new(scratch.options()).unwrap();
    let _waiting = Client::connect(server.path());
    let mut joined = 0;
    for time in [Timeout::NonBlocking, Timeout::After(Duration::from_millis(1))] {
        server.serve_for(time, &Plain, |_| joined += 1).unwrap();
    }
    assert_eq!(joined, 1);
}
