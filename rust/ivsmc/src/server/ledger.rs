//! What an ivshmem server must still know after its own end, other than descriptors.
//!
//! A memfd that whoever keeps the descriptors (`holder.rs`) keeps, too: who has which id, what each
//! client has been told, and what it is being told now. Each change is one store of one word, made
//! before it is acted on, so that a kill between any two of them leaves the one state or the other.
//!
//! ```text
//!   0      magic, version, vectors, what is about the ivshmem server; the path of its socket
//!   4096   one entry for each id there can be, sparse:
//!            receipt   the message that is being sent, and whether it has been
//!            next      Step, 16 bits vector | 16 bits id | 8 bits kind | 1 bit sending
//!            serial    of the client that has the id; 0: nobody
//!            joined    when, in milliseconds since 1970
//!            told      a bit for each id: the client knows all of its eventfds
//! ```
//!
//! **Telling.** A client must be told each eventfd exactly once: QEMU counts them. So the message and
//! the note that it was sent are one step of the kernel's (`net::send_with_receipt`):
//!
//! | step | a kill after it leaves |
//! | --- | --- |
//! | count of the receipt: 0 | what was before |
//! | `next`: this message, sending | not sent, as the count says |
//! | the message is sent, the count is 8 | sent |
//! | after the last eventfd of an id: its bit in `told` | sent, and the bit |
//! | `next`: what follows, not sending | what follows |

use std::collections::BTreeSet;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ivsmc_proto::memory::Memory;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::file::{self, FileIdentity};
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::net::{RECEIPT_BYTES, RECEIPT_COUNT};

use super::outbox::{Note, Step};

const MAGIC: u64 = u64::from_le_bytes(*b"ivsmcldg");
const VERSION: u64 = 1;

/// Ids there are.
const IDS: u64 = 1 << 16;

/// Offsets of the words of the head.
const AT_MAGIC: u64 = 0;
const AT_VERSION: u64 = 8;
const AT_READY: u64 = 16;
const AT_BOUND: u64 = 24;
const AT_HEAD: u64 = 32;
const AT_SOCKET: u64 = 64;
const AT_PATH_LENGTH: u64 = 128;
const AT_PATH: u64 = 136;
const HEAD_BYTES: u64 = 4096;
/// Bytes of the longest path.
const MAX_PATH: usize = 1024;

/// Offsets in an entry.
const NEXT: u64 = RECEIPT_BYTES;
const SERIAL: u64 = NEXT + 8;
const JOINED: u64 = SERIAL + 8;
const TOLD: u64 = 128;
const ENTRY_BYTES: u64 = TOLD + IDS / 8;
const BYTES: u64 = HEAD_BYTES + IDS * ENTRY_BYTES;
const _: () = assert!(AT_PATH + MAX_PATH as u64 <= HEAD_BYTES);
const _: () = assert!(JOINED + 8 <= TOLD && ENTRY_BYTES % 64 == 0);

/// Bits of the word `next`.
const SENDING: u64 = 1 << 40;
const VERSION_NEXT: u64 = 0;
const OWN_ID_NEXT: u64 = 1;
const REGION_NEXT: u64 = 2;
const VECTORS_NEXT: u64 = 3;
const NOTHING_NEXT: u64 = 4;

/// What stays as it was at the first start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// Eventfds of each id, 1..=256.
    pub(super) vectors: u16,
    /// Ids below it may be those of clients of an ivshmem server before, 0..=65536.
    pub(super) first_id: u32,
    /// Stands in the region for as long as there is this ivshmem server.
    pub(super) instance: u64,
}

/// A client, as it is noted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) id: u16,
    pub(super) serial: u64,
    /// How long ago it joined.
    pub(super) age: Duration,
    /// What it must be told next, because it has been begun.
    pub(super) next: Option<Step>,
    /// Ids of which it knows all eventfds.
    pub(super) told: BTreeSet<u16>,
}

/// The memory that outlives the process. `M` is a [`Mapping`] but in tests.
#[derive(Debug)]
pub(super) struct Ledger<M = Mapping> {
    memory: M,
    /// As in [`Head`].
    vectors: u16,
}

impl Ledger {
    /// One that notes nothing yet, and is not [ready](Ledger::is_ready).
    pub(super) fn new(head: Head, path: &[u8]) -> io::Result<Self> {
        let fd = file::memfd(c"ivsmc-ledger")?;
        file::set_size(&fd, BYTES)?;
        file::seal_size(&fd)?;
        file::allocate(&fd, 0..HEAD_BYTES)?;
        let memory = Mapping::map(fd, BYTES)?;
        Self::begin(memory, head, path).ok_or_else(|| io::Error::other("its path is too long"))
    }

    /// The one that was kept, or why it cannot be used.
    pub(super) fn open(fd: Fd) -> Result<Self, String> {
        if !file::is_sealed_against_shrinking(&fd) {
            return Err("what was kept as its ledger is none".into());
        }
        let memory = Mapping::map(fd, BYTES)
            .map_err(|error| format!("the ledger that was kept cannot be used: {error}"))?;
        Self::read(memory)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// Backs the entry of `id` with memory, so that nothing that is noted there can fail.
    pub(super) fn reserve(&self, id: u16) -> io::Result<()> {
        let at = entry(id);
        self.memory.reserve(at..at + ENTRY_BYTES)
    }

    /// Where the receipt for a message to `id` is to be.
    pub(super) fn receipt(&self, id: u16) -> (&Mapping, u64) {
        (&self.memory, entry(id))
    }
}

impl<M: Memory> Ledger<M> {
    fn begin(memory: M, head: Head, path: &[u8]) -> Option<Self> {
        if path.len() > MAX_PATH {
            return None;
        }
        let words = [u64::from(head.vectors), u64::from(head.first_id), head.instance];
        for (word, at) in words.into_iter().zip((AT_HEAD..).step_by(8)) {
            memory.store(at, word, Ordering::Relaxed);
        }
        memory.write(AT_PATH, path);
        memory.store(AT_PATH_LENGTH, path.len() as u64, Ordering::Relaxed);
        memory.store(AT_VERSION, VERSION, Ordering::Relaxed);
        memory.store(AT_MAGIC, MAGIC, Ordering::Release);
        Some(Self { memory, vectors: head.vectors })
    }

    fn read(memory: M) -> Result<Self, String> {
        let word = |at| memory.load(at, Ordering::Acquire);
        if word(AT_MAGIC) != MAGIC || word(AT_VERSION) != VERSION {
            return Err(
                "what was kept is of another version of ivsmc; it can be taken over only by \
                 that one, or thrown away when the VMs have ended"
                    .into(),
            );
        }
        let vectors = u16::try_from(word(AT_HEAD)).map_err(|_| "the ledger is damaged")?;
        Ok(Self { memory, vectors })
    }

    pub(super) fn head(&self) -> Head {
        let word = |index: u64| self.word(AT_HEAD + 8 * index);
        Head {
            vectors: self.vectors,
            first_id: u32::try_from(word(1)).unwrap_or(1 << 16),
            instance: word(2),
        }
    }

    /// Where clients connect.
    pub(super) fn path(&self) -> Vec<u8> {
        let length = usize::try_from(self.word(AT_PATH_LENGTH)).unwrap_or(MAX_PATH).min(MAX_PATH);
        let mut path = vec![0; length];
        ivsmc_shm::mem::with_uninit(&mut path, |path| self.memory.read(AT_PATH, path));
        path
    }

    /// Which file is the name of its socket.
    pub(super) fn socket(&self) -> FileIdentity {
        FileIdentity { device: self.word(AT_SOCKET), inode: self.word(AT_SOCKET + 8) }
    }

    /// Notes [`Ledger::socket`].
    pub(super) fn set_socket(&self, identity: FileIdentity) {
        self.set(AT_SOCKET, identity.device);
        self.set(AT_SOCKET + 8, identity.inode);
    }

    /// All that a successor needs is kept from now on.
    pub(super) fn set_ready(&self) {
        self.set(AT_READY, 1);
    }

    /// Whether all that a successor needs was kept.
    pub(super) fn is_ready(&self) -> bool {
        self.word(AT_READY) != 0
    }

    /// Notes that the client `serial` has `id` from now on, and has been told nothing.
    pub(super) fn enter(&self, id: u16, serial: u64) {
        let at = entry(id);
        for word in (0..self.bound().div_ceil(64)).map(|index| at + TOLD + 8 * index) {
            self.set(word, 0);
        }
        self.set(at + RECEIPT_COUNT, 0);
        self.set(at + NEXT, to_word(Some(Step { note: Note::Version, vector: 0 })));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.set(at + JOINED, u64::try_from(now.as_millis()).unwrap_or(0));
        self.set(AT_BOUND, self.bound().max(u64::from(id) + 1));
        self.set(at + SERIAL, serial);
    }

    /// Notes that nobody has `id` any more.
    pub(super) fn leave(&self, id: u16) {
        self.set(entry(id) + SERIAL, 0);
    }

    /// Notes that `step` is about to be told to `id`: with the receipt of [`Ledger::receipt`].
    pub(super) fn sending(&self, id: u16, step: Step) {
        let at = entry(id);
        self.set(at + RECEIPT_COUNT, 0);
        self.set(at + NEXT, to_word(Some(step)) | SENDING);
    }

    /// Notes that `step` was told to `id`.
    pub(super) fn sent(&self, id: u16, step: Step) {
        let at = entry(id);
        let next = step.next(self.vectors);
        if let (Note::Vectors(peer), None) = (step.note, next) {
            let word = at + TOLD + 8 * (u64::from(peer) / 64);
            self.memory.fetch_or(word, 1 << (peer % 64));
        }
        self.set(at + NEXT, to_word(next));
    }

    /// Who is noted, by id, as far as the last kill let it come.
    pub(super) fn entries(&self) -> Vec<Entry> {
        (0..self.bound())
            .filter_map(|id| u16::try_from(id).ok())
            .filter_map(|id| self.entry(id))
            .collect()
    }

    fn entry(&self, id: u16) -> Option<Entry> {
        let at = entry(id);
        let serial = Some(self.word(at + SERIAL)).filter(|serial| *serial != 0)?;
        let word = self.word(at + NEXT);
        let mut next = to_step(word & !SENDING);
        if let (Some(step), true) = (next, word & SENDING != 0) {
            if self.word(at + RECEIPT_COUNT) != 0 {
                self.sent(id, step);
                next = step.next(self.vectors);
            }
        }
        let joined = Duration::from_millis(self.word(at + JOINED));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let told = (0..self.bound().div_ceil(64))
            .flat_map(|index| {
                let word = self.word(at + TOLD + 8 * index);
                (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| 64 * index + bit)
            })
            .filter_map(|id| u16::try_from(id).ok())
            .collect();
        // Of an id that is only about to be told nothing is known: it may be gone.
        let next = next.filter(|step| step.vector > 0 || !matches!(step.note, Note::Vectors(_)));
        Some(Entry { id, serial, age: now.saturating_sub(joined), next, told })
    }

    /// Ids that were entered are below it.
    fn bound(&self) -> u64 {
        self.word(AT_BOUND).min(IDS)
    }

    fn word(&self, at: u64) -> u64 {
        self.memory.load(at, Ordering::Acquire)
    }

    /// Release: who reads after a kill finds this word only if it finds those stored before.
    fn set(&self, at: u64, value: u64) {
        self.memory.store(at, value, Ordering::Release);
    }
}

const fn entry(id: u16) -> u64 {
    HEAD_BYTES + id as u64 * ENTRY_BYTES
}

fn to_word(step: Option<Step>) -> u64 {
    let Some(Step { note, vector }) = step else { return NOTHING_NEXT << 32 };
    let (kind, id) = match note {
        Note::Version => (VERSION_NEXT, 0),
        Note::OwnId => (OWN_ID_NEXT, 0),
        Note::Region => (REGION_NEXT, 0),
        Note::Vectors(id) => (VECTORS_NEXT, id),
    };
    kind << 32 | u64::from(id) << 16 | u64::from(vector)
}

/// `None` where nothing has been begun.
fn to_step(word: u64) -> Option<Step> {
    #[allow(clippy::cast_possible_truncation)] // 16 bits each
    let (vector, id) = (word as u16, (word >> 16) as u16);
    let note = match word >> 32 {
        VERSION_NEXT => Note::Version,
        OWN_ID_NEXT => Note::OwnId,
        REGION_NEXT => Note::Region,
        VECTORS_NEXT => Note::Vectors(id),
        _ => return None,
    };
    Some(Step { note, vector })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeMap;
    use std::mem::MaybeUninit;

    use ivsmc_shm::net;

    use super::super::outbox::Outbox;
    use super::*;

    const HEAD: Head = Head { vectors: 2, first_id: 3, instance: 9 };
    const OWN: u16 = 100;

    fn memory() -> Mapping {
        let fd = file::memfd(c"ledger").unwrap();
        file::set_size(&fd, BYTES).unwrap();
        Mapping::map(fd, BYTES).unwrap()
    }

    /// The memory of a process that is killed after so many steps: what it does then is not done.
    struct Killed<'a> {
        memory: &'a Mapping,
        steps_left: Cell<usize>,
    }

    impl Killed<'_> {
        fn step(&self, act: impl FnOnce()) {
            if let Some(left) = self.steps_left.get().checked_sub(1) {
                self.steps_left.set(left);
                act();
            }
        }
    }

    impl Memory for Killed<'_> {
        fn len(&self) -> u64 {
            self.memory.len()
        }
        fn load(&self, at: u64, order: Ordering) -> u64 {
            self.memory.load(at, order)
        }
        fn store(&self, at: u64, value: u64, order: Ordering) {
            self.step(|| self.memory.store(at, value, order));
        }
        fn fetch_or(&self, at: u64, bits: u64) -> u64 {
            let before = self.memory.load(at, Ordering::Acquire);
            self.step(|| self.memory.store(at, before | bits, Ordering::Release));
            before
        }
        fn write(&self, at: u64, from: &[u8]) {
            self.step(|| self.memory.write(at, from));
        }
        fn read(&self, at: u64, into: &mut [MaybeUninit<u8>]) {
            self.memory.read(at, into);
        }
        fn swap(&self, _: u64, _: u64) -> u64 {
            unreachable!("the ledger has one writer")
        }
        fn compare_exchange(&self, _: u64, _: u64, _: u64) -> Result<u64, u64> {
            unreachable!("the ledger has one writer")
        }
        fn fence(&self) {}
    }

    /// Tells `OWN` up to `most` messages over `socket`, as `client.rs` does.
    fn tell(ledger: &Ledger<Killed<'_>>, outbox: &mut Outbox, socket: &Fd, most: usize) {
        for _ in 0..most {
            let Some(step) = outbox.next() else { return };
            let bytes = step.message(OWN, HEAD.vectors).unwrap().to_bytes();
            ledger.sending(OWN, step);
            let memory = ledger.memory.memory;
            ledger.memory.step(|| {
                net::send_with_receipt(socket, &bytes, None, memory, entry(OWN)).unwrap();
            });
            ledger.sent(OWN, step);
            outbox.sent();
        }
    }

    /// All that came over the socket.
    fn heard(socket: &Fd) -> Vec<i64> {
        let mut bytes = [0; 8];
        let mut numbers = Vec::new();
        while let Ok(8) = net::recv_bytes(socket, &mut bytes, net::MSG_DONTWAIT) {
            numbers.push(i64::from_le_bytes(bytes));
        }
        numbers
    }

    #[test]
    fn wherever_it_is_killed_each_client_is_told_everything_once() {
        let mut kills = 0;
        loop {
            let memory = memory();
            let before = Ledger::begin(&memory, HEAD, b"/path").unwrap();
            before.set_ready();
            // Somebody had that id, and knew things.
            before.enter(OWN, 6);
            before.sent(OWN, Step { note: Note::Vectors(1), vector: 1 });
            before.sent(OWN, Step { note: Note::Vectors(2), vector: 0 });
            before.leave(OWN);
            let (near, far) = net::socketpair_stream().unwrap();
            // The first life: a welcome, one that joins, two that leave, one of them half told.
            let killed = Killed { memory: &memory, steps_left: Cell::new(kills) };
            let ledger = Ledger { memory: killed, vectors: HEAD.vectors };
            for id in [0, 1, 2] {
                ledger.enter(id, u64::from(id) + 1);
            }
            ledger.enter(OWN, 7);
            let mut outbox = Outbox::new(OWN, HEAD.vectors, [0, 1, 2].into_iter());
            tell(&ledger, &mut outbox, &near, 6); // 0, and half of 1
            for id in [1, 2] {
                ledger.leave(id);
                outbox.left(id);
            }
            ledger.enter(4, 8);
            outbox.joined(4);
            tell(&ledger, &mut outbox, &near, usize::MAX);
            ledger.leave(0);
            let is_over = ledger.memory.steps_left.get() > 0;

            // The second one finds who is there, and tells what is left to tell.
            let killed = Killed { memory: &memory, steps_left: Cell::new(usize::MAX) };
            let ledger = Ledger::read(killed).unwrap();
            assert_eq!((ledger.head(), ledger.path()), (HEAD, b"/path".to_vec()));
            let entries: BTreeMap<u16, Entry> =
                ledger.entries().into_iter().map(|entry| (entry.id, entry)).collect();
            let said = heard(&far);
            let Some(own) = entries.get(&OWN) else {
                assert_eq!(said, [], "killed after {kills}");
                kills += 1;
                continue;
            };
            assert_eq!(own.serial, 7);
            let there = || entries.keys().copied();
            let (next, told) = (own.next, own.told.clone());
            let mut outbox = Outbox::resumed(OWN, HEAD.vectors, next, told, there());
            tell(&ledger, &mut outbox, &near, usize::MAX);
            let all = [said, heard(&far)].concat();
            assert_eq!(all[..3], [0, i64::from(OWN), -1], "killed after {kills}");
            let mut counts = BTreeMap::new();
            for pair in all[3..].chunks(2) {
                // All vectors of an id one after the other, and each id once.
                assert_eq!(pair[0], pair[1], "killed after {kills}: {all:?}");
                assert_eq!(counts.insert(pair[0], ()), None, "killed after {kills}: {all:?}");
            }
            for id in there() {
                assert!(counts.contains_key(&i64::from(id)), "killed after {kills}: {all:?}");
            }
            // And that is known to a third.
            let own = ledger.entries().into_iter().find(|entry| entry.id == OWN).unwrap();
            assert_eq!(own.next, None);
            assert!(counts.keys().eq(own
                .told
                .iter()
                .map(|id| i64::from(*id))
                .collect::<Vec<_>>()
                .iter()));
            if is_over {
                assert!(kills > 50, "{kills}");
                return;
            }
            kills += 1;
        }
    }

    #[test]
    fn who_has_an_id_anew_knows_nothing() {
        let memory = memory();
        let ledger = Ledger::begin(&memory, HEAD, b"").unwrap();
        for (serial, id) in [(1, 70), (2, 3)] {
            ledger.enter(id, serial);
            ledger.sent(3, Step { note: Note::Vectors(70), vector: 1 });
        }
        assert_eq!(ledger.entries()[0].told, BTreeSet::from([70]));
        ledger.leave(3);
        ledger.enter(3, 5);
        let Entry { id, serial, next, told, .. } = ledger.entries().remove(0);
        let welcome = Some(Step { note: Note::Version, vector: 0 });
        assert_eq!((id, serial, next, told), (3, 5, welcome, BTreeSet::new()));
    }

    #[test]
    fn what_was_not_kept_ready_or_by_another_version_is_not_used() {
        let ledger = Ledger::new(HEAD, b"/path").unwrap();
        let again = || Fd::from(ledger.fd().try_clone_to_owned().unwrap());
        assert!(!Ledger::open(again()).unwrap().is_ready());
        ledger.set_ready();
        assert!(Ledger::open(again()).unwrap().is_ready());
        ledger.set(AT_VERSION, VERSION + 1);
        assert!(Ledger::open(again()).unwrap_err().contains("another version"));
        assert!(Ledger::open(file::memfd(c"other").unwrap()).is_err());
    }
}
