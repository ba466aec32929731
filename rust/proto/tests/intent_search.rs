//! A search through every state of the intent protocol: each order in which clients, acceptor,
//! plain programs, kills and a reaper can act on one pair of addresses.
//!
//! What the model contains of its own is TCP (one connection per pair of addresses at a time, an
//! accept queue from which given-up connections still come, ends of streams that arrive late) and
//! the actors' decisions as `PROTOCOL.md` prescribes them. Every change of the shared words is
//! made by the real `Region` on a memory that is restored for each step.
//!
//! The tests at the end leave one rule out each and must find a violation: so the search can fail,
//! and the rule is needed.

use std::collections::HashMap;

use model::{settle, violation, Model, Rules, World, RULES};

#[path = "intent_search/model.rs"]
mod model;
#[path = "intent_search/words.rs"]
mod words;

/// What the search found.
#[derive(Debug)]
struct Found {
    states: usize,
    ends: usize,
    /// The first violation, and how it came about.
    violation: Option<(&'static str, Vec<&'static str>)>,
}

/// Visits every state that can be reached with `clients` ivsmc clients and `programs`
/// connections of plain programs, breadth first: the first violation is a shortest one.
fn search(rules: Rules, clients: usize, programs: usize) -> Found {
    let model = Model::new(rules);
    let start = World::start(clients, programs);
    let mut numbers = HashMap::from([(start.clone(), 0)]);
    let mut worlds = vec![start];
    let mut origins = vec![(0, "start")];
    let mut edges: Vec<(usize, usize)> = Vec::new();
    let mut ends = Vec::new();
    let mut at = 0;
    while at < worlds.len() {
        let next = model.successors(&worlds[at].clone());
        let mut broken = None;
        if next.is_empty() {
            ends.push(at);
            broken = model.stuck(&worlds[at]).map(|what| (what, "nothing goes on"));
        }
        for (label, mut world) in next {
            broken = broken.or(violation(&world).map(|what| (what, label)));
            settle(&mut world);
            let number = *numbers.entry(world).or_insert_with_key(|world| {
                worlds.push(world.clone());
                origins.push((at, label));
                worlds.len() - 1
            });
            edges.push((number, at));
        }
        if let Some((what, label)) = broken {
            let mut path = path(&origins, at);
            path.push(label);
            let violation = Some((what, path));
            return Found { states: worlds.len(), ends: ends.len(), violation };
        }
        at += 1;
    }
    // Everything ends: from each state an end can be reached.
    let without_end = reach_backwards(worlds.len(), &mut edges, &ends);
    let violation = without_end.map(|state| ("no end can be reached", path(&origins, state)));
    Found { states: worlds.len(), ends: ends.len(), violation }
}

/// The steps that led to state `at`.
fn path(origins: &[(usize, &'static str)], mut at: usize) -> Vec<&'static str> {
    let mut steps = Vec::new();
    while at != 0 {
        steps.push(origins[at].1);
        at = origins[at].0;
    }
    steps.reverse();
    steps
}

/// A state from which none of `ends` can be reached, if there is one. `edges` are (to, from).
fn reach_backwards(states: usize, edges: &mut [(usize, usize)], ends: &[usize]) -> Option<usize> {
    edges.sort_unstable();
    let mut reached = vec![false; states];
    let mut todo = ends.to_vec();
    while let Some(state) = todo.pop() {
        if !std::mem::replace(&mut reached[state], true) {
            let first = edges.partition_point(|(to, _)| *to < state);
            let into = edges[first..].iter().take_while(|(to, _)| *to == state);
            todo.extend(into.map(|(_, from)| *from));
        }
    }
    reached.iter().position(|reached| !reached)
}

/// The search with one rule changed must find that it was needed.
fn needs(what: &str, rules: Rules, expected: &[&str]) {
    let found = search(rules, 2, 1);
    let (violation, path) = found
        .violation
        .unwrap_or_else(|| panic!("{} states without {what}: no violation", found.states));
    println!("without {what}, after {} states: {violation}", found.states);
    for step in path {
        println!("    {step}");
    }
    assert!(expected.contains(&violation), "{violation}");
}

/// 380,000 states. With `IVSMC_SEARCH=large` several millions, best in a release build.
#[test]
fn the_protocol_holds_in_every_state() {
    let mut sizes = vec![(1, 2), (2, 1)];
    if std::env::var_os("IVSMC_SEARCH").is_some_and(|size| size == "large") {
        sizes.extend([(1, 4), (2, 2)]);
    }
    for (clients, programs) in sizes {
        let Found { states, ends, violation } = search(RULES, clients, programs);
        println!("{clients} clients, {programs} plain connects: {states} states, {ends} ends");
        if let Some((what, path)) = violation {
            panic!("{what}:\n{}", path.join("\n"));
        }
        assert!(states > 10_000, "the search ended early");
    }
}

#[test]
fn without_committing_it_is_wrong() {
    needs("COMMITTED", Rules { committed: false, ..RULES }, &["a CLC byte reached a plain end"]);
}

#[test]
fn without_announcing_it_is_wrong() {
    needs("ANNOUNCED", Rules { announced: false, ..RULES }, &["a CLC byte reached a plain end"]);
}

#[test]
fn without_announcing_but_with_orphans_it_is_wrong() {
    let rules = Rules { announced: false, orphans: true, ..RULES };
    needs("ANNOUNCED, orphans taken", rules, &["a plain byte was taken for CLC"]);
}

#[test]
fn without_looking_for_established_it_is_wrong() {
    needs(
        "ESTABLISHED",
        Rules { established: false, ..RULES },
        &["a CLC byte reached a plain end"],
    );
}

#[test]
fn looking_before_pending_is_wrong() {
    needs(
        "the order of looks",
        Rules { looks_after_pending: false, ..RULES },
        &["a CLC byte reached a plain end"],
    );
}

#[test]
fn refusing_without_asking_the_word_is_wrong() {
    needs(
        "the answer of a refusal",
        Rules { refuses: false, ..RULES },
        &["a CLC byte reached a plain end"],
    );
}

#[test]
fn freeing_the_committed_intents_of_the_dead_is_wrong() {
    let rules = Rules { reaper_abandons: false, ..RULES };
    needs("ABANDONED by the reaper", rules, &["a CLC byte reached a plain end"]);
}

#[test]
fn freeing_a_committed_intent_without_an_answer_is_wrong() {
    let rules = Rules { client_abandons: false, ..RULES };
    needs("ABANDONED by the client", rules, &["a CLC byte reached a plain end"]);
}

/// A byte that has come before the match is a reason not to wait for a commit; were it not looked
/// for, the refusal would find it, since only a committed client sends CLC messages.
#[test]
fn looking_into_the_receive_queue_only_saves_time() {
    let found = search(Rules { empty_queue: false, ..RULES }, 1, 2);
    assert!(found.violation.is_none(), "{found:?}");
}
