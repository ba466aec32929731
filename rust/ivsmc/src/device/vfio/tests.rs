//! The bring-up, call by call, with the kernel's part played by a memfd.

use std::cell::{Cell, RefCell};
use std::os::fd::AsFd;

use ivsmc_proto::slot::{Prover, SlotState};

use super::*;
use crate::attachment::Attachment;
use crate::device::guest::{Guest, ADDRESS, SIZE};
use crate::device::DeviceSpec;

/// Where a region of the device is in its descriptor, as in the kernel's `vfio_pci`.
const fn offset(index: u64) -> u64 {
    index << 40
}

/// A kernel with one device, that notes what is called and fails where told.
struct Twin {
    device: Fd,
    calls: RefCell<Vec<String>>,
    /// The call that fails, by its first words, and how.
    fails: Cell<Option<(&'static str, i32)>>,
    vectors: u32,
    is_viable: bool,
    can_map_registers: bool,
    /// Wired eventfds.
    wired: RefCell<Vec<EventFd>>,
}

impl Twin {
    fn new() -> Self {
        let device = files::memfd(c"vfio device").unwrap();
        files::set_size(&device, offset(8)).unwrap();
        files::write_at(&device, offset(7), &[0xf4, 0x1a, 0x10, 0x11, 0, 4]).unwrap();
        let twin = Self {
            device,
            calls: RefCell::default(),
            fails: Cell::default(),
            vectors: 4,
            is_viable: true,
            can_map_registers: true,
            wired: RefCell::default(),
        };
        twin.set_register(8, 3);
        twin
    }

    fn set_register(&self, at: u64, value: u32) {
        files::write_at(&self.device, at, &value.to_le_bytes()).unwrap();
    }

    fn register(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        files::read_at(&self.device, at, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    fn called<T>(&self, call: String, value: T) -> io::Result<T> {
        let fails = self.fails.get().filter(|(what, _)| call.starts_with(what));
        self.calls.borrow_mut().push(call);
        match fails {
            Some((_, errno)) => Err(errno::error(errno)),
            None => Ok(value),
        }
    }
}

impl Vfio for Twin {
    fn open(&self, path: &Path) -> io::Result<Fd> {
        self.called(format!("open {}", path.display()), files::memfd(c"vfio file")?)
    }
    fn api_version(&self, _: &Fd) -> io::Result<i32> {
        self.called("version".into(), 0)
    }
    fn has_iommu(&self, _: &Fd, iommu: Iommu) -> io::Result<bool> {
        self.called(format!("has {iommu:?}"), self.fails.get().is_none_or(|(what, _)| what != "no"))
    }
    fn group_is_viable(&self, _: &Fd) -> io::Result<bool> {
        self.called("viable".into(), self.is_viable)
    }
    fn set_container(&self, _: &Fd, _: &Fd) -> io::Result<()> {
        self.called("set container".into(), ())
    }
    fn set_iommu(&self, _: &Fd, iommu: Iommu) -> io::Result<()> {
        self.called(format!("set {iommu:?}"), ())
    }
    fn device(&self, _: &Fd, name: &str) -> io::Result<Fd> {
        self.called(format!("device {name}"), self.device.try_clone()?)
    }
    fn region_info(&self, _: &Fd, index: u32) -> io::Result<RegionInfo> {
        let (size, can_map) = match index {
            0 => (256, self.can_map_registers),
            2 => (SIZE, true),
            7 => (256, false),
            _ => panic!("region {index}"),
        };
        let info = RegionInfo { size, offset: offset(index.into()), can_map };
        self.called(format!("region {index}"), info)
    }
    fn irq_count(&self, _: &Fd, index: u32) -> io::Result<u32> {
        self.called(format!("irqs {index}"), self.vectors)
    }
    fn set_irqs(&self, _: &Fd, index: u32, eventfds: &[&EventFd]) -> io::Result<()> {
        self.called(format!("wire {index} {}", eventfds.len()), ())?;
        let twins = eventfds.iter().map(|eventfd| {
            let fd = eventfd.as_fd().try_clone_to_owned().unwrap();
            EventFd::adopt(Fd::from(fd)).unwrap()
        });
        self.wired.replace(twins.collect());
        Ok(())
    }
}

/// A guest with the device bound to vfio-pci behind an IOMMU.
fn guest() -> Guest {
    let guest = Guest::new();
    guest.bind(DRIVER);
    guest.group("");
    guest
}

fn own_of(twin: &Twin, guest: &Guest) -> Result<(VfioDevice, Mapping), Unusable> {
    let place = Place { sysfs: guest.sysfs().into(), files: "/dev/vfio".into() };
    own_with(twin, &place, guest.address(), VECTORS)
}

/// The sentence with which the device is refused, after what was called.
fn refusal(twin: &Twin, guest: &Guest) -> String {
    match own_of(twin, guest) {
        Ok(_) => panic!("it was opened"),
        Err(unusable) => unusable.sentence,
    }
}

#[test]
fn the_bring_up_is_in_the_order_the_kernel_wants() {
    let (twin, guest) = (Twin::new(), guest());
    let (device, mapping) = own_of(&twin, &guest).unwrap();
    let expected = [
        "open /dev/vfio/vfio",
        "version",
        "has Type1",
        "open /dev/vfio/7",
        "viable",
        "set container",
        "set Type1",
        "device 0000:00:05.0",
        "region 7",
        "region 0",
        "region 2",
        "irqs 2",
        "wire 2 2",
    ];
    assert_eq!(*twin.calls.borrow(), expected);
    // Memory and bus mastering are on, nothing else was touched.
    assert_eq!(twin.register(offset(7)), 0x1110_1af4);
    assert_eq!(twin.register(offset(7) + 4), 0x0406);
    assert_eq!(ivsmc_proto::memory::Memory::len(&mapping), SIZE);
    assert_eq!(device.ivposition(), 3);
}

#[test]
fn doorbells_go_out_by_a_register_and_come_in_on_vector_1() {
    for can_map_registers in [true, false] {
        let twin = Twin { can_map_registers, ..Twin::new() };
        let (device, _) = own_of(&twin, &guest()).unwrap();
        assert!(device.notify(0xfffe, 7));
        assert_eq!(twin.register(12), 0xfffe_0007);
        assert!(!device.notify(1, 256), "QEMU would take it for vector 0");
        assert_eq!(twin.register(12), 0xfffe_0007);
        let (vector, eventfd) = device.own().unwrap();
        assert_eq!(vector, 1);
        twin.wired.borrow()[1].notify().unwrap();
        assert_eq!((eventfd.drain().unwrap(), eventfd.drain().unwrap()), (1, 0));
        twin.wired.borrow()[0].notify().unwrap();
        assert_eq!(device.departures().unwrap().drain().unwrap(), 1);
    }
}

#[test]
fn one_vector_is_for_all() {
    let twin = Twin { vectors: 1, ..Twin::new() };
    let (device, _) = own_of(&twin, &guest()).unwrap();
    assert_eq!(twin.wired.borrow().len(), 1);
    assert_eq!(device.own().unwrap().0, 0);
    assert!(device.departures().is_none());
}

#[test]
fn without_an_iommu_the_group_has_another_name() {
    let (twin, guest) = (Twin::new(), Guest::new());
    guest.bind(DRIVER);
    guest.group("vfio-noiommu\n");
    own_of(&twin, &guest).unwrap();
    let calls = twin.calls.borrow();
    for call in ["has None", "open /dev/vfio/noiommu-7", "set None"] {
        assert!(calls.iter().any(|found| found == call), "{call}: {calls:?}");
    }
}

#[test]
fn each_call_that_fails_says_what_to_do() {
    let cases = [
        ("open /dev/vfio/vfio", errno::ENOENT, "modprobe vfio-pci"),
        ("open /dev/vfio/vfio", errno::EACCES, "chmod 666 /dev/vfio/vfio"),
        ("open /dev/vfio/vfio", errno::EMFILE, "/dev/vfio/vfio cannot be opened"),
        ("version", errno::ENOTTY, "VFIO_GET_API_VERSION failed"),
        ("has", errno::ENOTTY, "VFIO_CHECK_EXTENSION failed"),
        ("no", 0, "modprobe vfio_iommu_type1"),
        (
            "open /dev/vfio/7",
            errno::EBUSY,
            "another process has it (/dev/vfio/7 is busy); processes share it through",
        ),
        ("open /dev/vfio/7", errno::EBUSY, "ivsmc agent"),
        ("open /dev/vfio/7", errno::EACCES, "ivsmc bind --group"),
        ("open /dev/vfio/7", errno::ENOENT, "there is no /dev/vfio/7"),
        ("open /dev/vfio/7", errno::ENODEV, "/dev/vfio/7 cannot be opened"),
        ("viable", errno::ENOTTY, "VFIO_GROUP_GET_STATUS failed"),
        ("set container", errno::EINVAL, "VFIO_GROUP_SET_CONTAINER failed"),
        ("set Type1", errno::EPERM, "allow_unsafe_interrupts"),
        ("set Type1", errno::ENODEV, "VFIO_SET_IOMMU failed"),
        ("device", errno::ENODEV, "VFIO_GROUP_GET_DEVICE_FD failed"),
        ("region 7", errno::EINVAL, "of the configuration space failed"),
        ("region 0", errno::EINVAL, "VFIO_DEVICE_GET_REGION_INFO failed"),
        ("region 2", errno::EINVAL, "VFIO_DEVICE_GET_REGION_INFO failed"),
        ("irqs", errno::EINVAL, "VFIO_DEVICE_GET_IRQ_INFO failed"),
        ("wire", errno::ENOSPC, "VFIO_DEVICE_SET_IRQS failed"),
    ];
    let guest = guest();
    for (call, errno, words) in cases {
        let twin = Twin::new();
        twin.fails.set(Some((call, errno)));
        let said = refusal(&twin, &guest);
        assert!(said.contains(words), "{call} {errno}: {said}");
        // Nothing is called after what failed.
        let calls = twin.calls.borrow();
        assert!(call == "no" || calls.last().unwrap().starts_with(call), "{calls:?}");
    }
}

#[test]
fn what_is_no_device_for_vfio_says_what_to_do() {
    let said = |guest: &Guest, words: &[&str]| {
        let twin = Twin::new();
        let sentence = refusal(&twin, guest);
        for words in words {
            assert!(sentence.contains(words), "{words}: {sentence}");
        }
        assert!(twin.calls.borrow().is_empty(), "nothing was opened");
    };
    let bound = guest();
    bound.put("revision", "0x00\n");
    said(&bound, &["revision 0", "ivshmem-doorbell"]);
    bound.put("revision", "0x01\n");
    bound.bars(4096, true);
    said(&bound, &["BAR2", "4096 bytes", "1 MiB"]);
    bound.put("device", "0x1000\n");
    said(&bound, &["1af4:1000", "has no ivshmem device"]);

    let other = guest();
    let place = Place { sysfs: other.sysfs().into(), files: "/dev/vfio".into() };
    let missing = "00:06.0".parse().unwrap();
    let refused = own_with(&Twin::new(), &place, missing, VECTORS).err().unwrap();
    assert!(refused.sentence.contains("no PCI device here"), "{}", refused.sentence);
    assert!(refused.sentence.contains(ADDRESS), "{}", refused.sentence);

    let unbound = Guest::new();
    said(&unbound, &["not bound to a driver", "no IOMMU", "intel-iommu", "pci:0000:00:05.0"]);
    unbound.group("");
    said(&unbound, &["not bound to a driver", "ivsmc bind 0000:00:05.0", "is missing"]);
    unbound.bind("ivshmem_uio");
    said(&unbound, &["the driver ivshmem_uio", "ivsmc bind 0000:00:05.0"]);

    let without = Guest::new();
    let parameters = without.sysfs().join("module/vfio/parameters");
    std::fs::create_dir_all(&parameters).unwrap();
    std::fs::write(parameters.join("enable_unsafe_noiommu_mode"), "N\n").unwrap();
    said(&without, &["no IOMMU", "--unsafe-noiommu"]);
    std::fs::write(parameters.join("enable_unsafe_noiommu_mode"), "Y\n").unwrap();
    said(&without, &["ivsmc bind 0000:00:05.0"]);
}

#[test]
fn a_device_that_answers_wrongly_is_refused() {
    let guest = guest();
    let twin = Twin { is_viable: false, ..Twin::new() };
    assert!(refusal(&twin, &guest).contains("iommu_groups/7/devices"));
    let twin = Twin { vectors: 0, ..Twin::new() };
    let said = refusal(&twin, &guest);
    assert!(said.contains("ivshmem-plain") && said.contains("vectors=2"), "{said}");
    for id in [u32::MAX, 1 << 16] {
        let twin = Twin::new();
        twin.set_register(8, id);
        assert!(refusal(&twin, &guest).contains("none from its ivshmem server"));
    }
}

#[test]
fn the_attachment_names_the_device_and_outlives_its_predecessor() {
    let (twin, guest) = (Twin::new(), guest());
    let spec: DeviceSpec = format!("vfio:{ADDRESS}").parse().unwrap();
    let attach = || {
        let (device, mapping) = own_of(&twin, &guest).unwrap();
        Attachment::attach_to(&spec, opened(device, mapping)).unwrap()
    };
    let first = attach();
    let region = first.region();
    let prover = Prover::VfioExclusive(3);
    let me = first.me();
    assert_eq!(region.slot_state(me.index), SlotState::Live { at: me, prover });
    let info = region.slot_info(me).unwrap();
    assert_eq!((info.ivposition, info.vector), (Some(3), Some(1)));
    assert_eq!(first.record().identity.ivposition, 3);
    // One that was killed. (The twin gives the group out again all the same.)
    let dead = region.claim_slot(9, prover).unwrap();
    region.write_host_record(dead, &first.record());
    // Another guest's, and one of a host process.
    let others = [Prover::VfioExclusive(4), Prover::IvPosition(3)].map(|prover| {
        let index = region.unclaimed().next().unwrap();
        let at = region.claim_slot(index, prover).unwrap();
        region.write_host_record(at, &first.record());
        at
    });
    assert!(first.is_peer_alive(me), "never its own");
    assert_eq!(first.reap(), 1);
    assert!(!region.is_live(dead) && others.iter().all(|at| region.is_live(*at)));
    // It has all the memory, and reserves nothing.
    let dmb = first.allocate(6, others[0]).unwrap();
    drop(dmb);
    drop(first);
    let second = attach();
    assert_eq!((second.me().index, second.me().generation), (me.index, me.generation + 1));
}
