//! Whoever keeps the descriptors of an ivshmem server beyond its end, and gives them to the next.
//!
//! The descriptor store of systemd, by its protocol (`sd_notify(3)`, `sd_listen_fds(3)`): datagrams
//! to `$NOTIFY_SOCKET` while the service runs, `$LISTEN_FDS` when it starts again. `ivsmc server
//! --state` speaks the other side of it where there is no systemd. A datagram that was sent reaches
//! the holder whatever becomes of its sender.
//!
//! | name | what |
//! | --- | --- |
//! | `ivsmc-memory` | the region, through the open file that has the marking server's lock |
//! | `ivsmc-ledger` | `ledger.rs` |
//! | `ivsmc-listener` | the listening socket |
//! | `ivsmc-client-SERIAL` | a client's connection |
//! | `ivsmc-vector-ID-VECTOR` | an eventfd |

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use ivsmc_shm::fd::Fd;
use ivsmc_shm::poll::{self, PollFd};
use ivsmc_shm::{errno, net};

use crate::{Error, Result};

/// Longest wait for a holder that does not read.
const PATIENCE: Duration = Duration::from_secs(5);
/// When to try again while too many descriptors of this user are under way.
const RETRY: Duration = Duration::from_millis(1);
/// The first descriptor that a service is started with.
const FIRST: RawFd = 3;
/// Bytes of all names with what divides them: a program is not started with a longer variable than
/// `MAX_ARG_STRLEN`, 128 KiB, here `LISTEN_FDNAMES=`. Others may have names in it besides.
const MAX_NAMES: usize = (128 << 10) - 1024;

/// Which of an ivshmem server's descriptors one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Name {
    Memory,
    Ledger,
    Listener,
    Client { serial: u64 },
    Vector { id: u16, vector: u16 },
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("ivsmc-memory"),
            Self::Ledger => f.write_str("ivsmc-ledger"),
            Self::Listener => f.write_str("ivsmc-listener"),
            Self::Client { serial } => write!(f, "ivsmc-client-{serial}"),
            Self::Vector { id, vector } => write!(f, "ivsmc-vector-{id}-{vector}"),
        }
    }
}

impl Name {
    /// Of the name in a list.
    fn bytes(self) -> usize {
        self.to_string().len() + 1
    }

    fn parse(text: &str) -> Option<Name> {
        Some(match text.strip_prefix("ivsmc-")? {
            "memory" => Self::Memory,
            "ledger" => Self::Ledger,
            "listener" => Self::Listener,
            other => {
                let (kind, number) = other.split_once('-')?;
                match kind {
                    "client" => Self::Client { serial: number.parse().ok()? },
                    "vector" => {
                        let (id, vector) = number.split_once('-')?;
                        Self::Vector { id: id.parse().ok()?, vector: vector.parse().ok()? }
                    }
                    _ => return None,
                }
            }
        })
    }
}

/// Keeps what it is given while the ivshmem server is not there.
#[derive(Debug)]
pub struct Holder {
    socket: Fd,
    /// How long one that does not read is waited for.
    patience: Duration,
    /// Descriptors it takes; absent if it does not tell.
    room: Option<usize>,
    /// How many it has.
    count: usize,
    /// Bytes of their names, each with a byte that divides it from the next.
    names: usize,
    /// What it had when this process was started.
    held: BTreeMap<Name, Fd>,
}

impl Holder {
    /// The one that this process was started by, if it was: `$NOTIFY_SOCKET` says so.
    ///
    /// It takes over the descriptors that it was given, so it is for once in a process.
    ///
    /// # Errors
    /// [`Error::Os`] if the holder cannot be reached or a descriptor is not there;
    /// [`Error::ApiMisuse`] for variables that nobody sets so.
    pub fn from_environment() -> Result<Option<Self>> {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(None) };
        let mut holder = Self::at(&name)?;
        holder.room = variable("FDSTORE")?;
        if variable("LISTEN_PID")? == Some(std::process::id()) {
            let count = variable::<RawFd>("LISTEN_FDS")?.unwrap_or(0);
            let names = std::env::var_os("LISTEN_FDNAMES").unwrap_or_default();
            holder.take(
                (FIRST..FIRST.saturating_add(count)).zip(names.to_string_lossy().split(':')),
            )?;
        }
        Ok(Some(holder))
    }

    /// The one that listens at `name`, which holds nothing yet.
    ///
    /// # Errors
    /// Those of connecting there.
    pub fn at(name: &OsStr) -> io::Result<Self> {
        let socket = net::unix_datagram_to(name)?;
        Ok(Self::over(socket, PATIENCE))
    }

    pub(super) fn over(socket: Fd, patience: Duration) -> Self {
        Self { socket, patience, room: None, count: 0, names: 0, held: BTreeMap::new() }
    }

    /// Has it hold what is given here besides, as it would be after a start.
    #[must_use]
    pub fn holding<'a>(mut self, held: impl IntoIterator<Item = (&'a str, Fd)>) -> Self {
        self.held.extend(held.into_iter().filter_map(|(name, fd)| Some((Name::parse(name)?, fd))));
        self.recount();
        self
    }

    /// Takes those over that are ours; others are somebody else's affair.
    fn take<'a>(&mut self, given: impl Iterator<Item = (RawFd, &'a str)>) -> io::Result<()> {
        for (number, name) in given {
            if let Some(name) = Name::parse(name) {
                self.held.insert(name, Fd::inherit(number)?);
            }
        }
        self.recount();
        Ok(())
    }

    fn recount(&mut self) {
        self.count = self.held.len();
        self.names = self.held.keys().map(|name| name.bytes()).sum();
    }

    /// What it held at the start, once.
    pub(super) fn held(&mut self) -> BTreeMap<Name, Fd> {
        std::mem::take(&mut self.held)
    }

    /// Whether it takes `more` besides; else why not.
    pub(super) fn judge_room(&self, more: &[Name]) -> io::Result<()> {
        match self.room {
            Some(room) if self.count + more.len() > room => {
                return Err(io::Error::other(format!(
                    "the {room} descriptors that are kept for it are not enough \
                     (FileDescriptorStoreMax= of its unit, or ulimit -n)"
                )))
            }
            _ => {}
        }
        let names = self.names + more.iter().map(|name| name.bytes()).sum::<usize>();
        if names > MAX_NAMES {
            return Err(io::Error::other(format!(
                "no process could be started with the names of {} kept descriptors",
                self.count + more.len()
            )));
        }
        Ok(())
    }

    /// Has it keep `fd`, as `name`, also when what it leads to has ended.
    pub(super) fn keep(&mut self, name: Name, fd: impl AsFd) -> io::Result<()> {
        self.judge_room(&[name])?;
        self.say(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"), Some(fd.as_fd()))?;
        self.count += 1;
        self.names += name.bytes();
        Ok(())
    }

    /// Has it no longer keep what it keeps as `name`.
    pub(super) fn drop(&mut self, name: Name) -> io::Result<()> {
        self.say(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None)?;
        self.count = self.count.saturating_sub(1);
        self.names = self.names.saturating_sub(name.bytes());
        Ok(())
    }

    /// Says that clients can come.
    pub(super) fn ready(&self) -> io::Result<()> {
        self.say("READY=1", None)
    }

    /// Says that it is about to end.
    pub(super) fn stopping(&self) -> io::Result<()> {
        self.say("STOPPING=1", None)
    }

    fn say(&self, text: &str, passed: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let until = Instant::now() + self.patience;
        loop {
            let Err(error) = net::send_with_fd(&self.socket, text.as_bytes(), passed) else {
                return Ok(());
            };
            let left = until.saturating_duration_since(Instant::now());
            match error.raw_os_error() {
                Some(errno::EINTR) => {}
                Some(errno::EAGAIN | errno::ETOOMANYREFS) if left.is_zero() => {
                    let what = format!("who keeps its descriptors does not take them: {error}");
                    return Err(io::Error::other(what));
                }
                Some(errno::EAGAIN) => {
                    // An interrupted wait only means to try again.
                    let _ = poll::poll(&mut [PollFd::new(&self.socket, poll::OUT)], Some(left));
                }
                Some(errno::ETOOMANYREFS) => std::thread::sleep(RETRY),
                _ => return Err(error),
            }
        }
    }
}

fn variable<T: std::str::FromStr>(name: &str) -> Result<Option<T>> {
    let Some(value) = std::env::var_os(name) else { return Ok(None) };
    let number = value.to_str().and_then(|text| text.parse().ok());
    number.map(Some).ok_or_else(|| {
        Error::ApiMisuse(format!("{name}={}: not a number", value.to_string_lossy()))
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;
    use std::process::Command;

    use super::*;

    #[test]
    fn names_survive_the_round_trip() {
        for name in [
            Name::Memory,
            Name::Ledger,
            Name::Listener,
            Name::Client { serial: u64::MAX },
            Name::Vector { id: 65_535, vector: 255 },
        ] {
            let text = name.to_string();
            assert_eq!(Name::parse(&text), Some(name));
            // As FDNAME= has it: ASCII, no colon, at most 255 bytes.
            assert!(text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':'));
        }
        for other in ["stored", "ivsmc.socket", "ivsmc-client-x", "ivsmc-vector-1", "ivsmc-other-1"]
        {
            assert_eq!(Name::parse(other), None);
        }
    }

    #[test]
    fn no_more_is_kept_than_a_program_can_be_started_with() {
        let (near, far) = UnixDatagram::pair().unwrap();
        let mut holder = Holder::over(Fd::from(OwnedFd::from(near)), PATIENCE);
        let mut names = vec![String::from("of-somebody-else")];
        let names_are_too_many = loop {
            let name = Name::Client { serial: 1 << 48 | names.len() as u64 };
            if let Err(error) = holder.keep(name, &far) {
                break error;
            }
            net::recv_with_fd(&far, &mut [0; 256], 0).unwrap();
            names.push(name.to_string());
            assert!(names.len() < 1 << 16, "nothing ends it");
        };
        assert!(names_are_too_many.to_string().contains("could be started"));
        assert!(names.len() > 4000, "{}", names.len());
        let with = |names: &str| Command::new("true").env("LISTEN_FDNAMES", names).status();
        assert!(with(&names.join(":")).unwrap().success());
        assert!(with(&names.join(":").repeat(2)).is_err());
        holder.drop(Name::Client { serial: 1 << 48 | 1 }).unwrap();
        holder.keep(Name::Client { serial: 1 << 48 }, &far).unwrap();
    }
}
