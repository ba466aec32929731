//! Files that hold regions: opening them without being tricked, reserving their memory, judging
//! what they are; and numbers that come from files of the kernel.

mod limits;

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

pub use limits::{boot_id, machine_uuid, memory_room, BootId};

use crate::call;
use crate::fd::Fd;

/// Which file: two descriptors of the same file have the same identity while the file exists.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FileIdentity {
    /// `st_dev`: the file system.
    pub device: u64,
    /// `st_ino`: the file in it.
    pub inode: u64,
}

/// What `fstat` says about an open file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status {
    /// Which file it is.
    pub identity: FileIdentity,
    /// Bytes.
    pub size: u64,
    /// Bytes that have memory or disk blocks: less than `size` in a sparse file.
    pub reserved: u64,
    /// `st_mode`: type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Names the file has; 0 once it is unlinked.
    pub links: u64,
}

impl Status {
    /// Whether it is a regular file (memfds, and sysfs resource files, are).
    #[must_use]
    pub fn is_regular(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }

    /// Whether it is a directory.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    /// The permission bits: `0o7777` of the mode.
    #[must_use]
    pub fn permissions(&self) -> u32 {
        self.mode & 0o7777
    }
}

/// How [`open_nofollow`] opens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// An existing file, to read and write.
    Existing,
    /// A file to read and write; made with these permissions (less the umask) if it is not there.
    CreateOrOpen(u32),
    /// A new file to read and write, with these permissions (less the umask); `AlreadyExists` otherwise.
    CreateNew(u32),
    /// A directory, as a base for [`open_at`].
    Directory,
}

impl Access {
    fn flags(self) -> libc::c_int {
        let flags = match self {
            Access::Existing => libc::O_RDWR,
            Access::CreateOrOpen(_) => libc::O_RDWR | libc::O_CREAT,
            Access::CreateNew(_) => libc::O_RDWR | libc::O_CREAT | libc::O_EXCL,
            Access::Directory => libc::O_RDONLY | libc::O_DIRECTORY,
        };
        flags | libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NONBLOCK
    }

    fn permissions(self) -> libc::mode_t {
        match self {
            Access::CreateOrOpen(mode) | Access::CreateNew(mode) => mode,
            Access::Existing | Access::Directory => 0,
        }
    }
}

/// Opens `path`; if its last part is a symbolic link, fails with `ELOOP`.
///
/// # Errors
/// Those of `open`.
pub fn open_nofollow(path: &Path, access: Access) -> io::Result<Fd> {
    open_from(libc::AT_FDCWD, path, access)
}

/// Opens `name` in the open directory `directory`, not following a symbolic link.
///
/// # Errors
/// Those of `openat`.
pub fn open_at(directory: impl AsFd, name: &Path, access: Access) -> io::Result<Fd> {
    open_from(directory.as_fd().as_raw_fd(), name, access)
}

fn open_from(directory: RawFd, path: &Path, access: Access) -> io::Result<Fd> {
    let path = c_path(path)?;
    // SAFETY: openat needs a terminated path, a local; a descriptor it returns is new and without
    // an owner.
    unsafe {
        let number = call::check(libc::openat(
            directory,
            path.as_ptr(),
            access.flags(),
            access.permissions(),
        ))?;
        Ok(Fd::from_call(number))
    }
}

/// Makes the directory `path` for this user only (0700).
///
/// # Errors
/// Those of `mkdir`: `AlreadyExists`, whoever made it.
pub fn make_private_directory(path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: mkdir needs a terminated path, a local.
    call::check(unsafe { libc::mkdir(path.as_ptr(), 0o700) }).map(drop)
}

/// Removes the name `path`.
///
/// # Errors
/// Those of `unlink`.
pub fn unlink(path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: unlink needs a terminated path, a local.
    call::check(unsafe { libc::unlink(path.as_ptr()) }).map(drop)
}

/// Removes the name `name` from the open directory `directory`.
///
/// # Errors
/// Those of `unlinkat`.
pub fn unlink_at(directory: impl AsFd, name: &Path) -> io::Result<()> {
    let name = c_path(name)?;
    // SAFETY: unlinkat needs a terminated path, a local, and a descriptor, borrowed.
    call::check(unsafe { libc::unlinkat(directory.as_fd().as_raw_fd(), name.as_ptr(), 0) })
        .map(drop)
}

/// What the open file is.
///
/// # Errors
/// Those of `fstat`.
pub fn status(fd: impl AsFd) -> io::Result<Status> {
    let mut status = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: fstat initialises the structure it is given, a local, when it succeeds.
    let status = unsafe {
        call::check(libc::fstat(fd.as_fd().as_raw_fd(), status.as_mut_ptr()))?;
        status.assume_init()
    };
    Ok(Status {
        identity: FileIdentity { device: status.st_dev, inode: status.st_ino },
        size: u64::try_from(status.st_size).unwrap_or(0),
        reserved: u64::try_from(status.st_blocks).unwrap_or(0).saturating_mul(512),
        mode: status.st_mode,
        uid: status.st_uid,
        // 32 bits on some processors.
        #[allow(clippy::useless_conversion)]
        links: u64::from(status.st_nlink),
    })
}

/// Reads all of `into` at `offset`.
///
/// # Errors
/// Those of `pread`; `UnexpectedEof` if the file has less there.
pub fn read_at(fd: impl AsFd, offset: u64, into: &mut [u8]) -> io::Result<()> {
    let at = call::file_offset(offset)?;
    // SAFETY: pread writes at most the given number of bytes into an exclusively borrowed slice.
    let read =
        unsafe { libc::pread(fd.as_fd().as_raw_fd(), into.as_mut_ptr().cast(), into.len(), at) };
    all(call::check_count(read)?, into.len())
}

/// Writes all of `from` at `offset`.
///
/// # Errors
/// Those of `pwrite`; `UnexpectedEof` if the file takes less there.
pub fn write_at(fd: impl AsFd, offset: u64, from: &[u8]) -> io::Result<()> {
    let at = call::file_offset(offset)?;
    // SAFETY: pwrite reads the given number of bytes of a borrowed slice.
    let written =
        unsafe { libc::pwrite(fd.as_fd().as_raw_fd(), from.as_ptr().cast(), from.len(), at) };
    all(call::check_count(written)?, from.len())
}

fn all(done: usize, wanted: usize) -> io::Result<()> {
    if done == wanted {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// A file system, judged by the number that `fstatfs` gives for its type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileSystem {
    /// The kernel's magic number.
    pub magic: u64,
    /// Bytes that may still be reserved by this user; of no meaning where there is no limit.
    pub available: u64,
}

impl FileSystem {
    /// File systems whose mappings are one memory for all processes of the host, with their names:
    /// the allow-list for regions.
    const SHARED: [(u64, &'static str); 7] = [
        (0x0102_1994, "tmpfs"),
        (0x9584_58f6, "hugetlbfs"),
        (0x8584_58f6, "ramfs"),
        (0xef53, "ext4"),
        (0x5846_5342, "xfs"),
        (0x9123_683e, "btrfs"),
        (0x6265_6572, "sysfs"),
    ];
    /// Others worth naming when refused.
    const REFUSED: [(u64, &'static str); 8] = [
        (0x794c_7630, "overlayfs"),
        (0x6969, "nfs"),
        (0x0102_1997, "9p"),
        (0x6573_5546, "fuse"),
        (0xff53_4d42, "cifs"),
        (0xfe53_4d42, "smb2"),
        (0x00c3_6400, "ceph"),
        (0x9fa0, "proc"),
    ];

    /// Its name, if it is one of those known here.
    #[must_use]
    pub fn name(&self) -> Option<&'static str> {
        let known = Self::SHARED.iter().chain(&Self::REFUSED);
        known.clone().find(|(magic, _)| *magic == self.magic).map(|(_, name)| *name)
    }

    /// Whether a shared mapping of its files is the same memory in all processes of the host, with
    /// byte locks that agree.
    #[must_use]
    pub fn really_shares_memory(&self) -> bool {
        Self::SHARED.iter().any(|(magic, _)| *magic == self.magic)
    }

    /// Whether its files live in memory only.
    #[must_use]
    pub fn is_memory(&self) -> bool {
        matches!(self.name(), Some("tmpfs" | "hugetlbfs" | "ramfs"))
    }
}

/// The file system the open file is on.
///
/// # Errors
/// Those of `fstatfs`.
pub fn file_system(fd: impl AsFd) -> io::Result<FileSystem> {
    let mut found = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: fstatfs initialises the structure it is given, a local, when it succeeds.
    let found = unsafe {
        call::check(libc::fstatfs(fd.as_fd().as_raw_fd(), found.as_mut_ptr()))?;
        found.assume_init()
    };
    // Magic numbers have 32 bits; the field is signed and wider.
    let magic = found.f_type as u64 & 0xffff_ffff;
    let block = found.f_bsize as u64;
    Ok(FileSystem { magic, available: found.f_bavail.saturating_mul(block) })
}

/// A new file in memory, without a name in any directory; `name` is for `/proc` only.
///
/// # Errors
/// Those of `memfd_create`.
pub fn memfd(name: &CStr) -> io::Result<Fd> {
    let create = |flags| -> io::Result<Fd> {
        // SAFETY: memfd_create needs a terminated name; a descriptor it returns is new and without
        // an owner.
        unsafe {
            let number = call::check(libc::memfd_create(name.as_ptr(), flags))?;
            Ok(Fd::from_call(number))
        }
    };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // Kernels before 6.3 do not know MFD_NOEXEC_SEAL; some later ones can be told to insist on it.
    match create(flags | libc::MFD_NOEXEC_SEAL) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => create(flags),
        result => result,
    }
}

/// Seals the size of a memfd for good: nobody can make it smaller or larger, or unseal it.
///
/// # Errors
/// Those of `fcntl(F_ADD_SEALS)`: `InvalidInput` if it is no memfd.
pub fn seal_size(fd: impl AsFd) -> io::Result<()> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes a number.
    call::check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}

/// Whether the file is a memfd that nobody can make smaller: mapping it cannot raise SIGBUS.
#[must_use]
pub fn is_sealed_against_shrinking(fd: impl AsFd) -> bool {
    // SAFETY: F_GET_SEALS takes no further argument.
    let seals = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// Makes the file `size` bytes long; what is added is zero and sparse.
///
/// # Errors
/// Those of `ftruncate`.
pub fn set_size(fd: impl AsFd, size: u64) -> io::Result<()> {
    let size = call::file_offset(size)?;
    // SAFETY: ftruncate takes numbers.
    call::check(unsafe { libc::ftruncate(fd.as_fd().as_raw_fd(), size) }).map(drop)
}

/// Reserves memory or blocks for `range` of the file, making it longer if need be.
///
/// Never the C library's emulation, which writes: a file system that cannot do it says so
/// (`Unsupported`).
///
/// # Errors
/// `StorageFull` if there is no room; else those of `fallocate`.
pub fn allocate(fd: impl AsFd, range: Range<u64>) -> io::Result<()> {
    fallocate(&fd, 0, range)
}

/// Gives the memory or blocks of `range` back; it reads as zeros from now on.
///
/// # Errors
/// Those of `fallocate`.
pub fn punch_hole(fd: impl AsFd, range: Range<u64>) -> io::Result<()> {
    fallocate(&fd, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, range)
}

fn fallocate(fd: &impl AsFd, mode: libc::c_int, range: Range<u64>) -> io::Result<()> {
    let start = call::file_offset(range.start)?;
    let length = call::file_offset(range.end.saturating_sub(range.start))?;
    loop {
        // SAFETY: fallocate takes numbers.
        let done = unsafe { libc::fallocate(fd.as_fd().as_raw_fd(), mode, start, length) };
        match call::check(done) {
            // It starts anew and keeps what it has: repeating it ends.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(drop),
        }
    }
}

/// A random number from the kernel.
///
/// # Errors
/// Those of `getrandom`.
pub fn random_u128() -> io::Result<u128> {
    let mut bytes = [0_u8; 16];
    loop {
        // SAFETY: getrandom writes at most the given number of bytes into a local array.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match call::check_count(got) {
            Ok(got) if got == bytes.len() => return Ok(u128::from_ne_bytes(bytes)),
            // Short only if a signal came before the kernel's generator was ready, at boot.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The user this process acts as (effective id).
#[must_use]
pub fn effective_uid() -> u32 {
    // SAFETY: geteuid takes nothing and always succeeds.
    unsafe { libc::geteuid() }
}

/// The size of a page in bytes.
#[must_use]
pub fn page_size() -> u64 {
    // SAFETY: sysconf takes a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "path contains a zero byte"))
}

#[cfg(test)]
mod tests;
