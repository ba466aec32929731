//! How a process has the region.

/// How a process has the region, and what it knows of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Device {
    /// Client of the ivshmem server, on the host.
    Host,
    /// The file, on the host.
    File,
    /// The file, in a container that does not know its boot.
    Container,
    /// The file, where it cannot be locked.
    Unlockable,
    /// The guest's device through VFIO.
    Vfio,
    /// The same in a container that does not know its boot.
    VfioContainer,
    /// The guest's device through one of its two sysfs.
    Pci(u8),
    /// The same in a container that does not know its boot.
    PciContainer,
    /// Owns the guest's device, and has no slot of its own.
    Agent,
    /// Has its slot from the agent.
    AgentClient,
    /// The ivshmem server: has no slot.
    Server,
}

impl Device {
    pub(crate) fn is_guests(self) -> bool {
        !matches!(
            self,
            Device::Host | Device::File | Device::Container | Device::Unlockable | Device::Server
        )
    }

    /// Whether it keeps the VFIO group of its machine busy.
    pub(crate) fn holds_group(self) -> bool {
        matches!(self, Device::Vfio | Device::VfioContainer | Device::Agent | Device::AgentClient)
    }

    pub(crate) fn knows_boot(self) -> bool {
        !matches!(self, Device::Container | Device::VfioContainer | Device::PciContainer)
    }
}
