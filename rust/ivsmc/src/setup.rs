//! What set-up has one of per process: regions to try, source ports, the listeners, the host's name.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use ivsmc_proto::clc::Hostname;
use ivsmc_shm::{file, fork};

use crate::attachment::Attachment;
use crate::devices::Problem;
use crate::fallback::{Fallback, Reason, Side};
use crate::listen::Acceptor;
use crate::reactor::lock;
use crate::runtime::Lease;
use crate::{Error, Result};

/// One cell for each fork generation, as for the runtime: a child takes no lock of its parent.
static SETUPS: [OnceLock<Setup>; 1024] = [const { OnceLock::new() }; 1024];

/// The set-up state of one process.
pub(crate) struct Setup {
    ports: Ports,
    hostname: Hostname,
    /// By [`crate::Listener`]; `None` once it was closed in this process.
    acceptors: Mutex<HashMap<u64, Option<Arc<Acceptor>>>>,
}

impl Setup {
    /// That of this process.
    pub(crate) fn current() -> Result<&'static Setup> {
        let cell = SETUPS.get(fork::generation() as usize).ok_or_else(|| {
            Error::ApiMisuse("too many nested forks; exec a fresh process instead".into())
        })?;
        Ok(cell.get_or_init(|| Setup {
            ports: Ports::read(),
            hostname: Hostname::new(&hostname()),
            acceptors: Mutex::default(),
        }))
    }

    pub(crate) fn ports(&self) -> &Ports {
        &self.ports
    }

    pub(crate) fn hostname(&self) -> Hostname {
        self.hostname
    }

    /// The acceptor of listener `id` in this process, made by `make` when it is first asked for.
    pub(crate) fn acceptor(
        &self,
        id: u64,
        make: impl FnOnce() -> Result<Arc<Acceptor>>,
    ) -> Result<Arc<Acceptor>> {
        let mut acceptors = lock(&self.acceptors);
        match acceptors.get(&id) {
            Some(Some(acceptor)) => Ok(Arc::clone(acceptor)),
            Some(None) => Err(Error::Closed),
            None => {
                let made = make()?;
                acceptors.insert(id, Some(Arc::clone(&made)));
                Ok(made)
            }
        }
    }

    /// Marks listener `id` closed in this process; returns what accepted for it.
    pub(crate) fn close_acceptor(&self, id: u64) -> Option<Arc<Acceptor>> {
        lock(&self.acceptors).insert(id, None).flatten()
    }

    /// Forgets listener `id`, which nobody can ask for any more.
    pub(crate) fn forget_acceptor(&self, id: u64) {
        let gone = lock(&self.acceptors).remove(&id);
        drop(gone);
    }

    /// This process connects to its own port: its listeners there begin to accept by themselves,
    /// unless a child may be meant, from which they would take the connection.
    pub(crate) fn connects_to_itself(&self, port: u16) {
        let own: Vec<_> = lock(&self.acceptors)
            .values()
            .flatten()
            .filter(|acceptor| acceptor.port() == port && !acceptor.has_heirs())
            .cloned()
            .collect();
        for acceptor in own {
            acceptor.begin_for_itself();
        }
    }
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "localhost".to_owned(), |name| name.trim().to_owned())
}

/// Ports drawn before a reserved one is taken.
const DRAWS: usize = 8;

/// The ports that connections may come from.
pub(crate) struct Ports {
    low: u16,
    /// How many, at least 1.
    count: u32,
    /// Ranges in it that the administrator keeps for others, both ends included.
    reserved: Vec<(u16, u16)>,
}

impl Ports {
    fn read() -> Self {
        let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
        let reserved = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports");
        Self::parse(&range.unwrap_or_default(), &reserved.unwrap_or_default())
    }

    fn parse(range: &str, reserved: &str) -> Self {
        let mut ends = range.split_whitespace().map(|end| end.parse::<u16>().ok());
        // Linux's own default, where the file cannot be read.
        let (low, high) = match (ends.next().flatten(), ends.next().flatten()) {
            (Some(low), Some(high)) if 0 < low && low <= high => (low, high),
            _ => (32768, 60999),
        };
        let reserved = reserved
            .split(|separator: char| separator == ',' || separator.is_whitespace())
            .filter_map(|range| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                Some((first.parse().ok()?, last.parse().ok()?))
            })
            .collect();
        Self { low, count: u32::from(high - low) + 1, reserved }
    }

    /// A port of the range, each as likely as any other.
    pub(crate) fn random(&self) -> Result<u16> {
        let mut random = file::random_u128()?;
        let mut port = self.low;
        // Where nearly all is reserved, one that is reserved.
        for _ in 0..DRAWS {
            // The remainder favours some ports by one part in 2^64.
            let at = random % u128::from(self.count);
            random = random.rotate_right(16);
            port = self.low + u16::try_from(at).unwrap_or(0);
            if !self.reserved.iter().any(|&(first, last)| (first..=last).contains(&port)) {
                break;
            }
        }
        Ok(port)
    }
}

/// The regions a set-up may use, fastest wake-up first.
pub(crate) struct Regions {
    pub(crate) attachments: Vec<Arc<Attachment>>,
    disabled: bool,
    problems: Vec<Problem>,
}

impl Regions {
    /// Whether [`Regions::open`] has nothing to wait for.
    pub(crate) fn are_at_hand(lease: &Lease, device: Option<&str>) -> bool {
        let devices = lease.runtime().devices();
        devices.selected(device).is_ok_and(|selection| devices.are_at_hand(&selection))
    }

    /// Those that `device` names, or else those that are found; attached.
    pub(crate) fn open(lease: &Lease, device: Option<&str>) -> Result<Self> {
        let devices = lease.runtime().devices();
        let selection = devices.selected(device)?;
        if selection.disabled {
            return Ok(Self { attachments: Vec::new(), disabled: true, problems: Vec::new() });
        }
        let (attachments, problems) = devices.attached(&selection)?;
        Ok(Self { attachments, disabled: false, problems })
    }

    /// Why there is none; only to be asked when there is none.
    pub(crate) fn fallback(&self) -> Fallback {
        if self.disabled {
            let sentence = "shared memory is switched off (device \"none\")";
            return Fallback::new(Reason::Disabled, Side::Local, sentence);
        }
        let named = |reason: &Reason| self.problems.iter().any(|p| p.reason == *reason);
        let reason = [Reason::LocalUnsafe, Reason::RegionUncached].into_iter().find(named);
        let reason = reason.unwrap_or(Reason::NoDevice);
        let sentence = if self.problems.is_empty() {
            "there is no device".to_owned()
        } else {
            let problems: Vec<_> = self.problems.iter().map(|p| p.error.to_string()).collect();
            problems.join("; ")
        };
        Fallback::new(reason, Side::Local, sentence)
    }

    /// The regions looked at, and those that could not be, for a fallback's sentence.
    pub(crate) fn names(&self) -> String {
        let mut names: Vec<_> = self.attachments.iter().map(|a| a.spec().to_string()).collect();
        names.extend(self.problems.iter().map(|p| format!("not {}: {}", p.spec, p.error)));
        names.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_only_ports_of_the_range_that_are_not_reserved() {
        let ports = Ports::parse("40000\t41999\n", "40002,40004-40008\n");
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..20_000 {
            let port = ports.random().unwrap();
            assert!((40000..=41999).contains(&port) && port != 40002);
            assert!(!(40004..=40008).contains(&port));
            seen.insert(port);
        }
        // Each of 1,994 is missed with a probability of e^-10.
        assert!(seen.len() > 1900, "{}", seen.len());
    }

    #[test]
    fn a_range_that_makes_no_sense_is_linuxs_default() {
        for range in ["", "7", "9 8", "0 5", "a b"] {
            let ports = Ports::parse(range, "");
            assert_eq!((ports.low, ports.count), (32768, 28232));
        }
    }

    #[test]
    fn a_range_reserved_as_a_whole_still_gives_a_port() {
        assert_eq!(Ports::parse("5 5", "1-10").random().unwrap(), 5);
    }
}
