//! Single transitions; `tests/intent_search.rs` has their orders.

use core::net::SocketAddr;

use super::*;
use crate::heap::HeapMemory;
use crate::layout::MIN_REGION;
use crate::slot::Prover;

fn region() -> (Region<HeapMemory>, SlotRef) {
    let region = Region::attach(HeapMemory::new(MIN_REGION), 1).unwrap();
    let client = region.claim_slot(0, Prover::None).unwrap();
    (region, client)
}

fn key(port: u16) -> IntentKey {
    let endpoint = |text: &str| Endpoint::from(text.parse::<SocketAddr>().unwrap());
    IntentKey {
        client: Endpoint { port, ..endpoint("10.0.0.1:0") },
        server: endpoint("[fd00::2]:80"),
    }
}

/// Brings a new intent to `state`.
fn intent_in(region: &Region<HeapMemory>, client: SlotRef, state: IntentState) -> IntentRef {
    let intent = region.publish_intent(client, &key(40000)).unwrap();
    if state == IntentState::Announced {
        return intent;
    }
    region.connected_intent(&intent).unwrap();
    if state == IntentState::Pending {
        return intent;
    }
    region.match_intent(&intent).unwrap();
    match state {
        IntentState::Refused => region.refuse_intent(&intent).unwrap(),
        IntentState::Committed => region.commit_intent(&intent).unwrap(),
        IntentState::Abandoned => {
            region.commit_intent(&intent).unwrap();
            region.abandon_intent(&intent).unwrap();
        }
        _ => {}
    }
    intent
}

#[test]
fn every_transition_from_every_state() {
    use IntentState::{Abandoned, Announced, Committed, Matched, Pending, Refused};
    type Act = fn(&Region<HeapMemory>, &IntentRef) -> Result<(), Option<IntentState>>;
    // The act, and the states it leaves, with what comes of them.
    type Row = (Act, &'static [(IntentState, Option<IntentState>)]);
    let rows: [Row; 7] = [
        (|r, i| r.connected_intent(i), &[(Announced, Some(Pending))]),
        (|r, i| r.match_intent(i), &[(Pending, Some(Matched))]),
        (|r, i| r.refuse_intent(i), &[(Matched, Some(Refused))]),
        (|r, i| r.commit_intent(i), &[(Matched, Some(Committed))]),
        (|r, i| r.finish_intent(i), &[(Committed, None)]),
        (|r, i| r.abandon_intent(i), &[(Committed, Some(Abandoned))]),
        (
            |r, i| r.withdraw_intent(i),
            &[(Announced, None), (Pending, None), (Matched, None), (Refused, None)],
        ),
    ];
    for (number, (act, leaves)) in rows.into_iter().enumerate() {
        for state in [Announced, Pending, Matched, Committed, Refused, Abandoned] {
            let (region, client) = region();
            let intent = intent_in(&region, client, state);
            let found = act(&region, &intent);
            let now = region.intent_state(&intent);
            if let Some((_, to)) = leaves.iter().find(|(from, _)| *from == state) {
                assert_eq!((found, now), (Ok(()), *to), "{number} {state:?}");
            } else {
                assert_eq!(found, Err(Some(state)), "{number} {state:?}");
                // Only the acceptor that is told of an abandoned intent frees it.
                let freed = state == Abandoned && number == 2;
                assert_eq!(now, Some(state).filter(|_| !freed), "{number} {state:?}");
            }
            // Once freed, no act on that incarnation does anything, also when the entry is reused.
            if now.is_none() {
                let next = region.publish_intent(client, &key(40000)).unwrap();
                assert_eq!(next.index, intent.index);
                for (act, _) in rows {
                    assert_eq!(act(&region, &intent), Err(None));
                }
                assert_eq!(region.key_of(&intent), None);
                assert_eq!(region.intent_state(&next), Some(Announced));
            }
        }
    }
}

#[test]
fn an_intent_is_found_by_its_addresses_while_its_owner_lives() {
    let (region, client) = region();
    let intent = region.publish_intent(client, &key(40000)).unwrap();
    assert_eq!(region.key_of(&intent), Some(key(40000)));
    assert_eq!(region.find_intent(&key(40000)), Some((intent, IntentState::Announced)));
    assert_eq!(region.find_intent(&key(40001)), None);
    let reversed = IntentKey { client: key(40000).server, server: key(40000).client };
    assert_eq!(region.find_intent(&reversed), None);
    region.mark_dead(client);
    assert_eq!(region.find_intent(&key(40000)), None);
    assert_eq!(region.publish_intent(client, &key(40000)), None);
    assert_eq!(region.reclaim(client).intents, 1);
    assert_eq!(region.intent_state(&intent), None);
}

#[test]
fn of_several_clients_on_one_port_the_connected_one_is_found() {
    let (region, client) = region();
    let others = [1, 2].map(|index| region.claim_slot(index, Prover::None).unwrap());
    region.publish_intent(others[0], &key(40000)).unwrap();
    let intent = region.publish_intent(client, &key(40000)).unwrap();
    region.publish_intent(others[1], &key(40000)).unwrap();
    region.connected_intent(&intent).unwrap();
    assert_eq!(region.find_intent(&key(40000)), Some((intent, IntentState::Pending)));
}

#[test]
fn an_abandoned_entry_is_reused_last_and_counts_as_nobodys() {
    let (region, client) = region();
    let abandoned = intent_in(&region, client, IntentState::Abandoned);
    assert_eq!(region.find_intent(&key(40000)), None);
    assert_eq!(region.census().intents, 0);
    for _ in 1..WINDOW {
        assert!(region.publish_intent(client, &key(40000)).is_some());
        assert_eq!(region.intent_state(&abandoned), Some(IntentState::Abandoned));
    }
    let last = region.publish_intent(client, &key(40000)).unwrap();
    assert_eq!(last.index, abandoned.index);
    assert_eq!(region.intent_state(&abandoned), None);
    assert_eq!(region.publish_intent(client, &key(40000)), None);
    // A reaper leaves committed ones for the acceptor.
    region.connected_intent(&last).unwrap();
    region.match_intent(&last).unwrap();
    region.commit_intent(&last).unwrap();
    assert_eq!(region.reclaim(client).intents, WINDOW);
    assert_eq!(region.intent_state(&last), Some(IntentState::Abandoned));
    assert_eq!(region.refuse_intent(&last), Err(Some(IntentState::Abandoned)));
    assert_eq!(region.intent_state(&last), None);
}

#[test]
fn the_sequence_wraps_within_its_bits() {
    let (region, client) = region();
    let intent = region.publish_intent(client, &key(40000)).unwrap();
    let at = region.geometry().intent(intent.index);
    region.withdraw_intent(&intent).unwrap();
    region.set_word(at, SEQUENCES << SEQUENCE_SHIFT);
    let last = region.publish_intent(client, &key(40000)).unwrap();
    assert_eq!((last.index, u64::from(last.sequence)), (intent.index, SEQUENCES));
    region.withdraw_intent(&last).unwrap();
    assert_eq!(region.word(at), 0);
}
