//! The server in a process of its own: limits, other users, SIGKILL.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use ivsmc::server::{Backing, ServerOptions};
use ivsmc_shm::{file, lock};

use crate::client::{reopened, Client, Scratch, Served, MIB};

/// Not a test: the process that serves in those below. Commands come by lines.
#[test]
#[ignore = "started by other tests, in a process of its own"]
fn child_serves() {
    let path = PathBuf::from(std::env::var_os("SERVER_PATH").unwrap());
    let backing = match std::env::var_os("SERVER_FILE") {
        Some(file) => Backing::File { path: file.into(), size: Some(MIB) },
        None => Backing::Memfd { size: MIB },
    };
    let options = ServerOptions { vectors: 2, backing, mode: 0o666, ..ServerOptions::new(path) };
    let served = Served::start(options);
    println!("\nserving");
    for line in io::stdin().lines() {
        assert_eq!(line.unwrap(), "status");
        let status = served.server.status().unwrap();
        println!("{} {}", status.clients.len(), status.refused);
    }
}

struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

/// What [`Process::status`] tells.
struct Counts {
    clients: usize,
    refused: usize,
}

impl Process {
    /// Serves at `path` with at most `files` descriptors, as an ordinary user: `user`, if this
    /// process may become that.
    fn start(
        scratch: &Scratch,
        path: &Path,
        user: u32,
        files: u32,
        backing: Option<&Path>,
    ) -> Process {
        // That user may not be able to reach the directory this program is in.
        let program = scratch.path("program");
        if !program.exists() {
            fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        }
        let script = format!(
            "ulimit -n {files}; exec \"$0\" --exact process::child_serves --ignored --nocapture"
        );
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", &script])
            .arg(&program)
            .env("SERVER_PATH", path)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(backing) = backing {
            command.env("SERVER_FILE", backing);
        }
        if file::effective_uid() == 0 {
            // Root may have any number of descriptors in flight.
            command.uid(user).gid(user);
        }
        let mut child = command.spawn().unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut process = Process { child, stdin, stdout };
        while process.line() != "serving" {}
        process
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(self.stdout.read_line(&mut line).unwrap() > 0, "the server's process has ended");
        line.trim().to_owned()
    }

    fn wait_for_clients(&mut self, count: usize) {
        while self.status().clients != count {
            std::thread::yield_now();
        }
    }

    fn status(&mut self) -> Counts {
        self.stdin.as_mut().unwrap().write_all(b"status\n").unwrap();
        let line = self.line();
        let mut numbers = line.split(' ').map(|number| number.parse().unwrap());
        let mut next = || numbers.next().unwrap();
        Counts { clients: next(), refused: next() }
    }

    /// Asked from outside: inside, none may be left to ask with.
    fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn end(mut self) {
        self.stdin = None;
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        assert!(self.child.wait().unwrap().success(), "{rest}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn without_descriptors_newcomers_are_turned_away_and_the_others_stay() {
    let scratch = Scratch::new();
    let path = scratch.path("ivs.sock");
    let mut server = Process::start(&scratch, &path, 60_001, 64, None);
    let mut first = Client::join(&path, 2);
    let mut before = None;
    for _ in 0..3 {
        let mut members = Vec::new();
        let mut refused = 0;
        for _ in 0..40 {
            let mut client = Client::connect(&path);
            match client.raw(0) {
                Ok(Some((value, fd))) => {
                    client.take(value, fd);
                    client.read_until(|client| client.own.len() == 2);
                    members.push(client);
                }
                _ => refused += 1,
            }
        }
        // 64 less the program's own, three for each client.
        assert!((10..=20).contains(&members.len()), "{} joined", members.len());
        assert!(refused >= 20, "{refused} refused");
        // Those after the first round have the ids and the eventfds of that.
        first.read_until_peers(members.len(), 2);
        drop(members);
        server.wait_for_clients(1);
        let after = server.open_files();
        assert_eq!(after, *before.get_or_insert(after));
    }
    let after = server.status();
    assert!(after.refused >= 60, "{} refused", after.refused);
    server.end();
    assert!(!path.exists());
}

/// Clients of `path` that leave as many descriptors unread as they can: three each.
fn mute_clients(path: &Path, count: usize) -> Vec<Client> {
    let mut mute: Vec<_> = (0..count).map(|_| Client::connect(path)).collect();
    for client in &mut mute {
        // Version and id, which come without.
        client.read();
        client.read();
    }
    mute
}

#[test]
fn clients_that_do_not_read_take_no_descriptors_from_others() {
    let scratch = Scratch::new();
    let path = scratch.path("ivs.sock");
    // An ordinary user may have about as many in flight as it may have open.
    let mut server = Process::start(&scratch, &path, 60_002, 256, None);
    let mut first = Client::join(&path, 2);
    let mute = mute_clients(&path, 70);
    first.read_until_peers(70, 2);
    for _ in 0..20 {
        let other = Client::join(&path, 2);
        assert_eq!(other.peers.len(), 71);
        first.read_until_peers(71, 2);
        drop(other);
        server.wait_for_clients(71);
    }
    drop(mute);
    server.wait_for_clients(1);
    server.end();
}

#[test]
fn descriptors_in_flight_elsewhere_only_delay() {
    let scratch = Scratch::new();
    let (path, other_path) = (scratch.path("ivs.sock"), scratch.path("other.sock"));
    let server = Process::start(&scratch, &path, 60_004, 64, None);
    let other = Process::start(&scratch, &other_path, 60_004, 256, None);
    // More in flight for this user than the first server may have.
    let mute = mute_clients(&other_path, 70);
    let mut client = Client::connect(&path);
    assert_eq!([client.read(), client.read()], [(0, false), (0, false)]);
    if file::effective_uid() == 0 {
        assert_eq!(client.read_ready(), 0);
    }
    drop(mute);
    client.read_until(|client| client.own.len() == 2);
    server.end();
    other.end();
}

#[test]
fn a_killed_server_is_replaced() {
    let scratch = Scratch::new();
    let path = scratch.path("ivs.sock");
    let region_path = scratch.path("region");
    let server = Process::start(&scratch, &path, 60_003, 256, Some(&region_path));
    let guest = Client::join(&path, 2);
    let region = guest.attach();
    let slot = guest.claim(&region);
    let killed = region.marking_server();
    assert!(killed.is_some());
    server.kill();
    assert!(guest.raw(0).unwrap().is_none());

    // Its socket and its word stay; the lock shows that the word is stale.
    assert!(path.exists());
    assert_eq!(region.marking_server(), killed);
    let file = reopened(guest.region.as_ref().unwrap());
    assert!(!lock::is_locked_by_other(&file, region.marking_server_offset()).unwrap());

    let next = Process::start(&scratch, &path, 60_003, 256, Some(&region_path));
    assert!(region.marking_server().is_some_and(|now| Some(now) != killed));
    assert!(lock::is_locked_by_other(&file, region.marking_server_offset()).unwrap());
    // Whether the guest is dead nobody can tell: its id is not given out.
    let newcomer = Client::join(&path, 2);
    assert_eq!(newcomer.id, 1);
    assert!(region.is_live(slot));
    next.end();
    assert_eq!(region.marking_server(), None);
    assert!(!path.exists());
}
