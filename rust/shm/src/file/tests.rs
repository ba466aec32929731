use std::path::PathBuf;

use super::*;

/// A directory of one test's own, removed with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        let name = format!("ivsmc-shm-{:032x}", random_u128().unwrap());
        let path = std::env::temp_dir().join(name);
        make_private_directory(&path).unwrap();
        Scratch(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

#[test]
fn a_symbolic_link_is_not_followed() {
    let scratch = Scratch::new();
    open_nofollow(&scratch.path("file"), Access::CreateNew(0o600)).unwrap();
    std::os::unix::fs::symlink("file", scratch.path("link")).unwrap();
    for access in [Access::Existing, Access::CreateOrOpen(0o600)] {
        let error = open_nofollow(&scratch.path("link"), access).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }
    let error = open_nofollow(&scratch.path("link"), Access::CreateNew(0o600)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
}

#[test]
fn files_are_opened_and_removed_within_a_directory() {
    let scratch = Scratch::new();
    let directory = open_nofollow(&scratch.0, Access::Directory).unwrap();
    let status_of = status(&directory).unwrap();
    assert!(status_of.is_directory());
    assert_eq!(status_of.permissions(), 0o700);
    assert_eq!(status_of.uid, effective_uid());
    let error = make_private_directory(&scratch.0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);

    let name = Path::new("region");
    let new = open_at(&directory, name, Access::CreateOrOpen(0o600)).unwrap();
    let again = open_at(&directory, name, Access::CreateOrOpen(0o600)).unwrap();
    assert_eq!(status(&new).unwrap(), status(&again).unwrap());
    assert_eq!(status(&new).unwrap().permissions(), 0o600);
    assert_eq!(status(&new).unwrap().links, 1);
    unlink_at(&directory, name).unwrap();
    assert_eq!(status(&new).unwrap().links, 0);
    let error = open_at(&directory, name, Access::Existing).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    let error = unlink(&scratch.path("region")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    let error = open_nofollow(Path::new("a\0b"), Access::Existing).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn a_sealed_memfd_keeps_its_size() {
    let fd = memfd(c"sealed").unwrap();
    set_size(&fd, 8192).unwrap();
    assert!(!is_sealed_against_shrinking(&fd));
    seal_size(&fd).unwrap();
    assert!(is_sealed_against_shrinking(&fd));
    for size in [0, 4096, 16384] {
        let error = set_size(&fd, size).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
    assert_eq!(status(&fd).unwrap().size, 8192);
    assert!(status(&fd).unwrap().is_regular());
    allocate(&fd, 0..8192).unwrap();
    assert_eq!(status(&fd).unwrap().reserved, 8192);
    punch_hole(&fd, 0..4096).unwrap();
    assert_eq!(status(&fd).unwrap().reserved, 4096);
}

#[test]
fn file_systems_are_judged_by_their_number() {
    let memory = file_system(memfd(c"where").unwrap()).unwrap();
    assert!(memory.is_memory() && memory.really_shares_memory());
    assert_eq!(memory.name(), Some("tmpfs"));
    let of = |magic| FileSystem { magic, available: 0 };
    assert_eq!(of(0x6969).name(), Some("nfs"));
    assert!(!of(0x6969).really_shares_memory());
    assert!(!of(1).really_shares_memory());
    assert_eq!(of(1).name(), None);
    let proc = open_nofollow(Path::new("/proc"), Access::Directory).unwrap();
    assert!(!file_system(proc).unwrap().really_shares_memory());
}

#[test]
fn random_numbers_differ() {
    assert_ne!(random_u128().unwrap(), random_u128().unwrap());
    assert!(page_size().is_power_of_two());
}
