//! Listeners: what is known of one in every process that has it.
//!
//! A [`Listener`] outlives `fork`: its socket is the same in parent and children. What accepts for
//! it ([`Acceptor`]: entries in the directory, connections in hand) belongs to one process; a
//! child makes its own when it first accepts.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use ivsmc_proto::directory::Bound;
use ivsmc_proto::host::Ip;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::{fork, net};

use crate::connect::Require;
use crate::handshake;
use crate::host::{Host, Timeout};
use crate::reactor::lock;
use crate::session::Session;
use crate::setup::Setup;
use crate::{Error, Result};

pub(crate) use crate::acceptor::Acceptor;
pub use crate::acceptor::ListenerStats;

/// How to listen.
#[derive(Clone, Debug)]
pub struct ListenOptions {
    /// Connections that may be in hand without being asked for, at least 1.
    pub backlog: u32,
    /// Other processes accept on the same port or descriptor: at most one connection is in hand.
    pub shared: bool,
    /// Device specs, comma list; else `IVSMC_DEVICE`, else what is found.
    pub device: Option<String>,
    /// Whether sessions may go over TCP.
    pub require: Require,
    /// Size of the receive ring in bytes, rounded up to 16 KiB..1 MiB; 256 KiB by default.
    pub buffer: Option<u32>,
    /// EIDs, comma list; else `IVSMC_EID`, else the default one.
    pub eid: Option<String>,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            backlog: 128,
            shared: false,
            device: None,
            require: Require::Any,
            buffer: None,
            eid: None,
        }
    }
}

/// What an acceptor needs to know of its listener.
#[derive(Clone)]
pub(crate) struct Listening {
    pub(crate) local: SocketAddr,
    pub(crate) bound: Bound,
    /// Connections that may be in hand, where no other process accepts from the socket.
    pub(crate) limit: usize,
    /// Others may.
    pub(crate) shared: bool,
    pub(crate) options: Arc<ListenOptions>,
}

/// A listening socket whose connections become [`Session`]s.
///
/// It is in the directory of every region this process has, so that clients know that it speaks
/// ivsmc. Plain TCP clients are served as well. Dropping it closes it.
pub struct Listener {
    id: u64,
    /// Fork generation of birth.
    born: u32,
    listening: Listening,
    /// `None` once closed. Locked rarely, and by forked children never for ever: see
    /// [`Listener::with_socket`].
    socket: Mutex<Option<Arc<OwnedFd>>>,
    /// What accepts in the process that made this, and only locked there; `None` once closed.
    first: Mutex<Option<Arc<Acceptor>>>,
}

/// How long a forked child tries for a lock that a thread of its parent may have held.
const CHILD_PATIENCE: Duration = Duration::from_secs(1);

impl Listener {
    /// Makes the listening socket `fd` a listener, and registers it.
    ///
    /// The socket becomes non-blocking, for all descriptors of it.
    ///
    /// # Errors
    /// `Os` if it is no listening internet socket; `Device` if `options.device` names one that
    /// cannot be used; `Required` if shared memory is required and there is no device.
    pub fn adopt(fd: Fd, options: ListenOptions) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        handshake::own_eids(options.eid.as_deref())?;
        let local = net::local_addr(&fd)?;
        if net::get_option_int(&fd, net::SOL_SOCKET, net::SO_ACCEPTCONN)? == 0 {
            return Err(Error::ApiMisuse(format!("the socket bound to {local} does not listen")));
        }
        let bound = bound_of(&fd, local)?;
        net::set_nonblocking(&fd, true)?;
        let (limit, shared) = (options.backlog.max(1) as usize, options.shared);
        let listening = Listening { local, bound, limit, shared, options: Arc::new(options) };
        // Children inherit it.
        let socket = Arc::new(fd.into_owned()?);
        // Relaxed: only the number matters.
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let first = Setup::current()?
            .acceptor(id, || Acceptor::start(Arc::clone(&socket), listening.clone()))?;
        Ok(Self {
            id,
            born: fork::generation(),
            listening,
            socket: Mutex::new(Some(socket)),
            first: Mutex::new(Some(first)),
        })
    }

    /// Waits for the next connection; returns it with the client's address.
    ///
    /// # Errors
    /// `WouldBlock` or `TimedOut` if none came in time; `Closed`, also when it is closed
    /// meanwhile; `Required` for a client without shared memory, if that is required.
    pub fn accept(&self, timeout: Timeout, host: &impl Host) -> Result<(Session, SocketAddr)> {
        let acceptor = if fork::is_current(self.born) {
            self.acceptor()?
        } else {
            // The first time in a child it opens devices.
            host.blocking(|| self.acceptor())?
        };
        acceptor.accept(timeout, host)
    }

    /// A descriptor that is readable when [`Listener::accept`] has something to do.
    ///
    /// From now on this process accepts in the background, too. Readable means that there is a
    /// connection, not that its handshake is done: accept without waiting, and on `WouldBlock`
    /// wait again.
    ///
    /// # Errors
    /// `Closed`, or what the operating system says.
    pub fn readiness(&self) -> Result<Arc<dyn AsFd + Send + Sync>> {
        let readiness = self.acceptor()?.readiness()?;
        Ok(readiness)
    }

    /// The number of [`Listener::readiness`], which stays open until the listener is closed.
    ///
    /// # Errors
    /// As there.
    pub fn fileno(&self) -> Result<RawFd> {
        Ok(self.acceptor()?.readiness()?.as_fd().as_raw_fd())
    }

    /// The address it listens on.
    pub fn local_addr(&self) -> SocketAddr {
        self.listening.local
    }

    /// The listening socket itself, for its options.
    ///
    /// # Errors
    /// `Closed`.
    pub fn socket(&self) -> Result<Arc<OwnedFd>> {
        self.with_socket(|socket| socket.clone())
    }

    /// Counters of this process.
    ///
    /// # Errors
    /// `Closed`.
    pub fn stats(&self) -> Result<ListenerStats> {
        Ok(self.acceptor()?.stats())
    }

    /// Stops listening in this process: takes it out of the directory, closes what is in hand, and
    /// makes threads inside [`Listener::accept`] return `Closed`.
    pub fn close(&self) {
        let socket = self.with_socket(Option::take).ok();
        if let Ok(setup) = Setup::current() {
            if let Some(acceptor) = setup.close_acceptor(self.id) {
                acceptor.close();
            }
        }
        if fork::is_current(self.born) {
            // Nothing of it stays with a closed listener that somebody keeps.
            let first = lock(&self.first).take();
            drop(first);
        }
        drop(socket);
    }

    /// Whether [`Listener::close`] was called in this process.
    pub fn is_closed(&self) -> bool {
        self.socket().is_err()
    }

    /// What accepts in this process.
    fn acceptor(&self) -> Result<Arc<Acceptor>> {
        if fork::is_current(self.born) {
            return lock(&self.first).clone().ok_or(Error::Closed);
        }
        Setup::current()?.acceptor(self.id, || {
            // Parent and child both accept.
            let listening = Listening { shared: true, ..self.listening.clone() };
            Acceptor::start(self.socket()?, listening)
        })
    }

    /// Runs `f` on the socket.
    ///
    /// A thread of the parent may have held the lock when this process was forked; then nobody
    /// gives it back here. It is held for moments, by a thread that closes or makes an acceptor, so
    /// after a while of trying the listener counts as closed.
    fn with_socket<T>(&self, f: impl FnOnce(&mut Option<Arc<OwnedFd>>) -> Option<T>) -> Result<T> {
        if fork::is_current(self.born) {
            return f(&mut lock(&self.socket)).ok_or(Error::Closed);
        }
        let end = Instant::now() + CHILD_PATIENCE;
        loop {
            match self.socket.try_lock() {
                Ok(mut socket) => return f(&mut socket).ok_or(Error::Closed),
                Err(TryLockError::Poisoned(poisoned)) => {
                    return f(&mut poisoned.into_inner()).ok_or(Error::Closed);
                }
                Err(TryLockError::WouldBlock) if Instant::now() < end => std::thread::yield_now(),
                Err(TryLockError::WouldBlock) => return Err(Error::Closed),
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
        if let Ok(setup) = Setup::current() {
            setup.forget_acceptor(self.id);
        }
        if !fork::is_current(self.born) {
            // Its parent may have been changing it when it forked: not even to be freed here.
            std::mem::forget(std::mem::take(&mut self.first));
        }
    }
}

fn bound_of(fd: &Fd, local: SocketAddr) -> Result<Bound> {
    Ok(match local.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Bound::Any4,
        IpAddr::V6(ip) if ip.is_unspecified() => {
            if net::get_option_int(fd, net::IPPROTO_IPV6, net::IPV6_V6ONLY)? != 0 {
                Bound::Any6
            } else {
                Bound::AnyDual
            }
        }
        ip => Bound::One(Ip::from(ip)),
    })
}
