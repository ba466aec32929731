//! How an ivshmem server starts: for the first time, or where one before it was broken off.
//!
//! What a first start keeps comes in an order in which a kill leaves either nothing that was handed
//! out, or all that a successor needs: region, ledger, the ledger's word that both are kept, listener.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use ivsmc_shm::fd::Fd;
use ivsmc_shm::poll::EventFd;

use super::client::EventFds;
use super::holder::{Holder, Name};
use super::ledger::{Entry, Head, Ledger};
use super::memory::{Backing, Memory};
use super::{Event, ServerOptions};
use crate::device::Kind;
use crate::socket::Socket;
use crate::{Error, Result};

/// All that an ivshmem server starts with.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) socket: Socket,
    pub(super) memory: Memory,
    pub(super) ledger: Ledger,
    pub(super) holder: Option<Holder>,
    /// Of ids that were given out before; some of an id's may be missing.
    pub(super) eventfds: BTreeMap<(u16, u16), EventFd>,
    /// Who was there before.
    pub(super) clients: Vec<(Entry, Fd)>,
    /// Ids of clients whose connections were not kept.
    pub(super) lost: BTreeSet<u16>,
    /// Who had come, but had not been taken in, by serial.
    pub(super) newcomers: Vec<(u64, Fd)>,
    /// The greatest serial that is noted or kept, those of lost clients included; 0 if there is none.
    pub(super) last_serial: u64,
    /// One before it was broken off.
    pub(super) is_resumed: bool,
    pub(super) events: Vec<Event>,
}

impl Start {
    /// As the options are; or, if the holder has what one before left, as that was. Then
    /// `options` are changed to what holds.
    pub(super) fn new(options: &mut ServerOptions, mut holder: Option<Holder>) -> Result<Self> {
        let mut held = holder.as_mut().map(Holder::held).unwrap_or_default();
        let names: Vec<Name> = held.keys().copied().collect();
        let ledger = match held.remove(&Name::Ledger) {
            Some(fd) => Some(Ledger::open(fd).map_err(|reason| refusal(&options.path, reason))?),
            None => None,
        };
        match (ledger.filter(Ledger::is_ready), held.remove(&Name::Memory)) {
            (Some(ledger), Some(memory)) => Self::again(options, holder, ledger, memory, held),
            _ => {
                // Nothing of it was handed out, or it cannot be used.
                drop(held);
                for name in names {
                    holder.as_mut().map_or(Ok(()), |holder| holder.drop(name))?;
                }
                Self::first(options, holder)
            }
        }
    }

    fn first(options: &ServerOptions, mut holder: Option<Holder>) -> Result<Self> {
        // The socket first: of the two it is the one that is often refused, and leaves nothing.
        let socket = Socket::bind(Kind::Host, &options.path, options.mode, options.group)?;
        let memory = Memory::new(&options.backing)?;
        let head = Head {
            vectors: options.vectors,
            first_id: memory.first_id(),
            instance: memory.instance(),
        };
        let path = std::path::absolute(socket.path())?;
        let ledger = Ledger::new(head, path.as_os_str().as_bytes())?;
        ledger.set_socket(socket.identity());
        if let Some(holder) = &mut holder {
            holder.keep(Name::Memory, memory.own())?;
            holder.keep(Name::Ledger, ledger.fd())?;
            ledger.set_ready();
            holder.keep(Name::Listener, socket.as_fd())?;
        }
        Ok(Self {
            socket,
            memory,
            ledger,
            holder,
            eventfds: BTreeMap::new(),
            clients: Vec::new(),
            lost: BTreeSet::new(),
            newcomers: Vec::new(),
            last_serial: 0,
            is_resumed: false,
            events: Vec::new(),
        })
    }

    fn again(
        options: &mut ServerOptions,
        mut holder: Option<Holder>,
        ledger: Ledger,
        memory: Fd,
        mut held: BTreeMap<Name, Fd>,
    ) -> Result<Self> {
        let Head { vectors, first_id, instance } = ledger.head();
        let memory = Memory::resume(memory, first_id, instance)?;
        let path = PathBuf::from(OsString::from_vec(ledger.path()));
        let mut events = differences(options, vectors, &memory, &path);
        let listener = held.remove(&Name::Listener);
        let was_kept = listener.is_some();
        let socket = listener.and_then(|fd| Socket::resume(fd, &path, ledger.socket()));
        let socket = match socket {
            Some(socket) => {
                socket.set_access(options.mode, options.group)?;
                socket
            }
            None => {
                // It was not kept yet, or somebody has taken its name away.
                let socket = Socket::bind(Kind::Host, &path, options.mode, options.group)?;
                if let (Some(holder), true) = (&mut holder, was_kept) {
                    holder.drop(Name::Listener)?;
                }
                // Now that the old listener is nobody's: with it the new name leads nowhere.
                ledger.set_socket(socket.identity());
                if let Some(holder) = &mut holder {
                    holder.keep(Name::Listener, socket.as_fd())?;
                }
                socket
            }
        };
        let mut connections = BTreeMap::new();
        let mut eventfds = BTreeMap::new();
        for (name, fd) in held {
            match name {
                Name::Client { serial } => drop(connections.insert(serial, fd)),
                Name::Vector { id, vector } => {
                    eventfds.insert((id, vector), EventFd::adopt(fd)?);
                }
                Name::Memory | Name::Ledger | Name::Listener => {}
            }
        }
        let mut last_serial = connections.keys().copied().max().unwrap_or(0);
        let (mut clients, mut lost) = (Vec::new(), BTreeSet::new());
        for entry in ledger.entries() {
            last_serial = last_serial.max(entry.serial);
            match connections.remove(&entry.serial) {
                Some(connection) => clients.push((entry, connection)),
                None => {
                    lost.insert(entry.id);
                    events.push(Event::Lost { id: entry.id });
                }
            }
        }
        events.insert(0, Event::Resumed { clients: clients.len() });
        let newcomers = connections.into_iter().collect();
        Ok(Self {
            socket,
            memory,
            ledger,
            holder,
            eventfds,
            clients,
            lost,
            newcomers,
            last_serial,
            is_resumed: true,
            events,
        })
    }

    /// The eventfds of all ids that have any, `vectors` each. Those that were not kept are new: who
    /// has the old ones notifies nobody, and wakes over TCP.
    pub(super) fn complete_eventfds(&mut self, vectors: u16) -> Result<EventFds> {
        let mut all = std::mem::take(&mut self.eventfds);
        let ids: BTreeSet<u16> = all.keys().map(|&(id, _)| id).collect();
        let ids = ids.into_iter().chain(self.clients.iter().map(|(entry, _)| entry.id));
        let mut complete = EventFds::new();
        for id in ids {
            if complete.contains_key(&id) {
                continue;
            }
            let mut of_id = Vec::new();
            for vector in 0..vectors {
                let kept = all.remove(&(id, vector));
                of_id.push(match kept {
                    Some(eventfd) => eventfd,
                    None => {
                        let eventfd = EventFd::new()?;
                        if let Some(holder) = &mut self.holder {
                            holder.keep(Name::Vector { id, vector }, &eventfd)?;
                        }
                        eventfd
                    }
                });
            }
            complete.insert(id, of_id);
        }
        Ok(complete)
    }
}

/// Makes `options` what holds, and says what they were not.
fn differences(
    options: &mut ServerOptions,
    vectors: u16,
    memory: &Memory,
    path: &Path,
) -> Vec<Event> {
    let mut events = Vec::new();
    let mut note = |what: String| events.push(Event::Unlike { what });
    if options.vectors != vectors {
        note(format!("vectors={} is not taken: each peer has {vectors}", options.vectors));
        options.vectors = vectors;
    }
    if std::path::absolute(&options.path).is_ok_and(|wanted| wanted != path) {
        let wanted = options.path.display();
        note(format!("the path {wanted} is not taken: it listens on {}", path.display()));
    }
    options.path = path.to_owned();
    let size = memory.region().geometry().size();
    let is = match memory.path() {
        Some(path) => Backing::File { path, size: Some(size) },
        None => Backing::Memfd { size },
    };
    let is_alike = match (&options.backing, &is) {
        (Backing::Memfd { size: wanted }, Backing::Memfd { .. }) => *wanted == size,
        (Backing::File { path, size: wanted }, Backing::File { path: there, .. }) => {
            wanted.is_none_or(|wanted| wanted == size)
                && std::fs::canonicalize(path).is_ok_and(|path| path == *there)
        }
        _ => false,
    };
    if !is_alike {
        let file = memory.path().map_or("memory".into(), |path| path.display().to_string());
        note(format!("another region is not taken: it is {size} bytes of {file}"));
    }
    options.backing = is;
    events
}

fn refusal(path: &Path, reason: String) -> Error {
    Error::device(format!("{}:{}", Kind::Host, path.display()), reason)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;
    use std::time::Duration;

    use super::*;

    /// A holder that does not answer, and what it was told so far.
    fn deaf() -> (Holder, UnixDatagram) {
        let (near, far) = UnixDatagram::pair().unwrap();
        (Holder::over(Fd::from(OwnedFd::from(near)), Duration::ZERO), far)
    }

    #[test]
    fn a_new_name_is_noted_only_when_the_old_listener_is_kept_no_longer() {
        let path = Path::new("/dev/shm").join(format!("ivs-named-{}", std::process::id()));
        let mut options = ServerOptions {
            backing: Backing::Memfd { size: 1 << 20 },
            ..ServerOptions::new(path.clone())
        };
        let (holder, _far) = deaf();
        let first = Start::new(&mut options, Some(holder)).unwrap();
        first.socket.set_left(true);
        first.memory.set_left(true);
        let named = first.ledger.socket();
        let again = |fd: std::os::fd::BorrowedFd<'_>| Fd::from(fd.try_clone_to_owned().unwrap());
        // Somebody takes its name away, and it is broken off where it has the old listener dropped.
        std::fs::remove_file(&path).unwrap();
        let (full, _far) = deaf();
        while full.ready().is_ok() {}
        let full = full.holding([
            ("ivsmc-memory", again(first.memory.own())),
            ("ivsmc-ledger", again(first.ledger.fd())),
            ("ivsmc-listener", again(first.socket.as_fd())),
        ]);
        let error = Start::new(&mut options, Some(full)).unwrap_err();
        assert!(error.to_string().contains("does not take them"), "{error}");
        assert_eq!(first.ledger.socket(), named);
    }
}
