//! What the tests set sessions up with: regions of their own, listeners, and a peer on the region
//! that does only what it is told.

use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ivsmc::{ConnectOptions, ListenOptions, Listener, Plain, RecvFlags, Result, Session, Timeout};
use ivsmc_proto::directory::{Bound, ListenerEntry};
use ivsmc_proto::host::{Endpoint, HostIdentity, HostRecord};
use ivsmc_proto::intent::{IntentKey, IntentRef, IntentState};
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotRef, SlotState};
use ivsmc_shm::fd::Fd;
use ivsmc_shm::file::{self, Access, BootId};
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::mem::with_uninit;
use ivsmc_shm::net;

/// No step of a test takes nearly as long.
pub(crate) const LONG: Timeout = Timeout::After(Duration::from_secs(20));

/// A busy machine may halt the other thread for longer than connects wait by default.
const MATCH_WAIT: Duration = Duration::from_secs(2);

/// A file that is a region, gone with the test.
pub(crate) struct RegionFile {
    path: PathBuf,
}

impl RegionFile {
    pub(crate) fn new(size: u64) -> Self {
        ivsmc::set_match_wait(Some(MATCH_WAIT));
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("/dev/shm/ivsmc-setup-{}-{number}", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        Self { path }
    }

    pub(crate) fn device(&self) -> Option<String> {
        Some(format!("file:{}", self.path.display()))
    }

    /// A peer on the region that is not ivsmc.
    pub(crate) fn peer(&self) -> Peer {
        let fd = file::open_nofollow(&self.path, Access::Existing).unwrap();
        let size = file::status(&fd).unwrap().size;
        let mapping = Mapping::map(fd, size).unwrap();
        let region = Region::attach(Arc::new(mapping), file::random_u128().unwrap()).unwrap();
        let free =
            (0..region.geometry().slots()).find_map(|index| match region.slot_state(index) {
                SlotState::Free { .. } => region.claim_slot(index, Prover::None),
                _ => None,
            });
        let me = free.unwrap();
        let (boot, mask) = match file::boot_id().unwrap() {
            BootId::Kernels(id) => (id, 0),
            BootId::Masked { mask } => (0, mask),
        };
        let netns = net::netns_cookie(net::tcp_socket(net::Family::V4).unwrap()).unwrap();
        let identity = HostIdentity { boot, netns: netns ^ mask, ivposition: 0 };
        region.write_host_record(me, &HostRecord::new(identity, &[]));
        Peer { region, me }
    }
}

impl Drop for RegionFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A peer that does what a test tells it.
pub(crate) struct Peer {
    pub(crate) region: Region<Arc<Mapping>>,
    pub(crate) me: SlotRef,
}

impl Peer {
    /// Claims to listen on `listener`'s port.
    pub(crate) fn register(&self, listener: &TcpListener) -> ListenerEntry {
        let port = listener.local_addr().unwrap().port();
        self.region.register_listener(self.me, Bound::Any4, port).unwrap()
    }

    /// The intent for a connection just accepted.
    pub(crate) fn intent(&self, conn: &TcpStream) -> IntentRef {
        let key = IntentKey {
            client: Endpoint::from(conn.peer_addr().unwrap()),
            server: Endpoint::from(conn.local_addr().unwrap()),
        };
        until("an intent that is pending", || match self.region.find_intent(&key) {
            Some((intent, IntentState::Pending)) => Some(intent),
            _ => None,
        })
    }

    pub(crate) fn match_and_wait(&self, conn: &TcpStream) -> IntentRef {
        let intent = self.intent(conn);
        self.region.match_intent(&intent).unwrap();
        self.wait_for(&intent, Some(IntentState::Committed));
        intent
    }

    pub(crate) fn wait_for(&self, intent: &IntentRef, state: Option<IntentState>) {
        until("a state of the intent", || {
            (self.region.intent_state(intent) == state).then_some(())
        });
    }

    /// Connects to `address` and announces it, as the first part of a client.
    pub(crate) fn announce(&self, address: SocketAddr) -> (TcpStream, IntentRef) {
        let conn = net::tcp_socket(net::Family::V4).unwrap();
        net::bind(&conn, &"127.0.0.1:0".parse().unwrap()).unwrap();
        let key = IntentKey {
            client: Endpoint::from(net::local_addr(&conn).unwrap()),
            server: Endpoint::from(address),
        };
        let intent = self.region.publish_intent(self.me, &key).unwrap();
        net::connect(&conn, &address).unwrap();
        self.region.connected_intent(&intent).unwrap();
        (TcpStream::from(conn.into_owned().unwrap()), intent)
    }

    /// As [`Peer::announce`], and agrees with the acceptor.
    pub(crate) fn commit(&self, address: SocketAddr) -> (TcpStream, IntentRef) {
        let (conn, intent) = self.announce(address);
        self.wait_for(&intent, Some(IntentState::Matched));
        self.region.commit_intent(&intent).unwrap();
        (conn, intent)
    }
}

pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

pub(crate) fn listen_on(address: &str, options: ListenOptions) -> Result<Listener> {
    let socket = TcpListener::bind(address).unwrap();
    Listener::adopt(Fd::from(std::os::fd::OwnedFd::from(socket)), options)
}

pub(crate) fn listen(device: Option<String>) -> Listener {
    listen_on("127.0.0.1:0", ListenOptions { device, ..Default::default() }).unwrap()
}

/// How to connect over IPv4: from a loopback address of this process's own, whose ports are free
/// however many connections other tests have just made.
pub(crate) fn options(device: Option<String>) -> ConnectOptions {
    let [_, _, a, b] = std::process::id().to_be_bytes();
    let source = SocketAddr::from(([127, 64, a, b], 0));
    ConnectOptions { timeout: LONG, device, source: Some(source), ..Default::default() }
}

pub(crate) fn connect(address: SocketAddr, device: Option<String>) -> Result<Session> {
    let mut options = options(device);
    options.source = options.source.filter(|_| address.is_ipv4());
    ivsmc::connect(address, &options, &Plain)
}

pub(crate) fn accept(listener: &Listener) -> Session {
    listener.accept(LONG, &Plain).unwrap().0
}

pub(crate) fn send(session: &Session, bytes: &[u8]) {
    session.send_all(bytes, LONG, &Plain).unwrap();
}

pub(crate) fn recv(session: &Session, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let flags = RecvFlags { wait_all: true, ..Default::default() };
    let got = with_uninit(&mut bytes, |into: &mut [MaybeUninit<u8>]| {
        session.recv(into, flags, LONG, &Plain).unwrap()
    });
    bytes.truncate(got);
    bytes
}

/// Both ends carry data in both directions, and end cleanly.
pub(crate) fn exercise(one: Session, other: Session) {
    send(&one, b"from one");
    assert_eq!(recv(&other, 8), b"from one");
    send(&other, b"from the other");
    assert_eq!(recv(&one, 14), b"from the other");
    one.close();
    assert_eq!(recv(&other, 1), b"");
}

/// As [`exercise`], with a plain socket at one end.
pub(crate) fn exercise_plain(session: Session, mut socket: TcpStream) {
    send(&session, b"from the session");
    let mut bytes = [0; 16];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"from the session");
    socket.write_all(b"from the socket").unwrap();
    assert_eq!(recv(&session, 15), b"from the socket");
    drop(session);
    assert_eq!(socket.read(&mut bytes).unwrap(), 0);
}

pub(crate) fn reason(session: &Session) -> &'static str {
    session.fallback().map_or("none", |fallback| fallback.reason.name())
}

/// A directory that only this user can use, gone with the test.
pub(crate) struct PrivateDirectory {
    path: PathBuf,
}

impl PrivateDirectory {
    pub(crate) fn new() -> Self {
        let path = PathBuf::from(format!("/dev/shm/ivsmc-setup-{}-local", std::process::id()));
        file::make_private_directory(&path).unwrap();
        Self { path }
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        &self.path
    }
}

impl Drop for PrivateDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
