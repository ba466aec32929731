//! Numbers that the kernel publishes as text: the boot id, the machine's uuid, the memory limit.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::file_system;

/// The kernel's number for the file system of `/proc`.
const PROC: u64 = 0x9fa0;
/// The kernel's number for the file system of `/sys`.
const SYSFS: u64 = 0x6265_6572;

/// What says which boot of the kernel this is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum BootId {
    /// The kernel's own word, never 0: equal in all processes of one boot, and in no other.
    Kernels(u128),
    /// Something is mounted over it, as container managers do: it says nothing about the kernel.
    Masked {
        /// Most likely equal in those processes only that see the same mask: those of one container.
        mask: u64,
    },
}

/// The identity of this boot of the kernel.
///
/// # Errors
/// Those of a process without descriptors or memory to look; if it is masked by what is not readable
/// as a UUID and there are no random numbers.
pub fn boot_id() -> io::Result<BootId> {
    boot_id_at(Path::new("/proc/sys/kernel/random/boot_id"))
}

fn boot_id_at(path: &Path) -> io::Result<BootId> {
    let shown = Shown::at(path, PROC)?;
    let id = shown.as_ref().and_then(|shown| parse_uuid(shown.text.trim()));
    match (shown, id) {
        (Some(Shown { mask: None, .. }), Some(id)) if id != 0 => Ok(BootId::Kernels(id)),
        (Some(Shown { mask: Some(mask), .. }), Some(id)) => {
            Ok(BootId::Masked { mask: mask ^ fold(id) })
        }
        // Nothing is common to those who see this.
        _ => Ok(BootId::Masked { mask: fold(super::random_u128()?) }),
    }
}

#[allow(clippy::cast_possible_truncation)] // both halves are in it
fn fold(id: u128) -> u64 {
    (id >> 64) as u64 ^ id as u64
}

/// What stands at a path of the kernel's.
struct Shown {
    text: String,
    /// Of what stands in the place of the kernel's file, something that another such file on another
    /// machine does not have, even with the same text; `None` if it is the kernel's.
    mask: Option<u64>,
}

impl Shown {
    /// What stands at `path`; `None` if that cannot be read, which fails only where the reason is this
    /// process's and not the file's.
    fn at(path: &Path, magic: u64) -> io::Result<Option<Self>> {
        match Self::read(path, magic) {
            Err(error) if is_shortage(&error) => Err(error),
            read => Ok(read.ok()),
        }
    }

    /// Reads what stands at `path`, which should be a file of the file system `magic`. A file of the same
    /// one may be mounted over it too: then it is on another mount than its directory.
    fn read(path: &Path, magic: u64) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let directory = File::open(path.parent().unwrap_or(path))?;
        let is_kernels = file_system(&file)?.magic == magic
            && file_system(&directory)?.magic == magic
            && mount_of(&file)? == mount_of(&directory)?;
        let mask = if is_kernels {
            None
        } else {
            let status = file.metadata()?;
            #[allow(clippy::cast_sign_loss)] // any number does
            let changed = (status.ctime() as u64).rotate_left(32) ^ status.ctime_nsec() as u64;
            Some(changed ^ status.ino().rotate_left(48))
        };
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok(Self { text, mask })
    }
}

/// Whether a system call failed for want of descriptors or memory: at another time it may not.
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

/// The mount through which `file` was opened, as the kernel numbers them.
fn mount_of(file: &File) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let number = text.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    number.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no mnt_id in fdinfo"))
}

/// The uuid that the firmware gives this machine, real or virtual: the same after a reboot. `None`
/// if it has none, this process may not read it (root may), or something is mounted over it.
///
/// # Errors
/// Those of a process without descriptors or memory to look.
pub fn machine_uuid() -> io::Result<Option<u128>> {
    let shown = Shown::at(Path::new("/sys/class/dmi/id/product_uuid"), SYSFS)?;
    let kernels = shown.filter(|shown| shown.mask.is_none());
    Ok(kernels.and_then(|shown| parse_machine_uuid(&shown.text)))
}

/// All zeros and all ones stand for none (SMBIOS 7.2.1).
fn parse_machine_uuid(text: &str) -> Option<u128> {
    parse_uuid(text.trim()).filter(|uuid| ![0, u128::MAX].contains(uuid))
}

/// Bytes this process's control groups may still take, or `None` if they have no limit.
///
/// Page cache that the kernel would give up counts as free. The least of all levels counts; a
/// level that cannot be read is taken as one without a limit.
#[must_use]
pub fn memory_room() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let (version, path) = memory_group(&groups)?;
    room_below(Path::new(version.root()), path, version)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Version {
    One,
    Two,
}

impl Version {
    fn root(self) -> &'static str {
        match self {
            Version::One => "/sys/fs/cgroup/memory",
            Version::Two => "/sys/fs/cgroup",
        }
    }

    /// Files for: limit, bytes in use; and the field of `memory.stat` for what can be given up.
    fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Version::One => {
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            }
            Version::Two => ("memory.max", "memory.current", "inactive_file"),
        }
    }
}

/// The group that limits memory, of the lines `ID:CONTROLLERS:PATH`.
fn memory_group(groups: &str) -> Option<(Version, &str)> {
    let mut unified = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        if controllers.split(',').any(|name| name == "memory") {
            return Some((Version::One, path));
        }
        if id == "0" && controllers.is_empty() {
            unified = Some((Version::Two, path));
        }
    }
    unified
}

fn room_below(root: &Path, group: &str, version: Version) -> Option<u64> {
    let mut at: PathBuf = root.join(group.trim_start_matches('/'));
    let mut least = None;
    // A path with `..` is a group outside this namespace: only what lies above it can be read.
    loop {
        if let Some(room) = room_of(&at, version) {
            least = Some(least.map_or(room, |least: u64| least.min(room)));
        }
        if at == root || !at.pop() || !at.starts_with(root) {
            return least;
        }
    }
}

fn room_of(group: &Path, version: Version) -> Option<u64> {
    let (limit, usage, reclaimable) = version.names();
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(group.join(name)).ok()?.trim().parse().ok()
    };
    // "max" does not parse: no limit. Version one says "no limit" by a number near 2^63.
    let limit = number(limit).filter(|limit| *limit < 1 << 62)?;
    let used = number(usage)?;
    let reclaimable = fs::read_to_string(group.join("memory.stat"))
        .ok()
        .and_then(|text| field(&text, reclaimable))
        .unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(reclaimable)))
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(' ')?;
        (key == name).then(|| value.trim().parse().ok())?
    })
}

fn parse_uuid(text: &str) -> Option<u128> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    if digits.len() != 32 {
        return None;
    }
    u128::from_str_radix(&digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_id_is_stable_and_not_zero() {
        let id = boot_id().unwrap();
        assert_ne!(id, BootId::Kernels(0));
        assert_eq!(id, boot_id().unwrap());
    }

    #[test]
    fn what_is_not_the_kernels_file_is_no_boot_id() {
        let root = std::env::temp_dir().join(format!("ivsmc-boot-{}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        let (one, two) = (root.join("one"), root.join("two"));
        let text = "8d5ae5ef-2a1c-4a29-9f0b-a9b5d4a4a3c1\n";
        for path in [&one, &two] {
            fs::write(path, text).unwrap();
        }
        let masked = |path: &Path| match boot_id_at(path).unwrap() {
            BootId::Masked { mask } => mask,
            BootId::Kernels(id) => panic!("{id}"),
        };
        assert_eq!(masked(&one), masked(&one), "the same mask");
        assert_ne!(masked(&one), masked(&two), "another file with the same text");
        fs::write(&two, "no uuid").unwrap();
        assert_ne!(masked(&two), masked(&two));
        assert_ne!(masked(&root.join("none")), masked(&root.join("none")));
        // The kernel's, and no boot id.
        masked(Path::new("/proc/sys/kernel/ostype"));
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn uuid_text_is_one_number() {
        assert_eq!(parse_uuid("00000000-0000-0000-0000-00000000002a"), Some(42));
        assert_eq!(parse_uuid("2a"), None);
        assert_eq!(parse_uuid("zz000000-0000-0000-0000-00000000002a"), None);
    }

    #[test]
    fn a_machine_may_have_no_uuid() {
        assert_eq!(parse_machine_uuid("00000000-0000-0000-0000-00000000002A\n"), Some(42));
        for none in ["00000000-0000-0000-0000-000000000000", "Not Settable", "", &"f".repeat(32)] {
            assert_eq!(parse_machine_uuid(none), None, "{none}");
        }
    }

    #[test]
    fn the_memory_group_is_found_in_both_versions() {
        assert_eq!(memory_group("0::/user.slice/a\n"), Some((Version::Two, "/user.slice/a")));
        let hybrid = "9:cpu,cpuacct:/x\n5:memory:/docker/b:c\n0::/init\n";
        assert_eq!(memory_group(hybrid), Some((Version::One, "/docker/b:c")));
        assert_eq!(memory_group("3:cpu:/\nnonsense\n"), None);
    }

    #[test]
    fn the_tightest_level_counts_and_cache_counts_as_free() {
        let root = std::env::temp_dir().join(format!("ivsmc-limits-{}", std::process::id()));
        let inner = root.join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        fs::write(inner.join("memory.current"), "5\n").unwrap();
        fs::write(root.join("a/memory.max"), "1000\n").unwrap();
        fs::write(root.join("a/memory.current"), "900\n").unwrap();
        fs::write(root.join("a/memory.stat"), "anon 7\ninactive_file 50\n").unwrap();
        let room = room_below(&root, "/a/b", Version::Two);
        let none = room_below(&root, "/elsewhere", Version::Two);
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(room, Some(150));
        assert_eq!(none, None);
    }
}
