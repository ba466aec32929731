//! `local`: the embedded default, a private region of this user.
//!
//! ```text
//!   /dev/shm/ivsmc-UID/         0700, of this user
//!   /dev/shm/ivsmc-UID/region   0600, of this user, one link, sparse
//! ```
//!
//! Others may write to `/dev/shm`, so everything found there is judged before it is used: no
//! symbolic links, the right owner, nobody else's permissions, one link, a file system that
//! shares memory. What fails is not repaired but named, with `LOCAL_UNSAFE`.
//!
//! **Coming and going.** The first one makes the file, the last one removes it. Both hold the lock
//! on the file's byte 0 ([`COMING_AND_GOING`]) while they do: a newcomer from before it looks at
//! the size until it has claimed its slot, a leaver from before it gives its slot back until the
//! file is removed or others are seen to be there. A newcomer that got the lock on a file that was
//! removed meanwhile sees that the name means another file, and begins again. The kernel releases
//! the lock of a process that dies in between; a region half made is completed by the next one.

use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use ivsmc_proto::failpoint::reached;
use ivsmc_shm::errno;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::file::{self as files, Access, FileIdentity, Status};
use ivsmc_shm::lock;
use ivsmc_shm::mapping::Mapping;

use super::{Backing, Opened, Unusable};
use crate::fallback::Reason;

/// The byte whose lock a newcomer or leaver holds. No slot has its claim word there.
const COMING_AND_GOING: u64 = 0;

/// Longest wait for another process that comes; only a stopped one takes so long.
const COMING: Duration = Duration::from_secs(2);

/// Longest wait when leaving: who does not get the lock leaves the file for the next one.
const GOING: Duration = Duration::from_millis(500);

/// Bytes of the region at most.
const MOST: u64 = 1 << 30;

/// Bytes of the region at least.
const LEAST: u64 = 4 << 20;

/// Where the directory is made; a variable for tests and for systems without `/dev/shm`.
const PARENT_VARIABLE: &str = "IVSMC_LOCAL_DIR";
const PARENT: &str = "/dev/shm";

/// Bytes of the region if it is made now, with K, M or G behind it.
const SIZE_VARIABLE: &str = "IVSMC_LOCAL_SIZE";

/// The file of the private region, as the one attached to it knows it.
#[derive(Debug)]
pub(crate) struct LocalFile {
    directory: PathBuf,
    file: PathBuf,
    /// This process gave it its size.
    created: bool,
}

/// Opens the region of this user, made if there is none, with [`COMING_AND_GOING`] locked.
pub(super) fn open() -> Result<Opened, Unusable> {
    let parent = std::env::var_os(PARENT_VARIABLE).unwrap_or_else(|| PARENT.into());
    let size = match std::env::var(SIZE_VARIABLE) {
        Ok(text) => Some(parse_size(&text)?),
        Err(_) => None,
    };
    open_below(Path::new(&parent), size)
}

/// [`open`] with the environment's part given.
pub(crate) fn open_below(parent: &Path, size: Option<u64>) -> Result<Opened, Unusable> {
    let user = files::effective_uid();
    let directory = parent.join(format!("ivsmc-{user}"));
    let file = directory.join("region");
    let until = Instant::now() + COMING;
    loop {
        make_directory(&directory)?;
        judge_directory(&directory, user)?;
        let fd = match files::open_nofollow(&file, Access::CreateOrOpen(0o600)) {
            Ok(fd) => fd,
            // The last one out removed the directory just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < until => {
                continue;
            }
            Err(error) => return Err(cannot_open(&file, &error)),
        };
        if !lock_until(&fd, until).map_err(|error| cannot_open(&file, &error))? {
            return Err(Unusable::device(format!(
                "another process has been attaching to {} for {} s; is one of your processes \
                 stopped (state T)?",
                file.display(),
                COMING.as_secs(),
            )));
        }
        reached("local.made");
        let status = files::status(&fd).map_err(|error| cannot_open(&file, &error))?;
        judge_file(&file, &status, user)?;
        // Removed by the last one out while this process waited for the lock.
        if !is_named(&file, status.identity) {
            continue;
        }
        return map(fd, status, LocalFile { directory, file, created: false }, size);
    }
}

/// Gives the file its size if it has none, and maps it.
fn map(
    fd: Fd,
    mut status: Status,
    mut local: LocalFile,
    size: Option<u64>,
) -> Result<Opened, Unusable> {
    let identity = status.identity;
    // An empty file is one that somebody is to make, or died while making.
    local.created = status.size == 0;
    // Keeps the lock when mapping fails, until what was made is removed.
    let locked = fd.try_clone().map_err(|error| cannot_open(&local.file, &error))?;
    let mapped = (|| {
        let file_system = super::file_system(&fd)?;
        super::judge_file_system(&file_system)
            .map_err(|refused| unsafe_because(refused.sentence))?;
        if local.created {
            let size = match size {
                Some(size) => size,
                None => choose_size(file_system.available)?,
            };
            files::set_size(&fd, size)
                .map_err(|error| Unusable::device(format!("it cannot be made: {error}")))?;
            reached("local.sized");
            status.size = size;
        }
        super::map(fd, &status, &file_system)
    })();
    match mapped {
        Ok((mapping, whole)) => {
            Ok(Opened { mapping, whole, lockable: true, backing: Backing::Local(local) })
        }
        Err(refused) => {
            if local.created {
                local.remove(identity);
            }
            drop(locked);
            Err(local.name(refused))
        }
    }
}

impl LocalFile {
    /// The newcomer has its slot: others may come and go.
    pub(crate) fn settled(&self, mapping: &Mapping) {
        // It cannot fail for a lock that is held, and would end with the mapping in any case.
        let _ = lock::unlock_byte(mapping.fd(), COMING_AND_GOING);
    }

    /// The newcomer gets no slot: what it made goes with it.
    pub(crate) fn abandon(&self, mapping: &Mapping) {
        if self.created {
            self.remove(mapping.file_identity());
        }
        self.settled(mapping);
    }

    /// Begins to leave; false if others come or go all the time, or one of them is stopped.
    pub(crate) fn begin_to_leave(&self, mapping: &Mapping) -> bool {
        lock_until(mapping.fd(), Instant::now() + GOING).unwrap_or(false)
    }

    /// What is refused, with the name of the file, which the spec does not say.
    pub(crate) fn name(&self, refused: Unusable) -> Unusable {
        let sentence = format!("{}: {}", self.file.display(), refused.sentence);
        Unusable { sentence, ..refused }
    }

    /// The last one has left, with the lock held since before: gives the memory back.
    pub(crate) fn remove_last(&self, mapping: &Mapping) {
        self.remove(mapping.file_identity());
    }

    /// The name still means the file that is mapped.
    pub(crate) fn is_named(&self, mapping: &Mapping) -> bool {
        is_named(&self.file, mapping.file_identity())
    }

    fn remove(&self, identity: FileIdentity) {
        if is_named(&self.file, identity) {
            // What cannot be removed stays for the next one, who uses it as it is.
            let _ = files::unlink(&self.file);
            reached("local.removed");
            // Refused while a newcomer has made a file in it.
            let _ = std::fs::remove_dir(&self.directory);
        }
    }
}

fn make_directory(directory: &Path) -> Result<(), Unusable> {
    match files::make_private_directory(directory) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(Unusable::device(format!(
            "{} cannot be made ({error}); give this process a writable tmpfs there, or name \
             another directory in {PARENT_VARIABLE}",
            directory.display()
        ))),
    }
}

fn judge_directory(directory: &Path, user: u32) -> Result<(), Unusable> {
    let shown = directory.display();
    let found = files::open_nofollow(directory, Access::Directory).and_then(files::status);
    let status = match found {
        Ok(status) => status,
        // Removed just now by the last one out: opening the file tells, and begins again.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if errno::is(&error, errno::ENOTDIR) => {
            return Err(unsafe_because(format!(
                "{shown} is not a directory (symbolic links are not followed); remove it"
            )));
        }
        Err(error) => return Err(cannot_open(directory, &error)),
    };
    if status.uid != user {
        return Err(unsafe_because(format!(
            "{shown} belongs to user {} and not to user {user}; its owner or root must remove it",
            status.uid
        )));
    }
    if status.permissions() & 0o777 != 0o700 {
        return Err(unsafe_because(format!(
            "{shown} has mode {:04o} and must have 0700; look at who could have written there, \
             then \"chmod 700 {shown}\"",
            status.permissions()
        )));
    }
    Ok(())
}

fn judge_file(file: &Path, status: &Status, user: u32) -> Result<(), Unusable> {
    let shown = file.display();
    if !status.is_regular() {
        return Err(unsafe_because(format!("{shown} is not a regular file; remove it")));
    }
    if status.uid != user {
        return Err(unsafe_because(format!(
            "{shown} belongs to user {} and not to user {user}; remove it",
            status.uid
        )));
    }
    if status.permissions() & 0o7177 != 0 {
        return Err(unsafe_because(format!(
            "{shown} has mode {:04o}, and nobody but its owner may open it: \"chmod 600 {shown}\"",
            status.permissions()
        )));
    }
    // 0 while it is being removed, which the caller finds out.
    if status.links > 1 {
        return Err(unsafe_because(format!(
            "{shown} has {} names (hard links), so it can be reached from elsewhere; remove it",
            status.links
        )));
    }
    Ok(())
}

fn unsafe_because(sentence: String) -> Unusable {
    Unusable { reason: Reason::LocalUnsafe, is_region: false, sentence }
}

fn cannot_open(path: &Path, error: &io::Error) -> Unusable {
    let shown = path.display();
    match error.raw_os_error() {
        // What O_NOFOLLOW answers to a symbolic link.
        Some(errno::ELOOP) => unsafe_because(format!("{shown} is a symbolic link; remove it")),
        Some(errno::EISDIR) => unsafe_because(format!("{shown} is a directory; remove it")),
        Some(errno::EACCES) => unsafe_because(format!(
            "this process has no permission to read and write {shown}; remove it or chmod it"
        )),
        _ => Unusable::device(format!("{shown} cannot be opened: {error}")),
    }
}

/// Whether the name `file` means the file `identity`.
fn is_named(file: &Path, identity: FileIdentity) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(file)
        .is_ok_and(|found| FileIdentity { device: found.dev(), inode: found.ino() } == identity)
}

/// Takes [`COMING_AND_GOING`]; false if the time runs out.
fn lock_until(fd: impl std::os::fd::AsFd, until: Instant) -> io::Result<bool> {
    let mut pause = Duration::from_micros(50);
    loop {
        if lock::try_lock_byte(&fd, COMING_AND_GOING)? {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

/// Half of what the file system and the memory limit of this process have left.
fn choose_size(free: u64) -> Result<u64, Unusable> {
    let room = files::memory_room().unwrap_or(u64::MAX);
    let size = (free.min(room) / 2).min(MOST);
    if size < LEAST {
        return Err(Unusable::device(format!(
            "{} MiB are free there and {} within the memory limit of this process, and a region \
             of its own needs twice {} MiB; make /dev/shm larger (docker run --shm-size=...) or \
             raise the limit",
            free >> 20,
            if room == u64::MAX { "enough".to_owned() } else { format!("{} MiB", room >> 20) },
            LEAST >> 20,
        )));
    }
    Ok(size >> 20 << 20)
}

fn parse_size(text: &str) -> Result<u64, Unusable> {
    let text = text.trim();
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|size| (1 << 20..=1 << 40).contains(size))
        .ok_or_else(|| {
            Unusable::device(format!(
                "{SIZE_VARIABLE} is \"{text}\" and must be a number of bytes from 1M to 1024G"
            ))
        })
}
