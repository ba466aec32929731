//! An agent whose device is a file, for fuzz targets.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use ivsmc_proto::agent::Part;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::poll::EventFd;

use super::device::OwnedDevice;
use super::{Agent, AgentOptions};
use crate::device::Kind;
use crate::socket::Socket;
use crate::Result;

/// A region at the start of a file, and registers after it. Nobody notifies its vectors.
struct OnFile {
    file: Fd,
    size: u64,
    vectors: u16,
}

/// An agent at `path` over a device with `vectors`, whose memory is the first `size` bytes of `file`.
///
/// # Errors
/// Those of [`Agent::new`].
pub fn agent(path: &Path, file: Fd, size: u64, vectors: u16) -> Result<Agent> {
    let options = AgentOptions::new(path);
    let socket = Socket::bind(Kind::Agent, &options.path, options.mode, options.group)?;
    let mapping = Mapping::map(file.try_clone()?, size)?;
    let device = OnFile { file, size, vectors };
    Agent::over(options, socket, "file".into(), Box::new(device), mapping, true)
}

impl OwnedDevice for OnFile {
    fn ivposition(&self) -> u16 {
        0
    }

    fn vectors(&self) -> u16 {
        self.vectors
    }

    fn wire(&self, _vector: u16, _eventfd: &EventFd) -> io::Result<()> {
        Ok(())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn memory(&self) -> Part {
        Part { offset: 0, size: self.size }
    }

    fn registers(&self) -> Part {
        Part { offset: self.size, size: 256 }
    }

    fn can_map_registers(&self) -> bool {
        true
    }
}
