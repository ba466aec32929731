//! A device made of a file, and an agent over it.
//!
//! ```text
//!   0 ................. 16 MiB ........ + 4 KiB
//!   the region, whose tables and extents end before, then the registers
//! ```
//!
//! The registers are in the part of the region that nothing is in, so that the file as it is can also be
//! attached to as `file:`. A thread does what the hardware does when the doorbell is stored to.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use ivsmc_proto::agent::Part;
use ivsmc_proto::layout::Geometry;
use ivsmc_proto::memory::Memory;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::poll::EventFd;

use super::super::device::OwnedDevice;
use super::super::{Agent, AgentHandle, AgentOptions, Event};
use crate::device::tests::Scratch;
use crate::device::Kind;
use crate::host::Plain;
use crate::reactor::lock;
use crate::socket::Socket;
use crate::Result;

/// Where the registers are.
const REGISTERS: u64 = 16 << 20;
/// Bytes of the file, and of the region.
pub(crate) const SIZE: u64 = REGISTERS + 4096;
/// The word of IVPosition and doorbell, lower half first.
const WORD: u64 = 8;
/// In the doorbell: nothing was stored.
const IDLE: u64 = 0xffff_ffff << 32;
/// The device's id: that of processes that reach the region without a device, so that all are at home at
/// one place and find each other there.
pub(crate) const IVPOSITION: u16 = 0;
/// A hang is a failure: long enough for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the vectors are wired to.
type Wires = Arc<Mutex<Vec<Option<EventFd>>>>;

pub(crate) struct StandIn {
    file: Fd,
    wires: Wires,
    /// Doorbells stored, as far as the hardware saw them apart.
    doorbells: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    hardware: Option<JoinHandle<()>>,
}

impl StandIn {
    /// The device in the file at `path`, made if it is not there; and its memory.
    pub(crate) fn new(path: &Path, vectors: usize) -> (Self, Mapping) {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.unwrap();
        file.set_len(SIZE).unwrap();
        let extents = Geometry::of(SIZE).unwrap();
        let (_, data) = extents.extent_ranges(extents.extents() - 1);
        assert!(data.end <= REGISTERS, "the registers are in an extent");
        let file = Fd::from(OwnedFd::from(file));
        ivsmc_shm::file::allocate(&file, 0..SIZE).unwrap();
        let registers = Mapping::map_at(file.try_clone().unwrap(), REGISTERS, 4096).unwrap();
        registers.store(WORD, IDLE | u64::from(IVPOSITION), Ordering::Release);
        let mapping = Mapping::map_at(file.try_clone().unwrap(), 0, SIZE).unwrap();
        let wires = Wires::new(Mutex::new((0..vectors).map(|_| None).collect()));
        let (over, doorbells) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let hardware = std::thread::spawn({
            let (wires, doorbells, over) = (wires.clone(), doorbells.clone(), over.clone());
            move || {
                while !over.load(Ordering::Relaxed) {
                    let stored = registers.swap(WORD, IDLE | u64::from(IVPOSITION)) & IDLE;
                    if stored == IDLE {
                        std::thread::sleep(Duration::from_micros(20));
                        continue;
                    }
                    doorbells.fetch_add(1, Ordering::Relaxed);
                    ring(&wires, stored >> 48, stored >> 32 & 0xffff);
                }
            }
        });
        (Self { file, wires, doorbells, over, hardware: Some(hardware) }, mapping)
    }

    pub(crate) fn doorbells(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.doorbells)
    }

    pub(crate) fn wires(&self) -> impl Fn(u16) + use<> {
        let wires = Arc::clone(&self.wires);
        move |vector| ring(&wires, IVPOSITION.into(), vector.into())
    }
}

/// Notifies the vector, if it is one of this device's.
fn ring(wires: &Wires, ivposition: u64, vector: u64) {
    let vector = usize::try_from(vector).unwrap();
    if ivposition == u64::from(IVPOSITION) {
        if let Some(Some(eventfd)) = lock(wires).get(vector) {
            eventfd.notify().unwrap();
        }
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(hardware) = self.hardware.take() {
            hardware.join().unwrap();
        }
    }
}

impl OwnedDevice for StandIn {
    fn ivposition(&self) -> u16 {
        IVPOSITION
    }

    fn vectors(&self) -> u16 {
        u16::try_from(lock(&self.wires).len()).unwrap()
    }

    fn wire(&self, vector: u16, eventfd: &EventFd) -> io::Result<()> {
        let fd = eventfd.as_fd().try_clone_to_owned()?;
        lock(&self.wires)[usize::from(vector)] = Some(EventFd::adopt(fd.into())?);
        Ok(())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn memory(&self) -> Part {
        Part { offset: 0, size: SIZE }
    }

    fn registers(&self) -> Part {
        Part { offset: REGISTERS, size: 256 }
    }

    fn can_map_registers(&self) -> bool {
        true
    }
}

/// An agent over a device in a file, that serves on a thread.
pub(crate) struct Served {
    pub(crate) agent: Arc<Agent>,
    /// What a peer on another machine does: notifies a vector of the device.
    pub(crate) notify: Box<dyn Fn(u16)>,
    pub(crate) doorbells: Arc<AtomicU64>,
    handle: AgentHandle,
    events: mpsc::Receiver<Event>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Served {
    /// At `agent.sock` in the directory, over `region` there.
    pub(crate) fn start(scratch: &Scratch, vectors: usize) -> Self {
        Self::with(options(scratch.path()), &scratch.path().join("region"), vectors, PATIENCE)
    }

    pub(crate) fn with(
        options: AgentOptions,
        region: &Path,
        vectors: usize,
        patience: Duration,
    ) -> Self {
        let socket = Socket::bind(Kind::Agent, &options.path, options.mode, options.group).unwrap();
        let (device, mapping) = StandIn::new(region, vectors);
        let (notify, doorbells) = (Box::new(device.wires()), device.doorbells());
        let name = "stand-in".to_owned();
        // As the group of a VFIO device says it: whoever had it before is gone.
        let mut agent =
            Agent::over(options, socket, name, Box::new(device), mapping, true).unwrap();
        agent.patience = patience;
        let agent = Arc::new(agent);
        let (send, events) = mpsc::channel();
        let handle = agent.handle();
        let thread = std::thread::spawn({
            let agent = Arc::clone(&agent);
            move || {
                agent.serve(&Plain, |event| {
                    let _ = send.send(event);
                })
            }
        });
        Self { agent, notify, doorbells, handle, events, thread: Some(thread) }
    }

    pub(crate) fn event(&self) -> Event {
        self.events.recv_timeout(PATIENCE).unwrap()
    }
}

pub(crate) fn options(directory: &Path) -> AgentOptions {
    AgentOptions::new(socket(directory))
}

pub(crate) fn socket(directory: &Path) -> PathBuf {
    directory.join("agent.sock")
}

impl Drop for Served {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}
