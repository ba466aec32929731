//! Devices without VFIO, on files that stand for a guest's sysfs.

use ivsmc_proto::slot::{Prover, SlotState};

use super::*;
use crate::attachment::Attachment;
use crate::device::guest::{Guest, ADDRESS, SIZE};
use crate::device::DeviceSpec;

fn attach(guest: &Guest) -> Result<Arc<Attachment>, Unusable> {
    let spec: DeviceSpec = format!("pci:{ADDRESS}").parse().unwrap();
    Attachment::attach_to(&spec, open_below(guest.sysfs(), guest.address())?)
}

fn refusal(guest: &Guest) -> String {
    attach(guest).err().expect("it was opened").sentence
}

/// Where the registers begin in `resource0`.
const REGISTERS: u64 = 0x100;

fn resource0(guest: &Guest) -> std::fs::File {
    let path = guest.function().join("resource0");
    std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap()
}

#[test]
fn several_processes_have_a_plain_device_and_see_each_others_locks() {
    let guest = Guest::new();
    guest.bars(SIZE, false);
    let (first, second) = (attach(&guest).unwrap(), attach(&guest).unwrap());
    assert_eq!(first.region().uuid(), second.region().uuid());
    let info = first.region().slot_info(first.me()).unwrap();
    assert_eq!((info.ivposition, info.vector), (None, None));
    assert_eq!(first.record().identity, second.record().identity);
    assert_eq!(first.record().identity.ivposition, 0);
    let states = [&first, &second].map(|one| one.region().slot_state(one.me().index));
    let SlotState::Live { prover: Prover::Lock { boot }, .. } = states[0] else {
        panic!("{:?}", states[0]);
    };
    assert!(
        matches!(states[1], SlotState::Live { prover: Prover::Lock { boot: other }, .. } if other == boot)
    );
    assert_eq!((first.reap(), second.reap()), (0, 0));
    // A slot whose lock nobody holds.
    let region = first.region();
    let dead = region.claim_slot(9, Prover::Lock { boot }).unwrap();
    // A process that sees another sysfs, as in a container: its locks are elsewhere.
    let elsewhere = region.claim_slot(10, Prover::Lock { boot: boot ^ 1 }).unwrap();
    for at in [dead, elsewhere] {
        region.write_host_record(at, &first.record());
    }
    assert_eq!(first.reap(), 1);
    assert!(!region.is_live(dead) && region.is_live(elsewhere));
}

#[test]
fn a_doorbell_device_is_notified_through_and_has_its_id() {
    use std::os::unix::fs::FileExt;
    let guest = Guest::new();
    let registers = resource0(&guest);
    registers.write_all_at(&5_u32.to_le_bytes(), REGISTERS + 8).unwrap();
    let attachment = attach(&guest).unwrap();
    let info = attachment.region().slot_info(attachment.me()).unwrap();
    assert_eq!((info.ivposition, info.vector), (Some(5), None));
    assert_eq!(attachment.record().identity.ivposition, 5);
    let opened = open_below(guest.sysfs(), guest.address()).unwrap();
    let doorbells = opened.backing.doorbells().unwrap();
    assert!(doorbells.own().is_none() && doorbells.departures().is_none());
    assert!(doorbells.notify(2, 1));
    let mut doorbell = [0; 4];
    registers.read_exact_at(&mut doorbell, REGISTERS + 12).unwrap();
    assert_eq!(u32::from_le_bytes(doorbell), 0x0002_0001);
}

#[test]
fn what_cannot_be_used_says_what_to_do() {
    let guest = Guest::new();
    guest.put("revision", "0x00\n");
    assert!(refusal(&guest).contains("revision 0"));
    guest.put("revision", "0x01\n");
    guest.bars(1 << 19, false);
    assert!(refusal(&guest).contains("at least 1 MiB"));
    guest.bars(SIZE, false);
    // Memory is off, and the kernel (here: a file) does not switch it on.
    guest.command(0);
    let said = refusal(&guest);
    assert!(said.contains("switched off") && said.contains("enable"), "{said}");
    guest.command(2);
    std::fs::remove_file(guest.function().join("resource2")).unwrap();
    assert!(refusal(&guest).contains("resource2 cannot be"));
}

#[test]
fn each_refusal_has_its_cure() {
    let guest = Guest::new();
    let said = |errno| {
        let function = Function::find(guest.sysfs(), guest.address()).unwrap();
        super::refusal(&function, function::MEMORY, &errno::error(errno)).sentence
    };
    assert!(said(errno::EACCES).contains("ivsmc bind --no-vfio --group GROUP 0000:00:05.0"));
    guest.bars(SIZE, false);
    assert!(said(errno::EACCES).contains("ivsmc bind --group GROUP 0000:00:05.0"));
    guest.bars(SIZE, true);
    guest.group("DMA\n");
    assert!(said(errno::EACCES).contains("ivsmc bind --group GROUP 0000:00:05.0"));
    assert!(said(errno::EROFS).contains("read-only"));
    guest.bind("vfio-pci");
    assert!(said(errno::EACCES).contains("use it as vfio:0000:00:05.0"));
    assert!(said(errno::EINVAL).contains("ivsmc agent"));
}
