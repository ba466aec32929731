//! VFIO: a device of this machine for one process of user space. One function for each call.
//!
//! A *container* is an address space for devices' memory accesses, a *group* the devices that the
//! IOMMU cannot tell apart, which one process opens at a time. Numbers and structures are those of
//! Linux `include/uapi/linux/vfio.h`; the order of the calls is the caller's.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use crate::call;
use crate::fd::Fd;
use crate::file::{self, Access};
use crate::poll::EventFd;

/// `_IO(VFIO_TYPE, VFIO_BASE + number)`: no direction, no size.
const fn request(number: libc::c_ulong) -> libc::c_ulong {
    // `_IOC_NONE` is 0, but for three families of processors (`asm/ioctl.h`).
    const NONE: libc::c_ulong =
        if cfg!(any(target_arch = "powerpc64", target_arch = "mips64", target_arch = "sparc64")) {
            1 << 29
        } else {
            0
        };
    NONE | (b';' as libc::c_ulong) << 8 | (100 + number)
}

const GET_API_VERSION: libc::c_ulong = request(0);
const CHECK_EXTENSION: libc::c_ulong = request(1);
const SET_IOMMU: libc::c_ulong = request(2);
const GROUP_GET_STATUS: libc::c_ulong = request(3);
const GROUP_SET_CONTAINER: libc::c_ulong = request(4);
const GROUP_GET_DEVICE_FD: libc::c_ulong = request(6);
const DEVICE_GET_INFO: libc::c_ulong = request(7);
const DEVICE_GET_REGION_INFO: libc::c_ulong = request(8);
const DEVICE_GET_IRQ_INFO: libc::c_ulong = request(9);
const DEVICE_SET_IRQS: libc::c_ulong = request(10);

/// What [`api_version`] answers: `VFIO_API_VERSION`.
pub const API_VERSION: i32 = 0;

/// Index of the configuration space among a PCI device's regions; BAR n has index n.
pub const CONFIG: u32 = 7;
/// Index of MSI-X among a PCI device's interrupts.
pub const MSIX: u32 = 2;

/// How a container's devices are kept from memory that is not theirs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Iommu {
    /// By an IOMMU: `VFIO_TYPE1_IOMMU`.
    Type1 = 1,
    /// Not at all: `VFIO_NOIOMMU_IOMMU`.
    None = 8,
}

/// `struct vfio_group_status`.
#[repr(C)]
#[derive(Default)]
struct GroupStatus {
    argsz: u32,
    flags: u32,
}
const _: () = assert!(size_of::<GroupStatus>() == 8);

/// `VFIO_GROUP_FLAGS_VIABLE`.
const VIABLE: u32 = 1;

/// `struct vfio_device_info` as it first was; the kernel is told this size.
#[repr(C)]
#[derive(Default)]
struct RawDeviceInfo {
    argsz: u32,
    flags: u32,
    num_regions: u32,
    num_irqs: u32,
}
const _: () = assert!(size_of::<RawDeviceInfo>() == 16);

/// `VFIO_DEVICE_FLAGS_PCI`.
const IS_PCI: u32 = 1 << 1;

/// `struct vfio_region_info`.
#[repr(C)]
#[derive(Default)]
struct RawRegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}
const _: () = assert!(size_of::<RawRegionInfo>() == 32);

/// `VFIO_REGION_INFO_FLAG_MMAP`.
const CAN_MAP: u32 = 1 << 2;

/// `struct vfio_irq_info`.
#[repr(C)]
#[derive(Default)]
struct RawIrqInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    count: u32,
}
const _: () = assert!(size_of::<RawIrqInfo>() == 16);

/// Words of `struct vfio_irq_set` in front of its data: argsz, flags, index, start, count.
const IRQ_SET_WORDS: usize = 5;
/// `VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER`.
const TRIGGER_EVENTFD: u32 = 1 << 2 | 1 << 5;

/// `argsz` of `T`.
#[allow(clippy::cast_possible_truncation)] // The structures above are small, as asserted.
const fn argsz<T>() -> u32 {
    size_of::<T>() as u32
}

/// A device as VFIO describes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceInfo {
    /// It is a PCI device.
    pub is_pci: bool,
    /// Its regions: BARs, configuration space and others.
    pub regions: u32,
    /// Its kinds of interrupts.
    pub irqs: u32,
}

/// A region of a device: memory, registers, or the configuration space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegionInfo {
    /// Bytes; 0 if there is none.
    pub size: u64,
    /// Where it is in the device's descriptor.
    pub offset: u64,
    /// It can be mapped.
    pub can_map: bool,
}

/// Opens the file `path` of a container or a group.
///
/// # Errors
/// Those of `open`: for a group `EBUSY` while any process has it, or a descriptor or a mapping of
/// one of its devices; `EPERM` without `CAP_SYS_RAWIO` if it has no IOMMU.
pub fn open(path: &Path) -> io::Result<Fd> {
    file::open_nofollow(path, Access::Existing)
}

/// The version of the interface: [`API_VERSION`], or what follows is unknown.
///
/// # Errors
/// `ENOTTY` if it is no container.
pub fn api_version(container: impl AsFd) -> io::Result<i32> {
    // SAFETY: the request takes no argument and touches no memory of this process.
    call::check(unsafe { libc::ioctl(container.as_fd().as_raw_fd(), GET_API_VERSION as _) })
}

/// Whether the kernel can do `iommu`.
///
/// # Errors
/// Those of `ioctl`.
pub fn has_iommu(container: impl AsFd, iommu: Iommu) -> io::Result<bool> {
    let number = libc::c_ulong::from(iommu as u32);
    // SAFETY: the request takes a number and touches no memory of this process.
    let found = call::check(unsafe {
        libc::ioctl(container.as_fd().as_raw_fd(), CHECK_EXTENSION as _, number)
    })?;
    Ok(found > 0)
}

/// Whether all devices of the group are with VFIO, or with no driver.
///
/// # Errors
/// Those of `ioctl`.
pub fn group_is_viable(group: impl AsFd) -> io::Result<bool> {
    let mut status = GroupStatus { argsz: argsz::<GroupStatus>(), flags: 0 };
    // SAFETY: the request reads and writes the `argsz` bytes of the structure, a local of that size.
    call::check(unsafe {
        libc::ioctl(group.as_fd().as_raw_fd(), GROUP_GET_STATUS as _, &raw mut status)
    })?;
    Ok(status.flags & VIABLE != 0)
}

/// Puts the group into the container.
///
/// # Errors
/// Those of `ioctl`: `EINVAL` if it is in one, or a group without an IOMMU and one with are mixed.
pub fn set_container(group: impl AsFd, container: impl AsFd) -> io::Result<()> {
    let number: libc::c_int = container.as_fd().as_raw_fd();
    // SAFETY: the request reads one int, a local.
    call::check(unsafe {
        libc::ioctl(group.as_fd().as_raw_fd(), GROUP_SET_CONTAINER as _, &raw const number)
    })
    .map(drop)
}

/// Says what protects the container; there must be a group in it.
///
/// # Errors
/// Those of `ioctl`: `EPERM` if the platform cannot keep its interrupts apart, `ENODEV` for an IOMMU of
/// another kind.
pub fn set_iommu(container: impl AsFd, iommu: Iommu) -> io::Result<()> {
    let number = libc::c_ulong::from(iommu as u32);
    // SAFETY: the request takes a number and touches no memory of this process.
    call::check(unsafe { libc::ioctl(container.as_fd().as_raw_fd(), SET_IOMMU as _, number) })
        .map(drop)
}

/// A descriptor of the group's device `name`, a PCI address.
///
/// It, its copies in other processes, and mappings made from it keep the group busy.
///
/// # Errors
/// Those of `ioctl`: `ENODEV` if there is no such device; `InvalidInput` for a name with a zero byte.
pub fn device(group: impl AsFd, name: &str) -> io::Result<Fd> {
    let name = CString::new(name)?;
    let name: &CStr = &name;
    // SAFETY: the request reads a terminated string, a local; a descriptor it returns is new (and
    // close-on-exec: `vfio_device_open_file`) and has no owner.
    unsafe {
        let number = call::check(libc::ioctl(
            group.as_fd().as_raw_fd(),
            GROUP_GET_DEVICE_FD as _,
            name.as_ptr(),
        ))?;
        Ok(Fd::from_call(number))
    }
}

/// What the device is.
///
/// # Errors
/// `ENOTTY` if it is none; else those of `ioctl`.
pub fn device_info(device: impl AsFd) -> io::Result<DeviceInfo> {
    let mut info = RawDeviceInfo { argsz: argsz::<RawDeviceInfo>(), ..RawDeviceInfo::default() };
    // SAFETY: the request reads and writes the `argsz` bytes of the structure, a local of that size.
    call::check(unsafe {
        libc::ioctl(device.as_fd().as_raw_fd(), DEVICE_GET_INFO as _, &raw mut info)
    })?;
    Ok(DeviceInfo {
        is_pci: info.flags & IS_PCI != 0,
        regions: info.num_regions,
        irqs: info.num_irqs,
    })
}

/// The device's region `index`.
///
/// # Errors
/// `EINVAL` if there is none; else those of `ioctl`.
pub fn region_info(device: impl AsFd, index: u32) -> io::Result<RegionInfo> {
    let argsz = argsz::<RawRegionInfo>();
    let mut info = RawRegionInfo { argsz, index, ..RawRegionInfo::default() };
    // SAFETY: the request reads and writes the `argsz` bytes of the structure, a local of that size;
    // it appends capabilities only where `argsz` leaves room for them.
    call::check(unsafe {
        libc::ioctl(device.as_fd().as_raw_fd(), DEVICE_GET_REGION_INFO as _, &raw mut info)
    })?;
    Ok(RegionInfo { size: info.size, offset: info.offset, can_map: info.flags & CAN_MAP != 0 })
}

/// How many interrupts of the kind `index` the device has.
///
/// # Errors
/// `EINVAL` if there is no such kind; else those of `ioctl`.
pub fn irq_count(device: impl AsFd, index: u32) -> io::Result<u32> {
    let mut info = RawIrqInfo { argsz: argsz::<RawIrqInfo>(), index, ..RawIrqInfo::default() };
    // SAFETY: the request reads and writes the `argsz` bytes of the structure, a local of that size.
    call::check(unsafe {
        libc::ioctl(device.as_fd().as_raw_fd(), DEVICE_GET_IRQ_INFO as _, &raw mut info)
    })?;
    Ok(info.count)
}

/// Has the interrupts `start`, `start + 1`, ... of the kind `index` notify these eventfds, instead of
/// what they notified before. The first call enables the kind, with as many as are named then; later
/// ones are for some of those. The kernel keeps the eventfds for as long.
///
/// # Errors
/// `EINVAL` for more than there are, or were enabled; else those of `ioctl`.
pub fn set_irqs(
    device: impl AsFd,
    index: u32,
    start: u32,
    eventfds: &[&EventFd],
) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let count = u32::try_from(eventfds.len()).map_err(invalid)?;
    let words = IRQ_SET_WORDS + eventfds.len();
    let argsz = u32::try_from(words * size_of::<u32>()).map_err(invalid)?;
    let mut set = Vec::with_capacity(words);
    set.extend([argsz, TRIGGER_EVENTFD, index, start, count]);
    // The kernel reads ints; a negative one would take an eventfd away, and none is.
    set.extend(eventfds.iter().map(|eventfd| eventfd.as_fd().as_raw_fd() as u32));
    // SAFETY: the request reads a `vfio_irq_set` of `argsz` bytes, five words and the data, all
    // in `set`, which is aligned for them and has that length. The descriptors are borrowed.
    call::check(unsafe {
        libc::ioctl(device.as_fd().as_raw_fd(), DEVICE_SET_IRQS as _, set.as_ptr())
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errno;

    #[test]
    fn requests_have_the_numbers_of_the_header() {
        // As `strace -X raw` shows them on x86 and aarch64.
        if cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            assert_eq!(GET_API_VERSION, 0x3b64);
            assert_eq!((SET_IOMMU, GROUP_SET_CONTAINER), (0x3b66, 0x3b68));
            assert_eq!((GROUP_GET_DEVICE_FD, DEVICE_SET_IRQS), (0x3b6a, 0x3b6e));
        }
    }

    #[test]
    fn what_is_no_vfio_file_is_refused_by_each_call() {
        let fd = file::memfd(c"no device").unwrap();
        let eventfd = EventFd::new().unwrap();
        let errors = [
            api_version(&fd).unwrap_err(),
            has_iommu(&fd, Iommu::Type1).unwrap_err(),
            group_is_viable(&fd).unwrap_err(),
            set_container(&fd, &fd).unwrap_err(),
            set_iommu(&fd, Iommu::None).unwrap_err(),
            device(&fd, "0000:00:05.0").unwrap_err(),
            device_info(&fd).unwrap_err(),
            region_info(&fd, CONFIG).unwrap_err(),
            irq_count(&fd, MSIX).unwrap_err(),
            set_irqs(&fd, MSIX, 0, &[&eventfd]).unwrap_err(),
        ];
        for error in errors {
            assert!(errno::is(&error, errno::ENOTTY), "{error}");
        }
        assert_eq!(device(&fd, "a\0b").unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
