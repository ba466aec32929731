//! What is there when somebody dies: a region, a listener that echoes, and a neighbour that streams.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{mpsc, Arc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ivsmc_proto::reclaim::Census;
use ivsmc_proto::region::Region;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::file::{self, Access};
use ivsmc_shm::mapping::Mapping;

use super::process::{Process, PATIENCE};
use super::roles::{byte, listen_options, recv, SIZE};
use crate::agent::tests::stand_in::SIZE as AGENTS_SIZE;
use crate::device::tests::Scratch;
use crate::server::{Backing, Server, ServerHandle, ServerOptions};
use crate::{open_device, Error, Listener, Plain, Session, Timeout};

/// The first bytes of those who stream.
const NEIGHBOUR: u8 = 1;
const NEWCOMER: u8 = 2;
const VICTIM: u8 = 3;

/// Between two looks at what others do.
const LOOK: Duration = Duration::from_millis(1);

/// What the device is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ground {
    /// A file.
    File,
    /// A file that is an agent's device, too.
    AgentsFile,
    /// An ivshmem server of this process, on a file.
    Host,
}

/// What the dead one leaves, beside what was there.
#[derive(Clone, Copy)]
pub(super) enum Leaves {
    /// This, until somebody looks.
    Exactly(Census),
    /// Nothing, soon: those who have to do with it find it dead.
    Nothing,
    /// It depends on who is faster.
    Something,
}

pub(super) const NONE: Census = Census {
    live: 0,
    dead: 0,
    listeners: 0,
    intents: 0,
    extents: 0,
    dmbs_held: 0,
    dmbs_attached: 0,
};

/// A live slot.
pub(super) const LIVE: Census = Census { live: 1, ..NONE };

pub(super) struct Stage {
    scratch: Scratch,
    device: String,
    observer: Region<Mapping>,
    listener: Arc<Listener>,
    /// Never accepts.
    quiet: Listener,
    accepting: Option<JoinHandle<()>>,
    /// "smc 0 reset": how sessions of victims ended.
    ends: mpsc::Receiver<String>,
    neighbour: Option<Process>,
    neighbours_bytes: Arc<AtomicU64>,
    baseline: Census,
    served: Option<Served>,
}

impl Stage {
    pub(super) fn new(ground: Ground) -> Self {
        let scratch = Scratch::new();
        let size = if ground == Ground::AgentsFile { AGENTS_SIZE } else { SIZE };
        scratch.file("region", size);
        Self::on(scratch, ground)
    }

    /// On the file "region" that is there.
    pub(super) fn on(scratch: Scratch, ground: Ground) -> Self {
        if ground == Ground::Host {
            let (served, device) = host(&scratch);
            let mut stage = Self::with(scratch, device);
            stage.served = Some(served);
            return stage;
        }
        let device = format!("file:{}", scratch.path().join("region").display());
        Self::with(scratch, device)
    }

    /// Through `device`, which leads to the file "region" that is there.
    pub(super) fn with(scratch: Scratch, device: String) -> Self {
        crate::set_match_wait(Some(PATIENCE));
        let fd = file::open_nofollow(&scratch.path().join("region"), Access::Existing).unwrap();
        let size = file::status(&fd).unwrap().size;
        let observer = Region::attach(Mapping::map(fd, size).unwrap(), 1).unwrap();
        let [listener, quiet] = [(); 2].map(|()| {
            let socket = TcpListener::bind("127.0.0.1:0").unwrap();
            Listener::adopt(Fd::from(OwnedFd::from(socket)), listen_options(&device)).unwrap()
        });
        let listener = Arc::new(listener);
        let (report, ends) = mpsc::channel();
        let neighbours_bytes = Arc::<AtomicU64>::default();
        let accepting = std::thread::spawn({
            let (listener, bytes) = (Arc::clone(&listener), Arc::clone(&neighbours_bytes));
            move || accept_all(&listener, &report, &bytes)
        });
        let mut stage = Self {
            scratch,
            device,
            observer,
            listener,
            quiet,
            accepting: Some(accepting),
            ends,
            neighbour: None,
            neighbours_bytes,
            baseline: NONE,
            served: None,
        };
        let mut neighbour = stage.client(NEIGHBOUR, 0, None);
        neighbour.hear("connected smc");
        stage.neighbour = Some(neighbour);
        stage.neighbour_goes_on();
        // Whoever has had a session keeps an extent.
        stage.newcomer();
        stage.baseline = until("a session to be over", || {
            let census = stage.observer.census();
            let two = Census { live: 2, listeners: 2, extents: 2, ..NONE };
            (census == Census { dmbs_held: 2, dmbs_attached: 2, ..two }).then_some(census)
        });
        // Else this process would find the dead one while it looks for who had that session.
        let device = open_device(&stage.device).unwrap();
        until("its DMB", || (device.region().unwrap().own.limbo == 0).then_some(()));
        stage
    }

    pub(super) fn device(&self) -> &str {
        &self.device
    }

    pub(super) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    pub(super) fn observer(&self) -> &Region<Mapping> {
        &self.observer
    }

    /// Where a listener is that never accepts.
    pub(super) fn quiet(&self) -> &Listener {
        &self.quiet
    }

    pub(super) fn path(&self) -> PathBuf {
        self.scratch.path().join("region")
    }

    fn client(&self, seed: u8, rounds: u64, at: Option<(&str, usize)>) -> Process {
        self.client_of(self.listener.local_addr(), seed, rounds, at)
    }

    fn client_of(
        &self,
        address: SocketAddr,
        seed: u8,
        rounds: u64,
        at: Option<(&str, usize)>,
    ) -> Process {
        let (address, seed, rounds) = (address.to_string(), seed.to_string(), rounds.to_string());
        Process::start(&["client", &self.device, &address, &seed, &rounds], at)
    }

    /// A client of the listener that is to die at `name`; 0 rounds: it streams until it does.
    pub(super) fn victim(&self, rounds: u64, name: &str) -> Process {
        self.client(VICTIM, rounds, Some((name, 1)))
    }

    /// As [`Stage::victim`], held at `name`.
    pub(super) fn held_victim(&self, rounds: u64, name: &str) -> Process {
        let address = self.listener.local_addr().to_string();
        let (seed, rounds) = (VICTIM.to_string(), rounds.to_string());
        Process::start_held(&["client", &self.device, &address, &seed, &rounds], name)
    }

    /// A client of the listener that streams three rounds and then waits for more than there is.
    pub(super) fn sleeper(&self, name: &str) -> Process {
        let (address, seed) = (self.listener.local_addr().to_string(), VICTIM.to_string());
        Process::start(&["sleeper", &self.device, &address, &seed], Some((name, 1)))
    }

    /// A client of somebody else.
    pub(super) fn victim_of(&self, address: SocketAddr, name: &str) -> Process {
        self.client_of(address, VICTIM, 1, Some((name, 1)))
    }

    /// Waits until the dead one left what it is to leave.
    pub(super) fn is_left(&self, leaves: Leaves) {
        match leaves {
            Leaves::Exactly(left) => self.is_left_one_of(&[left]),
            Leaves::Nothing => self.is_left_one_of(&[NONE]),
            Leaves::Something => {}
        }
    }

    /// Waits until one of these is left.
    pub(super) fn is_left_one_of(&self, left: &[Census]) {
        let b = self.baseline;
        let expected = left.iter().map(|left| Census {
            live: b.live + left.live,
            dead: b.dead + left.dead,
            listeners: b.listeners + left.listeners,
            intents: b.intents + left.intents,
            extents: b.extents + left.extents,
            dmbs_held: b.dmbs_held + left.dmbs_held,
            dmbs_attached: b.dmbs_attached + left.dmbs_attached,
        });
        let expected: Vec<_> = expected.collect();
        let mut last = NONE;
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            last = self.observer.census();
            if expected.contains(&last) {
                return;
            }
            std::thread::sleep(LOOK);
        }
        panic!("{last:?} instead of {expected:?}");
    }

    /// Waits for the ends of the sessions of the victim; `*` stands for any number of bytes.
    pub(super) fn hears(&self, expected: &[&str]) {
        for end in expected {
            let heard = self.ends.recv_timeout(PATIENCE).unwrap();
            let is_any = end.contains('*');
            let words: Vec<_> = heard.split(' ').collect();
            let said = if is_any { format!("{} * {}", words[0], words[2]) } else { heard };
            assert_eq!(said, *end);
        }
    }

    /// The neighbour's stream is what it was.
    pub(super) fn neighbour_goes_on(&self) {
        let bytes = || self.neighbours_bytes.load(Ordering::Relaxed);
        let before = bytes();
        // More than there can be on the way.
        let _: () = until("the neighbour's bytes", || (bytes() - before > 200_000).then_some(()));
    }

    /// Somebody attaches, connects and leaves.
    pub(super) fn newcomer(&self) {
        let mut newcomer = self.client(NEWCOMER, 3, None);
        newcomer.hear("connected smc");
        newcomer.ends();
    }

    /// A newcomer comes, and all is as before the victim came.
    pub(super) fn heals(mut self) {
        self.neighbour_goes_on();
        self.newcomer();
        self.is_left(Leaves::Nothing);
        self.end();
    }

    /// As [`Stage::heals`], now that an ivshmem server is there (again).
    pub(super) fn heals_by(mut self, served: Served) {
        self.served = Some(served);
        self.heals();
    }

    fn end(&mut self) {
        self.neighbour.take().unwrap().ends();
        self.listener.close();
        self.accepting.take().unwrap().join().unwrap();
        let unexpected: Vec<_> = self.ends.try_iter().collect();
        assert!(unexpected.is_empty(), "{unexpected:?}");
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // If a test failed; else they have ended.
        self.neighbour = None;
        self.listener.close();
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

/// An ivshmem server of this process; dropping it ends it.
pub(super) struct Served {
    handle: ServerHandle,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An ivshmem server on "region" in this directory, and its device.
pub(super) fn host(scratch: &Scratch) -> (Served, String) {
    let socket = scratch.path().join("ivs.sock");
    let device = format!("host:{}", socket.display());
    (serve(socket, scratch.path().join("region")), device)
}

/// Serves the region in the file at `region`.
pub(super) fn serve(socket: PathBuf, region: PathBuf) -> Served {
    let backing = Backing::File { path: region, size: Some(SIZE) };
    let server = Server::new(ServerOptions { backing, ..ServerOptions::new(socket) }).unwrap();
    let handle = server.handle();
    let thread = std::thread::spawn(move || server.serve(&Plain, |_| {}).unwrap());
    Served { handle, thread: Some(thread) }
}

pub(super) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(LOOK);
    }
}

/// Echoes to all who come, until the listener is closed and they have ended.
fn accept_all(listener: &Listener, report: &mpsc::Sender<String>, neighbours: &AtomicU64) {
    std::thread::scope(|scope| {
        while let Ok((session, _)) = listener.accept(Timeout::Never, &Plain) {
            scope.spawn(move || {
                let transport = if session.is_smc() { "smc" } else { "tcp" };
                let (seed, count, end) = echo(&session, neighbours);
                // Any other comes after the death of a victim, or has failed itself.
                if seed.is_none_or(|seed| seed == VICTIM) {
                    let _ = report.send(format!("{transport} {count} {end}"));
                }
            });
        }
    });
}

/// Sends everything back, having looked whether it is the one stream that it can be; how it ended.
fn echo(session: &Session, neighbours: &AtomicU64) -> (Option<u8>, u64, String) {
    let (mut seed, mut count) = (None, 0);
    let mut bytes = [0; 8 << 10];
    loop {
        match recv(session, &mut bytes) {
            Ok(0) => return (seed, count, "eof".into()),
            Ok(got) => {
                let first = *seed.get_or_insert(bytes[0]);
                for (at, found) in (count..).zip(&bytes[..got]) {
                    assert_eq!(*found, byte(first, at), "byte {at} of stream {first}");
                }
                count += got as u64;
                if first == NEIGHBOUR {
                    neighbours.store(count, Ordering::Relaxed);
                }
                match session.send_all(&bytes[..got], Timeout::Never, &Plain) {
                    // What came before the end is still to be read.
                    Ok(()) | Err(Error::BrokenPipe) => {}
                    Err(Error::Reset) => return (seed, count, "reset".into()),
                    Err(error) => return (seed, count, error.to_string()),
                }
            }
            Err(Error::Reset) => return (seed, count, "reset".into()),
            Err(error) => return (seed, count, error.to_string()),
        }
    }
}
