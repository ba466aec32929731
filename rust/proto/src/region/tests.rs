//! Formatting, refusing, and a region whose words are garbage.

extern crate std;

use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use std::thread;

use super::*;
use crate::allocator::Allocator;
use crate::directory::Bound;
use crate::dmb::Token;
use crate::heap::HeapMemory;
use crate::host::{Endpoint, HostIdentity, HostRecord};
use crate::intent::IntentKey;
use crate::reclaim::Census;
use crate::slot::{Prover, SlotInfo, SlotRef};

/// A small seeded generator (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }
}

fn fresh() -> Region<HeapMemory> {
    Region::attach(HeapMemory::new(MIN_REGION), 0x1234_5678_9abc_def0_0000_0000_0000_0000).unwrap()
}

#[test]
fn zero_memory_becomes_an_empty_region_once() {
    let memory = Arc::new(HeapMemory::new(MIN_REGION + 5000));
    let first = Region::attach(memory.clone(), u128::MAX - 6).unwrap();
    let second = Region::attach(memory.clone(), 7).unwrap();
    assert_eq!(first.uuid(), u128::MAX - 6);
    assert_eq!(first.uuid(), second.uuid());
    assert_eq!(first.geometry(), second.geometry());
    assert_eq!(first.geometry().size(), MIN_REGION + PAGE);
    assert_eq!(first.census(), Census::default());
    assert!(first.is_deserted());
    // Nothing but the superblock was touched.
    let rest = memory.bytes(PAGE, usize::try_from(MIN_REGION).unwrap());
    assert!(rest.iter().all(|byte| *byte == 0));
    // A half of zero would look as if it were not set.
    assert_eq!(fresh().uuid() & u128::from(u64::MAX), 1);
}

#[test]
fn whoever_formats_and_however_far_all_see_one_region() {
    let size = usize::try_from(PAGE).unwrap();
    let whole = fresh().memory().bytes(0, size);
    // Killed between any two words: the next one completes it.
    for words in 0..=20 {
        let memory = HeapMemory::new(MIN_REGION);
        memory.write(0, &whole[..words * 8]);
        let region = Region::attach(memory, 99).unwrap();
        assert_eq!(region.memory().bytes(48, size - 48), whole[48..]);
        assert_eq!(Region::attach(&region.memory, 5).unwrap().uuid(), region.uuid());
    }
    for round in 0..50 {
        let memory = Arc::new(HeapMemory::new(MIN_REGION));
        let attach = |uuid| {
            let memory = memory.clone();
            thread::spawn(move || Region::attach(memory, uuid).unwrap().uuid())
        };
        let uuids: Vec<_> = (1..4).map(|n| attach((n << 64 | n) + round)).collect();
        let uuids: Vec<_> = uuids.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(uuids.windows(2).all(|pair| pair[0] == pair[1]), "{uuids:x?}");
    }
}

#[test]
fn what_is_no_region_is_refused_untouched_and_named() {
    assert!(matches!(
        Region::attach(HeapMemory::new(PAGE), 1),
        Err(RegionError::TooSmall { found: PAGE })
    ));
    let foreign = HeapMemory::new(MIN_REGION);
    foreign.write(4088, b"mine");
    let error = Region::attach(&foreign, 1).unwrap_err();
    assert!(matches!(error, RegionError::NotARegion { at: 4088, .. }));
    assert!(foreign.bytes(0, 4088).iter().all(|byte| *byte == 0));
    assert!(error.to_string().contains("not an ivsmc region"), "{error}");

    let changed = |at, value| {
        let region = fresh();
        region.memory().store(at, value, Ordering::Relaxed);
        let error = Region::attach(&region.memory, 1).unwrap_err();
        (error, error.to_string())
    };
    let (error, text) = changed(0, 1);
    assert!(matches!(error, RegionError::NotARegion { at: 0, found: 1 }), "{text}");
    let (error, text) = changed(AT_VERSION, 9);
    assert!(matches!(error, RegionError::WrongVersion { found: 9 }) && text.contains("version 9"));
    let (error, text) = changed(AT_SIZE, 2 * MIN_REGION);
    let grown = RegionError::WrongSize { found: 2 * MIN_REGION, actual: MIN_REGION };
    assert!(error == grown && text.contains("2097152"), "{text}");
    let (error, _) = changed(AT_FEATURES, 3);
    assert_eq!(error, RegionError::UnknownFeatures { found: 3 });
    let (error, text) = changed(AT_LAYOUT + 8, 77);
    assert_eq!(error, RegionError::WrongLayout { at: 56, found: 77, expected: PAGE }, "{text}");
}

/// A number that may well mean something.
fn plausible(random: &mut Random, region: &Region<HeapMemory>) -> u64 {
    let word = |random: &mut Random| {
        let words = usize::try_from(MIN_REGION / 16).unwrap();
        region.word(random.below(words) as u64 * 8)
    };
    match random.below(6) {
        0 => random.next(),
        1 => random.next() >> random.below(64),
        2 => u64::MAX << random.below(64),
        3 => word(random) ^ 1 << random.below(64),
        4 => word(random),
        _ => random.next() & random.next() & random.next(),
    }
}

/// Does everything that a process does, on whatever the region holds; `random` chooses how.
fn use_everything(random: &mut Random, region: &Region<HeapMemory>) {
    let slots = region.geometry().slots();
    let small = |random: &mut Random| u32::try_from(random.below(4)).unwrap();
    let slot = |random: &mut Random| SlotRef {
        index: u16::try_from(random.below(usize::from(slots) + 2)).unwrap(),
        generation: small(random),
    };
    let me = region.unclaimed().find_map(|index| region.claim_slot(index, Prover::None));
    let me = me.unwrap_or(SlotRef { index: 3, generation: 1 });
    region.set_slot_info(me, &SlotInfo { ivposition: Some(1), vector: Some(2), eid: [65; 32] });
    let ip = "10.1.2.3:80".parse::<core::net::SocketAddr>().unwrap();
    let identity = HostIdentity { boot: 5, netns: 6, ivposition: 0 };
    let record = HostRecord::new(identity, &[Endpoint::from(ip).ip]);
    region.write_host_record(me, &record);
    for index in 0..slots {
        let _ = region.host_record(index);
    }
    let other = slot(random);
    let _ = (region.slot_info(other), region.is_live(other), region.is_deserted());
    let _ = (region.host_record(u16::MAX), region.claimed().count(), region.marking_server());

    let entry = region.register_listener(me, Bound::AnyDual, 80);
    let _ = region.find_listener(ip.into(), &record);
    let _ =
        region.find_listener("[::1]:80".parse::<core::net::SocketAddr>().unwrap().into(), &record);
    let key = IntentKey { client: ip.into(), server: ip.into() };
    let own = region.publish_intent(me, &key);
    let found = region.find_intent(&key).map(|(intent, _)| intent);
    for intent in own.into_iter().chain(found) {
        let _ = (region.key_of(&intent), region.connected_intent(&intent));
        let _ = (region.match_intent(&intent), region.commit_intent(&intent));
        let _ = (region.refuse_intent(&intent), region.withdraw_intent(&intent));
        let _ = (region.abandon_intent(&intent), region.finish_intent(&intent));
    }
    if let Some(entry) = entry {
        let _ = region.unregister_listener(entry);
    }

    let mut allocator = Allocator::new(region.geometry());
    if let Some(extent) = region.claim_extent(me) {
        region.open_extent(extent, me);
        allocator.add_extent(extent);
    }
    let class = u8::try_from(random.below(9)).unwrap();
    let granule = allocator.allocate(class.min(2)).unwrap_or(small(random));
    if let Ok((token, _)) = region.invite_dmb(granule, class, me) {
        let _ = region.attach_dmb(token, class, me, me);
        let _ = region.detach_dmb(token, me);
        let _ = region.release_dmb(token);
    }
    let token = Token(match random.below(3) {
        0 => random.next(),
        1 => random.next() & 0xff_0000_003f,
        _ => region.word(random.below(1000) as u64 * 8),
    });
    let _ = region.attach_dmb(token, class, me, other);
    let _ = (region.detach_dmb(token, other), region.release_dmb(token));
    let _ = region.dmb_is_idle(granule.min(region.geometry().granules() - 1));
    for extent in allocator.take_idle_extents(0) {
        region.free_extent(extent, me);
    }
    let _ = (region.reclaim(other), region.reclaim(me), region.census());
    let _ = Region::attach(region.memory(), 1).err().map(|error| error.to_string());
}

#[test]
fn garbage_in_every_table_is_survived() {
    let mut random = Random(1);
    let mut region = fresh();
    // The tables, and the control blocks behind them, as words.
    let words = usize::try_from(region.geometry().extent_ranges(14).0.end / 8).unwrap();
    for round in 0..30_000 {
        if round % 100 == 0 {
            region = fresh();
        }
        // A superblock that stays whole most of the time: the region was attached before.
        let first = if round % 50 == 0 { 0 } else { usize::try_from(PAGE / 8).unwrap() };
        let dense = first + random.below(words - first);
        for n in 0..random.below(200) {
            let at = match random.below(2) {
                0 => first + random.below(words - first),
                _ => (dense + n).min(words - 1),
            };
            let garbage = plausible(&mut random, &region);
            region.memory().store(at as u64 * 8, garbage, Ordering::Relaxed);
        }
        use_everything(&mut random, &region);
    }
}
