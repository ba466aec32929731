//! The locks by which attachments prove to each other that they live.

use std::io;

use ivsmc_proto::judge::Locks;
use ivsmc_shm::lock as locks;
use ivsmc_shm::mapping::Mapping;

/// The locks on the file behind a mapping. That of a slot lives as long as the mapping.
pub(super) struct FileLocks<'a>(pub(super) &'a Mapping);

impl Locks for FileLocks<'_> {
    type Error = io::Error;

    fn try_lock(&self, at: u64) -> io::Result<bool> {
        locks::try_lock_byte(self.0.fd(), at)
    }

    fn unlock(&self, at: u64) -> io::Result<()> {
        locks::unlock_byte(self.0.fd(), at)
    }
}
