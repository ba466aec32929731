//! Host records: where a peer runs and which addresses reach it; canonical addresses.
//!
//! A record is written by its slot's owner only, under a sequence word that carries the slot's
//! generation and is odd while the record changes. A reader tries a bounded number of times; a
//! record left odd by a killed owner, or of an earlier generation, counts as none.

use alloc::vec::Vec;
use core::fmt;
use core::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::failpoint::reached;
use crate::layout::WORD;
use crate::memory::Memory;
use crate::region::Region;
use crate::slot::{SlotRef, SlotState};

/// The most addresses in a record; further ones are left out.
pub const MAX_ADDRESSES: usize = 32;

/// Offset of the sequence word: generation above [`SEQUENCE_BITS`], odd while being written.
const SEQUENCE: u64 = 0;
/// Bits of the sequence.
const SEQUENCE_BITS: u32 = 38;
/// Offset of the boot id, two words, low half first.
const BOOT: u64 = 8;
/// Offset of the network namespace's cookie.
const NETNS: u64 = 24;
/// Offset of the ivposition.
const IVPOSITION: u64 = 32;
/// Offset of the machine's uuid, two words, low half first.
const MACHINE: u64 = 48;
/// Offset of the number of addresses.
const COUNT: u64 = 40;
/// Offset of the addresses, two words each.
const ADDRESSES: u64 = 64;

/// How often a reader tries to find a record at rest.
const TRIES: usize = 8;

/// An address in canonical form: v4 as `::ffff:a.b.c.d`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ip([u8; 16]);

impl Ip {
    /// 127.0.0.1
    const LOOPBACK4: Ip = Ip([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 1]);
    /// ::1
    const LOOPBACK6: Ip = Ip([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);

    /// The address as sixteen bytes, network order.
    #[must_use]
    pub fn octets(self) -> [u8; 16] {
        self.0
    }

    /// The four bytes of a v4 address.
    fn v4(self) -> Option<[u8; 4]> {
        match self.0 {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Some([a, b, c, d]),
            _ => None,
        }
    }

    /// Whether this is a v4 address.
    #[must_use]
    pub fn is_v4(self) -> bool {
        self.v4().is_some()
    }

    /// Whether this is 127/8 or ::1.
    #[must_use]
    pub fn is_loopback(self) -> bool {
        self == Ip::LOOPBACK6 || matches!(self.v4(), Some([127, ..]))
    }

    /// Whether this is 169.254/16 or fe80::/10: means another host behind each interface.
    #[must_use]
    pub fn is_link_local(self) -> bool {
        matches!(self.v4(), Some([169, 254, ..])) || (self.0[0] == 0xfe && self.0[1] & 0xc0 == 0x80)
    }

    /// The address that a connect to this one goes to: 0.0.0.0 and :: mean loopback.
    #[must_use]
    pub fn as_destination(self) -> Ip {
        match self.v4() {
            Some([0, 0, 0, 0]) => Ip::LOOPBACK4,
            None if self.0 == [0; 16] => Ip::LOOPBACK6,
            _ => self,
        }
    }

    /// The address as two words.
    pub(crate) fn to_words(self) -> [u64; 2] {
        let number = u128::from_le_bytes(self.0);
        [low(number), low(number >> 64)]
    }

    /// The address of two words.
    pub(crate) fn from_words(words: [u64; 2]) -> Ip {
        Ip(join(words).to_le_bytes())
    }
}

impl From<IpAddr> for Ip {
    fn from(address: IpAddr) -> Ip {
        match address {
            IpAddr::V4(v4) => Ip(v4.to_ipv6_mapped().octets()),
            IpAddr::V6(v6) => Ip(v6.octets()),
        }
    }
}

impl From<Ip> for IpAddr {
    fn from(ip: Ip) -> IpAddr {
        Ipv6Addr::from(ip.0).to_canonical()
    }
}

impl fmt::Display for Ip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

impl fmt::Debug for Ip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One end of a TCP connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Endpoint {
    /// Its address.
    pub ip: Ip,
    /// Its port.
    pub port: u16,
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Endpoint {
        Endpoint { ip: address.ip().into(), port: address.port() }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::from((IpAddr::from(self.ip), self.port)).fmt(f)
    }
}

/// Where a peer runs. Two peers reach each other over loopback only if theirs are equal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HostIdentity {
    /// Id of the boot of its kernel; 0 if it is not known: see [`Boot`].
    pub boot: u128,
    /// Cookie of its network namespace. Where the boot is not known, mixed with a number of the
    /// container's: cookies are small, and those of two machines are the same.
    pub netns: u64,
    /// Its ivposition: kernels restored from one snapshot have the same boot id.
    pub ivposition: u16,
}

/// One boot of one machine: what ends, with all its processes, when the machine is reset.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Boot {
    /// Id of the boot, as the kernel itself gives it. 0 is none and stands for one that is not
    /// known, as in a container that shows an id of its own in the kernel's place: it agrees with
    /// none and differs from none.
    pub id: u128,
    /// Uuid of the machine, the same for all its boots; 0 if it has none or the peer could not
    /// read it. No part of [`HostIdentity`]: of the processes of one machine only root's can.
    pub machine: u128,
}

impl Boot {
    /// Whether `other` is the same boot, if both ids are known.
    #[must_use]
    pub fn is_same(self, other: Boot) -> Option<bool> {
        (self.id != 0 && other.id != 0).then_some(self.id == other.id)
    }

    /// Whether `other` is of the same machine, if both uuids are known.
    #[must_use]
    pub fn is_of_same_machine(self, other: Boot) -> Option<bool> {
        (self.machine != 0 && other.machine != 0).then_some(self.machine == other.machine)
    }
}

/// Where a peer runs and its addresses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostRecord {
    /// Where it runs.
    pub identity: HostIdentity,
    /// Uuid of its machine, 0 if not known: see [`Boot`].
    machine: u128,
    /// The addresses of its interfaces, at most [`MAX_ADDRESSES`].
    addresses: Vec<Ip>,
}

impl HostRecord {
    /// A record with the first [`MAX_ADDRESSES`] of these addresses, of a machine without a uuid.
    #[must_use]
    pub fn new(identity: HostIdentity, addresses: &[Ip]) -> HostRecord {
        let addresses = addresses.iter().copied().take(MAX_ADDRESSES).collect();
        HostRecord { identity, machine: 0, addresses }
    }

    /// The same of the machine with the uuid `machine`; 0 if that is not known.
    #[must_use]
    pub fn on_machine(self, machine: u128) -> HostRecord {
        HostRecord { machine, ..self }
    }

    /// The boot it was written in.
    #[must_use]
    pub fn boot(&self) -> Boot {
        Boot { id: self.identity.boot, machine: self.machine }
    }

    /// The addresses of its interfaces.
    #[must_use]
    pub fn addresses(&self) -> &[Ip] {
        &self.addresses
    }
}

impl<M: Memory> Region<M> {
    /// Writes the record of `at`, the caller; one thread at a time. The boot is the same in all
    /// records of one attachment.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn write_host_record(&self, at: SlotRef, record: &HostRecord) {
        assert!(at.index < self.geometry().slots(), "slot {at}");
        let base = self.geometry().host_record(at.index);
        let generation = u64::from(at.generation) << SEQUENCE_BITS;
        let within = |sequence: u64| sequence & ((1 << SEQUENCE_BITS) - 1);
        // Even. An earlier owner's counts for nothing: from 2 on the record's boot is this one's.
        let found = match self.word(base + SEQUENCE) & !1 {
            found if found >> SEQUENCE_BITS == u64::from(at.generation) => found,
            _ => generation,
        };
        self.set_word(base + SEQUENCE, generation | within(found | 1));
        // Each store below is a Release one: none is seen before the odd sequence.
        self.set_word(base + BOOT, low(record.identity.boot));
        self.set_word(base + BOOT + WORD, low(record.identity.boot >> 64));
        reached("record.begun");
        self.set_word(base + NETNS, record.identity.netns);
        self.set_word(base + IVPOSITION, u64::from(record.identity.ivposition));
        self.set_word(base + MACHINE, low(record.machine));
        self.set_word(base + MACHINE + WORD, low(record.machine >> 64));
        self.set_word(base + COUNT, record.addresses.len() as u64);
        let words = record.addresses.iter().flat_map(|ip| ip.to_words());
        for (at, word) in (base + ADDRESSES..).step_by(8).zip(words) {
            self.set_word(at, word);
        }
        // Pairs with the first load in `host_record`.
        self.set_word(base + SEQUENCE, generation | within(found.wrapping_add(2)));
        reached("record.written");
    }

    /// The record of the live owner of slot `index`, if it has written one and lets it rest.
    pub fn host_record(&self, index: u16) -> Option<HostRecord> {
        if index >= self.geometry().slots() {
            return None;
        }
        let SlotState::Live { at, .. } = self.slot_state(index) else {
            return None;
        };
        let base = self.geometry().host_record(index);
        for _ in 0..TRIES {
            let before = self.word(base + SEQUENCE);
            if before >> SEQUENCE_BITS != u64::from(at.generation) || before & 1 != 0 {
                core::hint::spin_loop();
                continue;
            }
            let record = self.read_record(base);
            // The loads of the record are Acquire ones: this one cannot come before them, and who
            // saw a word of a later write sees its odd sequence here.
            if self.word(base + SEQUENCE) == before {
                return record;
            }
        }
        None
    }

    /// The boot in the record of `at`, also of an owner that was killed while it wrote its addresses
    /// anew. `None` if `at` is no longer live, or has not come to writing its first record.
    pub fn boot_of(&self, at: SlotRef) -> Option<Boot> {
        if at.index >= self.geometry().slots() {
            return None;
        }
        let base = self.geometry().host_record(at.index);
        // From the end of the first writing on these words stay as they are while the sequence is
        // of this generation: each later writing stores the same.
        let is_written = || {
            let sequence = self.word(base + SEQUENCE);
            let first = sequence & ((1 << SEQUENCE_BITS) - 1);
            sequence >> SEQUENCE_BITS == u64::from(at.generation) && first >= 2
        };
        if !is_written() {
            return None;
        }
        let boot = self.read_boot(base);
        // The loads are Acquire ones: who saw a word of the next owner's sees its sequence here.
        (is_written() && self.is_live(at)).then_some(boot)
    }

    /// Reads the boot of a record that may change meanwhile.
    fn read_boot(&self, base: u64) -> Boot {
        Boot {
            id: join([self.word(base + BOOT), self.word(base + BOOT + WORD)]),
            machine: join([self.word(base + MACHINE), self.word(base + MACHINE + WORD)]),
        }
    }

    /// Reads a record that may change meanwhile. `None` if it is none.
    fn read_record(&self, base: u64) -> Option<HostRecord> {
        let Boot { id: boot, machine } = self.read_boot(base);
        let identity = HostIdentity {
            boot,
            netns: self.word(base + NETNS),
            ivposition: u16::try_from(self.word(base + IVPOSITION)).ok()?,
        };
        let count = usize::try_from(self.word(base + COUNT)).ok()?;
        if count > MAX_ADDRESSES {
            return None;
        }
        let addresses = (base + ADDRESSES..)
            .step_by(16)
            .take(count)
            .map(|at| Ip::from_words([self.word(at), self.word(at + WORD)]))
            .collect();
        Some(HostRecord { identity, machine, addresses })
    }
}

/// The low half of a number.
#[allow(clippy::cast_possible_truncation)] // That is what it is for.
fn low(number: u128) -> u64 {
    number as u64
}

/// The number of two words, low half first.
fn join([low, high]: [u64; 2]) -> u128 {
    u128::from(high) << 64 | u128::from(low)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use crate::heap::HeapMemory;
    use crate::layout::MIN_REGION;
    use crate::slot::Prover;
    use alloc::string::ToString;
    use alloc::sync::Arc;
    use alloc::vec;

    fn ip(text: &str) -> Ip {
        Ip::from(text.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn addresses_are_canonical() {
        assert_eq!(ip("10.0.0.1"), ip("::ffff:10.0.0.1"));
        assert_eq!(ip("10.0.0.1").to_string(), "10.0.0.1");
        assert_eq!(IpAddr::from(ip("fe80::1")).to_string(), "fe80::1");
        assert_eq!(ip("0.0.0.0").as_destination(), ip("127.0.0.1"));
        assert_eq!(ip("::").as_destination(), ip("::1"));
        assert_eq!(ip("10.0.0.1").as_destination(), ip("10.0.0.1"));
        assert!(ip("127.9.9.9").is_loopback() && ip("::1").is_loopback());
        assert!(!ip("128.0.0.1").is_loopback() && !ip("::2").is_loopback());
        assert!(ip("169.254.3.4").is_link_local() && ip("febf::1").is_link_local());
        assert!(!ip("fec0::1").is_link_local() && !ip("169.253.0.1").is_link_local());
        assert_eq!(Ip::from_words(ip("2001:db8::7").to_words()), ip("2001:db8::7"));
        let endpoint: Endpoint = "[::ffff:1.2.3.4]:5".parse::<SocketAddr>().unwrap().into();
        assert_eq!(endpoint.to_string(), "1.2.3.4:5");
    }

    fn record(n: u8) -> HostRecord {
        let identity = HostIdentity {
            boot: (u128::MAX / 3).wrapping_mul(u128::from(n)),
            netns: u64::from(n),
            ivposition: u16::from(n),
        };
        HostRecord::new(identity, &vec![Ip([n; 16]); usize::from(n)])
            .on_machine(u128::MAX / 5 * u128::from(n & 1))
    }

    #[test]
    fn a_record_is_of_its_slots_live_generation() {
        let region = Region::attach(HeapMemory::new(MIN_REGION), 1).unwrap();
        let at = region.claim_slot(5, Prover::None).unwrap();
        assert_eq!(region.host_record(5), None);
        for n in [1, 32, 0] {
            region.write_host_record(at, &record(n));
            assert_eq!(region.host_record(5), Some(record(n)));
        }
        assert_eq!(record(40).addresses().len(), MAX_ADDRESSES);
        // Killed in the middle of writing: no record, until the next owner writes one.
        let sequence = region.geometry().host_record(5);
        region.set_word(sequence, region.word(sequence) | 1);
        assert_eq!(region.host_record(5), None);
        assert_eq!(region.boot_of(at), Some(record(0).boot()));
        region.reclaim(at);
        assert_eq!(region.boot_of(at), None);
        let next = region.claim_slot(5, Prover::None).unwrap();
        assert_eq!((region.host_record(5), region.boot_of(next)), (None, None));
        // Killed while writing its first one: the boot may be half another's.
        region.set_word(sequence, u64::from(next.generation) << SEQUENCE_BITS | 1);
        assert_eq!(region.boot_of(next), None);
        region.write_host_record(next, &record(7));
        assert_eq!(region.host_record(5), Some(record(7)));
        assert_eq!((region.boot_of(next), region.boot_of(at)), (Some(record(7).boot()), None));
        assert_eq!(region.host_record(u16::MAX), None);
        assert_eq!(region.boot_of(SlotRef { index: u16::MAX, generation: 1 }), None);
    }

    #[test]
    fn a_reader_never_sees_two_records_mixed() {
        let memory = Arc::new(HeapMemory::new(MIN_REGION));
        let region = Region::attach(memory.clone(), 1).unwrap();
        let at = region.claim_slot(0, Prover::None).unwrap();
        let writer = std::thread::spawn(move || {
            for n in (0..30).cycle().take(100_000) {
                region.write_host_record(at, &record(n));
            }
        });
        let region = Region::attach(memory, 1).unwrap();
        let mut seen = 0;
        while !writer.is_finished() || seen == 0 {
            if let Some(found) = region.host_record(0) {
                let n = u8::try_from(found.identity.ivposition).unwrap();
                assert_eq!(found, record(n));
                seen += 1;
            }
        }
        writer.join().unwrap();
    }
}
