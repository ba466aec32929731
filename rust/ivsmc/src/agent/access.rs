//! Who may use the agent's device.
//!
//! The kernel asks the socket's permissions of whoever connects; the agent asks them again of whoever
//! is connected, as the kernel names them (SO_PEERCRED). So a descriptor that was let through a mount
//! or opened in a moment of other permissions is worth nothing.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ivsmc_shm::fd::Fd;
use ivsmc_shm::net::{self, Credentials};

const ROOT: u32 = 0;

/// The permissions of a socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    uid: u32,
    gid: u32,
    mode: u32,
}

impl Access {
    /// Those of the socket at `path`.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let found = fs::symlink_metadata(path)?;
        Ok(Self { uid: found.uid(), gid: found.gid(), mode: found.mode() })
    }

    /// Who is at the other end of `socket`, if they may connect; else why they may not.
    pub(super) fn judge(&self, socket: &Fd) -> Result<Credentials, String> {
        let unknown = |error: io::Error| format!("the kernel does not say who it is: {error}");
        let who = net::peer_credentials(socket).map_err(unknown)?;
        let groups = net::peer_groups(socket).map_err(unknown)?;
        if self.allows(&who, &groups) {
            return Ok(who);
        }
        Err(format!(
            "process {} of user {} may not use the device; --mode and --group say who may",
            who.pid, who.uid
        ))
    }

    fn allows(&self, who: &Credentials, groups: &[u32]) -> bool {
        let shift = if who.uid == self.uid {
            6
        } else if who.gid == self.gid || groups.contains(&self.gid) {
            3
        } else {
            0
        };
        who.uid == ROOT || self.mode >> shift & 0o2 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_those_of_a_file() {
        let who = |uid, gid| Credentials { pid: 1, uid, gid };
        let allows = |mode, who: Credentials, groups: &[u32]| {
            Access { uid: 10, gid: 20, mode }.allows(&who, groups)
        };
        for (mode, owner, group, others) in [
            (0o600, true, false, false),
            (0o660, true, true, false),
            (0o666, true, true, true),
            (0o060, false, true, false),
            (0o606, true, false, true),
            (0o444, false, false, false),
        ] {
            assert_eq!(allows(mode, who(10, 20), &[20]), owner, "{mode:o}");
            assert_eq!(allows(mode, who(11, 20), &[21]), group, "{mode:o}");
            assert_eq!(allows(mode, who(11, 21), &[21, 20]), group, "{mode:o}");
            assert_eq!(allows(mode, who(11, 21), &[]), others, "{mode:o}");
            assert!(allows(mode, who(ROOT, 5), &[]), "{mode:o}");
        }
    }
}
