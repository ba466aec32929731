//! A scratch directory, a server on a thread, and a client that speaks and checks the protocol.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{mpsc, Arc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ivsmc::server::{Backing, Event, Server, ServerHandle, ServerOptions};
use ivsmc::Plain;
use ivsmc_proto::ivshmem::{ClientEvent, ClientProtocol};
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotRef};
use ivsmc_shm::fd::Fd;
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::poll::EventFd;
use ivsmc_shm::{file, net};

pub(crate) const MIB: u64 = 1 << 20;
/// A hang is a failure: long enough for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A directory of its own, removed at the end.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ivsmc-server-{}-{number}", std::process::id());
        // Not the temporary directory, which may be on a file system that shares no memory.
        let path = Path::new("/dev/shm").join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        Scratch(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn names(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// A small server at `ivs.sock` in it.
    pub(crate) fn options(&self) -> ServerOptions {
        ServerOptions {
            backing: Backing::Memfd { size: MIB },
            ..ServerOptions::new(self.path("ivs.sock"))
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A server that serves on a thread.
pub(crate) struct Served {
    pub(crate) server: Arc<Server>,
    handle: ServerHandle,
    events: mpsc::Receiver<Event>,
    thread: Option<JoinHandle<ivsmc::Result<()>>>,
}

impl Served {
    pub(crate) fn start(options: ServerOptions) -> Served {
        Served::run(Arc::new(Server::new(options).unwrap()))
    }

    pub(crate) fn run(server: Arc<Server>) -> Served {
        let (send, events) = mpsc::channel();
        let handle = server.handle();
        let serving = Arc::clone(&server);
        let thread = std::thread::spawn(move || {
            serving.serve(&Plain, |event| {
                let _ = send.send(event);
            })
        });
        Served { server, handle, events, thread: Some(thread) }
    }

    pub(crate) fn event(&self) -> Event {
        self.events.recv_timeout(PATIENCE).unwrap()
    }

    pub(crate) fn past_events(&self) -> impl Iterator<Item = Event> + '_ {
        self.events.try_iter()
    }

    /// Waits until `count` clients are there.
    pub(crate) fn wait_for_clients(&self, count: usize) {
        let until = Instant::now() + PATIENCE;
        while self.server.status().unwrap().clients.len() != count {
            assert!(Instant::now() < until, "it does not serve");
            std::thread::yield_now();
        }
    }

    /// Stops serving; the server itself goes on to exist.
    pub(crate) fn stop(mut self) -> Arc<Server> {
        self.end();
        Arc::clone(&self.server)
    }

    fn end(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.handle.stop();
            thread.join().unwrap().unwrap();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.end();
    }
}

/// A client that speaks the protocol, and checks it.
pub(crate) struct Client {
    pub(crate) socket: UnixStream,
    protocol: ClientProtocol,
    pub(crate) id: u16,
    pub(crate) region: Option<Fd>,
    pub(crate) own: Vec<EventFd>,
    /// The vectors of the others that were told so far.
    pub(crate) peers: BTreeMap<u16, Vec<EventFd>>,
}

impl Client {
    /// Connects and reads nothing.
    pub(crate) fn connect(path: &Path) -> Client {
        Client::over(UnixStream::connect(path).unwrap())
    }

    /// One that is connected by `socket`.
    pub(crate) fn over(socket: UnixStream) -> Client {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Client {
            socket,
            protocol: ClientProtocol::new(),
            id: 0,
            region: None,
            own: Vec::new(),
            peers: BTreeMap::new(),
        }
    }

    /// Connects and reads all of the welcome.
    pub(crate) fn join(path: &Path, vectors: usize) -> Client {
        let mut client = Client::connect(path);
        client.read_until(|client| client.own.len() == vectors);
        client
    }

    /// One message, not taken note of; `None` if the server has ended the connection.
    pub(crate) fn raw(&self, flags: i32) -> io::Result<Option<(i64, Option<Fd>)>> {
        let mut bytes = [0; 8];
        let (count, passed) = net::recv_with_fd(&self.socket, &mut bytes, flags)?;
        match count {
            0 => Ok(None),
            8 => Ok(Some((i64::from_le_bytes(bytes), passed.one()))),
            other => panic!("{other} bytes"),
        }
    }

    /// The next message: its number, and whether a descriptor came with it.
    pub(crate) fn read(&mut self) -> (i64, bool) {
        let (value, fd) = self.raw(0).unwrap().expect("the server has ended the connection");
        self.take(value, fd)
    }

    pub(crate) fn take(&mut self, value: i64, fd: Option<Fd>) -> (i64, bool) {
        let seen = (value, fd.is_some());
        let event = self.protocol.message(value, fd.is_some()).unwrap();
        match (event, fd) {
            (ClientEvent::OwnId(id), None) => self.id = id,
            (ClientEvent::Region, Some(fd)) => self.region = Some(fd),
            (ClientEvent::OwnVector { vector }, Some(fd)) => {
                assert_eq!(usize::from(vector), self.own.len());
                self.own.push(EventFd::adopt(fd).unwrap());
            }
            (ClientEvent::PeerVector { peer, vector }, Some(fd)) => {
                assert_ne!(peer, self.id);
                let vectors = self.peers.entry(peer).or_default();
                assert_eq!(usize::from(vector), vectors.len());
                vectors.push(EventFd::adopt(fd).unwrap());
            }
            (ClientEvent::PeerLeft { peer }, _) => {
                panic!("QEMU would die of it if {peer} came back")
            }
            _ => {}
        }
        seen
    }

    pub(crate) fn read_until(&mut self, done: impl Fn(&Client) -> bool) {
        while !done(self) {
            self.read();
        }
    }

    /// Reads until it knows `count` others, with `vectors` each.
    pub(crate) fn read_until_peers(&mut self, count: usize, vectors: usize) {
        self.read_until(|client| {
            client.peers.len() == count && client.peers.values().all(|all| all.len() == vectors)
        });
    }

    /// Reads what is there now, without waiting; how many messages.
    pub(crate) fn read_ready(&mut self) -> usize {
        let mut count = 0;
        while let Ok(message) = self.raw(net::MSG_DONTWAIT) {
            let (value, fd) = message.expect("the server has ended the connection");
            self.take(value, fd);
            count += 1;
        }
        count
    }

    pub(crate) fn attach(&self) -> Region<Mapping> {
        let fd = self.region.as_ref().unwrap();
        let size = file::status(fd).unwrap().size;
        Region::attach(Mapping::map(fd.try_clone().unwrap(), size).unwrap(), 1).unwrap()
    }

    /// Claims a slot whose prover is the server.
    pub(crate) fn claim(&self, region: &Region<Mapping>) -> SlotRef {
        let free = region.unclaimed().next().unwrap();
        region.claim_slot(free, Prover::IvPosition(self.id)).unwrap()
    }
}

/// The same file through another open file.
pub(crate) fn reopened(fd: &Fd) -> Fd {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Fd::from(OwnedFd::from(fs::File::options().read(true).write(true).open(path).unwrap()))
}
