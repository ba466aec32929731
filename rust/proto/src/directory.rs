//! The listener directory: who accepts connections, where.
//!
//! Entries are words in one dense array, so that a lookup, which is part of each connect, is a
//! scan of words that differ in the port; their details are looked at only where it agrees. The
//! lowest free entry is taken, and the *directory bound* says how many from the first may ever
//! have been in use: a lookup ends there.
//!
//! ```text
//!   word     state 2 | port 16 | slot 12 | generation (low) 16 | sequence 18
//!   details  kind and generation, address
//! ```
//!
//! An entry goes `FREE -> WRITING -> LISTENING -> FREE`, each step a compare-exchange of the whole
//! word by its owner; the last also by whoever reclaims the owner. Freeing raises the sequence, so
//! that whoever read details between two equal looks at the word read those of one listener.

use crate::failpoint::reached;
use crate::host::{Endpoint, HostRecord, Ip};
use crate::layout::{DIRECTORY_BOUND, WORD};
use crate::memory::Memory;
use crate::region::Region;
use crate::slot::{SlotRef, SlotState};

/// Shift of the state.
const STATE_SHIFT: u32 = 62;
/// Shift of the port.
const PORT_SHIFT: u32 = 46;
/// Shift of the slot.
const SLOT_SHIFT: u32 = 34;
/// Shift of the generation's low bits.
const GENERATION_SHIFT: u32 = 18;
/// Mask of the sequence, lowest in the word.
const SEQUENCE: u64 = (1 << 18) - 1;

/// The state of an entry that nobody owns.
const FREE: u64 = 0;
/// The state of an entry whose details are being written.
const WRITING: u64 = 1;
/// The state of an entry to be found.
const LISTENING: u64 = 2;

/// Offset of kind and generation in the details.
const KIND: u64 = 0;
/// Offset of the address in the details, two words.
const ADDRESS: u64 = 8;
/// Shift of the generation over the kind.
const KIND_BITS: u32 = 8;

/// How often an entry of a dead owner is tried to be freed; by the rules it changes twice meanwhile at
/// most.
const TRIES: usize = 8;

/// What a listener is bound to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Bound {
    /// 0.0.0.0
    Any4,
    /// :: for v6 only
    Any6,
    /// :: for v4 and v6
    AnyDual,
    /// One address.
    One(Ip),
}

impl Bound {
    /// Kind and address as the details have them.
    fn encode(self) -> (u64, [u64; 2]) {
        match self {
            Bound::Any4 => (1, [0, 0]),
            Bound::Any6 => (2, [0, 0]),
            Bound::AnyDual => (3, [0, 0]),
            Bound::One(ip) => (4, ip.to_words()),
        }
    }

    /// What the details say, if it is known.
    fn decode(kind: u64, address: [u64; 2]) -> Option<Bound> {
        match kind {
            1 => Some(Bound::Any4),
            2 => Some(Bound::Any6),
            3 => Some(Bound::AnyDual),
            4 => Some(Bound::One(Ip::from_words(address))),
            _ => None,
        }
    }

    /// Whether connections to `ip` reach a listener bound so, on a host that has `ip`.
    fn takes(self, ip: Ip) -> bool {
        match self {
            Bound::Any4 => ip.is_v4(),
            Bound::Any6 => !ip.is_v4(),
            Bound::AnyDual => true,
            Bound::One(own) => own == ip,
        }
    }
}

/// An entry of the caller's in the directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListenerEntry {
    /// Number of the entry.
    index: u32,
    /// Its word while it listens.
    word: u64,
}

/// The word that stands for `owner` in an entry, whatever its state and port.
fn owner_bits(owner: SlotRef) -> u64 {
    u64::from(owner.index) << SLOT_SHIFT
        | (u64::from(owner.generation) & 0xffff) << GENERATION_SHIFT
}

/// The mask of [`owner_bits`].
const OWNER: u64 = 0xfff << SLOT_SHIFT | 0xffff << GENERATION_SHIFT;

/// The word of the free entry that follows `word`.
fn freed(word: u64) -> u64 {
    word.wrapping_add(1) & SEQUENCE
}

impl<M: Memory> Region<M> {
    /// Enters a listener of `owner`, the caller, whose record must have been written. `None` if
    /// the directory is full, or the owner is dead.
    pub fn register_listener(
        &self,
        owner: SlotRef,
        bound: Bound,
        port: u16,
    ) -> Option<ListenerEntry> {
        for index in 0..self.geometry().directory_entries() {
            let at = self.geometry().directory_word(index);
            let free = self.word(at);
            if free >> STATE_SHIFT != FREE {
                continue;
            }
            let identity = u64::from(port) << PORT_SHIFT | owner_bits(owner) | free & SEQUENCE;
            let writing = WRITING << STATE_SHIFT | identity;
            if !self.replace(at, free, writing) {
                continue;
            }
            reached("directory.claimed");
            // Pairs with the fence in `reclaim`: either it finds the entry, or we find us dead.
            self.memory().fence();
            if !self.is_live(owner) {
                self.replace(at, writing, freed(writing));
                return None;
            }
            let detail = self.geometry().directory_detail(index);
            let (kind, address) = bound.encode();
            self.set_word(detail + KIND, u64::from(owner.generation) << KIND_BITS | kind);
            self.set_word(detail + ADDRESS, address[0]);
            self.set_word(detail + ADDRESS + WORD, address[1]);
            reached("directory.detailed");
            self.raise_directory_bound(index + 1);
            let word = LISTENING << STATE_SHIFT | identity;
            let listens = self.step("directory.listening", at, writing, word);
            return listens.then_some(ListenerEntry { index, word });
        }
        None
    }

    /// Makes lookups go through the first `entries` entries at least.
    fn raise_directory_bound(&self, entries: u32) {
        let wanted = u64::from(entries);
        let mut bound = self.word(DIRECTORY_BOUND);
        // It only grows: who finds it changed as often as it may grow is being misled.
        for _ in 0..entries {
            if bound >= wanted {
                return;
            }
            // Release: pairs with the Acquire in `find_listener`.
            match self.memory().compare_exchange(DIRECTORY_BOUND, bound, wanted) {
                Ok(_) => return reached("directory.bounded"),
                Err(found) => bound = found,
            }
        }
    }

    /// Takes a listener out. Whether it was still there.
    pub fn unregister_listener(&self, entry: ListenerEntry) -> bool {
        let at = self.geometry().directory_word(entry.index);
        self.step("directory.freed", at, entry.word, freed(entry.word))
    }

    /// A live peer that accepts connections to `dest` made by the host of `me`.
    ///
    /// A destination local to `me` (loopback, or an address of its own) is served only by peers of
    /// the same host identity, since every host has the like; any other by a listener bound to it,
    /// or by one bound to a wildcard whose host has the address. Link-local ones by nobody.
    pub fn find_listener(&self, dest: Endpoint, me: &HostRecord) -> Option<SlotRef> {
        let ip = dest.ip.as_destination();
        if ip.is_link_local() {
            return None;
        }
        let local = ip.is_loopback() || me.addresses().contains(&ip);
        let wanted = LISTENING << (STATE_SHIFT - PORT_SHIFT) | u64::from(dest.port);
        let words = self.geometry().directory_word(0);
        let entries = self.geometry().directory_entries();
        let used = u32::try_from(self.word(DIRECTORY_BOUND)).map_or(entries, |n| n.min(entries));
        for index in 0..used {
            let word = self.word(words + u64::from(index) * WORD);
            if word >> PORT_SHIFT != wanted {
                continue;
            }
            let Some((owner, bound)) = self.listener(index, word) else {
                continue;
            };
            if !bound.takes(ip) {
                continue;
            }
            let serves = match (local, bound) {
                (false, Bound::One(_)) => true,
                _ => self.host_record(owner.index).is_some_and(|host| {
                    if local {
                        host.identity == me.identity
                    } else {
                        host.addresses().contains(&ip)
                    }
                }),
            };
            // The record was that of the slot's live owner: this one, if it still lives.
            if serves && self.is_live(owner) {
                return Some(owner);
            }
        }
        None
    }

    /// Owner and binding of the entry with this word, if it stands still and its owner lives.
    fn listener(&self, index: u32, word: u64) -> Option<(SlotRef, Bound)> {
        let slot = u16::try_from(word >> SLOT_SHIFT & 0xfff).ok()?;
        if slot >= self.geometry().slots() {
            return None;
        }
        let SlotState::Live { at: owner, .. } = self.slot_state(slot) else {
            return None;
        };
        let detail = self.geometry().directory_detail(index);
        let kind = self.word(detail + KIND);
        let address = [self.word(detail + ADDRESS), self.word(detail + ADDRESS + WORD)];
        let still = self.word(self.geometry().directory_word(index)) == word;
        if !still
            || word & OWNER != owner_bits(owner)
            || kind >> KIND_BITS != u64::from(owner.generation)
        {
            return None;
        }
        Bound::decode(kind & ((1 << KIND_BITS) - 1), address).map(|bound| (owner, bound))
    }

    /// Frees the entries of `dead`; how many this call freed.
    pub(crate) fn reclaim_listeners(&self, dead: SlotRef) -> u32 {
        let frees = |index| {
            let at = self.geometry().directory_word(index);
            // An owner that does not know that it is dead may go on with it meanwhile: to listening,
            // and out.
            for _ in 0..TRIES {
                let word = self.word(at);
                if word >> STATE_SHIFT == FREE || word & OWNER != owner_bits(dead) {
                    return false;
                }
                if self.step("reclaim.listener", at, word, freed(word)) {
                    return true;
                }
            }
            false
        };
        (0..self.geometry().directory_entries()).map(|index| u32::from(frees(index))).sum()
    }

    /// Entries that somebody owns.
    pub(crate) fn count_listeners(&self) -> u32 {
        (0..self.geometry().directory_entries())
            .map(|index| self.word(self.geometry().directory_word(index)) >> STATE_SHIFT)
            .map(|state| u32::from(state != FREE))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heap::HeapMemory;
    use crate::host::HostIdentity;
    use crate::layout::MIN_REGION;
    use crate::slot::Prover;
    use alloc::vec::Vec;
    use core::mem::MaybeUninit;
    use core::net::{IpAddr, SocketAddr};
    use core::sync::atomic::Ordering;

    fn ip(text: &str) -> Ip {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn record(boot: u128, addresses: &[&str]) -> HostRecord {
        let addresses: Vec<Ip> = addresses.iter().map(|text| ip(text)).collect();
        HostRecord::new(HostIdentity { boot, netns: 1, ivposition: 0 }, &addresses)
    }

    struct Host<'a> {
        region: &'a Region<HeapMemory>,
        slot: SlotRef,
        record: HostRecord,
    }

    fn host<'a>(region: &'a Region<HeapMemory>, boot: u128, addresses: &[&str]) -> Host<'a> {
        let index = region.unclaimed().next().unwrap();
        let slot = region.claim_slot(index, Prover::None).unwrap();
        let record = record(boot, addresses);
        region.write_host_record(slot, &record);
        Host { region, slot, record }
    }

    impl Host<'_> {
        fn listen(&self, bound: Bound) -> ListenerEntry {
            self.region.register_listener(self.slot, bound, 80).unwrap()
        }

        fn find(&self, dest: &str) -> Option<SlotRef> {
            let dest = dest.parse::<SocketAddr>().unwrap();
            self.region.find_listener(dest.into(), &self.record)
        }
    }

    fn region() -> Region<HeapMemory> {
        Region::attach(HeapMemory::new(MIN_REGION), 1).unwrap()
    }

    #[test]
    fn a_destination_finds_who_listens_there_and_nobody_else() {
        let region = region();
        let everywhere = "172.17.0.1";
        let client = host(&region, 1, &["10.0.0.1", "fd00::1", everywhere]);
        let server = host(&region, 2, &["10.0.0.2", "fd00::2", everywhere]);
        let found = Some(server.slot);
        type Row = (Bound, &'static [(&'static str, bool)]);
        let rows: [Row; 5] = [
            (
                Bound::Any4,
                &[
                    ("10.0.0.2:80", true),
                    ("[fd00::2]:80", false),
                    ("10.0.0.3:80", false),
                    ("10.0.0.2:81", false),
                    ("[::ffff:10.0.0.2]:80", true),
                ],
            ),
            (Bound::Any6, &[("10.0.0.2:80", false), ("[fd00::2]:80", true)]),
            (
                Bound::AnyDual,
                &[
                    ("10.0.0.2:80", true),
                    ("[fd00::2]:80", true),
                    ("127.0.0.1:80", false),
                    ("[::1]:80", false),
                    ("0.0.0.0:80", false),
                    ("172.17.0.1:80", false),
                ],
            ),
            // Bound to it, whether its record lists it or not.
            (Bound::One(ip("10.0.0.9")), &[("10.0.0.9:80", true), ("10.0.0.2:80", false)]),
            (Bound::One(ip("fe80::1")), &[("[fe80::1]:80", false)]),
        ];
        for (bound, destinations) in rows {
            let entry = server.listen(bound);
            for (dest, expected) in destinations {
                assert_eq!(client.find(dest), found.filter(|_| *expected), "{bound:?} {dest}");
            }
            assert!(region.unregister_listener(entry) && !region.unregister_listener(entry));
            assert_eq!(client.find("10.0.0.2:80"), None);
        }
    }

    #[test]
    fn local_destinations_stay_on_the_host() {
        let region = region();
        let client = host(&region, 1, &["10.0.0.1"]);
        let same = host(&region, 1, &["10.0.0.1"]);
        let other = host(&region, 2, &["10.0.0.1"]);
        other.listen(Bound::AnyDual);
        for dest in
            ["127.0.0.1:80", "127.0.1.1:80", "0.0.0.0:80", "[::]:80", "[::1]:80", "10.0.0.1:80"]
        {
            assert_eq!(client.find(dest), None, "{dest}");
        }
        same.listen(Bound::Any4);
        for dest in ["127.0.0.1:80", "127.0.1.1:80", "0.0.0.0:80", "10.0.0.1:80"] {
            assert_eq!(client.find(dest), Some(same.slot), "{dest}");
        }
        assert_eq!(client.find("[::1]:80"), None);
        same.listen(Bound::One(ip("::1")));
        assert_eq!(client.find("[::]:80"), Some(same.slot));
    }

    #[test]
    fn the_dead_do_not_listen() {
        let region = region();
        let client = host(&region, 1, &["10.0.0.1"]);
        let server = host(&region, 2, &["10.0.0.2"]);
        server.listen(Bound::Any4);
        region.mark_dead(server.slot);
        assert_eq!(client.find("10.0.0.2:80"), None);
        assert_eq!(region.register_listener(server.slot, Bound::Any4, 81), None);
        assert_eq!(region.reclaim(server.slot).listeners, 1);
        assert_eq!(region.census().listeners, 0);
    }

    /// Somebody takes the directory bound back before each of our accesses.
    struct Restless(HeapMemory);

    impl Memory for Restless {
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn load(&self, at: u64, order: Ordering) -> u64 {
            self.0.load(at, order)
        }
        fn store(&self, at: u64, value: u64, order: Ordering) {
            self.0.store(at, value, order);
        }
        fn swap(&self, at: u64, value: u64) -> u64 {
            self.0.swap(at, value)
        }
        fn compare_exchange(&self, at: u64, current: u64, new: u64) -> Result<u64, u64> {
            if at == DIRECTORY_BOUND {
                self.0.store(at, !current & 1, Ordering::Relaxed);
            }
            self.0.compare_exchange(at, current, new)
        }
        fn fetch_or(&self, at: u64, bits: u64) -> u64 {
            self.0.fetch_or(at, bits)
        }
        fn fence(&self) {
            self.0.fence();
        }
        fn write(&self, at: u64, from: &[u8]) {
            self.0.write(at, from);
        }
        fn read(&self, at: u64, into: &mut [MaybeUninit<u8>]) {
            self.0.read(at, into);
        }
    }

    #[test]
    fn a_bound_that_somebody_keeps_taking_back_is_given_up() {
        let region = Region::attach(Restless(HeapMemory::new(MIN_REGION)), 1).unwrap();
        let me = region.claim_slot(0, Prover::None).unwrap();
        // The bounds of these three are never seen, and each call ends.
        for port in 1..4 {
            let entry = region.register_listener(me, Bound::Any4, port).unwrap();
            assert!(region.word(DIRECTORY_BOUND) < u64::from(port).max(2));
            assert_eq!(entry.index, u32::from(port) - 1);
        }
    }

    #[test]
    fn a_lookup_goes_as_far_as_entries_were_ever_used() {
        let region = region();
        let client = host(&region, 1, &["10.0.0.1"]);
        let server = host(&region, 2, &["10.0.0.2"]);
        let bound = || region.word(DIRECTORY_BOUND);
        assert_eq!(bound(), 0);
        let entries = [8080, 8081]
            .map(|port| region.register_listener(server.slot, Bound::Any4, port).unwrap());
        let last = server.listen(Bound::Any4);
        assert_eq!(bound(), 3);
        for entry in entries {
            region.unregister_listener(entry);
        }
        assert_eq!((client.find("10.0.0.2:80"), bound()), (Some(server.slot), 3));
        region.unregister_listener(last);
        server.listen(Bound::Any4);
        assert_eq!((client.find("10.0.0.2:80"), bound()), (Some(server.slot), 3));
        // Garbage does not lead out of the table.
        region.set_word(DIRECTORY_BOUND, u64::MAX);
        assert_eq!(client.find("10.0.0.2:80"), Some(server.slot));
        assert_eq!(client.find("10.0.0.2:81"), None);
    }

    #[test]
    fn a_full_directory_says_so() {
        let region = region();
        let server = host(&region, 2, &["10.0.0.2"]);
        let entries = region.geometry().directory_entries();
        for port in 0..u16::try_from(entries).unwrap() {
            assert!(region.register_listener(server.slot, Bound::Any4, port).is_some());
        }
        assert_eq!(region.register_listener(server.slot, Bound::Any4, 9999), None);
        assert_eq!(region.reclaim(server.slot).listeners, entries);
    }
}
