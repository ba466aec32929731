//! Devices: the ways to a region.
//!
//! Each module opens one kind: it judges what it finds, maps the region through an open file
//! description of its own where it can (so that a lock taken through it lives exactly as long as
//! the mapping), and says how this process will be known to be dead. [`crate::attachment`] does
//! the rest, the same for all of them.

mod agent;
mod doorbell;
mod file;
mod function;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
#[cfg(test)]
pub(crate) mod guest;
mod host;
mod local;
mod pci;
mod probe;
mod spec;
#[cfg(test)]
pub(crate) mod tests;
mod vfio;

use std::io;
use std::sync::Arc;

use ivsmc_proto::layout::Geometry;
use ivsmc_proto::region::RegionError;
use ivsmc_shm::errno;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::file::{self as files, FileSystem, Status};
use ivsmc_shm::mapping::Mapping;

use crate::fallback::Reason;
use crate::Error;

pub(crate) use agent::AgentClient;
pub(crate) use doorbell::Doorbells;
pub(crate) use function::ivshmem_devices;
pub(crate) use host::Link;
pub(crate) use local::LocalFile;
pub(crate) use pci::PciDevice;
pub use probe::MemoryType;
pub(crate) use probe::Probe;
pub use spec::Kind;
pub(crate) use spec::{DeviceSpec, Place};
pub(crate) use vfio::{own as own_vfio, VfioDevice, DRIVER as VFIO_DRIVER};

/// Opens what `spec` names.
///
/// # Errors
/// [`Unusable`]; nothing is left behind then.
pub(crate) fn open(spec: &DeviceSpec) -> Result<Opened, Unusable> {
    match spec.place() {
        Place::Vfio(address) => vfio::open(*address),
        Place::Agent(socket) => agent::open(socket),
        Place::Host(socket) => host::open(socket),
        Place::Pci(address) => pci::open(*address),
        Place::Local => local::open(),
        Place::File(path) => file::open(path),
    }
}

/// A mapped region, not yet attached to.
pub(crate) struct Opened {
    pub(crate) mapping: Arc<Mapping>,
    /// The memory of the whole region exists: nothing needs to be reserved.
    pub(crate) whole: bool,
    /// The mapping has an open file description of its own, so it can hold locks.
    pub(crate) lockable: bool,
    pub(crate) backing: Backing,
}

/// What stands behind a mapping while it is attached.
pub(crate) enum Backing {
    /// The private region of this user; the last one out removes it.
    Local(LocalFile),
    /// A file that somebody made and somebody else removes.
    File,
    /// The connection to an ivshmem server.
    Host(Arc<Link>),
    /// The VFIO device of a guest, owned by this process.
    Vfio(Arc<VfioDevice>),
    /// The VFIO device of a guest, owned by an agent.
    Agent(Arc<AgentClient>),
    /// A guest's device without VFIO.
    Pci(PciDevice),
}

/// Why a device cannot be used now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unusable {
    /// The reason sessions give that fall back because of it.
    pub(crate) reason: Reason,
    /// The way was found, but what it leads to is no usable region.
    pub(crate) is_region: bool,
    /// What was found and what mends it.
    pub(crate) sentence: String,
}

impl Unusable {
    /// The device itself cannot be used.
    pub(crate) fn device(sentence: impl Into<String>) -> Self {
        Self { reason: Reason::NoDevice, is_region: false, sentence: sentence.into() }
    }

    /// What is behind the device is no region of this version.
    pub(crate) fn region(sentence: impl Into<String>) -> Self {
        Self { reason: Reason::NoDevice, is_region: true, sentence: sentence.into() }
    }

    /// As an error about the device `spec`.
    pub(crate) fn to_error(&self, spec: &str) -> Error {
        if self.is_region {
            Error::region(spec, self.sentence.clone())
        } else {
            Error::device(spec, self.sentence.clone())
        }
    }
}

impl Backing {
    /// The doorbells of the device.
    pub(crate) fn doorbells(&self) -> Option<&dyn Doorbells> {
        match self {
            Self::Host(link) => Some(&**link),
            Self::Vfio(device) => Some(&**device),
            Self::Agent(client) => Some(&**client),
            Self::Pci(device) => device.doorbells(),
            Self::Local(_) | Self::File => None,
        }
    }

    /// Whether the memory is a guest's device's, of which nothing tells what kind it is.
    pub(crate) fn is_guests(&self) -> bool {
        matches!(self, Self::Vfio(_) | Self::Agent(_) | Self::Pci(_))
    }

    /// The id of a guest's device at the ivshmem server, if it has one.
    pub(crate) fn guest_id(&self) -> Option<u16> {
        self.doorbells().filter(|_| self.is_guests()).map(Doorbells::ivposition)
    }

    /// The newcomer has its slot.
    pub(crate) fn settled(&self, mapping: &Mapping) {
        match self {
            Self::Local(file) => file.settled(mapping),
            Self::File | Self::Host(_) | Self::Vfio(_) | Self::Agent(_) | Self::Pci(_) => {}
        }
    }

    /// The newcomer gets no slot, because of what is `refused`: what it made goes with it.
    pub(crate) fn abandon(&self, mapping: &Mapping, refused: Unusable) -> Unusable {
        match self {
            Self::Local(file) => {
                file.abandon(mapping);
                file.name(refused)
            }
            Self::File | Self::Host(_) | Self::Vfio(_) | Self::Agent(_) | Self::Pci(_) => refused,
        }
    }
}

impl From<RegionError> for Unusable {
    fn from(error: RegionError) -> Self {
        Self::region(error.to_string())
    }
}

/// Refuses file systems on which two mappings of one file need not be the same memory.
fn judge_file_system(found: &FileSystem) -> Result<(), Unusable> {
    // sysfs shares memory, but a device of this process's own guest is reached another way.
    if found.really_shares_memory() && found.name() != Some("sysfs") {
        return Ok(());
    }
    let name = found
        .name()
        .map_or_else(|| format!("of unknown type {:#x}", found.magic), ToOwned::to_owned);
    Err(Unusable::device(format!(
        "its file system is {name}, where two processes that map one file need not share memory; \
         put it on tmpfs (for instance below /dev/shm), hugetlbfs, ext4, xfs or btrfs"
    )))
}

/// Maps the file and reserves its tables, the common end of every way; also whether the memory
/// of the whole region is there.
fn map(fd: Fd, status: &Status, on: &FileSystem) -> Result<(Arc<Mapping>, bool), Unusable> {
    let geometry = Geometry::of(status.size)?;
    let tables = geometry.fixed_range();
    let is_allocated = status.reserved >= status.size;
    let mapping = Mapping::map(fd, geometry.size())
        .map_err(|error| Unusable::device(format!("it cannot be mapped: {error}")))?;
    // Elsewhere a block that is there may still be moved, which takes another one.
    let mut is_whole = is_allocated && on.is_memory();
    if !is_whole {
        match mapping.reserve(tables.clone()) {
            Ok(()) => {}
            // A file system without reservations, as ext2: all its blocks must be there.
            Err(error) if error.kind() == io::ErrorKind::Unsupported && is_allocated => {
                is_whole = true;
            }
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                return Err(Unusable::device(
                    "its file system cannot reserve memory, and the file has holes; fill it with \
                     zeros (dd if=/dev/zero bs=1M) instead of truncate",
                ));
            }
            Err(error) if is_full(&error) => {
                return Err(Unusable::device(format!(
                    "its file system has no room for the {} KiB of tables of the region",
                    tables.end / 1024
                )));
            }
            Err(error) => {
                return Err(Unusable::device(format!("its memory cannot be reserved: {error}")))
            }
        }
    }
    Ok((Arc::new(mapping), is_whole))
}

/// Whether a reservation failed for want of memory.
fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(errno::ENOSPC | errno::ENOMEM | errno::EDQUOT))
}

/// Whether the memory limit of this process leaves room for `bytes` more: reserving beyond it does
/// not fail but has a process killed.
pub(crate) fn has_room(bytes: u64) -> bool {
    /// What must be left for others.
    const MARGIN: u64 = 4 << 20;
    files::memory_room().is_none_or(|room| room >= bytes + MARGIN)
}

/// The file system below `fd`.
fn file_system(fd: &Fd) -> Result<FileSystem, Unusable> {
    files::file_system(fd)
        .map_err(|error| Unusable::device(format!("its file system cannot be told: {error}")))
}
