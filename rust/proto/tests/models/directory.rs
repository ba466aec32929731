//! The directory: an entry that changes hands while somebody looks for listeners. Entering against
//! the death of who enters is in `claims`.

use std::net::{IpAddr, SocketAddr};

use ivsmc_proto::directory::Bound;
use ivsmc_proto::host::{HostIdentity, HostRecord, Ip};
use ivsmc_proto::memory::Memory;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotRef};
use loom::thread;

use crate::region::{explore, Lacks, LoomRegion};

/// Preemption bound of these models, which have two threads.
const BOUND: usize = 6;

fn bound(text: &str) -> Bound {
    Bound::One(Ip::from(text.parse::<IpAddr>().unwrap()))
}

fn find(region: &LoomRegion, dest: &str) -> Option<SlotRef> {
    let identity = HostIdentity { boot: 9, netns: 9, ivposition: 9 };
    let dest = dest.parse::<SocketAddr>().unwrap();
    region.find_listener(dest.into(), &HostRecord::new(identity, &[]))
}

fn slots<M: Memory>(region: &Region<M>) -> [SlotRef; 2] {
    [0, 1].map(|index| region.claim_slot(index, Prover::None).unwrap())
}

/// A listener dies, its entry is reclaimed and taken by another, with the same port: who looks finds
/// one of the two by its own address, or nobody.
fn an_entry_changes_hands(lacks: Lacks) {
    explore(
        BOUND,
        lacks,
        |region| {
            let slots = slots(region);
            region.register_listener(slots[0], bound("10.0.0.1"), 80).unwrap();
            slots
        },
        |region, &[first, next]| {
            let changing = {
                let region = region.clone();
                thread::spawn(move || {
                    region.reclaim(first);
                    assert!(region.register_listener(next, bound("10.0.0.2"), 80).is_some());
                })
            };
            let found = [find(region, "10.0.0.2:80"), find(region, "10.0.0.1:80")];
            assert!(found[0].is_none_or(|at| at == next), "another's listener: {found:?}");
            assert!(found[1].is_none_or(|at| at == first), "another's listener: {found:?}");
            changing.join().unwrap();
            assert_eq!(find(region, "10.0.0.2:80"), Some(next));
            assert_eq!(find(region, "10.0.0.1:80"), None);
        },
    );
}

#[test]
fn a_listener_is_found_by_its_own_address() {
    an_entry_changes_hands(Lacks::Nothing);
}

#[test]
#[should_panic(expected = "another's listener")]
fn an_entry_without_orders_is_noticed() {
    an_entry_changes_hands(Lacks::Orders);
}

/// The same by one owner, with another port: nobody finds the address of one at the port of the other.
#[test]
fn addresses_and_ports_are_of_one_listener() {
    explore(
        BOUND,
        Lacks::Nothing,
        |region| {
            let slots = slots(region);
            (slots[0], region.register_listener(slots[0], bound("10.0.0.1"), 80).unwrap())
        },
        |region, &(owner, entry)| {
            let changing = {
                let region = region.clone();
                thread::spawn(move || {
                    assert!(region.unregister_listener(entry));
                    assert!(region.register_listener(owner, bound("10.0.0.2"), 81).is_some());
                })
            };
            assert_eq!(find(region, "10.0.0.2:80"), None, "two listeners mixed");
            assert_eq!(find(region, "10.0.0.1:81"), None, "two listeners mixed");
            changing.join().unwrap();
        },
    );
}

/// The same with the same port: nobody finds an address that is half of one and half of the other.
#[test]
fn an_address_is_of_one_listener() {
    explore(
        BOUND,
        Lacks::Nothing,
        |region| {
            let slots = slots(region);
            (slots[0], region.register_listener(slots[0], bound("fd00::1"), 80).unwrap())
        },
        |region, &(owner, entry)| {
            let changing = {
                let region = region.clone();
                thread::spawn(move || {
                    assert!(region.unregister_listener(entry));
                    assert!(region.register_listener(owner, bound("fd01::2"), 80).is_some());
                })
            };
            assert_eq!(find(region, "[fd01::1]:80"), None, "two listeners mixed");
            assert_eq!(find(region, "[fd00::2]:80"), None, "two listeners mixed");
            changing.join().unwrap();
        },
    );
}

/// Two enter at once: each has an entry of its own, and both are found.
#[test]
fn two_enter_at_once() {
    explore(BOUND, Lacks::Nothing, slots, |region, &[first, second]| {
        let other = {
            let region = region.clone();
            thread::spawn(move || region.register_listener(second, bound("10.0.0.2"), 80))
        };
        assert!(region.register_listener(first, bound("10.0.0.1"), 80).is_some());
        assert!(other.join().unwrap().is_some());
        assert_eq!(find(region, "10.0.0.1:80"), Some(first));
        assert_eq!(find(region, "10.0.0.2:80"), Some(second));
    });
}
