//! Intents: every pair of transitions at once, from every state.
//!
//! Whatever two of client, acceptor, reclaimer and another client do at once, what they are told and
//! what stands in the word then must be as after one of the two orders. Two threads, all preemptions.
//! What the parties do with the answers, and in longer courses, `tests/intent_search.rs` visits.

use std::net::SocketAddr;
use std::rc::Rc;

use ivsmc_proto::host::Endpoint;
use ivsmc_proto::intent::{IntentKey, IntentRef, IntentState};
use ivsmc_proto::memory::Memory;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotRef};
use loom::thread;

use crate::plain::Words;
use crate::region::{explore, Lacks};

/// More preemptions than these models have steps.
const ALL: usize = 30;

/// What somebody does to an intent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Act {
    Connected,
    Match,
    Refuse,
    Commit,
    Withdraw,
    Finish,
    Abandon,
    Reclaim,
    /// Another client takes the entry if it may: all others are taken.
    Publish,
}

const ACTS: [Act; 9] = [
    Act::Connected,
    Act::Match,
    Act::Refuse,
    Act::Commit,
    Act::Withdraw,
    Act::Finish,
    Act::Abandon,
    Act::Reclaim,
    Act::Publish,
];

/// `None`: freed.
const STATES: [Option<IntentState>; 7] = [
    None,
    Some(IntentState::Announced),
    Some(IntentState::Pending),
    Some(IntentState::Matched),
    Some(IntentState::Committed),
    Some(IntentState::Refused),
    Some(IntentState::Abandoned),
];

/// What one is told, as far as it acts on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Told {
    Done,
    /// The acceptor is told of a commitment, or that all is over: it acts on that.
    Committed,
    Abandoned,
    Not,
}

/// An intent, and who else there is.
#[derive(Clone, Copy)]
struct Prepared {
    client: SlotRef,
    other: SlotRef,
    intent: IntentRef,
}

fn key(port: u16, server: u16) -> IntentKey {
    let endpoint = |text: &str| Endpoint::from(text.parse::<SocketAddr>().unwrap());
    let (client, server) = (
        Endpoint { port, ..endpoint("10.0.0.1:0") },
        Endpoint { port: server, ..endpoint("10.0.0.2:0") },
    );
    IntentKey { client, server }
}

/// The only entry of a window that is not taken, in `state`.
fn prepare<M: Memory>(region: &Region<M>, state: Option<IntentState>) -> Prepared {
    let [client, other, crowd] =
        [0, 1, 2].map(|index| region.claim_slot(index, Prover::None).unwrap());
    let intent = region.publish_intent(client, &key(1000, 80)).unwrap();
    while region.publish_intent(crowd, &key(1000, 81)).is_some() {}
    let go = |to: IntentState| match to {
        IntentState::Announced => Ok(()),
        IntentState::Pending => region.connected_intent(&intent),
        IntentState::Matched => region.match_intent(&intent),
        IntentState::Committed => region.commit_intent(&intent),
        IntentState::Refused => region.refuse_intent(&intent),
        IntentState::Abandoned => region.abandon_intent(&intent),
    };
    let way: &[IntentState] = match state {
        None | Some(IntentState::Announced) => &[],
        Some(IntentState::Pending) => &[IntentState::Pending],
        Some(IntentState::Matched) => &[IntentState::Pending, IntentState::Matched],
        Some(last @ (IntentState::Committed | IntentState::Refused)) => {
            &[IntentState::Pending, IntentState::Matched, last]
        }
        Some(IntentState::Abandoned) => &[
            IntentState::Pending,
            IntentState::Matched,
            IntentState::Committed,
            IntentState::Abandoned,
        ],
    };
    way.iter().for_each(|to| go(*to).unwrap());
    if state.is_none() {
        region.withdraw_intent(&intent).unwrap();
    }
    Prepared { client, other, intent }
}

fn act<M: Memory>(region: &Region<M>, act: Act, prepared: &Prepared) -> Told {
    let Prepared { client, other, intent } = prepared;
    let told = |done: bool| if done { Told::Done } else { Told::Not };
    match act {
        Act::Connected => told(region.connected_intent(intent).is_ok()),
        Act::Match => told(region.match_intent(intent).is_ok()),
        Act::Refuse => match region.refuse_intent(intent) {
            Ok(()) => Told::Done,
            Err(Some(IntentState::Committed)) => Told::Committed,
            Err(Some(IntentState::Abandoned)) => Told::Abandoned,
            Err(_) => Told::Not,
        },
        Act::Commit => told(region.commit_intent(intent).is_ok()),
        Act::Withdraw => told(region.withdraw_intent(intent).is_ok()),
        Act::Finish => told(region.finish_intent(intent).is_ok()),
        Act::Abandon => told(region.abandon_intent(intent).is_ok()),
        Act::Reclaim => {
            region.reclaim(*client);
            Told::Done
        }
        Act::Publish => told(region.publish_intent(*other, &key(1000, 82)).is_some()),
    }
}

/// What both are told and what is left: the state of the incarnation, and whose the entry is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Outcome {
    told: [Told; 2],
    state: Option<IntentState>,
    taken: Option<SlotRef>,
    intents: u32,
}

fn outcome<M: Memory>(region: &Region<M>, told: [Told; 2], prepared: &Prepared) -> Outcome {
    let taken = region.find_intent(&key(1000, 82)).map(|(intent, _)| intent.owner());
    let intents = region.census().intents;
    Outcome { told, state: region.intent_state(&prepared.intent), taken, intents }
}

/// The outcome of the two acts one after the other, in this order.
fn in_order(state: Option<IntentState>, acts: [Act; 2], order: &[usize]) -> Outcome {
    let region = Region::attach(Words::default(), 1).unwrap();
    let prepared = prepare(&region, state);
    let mut told = [Told::Not; 2];
    for &number in order {
        told[number] = act(&region, acts[number], &prepared);
    }
    outcome(&region, told, &prepared)
}

fn at_once(state: Option<IntentState>, acts: [Act; 2]) {
    let mut orders: Vec<&[usize]> = vec![&[0, 1], &[1, 0]];
    if acts[1] == Act::Publish {
        // An entry that changes while it is looked at passes for taken: plain TCP, no harm.
        orders.push(&[0]);
    }
    let expected: Vec<Outcome> =
        orders.into_iter().map(|order| in_order(state, acts, order)).collect();
    explore(
        ALL,
        Lacks::Nothing,
        move |region| prepare(region, state),
        move |region, prepared| {
            let second = {
                let (region, prepared) = (Rc::clone(region), *prepared);
                thread::spawn(move || act(&region, acts[1], &prepared))
            };
            let first = act(region, acts[0], prepared);
            let found = outcome(region, [first, second.join().unwrap()], prepared);
            assert!(
                expected.contains(&found),
                "{acts:?} from {state:?}: {found:?}, in order {expected:?}"
            );
        },
    );
}

/// All pairs of `first` with the acts from it on. Only one acceptor has the connection of an intent,
/// and may refuse it.
fn with_all(first: Act) {
    let from = ACTS.iter().position(|act| *act == first).unwrap();
    for second in &ACTS[from..] {
        if [first, *second] == [Act::Refuse, Act::Refuse] {
            continue;
        }
        for state in STATES {
            at_once(state, [first, *second]);
        }
    }
}

macro_rules! pairs {
    ($($name:ident: $act:ident;)*) => {$(
        #[test]
        fn $name() {
            with_all(Act::$act);
        }
    )*};
}

pairs! {
    connected_and_any_other_act: Connected;
    match_and_any_other_act: Match;
    refuse_and_any_other_act: Refuse;
    commit_and_any_other_act: Commit;
    withdraw_and_any_other_act: Withdraw;
    finish_and_any_other_act: Finish;
    abandon_and_any_other_act: Abandon;
    reclaim_and_any_other_act: Reclaim;
    two_publish_at_once: Publish;
}

/// The entry of an intent that ended is taken for another connection while an acceptor looks: it finds
/// each intent by its own addresses only.
fn an_entry_changes_hands(lacks: Lacks) {
    explore(
        4,
        lacks,
        |region| prepare(region, Some(IntentState::Pending)),
        |region, prepared| {
            let changing = {
                let (region, prepared) = (region.clone(), *prepared);
                thread::spawn(move || {
                    region.withdraw_intent(&prepared.intent).unwrap();
                    let intent = region.publish_intent(prepared.other, &key(1000, 82)).unwrap();
                    region.connected_intent(&intent).unwrap();
                })
            };
            let found = region.find_intent(&key(1000, 82)).map(|(intent, _)| intent.owner());
            assert!(found.is_none_or(|at| at == prepared.other), "another's connection");
            let found = region.find_intent(&key(1000, 80)).map(|(intent, _)| intent);
            assert!(found.is_none_or(|intent| intent == prepared.intent), "another's connection");
            let matched = region.match_intent(&prepared.intent).is_ok();
            if matched {
                // The client can only withdraw.
                changing.join().unwrap();
                assert_eq!(region.intent_state(&prepared.intent), None);
            } else {
                changing.join().unwrap();
            }
            assert_eq!(region.key_of(&prepared.intent), None);
        },
    );
}

#[test]
fn an_intent_is_found_by_its_own_addresses() {
    an_entry_changes_hands(Lacks::Nothing);
}

#[test]
#[should_panic(expected = "another's connection")]
fn an_intent_without_orders_is_noticed() {
    an_entry_changes_hands(Lacks::Orders);
}
