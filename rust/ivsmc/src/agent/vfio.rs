//! The device of an agent: one of this guest, through VFIO.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use ivsmc_proto::agent::Part;
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::pci;
use ivsmc_shm::poll::EventFd;
use ivsmc_shm::vfio as kernel;

use super::device::OwnedDevice;
use super::options::parse_address;
use crate::device::{ivshmem_devices, own_vfio, DeviceSpec, Doorbells, VfioDevice, VFIO_DRIVER};
use crate::{Error, Result};

/// Vectors that a doorbell can name.
const VECTORS: usize = 256;

/// A VFIO device with all its vectors.
pub(super) struct OwnedVfio {
    device: VfioDevice,
    vectors: u16,
    memory: Part,
    registers: Part,
    can_map_registers: bool,
}

/// Takes the device at the PCI `address`, or the only one there is; with its name and memory.
pub(super) fn take(address: Option<&str>) -> Result<(String, OwnedVfio, Mapping)> {
    let address = match address {
        Some(text) => parse_address(text)?,
        None => the_only_one()?,
    };
    let name = DeviceSpec::vfio(address).as_str().to_owned();
    let (device, mapping) = own_vfio(address, VECTORS).map_err(|error| error.to_error(&name))?;
    let part = |bar: u32| kernel::region_info(device.device(), bar);
    let (registers, memory) = (part(0)?, part(2)?);
    // Not above VECTORS.
    let vectors = u16::try_from(device.wired()).unwrap_or(u16::MAX);
    let owned = OwnedVfio {
        device,
        vectors,
        memory: Part { offset: memory.offset, size: memory.size },
        registers: Part { offset: registers.offset, size: registers.size },
        can_map_registers: registers.can_map,
    };
    Ok((name, owned, mapping))
}

/// The address of the only ivshmem device of this guest that is bound to VFIO.
fn the_only_one() -> Result<pci::Address> {
    let bound: Vec<_> = ivshmem_devices(pci::SYSFS.as_ref())
        .iter()
        .filter(|function| function.driver().as_deref() == Some(VFIO_DRIVER))
        .map(pci::Function::address)
        .collect();
    match bound[..] {
        [address] => Ok(address),
        [] => Err(Error::device(
            "vfio",
            "no ivshmem device of this machine is bound to vfio-pci; as root: ivsmc bind",
        )),
        _ => {
            let names: Vec<_> = bound.iter().map(ToString::to_string).collect();
            Err(Error::device(
                "vfio",
                format!("name one of the ivshmem devices here: {}", names.join(", ")),
            ))
        }
    }
}

impl OwnedDevice for OwnedVfio {
    fn ivposition(&self) -> u16 {
        self.device.ivposition()
    }

    fn vectors(&self) -> u16 {
        self.vectors
    }

    fn wire(&self, vector: u16, eventfd: &EventFd) -> io::Result<()> {
        kernel::set_irqs(self.device.device(), kernel::MSIX, vector.into(), &[eventfd])
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.device.device().as_fd()
    }

    fn memory(&self) -> Part {
        self.memory
    }

    fn registers(&self) -> Part {
        self.registers
    }

    fn can_map_registers(&self) -> bool {
        self.can_map_registers
    }
}
