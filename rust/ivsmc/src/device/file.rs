//! `file:/path`: a shared file that somebody made, with `truncate -s 64M FILE` for instance, or
//! the backing file of an ivshmem-plain device.

use std::io;
use std::path::Path;

use ivsmc_proto::layout::MIN_REGION;
use ivsmc_shm::errno;
use ivsmc_shm::file::{self as files, Access};

use super::{Backing, Opened, Unusable};

/// Opens and judges the file.
pub(super) fn open(path: &Path) -> Result<Opened, Unusable> {
    let shown = path.display();
    // Links may be followed here: whoever names the file says that it is to be trusted.
    let fd = std::fs::canonicalize(path)
        .and_then(|path| files::open_nofollow(&path, Access::Existing))
        .map_err(|error| Unusable::device(refusal(path, &error)))?;
    let status = files::status(&fd)
        .map_err(|error| Unusable::device(format!("its size cannot be told: {error}")))?;
    if !status.is_regular() {
        return Err(Unusable::device("it is not a regular file"));
    }
    let file_system = super::file_system(&fd)?;
    super::judge_file_system(&file_system)?;
    if status.size < MIN_REGION {
        let cure = if status.size == 0 {
            format!("make it larger with \"truncate -s 64M {shown}\"")
        } else {
            // What is in there may be somebody's.
            "name a new file, made with truncate -s 64M".to_owned()
        };
        return Err(Unusable::region(format!(
            "the file has {} bytes, and a region needs at least {} MiB; {cure}",
            status.size,
            MIN_REGION >> 20,
        )));
    }
    let (mapping, whole) = super::map(fd, &status, &file_system)?;
    Ok(Opened { mapping, whole, lockable: true, backing: Backing::File })
}

fn refusal(path: &Path, error: &io::Error) -> String {
    let shown = path.display();
    match error.kind() {
        io::ErrorKind::NotFound => {
            format!("there is no such file; make one with \"truncate -s 64M {shown}\"")
        }
        io::ErrorKind::PermissionDenied => {
            "this process has no permission to read and write it; its owner can give it, with \
             chmod or chgrp"
                .to_owned()
        }
        _ if errno::is(error, errno::EISDIR) => "it is a directory, not a file".to_owned(),
        _ if errno::is(error, errno::EROFS) => "its file system is mounted read-only".to_owned(),
        _ => format!("it cannot be opened: {error}"),
    }
}
