//! The listening socket at a path: made in place of a dead server's, never of a live one's; and how
//! those who connect are served.
//!
//! "Server" is here whoever listens: an ivshmem server, or an agent.

mod admission;
mod sending;
mod serving;

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ivsmc_proto::failpoint::reached;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::file::{self, Access, FileIdentity};
use ivsmc_shm::{errno, lock, net, thread};

use crate::device::Kind;
use crate::{Error, Result};

use admission::Admission;

pub(crate) use admission::descriptors_ended;
pub(crate) use sending::{send, Flushed, Retry};
pub(crate) use serving::{Daemon, Serving, Stop, FIRST_KEY};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// How long to wait for another server that is starting at the same path.
const START_PATIENCE: Duration = Duration::from_secs(2);
/// How long a live server may take to take a connection into its backlog.
const PROBE_PATIENCE: Duration = Duration::from_secs(1);

/// A listening socket that has a name.
#[derive(Debug)]
pub(crate) struct Socket {
    listener: Fd,
    path: PathBuf,
    identity: FileIdentity,
    /// Somebody else has the listener, too, and the name is to stay.
    is_left: AtomicBool,
}

impl Socket {
    /// Listens at `path`, whose group becomes `group`, if one is given, and its permissions `mode`.
    /// `kind` is what clients call it.
    pub(crate) fn bind(kind: Kind, path: &Path, mode: u32, group: Option<u32>) -> Result<Self> {
        Self::bind_named(path, mode, group)
            .map_err(|reason| Error::device(format!("{kind}:{}", path.display()), reason))
    }

    fn bind_named(path: &Path, mode: u32, group: Option<u32>) -> Result<Self, String> {
        let os = |error: io::Error| match error.raw_os_error() {
            Some(errno::ENOENT) => "its directory does not exist; make it first".to_owned(),
            _ => format!("cannot listen there: {error}"),
        };
        // Only one of several servers that start at once may judge and replace what is there.
        let _turn = Turn::take(path)?;
        reached("socket.turn_taken");
        remove_stale(path)?;
        let listener = net::unix_listen(path, BACKLOG).map_err(os)?;
        let named = NamedSocket(path);
        reached("socket.bound");
        if group.is_some() {
            std::os::unix::fs::chown(path, None, group)
                .map_err(|error| format!("cannot give it to that group: {error}"))?;
        }
        fs::set_permissions(path, Permissions::from_mode(mode)).map_err(os)?;
        net::set_nonblocking(&listener, true).map_err(os)?;
        // Who connected before the permissions were set may not have been allowed to.
        while net::unix_accept(&listener).is_ok() {}
        let identity = identity(path).map_err(os)?;
        named.keep();
        Ok(Self { listener, path: path.to_owned(), identity, is_left: AtomicBool::new(false) })
    }

    /// Goes on listening with `listener`, which was bound to `path`, if its name still is there:
    /// `identity` then. It is [left](Socket::set_left) at first.
    pub(crate) fn resume(listener: Fd, path: &Path, identity: FileIdentity) -> Option<Self> {
        let is_there = self::identity(path).is_ok_and(|found| found == identity);
        is_there.then(|| Self {
            listener,
            path: path.to_owned(),
            identity,
            is_left: AtomicBool::new(true),
        })
    }

    /// Sets who may connect, anew.
    pub(crate) fn set_access(&self, mode: u32, group: Option<u32>) -> io::Result<()> {
        if group.is_some() {
            std::os::unix::fs::chown(&self.path, None, group)?;
        }
        fs::set_permissions(&self.path, Permissions::from_mode(mode))
    }

    /// Whether its name stays when this is dropped: somebody else has the listener.
    pub(crate) fn set_left(&self, is_left: bool) {
        self.is_left.store(is_left, Ordering::Relaxed);
    }

    /// Which file its name is.
    pub(crate) fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// The next connection; `WouldBlock` if nobody waits.
    fn accept(&self) -> io::Result<Fd> {
        net::unix_accept(&self.listener)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Socket {
    /// Takes the name away, unless it belongs to another socket by now, or to the parent process.
    fn drop(&mut self) {
        // While it still listens nobody replaces it, so nothing can come between.
        if self.listener.is_current()
            && !*self.is_left.get_mut()
            && identity(&self.path).is_ok_and(|found| found == self.identity)
        {
            let _ = fs::remove_file(&self.path);
            reached("socket.removed");
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Removes a new socket's name again, should the rest of making it fail.
struct NamedSocket<'path>(&'path Path);

impl NamedSocket<'_> {
    fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for NamedSocket<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}

/// Removes what a dead server left at `path`; refuses if anything else is there.
fn remove_stale(path: &Path) -> Result<(), String> {
    let refuse = |reason: &str| Err(reason.to_owned());
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return refuse(&format!("cannot look at it: {error}")),
        Ok(found) if !found.file_type().is_socket() => {
            return refuse(
                "something that is not a socket is there; remove it, or take another path",
            )
        }
        Ok(_) => {}
    }
    match probe(path).map_err(|error| error.to_string())? {
        Probed::Listening => {
            refuse("a server is listening there already; stop it first, or take another path")
        }
        Probed::Refused(error) if errno::is(&error, errno::ECONNREFUSED) => {
            if let Err(error) = fs::remove_file(path) {
                return refuse(&format!(
                    "a dead server's socket is there and cannot be removed: {error}"
                ));
            }
            reached("socket.stale_removed");
            Ok(())
        }
        Probed::Refused(error) => {
            refuse(&format!("cannot tell whether a server is listening there: {error}"))
        }
    }
}

/// What a connection attempt tells about a socket file.
enum Probed {
    Listening,
    Refused(io::Error),
}

/// Tries to connect. Whoever listens sees somebody come and go.
///
/// Connecting waits while a listener's backlog is full (it may be stopped), so a thread does it.
fn probe(path: &Path) -> io::Result<Probed> {
    let (answer, answered) = mpsc::channel();
    let target = path.to_owned();
    thread::spawn("ivsmc-probe", move || {
        // The other end may no longer be interested.
        let _ = answer.send(net::unix_connect(&target));
    })?;
    Ok(match answered.recv_timeout(PROBE_PATIENCE) {
        Ok(Err(error)) => Probed::Refused(error),
        Ok(Ok(_)) | Err(_) => Probed::Listening,
    })
}

/// The right to judge and replace what is at a path, among servers that start there.
///
/// It is a lock on a file beside the path, which is removed again before the lock is given back;
/// so who obtains the lock looks whether the file still has its name.
struct Turn {
    path: PathBuf,
    _locked: Fd,
}

impl Turn {
    fn take(socket: &Path) -> Result<Self, String> {
        let mut name = socket.as_os_str().to_owned();
        name.push(".lock");
        let path = PathBuf::from(name);
        let refuse = |error: io::Error| match error.raw_os_error() {
            Some(errno::ENOENT) => "its directory does not exist; make it first".to_owned(),
            _ => format!("cannot lock {}: {error}", path.display()),
        };
        let begun = Instant::now();
        loop {
            let file = file::open_nofollow(&path, Access::CreateOrOpen(0o600)).map_err(refuse)?;
            if lock::try_lock_byte(&file, 0).map_err(refuse)? {
                let mine = file::status(&file).map_err(refuse)?.identity;
                if identity(&path).is_ok_and(|named| named == mine) {
                    return Ok(Self { path, _locked: file });
                }
            } else if begun.elapsed() > START_PATIENCE {
                return Err(format!(
                    "another server is starting there (it holds {})",
                    path.display()
                ));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn identity(path: &Path) -> io::Result<FileIdentity> {
    let found = fs::symlink_metadata(path)?;
    Ok(FileIdentity { device: found.dev(), inode: found.ino() })
}
