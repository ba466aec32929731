//! Peers that die: at every memory access of all they do, of reclaiming another, and while another
//! process does the same.

extern crate std;

use alloc::boxed::Box;
use alloc::rc::Rc;
use core::cell::{Cell, RefCell};
use core::mem::MaybeUninit;
use core::net::SocketAddr;
use core::sync::atomic::Ordering;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};

use super::*;
use crate::directory::Bound;
use crate::dmb::{Release, Token};
use crate::heap::HeapMemory;
use crate::host::{Endpoint, HostIdentity, HostRecord};
use crate::intent::{IntentKey, IntentRef, IntentState};
use crate::layout::MIN_REGION;
use crate::slot::Prover;

mod simulation;
mod using;

/// A memory that does something before its n-th access from now: kills the process that accesses
/// it, or lets the others run.
struct Interrupted {
    memory: Rc<HeapMemory>,
    left: Cell<usize>,
    act: RefCell<Option<Box<dyn FnOnce()>>>,
}

/// What a killed process unwinds with.
struct Killed;

impl Interrupted {
    fn new(memory: &Rc<HeapMemory>) -> Interrupted {
        Interrupted { memory: memory.clone(), left: Cell::new(0), act: RefCell::default() }
    }

    /// Does `act` before access number `access`, 0 the next one.
    fn arm(&self, access: usize, act: impl FnOnce() + 'static) {
        self.left.set(access);
        *self.act.borrow_mut() = Some(Box::new(act));
    }

    /// Whether it has not come to it.
    fn disarm(&self) -> bool {
        self.act.borrow_mut().take().is_some()
    }

    fn memory(&self) -> &HeapMemory {
        if self.act.borrow().is_some() {
            let left = self.left.get();
            self.left.set(left.wrapping_sub(1));
            if left == 0 {
                let act = self.act.borrow_mut().take();
                act.into_iter().for_each(|act| act());
            }
        }
        &self.memory
    }
}

impl Memory for Interrupted {
    fn len(&self) -> u64 {
        self.memory.len()
    }
    fn load(&self, at: u64, order: Ordering) -> u64 {
        self.memory().load(at, order)
    }
    fn store(&self, at: u64, value: u64, order: Ordering) {
        self.memory().store(at, value, order);
    }
    fn swap(&self, at: u64, value: u64) -> u64 {
        self.memory().swap(at, value)
    }
    fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64> {
        self.memory().compare_exchange(at, current, new)
    }
    fn fetch_or(&self, at: u64, bits: u64) -> u64 {
        self.memory().fetch_or(at, bits)
    }
    fn fence(&self) {
        self.memory.fence();
    }
    fn write(&self, at: u64, from: &[u8]) {
        self.memory().write(at, from);
    }
    fn read(&self, at: u64, into: &mut [MaybeUninit<u8>]) {
        self.memory().read(at, into);
    }
}

/// A process: its own view of the one memory.
type Process = Rc<Region<Interrupted>>;

fn process(memory: &Rc<HeapMemory>) -> Process {
    Rc::new(Region::attach(Interrupted::new(memory), 1).unwrap())
}

fn claim(region: &Process) -> SlotRef {
    region.unclaimed().find_map(|index| region.claim_slot(index, Prover::None)).unwrap()
}

fn key(port: u16) -> IntentKey {
    let endpoint = |text: &str| Endpoint::from(text.parse::<SocketAddr>().unwrap());
    IntentKey {
        client: Endpoint { port, ..endpoint("10.0.0.1:0") },
        server: endpoint("10.0.0.2:80"),
    }
}

fn record() -> HostRecord {
    let identity = HostIdentity { boot: 1, netns: 1, ivposition: 0 };
    HostRecord::new(identity, &[key(0).server.ip])
}

/// An extent of `owner`, open.
fn extent(region: &Process, owner: SlotRef) -> Option<u32> {
    let extent = region.claim_extent(owner)?;
    region.open_extent(extent, owner).then_some(extent)
}

/// A DMB of `owner` for `writer` in an extent of its own.
fn dmb(region: &Process, owner: SlotRef, writer: SlotRef) -> Option<Token> {
    let granule = region.geometry().granules_of(extent(region, owner)?).start;
    Some(region.invite_dmb(granule, 0, writer).ok()?.0)
}

/// All that a process does with a peer from claiming its slot to leaving. What it learns of its
/// own is in `me`; `None` where it found itself declared dead.
fn life(own: &Process, peers: &Process, peer: SlotRef, me: &Cell<Option<SlotRef>>) -> Option<()> {
    let slot = claim(own);
    me.set(Some(slot));
    own.write_host_record(slot, &record());
    let entry = own.register_listener(slot, Bound::Any4, 80)?;
    using::intents(own, slot, peers, peer)?;
    let intent = own.publish_intent(slot, &key(1000))?;
    let _ = own.connected_intent(&intent);

    let reads = dmb(own, slot, peer)?;
    let written = peers.attach_dmb(reads, 0, peer, slot);
    let peers_dmb = dmb(peers, peer, slot);
    let writes =
        peers_dmb.and_then(|token| own.attach_dmb(token, 0, slot, peer).ok().map(|_| token));
    // A second one, to be there when the first is gone.
    let second = dmb(own, slot, peer)?;
    using::rings(own, peers, writes.zip(written.ok().map(|_| reads)));

    writes.map(|token| own.detach_dmb(token, slot));
    if let Some(token) = peers_dmb {
        peers.release_dmb(token);
    }
    if own.release_dmb(reads) == Release::WriterThere {
        assert!(!own.dmb_is_idle(reads.granule()));
    }
    if written.is_ok() {
        peers.detach_dmb(reads, peer);
    }
    own.release_dmb(second);
    let _ = own.withdraw_intent(&intent);
    own.unregister_listener(entry);
    let extents = own.claimed_extents().filter(|(_, owner)| *owner == slot);
    for (index, _) in extents {
        own.free_extent(index, slot);
    }
    own.reclaim(slot);
    Some(())
}

/// What the peer does when it has seen the other's end: lets go of all that it has.
fn let_go(peers: &Process, peer: SlotRef) {
    for granule in 0..peers.geometry().granules() {
        for generation in 1..4 {
            let token = Token(generation << 32 | u64::from(granule));
            peers.detach_dmb(token, peer);
            if peers.extent_owner(granule / peers.geometry().granules_per_extent()) == Some(peer) {
                peers.release_dmb(token);
            }
        }
    }
    let extents = peers.claimed_extents().filter(|(_, owner)| *owner == peer);
    for (index, _) in extents {
        peers.free_extent(index, peer);
    }
    peers.reclaim_intents(peer);
}

/// Kills `run` at each of its accesses in turn, until it gets to its end.
fn at_each_access(mut run: impl FnMut(usize) -> bool) -> usize {
    (0..).find(|access| run(*access)).unwrap()
}

#[test]
fn a_peer_killed_at_any_access_leaves_nothing_for_good() {
    for peer_first in [false, true] {
        let accesses = at_each_access(|access| {
            let memory = Rc::new(HeapMemory::new(MIN_REGION));
            let (own, peers) = (process(&memory), process(&memory));
            let peer = claim(&peers);
            let me = Cell::new(None);
            own.memory().arm(access, || resume_unwind(Box::new(Killed)));
            let lived = catch_unwind(AssertUnwindSafe(|| life(&own, &peers, peer, &me)));
            let through = own.memory().disarm();
            assert_eq!(lived.is_ok(), through);
            using::is_sound(&peers);
            if peer_first {
                let_go(&peers, peer);
            }
            // Killed before it knew that it had claimed: its prover knows the slot.
            let slot = me.get().unwrap_or(SlotRef { index: 1, generation: 1 });
            peers.reclaim(slot);
            // Before, some was still the dead one's; else what the peer writes into is still claimed.
            let_go(&peers, peer);
            let census = peers.census();
            assert_eq!(census, Census { live: 1, ..Census::default() }, "killed at {access}");
            through
        });
        assert!(accesses > 100, "{accesses}");
    }
}

/// A dead peer with one of everything, a writer in its extent and itself a writer in the other's.
fn death(peers: &Process, peer: SlotRef) -> SlotRef {
    let dead = claim(peers);
    peers.write_host_record(dead, &record());
    peers.register_listener(dead, Bound::Any4, 80).unwrap();
    for port in [1000, 2000] {
        peers.publish_intent(dead, &key(port)).unwrap();
    }
    let token = dmb(peers, dead, peer).unwrap();
    peers.attach_dmb(token, 0, peer, dead).unwrap();
    dmb(peers, dead, peer).unwrap();
    let token = dmb(peers, peer, dead).unwrap();
    peers.attach_dmb(token, 0, dead, peer).unwrap();
    peers.claim_extent(dead).unwrap();
    dead
}

#[test]
fn a_reclaimer_killed_at_any_access_is_followed_by_another() {
    let accesses = at_each_access(|access| {
        let memory = Rc::new(HeapMemory::new(MIN_REGION));
        let (reaper, peers) = (process(&memory), process(&memory));
        let peer = claim(&peers);
        let dead = death(&peers, peer);
        reaper.memory().arm(access, || resume_unwind(Box::new(Killed)));
        let _ = catch_unwind(AssertUnwindSafe(|| reaper.reclaim(dead)));
        let through = reaper.memory().disarm();
        peers.reclaim(dead);
        let_go(&peers, peer);
        assert_eq!(peers.census(), Census { live: 1, ..Census::default() }, "killed at {access}");
        through
    });
    assert!(accesses > 100, "{accesses}");
}

/// What a newcomer has, to be found untouched.
struct Newcomer {
    slot: SlotRef,
    intent: IntentRef,
    token: Token,
    writer: SlotRef,
}

impl Newcomer {
    /// Claims the slot that was the dead one's, and as much as it had.
    fn arrive(region: &Process) -> Newcomer {
        let (slot, writer) = (claim(region), claim(region));
        region.write_host_record(slot, &record());
        region.register_listener(slot, Bound::Any4, 80).unwrap();
        let intent = region.publish_intent(slot, &key(1000)).unwrap();
        let token = dmb(region, slot, writer).unwrap();
        region.attach_dmb(token, 0, writer, slot).unwrap();
        Newcomer { slot, intent, token, writer }
    }

    fn is_untouched(&self, region: &Process) {
        assert!(region.is_live(self.slot) && region.is_live(self.writer));
        let client = record();
        let client = HostRecord::new(HostIdentity { boot: 2, ..client.identity }, &[]);
        assert_eq!(region.find_listener(key(0).server, &client), Some(self.slot));
        assert_eq!(region.find_intent(&key(1000)), Some((self.intent, IntentState::Announced)));
        let extent = region.geometry().extent_of(self.token.granule());
        assert_eq!(region.extent_owner(extent), Some(self.slot));
        assert_eq!(region.count_dmbs(extent), (1, 1));
        assert!(region.detach_dmb(self.token, self.writer));
        assert_eq!(region.release_dmb(self.token), Release::Free);
    }
}

#[test]
fn a_reclaimer_that_comes_too_late_harms_no_newcomer() {
    let accesses = at_each_access(|access| {
        let memory = Rc::new(HeapMemory::new(MIN_REGION));
        let (reaper, peers) = (process(&memory), process(&memory));
        let peer = claim(&peers);
        let dead = death(&peers, peer);
        let newcomer = Rc::new(Cell::new(None));
        reaper.memory().arm(access, {
            let (peers, newcomer) = (peers.clone(), newcomer.clone());
            move || {
                // Meanwhile another reclaims it all, and its place is taken.
                peers.reclaim(dead);
                let_go(&peers, peer);
                newcomer.set(Some(Newcomer::arrive(&peers)));
            }
        });
        reaper.reclaim(dead);
        let through = reaper.memory().disarm();
        if let Some(newcomer) = newcomer.take() {
            assert_eq!(newcomer.slot, SlotRef { index: dead.index, generation: 2 });
            newcomer.is_untouched(&peers);
        }
        through
    });
    assert!(accesses > 100, "{accesses}");
}

#[test]
fn the_last_to_let_go_of_an_orphan_frees_it() {
    // The writer is interrupted by the reclaim of the owner, and the other way round.
    for writer_is_interrupted in [true, false] {
        at_each_access(|access| {
            let memory = Rc::new(HeapMemory::new(MIN_REGION));
            let (first, second) = (process(&memory), process(&memory));
            let (owner, writer) = (claim(&first), claim(&first));
            let granule = first.geometry().granules_of(extent(&first, owner).unwrap()).start;
            let tokens = [0, 1].map(|n| first.invite_dmb(granule + n, 0, writer).unwrap().0);
            for token in tokens {
                first.attach_dmb(token, 0, writer, owner).unwrap();
            }
            first.detach_dmb(tokens[0], writer);
            let detach = move |region: &Process| {
                region.detach_dmb(tokens[1], writer);
            };
            let reclaim = move |region: &Process| {
                region.reclaim(owner);
            };
            let interrupting = second.clone();
            if writer_is_interrupted {
                first.memory().arm(access, move || reclaim(&interrupting));
                detach(&first);
            } else {
                first.memory().arm(access, move || detach(&interrupting));
                reclaim(&first);
            }
            let through = first.memory().disarm();
            if !through {
                assert_eq!(second.census(), Census { live: 1, ..Census::default() }, "{access}");
            }
            through
        });
    }
}

#[test]
fn who_is_declared_dead_meanwhile_claims_nothing_for_good() {
    at_each_access(|access| {
        let memory = Rc::new(HeapMemory::new(MIN_REGION));
        let (own, peers) = (process(&memory), process(&memory));
        let peer = claim(&peers);
        let me = Rc::new(Cell::new(None));
        own.memory().arm(access, {
            let (peers, me) = (peers.clone(), me.clone());
            move || {
                if let Some(slot) = me.get() {
                    peers.reclaim(slot);
                }
            }
        });
        let _ = life(&own, &peers, peer, &me);
        let through = own.memory().disarm();
        let_go(&peers, peer);
        // An operator who declared it dead looks again for what it had attached to since.
        peers.reclaim(peer);
        assert_eq!(peers.census(), Census::default(), "declared dead at {access}");
        through
    });
}
