//! Devices over connections whose other end is a fuzz target.

use std::time::{Duration, Instant};

use ivsmc_shm::fd::Fd;

use super::{agent, host, Backing, DeviceSpec, Opened, Unusable};
use crate::attachment::Attachment;
use crate::reactor::Source;
use crate::Result;

/// A device that was found usable.
pub struct Found {
    spec: DeviceSpec,
    opened: Opened,
}

/// The device specs in `list`, as they are shown.
///
/// # Errors
/// Those of a device argument.
pub fn device_list(list: &str) -> Result<Vec<String>> {
    Ok(DeviceSpec::parse_list(list)?.iter().map(DeviceSpec::to_string).collect())
}

/// What `host:` makes of the ivshmem server at the other end of `socket`, in this time.
///
/// # Errors
/// Those of opening such a device.
pub fn ivshmem_client(socket: Fd, patience: Duration) -> Result<Found> {
    found("host:/ivshmem-server", host::over(socket, Instant::now() + patience))
}

/// What `agent:` makes of the agent at the other end of `socket`, in this time.
///
/// # Errors
/// Those of opening such a device.
pub fn agent_client(socket: Fd, patience: Duration) -> Result<Found> {
    found("agent:/agent", agent::over(socket, Instant::now() + patience))
}

fn found(spec: &str, opened: Result<Opened, Unusable>) -> Result<Found> {
    let opened = opened.map_err(|unusable| unusable.to_error(spec))?;
    Ok(Found { spec: spec.parse()?, opened })
}

impl Found {
    /// Hears what is said later, as the background thread does.
    pub fn hear(&self) {
        if let Backing::Host(link) = &self.opened.backing {
            link.ready(0);
        }
    }

    /// Notifies; whether there was a way to.
    pub fn notify(&self, ivposition: u16, vector: u16) -> bool {
        let doorbells = self.opened.backing.doorbells();
        doorbells.is_some_and(|doorbells| doorbells.notify(ivposition, vector))
    }

    /// Attaches to the region, looks at all that is there, and leaves.
    ///
    /// # Errors
    /// Those of attaching.
    pub fn attach_and_leave(self) -> Result<()> {
        let attachment = Attachment::attach_to(&self.spec, self.opened)
            .map_err(|unusable| unusable.to_error(self.spec.as_str()))?;
        attachment.reap();
        attachment.census();
        // A DMB for itself, as a process has that connects to itself.
        if let Ok(own) = attachment.allocate(0, attachment.me()) {
            let _ = attachment.attach(own.token(), own.size_class(), attachment.me());
        }
        Ok(())
    }
}
