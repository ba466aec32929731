//! Attachments of one region, in one process and in two.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::AtomicUsize;
use std::thread;

use ivsmc_proto::dmb::{DmbError, Token};
use ivsmc_proto::memory::Memory;
use ivsmc_shm::mem;

use ivsmc_proto::ring::Producer;
use ivsmc_proto::slot::SlotState;
use ivsmc_shm::poll::EventFd;

use super::doorbell::Seat;
use super::memory::Full;
use super::*;
use crate::device::tests::{spec, Scratch};
use crate::host::Plain;
use crate::runtime::Runtime;
use crate::server::{self, Server, ServerHandle, ServerOptions};

fn attach(path: &Path) -> Arc<Attachment> {
    Attachment::open(&spec(Kind::File, path)).unwrap()
}

fn bytes(attachment: &Attachment, at: u64, length: usize) -> Vec<u8> {
    let mut into = vec![0; length];
    mem::with_uninit(&mut into, |into| attachment.memory().read(at, into));
    into
}

#[test]
fn a_dmb_is_shared_and_comes_back() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 64 << 20);
    let (reader, writer) = (attach(&path), attach(&path));
    let own = reader.allocate(4, writer.me()).unwrap();
    assert_eq!((own.size_class(), own.place().capacity), (4, 256 << 10));
    let other = reader.allocate(0, writer.me()).unwrap();
    assert!(matches!(reader.attach(own.token(), 4, reader.me()), Err(DmbError::NotInvited)));
    let peer = writer.attach(own.token(), 4, reader.me()).unwrap();
    assert_eq!(peer.place(), own.place());
    writer.memory().write(peer.place().data, b"through shared memory");
    assert_eq!(bytes(&reader, own.place().data, 21), b"through shared memory");

    // Nobody's memory is reused while somebody may still write into it.
    drop(other);
    drop(own);
    assert_eq!(reader.stats(), AttachmentStats { extents: 1, dmbs: 0, limbo: 1 });
    assert!(reader.sweep());
    drop(peer);
    assert!(!reader.sweep());
    // One idle extent is kept.
    assert_eq!(reader.stats(), AttachmentStats { extents: 1, dmbs: 0, limbo: 0 });
    drop(reader);
    let census = writer.census();
    assert_eq!((census.live, census.dead, census.extents), (1, 0, 0));
    assert_eq!((census.dmbs_held, census.dmbs_attached), (0, 0));
}

#[test]
fn the_background_thread_empties_the_limbo() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 64 << 20);
    let (reader, writer) = (attach(&path), attach(&path));
    let lease = Runtime::current().unwrap().lease().unwrap();
    reader.watch(lease.reactor()).unwrap();
    for _ in 0..2 {
        let own = reader.allocate(4, writer.me()).unwrap();
        let peer = writer.attach(own.token(), 4, reader.me()).unwrap();
        drop(own);
        assert_eq!(reader.stats().limbo, 1);
        drop(peer);
        while reader.stats().limbo > 0 {
            thread::yield_now();
        }
    }
}

#[test]
fn an_owner_that_leaves_first_leaves_the_memory_to_its_writer() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 1 << 20);
    let (reader, writer) = (attach(&path), attach(&path));
    let own = reader.allocate(1, writer.me()).unwrap();
    let peer = writer.attach(own.token(), own.size_class(), reader.me()).unwrap();
    drop(own);
    drop(reader);
    let census = writer.census();
    assert_eq!((census.live, census.extents, census.dmbs_attached), (1, 1, 1));
    drop(peer);
    assert_eq!(writer.census().extents, 0);
}

#[test]
fn a_full_region_gives_smaller_dmbs_and_then_none() {
    let scratch = Scratch::new();
    let attachment = attach(&scratch.file("region", 1 << 20));
    let extents = attachment.region().geometry().extents();
    let writer = SlotRef { index: 9, generation: 1 };
    // The largest that fits into an extent of so small a region is 64 KiB.
    let mut dmbs: Vec<_> = (1..extents).map(|_| attachment.allocate(6, writer).unwrap()).collect();
    assert!(dmbs.iter().all(|dmb| dmb.size_class() == 2));
    dmbs.push(attachment.allocate(1, writer).unwrap());
    let classes: Vec<_> =
        (0..2).map(|_| attachment.allocate(2, writer).map(|dmb| dmb.size_class())).collect();
    assert_eq!(classes, [Ok(1), Ok(1)]);
    dmbs.push(attachment.allocate(2, writer).unwrap());
    assert_eq!(attachment.allocate(0, writer).err(), Some(Full));
    assert_eq!(u32::try_from(attachment.stats().extents), Ok(extents));
    drop(dmbs);
    assert_eq!(attachment.census().extents, 1);
}

#[test]
fn every_slot_can_be_taken_and_one_more_is_refused() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 1 << 20);
    let mut all: Vec<_> = (0..16).map(|_| attach(&path)).collect();
    let refused = Attachment::open(&spec(Kind::File, &path)).err().unwrap();
    assert!(refused.sentence.contains("all its 16 peer slots"), "{}", refused.sentence);
    assert!(all.iter().all(|attachment| attachment.reap() == 0));
    let left = all.swap_remove(7);
    let index = left.me().index;
    drop(left);
    assert_eq!(attach(&path).me().index, index);
}

/// Set in the child process of the tests below: the device to attach to.
const CHILD: &str = "IVSMC_TEST_ATTACHMENT";

/// The other process, about to do what [`child`] does on `device`; its input, and the lines it says.
pub(crate) fn start(device: &DeviceSpec) -> (Child, ChildStdin, impl FnMut() -> Option<String>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "attachment::tests::child", "--nocapture"])
        .env(CHILD, device.as_str())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let said = move || lines.find_map(|line| line.strip_prefix("child ").map(ToOwned::to_owned));
    (child, input, said)
}

pub(crate) fn kill(child: &mut Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// The other process: takes a slot and DMBs, says so, and waits to be killed.
#[test]
fn child() {
    let Ok(device) = std::env::var(CHILD) else { return };
    let attachment = Attachment::open(&device.parse().unwrap()).unwrap();
    let mut lines = std::io::stdin().lines().map(Result::unwrap);
    let mut number = move || lines.next().unwrap().parse::<u64>().unwrap();
    let parent = SlotRef {
        index: u16::try_from(number()).unwrap(),
        generation: u32::try_from(number()).unwrap(),
    };
    let own: Vec<_> = (0..10).map(|_| attachment.allocate(4, parent).unwrap()).collect();
    let me = attachment.me();
    println!("\nchild {} {} {}", me.index, me.generation, own[0].token().0);
    let peer = attachment.attach(Token(number()), 0, parent).unwrap();
    println!("child attached");
    // Nobody ever sends it.
    number();
    drop((peer, own));
}

#[test]
fn what_a_killed_process_had_comes_back() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 64 << 20);
    let parent = attach(&path);
    let (mut child, mut input, mut said) = start(&spec(Kind::File, &path));
    writeln!(input, "{}\n{}", parent.me().index, parent.me().generation).unwrap();
    let numbers: Vec<u64> =
        said().unwrap().split(' ').map(|number| number.parse().unwrap()).collect();
    let peer = SlotRef {
        index: u16::try_from(numbers[0]).unwrap(),
        generation: u32::try_from(numbers[1]).unwrap(),
    };
    let own = parent.allocate(0, peer).unwrap();
    writeln!(input, "{}", own.token().0).unwrap();
    assert_eq!(said().as_deref(), Some("attached"));
    let theirs = parent.attach(Token(numbers[2]), 4, peer).unwrap();
    let before = parent.census();
    assert_eq!((before.live, before.dmbs_held, before.dmbs_attached), (2, 11, 2));
    assert_eq!(parent.reap(), 0);
    assert!(parent.is_peer_alive(peer));

    kill(&mut child);
    assert!(parent.region().is_live(peer), "nobody has looked yet");
    assert!(!parent.is_peer_alive(peer));
    assert_eq!(parent.reap(), 0, "it was reclaimed by the look");
    // The writer is gone, so this one comes back at once.
    drop(own);
    assert_eq!(parent.stats().limbo, 0);
    // The extent in which this process may still write stays until it lets go.
    let during = parent.census();
    assert_eq!((during.live, during.extents, during.dmbs_attached), (1, 2, 1));
    drop(theirs);
    let after = parent.census();
    assert_eq!((after.live, after.dead, after.extents), (1, 0, 1));
    assert_eq!((after.dmbs_held, after.dmbs_attached), (0, 0));
}

#[test]
fn a_newcomer_takes_the_slot_of_a_killed_process() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 1 << 20);
    let (mut child, mut input, mut said) = start(&spec(Kind::File, &path));
    writeln!(input, "0\n1").unwrap();
    said().unwrap();
    kill(&mut child);
    let newcomer = attach(&path);
    assert_eq!((newcomer.me().index, newcomer.me().generation), (0, 2));
    let census = newcomer.census();
    assert_eq!((census.live, census.extents, census.dmbs_held), (1, 0, 0));
}

/// Ends the ivshmem server also when an assertion fails.
struct StopOnDrop(ServerHandle);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

#[test]
fn an_ivshmem_server_of_ours_says_that_a_client_was_killed() {
    let scratch = Scratch::new();
    let socket = scratch.path().join("ivs.sock");
    let mut options = ServerOptions::new(&socket);
    options.backing = server::Backing::Memfd { size: 2 << 20 };
    let server = Server::new(options).unwrap();
    thread::scope(|scope| {
        let _stop = StopOnDrop(server.handle());
        scope.spawn(|| server.serve(&Plain, |_| {}).unwrap());
        let device = spec(Kind::Host, &socket);
        let parent = Attachment::open(&device).unwrap();
        let state = parent.region().slot_state(parent.me().index);
        let id = parent.region().slot_info(parent.me()).unwrap().ivposition.unwrap();
        assert_eq!(state, SlotState::Live { at: parent.me(), prover: Prover::IvPosition(id) });
        let (mut child, mut input, mut said) = start(&device);
        writeln!(input, "0\n1").unwrap();
        said().unwrap();
        assert_eq!((parent.census().live, parent.reap()), (2, 0));
        kill(&mut child);
        while parent.census().live == 2 {
            thread::yield_now();
        }
        while parent.census().dead > 0 {
            thread::yield_now();
        }
        assert_eq!(parent.census().extents, 0);
    });
}

/// Who is on the machine 5, on another boot of it than the records that it finds.
fn after_a_reboot(locks: Option<u32>, is_on_own_file: bool) -> Judge {
    let boot = Boot { id: 101, machine: 5 };
    let witness = Witness { boot, ivposition: None, is_exclusive: false };
    Judge { witness, locks, is_on_own_file }
}

/// Has the record of `owner` say that it is on this boot.
fn say_boot(owner: &Attachment, boot: Boot) {
    let identity = HostIdentity { boot: boot.id, netns: 1, ivposition: 0 };
    let record = HostRecord::new(identity, &[]).on_machine(boot.machine);
    owner.region().write_host_record(owner.me(), &record);
}

#[test]
fn whoever_holds_its_lock_lives_whatever_its_boot_is() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 1 << 20);
    let (here, owner) = (attach(&path), attach(&path));
    say_boot(&owner, Boot { id: 100, machine: 5 });
    let slot = owner.me();
    let look = |judge: Judge| judge.look(here.region(), &FileLocks(here.memory()), slot.index);
    assert!(!look(after_a_reboot(Some(77), true)));
    assert!(here.region().is_live(slot));
    let byte = here.region().slot_claim_offset(slot.index);
    locks::unlock_byte(owner.memory().fd(), byte).unwrap();
    assert!(!look(after_a_reboot(None, false)), "who cannot lock");
    // Another machine, or the same boot with other locks: what is obtained is not the owner's.
    say_boot(&owner, Boot { id: 100, machine: 6 });
    assert!(!look(after_a_reboot(Some(77), true)));
    say_boot(&owner, Boot { id: 101, machine: 5 });
    assert!(!look(after_a_reboot(Some(77), true)));
    say_boot(&owner, Boot { id: 100, machine: 5 });
    assert!(look(after_a_reboot(Some(77), true)));
    assert!(!here.region().is_live(slot));
    // Nobody holds it any longer.
    assert!(locks::try_lock_byte(owner.memory().fd(), byte).unwrap());
}

#[test]
fn who_does_not_know_its_boot_is_judged_by_its_lock_alone() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 1 << 20);
    let (here, owner) = (attach(&path), attach(&path));
    let region = here.region();
    let byte = |at: SlotRef| region.slot_claim_offset(at.index);
    let claim = || {
        let index = region.unclaimed().next().unwrap();
        let lock = region.slot_claim_offset(index);
        assert!(locks::try_lock_byte(owner.memory().fd(), lock).unwrap());
        region.claim_slot(index, Prover::Lock { boot: judge::UNKNOWN_BOOT }).unwrap()
    };
    let unknown = HostIdentity { boot: 0, netns: 9, ivposition: 0 };
    for is_recorded in [false, true] {
        let at = claim();
        if is_recorded {
            region.write_host_record(at, &HostRecord::new(unknown, &[]));
        }
        assert_eq!(here.reap(), 0);
        locks::unlock_byte(owner.memory().fd(), byte(at)).unwrap();
        // In a guest, the lock would be on another file.
        let elsewhere = after_a_reboot(Some(77), false);
        assert!(!elsewhere.look(region, &FileLocks(here.memory()), at.index));
        assert!(region.is_live(at));
        assert_eq!(here.reap(), 1);
        assert!(!region.is_live(at));
    }
    // One that says its boot is not of this kind, and its lock somewhere else.
    let at = claim();
    region.write_host_record(at, &HostRecord::new(HostIdentity { boot: 8, ..unknown }, &[]));
    locks::unlock_byte(owner.memory().fd(), byte(at)).unwrap();
    assert_eq!(here.reap(), 0);
    region.reclaim(at);
}

#[test]
fn addresses_are_published() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 1 << 20);
    let (one, other) = (attach(&path), attach(&path));
    one.refresh_addresses();
    let seen = other.region().host_record(one.me().index).unwrap();
    assert_eq!(seen, *one.record());
    assert_eq!(seen.identity, other.record().identity);
    assert!(seen.addresses().iter().all(|ip| !ip.is_loopback() && !ip.is_link_local()));
}

/// A session, as far as doorbells go: how often it was notified, and told of a departure.
#[derive(Default)]
struct Told {
    notified: AtomicUsize,
    departed: AtomicUsize,
}

impl Notified for Told {
    fn notified(&self) {
        self.notified.fetch_add(1, Ordering::SeqCst);
    }

    fn departed(&self) {
        self.departed.fetch_add(1, Ordering::SeqCst);
    }
}

impl Told {
    fn counts(&self) -> (usize, usize) {
        (self.notified.load(Ordering::SeqCst), self.departed.load(Ordering::SeqCst))
    }
}

/// Runs `test` with two attachments to an ivshmem server that gives each client `vectors`.
fn with_doorbells(vectors: u16, test: impl FnOnce(Arc<Attachment>, Arc<Attachment>)) {
    let scratch = Scratch::new();
    let socket = scratch.path().join("ivs.sock");
    let mut options = ServerOptions::new(&socket);
    options.backing = server::Backing::Memfd { size: 16 << 20 };
    options.vectors = vectors;
    let server = Server::new(options).unwrap();
    thread::scope(|scope| {
        let _stop = StopOnDrop(server.handle());
        scope.spawn(|| server.serve(&Plain, |_| {}).unwrap());
        let device = spec(Kind::Host, &socket);
        test(Attachment::open(&device).unwrap(), Attachment::open(&device).unwrap());
    });
}

/// Has `from` notify `to` of the DMB that `peer` writes.
fn notify(from: &Attachment, to: &Attachment, peer: &PeerDmb) {
    let info = from.region().slot_info(to.me()).unwrap();
    from.region().set_summary(to.me(), peer.number());
    assert!(from.doorbells().unwrap().notify(info.ivposition.unwrap(), info.vector.unwrap()));
}

#[test]
fn a_doorbell_is_told_to_the_session_it_is_about_and_heard_from_then_on() {
    with_doorbells(2, |reader, writer| {
        let told: [Arc<Told>; 3] = Default::default();
        let own: Vec<_> = (0..3).map(|_| reader.allocate(0, writer.me()).unwrap()).collect();
        for (own, told) in own.iter().zip(&told) {
            let told = Arc::downgrade(told);
            assert!(own.tell(told));
        }
        let attach = |own: &OwnDmb| writer.attach(own.token(), 0, reader.me()).unwrap();
        let peers: Vec<_> = own.iter().map(attach).collect();
        let is_heard = |peer: &PeerDmb| Producer::new(peer.place()).is_heard(writer.memory());
        assert!(!peers.iter().any(is_heard));
        notify(&writer, &reader, &peers[1]);
        let bell = Arc::new(EventFd::new().unwrap());
        let ear = own[0].ear().unwrap();
        let seat = ear.enter(&bell);
        assert!(!seat.drain());
        assert_eq!(told.each_ref().map(|told| told.counts()), [(0, 0), (1, 0), (0, 0)]);
        assert_eq!(peers.iter().map(is_heard).collect::<Vec<_>>(), [false, true, false]);
        // The own one is only looked at.
        notify(&writer, &reader, &peers[0]);
        assert!(seat.drain());
        assert_eq!(told[0].counts(), (0, 0));
        // A later session of the pair has heard from the start.
        let later = reader.allocate(0, writer.me()).unwrap();
        assert!(is_heard(&attach(&later)));
        let stats = reader.doorbell_stats().unwrap();
        assert_eq!((stats.vector, stats.received, stats.lost), (1, 2, 0));
    });
}

#[test]
fn a_bit_without_its_doorbell_is_found_and_not_heard_any_more() {
    with_doorbells(1, |reader, writer| {
        let told = Arc::new(Told::default());
        let own = reader.allocate(0, writer.me()).unwrap();
        own.tell(Arc::<Told>::downgrade(&told));
        let peer = writer.attach(own.token(), 0, reader.me()).unwrap();
        let other = reader.allocate(0, writer.me()).unwrap();
        let bell = Arc::new(EventFd::new().unwrap());
        let ear = other.ear().unwrap();
        let seat = ear.enter(&bell);
        let is_heard = || Producer::new(peer.place()).is_heard(writer.memory());
        notify(&writer, &reader, &peer);
        seat.drain();
        assert!(is_heard());
        writer.region().set_summary(reader.me(), peer.number());
        seat.look();
        assert!(!is_heard());
        assert_eq!(told.counts(), (2, 0));
        assert_eq!(reader.doorbell_stats().unwrap().lost, 1);
        seat.look();
        assert_eq!(told.counts(), (2, 0));
        // One that has come meanwhile is not lost.
        notify(&writer, &reader, &peer);
        seat.look();
        assert!(is_heard());
        assert_eq!(told.counts(), (3, 0));
        let stats = reader.doorbell_stats().unwrap();
        assert_eq!((stats.received, stats.lost), (2, 1));
    });
}

#[test]
fn whatever_bits_are_set_each_session_is_told_once_a_drain() {
    with_doorbells(1, |reader, writer| {
        let told: [Arc<Told>; 4] = Default::default();
        let own: Vec<_> = (0..4).map(|_| reader.allocate(0, writer.me()).unwrap()).collect();
        for (own, told) in own.iter().zip(&told) {
            let told = Arc::downgrade(told);
            own.tell(told);
        }
        for number in 0..=u16::MAX {
            writer.region().set_summary(reader.me(), number);
        }
        let bell = Arc::new(EventFd::new().unwrap());
        let other = reader.allocate(0, writer.me()).unwrap();
        let ear = other.ear().unwrap();
        assert!(ear.enter(&bell).drain());
        assert!(told.iter().all(|told| told.counts() == (1, 0)));
    });
}

#[test]
fn the_lead_goes_to_who_has_slept_longest() {
    with_doorbells(1, |reader, writer| {
        let own = reader.allocate(0, writer.me()).unwrap();
        let ear = own.ear().unwrap();
        let bells: Vec<_> = (0..3).map(|_| Arc::new(EventFd::new().unwrap())).collect();
        let mut seats: Vec<_> = bells.iter().map(|bell| ear.enter(bell)).collect();
        let leads = |seats: &[Seat]| -> Vec<_> {
            seats.iter().map(|seat| seat.doorbell().is_some()).collect()
        };
        let rung = || bells.iter().map(|bell| bell.drain().unwrap()).collect::<Vec<_>>();
        assert_eq!(leads(&seats), [true, false, false]);
        seats.remove(2);
        assert_eq!((leads(&seats), rung()), (vec![true, false], vec![0, 0, 0]));
        seats.push(ear.enter(&bells[2]));
        seats.remove(0);
        assert_eq!((leads(&seats), rung()), (vec![true, false], vec![0, 1, 0]));
        seats.remove(0);
        assert_eq!((leads(&seats), rung()), (vec![true], vec![0, 0, 1]));
        seats.clear();
        assert_eq!(rung(), [0, 0, 0]);
    });
}

#[test]
fn sessions_of_a_departed_peer_are_told_once() {
    with_doorbells(1, |reader, writer| {
        let told = Arc::new(Told::default());
        let own = reader.allocate(0, writer.me()).unwrap();
        own.tell(Arc::<Told>::downgrade(&told));
        let mine = Arc::new(Told::default());
        let own_session = reader.allocate(0, reader.me()).unwrap();
        own_session.tell(Arc::<Told>::downgrade(&mine));
        let bell = Arc::new(EventFd::new().unwrap());
        let ear = own_session.ear().unwrap();
        let seat = ear.enter(&bell);
        seat.drain();
        assert_eq!(told.counts(), (0, 0));
        reader.region().mark_dead(writer.me());
        seat.drain();
        seat.drain();
        assert_eq!((told.counts(), mine.counts()), ((0, 1), (0, 0)));
        assert_eq!(reader.doorbell_stats().unwrap().departures, 1);
        // And who comes too late to be told learns it when it asks.
        assert!(!own.tell(Arc::<Told>::downgrade(&told)));
    });
}
