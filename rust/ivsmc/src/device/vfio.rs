//! `vfio:0000:00:05.0`: the ivshmem-doorbell device of a guest, owned by this process.
//!
//! ```text
//!   container --SET_IOMMU          BAR2 ---- the region
//!       |                          BAR0 ---- doorbell out: a store of id and vector
//!     group (one process) -- device
//!                                  MSI-X --- doorbell in: eventfds of vectors 0 and 1
//! ```
//!
//! The group can be open once, so this process has the device alone, and who opens it next knows
//! that this one has gone (`ivsmc_proto::proof`). Several processes of a guest share a device
//! through `ivsmc agent`.

mod holders;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ivsmc_shm::errno;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::file as files;
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::mmio::Registers;
use ivsmc_shm::pci::{self, Address, Function, Group};
use ivsmc_shm::poll::EventFd;
use ivsmc_shm::vfio::{self as kernel, Iommu, RegionInfo};

use super::function::{self, DoorbellRegisters};
use super::{Backing, Doorbells, Opened, Unusable};

/// The driver that gives devices to VFIO.
pub(crate) const DRIVER: &str = "vfio-pci";

/// Where VFIO's files are.
const FILES: &str = "/dev/vfio";

/// Vectors a process with the device for itself is notified on: 0 of departures, 1 of sessions.
const VECTORS: usize = 2;

/// Opens the device at `address` for this process alone.
pub(super) fn open(address: Address) -> Result<Opened, Unusable> {
    let (device, mapping) = own(address, VECTORS)?;
    Ok(opened(device, mapping))
}

fn opened(device: VfioDevice, mapping: Mapping) -> Opened {
    // The host has backed all of the memory, and there is no file to reserve in; and one anonymous
    // inode stands for all VFIO devices, so a lock on it means nothing.
    Opened {
        mapping: Arc::new(mapping),
        whole: true,
        lockable: false,
        backing: Backing::Vfio(Arc::new(device)),
    }
}

/// Takes the device at `address`, with up to `most` of its vectors, and maps its memory.
pub(crate) fn own(address: Address, most: usize) -> Result<(VfioDevice, Mapping), Unusable> {
    let place = Place { sysfs: pci::SYSFS.into(), files: FILES.into() };
    own_with(&Kernel, &place, address, most)
}

/// The calls of VFIO, each as in [`ivsmc_shm::vfio`].
trait Vfio {
    fn open(&self, path: &Path) -> io::Result<Fd>;
    fn api_version(&self, container: &Fd) -> io::Result<i32>;
    fn has_iommu(&self, container: &Fd, iommu: Iommu) -> io::Result<bool>;
    fn group_is_viable(&self, group: &Fd) -> io::Result<bool>;
    fn set_container(&self, group: &Fd, container: &Fd) -> io::Result<()>;
    fn set_iommu(&self, container: &Fd, iommu: Iommu) -> io::Result<()>;
    fn device(&self, group: &Fd, name: &str) -> io::Result<Fd>;
    fn region_info(&self, device: &Fd, index: u32) -> io::Result<RegionInfo>;
    fn irq_count(&self, device: &Fd, index: u32) -> io::Result<u32>;
    fn set_irqs(&self, device: &Fd, index: u32, eventfds: &[&EventFd]) -> io::Result<()>;
}

/// The real ones.
struct Kernel;

impl Vfio for Kernel {
    fn open(&self, path: &Path) -> io::Result<Fd> {
        kernel::open(path)
    }
    fn api_version(&self, container: &Fd) -> io::Result<i32> {
        kernel::api_version(container)
    }
    fn has_iommu(&self, container: &Fd, iommu: Iommu) -> io::Result<bool> {
        kernel::has_iommu(container, iommu)
    }
    fn group_is_viable(&self, group: &Fd) -> io::Result<bool> {
        kernel::group_is_viable(group)
    }
    fn set_container(&self, group: &Fd, container: &Fd) -> io::Result<()> {
        kernel::set_container(group, container)
    }
    fn set_iommu(&self, container: &Fd, iommu: Iommu) -> io::Result<()> {
        kernel::set_iommu(container, iommu)
    }
    fn device(&self, group: &Fd, name: &str) -> io::Result<Fd> {
        kernel::device(group, name)
    }
    fn region_info(&self, device: &Fd, index: u32) -> io::Result<RegionInfo> {
        kernel::region_info(device, index)
    }
    fn irq_count(&self, device: &Fd, index: u32) -> io::Result<u32> {
        kernel::irq_count(device, index)
    }
    fn set_irqs(&self, device: &Fd, index: u32, eventfds: &[&EventFd]) -> io::Result<()> {
        kernel::set_irqs(device, index, 0, eventfds)
    }
}

/// Where the kernel's files are.
struct Place {
    sysfs: PathBuf,
    /// The container, and a file for each group.
    files: PathBuf,
}

/// The device, owned by this process as long as this lives.
///
/// Fields in the order they go: what needs the device, then the device, its group, its container.
pub(crate) struct VfioDevice {
    registers: DoorbellRegisters,
    /// Wired to vectors 0, 1, ...
    own: Vec<EventFd>,
    device: Fd,
    _group: Fd,
    _container: Fd,
}

impl VfioDevice {
    /// The descriptor of the device.
    pub(crate) fn device(&self) -> &Fd {
        &self.device
    }

    /// How many vectors are wired.
    pub(crate) fn wired(&self) -> usize {
        self.own.len()
    }
}

impl Doorbells for VfioDevice {
    fn ivposition(&self) -> u16 {
        self.registers.ivposition()
    }

    fn own(&self) -> Option<(u16, &EventFd)> {
        let (vector, eventfd) = (0..).zip(&self.own).last()?;
        Some((vector, eventfd))
    }

    fn departures(&self) -> Option<&EventFd> {
        self.own.first().filter(|_| self.own.len() > 1)
    }

    fn notify(&self, ivposition: u16, vector: u16) -> bool {
        self.registers.notify(ivposition, vector)
    }
}

/// [`own`] with the kernel's part given.
fn own_with(
    vfio: &impl Vfio,
    place: &Place,
    address: Address,
    most: usize,
) -> Result<(VfioDevice, Mapping), Unusable> {
    let function = function::find(&place.sysfs, address)?;
    let group = judge_binding(&place.sysfs, &function)?;
    let container = open_container(vfio, &place.files)?;
    let iommu = if group.is_unprotected { Iommu::None } else { Iommu::Type1 };
    if !vfio.has_iommu(&container, iommu).map_err(failed("VFIO_CHECK_EXTENSION"))? {
        return Err(Unusable::device(match iommu {
            Iommu::Type1 => {
                "VFIO has no IOMMU of type 1 here; load its module: modprobe vfio_iommu_type1"
            }
            Iommu::None => {
                "VFIO without an IOMMU is switched off by now; as root: \
                 ivsmc bind --unsafe-noiommu"
            }
        }));
    }
    let group_file = place.files.join(group.file_name());
    let group_fd =
        vfio.open(&group_file).map_err(|error| group_refusal(&group_file, group, &error))?;
    if !vfio.group_is_viable(&group_fd).map_err(failed("VFIO_GROUP_GET_STATUS"))? {
        return Err(Unusable::device(format!(
            "other devices of its IOMMU group {} are with another driver; bind them to vfio-pci \
             too (they are in /sys/kernel/iommu_groups/{}/devices), or give the ivshmem device a \
             PCI slot of its own",
            group.number, group.number
        )));
    }
    vfio.set_container(&group_fd, &container).map_err(failed("VFIO_GROUP_SET_CONTAINER"))?;
    vfio.set_iommu(&container, iommu).map_err(|error| iommu_refusal(&error))?;
    let device =
        vfio.device(&group_fd, &address.to_string()).map_err(failed("VFIO_GROUP_GET_DEVICE_FD"))?;
    switch_on(vfio, &device)?;
    let registers = map_registers(vfio, &device)?;
    let mapping = map_memory(vfio, &device)?;
    let own = wire(vfio, &device, most)?;
    let registers = DoorbellRegisters::new(registers)?;
    let owned = VfioDevice { registers, own, device, _group: group_fd, _container: container };
    Ok((owned, mapping))
}

/// The group of a device that is with VFIO.
fn judge_binding(sysfs: &Path, function: &Function) -> Result<Group, Unusable> {
    let address = function.address();
    let driver = function.driver();
    let group = function.iommu_group();
    if driver.as_deref() == Some(DRIVER) {
        return group.ok_or_else(|| {
            Unusable::device("it is with vfio-pci and has no IOMMU group; bind it again")
        });
    }
    let found = driver.map_or_else(
        || "it is not bound to a driver".to_owned(),
        |driver| format!("it is bound to the driver {driver}"),
    );
    if group.is_none() && !allows_no_iommu(sysfs) {
        return Err(Unusable::device(format!(
            "{found}, and VFIO cannot have it, because this machine has no IOMMU: give it a virtual \
             one (QEMU: -machine q35 -device intel-iommu; kernel: intel_iommu=on), or do without (as \
             root: ivsmc bind --unsafe-noiommu {address}; not every kernel can), or use it without \
             interrupts as pci:{address}"
        )));
    }
    let module = if sysfs.join("bus/pci/drivers").join(DRIVER).exists() {
        ""
    } else {
        " (it loads the module vfio-pci, which is missing)"
    };
    Err(Unusable::device(format!(
        "{found} and must be with vfio-pci; as root: ivsmc bind {address}{module}"
    )))
}

/// Whether VFIO may have devices that no IOMMU watches.
fn allows_no_iommu(sysfs: &Path) -> bool {
    let path = sysfs.join("module/vfio/parameters/enable_unsafe_noiommu_mode");
    std::fs::read_to_string(path).is_ok_and(|text| matches!(text.trim(), "Y" | "1"))
}

fn open_container(vfio: &impl Vfio, files: &Path) -> Result<Fd, Unusable> {
    let path = files.join("vfio");
    let shown = path.display();
    let container = vfio.open(&path).map_err(|error| {
        Unusable::device(match error.raw_os_error() {
            Some(errno::ENOENT | errno::ENODEV | errno::ENXIO) => format!(
                "there is no {shown}: the module vfio-pci is not loaded (modprobe vfio-pci), or \
                 this container was not given the directory"
            ),
            Some(errno::EACCES | errno::EPERM) => format!(
                "this process has no permission to open {shown}; as root: chmod 666 {shown}"
            ),
            _ => format!("{shown} cannot be opened: {error}"),
        })
    })?;
    let version = vfio.api_version(&container).map_err(failed("VFIO_GET_API_VERSION"))?;
    if version != kernel::API_VERSION {
        return Err(Unusable::device(format!(
            "this kernel's VFIO has version {version}, and only version {} is known",
            kernel::API_VERSION
        )));
    }
    Ok(container)
}

fn group_refusal(path: &Path, group: Group, error: &io::Error) -> Unusable {
    let shown = path.display();
    Unusable::device(match error.raw_os_error() {
        Some(errno::EBUSY) => {
            let holders = holders::holders("/proc".as_ref(), path);
            let who = match &holders[..] {
                [] => "another process has".to_owned(),
                [one] => format!("process {one} has"),
                several => format!("processes {} have", several.join(", ")),
            };
            format!(
                "{who} it ({shown} is busy); processes share it through \"ivsmc agent\", which \
                 can start when all have ended that have it"
            )
        }
        Some(errno::EPERM) if group.is_unprotected => format!(
            "{shown} has no IOMMU, and only a process with CAP_SYS_RAWIO may open it; run as root, \
             or through \"ivsmc agent\""
        ),
        Some(errno::EACCES | errno::EPERM) => format!(
            "this process has no permission to open {shown}; as root: ivsmc bind --group GROUP, \
             with a group of users that this process is in"
        ),
        Some(errno::ENOENT) => {
            format!("there is no {shown}; was this container given the directory?")
        }
        _ => format!("{shown} cannot be opened: {error}"),
    })
}

fn iommu_refusal(error: &io::Error) -> Unusable {
    Unusable::device(match error.raw_os_error() {
        Some(errno::EPERM) => {
            "its IOMMU does not keep interrupts apart, and VFIO insists; as root: \
             echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts, or give \
             QEMU's intel-iommu the option intremap=on"
                .to_owned()
        }
        _ => format!("VFIO_SET_IOMMU failed: {error}"),
    })
}

/// What failed, for a call that has no usual reason to.
fn failed(call: &'static str) -> impl Fn(io::Error) -> Unusable {
    move |error| Unusable::device(format!("{call} failed: {error}"))
}

/// Has the device answer at its addresses, and send interrupts: VFIO leaves bus mastering off.
fn switch_on(vfio: &impl Vfio, device: &Fd) -> Result<(), Unusable> {
    let config = vfio
        .region_info(device, kernel::CONFIG)
        .map_err(failed("VFIO_DEVICE_GET_REGION_INFO of the configuration space"))?;
    let at = config.offset + pci::COMMAND;
    let mut command = [0; 2];
    files::read_at(device, at, &mut command).map_err(failed("reading PCI_COMMAND"))?;
    let command = u16::from_le_bytes(command) | pci::COMMAND_MEMORY | pci::COMMAND_BUS_MASTER;
    files::write_at(device, at, &command.to_le_bytes()).map_err(failed("writing PCI_COMMAND"))
}

fn region(vfio: &impl Vfio, device: &Fd, bar: usize) -> Result<RegionInfo, Unusable> {
    let index = u32::try_from(bar).unwrap_or(u32::MAX);
    vfio.region_info(device, index).map_err(failed("VFIO_DEVICE_GET_REGION_INFO"))
}

fn map_registers(vfio: &impl Vfio, device: &Fd) -> Result<Registers, Unusable> {
    let bar = region(vfio, device, function::REGISTERS)?;
    if bar.size < function::REGISTERS_SIZE {
        return Err(Unusable::device(format!("its registers (BAR0) have {} bytes", bar.size)));
    }
    let fd = another(device)?;
    if !bar.can_map {
        // They share a page with another device's.
        return Ok(Registers::through(fd, bar.offset, bar.size));
    }
    Registers::map(fd, bar.offset, bar.size)
        .map_err(|error| Unusable::device(format!("its registers cannot be mapped: {error}")))
}

fn map_memory(vfio: &impl Vfio, device: &Fd) -> Result<Mapping, Unusable> {
    let bar = region(vfio, device, function::MEMORY)?;
    function::judge_size(bar.size)?;
    let refuse = |what: &dyn std::fmt::Display| {
        Unusable::device(format!("its shared memory (BAR2) cannot be mapped: {what}"))
    };
    if !bar.can_map {
        return Err(refuse(&"VFIO does not allow it"));
    }
    Mapping::map_at(another(device)?, bar.offset, bar.size).map_err(|error| refuse(&error))
}

/// Another descriptor of the device.
fn another(device: &Fd) -> Result<Fd, Unusable> {
    device.try_clone().map_err(|error| Unusable::device(format!("no more descriptors: {error}")))
}

/// Wires up to `most` vectors, from 0 on, to eventfds.
fn wire(vfio: &impl Vfio, device: &Fd, most: usize) -> Result<Vec<EventFd>, Unusable> {
    let vectors =
        vfio.irq_count(device, kernel::MSIX).map_err(failed("VFIO_DEVICE_GET_IRQ_INFO"))?;
    if vectors == 0 {
        return Err(Unusable::device(
            "it has no interrupts: it is an ivshmem-plain device, or an ivshmem-doorbell with \
             vectors=0; use it as pci: (as root: ivsmc unbind), or give the machine an \
             ivshmem-doorbell device with vectors=2 or more",
        ));
    }
    let used = usize::try_from(vectors).unwrap_or(most).min(most);
    let own = (0..used)
        .map(|_| EventFd::new())
        .collect::<io::Result<Vec<_>>>()
        .map_err(|error| Unusable::device(format!("no eventfd: {error}")))?;
    let eventfds: Vec<_> = own.iter().collect();
    vfio.set_irqs(device, kernel::MSIX, &eventfds).map_err(failed("VFIO_DEVICE_SET_IRQS"))?;
    Ok(own)
}

#[cfg(test)]
mod tests;
