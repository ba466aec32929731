//! The device that an agent owns.

use std::io;
use std::os::fd::BorrowedFd;

use ivsmc_proto::agent::Part;
use ivsmc_shm::poll::EventFd;

/// A device with doorbells that nobody else has.
pub(super) trait OwnedDevice: Send + Sync {
    /// Its id at the ivshmem server.
    fn ivposition(&self) -> u16;

    /// How many vectors it has, 1..=65536.
    fn vectors(&self) -> u16;

    /// From now on what comes on `vector` is counted by `eventfd`, and by nothing else.
    fn wire(&self, vector: u16, eventfd: &EventFd) -> io::Result<()>;

    /// The descriptor that gives memory and registers to whoever has it.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Where the shared memory is in the descriptor.
    fn memory(&self) -> Part;

    /// Where the registers are in the descriptor.
    fn registers(&self) -> Part;

    /// The registers can be mapped; else they are read and written.
    fn can_map_registers(&self) -> bool;
}
