//! Who dies while it makes, uses or removes the region of its user.

use std::fs;
use std::path::{Path, PathBuf};

use ivsmc_proto::reclaim::Census;
use ivsmc_proto::region::Region;
use ivsmc_shm::file::{self, Access};
use ivsmc_shm::mapping::Mapping;

use super::process::Process;
use super::stage::{LIVE, NONE};
use crate::device::tests::Scratch;

dies_at! {
    its_file_is_made: "local.made" => |name| dies(name, "join", Found::File);
    its_file_has_its_size: "local.sized" => |name| dies(name, "join", Found::File);
    an_extents_memory_is_given_back: "extent.emptied" => |name| {
        dies(name, "allocate", Found::Region(Census { extents: 1, ..LIVE }));
    };
    its_file_is_removed: "local.removed" => |name| dies(name, "allocate", Found::Directory);
}

/// What is there after a death.
enum Found {
    Directory,
    /// Not formatted.
    File,
    Region(Census),
}

/// The next one finds it, and in the end nothing is there.
fn dies(name: &str, role: &str, found: Found) {
    let scratch = Scratch::new();
    let start = |role, at| Process::start(&["local", scratch.path().to_str().unwrap(), role], at);
    start(role, Some((name, 1))).dies_at(name);
    let file = file_below(scratch.path());
    match found {
        Found::Directory => assert_eq!(file, None),
        Found::File => assert!(fs::read(file.unwrap()).unwrap().iter().all(|byte| *byte == 0)),
        Found::Region(census) => assert_eq!(count(&file.unwrap()), census),
    }
    let mut next = start("join", None);
    next.hear("joined");
    assert_eq!(count(&file_below(scratch.path()).unwrap()), Census { live: 1, ..NONE });
    next.ends();
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
}

/// The region of this user, if it is there; its directory is.
fn file_below(directory: &Path) -> Option<PathBuf> {
    let own = fs::read_dir(directory).unwrap().next().unwrap().unwrap().path();
    fs::read_dir(own).unwrap().next().map(|entry| entry.unwrap().path())
}

fn count(path: &Path) -> Census {
    let fd = file::open_nofollow(path, Access::Existing).unwrap();
    let size = file::status(&fd).unwrap().size;
    Region::attach(Mapping::map(fd, size).unwrap(), 1).unwrap().census()
}
