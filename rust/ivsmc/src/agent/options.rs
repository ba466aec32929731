//! What can be chosen about an agent.

use std::path::{Path, PathBuf};

use ivsmc_shm::pci::Address;

use crate::devices::SOCKETS;
use crate::{Error, Result};

/// Clients there can be: far more than any device has vectors.
const MAX_CLIENTS: usize = 1024;

/// How an agent is to be.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// Where clients connect: a path of at most 107 bytes. A dead agent's socket there is replaced,
    /// a live one's is an error.
    pub path: PathBuf,
    /// Permissions of the socket; who may write it may use the device. Default 0600.
    pub mode: u32,
    /// Group of the socket, by its number. Default: that of the process.
    pub group: Option<u32>,
    /// More clients than this are turned away, 1..=1024. Default 256; descriptors may end sooner: each
    /// client takes three.
    pub max_clients: usize,
}

/// Whether a socket of this name is taken for an agent's.
pub(crate) fn is_socket_name(name: &str) -> bool {
    name == "agent.sock" || (name.starts_with("agent-") && name.ends_with(".sock"))
}

/// The name of the socket of the agent of one device; of the only agent of a machine, `None`.
pub(crate) fn socket_name(device: Option<Address>) -> String {
    device.map_or_else(|| "agent.sock".into(), |device| format!("agent-{device}.sock"))
}

impl AgentOptions {
    /// The defaults for the device at the PCI `address`, or the only one, where clients find its agent
    /// by themselves.
    ///
    /// # Errors
    /// [`Error::Device`] if `address` is no PCI address.
    pub fn found_by_clients(address: Option<&str>) -> Result<Self> {
        let address = address.map(parse_address).transpose()?;
        Ok(Self::new(Path::new(SOCKETS).join(socket_name(address))))
    }

    /// The defaults, at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), mode: 0o600, group: None, max_clients: 256 }
    }

    pub(super) fn judge(&self) -> Result<()> {
        if !(1..=MAX_CLIENTS).contains(&self.max_clients) {
            return Err(Error::ApiMisuse(format!(
                "max_clients={}: 1 to {MAX_CLIENTS} are possible",
                self.max_clients
            )));
        }
        if self.mode & !0o777 != 0 {
            return Err(Error::ApiMisuse(format!(
                "mode={:#o}: 0 to 0o777 are permissions",
                self.mode
            )));
        }
        Ok(())
    }
}

/// A PCI address as people write it.
pub(super) fn parse_address(text: &str) -> Result<Address> {
    text.parse().map_err(|()| {
        Error::device(text, "no PCI address; one is written as 0000:00:05.0 or 00:05.0")
    })
}
