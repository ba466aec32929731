//! Attachments: one process on one device.
//!
//! An [`Attachment`] has a peer slot of the region, publishes the addresses of its host, and gives
//! out memory: [`OwnDmb`]s that peers write into, [`PeerDmb`]s of others to write into. When it is
//! dropped it leaves the region, and everything it had there is free again.
//!
//! **Proof of life.** What proves that an attachment is dead is in `ivsmc_proto::proof` and
//! `ivsmc_proto::judge`. Where the region is mapped through an open file description of its own, the
//! attachment holds the lock on the byte of its slot's claim word, from before the slot is claimed
//! until the mapping is gone, however the process ends. [`Attachment::reap`] takes the lock of a
//! dead one's slot and holds it while it gives back what the dead one had. All locks of one
//! attachment are on one open file description and do not conflict with each other, so it never
//! judges its own slot, and one thread reaps at a time.
//!
//! **Memory.** Extents are claimed from the region and their memory reserved, so that running out
//! is [`memory::Full`] and never SIGBUS; DMBs are carved from them by a list private to the process, behind
//! a private mutex. One idle extent is kept, others go back at once. A DMB that is released while
//! its writer is still there is in *limbo*: it is free once the writer has let go, or once its
//! prover has said that it is dead. The background thread looks at growing intervals.
//!
//! After `fork`, the child's copies of these values do nothing to the region.

mod doorbell;
mod memory;
mod reap;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use ivsmc_proto::clc::Eid;
use ivsmc_proto::failpoint::reached;
use ivsmc_proto::host::{Boot, HostIdentity, HostRecord, Ip};
use ivsmc_proto::judge::{self, Judge};
use ivsmc_proto::proof::Witness;
use ivsmc_proto::reclaim::Census;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotInfo, SlotRef};
use ivsmc_shm::mapping::Mapping;
use ivsmc_shm::net::Family;
use ivsmc_shm::{file as files, fork, lock as locks, net};

use crate::boot;
use crate::device::{
    self, Backing, DeviceSpec, Doorbells, Kind, MemoryType, Opened, Probe, Unusable,
};
use crate::reactor::{lock, Reactor};

use doorbell::Doorbell;
pub use doorbell::DoorbellStats;
pub(crate) use doorbell::{Armed, Ear, Notified, BACKSTOP};
use memory::Pool;
pub(crate) use memory::{OwnDmb, PeerDmb};
use reap::FileLocks;

/// One process on one device.
pub(crate) struct Attachment {
    spec: DeviceSpec,
    region: Region<Arc<Mapping>>,
    me: SlotRef,
    judge: Judge,
    /// No memory needs to be reserved.
    whole: bool,
    /// Of a guest's device, what its memory was measured to be.
    memory_type: Option<MemoryType>,
    record: Mutex<Arc<HostRecord>>,
    pool: Mutex<Pool>,
    /// Held while reaping: see the module's words about locks.
    reaping: Mutex<()>,
    backing: Backing,
    /// How this process is notified, if the device can.
    doorbell: Option<Doorbell>,
    /// The background thread, once it looks after this attachment.
    reactor: OnceLock<Weak<Reactor>>,
    generation: u32,
    /// The region was left.
    left: AtomicBool,
}

/// What an attachment has, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct AttachmentStats {
    /// Extents this process has claimed.
    pub extents: usize,
    /// DMBs that peers write into.
    pub dmbs: usize,
    /// DMBs released here whose writer has not let go yet.
    pub limbo: usize,
}

impl Attachment {
    /// Opens the device and claims a peer slot of its region.
    ///
    /// # Errors
    /// [`Unusable`]; nothing is left behind then.
    pub(crate) fn open(spec: &DeviceSpec) -> Result<Arc<Self>, Unusable> {
        Self::attach_to(spec, device::open(spec)?)
    }

    /// Attaches to what was opened.
    ///
    /// # Errors
    /// [`Unusable`]; nothing is left behind then.
    pub(crate) fn attach_to(spec: &DeviceSpec, opened: Opened) -> Result<Arc<Self>, Unusable> {
        let Opened { mapping, whole, lockable, backing } = opened;
        match claim(&mapping, lockable, &backing) {
            Ok(Claimed { region, me, judge, record, memory_type }) => {
                backing.settled(&mapping);
                let can_be_notified = backing.doorbells().and_then(Doorbells::own).is_some();
                let slots = region.geometry().slots();
                Ok(Arc::new(Self {
                    spec: spec.clone(),
                    pool: Mutex::new(Pool::new(region.geometry())),
                    region,
                    me,
                    judge,
                    whole,
                    memory_type,
                    record: Mutex::new(Arc::new(record)),
                    reaping: Mutex::default(),
                    backing,
                    doorbell: can_be_notified.then(|| Doorbell::new(slots)),
                    reactor: OnceLock::new(),
                    generation: fork::generation(),
                    left: AtomicBool::new(false),
                }))
            }
            Err(refused) => Err(backing.abandon(&mapping, refused)),
        }
    }

    pub(crate) fn spec(&self) -> &str {
        self.spec.as_str()
    }

    pub(crate) fn kind(&self) -> Kind {
        self.spec.kind()
    }

    pub(crate) fn region(&self) -> &Region<Arc<Mapping>> {
        &self.region
    }

    pub(crate) fn memory(&self) -> &Mapping {
        self.region.memory()
    }

    /// What a guest's device's memory was measured to be.
    pub(crate) fn memory_type(&self) -> Option<MemoryType> {
        self.memory_type
    }

    /// The peer slot of this process.
    pub(crate) fn me(&self) -> SlotRef {
        self.me
    }

    /// Whether it was attached in this process, and not in one that this process was forked from.
    pub(crate) fn is_current(&self) -> bool {
        fork::is_current(self.generation)
    }

    /// Whether newcomers that open the device come to the region of this attachment.
    pub(crate) fn is_up_to_date(&self) -> bool {
        match &self.backing {
            Backing::Local(file) => file.is_named(self.memory()),
            // Somebody else's file: what they do to its name is theirs to repair.
            Backing::File => true,
            Backing::Host(link) => !link.is_gone(),
            // A device that goes takes the memory with it.
            Backing::Vfio(_) | Backing::Pci(_) => true,
            // Also when the agent has ended: the next one has the same region.
            Backing::Agent(_) => true,
        }
    }

    /// The host record of this process as it was last written.
    pub(crate) fn record(&self) -> Arc<HostRecord> {
        Arc::clone(&lock(&self.record))
    }

    /// Reads the addresses of this host again and publishes them if they have changed.
    pub(crate) fn refresh_addresses(&self) {
        let Ok(addresses) = host_addresses() else { return };
        let mut record = lock(&self.record);
        if record.addresses() != addresses {
            let fresh = HostRecord::new(record.identity, &addresses);
            let fresh = fresh.on_machine(record.boot().machine);
            self.region.write_host_record(self.me, &fresh);
            *record = Arc::new(fresh);
        }
    }

    /// Has the background thread look after the limbo and what belongs to the device.
    pub(crate) fn watch(self: &Arc<Self>, reactor: &Arc<Reactor>) -> crate::Result<()> {
        // Only the first one: an attachment lives no longer than the background thread.
        let _ = self.reactor.set(Arc::downgrade(reactor));
        self.watch_departures(reactor)?;
        match &self.backing {
            Backing::Host(link) => link.watch(reactor),
            Backing::Local(_)
            | Backing::File
            | Backing::Vfio(_)
            | Backing::Agent(_)
            | Backing::Pci(_) => Ok(()),
        }
    }

    /// Whether `peer` still has its slot, asking its prover where this process can: one that turns
    /// out to be dead is reclaimed.
    pub(crate) fn is_peer_alive(&self, peer: SlotRef) -> bool {
        if peer.index != self.me.index {
            let _one = lock(&self.reaping);
            self.judge.look(&self.region, &FileLocks(self.memory()), peer.index);
        }
        self.region.is_live(peer)
    }

    /// Looks at the slots of all others and gives back what the dead ones had; returns how many
    /// those were.
    pub(crate) fn reap(&self) -> usize {
        let reaped = {
            let _one = lock(&self.reaping);
            self.judge.look_at_all(&self.region, &FileLocks(self.memory()), Some(self.me))
        };
        if reaped > 0 {
            self.sweep();
        }
        reaped
    }

    /// This boot of this machine.
    pub(crate) fn boot(&self) -> Boot {
        self.judge.witness.boot
    }

    /// What is claimed in the whole region.
    pub(crate) fn census(&self) -> Census {
        self.region.census()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Attachment {
    /// Leaves the region, once; dropping does. Afterwards nothing of it may be used any more.
    pub(crate) fn leave(&self) {
        if !self.is_current() || self.left.swap(true, Ordering::AcqRel) {
            return;
        }
        self.unwatch_doorbell();
        let mapping = Arc::clone(self.region.memory());
        let last_look = match &self.backing {
            Backing::Local(file) => file.begin_to_leave(&mapping),
            _ => false,
        };
        // With their memory; what is in use still, others reclaim without that.
        self.give_back_idle();
        self.region.mark_dead(self.me);
        self.region.reclaim(self.me);
        if self.judge.locks.is_some() {
            // Before the mapping ends, also in a child that a fork made just now.
            let _ = locks::unlock_byte(mapping.fd(), self.region.slot_claim_offset(self.me.index));
            reached("slot.unlocked");
        }
        match &self.backing {
            Backing::Local(file) => {
                if last_look {
                    self.judge.look_at_all(&self.region, &FileLocks(&mapping), None);
                    if self.region.is_deserted() {
                        file.remove_last(&mapping);
                    }
                    file.settled(&mapping);
                }
            }
            Backing::Host(link) => link.close(),
            Backing::File | Backing::Vfio(_) | Backing::Agent(_) | Backing::Pci(_) => {}
        }
    }
}

/// A region with a slot claimed in it.
struct Claimed {
    region: Region<Arc<Mapping>>,
    me: SlotRef,
    judge: Judge,
    record: HostRecord,
    memory_type: Option<MemoryType>,
}

fn claim(mapping: &Arc<Mapping>, lockable: bool, backing: &Backing) -> Result<Claimed, Unusable> {
    let os = |what: &'static str| {
        move |error: std::io::Error| Unusable::device(format!("{what} cannot be read: {error}"))
    };
    // All that can fail comes before the claim.
    let (boot, mask) = boot::here().map_err(os("the boot id of this machine"))?;
    let addresses = host_addresses().map_err(os("the addresses of this host"))?;
    let netns = netns_cookie().map_err(os("the network namespace"))?;
    let uuid = files::random_u128().map_err(os("a random number"))?;
    let probe = backing.is_guests().then(|| Probe::loads(mapping)).transpose()?;
    let region = Region::attach(Arc::clone(mapping), uuid)?;
    let memory_type = probe.map(|probe| probe.stores(mapping)).transpose()?;
    let witness = Witness {
        boot,
        ivposition: backing.guest_id(),
        is_exclusive: matches!(backing, Backing::Vfio(_)),
    };
    let is_on_own_file = lockable && !is_devices_file(backing, mapping);
    let locks = if lockable { lock_name(boot.id, is_on_own_file, backing, mapping) } else { None };
    let judge = Judge { witness, locks, is_on_own_file };
    let prover = match (backing, locks) {
        (Backing::Host(link), _) if has_marking_server(&region) => Prover::IvPosition(link.id()),
        (Backing::Vfio(device), _) => Prover::VfioExclusive(device.ivposition().into()),
        (_, Some(boot)) => Prover::Lock { boot },
        (_, None) => Prover::None,
    };
    // The dead first: their slots may be the only free ones.
    judge.look_at_all(&region, &FileLocks(mapping), None);
    let me = match backing {
        Backing::Agent(client) => client.slot(&region)?,
        _ => claim_slot(&region, prover)?,
    };
    let doorbells = backing.doorbells();
    let info = SlotInfo {
        ivposition: doorbells.map(Doorbells::ivposition),
        vector: doorbells.and_then(Doorbells::own).map(|(vector, _)| vector),
        eid: Eid::DEFAULT.0,
    };
    region.set_slot_info(me, &info);
    // Of a guest the id of its device: machines that were started from one snapshot have the same
    // boot id. Processes of a host are at home at one place, whatever id each was given.
    let ivposition = backing.guest_id().unwrap_or(0);
    let identity = HostIdentity { boot: boot.id, netns: netns ^ mask, ivposition };
    let record = HostRecord::new(identity, &addresses).on_machine(boot.machine);
    region.write_host_record(me, &record);
    Ok(Claimed { region, me, judge, record, memory_type })
}

/// What stands in the claim words of those whose locks this process can see: the boot, in 32 bits.
/// `None` if it does not know its boot and has the region as a device: other kernels have files for
/// that as well, and who obtains a lock could not tell on whose it is.
fn lock_name(
    boot: u128,
    is_on_own_file: bool,
    backing: &Backing,
    mapping: &Mapping,
) -> Option<u32> {
    if boot == 0 {
        return is_on_own_file.then_some(judge::UNKNOWN_BOOT);
    }
    Some(match backing {
        // Each network namespace may have a sysfs of its own, with files of its own: a process that
        // has another one shares the memory and not the locks.
        Backing::Pci(_) => {
            judge::lock_name(boot, mapping.file_identity().device, backing.guest_id())
        }
        _ => judge::lock_name(boot, 0, None),
    })
}

/// Whether the region is mapped through a file that stands for a device, as each guest has its own,
/// and not through the file that its memory is.
fn is_devices_file(backing: &Backing, mapping: &Mapping) -> bool {
    let is_sysfs = || {
        let found = files::file_system(mapping.fd());
        found.map_or(true, |found| found.name() == Some("sysfs"))
    };
    matches!(backing, Backing::Pci(_)) || is_sysfs()
}

/// Claims the first free slot; with a lock as prover, from before the claim.
fn claim_slot(region: &Region<Arc<Mapping>>, prover: Prover) -> Result<SlotRef, Unusable> {
    let claimed = match prover {
        Prover::Lock { .. } => {
            judge::claim_with_lock(region, &FileLocks(region.memory()), prover).map_err(no_locks)?
        }
        _ => region.unclaimed().find_map(|index| region.claim_slot(index, prover)),
    };
    let slots = region.geometry().slots();
    claimed.ok_or_else(|| {
        Unusable::region(format!(
            "all its {slots} peer slots are taken; a larger region has more of them"
        ))
    })
}

fn no_locks(error: std::io::Error) -> Unusable {
    Unusable::device(format!("its file system has no open file description locks: {error}"))
}

/// The addresses peers may reach this host by, as the directory wants them.
fn host_addresses() -> std::io::Result<Vec<Ip>> {
    let mut addresses: Vec<Ip> = Vec::new();
    for address in net::interface_addresses()? {
        let ip = Ip::from(address);
        if !ip.is_link_local() && !ip.is_loopback() && !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    addresses.truncate(ivsmc_proto::host::MAX_ADDRESSES);
    Ok(addresses)
}

fn netns_cookie() -> std::io::Result<u64> {
    net::netns_cookie(net::tcp_socket(Family::V4).or_else(|_| net::tcp_socket(Family::V6))?)
}

/// Whether an ivshmem server is there that marks leavers: its word and its lock say so. The lock
/// is on an open file that no client shares, so it is another's, whichever descriptor asks.
fn has_marking_server(region: &Region<Arc<Mapping>>) -> bool {
    region.marking_server().is_some()
        && locks::is_locked_by_other(region.memory().fd(), region.marking_server_offset())
            .unwrap_or(false)
}
