//! What can be chosen about an ivshmem server.

use std::path::PathBuf;

use ivsmc_proto::ivshmem::MAX_VECTORS;

use super::{Backing, IdOrder};
use crate::{Error, Result};

/// Clients there can be: as many as there are ids.
const MAX_CLIENTS: usize = 1 << 16;

/// How an ivshmem server is to be.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where clients connect: a path of at most 107 bytes. A dead server's socket there is
    /// replaced, a live one's is an error.
    pub path: PathBuf,
    /// Permissions of the socket; who may write it may join. Default 0600.
    pub mode: u32,
    /// Group of the socket, by its number. Default: that of the process.
    pub group: Option<u32>,
    /// The shared memory. Default: a memfd of 64 MiB.
    pub backing: Backing,
    /// Eventfds of each client, 1..=256; QEMU's `vectors=` must be at least that. Default 1, as
    /// QEMU's.
    pub vectors: u16,
    /// Default: the lowest that is free.
    pub ids: IdOrder,
    /// More clients than this are turned away, 1..=65536. Default 65536; descriptors may end
    /// sooner: each client takes one, and one for each vector.
    pub max_clients: usize,
}

impl ServerOptions {
    /// The defaults, at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            mode: 0o600,
            group: None,
            backing: Backing::Memfd { size: 64 << 20 },
            vectors: 1,
            ids: IdOrder::default(),
            max_clients: MAX_CLIENTS,
        }
    }

    pub(super) fn judge(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::ApiMisuse(what));
        if !(1..=MAX_VECTORS).contains(&self.vectors) {
            return wrong(format!("vectors={}: 1 to {MAX_VECTORS} are possible", self.vectors));
        }
        if !(1..=MAX_CLIENTS).contains(&self.max_clients) {
            return wrong(format!(
                "max_clients={}: 1 to {MAX_CLIENTS} are possible",
                self.max_clients
            ));
        }
        if self.mode & !0o777 != 0 {
            return wrong(format!("mode={:#o}: 0 to 0o777 are permissions", self.mode));
        }
        Ok(())
    }
}
