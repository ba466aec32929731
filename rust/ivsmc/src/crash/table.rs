//! The table of `PROTOCOL.md`, the failpoints in the sources and the tests here are the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// How a failpoint's name is handed over, first of all arguments.
const CALLS: [&str; 4] = ["reached", "step", "advance", "free_intent"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// How often each of `names` is there.
fn count(names: impl IntoIterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for name in names {
        *counts.entry(name).or_default() += 1;
    }
    counts
}

/// The first column of the table "Crash points", whose rows are full.
fn table() -> Vec<String> {
    let text = fs::read_to_string(root().join("rust/proto/PROTOCOL.md")).unwrap();
    let (_, section) = text.split_once("\n## Crash points\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |"));
    let rows = rows.map(|row| row.split(" | ").collect::<Vec<_>>());
    rows.map(|cells| {
        assert!(cells.len() == 5 && cells.iter().all(|cell| !cell.is_empty()), "{cells:?}");
        cells[0].trim_end_matches('`').to_owned()
    })
    .collect()
}

/// Every file of Rust below `directory` but these tests.
fn sources(directory: &Path, into: &mut Vec<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|end| end == "rs")
            && path.parent().is_some_and(|directory| !directory.ends_with("crash"))
        {
            into.push(fs::read_to_string(&path).unwrap());
        }
    }
}

/// The names that stand as first argument of one of [`CALLS`]; and how often one that was handed
/// over is handed on.
fn failpoints() -> (Vec<String>, usize) {
    let mut texts = Vec::new();
    for source in ["rust/proto/src", "rust/shm/src", "rust/ivsmc/src", "rust/python/src"] {
        sources(&root().join(source), &mut texts);
    }
    let (mut names, mut handed_on) = (Vec::new(), 0);
    for text in &texts {
        for call in CALLS {
            let calls = text.split(call).skip(1).filter_map(|rest| rest.strip_prefix('('));
            for first in calls.map(str::trim_start) {
                handed_on += usize::from(first.starts_with("name)") || first.starts_with("name,"));
                let name = first.strip_prefix('"').and_then(|first| first.split_once('"'));
                names.extend(name.map(|(name, _)| name.to_owned()));
            }
        }
    }
    (names, handed_on)
}

#[test]
fn the_table_the_failpoints_and_the_tests_are_the_same() {
    let tests = [
        super::agent::NAMES,
        super::connecting::NAMES,
        super::ivshmem_server::NAMES,
        super::joining::NAMES,
        super::leaving::NAMES,
        super::listening::NAMES,
        super::local::NAMES,
        super::notifying::NAMES,
        super::reclaiming::NAMES,
        super::streaming::NAMES,
    ];
    let tests = count(tests.concat().into_iter().map(str::to_owned));
    let (failpoints, handed_on) = failpoints();
    let failpoints = count(failpoints);
    // `step`, `advance` and `free_intent` do.
    assert_eq!(handed_on, CALLS.len() - 1, "another that takes names is missing in CALLS");
    // One failpoint is one step: each name stands in the sources once.
    assert!(failpoints.values().all(|count| *count == 1), "{failpoints:?}");
    assert!(failpoints.len() > 60, "{failpoints:?}");
    assert_eq!(count(table()), failpoints, "the table, and the failpoints");
    assert_eq!(tests, failpoints, "the tests, and the failpoints");
}
