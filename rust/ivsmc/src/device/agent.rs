//! `agent:/run/ivsmc/agent.sock`: the ivshmem device of a guest, shared by several of its processes.
//!
//! A process called agent owns the device (`crate::agent`). It hands this one the device's descriptor, a
//! peer slot, and the eventfd of a vector; from then on nothing goes through it, but notifications on a
//! vector that processes have to share, and of departures.
//!
//! The connection stays open as long as the attachment lives: its end is what tells the agent that this
//! process has ended, and must never come earlier. When the agent ends, the attachment goes on: the slot
//! stays this process's own until it leaves or the group is opened anew, which cannot be before.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ivsmc_proto::agent::{self, AgentMessage, ClientProtocol, Welcome};
use ivsmc_proto::memory::Memory;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::mmio::Registers;
use ivsmc_shm::net::{self, Passed};
use ivsmc_shm::poll::{self, EventFd, PollFd};

use super::function::{self, DoorbellRegisters};
use super::host::{connect, no_room};
use super::{Backing, Doorbells, Opened, Unusable};

/// Longest wait for the agent's answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Asks the agent at `path` for its device.
pub(super) fn open(path: &Path) -> Result<Opened, Unusable> {
    open_within(path, PATIENCE)
}

/// [`open`] with another patience.
pub(super) fn open_within(path: &Path, patience: Duration) -> Result<Opened, Unusable> {
    let until = Instant::now() + patience;
    let socket = connect(path, until).map_err(|error| Unusable::device(refusal(&error)))?;
    over(socket, until)
}

/// Asks the agent at the other end of `socket`.
pub(super) fn over(socket: Fd, until: Instant) -> Result<Opened, Unusable> {
    let Given { welcome, device, doorbell, departures } = ask(&socket, until)?;
    let clone = |device: &Fd| device.try_clone().map_err(|error| no_descriptor(&error));
    function::judge_size(welcome.memory.size)?;
    let registers = DoorbellRegisters::new(map_registers(clone(&device)?, &welcome)?)?;
    if registers.ivposition() != welcome.ivposition {
        return Err(Unusable::device(format!(
            "its id reads {}, and the agent says {}; start the agent anew",
            registers.ivposition(),
            welcome.ivposition
        )));
    }
    let mapping = Mapping::map_at(device, welcome.memory.offset, welcome.memory.size)
        .map_err(|error| Unusable::device(format!("its memory cannot be mapped: {error}")))?;
    let client = AgentClient { registers, doorbell, departures, welcome, _socket: socket };
    // As with a device of this process's own: nothing to reserve, and no locks.
    Ok(Opened {
        mapping: Arc::new(mapping),
        whole: true,
        lockable: false,
        backing: Backing::Agent(Arc::new(client)),
    })
}

fn refusal(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "there is no such socket; is the agent running (\"ivsmc agent\")?".to_owned()
        }
        io::ErrorKind::ConnectionRefused => "nobody listens at this path: the agent has ended, or \
             it is not a socket; start \"ivsmc agent\" when the processes have ended that the last \
             one served, or remove the socket to use the device without"
            .to_owned(),
        io::ErrorKind::PermissionDenied => "this process has no permission to connect to this \
             socket; \"ivsmc agent\" gives it with --group and --mode"
            .to_owned(),
        io::ErrorKind::WouldBlock => "the agent accepts nobody; is it stopped?".to_owned(),
        _ => format!("cannot connect to this socket: {error}"),
    }
}

fn no_descriptor(error: &io::Error) -> Unusable {
    Unusable::device(format!("no more descriptors: {error}"))
}

/// What an agent gives.
struct Given {
    welcome: Welcome,
    device: Fd,
    doorbell: EventFd,
    departures: Option<EventFd>,
}

/// Says hello, and hears the answer.
fn ask(socket: &Fd, until: Instant) -> Result<Given, Unusable> {
    match net::send_with_fd(socket, &agent::hello(), None) {
        Ok(agent::HEADER_LENGTH) => {}
        // It has ended the connection, perhaps after it had said why.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        // A new connection's buffer has room.
        _ => return Err(ended()),
    }
    let mut hearing = Hearing::default();
    let (mut welcome, mut doorbell, mut departures) = (None, None, None);
    while hearing.protocol.wants() > 0 {
        let (message, fd) = hearing.next(socket, until)?;
        let eventfd = |fd: Option<Fd>| fd.map(EventFd::adopt).transpose();
        match message {
            AgentMessage::Welcome(said) => welcome = fd.map(|device| (said, device)),
            AgentMessage::Doorbell => doorbell = eventfd(fd).map_err(|e| no_descriptor(&e))?,
            AgentMessage::Departures => departures = eventfd(fd).map_err(|e| no_descriptor(&e))?,
            AgentMessage::Refusal(text) => {
                return Err(Unusable::device(format!("the agent refuses: {text}")))
            }
        }
    }
    match (welcome, doorbell) {
        (Some((welcome, device)), Some(doorbell)) => {
            Ok(Given { welcome, device, doorbell, departures })
        }
        // The protocol does not end before both have come.
        _ => Err(ended()),
    }
}

fn ended() -> Unusable {
    Unusable::device("no agent, or one that is ending: it ended the connection without an answer")
}

/// What an agent has said so far.
#[derive(Default)]
struct Hearing {
    protocol: ClientProtocol,
    /// The beginning of a piece, and the descriptor of the message.
    piece: Vec<u8>,
    descriptor: Option<Fd>,
}

impl Hearing {
    /// Waits for the next message, and the descriptor that came with it.
    fn next(
        &mut self,
        socket: &Fd,
        until: Instant,
    ) -> Result<(AgentMessage, Option<Fd>), Unusable> {
        let stranger = |error: &dyn std::fmt::Display| {
            Unusable::device(format!("not an agent, or one of another version: {error}"))
        };
        loop {
            let had = self.piece.len();
            let wants = self.protocol.wants();
            self.piece.resize(wants, 0);
            let received = net::recv_with_fd(socket, &mut self.piece[had..], net::MSG_DONTWAIT);
            let (got, fd) = match received {
                Ok((0, _)) => return Err(ended()),
                Ok((_, Passed::Lost)) => return Err(no_room()),
                Ok((got, passed)) => (got, passed.one()),
                Err(error) => {
                    self.piece.truncate(had);
                    match error.kind() {
                        io::ErrorKind::InvalidData => return Err(stranger(&error)),
                        io::ErrorKind::WouldBlock => wait(socket, until)?,
                        io::ErrorKind::Interrupted => {}
                        _ => return Err(ended()),
                    }
                    continue;
                }
            };
            self.piece.truncate(had + got);
            let came = fd.is_some();
            if came && (self.descriptor.is_some() || had > 0) {
                return Err(stranger(&"a descriptor came in the middle of a message"));
            }
            self.descriptor = fd.or(self.descriptor.take());
            if self.piece.len() < wants {
                continue;
            }
            let has_fd = came || (had > 0 && self.descriptor.is_some());
            let piece = std::mem::take(&mut self.piece);
            if let Some(message) =
                self.protocol.take(&piece, has_fd).map_err(|error| stranger(&error))?
            {
                return Ok((message, self.descriptor.take()));
            }
        }
    }
}

/// Waits until the agent says something.
fn wait(socket: &Fd, until: Instant) -> Result<(), Unusable> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(Unusable::device("the agent has not answered in time; is it stopped?"));
    }
    // An interrupted wait only means to look again.
    let _ = poll::poll(&mut [PollFd::new(socket, poll::IN)], Some(left));
    Ok(())
}

fn map_registers(device: Fd, welcome: &Welcome) -> Result<Registers, Unusable> {
    let part = welcome.registers;
    if !welcome.can_map_registers {
        return Ok(Registers::through(device, part.offset, part.size));
    }
    Registers::map(device, part.offset, part.size)
        .map_err(|error| Unusable::device(format!("its registers cannot be mapped: {error}")))
}

/// A process's part in an agent's device.
///
/// Fields in the order they go: the connection last.
pub(crate) struct AgentClient {
    registers: DoorbellRegisters,
    doorbell: EventFd,
    departures: Option<EventFd>,
    welcome: Welcome,
    _socket: Fd,
}

impl AgentClient {
    /// The slot that the agent has claimed for this process in `region`.
    pub(crate) fn slot<M: Memory>(&self, region: &Region<M>) -> Result<SlotRef, Unusable> {
        let Welcome { slot, uuid, .. } = self.welcome;
        if region.uuid() != uuid {
            return Err(Unusable::region(
                "it is not the region that the agent knows; start the agent anew",
            ));
        }
        if !region.is_live(slot) {
            return Err(Unusable::region(format!(
                "somebody has declared slot {slot} dead, which the agent has just claimed"
            )));
        }
        Ok(slot)
    }
}

impl Doorbells for AgentClient {
    fn ivposition(&self) -> u16 {
        self.welcome.ivposition
    }

    fn own(&self) -> Option<(u16, &EventFd)> {
        Some((self.welcome.vector, &self.doorbell))
    }

    fn departures(&self) -> Option<&EventFd> {
        self.departures.as_ref()
    }

    fn notify(&self, ivposition: u16, vector: u16) -> bool {
        self.registers.notify(ivposition, vector)
    }
}
