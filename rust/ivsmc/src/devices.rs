//! The devices of a process: which are to be used, and the attachments to them.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use ivsmc_proto::reclaim::Census;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::{fork, net, pci, poll};

use crate::agent;
use crate::attachment::{Attachment, AttachmentStats, DoorbellStats};
use crate::device::{self, DeviceSpec, Kind, MemoryType, Unusable};
use crate::fallback::Reason;
use crate::reactor::{lock, Key, Reactor, Source};
use crate::runtime::{Lease, Runtime};
use crate::slots::{self, SlotReport};
use crate::{Error, Result};

/// The variable that names devices where no argument does.
const VARIABLE: &str = "IVSMC_DEVICE";

/// Where ivshmem servers and agents of this machine put their sockets, `*.sock`.
pub(crate) const SOCKETS: &str = "/run/ivsmc";

/// How long a device that could not be opened is not tried again, and how often it is looked
/// whether one that could still leads to the same region.
const MEMORY: Duration = Duration::from_secs(1);

/// Which devices to use, the fastest wake-up first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Selection {
    pub(crate) specs: Vec<DeviceSpec>,
    /// `none`: use TCP only.
    pub(crate) disabled: bool,
    /// Named by the caller: what cannot be opened is the caller's error.
    pub(crate) is_explicit: bool,
}

/// The devices that `argument` names, else `IVSMC_DEVICE`, else those found on this machine.
///
/// # Errors
/// [`Error::Device`] for what is no device spec.
pub(crate) fn select(argument: Option<&str>) -> Result<Selection> {
    match argument {
        Some(argument) => select_listed(argument, true),
        // An empty variable is one that is not set.
        None => select_listed(&std::env::var(VARIABLE).unwrap_or_default(), false),
    }
}

fn select_listed(list: &str, is_explicit: bool) -> Result<Selection> {
    if !is_explicit && list.trim().is_empty() {
        let specs = found(Path::new(SOCKETS), Path::new(pci::SYSFS));
        return Ok(Selection { specs, disabled: false, is_explicit });
    }
    let specs = DeviceSpec::parse_list(list).map_err(|error| match error {
        Error::Device { spec, reason } if !is_explicit => {
            Error::device(spec, format!("{reason} (from the variable {VARIABLE})"))
        }
        other => other,
    })?;
    Ok(Selection { disabled: specs.is_empty(), specs, is_explicit })
}

/// The ivshmem devices of this guest, the sockets of ivshmem servers and agents in `directory`, and
/// `local`.
fn found(directory: &Path, sysfs: &Path) -> Vec<DeviceSpec> {
    let sockets: BTreeSet<_> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "sock"))
        .collect();
    let mut specs: Vec<_> = sockets
        .iter()
        .map(|path| match path.file_name().and_then(|name| name.to_str()) {
            Some(name) if agent::is_socket_name(name) => DeviceSpec::agent(path),
            _ => DeviceSpec::host(path),
        })
        .collect();
    let has_agent = |address| {
        [None, Some(address)]
            .map(agent::socket_name)
            .iter()
            .any(|name| sockets.contains(&directory.join(name)))
    };
    for function in device::ivshmem_devices(sysfs) {
        let address = function.address();
        if function.driver().as_deref() != Some(device::VFIO_DRIVER) {
            specs.push(DeviceSpec::pci(address));
        } else if !has_agent(address) {
            specs.push(DeviceSpec::vfio(address));
        }
    }
    specs.push(DeviceSpec::local());
    specs.sort();
    specs
}

/// A device that was to be used and cannot be.
#[derive(Debug)]
pub(crate) struct Problem {
    pub(crate) spec: DeviceSpec,
    /// The reason sessions give that fall back because of it.
    pub(crate) reason: Reason,
    pub(crate) error: Error,
}

impl Problem {
    fn new(spec: &DeviceSpec, unusable: &Unusable) -> Self {
        Self {
            spec: spec.clone(),
            reason: unusable.reason,
            error: unusable.to_error(spec.as_str()),
        }
    }
}

/// The attachments of a process, at most one for each device spec.
pub(crate) struct DeviceTable {
    /// Each device has a lock of its own: one that is slow to open keeps nobody from the others.
    entries: Mutex<HashMap<DeviceSpec, Arc<Mutex<Entry>>>>,
    addresses: Mutex<Option<Arc<AddressWatch>>>,
    /// The last selection, for who connects in a loop.
    selected: Mutex<Option<Selected>>,
}

/// What a list of devices meant a moment ago.
struct Selected {
    list: String,
    seen: Instant,
    selection: Arc<Selection>,
}

#[derive(Default)]
struct Entry {
    attachment: Option<Arc<Attachment>>,
    /// Why there is none.
    unusable: Option<Unusable>,
    /// When one of the two was found to be so.
    seen: Option<Instant>,
}

impl DeviceTable {
    pub(crate) fn new() -> Self {
        Self { entries: Mutex::default(), addresses: Mutex::default(), selected: Mutex::default() }
    }

    /// [`select`], which looks into the file system at most once in [`MEMORY`].
    ///
    /// # Errors
    /// As there.
    pub(crate) fn selected(&self, argument: Option<&str>) -> Result<Arc<Selection>> {
        let variable = match argument {
            Some(_) => String::new(),
            None => std::env::var(VARIABLE).unwrap_or_default(),
        };
        let (list, is_explicit) = (argument.unwrap_or(&variable), argument.is_some());
        let mut selected = lock(&self.selected);
        if let Some(last) = &*selected {
            let same = last.list == list && last.selection.is_explicit == is_explicit;
            if same && last.seen.elapsed() < MEMORY {
                return Ok(Arc::clone(&last.selection));
            }
        }
        let selection = Arc::new(select_listed(list, is_explicit)?);
        *selected = Some(Selected {
            list: list.to_owned(),
            seen: Instant::now(),
            selection: Arc::clone(&selection),
        });
        Ok(selection)
    }

    /// Attaches to the selected devices, as far as that has not been done, and returns the
    /// attachments in the order of the selection, with the devices that cannot be used.
    ///
    /// # Errors
    /// The problem of a device that the caller named; and those of starting the background thread.
    pub(crate) fn attached(
        &self,
        selection: &Selection,
    ) -> Result<(Vec<Arc<Attachment>>, Vec<Problem>)> {
        // Before any lock of this table: without a lease all may be detached meanwhile.
        let lease = Runtime::current()?.lease()?;
        let mut attachments = Vec::with_capacity(selection.specs.len());
        let mut problems = Vec::new();
        for spec in &selection.specs {
            match self.attachment(spec, lease.reactor()) {
                Ok(attachment) => attachments.push(attachment),
                Err(unusable) if selection.is_explicit => {
                    return Err(unusable.to_error(spec.as_str()))
                }
                Err(unusable) => problems.push(Problem::new(spec, &unusable)),
            }
        }
        Ok((attachments, problems))
    }

    /// Whether all of the selected devices have been looked at just now.
    pub(crate) fn are_at_hand(&self, selection: &Selection) -> bool {
        let entries = lock(&self.entries);
        selection.specs.iter().all(|spec| {
            // Locked while somebody opens it.
            entries.get(spec).and_then(|entry| entry.try_lock().ok()).is_some_and(|entry| {
                entry.seen.is_some_and(|seen| seen.elapsed() < MEMORY / 2)
                    || entry.attachment.is_some()
            })
        })
    }

    /// Leaves all regions, but for attachments that somebody still uses.
    pub(crate) fn detach_all(&self) {
        let entries = std::mem::take(&mut *lock(&self.entries));
        let watch = lock(&self.addresses).take();
        if let Some(watch) = watch {
            watch.close();
        }
        drop(entries);
    }

    /// Leaves all regions, whoever still refers to an attachment: the process ends.
    pub(crate) fn leave_all(&self) {
        let entries = std::mem::take(&mut *lock(&self.entries));
        for entry in entries.values() {
            if let Some(attachment) = &lock(entry).attachment {
                attachment.leave();
            }
        }
    }

    fn attachment(
        &self,
        spec: &DeviceSpec,
        reactor: &Arc<Reactor>,
    ) -> Result<Arc<Attachment>, Unusable> {
        let entry = {
            let mut entries = lock(&self.entries);
            match entries.get(spec) {
                Some(entry) => Arc::clone(entry),
                None => Arc::clone(entries.entry(spec.clone()).or_default()),
            }
        };
        let mut entry = lock(&entry);
        let is_recent = entry.seen.is_some_and(|seen| seen.elapsed() < MEMORY);
        if let Some(attachment) = &entry.attachment {
            if is_recent || attachment.is_up_to_date() {
                let attachment = Arc::clone(attachment);
                if !is_recent {
                    entry.seen = Some(Instant::now());
                }
                return Ok(attachment);
            }
            // The region is no longer where newcomers look for it. Sessions keep the attachment.
            entry.attachment = None;
        } else if let Some(unusable) = entry.unusable.as_ref().filter(|_| is_recent) {
            return Err(unusable.clone());
        }
        let opened = Attachment::open(spec);
        entry.seen = Some(Instant::now());
        match opened {
            Ok(attachment) => {
                entry.unusable = None;
                entry.attachment = Some(Arc::clone(&attachment));
                // Without the background thread's eye on them the device still works: what an
                // ivshmem server says stays unread, and addresses are those of now.
                let _ = attachment.watch(reactor);
                self.watch_addresses(&attachment, reactor);
                Ok(attachment)
            }
            Err(unusable) => {
                entry.unusable = Some(unusable.clone());
                Err(unusable)
            }
        }
    }

    /// Has the background thread refresh the addresses of `attachment` when this host's change.
    fn watch_addresses(&self, attachment: &Arc<Attachment>, reactor: &Arc<Reactor>) {
        let mut addresses = lock(&self.addresses);
        if addresses.is_none() {
            *addresses = AddressWatch::start(reactor).ok();
        }
        if let Some(watch) = &*addresses {
            let mut watched = lock(&watch.attachments);
            watched.retain(|other| other.strong_count() > 0);
            watched.push(Arc::downgrade(attachment));
        }
        drop(addresses);
        // What changed between the attachment's first look and now.
        attachment.refresh_addresses();
    }
}

/// Keeps the addresses in host records fresh.
struct AddressWatch {
    notices: Fd,
    attachments: Mutex<Vec<Weak<Attachment>>>,
    watched: Mutex<Option<(Weak<Reactor>, Key)>>,
}

impl AddressWatch {
    fn start(reactor: &Arc<Reactor>) -> Result<Arc<Self>> {
        let watch = Arc::new(Self {
            notices: net::address_watch()?,
            attachments: Mutex::default(),
            watched: Mutex::default(),
        });
        let key = reactor.register(Arc::clone(&watch) as Arc<dyn Source>);
        *lock(&watch.watched) = Some((Arc::downgrade(reactor), key));
        if let Err(error) = reactor.watch(key, &watch.notices, poll::IN) {
            reactor.forget(key);
            return Err(error);
        }
        Ok(watch)
    }

    fn close(&self) {
        let watched = lock(&self.watched).take();
        if let Some(reactor) = watched.as_ref().and_then(|(reactor, _)| reactor.upgrade()) {
            reactor.unwatch(&self.notices);
        }
        if let Some((reactor, key)) = watched {
            if let Some(reactor) = reactor.upgrade() {
                reactor.forget(key);
            }
        }
    }
}

impl Source for AddressWatch {
    fn ready(&self, _events: u32) {
        if net::drain_address_watch(&self.notices).is_err() {
            self.close();
            return;
        }
        let attachments: Vec<_> =
            lock(&self.attachments).iter().filter_map(Weak::upgrade).collect();
        for attachment in attachments {
            attachment.refresh_addresses();
        }
    }
}

/// What is known of one device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its spec.
    pub spec: String,
    /// What it is.
    pub kind: Kind,
    /// Why it cannot be used, with the cure; `None` if it can.
    pub problem: Option<String>,
    /// Its region, if this process is attached to it.
    pub region: Option<RegionInfo>,
}

/// What is in a region.
#[derive(Clone, Debug)]
pub struct RegionInfo {
    /// Its name, chosen when it was made.
    pub uuid: u128,
    /// Bytes.
    pub size: u64,
    /// What its memory was measured to be; only of a guest's device.
    pub memory_type: Option<MemoryType>,
    /// The peer slot of this process, "index.generation".
    pub slot: String,
    /// Peer slots there are.
    pub slots: u16,
    /// Extents there are.
    pub extents: u32,
    /// Bytes of an extent.
    pub extent_size: u64,
    /// What this process has in it.
    pub own: AttachmentStats,
    /// How it is notified; `None` if it cannot be by doorbell.
    pub doorbell: Option<DoorbellStats>,
    /// What all have in it.
    pub census: Census,
}

impl RegionInfo {
    fn of(attachment: &Attachment) -> Self {
        let region = attachment.region();
        let geometry = region.geometry();
        Self {
            uuid: region.uuid(),
            size: geometry.size(),
            memory_type: attachment.memory_type(),
            slot: attachment.me().to_string(),
            slots: geometry.slots(),
            extents: geometry.extents(),
            extent_size: geometry.extent_size(),
            own: attachment.stats(),
            doorbell: attachment.doorbell_stats(),
            census: attachment.census(),
        }
    }
}

/// The devices that connections use by default, attached to, each with its region or its problem.
///
/// # Errors
/// [`Error::Device`] if `IVSMC_DEVICE` is malformed.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    let selection = select(None)?;
    let runtime = Runtime::current()?;
    let _lease = runtime.lease()?;
    let (attachments, problems) = runtime.devices().attached(&selection)?;
    let mut infos: Vec<_> = attachments
        .iter()
        .map(|attachment| DeviceInfo {
            spec: attachment.spec().to_owned(),
            kind: attachment.kind(),
            problem: None,
            region: Some(RegionInfo::of(attachment)),
        })
        .collect();
    infos.extend(problems.into_iter().map(|problem| DeviceInfo {
        spec: problem.spec.to_string(),
        kind: problem.spec.kind(),
        problem: Some(problem.error.to_string()),
        region: None,
    }));
    infos.sort_by_key(|info| info.kind);
    Ok(infos)
}

/// Attaches to the device `spec` and keeps the attachment as long as the handle is open.
///
/// # Errors
/// [`Error::Device`] if `spec` names no device or not exactly one, or it cannot be used;
/// [`Error::Region`] if what is behind it is no region of this version.
pub fn open_device(spec: &str) -> Result<Device> {
    let selection = select(Some(spec))?;
    if selection.specs.len() != 1 {
        return Err(Error::device(spec, "name exactly one device to open"));
    }
    let runtime = Runtime::current()?;
    let lease = runtime.lease()?;
    let (attachments, _) = runtime.devices().attached(&selection)?;
    let attachment =
        attachments.into_iter().next().ok_or_else(|| Error::device(spec, "it cannot be used"))?;
    Ok(Device {
        spec: attachment.spec().to_owned(),
        kind: attachment.kind(),
        open: Mutex::new(Some(Open { attachment, _lease: lease })),
        generation: fork::generation(),
    })
}

/// An open device.
pub struct Device {
    spec: String,
    kind: Kind,
    open: Mutex<Option<Open>>,
    generation: u32,
}

/// Fields in the order they go: first the attachment, then the reason for it to stay.
struct Open {
    attachment: Arc<Attachment>,
    _lease: Lease,
}

impl Device {
    /// Its spec.
    pub fn spec(&self) -> &str {
        &self.spec
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What is in its region now.
    ///
    /// # Errors
    /// [`Error::Closed`]; [`Error::Forked`] in a child of the process that opened it.
    pub fn region(&self) -> Result<RegionInfo> {
        let attachment = self.attachment()?;
        Ok(RegionInfo::of(&attachment))
    }

    /// Looks for dead peers, gives back what they had, and returns how many there were.
    ///
    /// # Errors
    /// [`Error::Closed`]; [`Error::Forked`] in a child of the process that opened it.
    pub fn reap(&self) -> Result<usize> {
        Ok(self.attachment()?.reap())
    }

    /// The peer slots that somebody has, or had until just now, in the order of their numbers.
    ///
    /// # Errors
    /// [`Error::Closed`]; [`Error::Forked`] in a child of the process that opened it.
    pub fn slots(&self) -> Result<Vec<SlotReport>> {
        Ok(slots::report(&*self.attachment()?))
    }

    /// Declares the slot "index.generation" dead and gives back what its owner had; whether it was
    /// live or dead until now. For an operator who knows that its owner is gone for good, or will
    /// never write to the region again: if it does after all, it writes into memory of others.
    ///
    /// # Errors
    /// [`Error::ApiMisuse`] for what is no slot, or this process's own; [`Error::Closed`];
    /// [`Error::Forked`] in a child of the process that opened it.
    pub fn declare_dead(&self, slot: &str) -> Result<bool> {
        slots::declare_dead(&*self.attachment()?, slot)
    }

    /// Lets go of it. The process stays attached while it has sessions or listeners there. In a
    /// child of the process that opened it there is nothing to let go of.
    pub fn close(&self) {
        if self.judge_generation().is_ok() {
            let open = lock(&self.open).take();
            drop(open);
        }
    }

    /// Whether it is closed in this process.
    pub fn is_closed(&self) -> bool {
        self.judge_generation().is_err() || lock(&self.open).is_none()
    }

    fn attachment(&self) -> Result<Arc<Attachment>> {
        self.judge_generation()?;
        let open = lock(&self.open);
        open.as_ref().map(|open| Arc::clone(&open.attachment)).ok_or(Error::Closed)
    }

    /// Before any lock: a thread of the parent may have held it.
    fn judge_generation(&self) -> Result<()> {
        if fork::is_current(self.generation) {
            Ok(())
        } else {
            Err(Error::Forked)
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("spec", &self.spec).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_argument_comes_before_everything_else() {
        let selection = select(Some("local,host:/x.sock")).unwrap();
        let specs: Vec<_> = selection.specs.iter().map(DeviceSpec::as_str).collect();
        assert_eq!(specs, ["host:/x.sock", "local"]);
        assert!(selection.is_explicit && !selection.disabled);
        assert!(select(Some("none")).unwrap().disabled);
        assert!(matches!(select(Some("")), Err(Error::Device { .. })));
    }

    #[test]
    fn sockets_of_ivshmem_servers_are_found_and_local_is_always_there() {
        let directory = std::env::temp_dir().join(format!("ivsmc-found-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        for name in ["ivs1.sock", "ivs0.sock", "agent.sock", "readme"] {
            std::fs::write(directory.join(name), "").unwrap();
        }
        let nowhere = Path::new("/does/not/exist");
        let specs = found(&directory, nowhere);
        std::fs::remove_dir_all(&directory).unwrap();
        let names: Vec<_> =
            specs.iter().map(|spec| spec.as_str().rsplit('/').next().unwrap()).collect();
        assert_eq!(names, ["agent.sock", "ivs0.sock", "ivs1.sock", "local"]);
        assert_eq!(specs[0].kind(), Kind::Agent);
        assert_eq!(found(nowhere, nowhere), [DeviceSpec::local()]);
    }

    #[test]
    fn the_ivshmem_device_of_a_guest_is_found_by_what_it_is_bound_to() {
        let (guest, nowhere) = (crate::device::guest::Guest::new(), Path::new("/does/not/exist"));
        let found_now = || {
            let specs = found(nowhere, guest.sysfs());
            specs.iter().map(|spec| spec.as_str().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(found_now(), ["pci:0000:00:05.0", "local"]);
        guest.bind("vfio-pci");
        assert_eq!(found_now(), ["vfio:0000:00:05.0", "local"]);
        for (name, is_its_agent) in [
            ("agent.sock", true),
            ("agent-0000:00:05.0.sock", true),
            ("agent-0000:00:06.0.sock", false),
        ] {
            let socket = guest.sysfs().join(name);
            std::fs::write(&socket, "").unwrap();
            let specs = found(guest.sysfs(), guest.sysfs());
            let kinds: Vec<_> = specs.iter().map(DeviceSpec::kind).collect();
            let expected = [Kind::Vfio, Kind::Agent, Kind::Local];
            assert_eq!(kinds, expected[usize::from(is_its_agent)..], "{name}");
            std::fs::remove_file(socket).unwrap();
        }
        guest.put("class", "0x028000\n");
        assert_eq!(found_now(), ["local"]);
        guest.put("class", "0x050000\n");
        guest.put("vendor", "0x8086\n");
        assert_eq!(found_now(), ["local"]);
    }

    #[test]
    fn a_device_that_cannot_be_opened_is_a_problem_or_an_error() {
        let table = DeviceTable::new();
        let specs = DeviceSpec::parse_list("file:/does/not/exist").unwrap();
        let found = Selection { specs, disabled: false, is_explicit: false };
        let (attachments, problems) = table.attached(&found).unwrap();
        assert!(attachments.is_empty());
        assert_eq!(problems.len(), 1);
        assert!(problems[0].error.to_string().contains("truncate -s 64M"));
        let named = Selection { is_explicit: true, ..found };
        assert!(matches!(table.attached(&named), Err(Error::Device { .. })));
    }
}
