//! Numbers that the kernel publishes as text: the boot id, the machine's uuid, the memory limit.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The identity of this boot of the kernel: equal in all processes and containers of one host.
///
/// # Errors
/// If `/proc` is not mounted, or its text is no UUID.
pub fn boot_id() -> io::Result<u128> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    parse_uuid(text.trim())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the boot id is not a UUID"))
}

/// The uuid that the firmware gives this machine, real or virtual: the same after a reboot. `None`
/// if it has none, or this process may not read it (root may).
#[must_use]
pub fn machine_uuid() -> Option<u128> {
    let text = fs::read_to_string("/sys/class/dmi/id/product_uuid").ok()?;
    parse_machine_uuid(&text)
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
        assert_ne!(id, 0);
        assert_eq!(id, boot_id().unwrap());
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
