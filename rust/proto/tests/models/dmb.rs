//! A DMB from both sides: the writer attaches, writes, and leaves or dies; the owner lets go or dies;
//! whoever proved a death reclaims; and somebody else waits for the memory. In every order: the
//! memory is nobody else's while the writer may write, it has one writer, and it is free at the end.
//!
//! Three threads: the writer's side, the owner's side, the newcomer. What follows a death on either
//! side is its reclaimer's, who proved it by something that ends with the dead one: so what the dead
//! did comes first.

use ivsmc_proto::dmb::{Release, Token};
use ivsmc_proto::slot::SlotRef;
use loom::thread;

use crate::extent::{claim_and_use, slots_and_extents, use_memory};
use crate::region::{explore, Lacks, LoomRegion};

/// Preemption bound of these models.
const BOUND: usize = 5;

/// How the writer ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Writer {
    /// It has been attached before, writes, and lets go.
    Detaches,
    /// It attaches if it still can, writes, and lets go.
    AttachesAndDetaches,
    /// It dies before it has attached.
    DiesInvited,
    /// It attaches if it still can, writes, and dies.
    DiesAttached,
}

/// How the owner ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Owner {
    /// It lets go, and invites another writer as soon as the DMB is idle.
    Releases,
    /// It lets go and leaves the region.
    Leaves,
    /// It dies.
    Dies,
}

fn writers_side(region: &LoomRegion, how: Writer, token: Token, me: SlotRef, owner: SlotRef) {
    let attached = match how {
        Writer::Detaches => true,
        Writer::AttachesAndDetaches | Writer::DiesAttached => {
            region.attach_dmb(token, 0, me, owner).is_ok()
        }
        Writer::DiesInvited => false,
    };
    if attached {
        use_memory(region, token.granule());
    }
    match how {
        Writer::Detaches | Writer::AttachesAndDetaches => {
            assert_eq!(region.detach_dmb(token, me), attached, "its place was taken away");
        }
        Writer::DiesInvited | Writer::DiesAttached => {
            region.reclaim(me);
        }
    }
}

fn owners_side(region: &LoomRegion, how: Owner, token: Token, me: SlotRef, another: SlotRef) {
    if how == Owner::Dies {
        region.reclaim(me);
        return;
    }
    let released = region.release_dmb(token);
    if how == Owner::Leaves {
        region.free_extent(0, me);
        region.reclaim(me);
    } else if released == Release::Free || region.dmb_is_idle(token.granule()) {
        // The other writer is another thread's; what it does comes after what it was told.
        let (token, _) = region.invite_dmb(token.granule(), 0, another).expect("idle");
        region.attach_dmb(token, 0, another, me).expect("invited");
        use_memory(region, token.granule());
        assert!(region.detach_dmb(token, another), "two writers");
        assert_eq!(region.release_dmb(token), Release::Free);
    }
}

fn meet(writer: Writer, owner: Owner, lacks: Lacks) {
    explore(
        BOUND,
        lacks,
        move |region| {
            let slots = slots_and_extents(region, 1);
            assert_eq!(region.claim_extent(slots[0]), Some(0));
            assert!(region.open_extent(0, slots[0]));
            let (token, _) = region.invite_dmb(0, 0, slots[1]).unwrap();
            if writer == Writer::Detaches {
                region.attach_dmb(token, 0, slots[1], slots[0]).unwrap();
            }
            (slots, token)
        },
        move |region, &([reader, peer, newcomer], token)| {
            let writing = {
                let region = region.clone();
                thread::spawn(move || writers_side(&region, writer, token, peer, reader))
            };
            // Only a dead owner's memory comes to others in another way than by the allocator.
            let waiting = (owner != Owner::Releases).then(|| {
                let region = region.clone();
                thread::spawn(move || claim_and_use(&region, newcomer))
            });
            owners_side(region, owner, token, reader, newcomer);
            writing.join().unwrap();
            let claimed = waiting.and_then(|waiting| waiting.join().unwrap());
            let expected = match (owner, claimed) {
                (Owner::Releases, _) => Some(reader),
                (_, Some(_)) => Some(newcomer),
                (_, None) => None,
            };
            assert_eq!(region.extent_owner(0), expected, "not free at the end");
            assert!(region.dmb_is_idle(token.granule()), "not idle at the end");
            if owner == Owner::Releases {
                assert!(region.free_extent(0, reader), "not free at the end");
            }
        },
    );
}

macro_rules! models {
    ($($name:ident: $writer:ident, $owner:ident;)*) => {$(
        #[test]
        fn $name() {
            meet(Writer::$writer, Owner::$owner, Lacks::Nothing);
        }
    )*};
}

models! {
    both_let_go: Detaches, Releases;
    the_writer_comes_while_the_owner_lets_go: AttachesAndDetaches, Releases;
    an_invited_writer_dies_while_the_owner_lets_go: DiesInvited, Releases;
    the_writer_dies_while_the_owner_lets_go: DiesAttached, Releases;
    the_writer_leaves_while_the_owner_leaves: Detaches, Leaves;
    the_writer_comes_while_the_owner_leaves: AttachesAndDetaches, Leaves;
    the_writer_dies_while_the_owner_leaves: DiesAttached, Leaves;
    the_writer_leaves_while_the_owner_dies: Detaches, Dies;
    the_writer_comes_while_the_owner_dies: AttachesAndDetaches, Dies;
    an_invited_writer_and_the_owner_die: DiesInvited, Dies;
    both_die: DiesAttached, Dies;
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_dmb_without_orders_is_noticed() {
    meet(Writer::Detaches, Owner::Releases, Lacks::Orders);
}

/// Two DMBs of one dead owner, and their two writers let go at once: the second frees the extent. (Of one
/// DMB alone both change the one word, and the second sees the first.) Two threads.
#[test]
fn of_two_writers_the_last_frees_the_orphan() {
    two_writers_of_an_orphan(Lacks::Nothing);
}

#[test]
#[should_panic(expected = "not free at the end")]
fn an_orphan_without_fences_is_noticed() {
    two_writers_of_an_orphan(Lacks::Fences);
}

fn two_writers_of_an_orphan(lacks: Lacks) {
    explore(
        BOUND,
        lacks,
        |region| {
            let slots = slots_and_extents(region, 1);
            assert_eq!(region.claim_extent(slots[0]), Some(0));
            assert!(region.open_extent(0, slots[0]));
            let tokens = [0, 1].map(|granule| {
                let (token, _) = region.invite_dmb(granule, 0, slots[1]).unwrap();
                region.attach_dmb(token, 0, slots[1], slots[0]).unwrap();
                token
            });
            region.reclaim(slots[0]);
            assert_eq!(region.extent_owner(0), Some(slots[0]));
            (slots, tokens)
        },
        |region, &([_, writer, _], tokens)| {
            let first = {
                let region = region.clone();
                thread::spawn(move || assert!(region.detach_dmb(tokens[0], writer)))
            };
            assert!(region.detach_dmb(tokens[1], writer));
            first.join().unwrap();
            assert_eq!(region.extent_owner(0), None, "not free at the end");
        },
    );
}
