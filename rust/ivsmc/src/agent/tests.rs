//! An agent with real clients on its socket, over a device made of a file.

pub(crate) mod stand_in;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use ivsmc_proto::agent::{self as wire, HEADER_LENGTH};
use ivsmc_proto::slot::{SlotInfo, SlotState};
use ivsmc_shm::net;
use ivsmc_shm::poll::{EventFd, PollFd};

use super::*;
use crate::attachment::tests::{kill, start};
use crate::attachment::Attachment;
use crate::device::tests::{spec, Scratch};
use crate::device::{self, Backing, Doorbells, Unusable};
use ivsmc_proto::slot::Prover;
use stand_in::{options, socket, Served, IVPOSITION};

const LONG: Duration = Duration::from_secs(60);

fn attach(path: &Path) -> Result<Arc<Attachment>, Unusable> {
    Attachment::open(&spec(Kind::Agent, path))
}

/// What a client has before it has attached to the region.
fn ask(path: &Path) -> (Mapping, Arc<device::AgentClient>) {
    let opened = device::open(&spec(Kind::Agent, path)).map_err(|refused| refused.sentence);
    let device::Opened { mapping, backing, .. } = opened.unwrap_or_else(|why| panic!("{why}"));
    let Backing::Agent(client) = backing else { panic!("another backing") };
    (Arc::into_inner(mapping).unwrap(), client)
}

fn info(attachment: &Attachment) -> SlotInfo {
    attachment.region().slot_info(attachment.me()).unwrap()
}

/// Waits for a notification and takes it.
fn take(eventfd: &EventFd) -> u64 {
    poll::poll(&mut [PollFd::new(eventfd, poll::IN)], Some(LONG)).unwrap();
    eventfd.drain().unwrap()
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn each_client_has_a_slot_and_a_vector_of_its_own_and_gives_them_back() {
    let scratch = Scratch::new();
    let served = Served::start(&scratch, 4);
    let path = served.agent.path();
    for round in 1..4 {
        let clients: Vec<_> = (0..2).map(|_| attach(path).unwrap()).collect();
        assert_ne!(clients[0].me(), clients[1].me());
        let vectors: Vec<_> = clients.iter().map(|client| info(client).vector).collect();
        assert_eq!(vectors, [Some(1), Some(2)]);
        for client in &clients {
            assert_eq!(client.me().generation, round);
            let state = client.region().slot_state(client.me().index);
            let prover = Prover::Agent(IVPOSITION.into());
            assert_eq!(state, SlotState::Live { at: client.me(), prover });
            assert_eq!(info(client).ivposition, Some(IVPOSITION));
            assert_eq!(client.record().identity.ivposition, IVPOSITION);
            assert!(matches!(served.event(), Event::Joined { is_shared: false, .. }));
        }
        let status = served.agent.status().unwrap();
        assert_eq!((status.clients.len(), status.vectors), (2, 4));
        assert_eq!(status.clients[0].who.pid.unsigned_abs(), std::process::id());
        // A neighbour is nobody's to judge but the agent's.
        assert_eq!((clients[0].reap(), clients[1].reap()), (0, 0));
        drop(clients);
        for _ in 0..2 {
            assert!(matches!(served.event(), Event::Left { .. }));
        }
    }
    assert!(served.agent.slots.region().is_deserted());
    let status = served.agent.status().unwrap();
    assert_eq!((status.joined, status.left, status.died, status.refused), (6, 6, 0, 0));
}

#[test]
fn doorbells_go_from_process_to_process_without_the_agent() {
    let scratch = Scratch::new();
    let served = Served::start(&scratch, 4);
    let clients: Vec<_> = (0..2).map(|_| ask(served.agent.path()).1).collect();
    let own: Vec<_> = clients.iter().map(|client| client.own().unwrap()).collect();
    for (from, to) in [(0, 1), (1, 0)] {
        assert!(clients[from].notify(IVPOSITION, own[to].0));
        assert_eq!(take(own[to].1), 1);
        assert_eq!(own[from].1.drain().unwrap(), 0);
    }
    assert_eq!(served.doorbells.load(Ordering::Relaxed), 2);
    // Somebody else's doorbells are not this device's.
    assert!(clients[0].notify(IVPOSITION + 1, own[1].0));
    (served.notify)(0);
    for client in &clients {
        assert_eq!(take(client.departures().unwrap()), 1);
    }
    assert_eq!(own[1].1.drain().unwrap(), 0);
}

#[test]
fn processes_beyond_the_vectors_share_the_last_one() {
    for vectors in [1, 2, 3] {
        let scratch = Scratch::new();
        let served = Served::start(&scratch, vectors);
        let path = served.agent.path().to_owned();
        let mut clients: Vec<_> = (0..5).map(|_| ask(&path).1).collect();
        let last = u16::try_from(vectors - 1).unwrap();
        for round in 0..3 {
            let shared: Vec<_> =
                clients.iter().filter(|client| client.own().unwrap().0 == last).collect();
            assert!(shared.len() >= 3, "{} share vector {last}", shared.len());
            // What the newcomers' coming notified.
            for client in &clients {
                client.own().unwrap().1.drain().unwrap();
            }
            (served.notify)(last);
            for client in shared {
                assert!(take(client.own().unwrap().1) > 0, "round {round}");
            }
            // Whoever leaves takes nothing from the others.
            drop(clients.remove(1));
            while served.agent.status().unwrap().clients.len() != 4 {
                std::thread::yield_now();
            }
            clients.push(ask(&path).1);
        }
        let sharing = served.agent.status().unwrap().clients.iter().filter(|c| c.is_shared).count();
        assert_eq!(sharing, 5 - usize::from(last).saturating_sub(1));
    }
}

#[test]
fn what_a_killed_process_held_is_taken_back_and_its_neighbour_stays() {
    let scratch = Scratch::new();
    let served = Served::start(&scratch, 2);
    let device = spec(Kind::Agent, served.agent.path());
    let neighbour = Attachment::open(&device).unwrap();
    for _ in 0..3 {
        let (mut child, mut input, mut said) = start(&device);
        let me = neighbour.me();
        writeln!(input, "{}\n{}", me.index, me.generation).unwrap();
        said().unwrap();
        let census = neighbour.census();
        assert!(census.live == 2 && census.dmbs_held == 10 && census.extents > 0, "{census:?}");
        kill(&mut child);
        loop {
            if let Event::Died { who, .. } = served.event() {
                assert_eq!(who.pid.unsigned_abs(), child.id());
                break;
            }
        }
        let census = neighbour.census();
        assert_eq!((census.live, census.dead, census.extents, census.dmbs_held), (1, 0, 0, 0));
        assert!(neighbour.region().is_live(me));
    }
    drop(neighbour);
    while !served.agent.status().unwrap().clients.is_empty() {
        std::thread::yield_now();
    }
    assert!(served.agent.slots.region().is_deserted());
}

#[test]
fn those_who_stay_are_told_of_a_death_and_not_of_a_departure() {
    let scratch = Scratch::new();
    let served = Served::start(&scratch, 4);
    let witness = ask(served.agent.path()).1;
    let departures = witness.departures().unwrap();
    drop(attach(served.agent.path()).unwrap());
    while served.agent.status().unwrap().left == 0 {
        std::thread::yield_now();
    }
    assert_eq!(departures.drain().unwrap(), 0);
    // Has a slot and never leaves it.
    drop(ask(served.agent.path()));
    assert_eq!(take(departures), 1);
}

#[test]
fn who_says_what_is_no_hello_is_sent_away_with_a_reason() {
    let scratch = Scratch::new();
    let served = Served::start(&scratch, 2);
    let mut newer = wire::hello();
    newer[8] = 9;
    for (bytes, reason) in
        [(&b"GET / HTTP/1.1\r\n"[..], "not a client"), (&newer, "version 9"), (&[0; 100], "not a")]
    {
        let mut stream = UnixStream::connect(served.agent.path()).unwrap();
        stream.write_all(bytes).unwrap();
        let mut said = vec![0; HEADER_LENGTH];
        stream.read_exact(&mut said).unwrap();
        let mut rest = [0; 512];
        let count = stream.read(&mut rest).unwrap();
        let text = String::from_utf8_lossy(&rest[..count]).into_owned();
        assert!(text.contains(reason), "{text}");
        // With bytes unread the end is a reset.
        assert!(!stream.read(&mut rest).is_ok_and(|more| more > 0));
        assert!(matches!(served.event(), Event::Refused { .. }));
    }
    drop(UnixStream::connect(served.agent.path()).unwrap());
    assert!(
        matches!(served.event(), Event::Refused { reason } if reason.contains("without a word"))
    );
    assert!(served.agent.slots.region().is_deserted());
}

#[test]
fn who_says_nothing_is_sent_away_in_time_and_holds_nobody_up() {
    let scratch = Scratch::new();
    let region = scratch.path().join("region");
    let patience = Duration::from_millis(100);
    let served = Served::with(options(scratch.path()), &region, 2, patience);
    let mut silent = UnixStream::connect(served.agent.path()).unwrap();
    let mut slow = UnixStream::connect(served.agent.path()).unwrap();
    slow.write_all(&wire::hello()[..7]).unwrap();
    attach(served.agent.path()).unwrap();
    for stream in [&mut silent, &mut slow] {
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    assert_eq!(served.agent.status().unwrap().refused, 2);
}

#[test]
fn a_crowd_that_says_nothing_keeps_nobody_out() {
    let scratch = Scratch::new();
    let served = Served::start(&scratch, 2);
    let crowd: Vec<_> =
        (0..200).map(|_| UnixStream::connect(served.agent.path()).unwrap()).collect();
    for _ in 0..10 {
        attach(served.agent.path()).unwrap();
    }
    let status = served.agent.status().unwrap();
    assert!((136..=137).contains(&status.refused), "{} sent away", status.refused);
    drop(crowd);
}

#[test]
fn what_a_client_says_later_is_not_read_and_one_that_does_not_read_is_only_behind() {
    let scratch = Scratch::new();
    let served = Served::start(&scratch, 2);
    let mut hostile = UnixStream::connect(served.agent.path()).unwrap();
    hostile.write_all(&wire::hello()).unwrap();
    hostile.set_nonblocking(true).unwrap();
    // Never reads, and writes until there is no more room.
    while hostile.write(&[0xff; 4096]).is_ok() {}
    for _ in 0..10 {
        attach(served.agent.path()).unwrap();
    }
    let status = served.agent.status().unwrap();
    assert_eq!(status.died, 0);
    assert!(status.clients.iter().any(|client| client.slot.starts_with("0.")));
    drop(hostile);
    while served.agent.status().unwrap().died == 0 {
        std::thread::yield_now();
    }
    // Its slot is free again, as are those of the ones who left.
    while !served.agent.slots.region().is_deserted() {
        std::thread::yield_now();
    }
}

#[test]
fn who_cannot_be_taken_in_hears_why() {
    let scratch = Scratch::new();
    let options = AgentOptions { max_clients: 1, ..options(scratch.path()) };
    let served = Served::with(options, &scratch.path().join("region"), 2, LONG);
    let first = attach(served.agent.path()).unwrap();
    let refused = attach(served.agent.path()).err().unwrap();
    assert!(refused.sentence.contains("refuses: 1 processes use it"), "{}", refused.sentence);
    drop(first);
    while !served.agent.status().unwrap().clients.is_empty() {
        std::thread::yield_now();
    }
    // All slots but those taken by others.
    let region = served.agent.slots.region();
    let taken: Vec<_> = region.unclaimed().collect();
    let taken: Vec<_> =
        taken.into_iter().map(|index| region.claim_slot(index, Prover::None).unwrap()).collect();
    let refused = attach(served.agent.path()).err().unwrap();
    assert!(refused.sentence.contains("peer slots of its region"), "{}", refused.sentence);
    region.mark_dead(taken[3]);
    // Others had only begun to take it back.
    assert_eq!(attach(served.agent.path()).unwrap().me().index, taken[3].index);
}

#[test]
fn without_an_agent_the_reason_says_so() {
    let scratch = Scratch::new();
    let said = |name: &str, what: &str| {
        let refused = attach(&scratch.path().join(name)).err().unwrap();
        assert!(refused.sentence.contains(what), "{name}: {}", refused.sentence);
    };
    said("missing", "is the agent running");
    scratch.file("file", 0);
    said("file", "nobody listens");
    let serve = |name: &str, reply: &'static [u8]| {
        let listener = std::os::unix::net::UnixListener::bind(scratch.path().join(name)).unwrap();
        std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            stream.read_exact(&mut [0; HEADER_LENGTH]).unwrap();
            stream.write_all(reply).unwrap();
        })
    };
    let servers = [
        serve("http", b"HTTP/1.1 400 Bad Request\r\n"),
        serve("closing", b""),
        serve("half", b"ivsmcagt\x01\0"),
    ];
    said("http", "not an agent");
    said("closing", "without an answer");
    said("half", "without an answer");
    for server in servers {
        server.join().unwrap();
    }
}

#[test]
fn clients_outlive_their_agent_and_the_next_one_takes_back_what_they_left() {
    let scratch = Scratch::new();
    let served = Served::start(&scratch, 4);
    let path = served.agent.path().to_owned();
    let staying = attach(&path).unwrap();
    let own = staying.allocate(0, staying.me()).unwrap();
    let region = scratch.path().join("region");
    drop(served);
    assert!(!path.exists());
    assert!(attach(&path).err().unwrap().sentence.contains("no such socket"));
    assert!(staying.is_up_to_date() && staying.region().is_live(staying.me()));
    drop(own);
    // In one process nothing is as busy as a VFIO group: were the next agent able to start now, it
    // would have to think that the client is dead.
    let slot = staying.me();
    let next = Served::start(&scratch, 4);
    assert!(!next.agent.slots.region().is_live(slot));
    assert_eq!(next.agent.slots.region().census().extents, 0);
    drop((staying, next));
    assert!(region.exists());
}

#[test]
fn only_those_the_socket_allows_are_heard() {
    let scratch = Scratch::new();
    let served = Served::with(
        AgentOptions { mode: 0o660, ..options(scratch.path()) },
        &scratch.path().join("region"),
        2,
        LONG,
    );
    let mode = std::fs::metadata(served.agent.path()).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777, 0o660);
    let (ours, theirs) = net::socketpair_stream().unwrap();
    // This process itself.
    assert!(served.agent.access.judge(&ours).is_ok());
    drop(theirs);
}

#[test]
fn options_that_cannot_be_are_refused() {
    let judge = |options: AgentOptions| options.judge().unwrap_err().to_string();
    let good = AgentOptions::new("/run/agent.sock");
    assert!(judge(AgentOptions { max_clients: 0, ..good.clone() }).contains("max_clients=0"));
    assert!(judge(AgentOptions { mode: 0o1600, ..good }).contains("mode"));
    let found = AgentOptions::found_by_clients(Some("00:05.0")).unwrap().path;
    assert_eq!(found, Path::new("/run/ivsmc/agent-0000:00:05.0.sock"));
    let found = AgentOptions::found_by_clients(None).unwrap().path;
    assert_eq!(found, Path::new("/run/ivsmc/agent.sock"));
    assert!(AgentOptions::found_by_clients(Some("eth0")).is_err());
    let names: BTreeSet<_> = ["agent.sock", "agent-x.sock", "agents.sock", "ivs0.sock", "agent"]
        .into_iter()
        .filter(|name| is_socket_name(name))
        .collect();
    assert_eq!(names, BTreeSet::from(["agent.sock", "agent-x.sock"]));
}

/// An agent in a process of its own.
struct Process {
    child: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(scratch: &Scratch, vectors: usize) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "agent::tests::child_serves", "--ignored", "--nocapture"])
            .env("AGENT_DIRECTORY", scratch.path())
            .env("AGENT_VECTORS", vectors.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut process = Self { child, input, lines };
        while !process.line().starts_with("serving") {}
        process
    }

    fn line(&mut self) -> String {
        self.lines.next().expect("the agent's process has ended").unwrap()
    }

    /// Clients, those that share a vector, clients that died, doorbells, open files.
    fn status(&mut self) -> [u64; 5] {
        writeln!(self.input, "status").unwrap();
        let line = self.line();
        let numbers: Vec<_> = line.split(' ').map(|number| number.parse().unwrap()).collect();
        numbers.try_into().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        kill(&mut self.child);
    }
}

#[test]
fn nothing_of_a_client_stays_in_the_agent() {
    let scratch = Scratch::new();
    let mut process = Process::start(&scratch, 3);
    let path = socket(scratch.path());
    let mut first = None;
    for round in 1..=20 {
        let clients: Vec<_> = (0..10).map(|_| ask(&path)).collect();
        let [count, shared, _, _, open] = process.status();
        assert_eq!((count, shared, open), (10, 9, *first.get_or_insert(open)));
        let mut silent = UnixStream::connect(&path).unwrap();
        silent.write_all(b"x").unwrap();
        drop((clients, silent));
        // None of them has left the region by itself.
        while process.status()[2] < 10 * round {}
    }
    // Each had three.
    while process.status()[4] > first.unwrap() - 30 {}
    assert_eq!(process.status()[0], 0);
}

#[test]
fn a_killed_agent_harms_none_of_its_clients() {
    let scratch = Scratch::new();
    let process = Process::start(&scratch, 4);
    let path = socket(scratch.path());
    let clients: Vec<_> = (0..2).map(|_| attach(&path).unwrap()).collect();
    drop(process);
    let refused = attach(&path).err().unwrap().sentence;
    assert!(refused.contains("nobody listens") && refused.contains("ended"), "{refused}");
    // What they need of each other goes on.
    let own = clients[0].allocate(2, clients[1].me()).unwrap();
    let peer = clients[1].attach(own.token(), 2, clients[0].me()).unwrap();
    drop((own, peer));
    let region = clients[0].region().census();
    assert_eq!((region.live, region.dmbs_held, region.dmbs_attached), (2, 0, 0));
}

/// Not a test: serves for other programs, until its input ends.
#[test]
#[ignore = "started by other tests, in a process of its own"]
fn child_serves() {
    let number = |name: &str| std::env::var(name).unwrap().parse().unwrap();
    let directory = std::env::var("AGENT_DIRECTORY").unwrap();
    let directory = Path::new(&directory);
    let region = directory.join("region");
    let served = Served::with(options(directory), &region, number("AGENT_VECTORS"), LONG);
    println!("\nserving {}", socket(directory).display());
    for line in std::io::stdin().lines() {
        assert_eq!(line.unwrap(), "status");
        let status = served.agent.status().unwrap();
        let shared = status.clients.iter().filter(|client| client.is_shared).count();
        println!(
            "{} {shared} {} {} {}",
            status.clients.len(),
            status.died,
            served.doorbells.load(Ordering::Relaxed),
            open_files(),
        );
    }
}
