//! Which processes have a VFIO device, for people who want to know why it is busy.

use std::fs;
use std::path::Path;

/// What the descriptor of a device looks like; the kernel gives all of them this name.
const DEVICE: &str = "anon_inode:[vfio-device]";

/// Processes, with their names, that have the group's file or a VFIO device open, as far as this
/// process may see it.
pub(super) fn holders(proc: &Path, group: &Path) -> Vec<String> {
    let mut found: Vec<u32> = fs::read_dir(proc)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| has_it(&proc.join(pid.to_string()).join("fd"), group))
        .collect();
    found.sort_unstable();
    let name = |pid: &u32| {
        let name = fs::read_to_string(proc.join(pid.to_string()).join("comm")).unwrap_or_default();
        format!("{pid} ({})", name.trim())
    };
    found.iter().map(name).collect()
}

fn has_it(descriptors: &Path, group: &Path) -> bool {
    fs::read_dir(descriptors)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|target| target == group || target == Path::new(DEVICE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::tests::Scratch;
    use std::os::unix::fs::symlink;

    #[test]
    fn those_with_the_group_or_a_device_are_named() {
        let scratch = Scratch::new();
        let group = Path::new("/dev/vfio/7");
        for (pid, name, target) in [
            ("30", "agent\n", "/dev/vfio/7"),
            ("4", "client\n", DEVICE),
            ("5", "other\n", "/dev/vfio/8"),
            ("self", "me\n", DEVICE),
        ] {
            let descriptors = scratch.path().join(pid).join("fd");
            fs::create_dir_all(&descriptors).unwrap();
            fs::write(scratch.path().join(pid).join("comm"), name).unwrap();
            symlink("/dev/null", descriptors.join("0")).unwrap();
            symlink(target, descriptors.join("3")).unwrap();
        }
        assert_eq!(holders(scratch.path(), group), ["4 (client)", "30 (agent)"]);
        assert!(holders(&scratch.path().join("nowhere"), group).is_empty());
    }
}
