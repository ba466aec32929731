//! The region an ivshmem server hands out, and its word on who has left.
//!
//! A guest cannot prove that another guest is dead; the ivshmem server can, because a client's
//! socket ends with the client. So it formats the region itself and says in it that it is there
//! (`ivsmc_proto::marker`); while it is, slots may name their ivposition as prover. So that an id
//! means one client only, also when ivshmem servers follow each other on one file, it says there as
//! well which ids it has given out.
//!
//! The clients of a server that ended live on, and nobody sees their end. But once nobody on this host
//! has the file open or mapped any more, none of them is left: then the next server begins anew.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use ivsmc_proto::failpoint::reached;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotRef, SlotState};
use ivsmc_shm::fd::Fd;
use ivsmc_shm::file::{self, Access};
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::{errno, lock};

use crate::{Error, Result};

/// Where the shared memory comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Anonymous memory of this many bytes, sealed so that no client can change its size, and
    /// reserved whole. It lives as long as the ivshmem server or a client does.
    Memfd {
        /// A power of two, at least 1 MiB.
        size: u64,
    },
    /// A file, reserved whole; made with this size if it does not exist. Who may write it may cut
    /// it, so it should belong to the ivshmem server's user.
    File {
        /// Its path; not a symbolic link.
        path: PathBuf,
        /// A power of two, at least 1 MiB; absent: the size the file has.
        size: Option<u64>,
    },
}

/// The region of an ivshmem server.
#[derive(Debug)]
pub(super) struct Memory {
    /// Ids below this one may be those of clients of an earlier ivshmem server, whose end nobody sees.
    first_id: u32,
    /// What clients are given.
    shared: Fd,
    /// Mapped through an open file of the ivshmem server's own: no client shares its lock.
    region: Region<Mapping>,
    instance: NonZeroU64,
    /// Somebody else has the lock, too, and the marking server is to be believed in.
    is_left: AtomicBool,
}

impl Memory {
    /// The region of an ivshmem server that begins.
    pub(super) fn new(backing: &Backing) -> Result<Self> {
        let (own, size, name) = match backing {
            Backing::Memfd { size } => (memfd(*size)?, *size, "memory".to_owned()),
            Backing::File { path, size } => {
                let (fd, size) = open_or_make(path, *size)?;
                (fd, size, path.display().to_string())
            }
        };
        let refuse = |what: &str, error: io::Error| refusal(&name, format!("{what}: {error}"));
        let mapping = Mapping::map(own, size).map_err(|error| refuse("cannot map it", error))?;
        let uuid = file::random_u128().map_err(|error| refuse("no random numbers", error))?;
        let region = Region::attach(mapping, uuid)
            .map_err(|error| Error::region(spec(&name), error.to_string()))?;
        // Before the instance word is set: who finds the word may rely on the lock.
        let at = region.marking_server_offset();
        if !lock::try_lock_byte(region.memory().fd(), at)
            .map_err(|error| refuse("cannot lock it", error))?
        {
            return Err(refusal(
                &name,
                "another ivshmem server hands it out already; stop that one, or give this one a \
                 file of its own"
                    .into(),
            ));
        }
        reached("marker.locked");
        let random = file::random_u128().map_err(|error| refuse("no random numbers", error))?;
        #[allow(clippy::cast_possible_truncation)] // any 64 of the random bits do
        let instance = NonZeroU64::new(random as u64).unwrap_or(NonZeroU64::MAX);
        // Under the lock, and while this is the only open file there can be.
        if lock::is_only_open_file(region.memory().fd()).unwrap_or(false) {
            begin_anew(&region);
        }
        let shared =
            reopen(region.memory().fd()).map_err(|error| refuse("cannot open it again", error))?;
        region.set_marking_server(instance);
        let is_left = AtomicBool::new(false);
        Ok(Self { first_id: region.ids_given(), shared, region, instance, is_left })
    }

    /// That of one that goes on, through the open file `own` which has the lock; it is [left] at first.
    ///
    /// [left]: Memory::set_left
    pub(super) fn resume(own: Fd, first_id: u32, instance: u64) -> Result<Self> {
        let name = "what was kept";
        let refuse = |what: &str, error: io::Error| refusal(name, format!("{what}: {error}"));
        let size = file::status(&own).map_err(|error| refuse("cannot look at it", error))?.size;
        let mapping = Mapping::map(own, size).map_err(|error| refuse("cannot map it", error))?;
        // It has a uuid.
        let region = Region::attach(mapping, 1)
            .map_err(|error| Error::region(spec(name), error.to_string()))?;
        let at = region.marking_server_offset();
        if !lock::try_lock_byte(region.memory().fd(), at)
            .map_err(|error| refuse("cannot lock it", error))?
        {
            return Err(refusal(name, "another ivshmem server hands it out meanwhile".into()));
        }
        let shared =
            reopen(region.memory().fd()).map_err(|error| refuse("cannot open it again", error))?;
        let instance = NonZeroU64::new(instance).unwrap_or(NonZeroU64::MAX);
        region.set_marking_server(instance);
        Ok(Self { first_id, shared, region, instance, is_left: AtomicBool::new(true) })
    }

    /// Whether its words stay when this is dropped: somebody else has the lock, and a successor follows.
    pub(super) fn set_left(&self, is_left: bool) {
        self.is_left.store(is_left, Ordering::Relaxed);
    }

    /// The open file with the lock.
    pub(super) fn own(&self) -> BorrowedFd<'_> {
        self.region.memory().fd()
    }

    /// Stands in the region while this ivshmem server is there.
    pub(super) fn instance(&self) -> u64 {
        self.instance.get()
    }

    /// The file that the region is; absent for a memfd.
    pub(super) fn path(&self) -> Option<PathBuf> {
        let fd = self.own().as_raw_fd();
        let path = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
        let is_memfd = path.as_os_str().as_encoded_bytes().starts_with(b"/memfd:");
        (!is_memfd).then_some(path)
    }

    /// Ids below this one may be those of clients of an earlier ivshmem server on the same file.
    pub(super) fn first_id(&self) -> u32 {
        self.first_id
    }

    /// Says in the region that `id` is about to be given out.
    pub(super) fn give(&self, id: u16) {
        let given = self.region.ids_given().max(u32::from(id) + 1);
        self.region.set_ids_given(given);
    }

    /// Says in the region that all the clients of this ivshmem server were seen to leave: a later
    /// one may give their ids out again.
    pub(super) fn all_left(&self) {
        self.region.set_ids_given(self.first_id);
    }

    /// What clients are given.
    pub(super) fn shared(&self) -> BorrowedFd<'_> {
        self.shared.as_fd()
    }

    pub(super) fn region(&self) -> &Region<Mapping> {
        &self.region
    }

    /// Ids that live slots name as those of their devices, in no order.
    ///
    /// Some may be of clients of an earlier ivshmem server on the same file: whether those are
    /// dead nobody can tell any more, so their ids must not be given to others.
    pub(super) fn named_ids(&self) -> impl Iterator<Item = u16> + '_ {
        self.region.slots().filter_map(|(_, state)| match state {
            SlotState::Live { at, prover } => self.id_of(at, prover),
            _ => None,
        })
    }

    /// Marks dead whatever slots name `id` as that of their device, and takes back what they held.
    ///
    /// Returns how many there were. The caller has seen the end of the client `id`.
    pub(super) fn mark_leaver(&self, id: u16) -> usize {
        let mut marked = 0;
        for (at, prover) in self.region.claimed() {
            if self.id_of(at, prover) == Some(id) {
                marked += usize::from(self.region.mark_dead(at));
                self.region.reclaim(at);
            }
        }
        marked
    }

    fn id_of(&self, at: SlotRef, prover: Prover) -> Option<u16> {
        self.region.ivposition_of(at, prover)
    }
}

/// Nobody else has the file: takes back what clients of earlier ivshmem servers left, and begins with
/// the ids anew.
fn begin_anew(region: &Region<Mapping>) {
    for (at, prover) in region.claimed() {
        if region.ivposition_of(at, prover).is_some() {
            region.mark_dead(at);
            region.reclaim(at);
        }
    }
    // After that, so that no slot names an id that seems never to have been given.
    region.set_ids_given(0);
}

impl Drop for Memory {
    fn drop(&mut self) {
        if !*self.is_left.get_mut() {
            // In a forked child these are private zero pages.
            self.region.clear_marking_server(self.instance);
        }
    }
}

/// A memfd of `size` bytes, reserved and sealed.
fn memfd(size: u64) -> Result<Fd> {
    let refuse = |what: &str, error: io::Error| refusal("memory", format!("{what}: {error}"));
    judge_size("memory", size)?;
    let fd = file::memfd(c"ivsmc-region").map_err(|error| refuse("cannot make a memfd", error))?;
    reserve(&fd, size, "memory")?;
    file::seal_size(&fd).map_err(|error| refuse("cannot seal it", error))?;
    Ok(fd)
}

/// The file at `path` with its size; made with `size` if it is not there.
fn open_or_make(path: &Path, size: Option<u64>) -> Result<(Fd, u64)> {
    let name = path.display().to_string();
    let refuse = |reason: String| refusal(&name, reason);
    match file::open_nofollow(path, Access::Existing) {
        Ok(fd) => {
            let size = judge_file(&fd, size, &name)?;
            reserve(&fd, size, &name)?;
            Ok((fd, size))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let Some(size) = size else {
                return Err(refuse("it does not exist; give a size to make it".into()));
            };
            judge_size(&name, size)?;
            let fd =
                file::open_nofollow(path, Access::CreateNew(0o600)).map_err(|error| match error
                    .raw_os_error()
                {
                    Some(errno::ENOENT) => {
                        refuse("its directory does not exist; make it first".into())
                    }
                    _ => refuse(format!("cannot make it: {error}")),
                })?;
            reached("region.made");
            if let Err(error) =
                judge_file_system(&fd, &name).and_then(|()| reserve(&fd, size, &name))
            {
                let _ = file::unlink(path);
                return Err(error);
            }
            reached("region.reserved");
            Ok((fd, size))
        }
        Err(error) => Err(refuse(format!("cannot open it: {error}"))),
    }
}

/// The size of a file that was there, or is to be given to it.
fn judge_file(fd: &Fd, size: Option<u64>, name: &str) -> Result<u64> {
    let status =
        file::status(fd).map_err(|error| refusal(name, format!("cannot look at it: {error}")))?;
    if !status.is_regular() {
        return Err(refusal(name, "it is not a regular file".into()));
    }
    judge_file_system(fd, name)?;
    let found = match (status.size, size) {
        // Made by an ivshmem server that was killed before it gave it a size: nobody uses it.
        (0, Some(size)) => size,
        (found, _) => found,
    };
    judge_size(name, found)?;
    match size {
        Some(size) if size != found => Err(refusal(
            name,
            format!(
                "it has {found} bytes, not {size}; others may use it, so its size is not changed: \
                 leave the size out, or remove the file"
            ),
        )),
        _ => Ok(found),
    }
}

fn judge_file_system(fd: &Fd, name: &str) -> Result<()> {
    let found = file::file_system(fd)
        .map_err(|error| refusal(name, format!("cannot tell its file system: {error}")))?;
    if found.really_shares_memory() {
        return Ok(());
    }
    let kind = found.name().map_or_else(|| format!("{:#x}", found.magic), str::to_owned);
    Err(refusal(
        name,
        format!(
            "its file system ({kind}) does not share memory between all processes of the host; \
             take one on tmpfs, for instance in /dev/shm"
        ),
    ))
}

/// QEMU shows the region as a PCI BAR, which can have only such sizes.
fn judge_size(name: &str, size: u64) -> Result<()> {
    const SMALLEST: u64 = 1 << 20;
    const LARGEST: u64 = 1 << 45;
    if size.is_power_of_two() && (SMALLEST..=LARGEST).contains(&size) {
        return Ok(());
    }
    let proper = size.clamp(SMALLEST, LARGEST).next_power_of_two();
    Err(refusal(
        name,
        format!(
            "{size} bytes cannot be shown to guests: a PCI BAR is a power of two, and a region \
             at least 1 MiB; take {} MiB",
            proper >> 20
        ),
    ))
}

/// Backs all `size` bytes with memory, making the file longer if need be.
fn reserve(fd: &Fd, size: u64, name: &str) -> Result<()> {
    file::allocate(fd, 0..size).map_err(|error| {
        refusal(
            name,
            format!(
                "cannot reserve {} MiB: {error}; take a smaller size, or free memory",
                size >> 20
            ),
        )
    })
}

/// The same file through another open file.
fn reopen(fd: impl AsRawFd) -> io::Result<Fd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    Ok(Fd::from(OwnedFd::from(file)))
}

fn spec(name: &str) -> String {
    format!("ivshmem server on {name}")
}

fn refusal(name: &str, reason: String) -> Error {
    Error::device(spec(name), reason)
}
