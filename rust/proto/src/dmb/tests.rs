//! Who may do what with a DMB; the orders and deaths are in `reclaim`'s tests.

use core::sync::atomic::Ordering;

use super::*;
use crate::heap::HeapMemory;
use crate::layout::{GRANULE, MIN_REGION};
use crate::slot::Prover;

struct Pair {
    region: Region<HeapMemory>,
    owner: SlotRef,
    writer: SlotRef,
    /// First granule of the owner's extent.
    granule: u32,
}

fn pair() -> Pair {
    let region = Region::attach(HeapMemory::new(MIN_REGION), 1).unwrap();
    let [owner, writer] = [0, 1].map(|index| region.claim_slot(index, Prover::None).unwrap());
    region.claim_extent(writer).unwrap();
    let extent = region.claim_extent(owner).unwrap();
    assert!(region.open_extent(extent, owner) && !region.open_extent(extent, owner));
    let granule = region.geometry().granules_of(extent).start;
    Pair { region, owner, writer, granule }
}

#[test]
fn a_dmb_is_invited_attached_and_let_go_in_either_order() {
    let Pair { region, owner, writer, granule } = pair();
    for owner_first in [true, false] {
        region.memory().store(region.geometry().control_block(granule) + 64, 99, Ordering::Relaxed);
        let (token, place) = region.invite_dmb(granule, 1, writer).unwrap();
        assert_eq!((place.capacity, token.granule()), (2 * GRANULE, granule));
        assert_eq!(region.memory().load(place.control + 64, Ordering::Relaxed), 0);
        assert_eq!(region.invite_dmb(granule, 1, writer), Err(DmbError::Busy));
        assert_eq!(region.attach_dmb(token, 1, writer, owner), Ok(place));
        assert_eq!(region.attach_dmb(token, 1, writer, owner), Err(DmbError::NotInvited));
        assert!(!region.free_extent(region.geometry().extent_of(granule), owner));
        if owner_first {
            assert_eq!(region.release_dmb(token), Release::WriterThere);
            assert!(!region.dmb_is_idle(granule));
            assert_eq!(region.invite_dmb(granule, 1, writer), Err(DmbError::Busy));
            assert!(!region.detach_dmb(token, owner) && region.detach_dmb(token, writer));
        } else {
            assert!(region.detach_dmb(token, writer) && !region.dmb_is_idle(granule));
            assert_eq!(region.attach_dmb(token, 1, writer, owner), Err(DmbError::NotInvited));
            assert_eq!(region.release_dmb(token), Release::Free);
        }
        assert!(region.dmb_is_idle(granule));
    }
    let extent = region.geometry().extent_of(granule);
    assert!(!region.free_extent(extent, writer) && region.free_extent(extent, owner));
}

#[test]
fn nobody_but_who_is_invited_attaches() {
    let Pair { region, owner, writer, granule } = pair();
    let (old, _) = region.invite_dmb(granule, 0, writer).unwrap();
    assert_eq!(region.release_dmb(old), Release::Free);
    assert_eq!(region.attach_dmb(old, 0, writer, owner), Err(DmbError::NotInvited));
    let (token, _) = region.invite_dmb(granule, 0, writer).unwrap();
    let refused = [
        (old, 0, writer, owner, DmbError::NotInvited),
        (token, 1, writer, owner, DmbError::NotInvited),
        (token, 0, owner, owner, DmbError::NotInvited),
        (token, 0, SlotRef { generation: 2, ..writer }, owner, DmbError::NotInvited),
        (token, 0, writer, writer, DmbError::NotTheOwners),
        (token, 7, writer, owner, DmbError::NoSuchPlace),
        (Token(token.0 + 1), 1, writer, owner, DmbError::NoSuchPlace),
        (Token(token.0 | 1 << 63), 0, writer, owner, DmbError::NotInvited),
        (Token(u64::MAX), 0, writer, owner, DmbError::NoSuchPlace),
        // In an extent that is claimed and not open.
        (Token(token.0 & !0xffff_ffff), 0, owner, writer, DmbError::NotTheOwners),
    ];
    for (token, class, me, owner, error) in refused {
        assert_eq!(region.attach_dmb(token, class, me, owner), Err(error), "{token} {class} {me}");
    }
    assert_eq!(region.invite_dmb(0, 0, writer), Err(DmbError::NotTheOwners));
    assert!(region.attach_dmb(token, 0, writer, owner).is_ok());
}

#[test]
fn the_dead_claim_invite_and_attach_nothing() {
    let Pair { region, owner, writer, granule } = pair();
    let (token, _) = region.invite_dmb(granule, 0, writer).unwrap();
    region.mark_dead(writer);
    assert_eq!(region.attach_dmb(token, 0, writer, owner), Err(DmbError::NotLive));
    assert_eq!(region.census().dmbs_attached, 0);
    let extents = region.census().extents;
    assert_eq!(region.claim_extent(writer), None);
    assert_eq!(region.census().extents, extents);
    region.mark_dead(owner);
    assert_eq!(region.invite_dmb(granule + 1, 0, writer), Err(DmbError::NotLive));
    assert!(region.dmb_is_idle(granule + 1));
}

#[test]
fn the_generation_of_a_dmb_wraps_past_zero() {
    let Pair { region, owner, writer, granule } = pair();
    let state = region.geometry().control_block(granule) + STATE;
    region.memory().store(state, DMB_GENERATIONS << DMB_SHIFT, Ordering::Relaxed);
    let (token, place) = region.invite_dmb(granule, 0, writer).unwrap();
    assert_eq!(token.0, 1 << 32 | u64::from(granule));
    assert_eq!(region.attach_dmb(token, 0, writer, owner), Ok(place));
    let word = 1 << 44 | 1 << 43 | 2 << 41 | 1 << 26 | 1;
    assert_eq!(region.memory().load(state, Ordering::Relaxed), word);
}
