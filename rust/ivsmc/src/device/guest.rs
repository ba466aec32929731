//! A guest's sysfs, made of files, with one ivshmem device; for tests.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use ivsmc_shm::pci::Address;

use super::tests::Scratch;

/// Bytes of the shared memory.
pub(crate) const SIZE: u64 = 2 << 20;

/// The device's address.
pub(crate) const ADDRESS: &str = "0000:00:05.0";

/// Revision 1, not bound, with the BARs of an ivshmem-doorbell device.
pub(crate) struct Guest {
    scratch: Scratch,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let guest = Self { scratch: Scratch::new() };
        fs::create_dir_all(guest.function()).unwrap();
        for (name, text) in [
            ("vendor", "0x1af4\n"),
            ("device", "0x1110\n"),
            ("class", "0x050000\n"),
            ("revision", "0x01\n"),
        ] {
            guest.put(name, text);
        }
        guest.bars(SIZE, true);
        guest.command(0x0002);
        guest
    }

    /// The root.
    pub(crate) fn sysfs(&self) -> &Path {
        self.scratch.path()
    }

    pub(crate) fn address(&self) -> Address {
        ADDRESS.parse().unwrap()
    }

    /// The directory of the device.
    pub(crate) fn function(&self) -> PathBuf {
        self.sysfs().join("bus/pci/devices").join(ADDRESS)
    }

    pub(crate) fn put(&self, name: &str, text: &str) {
        fs::write(self.function().join(name), text).unwrap();
    }

    /// Shared memory of `size` bytes; and an MSI-X table, or an ivshmem-plain device.
    pub(crate) fn bars(&self, size: u64, has_interrupts: bool) {
        let line = |start: u64, size: u64, flags: u64| {
            let end = if size == 0 { 0 } else { start + size - 1 };
            format!("{start:#018x} {end:#018x} {flags:#018x}\n")
        };
        // The registers behind those of another device in one page.
        let registers = line(0xfebd_1100, 256, 0x0004_0200);
        let table =
            if has_interrupts { line(0xfebd_2000, 4096, 0x0004_0200) } else { line(0, 0, 0) };
        let memory = line(0xfe00_0000, size, 0x0014_220c);
        self.put("resource", &format!("{registers}{table}{memory}"));
        for (name, size) in [("resource0", 4096), ("resource2", size)] {
            let file = fs::File::create(self.function().join(name)).unwrap();
            file.set_len(size).unwrap();
        }
    }

    /// The command register.
    pub(crate) fn command(&self, command: u8) {
        fs::write(self.function().join("config"), [0xf4, 0x1a, 0x10, 0x11, command, 0]).unwrap();
    }

    /// Binds the device to `driver`.
    pub(crate) fn bind(&self, driver: &str) {
        let _ = fs::remove_file(self.function().join("driver"));
        let path = self.sysfs().join("bus/pci/drivers").join(driver);
        fs::create_dir_all(&path).unwrap();
        symlink(path, self.function().join("driver")).unwrap();
    }

    /// Puts the device into IOMMU group 7, by this name.
    pub(crate) fn group(&self, name: &str) {
        let path = self.sysfs().join("kernel/iommu_groups/7");
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("name"), name).unwrap();
        symlink(path, self.function().join("iommu_group")).unwrap();
    }
}
