//! Which boot of which machine this process runs in, as far as the kernel itself says so.

use std::io;

use ivsmc_proto::host::Boot;
use ivsmc_shm::file::{self, BootId};

/// The boot, and what to mix into the cookie of the network namespace: 0 if the boot is known.
///
/// A process that does not know its boot does not say which machine it is on either: the two together
/// are a proof of death. See `ivsmc_proto::proof`.
///
/// # Errors
/// Those of a process without descriptors or memory to look; if there are no random numbers.
pub(crate) fn here() -> io::Result<(Boot, u64)> {
    let boot = match file::boot_id()? {
        BootId::Kernels(id) => (Boot { id, machine: file::machine_uuid()?.unwrap_or(0) }, 0),
        BootId::Masked { mask } => (Boot { id: 0, machine: 0 }, mask),
    };
    Ok(boot)
}
