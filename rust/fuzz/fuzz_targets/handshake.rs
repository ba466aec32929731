//! A handshake with somebody hostile, on real TCP connections: one who connects to our listener, and one
//! who listens where we connect. They know the region and say what they like.
//!
//! Whatever they do, the listener goes on accepting, and a connect ends in a session or an error.
#![no_main]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ivsmc::{ConnectOptions, ListenOptions, Listener, Plain, RecvFlags, Session, Timeout};
use ivsmc_fuzz::Input;
use ivsmc_proto::clc::{AcceptConfirm, Chid, Decline, Device, Diagnosis, Eid, Gid, Proposal};
use ivsmc_proto::directory::Bound;
use ivsmc_proto::dmb::Token;
use ivsmc_proto::host::{Endpoint, HostIdentity, HostRecord};
use ivsmc_proto::intent::{IntentKey, IntentRef, IntentState};
use ivsmc_proto::memory::Memory;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotRef};
use ivsmc_shm::fd::Fd;
use ivsmc_shm::file::{self, Access, BootId};
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::mem::with_uninit;
use ivsmc_shm::net;
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 1 << 20;

/// Of the state word of a DMB.
const GENERATION: u64 = !0 << 44;

/// A step of the other end takes less, however slow the machine.
const LONG: Duration = Duration::from_secs(50);

/// For the other end to go its own way, before its connection is plain.
const MATCH_WAIT: Duration = Duration::from_millis(10);

/// The world, made once.
struct World {
    region: Region<Arc<Mapping>>,
    me: SlotRef,
    /// The first granule of an extent of the hostile one's, where it makes its DMBs.
    granule: u32,
    /// The state word of that.
    control: u64,
    /// Ours, and what it has accepted.
    address: SocketAddr,
    accepted: Receiver<()>,
    /// The hostile one's.
    listener: TcpListener,
    /// Has our client connect; and when it has.
    connect: Sender<()>,
    connected: Receiver<()>,
}

// One thread fuzzes.
thread_local! {
    static WORLD: OnceLock<World> = const { OnceLock::new() };
}

/// Uses a session a little, as a program would, and ends it.
fn use_up(session: Session) {
    let mut bytes = [0; 64];
    let _ = with_uninit(&mut bytes, |into| {
        session.recv(into, RecvFlags::default(), Timeout::NonBlocking, &Plain)
    });
    let _ = session.send(b"from ours", Timeout::NonBlocking, &Plain);
}

impl World {
    fn new() -> Self {
        // Who says nothing would have ours wait for a second.
        ivsmc::set_match_wait(Some(MATCH_WAIT));
        let path = format!("/dev/shm/ivsmc-fuzz-{}", std::process::id());
        let made = file::open_nofollow(path.as_ref(), Access::CreateOrOpen(0o600)).expect("a file");
        file::set_size(&made, SIZE).expect("a size");
        let device = Some(format!("file:{path}"));
        let socket = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let options = ListenOptions { device: device.clone(), ..Default::default() };
        let ours = Listener::adopt(Fd::from(OwnedFd::from(socket)), options).expect("a listener");
        // The region stays as long as the listener.
        std::fs::remove_file(&path).expect("the file");
        let mapping = Mapping::map(made, SIZE).expect("the memory");
        let region = Region::attach(Arc::new(mapping), 1).expect("a region");
        let free = region.unclaimed().next().expect("a free slot");
        let me = region.claim_slot(free, Prover::None).expect("a slot");
        region.write_host_record(me, &HostRecord::new(identity(), &[]));
        let extent = region.claim_extent(me).expect("an extent");
        let (control, data) = region.geometry().extent_ranges(extent);
        region.memory().reserve(control).expect("memory");
        region.memory().reserve(data).expect("memory");
        assert!(region.open_extent(extent, me));
        let granule = extent * region.geometry().granules_per_extent();
        let control = region.geometry().extent_ranges(extent).0.start;
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let hostile = listener.local_addr().expect("its address");
        region.register_listener(me, Bound::Any4, hostile.port()).expect("an entry");

        let address = ours.local_addr();
        let (send, accepted) = channel();
        std::thread::spawn(move || loop {
            use_up(ours.accept(Timeout::Never, &Plain).expect("the next one").0);
            let _ = send.send(());
        });
        let (connect, asked) = channel();
        let (send, connected) = channel();
        std::thread::spawn(move || {
            while asked.recv().is_ok() {
                let timeout = Timeout::After(LONG);
                let device = device.clone();
                let options = ConnectOptions { timeout, device, ..Default::default() };
                if let Ok(session) = ivsmc::connect(hostile, &options, &Plain) {
                    use_up(session);
                }
                let _ = send.send(());
            }
        });
        Self { region, me, granule, control, address, accepted, listener, connect, connected }
    }

    fn device(&self) -> Device {
        let uuid = self.region.uuid();
        let gid = Gid::of_slot(uuid, self.me.index, self.me.generation);
        Device { chid: Chid::of_region(uuid), gid }
    }

    /// A DMB for `writer`, and then what somebody scribbles into its control block.
    fn invite(&self, input: &mut Input<'_>, writer: SlotRef) -> Token {
        let class = input.byte() % 3;
        let Ok((token, place)) = self.region.invite_dmb(self.granule, class, writer) else {
            return Token(input.u64());
        };
        for _ in 0..input.below(4) {
            let at = place.control + u64::from(input.byte()) % 40 * 8;
            self.region.memory().store(at, input.u64(), Ordering::Release);
        }
        token
    }

    /// An Accept or a Confirm of ours.
    fn answer(&self, input: &mut Input<'_>, writer: SlotRef) -> AcceptConfirm {
        let device = self.device();
        AcceptConfirm {
            gid: device.gid,
            token: self.invite(input, writer).0,
            size_class: input.byte() % 4,
            linkid: 0,
            chid: device.chid,
            eid: Eid::DEFAULT,
            first_contact: None,
        }
    }

    /// Sends one message, as it is or with some bytes changed, whole or not.
    fn say(&self, input: &mut Input<'_>, conn: &mut TcpStream, other: SlotRef) {
        let mut bytes = match input.below(8) {
            0..=2 => Proposal::new(vec![self.device()], vec![Eid::DEFAULT]).encode(),
            3 => self.answer(input, other).encode_accept(),
            4 | 5 => self.answer(input, other).encode_confirm(),
            6 => Decline::new(Diagnosis(input.u16().into())).encode(),
            _ => {
                let length = input.byte();
                input.bytes(length.into()).to_vec()
            }
        };
        for _ in 0..input.below(8).saturating_sub(5) {
            let at = usize::from(input.u16()) % bytes.len().max(1);
            let patch = input.bytes(2);
            bytes.iter_mut().skip(at).zip(patch).for_each(|(to, from)| *to = *from);
        }
        if input.below(8) == 0 {
            bytes.truncate(usize::from(input.u16()) % (bytes.len() + 1));
        }
        let _ = conn.write_all(&bytes);
    }

    /// Waits until the intent is in `state`, or further, or over; or `is_over` says that it never will be.
    fn wait(&self, intent: &IntentRef, state: IntentState, is_over: impl Fn() -> bool) {
        let until = Instant::now() + LONG;
        let before = [IntentState::Announced, IntentState::Pending, IntentState::Matched];
        let before = before.into_iter().take_while(|earlier| *earlier != state);
        let before: Vec<_> = before.map(Some).collect();
        while before.contains(&self.region.intent_state(intent)) && !is_over() {
            assert!(Instant::now() < until, "{state:?} does not come");
            std::thread::yield_now();
        }
    }

    /// Connects to our listener.
    fn client(&self, input: &mut Input<'_>) {
        let conn = net::tcp_socket(net::Family::V4).expect("a socket");
        net::bind(&conn, &SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
        let client = Endpoint::from(net::local_addr(&conn).expect("its address"));
        let key = IntentKey { client, server: Endpoint::from(self.address) };
        let intent = self.region.publish_intent(self.me, &key);
        net::connect(&conn, &self.address).expect("a connection");
        // A reset at the end: its port is free at once.
        net::set_linger(&conn, Some(0)).expect("the option");
        let mut conn = TcpStream::from(conn.into_owned().expect("a socket"));
        let ours = self.region.claimed().find(|(at, _)| *at != self.me);
        let ours = ours.map_or(self.me, |(at, _)| at);
        if let Some(intent) = &intent {
            if input.below(8) > 0 {
                let _ = self.region.connected_intent(intent);
                // Who is slow is handed out, and the intent stays.
                let is_handed_out = || self.accepted.try_recv().is_ok();
                self.wait(intent, IntentState::Matched, is_handed_out);
                if input.below(8) > 0 {
                    let _ = self.region.commit_intent(intent);
                }
            }
        }
        for _ in 0..=input.below(4) {
            self.say(input, &mut conn, ours);
            if input.flip() {
                let mut bytes = [0; 1024];
                let _ = conn.set_read_timeout(Some(Duration::from_millis(1)));
                let _ = conn.read(&mut bytes);
            }
        }
        let _ = conn.shutdown(Shutdown::Write);
        // It ends, whether the application saw it or not.
        let _ = conn.set_read_timeout(Some(LONG));
        let mut bytes = [0; 1024];
        loop {
            match conn.read(&mut bytes) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    assert_ne!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock,
                        "a connection lives on"
                    );
                    break;
                }
            }
        }
        if let Some(intent) = &intent {
            let _ = self.region.withdraw_intent(intent);
            let _ = self.region.finish_intent(intent);
        }
        while self.accepted.try_recv().is_ok() {}
    }

    /// Listens where ours connects.
    fn server(&self, input: &mut Input<'_>) {
        self.connect.send(()).expect("our client");
        let (mut conn, peer) = self.listener.accept().expect("our client");
        net::set_linger(&conn, Some(0)).expect("the option");
        let server = Endpoint::from(conn.local_addr().expect("its address"));
        let key = IntentKey { client: Endpoint::from(peer), server };
        // It is announced before it connects.
        if let Some((intent, _)) = self.region.find_intent(&key) {
            self.wait(&intent, IntentState::Pending, || false);
            let _ = self.region.match_intent(&intent);
            self.wait(&intent, IntentState::Committed, || false);
            for _ in 0..=input.below(3) {
                self.say(input, &mut conn, intent.owner());
            }
        }
        let _ = conn.shutdown(Shutdown::Write);
        // If it comes again, in plain TCP, that ends too.
        let again = self.listener.try_clone().expect("a descriptor");
        again.set_nonblocking(true).expect("the option");
        let until = Instant::now() + LONG;
        loop {
            match self.connected.recv_timeout(Duration::from_micros(200)) {
                Ok(()) => break,
                Err(RecvTimeoutError::Timeout) => drop(again.accept()),
                Err(RecvTimeoutError::Disconnected) => panic!("our client ended"),
            }
            assert!(Instant::now() < until, "a connect does not end");
        }
        while again.accept().is_ok() {}
        again.set_nonblocking(false).expect("the option");
    }

    /// Takes back the DMB, whatever was scribbled into its state: it is idle, in its generation.
    fn tidy(&self) {
        let m = self.region.memory();
        let state = m.load(self.control, Ordering::Acquire);
        m.store(self.control, state & GENERATION, Ordering::Release);
    }
}

/// This machine, as those know it who run on it.
fn identity() -> HostIdentity {
    let (boot, mask) = match file::boot_id().expect("a boot id") {
        BootId::Kernels(id) => (id, 0),
        BootId::Masked { mask } => (0, mask),
    };
    let socket = net::tcp_socket(net::Family::V4).expect("a socket");
    let netns = net::netns_cookie(socket).expect("a cookie");
    HostIdentity { boot, netns: netns ^ mask, ivposition: 0 }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    WORLD.with(|world| {
        let world = world.get_or_init(World::new);
        if input.flip() {
            world.client(&mut input);
        } else {
            world.server(&mut input);
        }
        world.tidy();
    });
});
