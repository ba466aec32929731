//! Summary bits and the doorbell: two sessions of one process, a thread asleep on each, and the peer.

use std::sync::Arc;

use ivsmc_proto::ring::{Consumer, Producer};
use ivsmc_proto::summary;
use loom::sync::{Condvar, Mutex};
use loom::thread;

use crate::explore;
use crate::ring_memory::{place, Lacks, LoomMemory, View, SUMMARY};

/// Preemption bound of these models.
const BOUND: usize = 3;

/// What is left out or turned round around the doorbell, to see that the models notice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// The doorbell is notified before the bit is set.
    NotifiesFirst,
    /// The bits are taken before the doorbell is drained.
    TakesFirst,
    /// A leader leaves and nobody leads after it.
    LeavesTheLead,
}

/// Two sessions of one process, each with a thread that sleeps, and one doorbell for both, as the
/// runtime has it: one thread leads, drains and wakes the other by its bell.
struct Door {
    /// What the kernel has: the doorbell's count, and that of either thread's bell.
    counts: Mutex<(usize, [usize; 2])>,
    arrived: Condvar,
    /// Who sleeps, and who of them leads.
    sleepers: Mutex<([bool; 2], Option<usize>)>,
    fault: Fault,
}

impl Door {
    fn new(fault: Fault) -> Door {
        Door {
            counts: Mutex::new((0, [0; 2])),
            arrived: Condvar::new(),
            sleepers: Mutex::new(([false; 2], None)),
            fault,
        }
    }

    fn notify(&self, m: &View, number: u16) {
        if self.fault != Fault::NotifiesFirst {
            summary::set(m, SUMMARY, number);
        }
        self.counts.lock().unwrap().0 += 1;
        self.arrived.notify_all();
        if self.fault == Fault::NotifiesFirst {
            summary::set(m, SUMMARY, number);
        }
    }

    fn ring(&self, bell: usize) {
        self.counts.lock().unwrap().1[bell] += 1;
        self.arrived.notify_all();
    }

    /// Polls the own bell, and the doorbell if this thread leads; whether either has something.
    fn poll(&self, me: usize, leads: bool) -> (bool, bool) {
        let mut counts = self.counts.lock().unwrap();
        while counts.1[me] == 0 && (!leads || counts.0 == 0) {
            counts = self.arrived.wait(counts).unwrap();
        }
        let rung = std::mem::take(&mut counts.1[me]) > 0;
        (rung, leads && counts.0 > 0)
    }

    /// Wakes whom the doorbell concerns; whether that is the caller.
    fn drain(&self, m: &View, me: usize) -> bool {
        let mut taken = [false; 2];
        let mut take = || summary::take(m, SUMMARY, |number| taken[usize::from(number)] = true);
        if self.fault == Fault::TakesFirst {
            take();
            self.counts.lock().unwrap().0 = 0;
        } else {
            self.counts.lock().unwrap().0 = 0;
            take();
        }
        if taken[1 - me] {
            self.ring(1 - me);
        }
        taken[me]
    }

    /// Sleeps until `ready`, which sets the wait word and looks again before it says no.
    fn sleep(&self, m: &View, me: usize, mut ready: impl FnMut() -> bool) {
        while !ready() {
            {
                let mut sleepers = self.sleepers.lock().unwrap();
                sleepers.0[me] = true;
                sleepers.1.get_or_insert(me);
            }
            loop {
                let leads = self.sleepers.lock().unwrap().1 == Some(me);
                let (rung, doorbell) = self.poll(me, leads);
                if doorbell && self.drain(m, me) {
                    break;
                }
                // Another leader woke this thread, or left the lead to it.
                if rung && ready() {
                    break;
                }
            }
            let next = {
                let mut sleepers = self.sleepers.lock().unwrap();
                sleepers.0[me] = false;
                if sleepers.1 == Some(me) && self.fault != Fault::LeavesTheLead {
                    sleepers.1 = sleepers.0[1 - me].then_some(1 - me);
                    sleepers.1
                } else {
                    None
                }
            };
            if let Some(next) = next {
                self.ring(next);
            }
        }
    }
}

/// The peer sends one byte on either session; each thread waits for its own.
fn two_sessions_and_one_doorbell(fault: Fault) {
    let memory = Arc::new(LoomMemory::new(2, 1, Lacks::Nothing));
    let door = Arc::new(Door::new(fault));
    let receive = |session: u16| {
        let (m, door) = (View::new(&memory), door.clone());
        move || {
            let mut consumer = Consumer::new(place(u64::from(session), 1));
            door.sleep(&m, usize::from(session), || consumer.want_data(&m, 1).unwrap());
            assert_eq!(m.read(&mut consumer, 1), [7]);
        }
    };
    let threads = [thread::spawn(receive(0)), thread::spawn(receive(1))];
    let m = View::new(&memory);
    for session in [0, 1] {
        let mut producer = Producer::new(place(u64::from(session), 1));
        assert_eq!(producer.write(&m, &[7]), Ok(1));
        if producer.take_reader_wait(&m) {
            door.notify(&m, session);
        }
    }
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_doorbell_wakes_the_session_it_is_about() {
    explore(BOUND, || two_sessions_and_one_doorbell(Fault::None));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_doorbell_before_its_bit_is_noticed() {
    explore(BOUND, || two_sessions_and_one_doorbell(Fault::NotifiesFirst));
}

#[test]
#[should_panic(expected = "deadlock")]
fn bits_taken_before_the_doorbell_is_drained_are_noticed() {
    explore(BOUND, || two_sessions_and_one_doorbell(Fault::TakesFirst));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_doorbell_that_nobody_leads_on_is_noticed() {
    explore(BOUND, || two_sessions_and_one_doorbell(Fault::LeavesTheLead));
}
