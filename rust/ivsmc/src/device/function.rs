//! ivshmem devices among the PCI functions of a guest.
//!
//! Facts of the device are those of QEMU `docs/specs/ivshmem-spec.rst`.

use std::io;
use std::path::Path;

use ivsmc_proto::layout::MIN_REGION;
use ivsmc_shm::mmio::Registers;
use ivsmc_shm::pci::{self, Address, Function};

use super::Unusable;

/// Vendor and device id of ivshmem.
const IVSHMEM: (u16, u16) = (0x1af4, 0x1110);
/// Base class and subclass: a memory controller for RAM.
const CLASS_RAM: u32 = 0x0500;

/// The BAR of the registers.
pub(super) const REGISTERS: usize = 0;
/// The BAR of the shared memory.
pub(super) const MEMORY: usize = 2;

/// Bytes of the registers.
pub(super) const REGISTERS_SIZE: u64 = 256;
/// The register with the own id, 0..=65535.
const IVPOSITION: u64 = 8;
/// The doorbell: target id in the upper half, vector in the lower.
const DOORBELL: u64 = 12;
/// Vectors a doorbell can name: QEMU's slow path takes 8 bits of one.
const VECTORS: u16 = 256;

/// The ivshmem devices below `sysfs`, in the order of their addresses.
pub(crate) fn ivshmem_devices(sysfs: &Path) -> Vec<Function> {
    let is_one = |function: &Function| {
        function.ids().is_ok_and(|ids| ids == IVSHMEM)
            && function.class().is_ok_and(|class| class >> 8 == CLASS_RAM)
    };
    let functions = pci::addresses(sysfs).into_iter();
    functions.filter_map(|at| Function::find(sysfs, at).ok()).filter(is_one).collect()
}

/// Finds and judges the ivshmem device at `address`.
pub(super) fn find(sysfs: &Path, address: Address) -> Result<Function, Unusable> {
    let function = Function::find(sysfs, address).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            Unusable::device(format!("there is no PCI device here; {}", others(sysfs)))
        }
        _ => unreadable(&error),
    })?;
    let (vendor, device) = function.ids().map_err(|error| unreadable(&error))?;
    if (vendor, device) != IVSHMEM {
        return Err(Unusable::device(format!(
            "it is not an ivshmem device ({vendor:04x}:{device:04x} instead of 1af4:1110); {}",
            others(sysfs)
        )));
    }
    let revision = function.revision().map_err(|error| unreadable(&error))?;
    if revision == 0 {
        return Err(Unusable::device(
            "it is an ivshmem device of revision 0, from a QEMU before 2.6 or its device \
             \"ivshmem\"; give the machine an ivshmem-doorbell or ivshmem-plain device",
        ));
    }
    let memory = function.resource(MEMORY).map_err(|error| unreadable(&error))?;
    judge_size(memory.map_or(0, |memory| memory.size))?;
    Ok(function)
}

/// Refuses memory that holds no region.
pub(super) fn judge_size(size: u64) -> Result<(), Unusable> {
    if size >= MIN_REGION {
        return Ok(());
    }
    Err(Unusable::region(format!(
        "its shared memory (BAR2) has {size} bytes, and a region needs at least {} MiB; give the \
         ivshmem server, or the memory-backend-file, a larger size",
        MIN_REGION >> 20
    )))
}

/// Which ivshmem devices there are.
fn others(sysfs: &Path) -> String {
    let names: Vec<_> =
        ivshmem_devices(sysfs).iter().map(|found| found.address().to_string()).collect();
    if names.is_empty() {
        "this machine has no ivshmem device (\"ivsmc qemu-args\" on its host says how to give it \
         one)"
            .into()
    } else {
        format!("ivshmem devices here: {}", names.join(", "))
    }
}

fn unreadable(error: &io::Error) -> Unusable {
    Unusable::device(format!("what it is cannot be read from sysfs: {error}"))
}

/// The registers of an ivshmem-doorbell device.
pub(crate) struct DoorbellRegisters {
    registers: Registers,
    ivposition: u16,
}

impl DoorbellRegisters {
    /// Reads the id, which stays as it is.
    pub(super) fn new(registers: Registers) -> Result<Self, Unusable> {
        let found = registers.load(IVPOSITION).map_err(|error| {
            Unusable::device(format!("its registers (BAR0) cannot be read: {error}"))
        })?;
        let ivposition = u16::try_from(found).map_err(|_| {
            Unusable::device(format!(
                "its id reads {found:#x}: it has none from its ivshmem server, or does not answer; \
                 start the machine anew while the ivshmem server runs"
            ))
        })?;
        Ok(Self { registers, ivposition })
    }

    pub(crate) fn ivposition(&self) -> u16 {
        self.ivposition
    }

    /// Notifies; false if there is no such vector.
    pub(crate) fn notify(&self, ivposition: u16, vector: u16) -> bool {
        let value = u32::from(ivposition) << 16 | u32::from(vector);
        vector < VECTORS && self.registers.store(DOORBELL, value).is_ok()
    }
}
