//! Memory and places that are gone with the input.

use std::path::{Path, PathBuf};

use ivsmc_shm::fd::Fd;
use ivsmc_shm::file;

/// A file in memory of `size` zero bytes.
///
/// # Panics
/// If there is none to be had.
#[must_use]
pub fn memory(size: u64) -> Fd {
    let memory = file::memfd(c"ivsmc-fuzz").expect("a memfd");
    file::set_size(&memory, size).expect("a size");
    memory
}

/// A directory.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new one below the directory for temporary files.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        let path = std::env::temp_dir().join(format!("ivsmc-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }

    /// A name in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.0
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
