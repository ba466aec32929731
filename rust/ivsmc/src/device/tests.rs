//! What devices accept and refuse, and what they leave behind.

use std::fs::{self, File};
use std::io::Write;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ivsmc_proto::ivshmem::{self, Descriptor};
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotState};
use ivsmc_shm::fd::Fd;
use ivsmc_shm::{file as files, net, poll};

use super::*;
use crate::attachment::Attachment;

/// A directory in shared memory, removed with all that is in it.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = format!("/dev/shm/ivsmc-test-{}-{number}", std::process::id());
        fs::create_dir(&path).unwrap();
        Self(path.into())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// A file of `size` zeros, not backed.
    pub(crate) fn file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.0.join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

pub(crate) fn spec(kind: Kind, path: &Path) -> DeviceSpec {
    format!("{kind}:{}", path.display()).parse().unwrap()
}

/// The sentence with which the device is refused.
fn refusal(kind: Kind, path: &Path) -> String {
    match Attachment::open(&spec(kind, path)) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(unusable) => unusable.to_error("it").to_string(),
    }
}

#[test]
fn files_that_are_no_regions_are_refused_in_words() {
    let scratch = Scratch::new();
    let said = |path: &Path, what: &str| {
        let words = refusal(Kind::File, path);
        assert!(words.contains(what), "{}: {words}", path.display());
    };
    said(&scratch.path().join("missing"), "truncate -s 64M");
    said(scratch.path(), "directory");
    said(&scratch.file("small", 4096), "has 4096 bytes, and a region needs at least 1 MiB");
    said(Path::new("/dev/null"), "not a regular file");
    said(Path::new("/proc/version"), "file system is");
    let listener = UnixListener::bind(scratch.path().join("socket")).unwrap();
    said(&scratch.path().join("socket"), "cannot be opened");
    drop(listener);

    let garbage = scratch.file("garbage", 2 << 20);
    fs::OpenOptions::new().write(true).open(&garbage).unwrap().write_all(b"#!/bin/sh").unwrap();
    said(&garbage, "not an ivsmc region");
    assert!(fs::read(&garbage).unwrap().starts_with(b"#!/bin/sh\0\0"));
}

#[test]
fn a_region_of_another_version_or_size_is_refused() {
    use std::os::unix::fs::FileExt;
    let scratch = Scratch::new();
    let path = scratch.file("region", 2 << 20);
    drop(Attachment::open(&spec(Kind::File, &path)).unwrap());
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(4 << 20).unwrap();
    assert!(refusal(Kind::File, &path).contains("region was made with 2097152 bytes"));
    file.set_len(2 << 20).unwrap();
    file.write_all_at(&77u64.to_le_bytes(), 8).unwrap();
    let words = refusal(Kind::File, &path);
    assert!(words.contains("version 77"), "{words}");
}

#[test]
fn a_file_without_permission_is_refused_in_words() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 1 << 20);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    // Root may open it all the same.
    if files::effective_uid() != 0 {
        assert!(refusal(Kind::File, &path).contains("no permission"));
    }
}

/// The private region below `parent`.
fn local(parent: &Path) -> Result<Arc<Attachment>, Unusable> {
    Attachment::attach_to(&DeviceSpec::local(), local::open_below(parent, Some(4 << 20))?)
}

fn local_directory(parent: &Path) -> PathBuf {
    parent.join(format!("ivsmc-{}", files::effective_uid()))
}

#[test]
fn local_is_private_and_goes_with_the_last_one() {
    let scratch = Scratch::new();
    let directory = local_directory(scratch.path());
    let first = local(scratch.path()).unwrap();
    let second = local(scratch.path()).unwrap();
    assert_eq!(first.region().uuid(), second.region().uuid());
    assert_ne!(first.me(), second.me());
    assert_eq!(fs::metadata(&directory).unwrap().mode() & 0o777, 0o700);
    let region = fs::metadata(directory.join("region")).unwrap();
    assert_eq!(region.mode() & 0o777, 0o600);
    assert_eq!(region.len(), 4 << 20);
    // Only the tables take memory.
    assert!(region.blocks() * 512 < 1 << 20, "{} blocks", region.blocks());
    drop(first);
    assert!(second.is_up_to_date());
    drop(second);
    assert!(!directory.exists());
}

#[test]
fn local_that_was_removed_by_somebody_is_noticed() {
    let scratch = Scratch::new();
    let first = local(scratch.path()).unwrap();
    fs::remove_dir_all(local_directory(scratch.path())).unwrap();
    assert!(!first.is_up_to_date());
    let second = local(scratch.path()).unwrap();
    assert_ne!(first.region().uuid(), second.region().uuid());
    drop(first);
    assert!(second.is_up_to_date());
}

#[test]
fn those_who_come_while_the_last_one_goes_meet() {
    let scratch = Scratch::new();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..100 {
                    let attachment = local(scratch.path()).unwrap();
                    // Nobody removes the file while somebody is there.
                    assert!(attachment.is_up_to_date());
                    thread::yield_now();
                    assert!(attachment.is_up_to_date());
                }
            });
        }
    });
    assert!(!local_directory(scratch.path()).exists());
}

#[test]
fn a_squatted_local_directory_is_unsafe_and_stays_as_it_is() {
    let unsafe_with = |what: &str, prepare: &dyn Fn(&Path)| {
        let scratch = Scratch::new();
        let directory = local_directory(scratch.path());
        prepare(&directory);
        let refused = local(scratch.path()).err().expect(what);
        assert_eq!(refused.reason, Reason::LocalUnsafe, "{}", refused.sentence);
        assert!(refused.sentence.contains(what), "{}", refused.sentence);
        let region = fs::symlink_metadata(directory.join("region"));
        assert!(region.map_or(true, |region| !region.is_file() || region.len() == 0));
    };
    let make = |directory: &Path, mode: u32| {
        fs::create_dir(directory).unwrap();
        fs::set_permissions(directory, fs::Permissions::from_mode(mode)).unwrap();
    };
    let make_region = |directory: &Path, mode: u32| {
        make(directory, 0o700);
        File::create(directory.join("region")).unwrap();
        fs::set_permissions(directory.join("region"), fs::Permissions::from_mode(mode)).unwrap();
    };
    unsafe_with("has mode 0777 and must have 0700", &|d| make(d, 0o777));
    unsafe_with("is not a directory", &|d| symlink("/dev/shm", d).unwrap());
    unsafe_with("is not a directory", &|d| fs::write(d, "").unwrap());
    unsafe_with("is a symbolic link", &|d| {
        make(d, 0o700);
        symlink("/etc/passwd", d.join("region")).unwrap();
    });
    unsafe_with("has mode 0666", &|d| make_region(d, 0o666));
    unsafe_with("hard links", &|d| {
        make_region(d, 0o600);
        fs::hard_link(d.join("region"), d.join("other")).unwrap();
    });
    unsafe_with("is a directory", &|d| {
        make(d, 0o700);
        fs::create_dir(d.join("region")).unwrap();
    });
    // Only root can make what belongs to somebody else.
    if files::effective_uid() == 0 {
        unsafe_with("belongs to user 12345", &|d| {
            make(d, 0o700);
            std::os::unix::fs::chown(d, Some(12345), None).unwrap();
        });
        unsafe_with("belongs to user 12345", &|d| {
            make_region(d, 0o600);
            std::os::unix::fs::chown(d.join("region"), Some(12345), None).unwrap();
        });
    }
}

#[test]
fn a_local_region_that_is_none_is_refused_and_stays() {
    let scratch = Scratch::new();
    let directory = local_directory(scratch.path());
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
    let region = directory.join("region");
    fs::write(&region, vec![7; 2 << 20]).unwrap();
    fs::set_permissions(&region, fs::Permissions::from_mode(0o600)).unwrap();
    let refused = local(scratch.path()).err().unwrap();
    assert!(refused.is_region && refused.sentence.contains("not an ivsmc region"));
    assert!(refused.sentence.contains(region.to_str().unwrap()), "{}", refused.sentence);
    assert_eq!(fs::metadata(&region).unwrap().len(), 2 << 20);
}

#[test]
fn local_without_a_place_names_it() {
    let refused = local(Path::new("/does/not/exist")).err().unwrap();
    assert_eq!(refused.reason, Reason::NoDevice);
    assert!(refused.sentence.contains("/does/not/exist"), "{}", refused.sentence);
}

/// Serves one client at `path` with `serve`.
fn serve(path: &Path, serve: impl FnOnce(UnixStream) + Send + 'static) -> thread::JoinHandle<()> {
    listen(path, |listener| serve(listener.accept().unwrap().0))
}

/// Serves those that connect to `path` with `serve`.
fn listen(
    path: &Path,
    serve: impl FnOnce(&UnixListener) + Send + 'static,
) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || serve(&listener))
}

/// Sends all of `bytes`, waiting for room; nothing to a client that has left.
fn send(stream: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd<'_>>) {
    loop {
        match net::send_with_fd(stream, bytes, fd) {
            Ok(sent) => return assert_eq!(sent, bytes.len()),
            // The client has left.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        thread::yield_now();
    }
}

/// Sends what an ivshmem server sends a newcomer.
fn welcome(stream: &UnixStream, region: &File, others: &[(u16, u16)]) {
    let doorbell = poll::EventFd::new().unwrap();
    for message in ivshmem::welcome(5, 2, others.iter().copied()) {
        let fd = match message.descriptor {
            Descriptor::None => None,
            Descriptor::Region => Some(region.as_fd()),
            Descriptor::Vector { .. } => Some(doorbell.as_fd()),
        };
        // In two parts: a stream keeps no message together.
        let bytes = message.to_bytes();
        send(stream, &bytes[..3], fd);
        send(stream, &bytes[3..], None);
    }
}

#[test]
fn a_client_of_any_ivshmem_server_attaches() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 2 << 20);
    let socket = scratch.path().join("ivs.sock");
    let region = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let server = serve(&socket, move |mut stream| {
        welcome(&stream, &region, &[(3, 2), (4, 300)]);
        send(&stream, &ivshmem::left(3).to_bytes(), None);
        // Until the client leaves; with a message unread that is a reset.
        assert!(!std::io::Read::read(&mut stream, &mut [0]).is_ok_and(|n| n > 0));
    });
    let attachment = Attachment::open(&spec(Kind::Host, &socket)).unwrap();
    let info = attachment.region().slot_info(attachment.me()).unwrap();
    assert_eq!((info.ivposition, attachment.record().identity.ivposition), (Some(5), 0));
    // It holds a lock of its own, on an open file that it does not share with the server.
    let state = attachment.region().slot_state(attachment.me().index);
    assert!(matches!(state, SlotState::Live { prover: Prover::Lock { .. }, .. }));
    let other = Attachment::open(&spec(Kind::File, &path)).unwrap();
    assert_eq!(other.region().uuid(), attachment.region().uuid());
    assert_eq!((other.reap(), attachment.reap()), (0, 0));
    drop(attachment);
    server.join().unwrap();
    assert_eq!(other.census().live, 1);
}

#[test]
fn who_is_turned_away_without_a_word_comes_once_more() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 1 << 20);
    let socket = scratch.path().join("ivs.sock");
    let region = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let server = listen(&socket, move |listener| {
        // Killed just when it had accepted; then it is back.
        drop(listener.accept().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        welcome(&stream, &region, &[]);
        assert_eq!(std::io::Read::read(&mut stream, &mut [0]).unwrap(), 0);
    });
    drop(Attachment::open(&spec(Kind::Host, &socket)).unwrap());
    server.join().unwrap();
}

#[test]
fn vectors_of_an_ivshmem_server_that_marks_leavers_are_waited_for() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 1 << 20);
    let socket = scratch.path().join("ivs.sock");
    let region = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let marked = Mapping::map(Fd::from(OwnedFd::from(region.try_clone().unwrap())), 1 << 20);
    Region::attach(marked.unwrap(), 7).unwrap().set_marking_server(NonZeroU64::MIN);
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let server = serve(&socket, move |stream| {
        let eventfd = poll::EventFd::new().unwrap();
        for message in ivshmem::welcome(5, 2, [(3, 2)]) {
            let fd = match message.descriptor {
                Descriptor::None => None,
                Descriptor::Region => Some(region.as_fd()),
                Descriptor::Vector { peer: 5, .. } => {
                    // Killed; it goes on after longer than others are waited for.
                    thread::sleep(Duration::from_millis(400));
                    Some(eventfd.as_fd())
                }
                Descriptor::Vector { .. } => Some(eventfd.as_fd()),
            };
            send(&stream, &message.to_bytes(), fd);
        }
        ended.recv().unwrap_err();
    });
    let opened = host::open_within(&socket, Duration::from_secs(600)).unwrap();
    let Backing::Host(link) = &opened.backing else { panic!("not a client") };
    // The second one, which is for sessions.
    assert_eq!(link.own().map(|(vector, _)| vector), Some(1));
    drop(end);
    server.join().unwrap();
}

#[test]
fn the_background_thread_hears_the_ivshmem_server() {
    let scratch = Scratch::new();
    let path = scratch.file("region", 1 << 20);
    let socket = scratch.path().join("ivs.sock");
    let region = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let server = serve(&socket, move |stream| {
        welcome(&stream, &region, &[]);
        let doorbell = poll::EventFd::new().unwrap();
        // Far more than a socket holds: somebody must read it.
        for id in 10..5000 {
            for message in ivshmem::newcomer(id, 1).chain([ivshmem::left(id)]) {
                let fd = match message.descriptor {
                    Descriptor::Vector { .. } => Some(doorbell.as_fd()),
                    _ => None,
                };
                send(&stream, &message.to_bytes(), fd);
            }
        }
        ended.recv().unwrap_err();
    });
    let device = crate::open_device(spec(Kind::Host, &socket).as_str()).unwrap();
    assert_eq!(device.region().unwrap().census.live, 1);
    // The server ends the connection: the region stays usable.
    drop(end);
    server.join().unwrap();
    assert_eq!(device.region().unwrap().census.live, 1);
    device.close();
    assert!(matches!(device.region(), Err(Error::Closed)));
}

#[test]
fn what_is_no_ivshmem_server_is_refused_in_words() {
    let scratch = Scratch::new();
    let said = |name: &str, what: &str| {
        let words = refusal(Kind::Host, &scratch.path().join(name));
        assert!(words.contains(what), "{name}: {words}");
    };
    said("missing", "no such socket");
    scratch.file("file", 0);
    said("file", "nobody listens");
    let serving = |name: &str, run: fn(UnixStream)| serve(&scratch.path().join(name), run);
    let http = serving("http", |mut stream| {
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n").unwrap();
    });
    said("http", "not an ivshmem server: the first message is");
    let closing = listen(&scratch.path().join("closing"), |listener| {
        (0..2).for_each(|_| drop(listener.accept().unwrap()));
    });
    said("closing", "ended the connection");
    let version = serving("version", |mut stream| stream.write_all(&7i64.to_le_bytes()).unwrap());
    said("version", "the first message is 7, not protocol version 0");
    let no_region = serving("no region", |stream| {
        let null = File::open("/dev/null").unwrap();
        welcome(&stream, &null, &[]);
    });
    said("no region", "not a file");
    for server in [http, closing, version, no_region] {
        server.join().unwrap();
    }
}

#[test]
fn a_silent_server_is_not_waited_for_long() {
    let scratch = Scratch::new();
    let socket = scratch.path().join("silent");
    let listener = UnixListener::bind(&socket).unwrap();
    let began = Instant::now();
    let refused = host::open_within(&socket, Duration::from_millis(50)).err().unwrap();
    assert!(refused.sentence.contains("has not sent a region"), "{}", refused.sentence);
    assert!(began.elapsed() >= Duration::from_millis(50));
    drop(listener);
}
