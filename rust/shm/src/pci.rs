//! PCI devices as sysfs shows them (Linux `Documentation/ABI/testing/sysfs-bus-pci`).
//!
//! What is read here is the kernel's, so a file that says something else than documented is an error
//! and never guessed around.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::fd::Fd;
use crate::file::{self, Access};

/// Where sysfs is mounted.
pub const SYSFS: &str = "/sys";

/// Offset of the command register in the configuration space (PCI Local Bus 3.0, 6.2.2).
pub const COMMAND: u64 = 4;
/// Command bit: the device answers at its memory addresses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command bit: the device may write to memory, which MSI-X does.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;

/// Flag of a resource: memory (`IORESOURCE_MEM` of Linux `ioport.h`).
const RESOURCE_MEMORY: u64 = 0x200;

/// The address of a PCI function.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Address {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl FromStr for Address {
    type Err = ();

    /// `0000:00:05.0`; without the domain it is 0.
    fn from_str(text: &str) -> Result<Self, ()> {
        let number = |text: &str, digits: std::ops::RangeInclusive<usize>| {
            let proper =
                digits.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
            proper.then(|| u32::from_str_radix(text, 16).ok()).flatten().ok_or(())
        };
        let (rest, function) = text.rsplit_once('.').ok_or(())?;
        let (rest, device) = rest.rsplit_once(':').ok_or(())?;
        let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0000", rest));
        let small = |number: u32, most: u8| u8::try_from(number).ok().filter(|n| *n <= most);
        Ok(Self {
            domain: number(domain, 4..=8)?,
            bus: small(number(bus, 2..=2)?, u8::MAX).ok_or(())?,
            device: small(number(device, 2..=2)?, 31).ok_or(())?,
            function: small(number(function, 1..=1)?, 7).ok_or(())?,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

/// Addresses of all functions below the sysfs at `sysfs`, in order; none if there is no PCI.
#[must_use]
pub fn addresses(sysfs: &Path) -> Vec<Address> {
    let entries = fs::read_dir(sysfs.join("bus/pci/devices")).into_iter().flatten().flatten();
    let mut found: Vec<_> =
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    found.sort();
    found
}

/// Which group of devices the IOMMU cannot tell apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Group {
    /// Its number.
    pub number: u32,
    /// There is no IOMMU: VFIO made a group of the one device.
    pub is_unprotected: bool,
}

impl Group {
    /// Its file, below the directory of VFIO's files.
    #[must_use]
    pub fn file_name(&self) -> String {
        let prefix = if self.is_unprotected { "noiommu-" } else { "" };
        format!("{prefix}{}", self.number)
    }
}

/// A BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resource {
    /// Its first address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// It is memory and not IO ports.
    pub is_memory: bool,
}

/// A PCI function.
#[derive(Clone, Debug)]
pub struct Function {
    address: Address,
    /// Its directory in sysfs.
    path: PathBuf,
}

impl Function {
    /// The function at `address` below the sysfs at `sysfs`.
    ///
    /// # Errors
    /// `NotFound` if there is none.
    pub fn find(sysfs: &Path, address: Address) -> io::Result<Function> {
        let path = sysfs.join("bus/pci/devices").join(address.to_string());
        fs::metadata(&path)?;
        Ok(Function { address, path })
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> Address {
        self.address
    }

    /// Vendor and device id.
    ///
    /// # Errors
    /// If sysfs does not say.
    pub fn ids(&self) -> io::Result<(u16, u16)> {
        let id = |name| {
            u16::try_from(self.hexadecimal(name)?).map_err(|_| invalid(&self.path.join(name)))
        };
        Ok((id("vendor")?, id("device")?))
    }

    /// Base class, subclass and programming interface, 8 bits each.
    ///
    /// # Errors
    /// If sysfs does not say.
    pub fn class(&self) -> io::Result<u32> {
        self.hexadecimal("class")
    }

    /// Revision.
    ///
    /// # Errors
    /// If sysfs does not say.
    pub fn revision(&self) -> io::Result<u32> {
        self.hexadecimal("revision")
    }

    /// The driver it is bound to.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        self.target_name("driver")
    }

    /// Its IOMMU group, if it has one.
    #[must_use]
    pub fn iommu_group(&self) -> Option<Group> {
        let number = self.target_name("iommu_group")?.parse().ok()?;
        // The name VFIO gives to groups that it makes itself (Linux `drivers/vfio/group.c`).
        let name = fs::read_to_string(self.path.join("iommu_group/name")).unwrap_or_default();
        Some(Group { number, is_unprotected: name.trim() == "vfio-noiommu" })
    }

    /// BAR `index`, 0..=5; `None` if it has none.
    ///
    /// # Errors
    /// If sysfs does not say.
    pub fn resource(&self, index: usize) -> io::Result<Option<Resource>> {
        let path = self.path.join("resource");
        let text = fs::read_to_string(&path)?;
        let number = |part: &str| u64::from_str_radix(part.trim_start_matches("0x"), 16).ok();
        let line = text.lines().nth(index).ok_or_else(|| invalid(&path))?;
        let numbers: Vec<u64> = line.split_ascii_whitespace().filter_map(number).collect();
        let &[start, end, flags] = numbers.as_slice() else { return Err(invalid(&path)) };
        if flags == 0 && end == 0 {
            return Ok(None);
        }
        let size = end.checked_sub(start).and_then(|size| size.checked_add(1));
        let size = size.ok_or_else(|| invalid(&path))?;
        Ok(Some(Resource { start, size, is_memory: flags & RESOURCE_MEMORY != 0 }))
    }

    /// The file of BAR `index`.
    #[must_use]
    pub fn resource_path(&self, index: usize) -> PathBuf {
        self.path.join(format!("resource{index}"))
    }

    /// Opens BAR `index`, to map it.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn open_resource(&self, index: usize) -> io::Result<Fd> {
        file::open_nofollow(&self.resource_path(index), Access::Existing)
    }

    /// The command register.
    ///
    /// # Errors
    /// If sysfs does not say.
    pub fn command(&self) -> io::Result<u16> {
        let path = self.path.join("config");
        let config = fs::read(&path)?;
        match config.get(4..6) {
            Some(&[low, high]) => Ok(u16::from_le_bytes([low, high])),
            _ => Err(invalid(&path)),
        }
    }

    /// Has the kernel switch the device's memory on; for root, and a device without a driver.
    ///
    /// # Errors
    /// Those of `open` and `write`.
    pub fn enable(&self) -> io::Result<()> {
        fs::write(self.path.join("enable"), "1")
    }

    fn hexadecimal(&self, name: &str) -> io::Result<u32> {
        let path = self.path.join(name);
        let text = fs::read_to_string(&path)?;
        let digits = text.trim().strip_prefix("0x").ok_or_else(|| invalid(&path))?;
        u32::from_str_radix(digits, 16).map_err(|_| invalid(&path))
    }

    fn target_name(&self, link: &str) -> Option<String> {
        let target = fs::read_link(self.path.join(link)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }
}

fn invalid(path: &Path) -> io::Error {
    let words = format!("{} does not say what it should", path.display());
    io::Error::new(io::ErrorKind::InvalidData, words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn addresses_have_one_form() {
        for text in ["0000:00:05.0", "00:05.0", "0000:00:05.0"] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), "0000:00:05.0");
        }
        assert_eq!("10000:E1:1f.7".parse::<Address>().unwrap().to_string(), "10000:e1:1f.7");
        let wrong = [
            "",
            "05.0",
            "0:05.0",
            "00:5.0",
            "00:05",
            "00:05.8",
            "00:20.0",
            "00:05.0 ",
            "000:00:05.0",
            "123456789:00:05.0",
            "0000:00:05.00",
            "+000:00:05.0",
            "0000:0g:05.0",
            "a:0000:00:05.0",
        ];
        for text in wrong {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_function_is_as_sysfs_says() {
        let root = std::env::temp_dir().join(format!("ivsmc-pci-{}", std::process::id()));
        let devices = root.join("bus/pci/devices");
        let path = devices.join("0000:00:05.0");
        fs::create_dir_all(&path).unwrap();
        fs::create_dir_all(devices.join("0000:00:01.0")).unwrap();
        fs::create_dir_all(root.join("groups/7")).unwrap();
        fs::create_dir_all(root.join("drivers/vfio-pci")).unwrap();
        let put = |name: &str, text: &str| fs::write(path.join(name), text).unwrap();
        put("vendor", "0x1af4\n");
        put("device", "0x1110\n");
        put("class", "0x050000\n");
        put("revision", "0x01\n");
        // Of QEMU 7.2 with a region of 4 MiB.
        put(
            "resource",
            "0x00000000febd1000 0x00000000febd10ff 0x0000000000040200\n\
             0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
             0x00000000fe000000 0x00000000fe3fffff 0x000000000014220c\n",
        );
        fs::write(path.join("config"), [0xf4, 0x1a, 0x10, 0x11, 0x03, 0x04, 0, 0]).unwrap();
        let address = "00:05.0".parse().unwrap();
        let function = Function::find(&root, address).unwrap();
        assert_eq!((function.driver(), function.iommu_group()), (None, None));
        symlink(root.join("drivers/vfio-pci"), path.join("driver")).unwrap();
        symlink(root.join("groups/7"), path.join("iommu_group")).unwrap();
        let group = function.iommu_group().unwrap();
        fs::write(root.join("groups/7/name"), "vfio-noiommu\n").unwrap();
        let unprotected = function.iommu_group().unwrap();
        let found = (
            addresses(&root),
            function.ids().unwrap(),
            function.class().unwrap(),
            function.revision().unwrap(),
            function.driver(),
            function.command().unwrap(),
            [0, 1, 2].map(|index| function.resource(index).unwrap()),
        );
        let missing = function.resource(3);
        put("revision", "one");
        let strange = function.revision();
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(found.0, ["0000:00:01.0".parse().unwrap(), address]);
        assert_eq!((found.1, found.2, found.3), ((0x1af4, 0x1110), 0x0005_0000, 1));
        assert_eq!(found.4.as_deref(), Some("vfio-pci"));
        assert_eq!(found.5 & (COMMAND_MEMORY | COMMAND_BUS_MASTER), COMMAND_MEMORY);
        let [registers, nothing, memory] = found.6;
        let is_memory = true;
        assert_eq!(registers, Some(Resource { start: 0xfebd_1000, size: 256, is_memory }));
        assert_eq!(nothing, None);
        assert_eq!(memory, Some(Resource { start: 0xfe00_0000, size: 4 << 20, is_memory }));
        assert_eq!((group.file_name(), unprotected.file_name()), ("7".into(), "noiommu-7".into()));
        assert!(missing.is_err() && strange.is_err());
        let gone = Function::find(&root, address).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
        assert!(addresses(&root).is_empty());
    }
}
