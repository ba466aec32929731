//! A process that dies where it is told to.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{mpsc, OnceLock};
use std::time::Duration;

use ivsmc_proto::failpoint;

use super::roles;

/// A hang is a failure: long enough for a loaded machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// SIGKILL.
const KILLED: i32 = 9;

/// What a child is told.
const ROLE: &str = "IVSMC_CRASH_ROLE";
const AT: &str = "IVSMC_CRASH_AT";
/// That it goes no further from there, but is killed.
const IS_HELD: &str = "IVSMC_CRASH_IS_HELD";

/// A child, killed at the latest when this is dropped.
pub(super) struct Process {
    child: Child,
    input: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
}

impl Process {
    /// Starts a child that plays `role`, and has it die when it comes to the failpoint `at` for the
    /// n-th time; for 0 not before it is armed.
    pub(super) fn start(role: &[&str], at: Option<(&str, usize)>) -> Self {
        Self::start_with(role, at, false)
    }

    fn start_with(role: &[&str], at: Option<(&str, usize)>, is_held: bool) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "crash::process::child", "--ignored", "--nocapture"])
            .env(ROLE, role.join("\n"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some((name, nth)) = at {
            command.env(AT, format!("{name} {nth}"));
        }
        if is_held {
            command.env(IS_HELD, "1");
        }
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(said) = line.strip_prefix("child ") {
                    let _ = send.send(said.to_owned());
                }
            }
        });
        Self { child, input, lines }
    }

    /// As [`Process::start`]; at the failpoint it waits for [`Process::kill_at`].
    pub(super) fn start_held(role: &[&str], name: &str) -> Self {
        Self::start_with(role, Some((name, 1)), true)
    }

    /// What it says next; `None` once it has ended.
    pub(super) fn line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => Some(line),
            Err(mpsc::RecvTimeoutError::Disconnected) => None,
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("the child hangs"),
        }
    }

    /// What it says after `word`, which comes next.
    pub(super) fn hear(&mut self, word: &str) -> String {
        let line = self.line();
        let rest = line.as_deref().and_then(|line| line.strip_prefix(word));
        rest.unwrap_or_else(|| panic!("{line:?} instead of {word}")).trim().to_owned()
    }

    pub(super) fn say(&mut self, line: &str) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Has it do what its role does at the end.
    pub(super) fn ends_its_input(&mut self) {
        self.input = None;
    }

    /// Has it die when it comes to its failpoint for the n-th time from now on.
    pub(super) fn arm(&mut self, nth: usize) {
        self.say(&nth.to_string());
        self.hear("armed");
    }

    pub(super) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for it to die at the failpoint `name`.
    pub(super) fn dies_at(mut self, name: &str) {
        let mut last = None;
        while let Some(line) = self.line() {
            last = Some(line);
        }
        let status = self.child.wait().unwrap();
        assert_eq!(last, Some(format!("at {name}")), "its last word; {status}");
        assert_eq!(status.signal(), Some(KILLED));
        SEEN.with_borrow_mut(|seen| seen.insert(name.to_owned()));
    }

    /// Waits until it is held at the failpoint `name`.
    pub(super) fn comes_to(&mut self, name: &str) {
        let at = format!("at {name}");
        while self.line().expect("it has not come there") != at {}
    }

    /// Kills it at the failpoint `name`, where it is held.
    pub(super) fn kill_at(mut self, name: &str) {
        self.child.kill().unwrap();
        assert_eq!(self.child.wait().unwrap().signal(), Some(KILLED));
        SEEN.with_borrow_mut(|seen| seen.insert(name.to_owned()));
    }

    /// Has it do what its role does at the end, and waits for that.
    pub(super) fn ends(mut self) {
        self.ends_its_input();
        while self.line().is_some() {}
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }

    pub(super) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

thread_local! {
    /// Where children of this test have died.
    static SEEN: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
}

/// Whether a child of this test has died at `name`.
pub(super) fn has_seen_die_at(name: &str) -> bool {
    SEEN.with_borrow(|seen| seen.contains(name))
}

/// How often the failpoint is still to be come to, and which.
static LEFT: AtomicUsize = AtomicUsize::new(0);
static NAME: OnceLock<String> = OnceLock::new();

/// Has this process die when it comes to its failpoint for the n-th time from now on.
pub(super) fn arm(nth: usize) {
    LEFT.store(nth, Ordering::SeqCst);
    println!("child armed");
}

/// Not a test: plays the role that it is given.
#[test]
#[ignore = "started by other tests, in a process of its own"]
fn child() {
    let role = std::env::var(ROLE).unwrap();
    // Behind what the test program has begun to print.
    println!();
    if let Ok(at) = std::env::var(AT) {
        let (name, nth) = at.split_once(' ').unwrap();
        NAME.set(name.to_owned()).unwrap();
        LEFT.store(nth.parse().unwrap(), Ordering::SeqCst);
        failpoint::on_reach(|name| {
            if NAME.get().is_some_and(|wanted| wanted == name)
                && LEFT.fetch_sub(1, Ordering::SeqCst) == 1
            {
                println!("child at {name}");
                while std::env::var_os(IS_HELD).is_some() {
                    std::thread::park();
                }
                ivsmc_shm::failpoint::die();
            }
        });
    }
    let role: Vec<_> = role.split('\n').collect();
    roles::play(role[0], &role[1..]);
    println!("child done");
}
