//! Tens of peers that join, exchange DMBs, and die, in a random order that a seed repeats.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use super::*;
use crate::allocator::Allocator;
use crate::region::tests::Random;
use crate::ring::Place;

/// A DMB that a peer owns or writes.
#[derive(Clone, Copy)]
struct Held {
    token: Token,
    class: u8,
    place: Place,
    /// The other end.
    other: SlotRef,
}

/// A live peer.
struct Peer {
    slot: SlotRef,
    allocator: Allocator,
    reads: Vec<Held>,
    limbo: Vec<Held>,
    writes: Vec<Held>,
    invitations: Vec<Held>,
}

/// Who may touch a granule's memory, as the test sees it.
#[derive(Default, Clone, Copy)]
struct Use {
    owner: Option<SlotRef>,
    writer: Option<SlotRef>,
}

struct Simulation {
    region: Region<HeapMemory>,
    random: Random,
    peers: Vec<Peer>,
    /// Dead, and not reclaimed.
    dead: Vec<SlotRef>,
    /// By granule.
    used: BTreeMap<u32, Use>,
    /// Owner by extent.
    extents: BTreeMap<u32, SlotRef>,
    sessions: usize,
    deaths: usize,
}

impl Simulation {
    fn new(seed: u64, size: u64) -> Simulation {
        Simulation {
            region: Region::attach(HeapMemory::new(size), 1).unwrap(),
            random: Random(seed),
            peers: Vec::new(),
            dead: Vec::new(),
            used: BTreeMap::new(),
            extents: BTreeMap::new(),
            sessions: 0,
            deaths: 0,
        }
    }

    fn step(&mut self) {
        let chosen = self.random.below(self.peers.len().max(1));
        match self.random.below(100) {
            _ if self.peers.is_empty() => self.join(),
            0..8 => self.join(),
            8..10 => self.die(chosen),
            10..12 => self.leave(chosen),
            12..20 => self.reap(),
            20..45 => self.invite(chosen),
            45..70 => self.attach(chosen),
            70..80 => self.write(chosen),
            80..88 => self.detach(chosen),
            88..96 => self.release(chosen),
            _ => self.sweep(chosen),
        }
    }

    fn join(&mut self) {
        let index = self.region.unclaimed().next();
        if let Some(slot) = index.and_then(|index| self.region.claim_slot(index, Prover::None)) {
            assert!(self.peers.iter().all(|peer| peer.slot.index != slot.index));
            self.region.register_listener(slot, Bound::Any4, slot.index);
            let mut peer = Peer {
                slot,
                allocator: Allocator::new(self.region.geometry()),
                reads: Vec::new(),
                limbo: Vec::new(),
                writes: Vec::new(),
                invitations: Vec::new(),
            };
            self.grow(&mut peer);
            self.peers.push(peer);
        }
    }

    fn grow(&mut self, peer: &mut Peer) {
        let Some(extent) = self.region.claim_extent(peer.slot) else { return };
        // No extent has two owners, and none whose memory somebody may still write is claimed.
        assert!(!self.is_extent_used(extent), "extent {extent} claimed while in use");
        assert!(self
            .extents
            .insert(extent, peer.slot)
            .is_none_or(|owner| !self.region.is_live(owner)));
        assert!(self.region.open_extent(extent, peer.slot));
        peer.allocator.add_extent(extent);
    }

    fn is_extent_used(&self, extent: u32) -> bool {
        let granules = self.region.geometry().granules_of(extent);
        self.used.range(granules).any(|(_, used)| used.owner.or(used.writer).is_some())
    }

    /// Applies `change` to the uses of a DMB's granules.
    fn mark(&mut self, held: &Held, change: impl Fn(&mut Use)) {
        let first = held.token.granule();
        for granule in first..first + (1 << held.class) {
            change(self.used.entry(granule).or_default());
        }
    }

    fn invite(&mut self, at: usize) {
        let class = u8::try_from(self.random.below(4)).unwrap();
        let to = self.random.below(self.peers.len());
        let other = self.peers[to].slot;
        let mut peer = self.peers.swap_remove(at);
        if peer
            .allocator
            .allocate(class)
            .map(|granule| peer.allocator.free(granule, class))
            .is_none()
        {
            self.grow(&mut peer);
        }
        if let Some(granule) = peer.allocator.allocate(class) {
            for granule in granule..granule + (1 << class) {
                let used = self.used.get(&granule).copied().unwrap_or_default();
                assert!(used.owner.or(used.writer).is_none(), "granule {granule} is in use");
            }
            let (token, place) = self.region.invite_dmb(granule, class, other).unwrap();
            let held = Held { token, class, place, other };
            self.mark(&held, |used| used.owner = Some(peer.slot));
            peer.reads.push(held);
            let invitation = Held { other: peer.slot, ..held };
            if let Some(writer) = self.peers.iter_mut().find(|peer| peer.slot == other) {
                writer.invitations.push(invitation);
            } else {
                peer.invitations.push(invitation);
            }
        }
        self.peers.push(peer);
    }

    fn attach(&mut self, at: usize) {
        let Some(held) = self.peers[at].invitations.pop() else { return };
        let me = self.peers[at].slot;
        let found = self.region.attach_dmb(held.token, held.class, me, held.other);
        // Nobody else can: not in another's name, not with another's token.
        let wrong = SlotRef { generation: me.generation + 1, ..me };
        assert!(self.region.attach_dmb(held.token, held.class, wrong, held.other).is_err());
        assert!(self.region.attach_dmb(held.token, held.class, me, held.other).is_err());
        if let Ok(place) = found {
            assert_eq!(place, held.place);
            self.mark(&held, |used| {
                assert!(used.writer.is_none(), "two writers");
                used.writer = Some(me);
            });
            self.peers[at].writes.push(held);
            self.sessions += 1;
            self.write(at);
        }
    }

    /// Every byte that a peer has written into a DMB stays its own until it has let go.
    fn write(&mut self, at: usize) {
        let memory = self.region.memory();
        for held in &self.peers[at].writes {
            for word in [held.place.data, held.place.data + held.place.capacity - 8] {
                memory.store(word, held.token.0, Ordering::Relaxed);
            }
        }
    }

    fn check(&self, held: &Held) {
        let found = self.region.memory().load(held.place.data, Ordering::Relaxed);
        assert_eq!(found, held.token.0, "somebody else wrote into {}", held.token);
    }

    fn detach(&mut self, at: usize) {
        if let Some(held) = self.peers[at].writes.pop() {
            self.check(&held);
            let me = self.peers[at].slot;
            self.mark(&held, |used| used.writer = None);
            assert!(self.region.detach_dmb(held.token, me));
            assert!(!self.region.detach_dmb(held.token, me));
        }
    }

    fn release(&mut self, at: usize) {
        if self.peers[at].reads.is_empty() {
            return;
        }
        let nth = self.random.below(self.peers[at].reads.len());
        let held = self.peers[at].reads.swap_remove(nth);
        self.mark(&held, |used| used.owner = None);
        match self.region.release_dmb(held.token) {
            Release::Free => {
                assert!(self.peers[at].allocator.free(held.token.granule(), held.class))
            }
            Release::WriterThere => self.peers[at].limbo.push(held),
        }
    }

    fn sweep(&mut self, at: usize) {
        let region = &self.region;
        let Peer { limbo, allocator, slot, .. } = &mut self.peers[at];
        limbo.retain(|held| {
            let idle = region.dmb_is_idle(held.token.granule());
            if idle {
                assert!(allocator.free(held.token.granule(), held.class));
            }
            !idle
        });
        for extent in allocator.take_idle_extents(1) {
            assert_eq!(self.extents.remove(&extent), Some(*slot));
            assert!(region.free_extent(extent, *slot));
        }
    }

    fn die(&mut self, at: usize) {
        let peer = self.peers.swap_remove(at);
        // It may have been writing until now.
        peer.writes.iter().for_each(|held| self.check(held));
        self.dead.push(peer.slot);
        self.deaths += 1;
        if self.random.below(2) == 0 {
            self.region.mark_dead(peer.slot);
        }
    }

    fn leave(&mut self, at: usize) {
        while !self.peers[at].writes.is_empty() {
            self.detach(at);
        }
        while !self.peers[at].reads.is_empty() {
            self.release(at);
        }
        let slot = self.peers.swap_remove(at).slot;
        self.region.reclaim(slot);
        assert!(!self.region.is_live(slot));
    }

    fn reap(&mut self) {
        if !self.dead.is_empty() {
            let nth = self.random.below(self.dead.len());
            let dead = self.dead.swap_remove(nth);
            for used in self.used.values_mut() {
                used.owner = used.owner.filter(|owner| *owner != dead);
                used.writer = used.writer.filter(|writer| *writer != dead);
            }
            assert!(self.region.reclaim(dead).slot);
            assert_eq!(self.region.reclaim(dead), Reclaimed::default());
        }
    }
}

#[test]
fn no_memory_is_used_twice_and_all_of_it_comes_back() {
    let (mut sessions, mut deaths) = (0, 0);
    for seed in 0..12 {
        let size = if seed % 3 == 0 { MIN_REGION } else { 8 << 20 };
        let mut simulation = Simulation::new(seed, size);
        for _ in 0..8_000 {
            simulation.step();
        }
        let alive = u32::try_from(simulation.peers.len()).unwrap();
        assert_eq!(
            simulation.region.census().live + simulation.region.census().dead,
            alive + u32::try_from(simulation.dead.len()).unwrap()
        );
        while !simulation.peers.is_empty() {
            if simulation.random.below(2) == 0 {
                simulation.die(0);
            } else {
                simulation.leave(0);
            }
        }
        while !simulation.dead.is_empty() {
            simulation.reap();
        }
        assert_eq!(simulation.region.census(), Census::default(), "seed {seed}");
        assert!(simulation.region.is_deserted());
        sessions += simulation.sessions;
        deaths += simulation.deaths;
    }
    assert!(sessions > 3_000 && deaths > 1_000, "{sessions} sessions, {deaths} deaths");
}
