//! Leader and followers: two threads that wait on one end of a session, and the peer. Or one that waits,
//! the background thread that drains the same connection, and the peer.

use std::sync::Arc;

use ivsmc_proto::ring::{Consumer, Producer};
use ivsmc_proto::turn::{Lead, Turns};
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::{Condvar, Mutex};
use loom::thread;

use crate::explore;
use crate::ring_memory::{place, Descriptor, Lacks, LoomMemory, View};

/// Preemption bound of these models.
const BOUND: usize = 3;

/// What the waiters of one end leave out, to see that the models notice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slip {
    None,
    /// A leader leaves without waking the followers.
    WakesNobody,
    /// A thread leads although a turn has ended since it looked at its condition.
    LeadsUnlooked,
    /// The background thread drains while somebody leads, or is about to.
    DrainsForNobody,
}

/// One end of a session on which several threads wait, as the runtime has it: one leads and
/// sleeps on the descriptor, the others follow on a private futex.
struct End {
    descriptor: Descriptor,
    turns: Turns,
    /// The kernel's side of the futex on the word of `turns`.
    bucket: Mutex<()>,
    woken: Condvar,
    slip: Slip,
}

impl End {
    fn new(slip: Slip) -> End {
        End {
            descriptor: Descriptor::default(),
            turns: Turns::new(),
            bucket: Mutex::default(),
            woken: Condvar::default(),
            slip,
        }
    }

    /// Sleeps until `ready`, which sets the wait word and looks again before it says no.
    fn sleep(&self, mut ready: impl FnMut() -> bool) {
        loop {
            let mut seen = self.turns.see();
            if ready() {
                return;
            }
            if self.slip == Slip::LeadsUnlooked {
                seen = self.turns.see();
            }
            if seen.is_led() {
                self.turns.follow(seen, |word, value| self.futex_wait(word, value));
            } else if let Some(lead) = self.turns.lead(seen) {
                self.descriptor.sleep_and_drain();
                self.end_turn(lead);
            }
        }
    }

    fn end_turn(&self, lead: Lead) {
        self.turns.end(lead, |_| self.futex_wake(), || self.descriptor.drain());
    }

    /// As the background thread, which found bytes.
    fn drain_in_background(&self) {
        if self.slip == Slip::DrainsForNobody {
            self.descriptor.drain();
        } else if let Some(lead) = self.turns.miss() {
            self.end_turn(lead);
        }
    }

    /// Makes every thread inside look at its condition again (a `close` by another thread).
    fn wake_all(&self) {
        self.turns.disturb(|_| self.futex_wake());
        self.descriptor.notify();
    }

    fn futex_wait(&self, word: &AtomicU32, expected: u32) {
        let bucket = self.bucket.lock().unwrap();
        if word.load(Ordering::Acquire) == expected {
            drop(self.woken.wait(bucket).unwrap());
        }
    }

    fn futex_wake(&self) {
        if self.slip != Slip::WakesNobody {
            drop(self.bucket.lock().unwrap());
            self.woken.notify_all();
        }
    }
}

/// A sender that waits for room on ring 0 and a receiver that waits for data on ring 1, on one
/// end; the peer gives both, in the order of `room_first`.
fn two_waiters(room_first: bool, slip: Slip) {
    let memory = Arc::new(LoomMemory::new(2, 1, Lacks::Nothing));
    let end = Arc::new(End::new(slip));
    let mut sender = Producer::new(place(0, 1));
    assert_eq!(sender.write(&View::new(&memory), &[1]), Ok(1));
    let sending = {
        let (m, end) = (View::new(&memory), end.clone());
        thread::spawn(move || {
            end.sleep(|| sender.want_room(&m, 1).unwrap());
            assert_eq!(sender.write(&m, &[2]), Ok(1));
        })
    };
    let receiving = {
        let (m, end) = (View::new(&memory), end.clone());
        thread::spawn(move || {
            let mut receiver = Consumer::new(place(1, 1));
            end.sleep(|| receiver.want_data(&m, 1).unwrap());
            assert_eq!(m.read(&mut receiver, 1), [7]);
        })
    };
    let m = View::new(&memory);
    let mut peer = (Consumer::new(place(0, 1)), Producer::new(place(1, 1)));
    for give_room in [room_first, !room_first] {
        let notify = if give_room {
            assert_eq!(m.read(&mut peer.0, 1), [1]);
            peer.0.take_writer_wait(&m)
        } else {
            assert_eq!(peer.1.write(&m, &[7]), Ok(1));
            peer.1.take_reader_wait(&m)
        };
        if notify {
            end.descriptor.notify();
        }
    }
    sending.join().unwrap();
    receiving.join().unwrap();
}

/// As [`two_waiters`], but the receiver gets no data: it leaves because the session is closed
/// for reading by another thread, while the sender goes on waiting for its room.
fn a_waiter_leaves(slip: Slip) {
    let memory = Arc::new(LoomMemory::new(2, 1, Lacks::Nothing));
    let end = Arc::new(End::new(slip));
    let closed = Arc::new(AtomicU32::new(0));
    let mut sender = Producer::new(place(0, 1));
    assert_eq!(sender.write(&View::new(&memory), &[1]), Ok(1));
    let sending = {
        let (m, end) = (View::new(&memory), end.clone());
        thread::spawn(move || {
            end.sleep(|| sender.want_room(&m, 1).unwrap());
            assert_eq!(sender.write(&m, &[2]), Ok(1));
        })
    };
    let receiving = {
        let (m, end, closed) = (View::new(&memory), end.clone(), closed.clone());
        thread::spawn(move || {
            let mut receiver = Consumer::new(place(1, 1));
            end.sleep(|| closed.load(Ordering::Acquire) == 1 || receiver.want_data(&m, 1).unwrap());
            receiver.clear_wait(&m);
        })
    };
    closed.store(1, Ordering::Release);
    end.wake_all();
    let m = View::new(&memory);
    let mut peer = Consumer::new(place(0, 1));
    assert_eq!(m.read(&mut peer, 1), [1]);
    if peer.take_writer_wait(&m) {
        end.descriptor.notify();
    }
    sending.join().unwrap();
    receiving.join().unwrap();
}

#[test]
fn two_waiters_on_one_end_are_woken_room_first() {
    explore(BOUND, || two_waiters(true, Slip::None));
}

#[test]
fn two_waiters_on_one_end_are_woken_data_first() {
    explore(BOUND, || two_waiters(false, Slip::None));
}

#[test]
fn a_waiter_that_leaves_hands_the_lead_on() {
    explore(BOUND, || a_waiter_leaves(Slip::None));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_leader_that_wakes_nobody_is_noticed() {
    explore(BOUND, || two_waiters(true, Slip::WakesNobody));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_lead_taken_without_a_look_is_noticed() {
    explore(BOUND, || two_waiters(true, Slip::LeadsUnlooked));
}

/// A reader sleeps while the background thread, too, is told of bytes on its connection.
fn a_reader_and_the_background_thread(slip: Slip) {
    let memory = Arc::new(LoomMemory::new(1, 1, Lacks::Nothing));
    let end = Arc::new(End::new(slip));
    let told = Arc::new(Descriptor::default());
    let reading = {
        let (m, end) = (View::new(&memory), end.clone());
        thread::spawn(move || {
            let mut consumer = Consumer::new(place(0, 1));
            end.sleep(|| consumer.want_data(&m, 1).unwrap());
            assert_eq!(m.read(&mut consumer, 1), [7]);
        })
    };
    let background = {
        let (end, told) = (end.clone(), told.clone());
        thread::spawn(move || {
            told.sleep_and_drain();
            end.drain_in_background();
        })
    };
    let m = View::new(&memory);
    let mut peer = Producer::new(place(0, 1));
    assert_eq!(peer.write(&m, &[7]), Ok(1));
    if peer.take_reader_wait(&m) {
        end.descriptor.notify();
    }
    told.notify();
    reading.join().unwrap();
    background.join().unwrap();
}

#[test]
fn a_reader_is_woken_beside_the_background_thread() {
    explore(BOUND, || a_reader_and_the_background_thread(Slip::None));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_background_thread_that_drains_for_nobody_is_noticed() {
    explore(BOUND, || a_reader_and_the_background_thread(Slip::DrainsForNobody));
}
