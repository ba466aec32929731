//! `pci:0000:00:05.0`: an ivshmem device of a guest without VFIO, through the files of sysfs.
//!
//! Several processes may have it at once. Nothing comes in: peers wake this process over TCP. An
//! ivshmem-doorbell device is notified through, though. Who is dead, processes of one boot tell by
//! locks on the file `resource2`; of another boot, see `ivsmc_proto::proof`.

use std::io;
use std::path::Path;
use std::sync::Arc;

use ivsmc_shm::errno;
use ivsmc_shm::file as files;
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::mmio::Registers;
use ivsmc_shm::pci::{self, Address, Function};
use ivsmc_shm::poll::EventFd;

use super::function::{self, DoorbellRegisters};
use super::{Backing, Doorbells, Opened, Unusable};

/// The BAR of the MSI-X table, which only an ivshmem-doorbell device has.
const MSIX_TABLE: usize = 1;

/// Opens the device at `address`.
pub(super) fn open(address: Address) -> Result<Opened, Unusable> {
    open_below(Path::new(pci::SYSFS), address)
}

/// [`open`] with another sysfs.
pub(super) fn open_below(sysfs: &Path, address: Address) -> Result<Opened, Unusable> {
    let function = function::find(sysfs, address)?;
    switch_on(&function)?;
    let fd = function
        .open_resource(function::MEMORY)
        .map_err(|error| refusal(&function, function::MEMORY, &error))?;
    let status = files::status(&fd)
        .map_err(|error| Unusable::device(format!("its size cannot be told: {error}")))?;
    function::judge_size(status.size)?;
    let mapping = Mapping::map(fd, status.size)
        .map_err(|error| refusal(&function, function::MEMORY, &error))?;
    let doorbell = PciDevice { registers: registers(&function)? };
    Ok(Opened {
        mapping: Arc::new(mapping),
        // The host has backed all of it.
        whole: true,
        lockable: true,
        backing: Backing::Pci(doorbell),
    })
}

/// What there is beside the memory.
pub(crate) struct PciDevice {
    /// Of an ivshmem-doorbell device.
    registers: Option<DoorbellRegisters>,
}

impl PciDevice {
    /// The doorbells, if it has some.
    pub(crate) fn doorbells(&self) -> Option<&dyn Doorbells> {
        self.registers.as_ref().map(|registers| registers as &dyn Doorbells)
    }
}

/// Outgoing only.
impl Doorbells for DoorbellRegisters {
    fn ivposition(&self) -> u16 {
        self.ivposition()
    }

    fn own(&self) -> Option<(u16, &EventFd)> {
        None
    }

    fn departures(&self) -> Option<&EventFd> {
        None
    }

    fn notify(&self, ivposition: u16, vector: u16) -> bool {
        self.notify(ivposition, vector)
    }
}

/// Has the device answer at its addresses; firmware has usually done so.
fn switch_on(function: &Function) -> Result<(), Unusable> {
    let is_on = || function.command().map(|command| command & pci::COMMAND_MEMORY != 0);
    let off = |error: io::Error| {
        Unusable::device(format!(
            "its memory is switched off, and cannot be switched on: {error}; as root: echo 1 > \
             /sys/bus/pci/devices/{}/enable",
            function.address()
        ))
    };
    if !is_on().map_err(off)? {
        function.enable().map_err(off)?;
        if !is_on().map_err(off)? {
            return Err(off(io::Error::other("the kernel did not do it")));
        }
    }
    Ok(())
}

/// The registers of an ivshmem-doorbell device; an ivshmem-plain device's do nothing, and its id,
/// always 0, is none.
fn registers(function: &Function) -> Result<Option<DoorbellRegisters>, Unusable> {
    let bar = |index| {
        function
            .resource(index)
            .map_err(|error| Unusable::device(format!("its BARs cannot be read: {error}")))
    };
    let (Some(registers), Some(_)) = (bar(function::REGISTERS)?, bar(MSIX_TABLE)?) else {
        return Ok(None);
    };
    if registers.size < function::REGISTERS_SIZE {
        return Ok(None);
    }
    let refuse = |error: io::Error| refusal(function, function::REGISTERS, &error);
    let fd = function.open_resource(function::REGISTERS).map_err(refuse)?;
    // The file has whole pages, and the registers may begin inside of one.
    let offset = registers.start % files::page_size();
    let mapped = Registers::map(fd, offset, registers.size).map_err(refuse)?;
    DoorbellRegisters::new(mapped).map(Some)
}

/// Whether it is an ivshmem-doorbell device that `ivsmc bind` refuses to give to VFIO.
fn lacks_iommu(function: &Function) -> bool {
    let has_interrupts = function.resource(MSIX_TABLE).is_ok_and(|bar| bar.is_some());
    has_interrupts && function.iommu_group().is_none()
}

fn refusal(function: &Function, bar: usize, error: &io::Error) -> Unusable {
    let address = function.address();
    let path = function.resource_path(bar);
    let shown = path.display();
    Unusable::device(match error.raw_os_error() {
        Some(errno::EACCES | errno::EPERM) if function.driver().as_deref() == Some("vfio-pci") => {
            format!("it is with vfio-pci; use it as vfio:{address}, or, as root: ivsmc unbind {address}")
        }
        Some(errno::EACCES | errno::EPERM) => format!(
            "this process has no permission to read and write {shown}; its group can be given it, \
             as root: ivsmc bind {}--group GROUP {address}",
            if lacks_iommu(function) { "--no-vfio " } else { "" }
        ),
        Some(errno::EINVAL) if function.driver().as_deref() == Some("vfio-pci") => format!(
            "it is with vfio-pci, and a process has it; use it through \"ivsmc agent\", or, as \
             root: ivsmc unbind {address}"
        ),
        Some(errno::EROFS) => format!("{shown} cannot be written: sysfs is mounted read-only here"),
        _ => format!("{shown} cannot be mapped: {error}"),
    })
}

#[cfg(test)]
mod tests;
