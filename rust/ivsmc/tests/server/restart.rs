//! An ivshmem server that ends, and one that goes on with what a holder kept.
//!
//! The holder is a datagram socket of the test: what systemd's manager, or `ivsmc server --state`,
//! does with what comes there is little more. Ends between any two steps are tested where those are
//! (`server/ledger.rs`), and with SIGKILL in `tests/test_restart.py`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use ivsmc::server::{Backing, Event, Holder, Server, ServerOptions};
use ivsmc_shm::fd::Fd;
use ivsmc_shm::{file, lock, net};

use crate::client::{reopened, Client, Scratch, Served, MIB};

type Kept = BTreeMap<String, Fd>;

/// Keeps descriptors as the notify protocol says.
struct Keeper {
    name: OsString,
    kept: Arc<Mutex<Kept>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    fn new() -> Keeper {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ivsmc-keeper-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        let kept = Arc::new(Mutex::new(Kept::new()));
        let of_thread = Arc::clone(&kept);
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; 256];
            loop {
                let (length, passed) = net::recv_with_fd(&socket, &mut bytes, 0).unwrap();
                let text = std::str::from_utf8(&bytes[..length]).unwrap();
                let lines: Vec<_> = text.lines().collect();
                let mut kept = of_thread.lock().unwrap();
                let name = |line: &str| line.strip_prefix("FDNAME=").unwrap().to_owned();
                match (lines[..].split_first(), passed.one()) {
                    (Some((&"FDSTORE=1", ["FDPOLL=0", line])), Some(fd)) => {
                        assert!(kept.insert(name(line), fd).is_none(), "{line} twice");
                    }
                    (Some((&"FDSTOREREMOVE=1", [line])), None) => {
                        assert!(kept.remove(&name(line)).is_some(), "{line}");
                    }
                    (Some((&"READY=1" | &"STOPPING=1", [])), None) => {}
                    (Some((&"BARRIER=1", [])), Some(_)) => {}
                    (Some((&"end", [])), None) => return,
                    other => panic!("{other:?}"),
                }
            }
        });
        Keeper { name: format!("@{name}").into(), kept, thread: Some(thread) }
    }

    /// Waits until all that was said has been heard.
    fn hear(&self) {
        let (ours, theirs) = net::socketpair_stream().unwrap();
        self.tell(b"BARRIER=1", Some(theirs.as_fd())).unwrap();
        drop(theirs);
        assert_eq!(net::recv_bytes(&ours, &mut [0], 0).unwrap(), 0);
    }

    /// Says something to it, when there is room.
    fn tell(&self, text: &[u8], passed: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let socket = net::unix_datagram_to(&self.name)?;
        loop {
            match net::send_with_fd(&socket, text, passed) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                sent => return sent.map(drop),
            }
        }
    }

    fn names(&self) -> Vec<String> {
        self.hear();
        self.kept.lock().unwrap().keys().cloned().collect()
    }

    /// What is kept, as a new process is given it.
    fn holder(&self) -> Holder {
        self.hear();
        let kept = self.kept.lock().unwrap();
        let copies = kept.iter().map(|(name, fd)| (name.as_str(), fd.try_clone().unwrap()));
        Holder::at(&self.name).unwrap().holding(copies)
    }

    fn start(&self, options: ServerOptions) -> Served {
        Served::run(Arc::new(Server::held_by(options, self.holder()).unwrap()))
    }

    fn forget(&self, name: &str) {
        self.hear();
        assert!(self.kept.lock().unwrap().remove(name).is_some());
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // It has ended if it was told nonsense.
        let _ = self.tell(b"end", None);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

/// Ends it as a kill would: nothing is done on the way.
fn end(served: Served) {
    assert!(served.stop().leave_to_holder());
}

fn options(scratch: &Scratch) -> ServerOptions {
    ServerOptions { vectors: 2, ..scratch.options() }
}

#[test]
fn everything_is_as_before_and_newcomers_are_told_to_the_old_ones() {
    let (scratch, keeper) = (Scratch::new(), Keeper::new());
    let mut served = keeper.start(options(&scratch));
    let path = served.server.path().to_owned();
    let uuid = served.server.status().unwrap().uuid;
    let mut first = Client::join(&path, 2);
    let mut second = Client::join(&path, 2);
    first.read_until_peers(1, 2);
    let region = first.attach();
    let (instance, slot) = (region.marking_server(), first.claim(&region));
    let lock = reopened(first.region.as_ref().unwrap());
    for round in 0..5 {
        end(served);
        // Nobody sees a thing, and who is to mark the dead still stands there.
        assert_eq!((first.read_ready(), second.read_ready()), (0, 0));
        assert_eq!(region.marking_server(), instance);
        assert!(lock::is_locked_by_other(&lock, region.marking_server_offset()).unwrap());
        second.peers[&0][1].notify_shared().unwrap();
        assert_eq!(first.own[1].drain().unwrap(), 1);

        // Who comes now waits for the next one.
        let mut newcomer = Client::connect(&path);
        served = keeper.start(options(&scratch));
        assert_eq!(served.event(), Event::Resumed { clients: 2 });
        newcomer.read_until(|client| client.own.len() == 2 && client.peers.len() == 2);
        assert_eq!(newcomer.id, 2);
        for (client, other) in [(&mut first, 1), (&mut second, 0)] {
            // An id is told once.
            client.read_until(|client| client.peers.get(&2).is_some_and(|all| all.len() == 2));
            assert_eq!(client.read_ready(), 0, "{round}");
            client.peers[&2][1].notify_shared().unwrap();
            newcomer.peers[&other][1].notify_shared().unwrap();
            assert_eq!(newcomer.own[1].drain().unwrap(), 1);
        }
        assert_eq!((first.own[1].drain().unwrap(), second.own[1].drain().unwrap()), (1, 1));
        let status = served.server.status().unwrap();
        assert_eq!((status.uuid, status.held_ids), (uuid, vec![]));
        assert_eq!(status.clients[0].pid, i32::try_from(std::process::id()).ok());
        drop(newcomer);
        served.wait_for_clients(2);
        assert!(region.is_live(slot));
    }
    assert_eq!(region.ids_given(), 3);
    // A proper end leaves nothing to anybody.
    drop(served);
    assert!(keeper.names().is_empty(), "{:?}", keeper.names());
    assert_eq!(region.marking_server(), None);
    assert!(!lock::is_locked_by_other(&lock, region.marking_server_offset()).unwrap());
    assert!(!path.exists());
    assert!(first.raw(0).unwrap().is_none());
}

#[test]
fn who_dies_meanwhile_is_marked_before_its_id_is_given() {
    let (scratch, keeper) = (Scratch::new(), Keeper::new());
    let served = keeper.start(options(&scratch));
    let path = served.server.path().to_owned();
    let mut witness = Client::join(&path, 2);
    let victim = Client::join(&path, 2);
    witness.read_until_peers(1, 2);
    let region = witness.attach();
    let slot = victim.claim(&region);
    assert!(region.claim_extent(slot).is_some());
    end(served);
    drop(victim);
    let waiting = Client::connect(&path);
    assert!(region.is_live(slot));
    // Before it serves.
    let server = Arc::new(Server::held_by(options(&scratch), keeper.holder()).unwrap());
    assert!(!region.is_live(slot));
    assert!((0..region.geometry().extents()).all(|index| region.extent_owner(index).is_none()));
    assert_eq!(witness.own[0].drain().unwrap(), 1);
    let served = Served::run(server);
    assert_eq!(served.event(), Event::Resumed { clients: 2 });
    assert_eq!(served.event(), Event::Left { id: 1, slots: 1 });
    let mut waiting = waiting;
    waiting.read_until(|client| client.own.len() == 2);
    assert_eq!((waiting.id, witness.read_ready()), (1, 0));
    // One that was marked, but not taken out, when the one before was killed.
    let slot = waiting.claim(&region);
    end(served);
    drop(waiting);
    region.mark_dead(slot);
    region.reclaim(slot);
    let served = keeper.start(options(&scratch));
    assert_eq!(witness.own[0].drain().unwrap(), 1);
    let joined = Client::join(served.server.path(), 2);
    assert_eq!(joined.id, 1);
}

#[test]
fn a_connection_that_was_not_kept_costs_its_id_and_nothing_else() {
    let (scratch, keeper) = (Scratch::new(), Keeper::new());
    let served = keeper.start(options(&scratch));
    let path = served.server.path().to_owned();
    let (lost, mut kept) = (Client::join(&path, 2), Client::join(&path, 2));
    let region = lost.attach();
    // It has not claimed a slot yet.
    end(served);
    keeper.forget("ivsmc-client-1");
    keeper.forget("ivsmc-vector-1-0");
    for _ in 0..2 {
        let served = keeper.start(options(&scratch));
        let newcomer = Client::join(&path, 2);
        assert_eq!(newcomer.id, 2);
        assert_eq!(served.server.status().unwrap().held_ids, [0]);
        kept.read_until(|client| client.peers.get(&2).is_some_and(|all| all.len() == 2));
        // Of the eventfd that was not kept there is another one.
        assert_eq!(newcomer.peers[&1].len(), 2);
        newcomer.peers[&1][1].notify_shared().unwrap();
        assert!(kept.own[1].drain().unwrap() > 0);
        drop(newcomer);
        served.wait_for_clients(1);
        let events: Vec<_> = served.past_events().collect();
        assert!(events.contains(&Event::Lost { id: 0 }), "{events:?}");
        end(served);
    }
    drop(kept);
    let served = keeper.start(options(&scratch));
    served.wait_for_clients(0);
    assert_eq!(region.ids_given(), 3, "one of them may live");
}

#[test]
fn whoever_comes_after_a_lost_client_is_not_taken_for_it() {
    let (scratch, keeper) = (Scratch::new(), Keeper::new());
    let served = keeper.start(options(&scratch));
    let path = served.server.path().to_owned();
    let (_kept, _lost) = (Client::join(&path, 2), Client::join(&path, 2));
    end(served);
    // The last that came: of no other client is a later serial known.
    keeper.forget("ivsmc-client-2");
    let served = keeper.start(options(&scratch));
    let mut newcomer = Client::join(&path, 2);
    assert_eq!(newcomer.id, 2);
    end(served);
    let served = keeper.start(options(&scratch));
    let status = served.server.status().unwrap();
    let ids: Vec<u16> = status.clients.iter().map(|client| client.id).collect();
    assert_eq!((ids, status.held_ids), (vec![0, 2], vec![1]));
    assert_eq!(newcomer.read_ready(), 0);
}

#[test]
fn what_a_kill_left_half_done_is_done_or_undone() {
    let (scratch, keeper) = (Scratch::new(), Keeper::new());
    let served = keeper.start(options(&scratch));
    let path = served.server.path().to_owned();
    let mut first = Client::join(&path, 2);
    end(served);
    // Killed after the connection was kept, and one eventfd of its id.
    let (near, far) = net::socketpair_stream().unwrap();
    let mut ours = Client::over(UnixStream::from(near.into_owned().unwrap()));
    {
        let mut kept = keeper.kept.lock().unwrap();
        kept.insert("ivsmc-client-7".into(), far);
        let eventfd = ivsmc_shm::poll::EventFd::new().unwrap();
        kept.insert("ivsmc-vector-1-1".into(), eventfd.into_fd());
        // Killed after its entry was taken out, before its connection was no longer kept.
        let (gone, _) = net::socketpair_stream().unwrap();
        kept.insert("ivsmc-client-6".into(), gone);
    }
    let served = keeper.start(options(&scratch));
    ours.read_until(|client| client.own.len() == 2);
    assert_eq!((ours.id, ours.peers.len()), (1, 1));
    first.read_until_peers(1, 2);
    first.peers[&1][1].notify_shared().unwrap();
    assert_eq!(ours.own[1].drain().unwrap(), 1);
    served.wait_for_clients(2);
    let expected = ["client-1", "client-7", "ledger", "listener", "memory"];
    let names = keeper.names();
    let others = names.iter().filter(|name| !name.contains("vector"));
    assert!(others.eq(expected.map(|name| format!("ivsmc-{name}")).iter()), "{names:?}");
    assert_eq!(names.len(), 9, "{names:?}");
}

#[test]
fn a_first_start_that_was_killed_is_made_anew() {
    let (scratch, keeper) = (Scratch::new(), Keeper::new());
    let served = keeper.start(options(&scratch));
    let uuid = served.server.status().unwrap().uuid;
    end(served);
    // The listener was not kept yet: nobody can have come.
    keeper.forget("ivsmc-listener");
    let served = keeper.start(options(&scratch));
    assert_eq!(served.server.status().unwrap().uuid, uuid);
    Client::join(served.server.path(), 2);
    served.wait_for_clients(0);
    end(served);
    // Nor was the ledger.
    keeper.forget("ivsmc-ledger");
    keeper.forget("ivsmc-listener");
    let served = keeper.start(options(&scratch));
    assert_ne!(served.server.status().unwrap().uuid, uuid);
    assert_eq!(Client::join(served.server.path(), 2).id, 0);
}

#[test]
fn an_attempt_that_fails_leaves_everything_as_it_was() {
    let (scratch, keeper) = (Scratch::new(), Keeper::new());
    let served = keeper.start(options(&scratch));
    let path = served.server.path().to_owned();
    let mut client = Client::join(&path, 2);
    let region = client.attach();
    let (instance, slot) = (region.marking_server(), client.claim(&region));
    end(served);
    let names = keeper.names();
    // What is in the way is no socket, so nobody may take it away.
    std::fs::rename(&path, scratch.path("aside")).unwrap();
    std::fs::write(&path, "").unwrap();
    for _ in 0..2 {
        let refused = Server::held_by(options(&scratch), keeper.holder()).unwrap_err();
        assert!(refused.to_string().contains("not a socket"), "{refused}");
        assert_eq!((region.marking_server(), region.is_live(slot)), (instance, true));
    }
    std::fs::rename(scratch.path("aside"), &path).unwrap();
    // At the last moment: it listens and has the region, and what is no socket cannot be watched.
    let ours = "ivsmc-client-1";
    let connection = keeper.kept.lock().unwrap().remove(ours).unwrap();
    let damaged = keeper.holder().holding([(ours, file::memfd(c"damaged").unwrap())]);
    assert!(Server::held_by(options(&scratch), damaged).is_err());
    keeper.kept.lock().unwrap().insert(ours.into(), connection);
    assert_eq!((region.marking_server(), path.exists()), (instance, true));
    assert_eq!(keeper.names(), names);

    let served = keeper.start(options(&scratch));
    assert_eq!(served.event(), Event::Resumed { clients: 1 });
    Client::join(&path, 2);
    client.read_until_peers(1, 2);
    assert!(region.is_live(slot));
    drop(served);
    assert_eq!((region.marking_server(), path.exists()), (None, false));
    assert!(keeper.names().is_empty());
}

#[test]
fn what_is_asked_for_anew_is_taken_where_it_can_be() {
    let (scratch, keeper) = (Scratch::new(), Keeper::new());
    let file = |name: &str| Backing::File { path: scratch.path(name), size: Some(MIB) };
    let first = ServerOptions { backing: file("region"), ..options(&scratch) };
    let served = keeper.start(first.clone());
    let path = served.server.path().to_owned();
    let client = Client::join(&path, 2);
    end(served);
    let served = keeper.start(first.clone());
    assert_eq!(served.event(), Event::Resumed { clients: 1 });
    drop(client);
    assert_eq!(served.event(), Event::Left { id: 0, slots: 0 });
    end(served);
    // Somebody has taken its name away.
    std::fs::remove_file(&path).unwrap();
    let other = ServerOptions {
        path: scratch.path("other.sock"),
        vectors: 3,
        mode: 0o640,
        backing: file("other"),
        ..first
    };
    let served = keeper.start(other);
    let what: Vec<_> = (0..4).map(|_| served.event().to_string()).collect();
    let what = what.join("\n");
    for part in ["vectors=3 is not taken", "other.sock is not taken", "another region is not"] {
        assert!(what.contains(part), "{what}");
    }
    let status = served.server.status().unwrap();
    assert_eq!((status.path.as_path(), status.vectors), (path.as_path(), 2));
    assert_eq!(status.file, Some(scratch.path("region")));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    Client::join(&path, 2);
    drop(served);
    assert!(!path.exists());
    assert!(!scratch.path("other").exists());
}

#[test]
fn without_a_holder_it_serves_on_and_ends_properly() {
    let (scratch, keeper) = (Scratch::new(), Keeper::new());
    let served = keeper.start(options(&scratch));
    let mut first = Client::join(served.server.path(), 2);
    drop(keeper);
    let second = Client::join(served.server.path(), 2);
    first.read_until_peers(1, 2);
    assert_eq!(second.id, 1);
    let server = served.stop();
    assert!(!server.leave_to_holder());
    let region = first.attach();
    drop(server);
    assert_eq!(region.marking_server(), None);
    assert!(!scratch.path("ivs.sock").exists());
    // Neither does one that never had any.
    let served = Served::start(options(&scratch));
    assert!(!served.stop().leave_to_holder());
    assert!(!file::status(first.region.as_ref().unwrap()).unwrap().is_directory());
}
