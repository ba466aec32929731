//! A claim against the death of who makes it: of each pair at least one side sees the other, so
//! nothing of a dead peer is left. That is what the fence after each claim is for, and the one after
//! the mark.
//!
//! Two threads: the peer claims, a prover that believes it dead reclaims it. Three where the slot is
//! marked by one and reclaimed by another. Who claims here is alive, as after an operator's mistaken
//! word; whom a death stops between its claim and its look is found by `reclaim/tests.rs`.

use std::net::SocketAddr;
use std::sync::Arc;

use ivsmc_proto::directory::Bound;
use ivsmc_proto::dmb::Token;
use ivsmc_proto::host::Endpoint;
use ivsmc_proto::intent::IntentKey;
use ivsmc_proto::memory::Memory;
use ivsmc_proto::reclaim::Census;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotRef, SlotState};
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use crate::region::{explore, Lacks, LoomRegion};

/// Preemption bound of the models with two threads.
const BOUND_OF_TWO: usize = 8;
/// Preemption bound of the models with three threads.
const BOUND_OF_THREE: usize = 5;

/// What a peer claims.
#[derive(Clone, Copy, Debug)]
enum Claim {
    Listener,
    Intent,
    Extent,
    Invitation,
    Attachment,
}

/// What a model begins with.
struct Prepared {
    /// Who claims.
    me: SlotRef,
    /// Whose DMB it attaches to, or whom it invites.
    other: SlotRef,
    /// The DMB to attach to.
    token: Token,
}

fn prepare<M: Memory>(region: &Region<M>, what: Claim) -> Prepared {
    let [me, other] = [0, 1].map(|index| region.claim_slot(index, Prover::None).unwrap());
    let (owner, writer) = match what {
        Claim::Attachment => (other, me),
        _ => (me, other),
    };
    let mut token = Token(0);
    if matches!(what, Claim::Invitation | Claim::Attachment) {
        let extent = region.claim_extent(owner).unwrap();
        assert!(region.open_extent(extent, owner));
    }
    if matches!(what, Claim::Attachment) {
        token = region.invite_dmb(0, 0, writer).unwrap().0;
    }
    Prepared { me, other, token }
}

fn claim(region: &LoomRegion, what: Claim, prepared: &Prepared) {
    let Prepared { me, other, token } = *prepared;
    let endpoint = |text: &str| Endpoint::from(text.parse::<SocketAddr>().unwrap());
    // It may succeed: before the death, as far as it can know.
    let _ = match what {
        Claim::Listener => region.register_listener(me, Bound::Any4, 80).is_some(),
        Claim::Intent => {
            let (client, server) = (endpoint("10.0.0.1:1000"), endpoint("10.0.0.2:80"));
            region.publish_intent(me, &IntentKey { client, server }).is_some()
        }
        Claim::Extent => {
            region.claim_extent(me).is_some_and(|extent| region.open_extent(extent, me))
        }
        Claim::Invitation => region.invite_dmb(0, 0, other).is_ok(),
        Claim::Attachment => region.attach_dmb(token, 0, me, other).is_ok(),
    };
}

/// Nothing is left of the dead; the other has what it had.
fn judge(region: &LoomRegion, what: Claim, prepared: &Prepared) {
    let mut expected = Census { live: 1, ..Census::default() };
    if matches!(what, Claim::Attachment) {
        (expected.extents, expected.dmbs_held) = (1, 1);
    }
    assert_eq!(region.census(), expected, "something of the dead is left");
    assert!(region.is_live(prepared.other));
}

/// The peer claims while it is declared dead and reclaimed.
fn claim_meets_death(what: Claim, lacks: Lacks) {
    explore(
        BOUND_OF_TWO,
        lacks,
        move |region| prepare(region, what),
        move |region, prepared| {
            let me = prepared.me;
            let reaper = {
                let region = region.clone();
                thread::spawn(move || region.reclaim(me))
            };
            claim(region, what, prepared);
            reaper.join().unwrap();
            judge(region, what, prepared);
        },
    );
}

/// One process marks the slot, as its prover; another finds it marked, and reclaims it.
fn claim_meets_a_marked_death(what: Claim, lacks: Lacks) {
    explore(
        BOUND_OF_THREE,
        lacks,
        move |region| prepare(region, what),
        move |region, prepared| {
            let me = prepared.me;
            let prover = {
                let region = region.clone();
                thread::spawn(move || region.mark_dead(me))
            };
            let finder = {
                let region = region.clone();
                thread::spawn(move || {
                    if matches!(region.slot_state(me.index), SlotState::Dead { .. }) {
                        region.reclaim(me);
                    }
                })
            };
            claim(region, what, prepared);
            prover.join().unwrap();
            finder.join().unwrap();
            if matches!(region.slot_state(me.index), SlotState::Dead { .. }) {
                region.reclaim(me);
            }
            judge(region, what, prepared);
        },
    );
}

macro_rules! models {
    ($($what:ident: $both:ident, $marked:ident;)*) => {$(
        #[test]
        fn $both() {
            claim_meets_death(Claim::$what, Lacks::Nothing);
        }

        #[test]
        fn $marked() {
            claim_meets_a_marked_death(Claim::$what, Lacks::Nothing);
        }
    )*};
}

models! {
    Listener: a_listener_meets_death, a_listener_meets_a_marked_death;
    Intent: an_intent_meets_death, an_intent_meets_a_marked_death;
    Extent: an_extent_meets_death, an_extent_meets_a_marked_death;
    Invitation: an_invitation_meets_death, an_invitation_meets_a_marked_death;
    Attachment: an_attachment_meets_death, an_attachment_meets_a_marked_death;
}

/// A peer is invited while it is reclaimed, and takes the invitation: where the reclaimer has not seen
/// that, the peer sees that it is dead.
#[test]
fn an_invitation_of_the_dead_is_not_taken() {
    explore(
        BOUND_OF_THREE,
        Lacks::Nothing,
        |region| {
            let prepared = prepare(region, Claim::Attachment);
            region.release_dmb(prepared.token);
            prepared
        },
        |region, &Prepared { me, other, .. }| {
            let sent = Arc::new(AtomicU64::new(0));
            let reaper = {
                let region = region.clone();
                thread::spawn(move || region.reclaim(me))
            };
            let inviting = {
                let (region, sent) = (region.clone(), sent.clone());
                thread::spawn(move || {
                    let (token, _) = region.invite_dmb(0, 0, me).unwrap();
                    sent.store(token.0, Ordering::Release);
                })
            };
            let token = Token(sent.load(Ordering::Acquire));
            if token.0 != 0 {
                let _ = region.attach_dmb(token, 0, me, other);
            }
            reaper.join().unwrap();
            inviting.join().unwrap();
            assert_eq!(region.census().dmbs_attached, 0, "something of the dead is left");
        },
    );
}

// Not of attachments: both sides change one word there, from invited on, and the second sees the first.

#[test]
#[should_panic(expected = "something of the dead is left")]
fn a_listener_without_fences_is_noticed() {
    claim_meets_death(Claim::Listener, Lacks::Fences);
}

#[test]
#[should_panic(expected = "something of the dead is left")]
fn an_intent_without_fences_is_noticed() {
    claim_meets_death(Claim::Intent, Lacks::Fences);
}

#[test]
#[should_panic(expected = "something of the dead is left")]
fn an_extent_without_fences_is_noticed() {
    claim_meets_death(Claim::Extent, Lacks::Fences);
}

#[test]
#[should_panic(expected = "something of the dead is left")]
fn an_invitation_without_fences_is_noticed() {
    claim_meets_death(Claim::Invitation, Lacks::Fences);
}
