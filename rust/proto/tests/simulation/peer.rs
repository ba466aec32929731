//! What an attached process does with memory: sessions, and leaving.

use std::mem::MaybeUninit;
use std::rc::Rc;

use ivsmc_proto::allocator::Allocator;
use ivsmc_proto::directory::ListenerEntry;
use ivsmc_proto::dmb::{Release, Token};
use ivsmc_proto::intent::IntentRef;
use ivsmc_proto::judge::Locks;
use ivsmc_proto::layout::Geometry;
use ivsmc_proto::ring::{Consumer, Producer};
use ivsmc_proto::slot::SlotRef;

use crate::counts::count;
use crate::world::{Process, World};

/// What a process knows of what it has. It dies with the process.
pub(crate) struct Local {
    allocator: Allocator,
    /// DMBs that others write, and their ends of the rings.
    pub(crate) reads: Vec<(Token, u8, Consumer)>,
    /// Let go while the writer was there.
    limbo: Vec<(Token, u8)>,
    /// DMBs of others.
    pub(crate) writes: Vec<(Token, Producer)>,
    pub(crate) listeners: Vec<ListenerEntry>,
    pub(crate) intent: Option<IntentRef>,
}

/// What a writer is sent over TCP.
#[derive(Clone, Copy)]
pub(crate) struct Invitation {
    token: Token,
    class: u8,
    owner: SlotRef,
}

impl Local {
    pub(crate) fn new(geometry: &Geometry) -> Local {
        Local {
            allocator: Allocator::new(geometry),
            reads: Vec::new(),
            limbo: Vec::new(),
            writes: Vec::new(),
            listeners: Vec::new(),
            intent: None,
        }
    }
}

/// Byte `at` of the stream into the DMB `token`.
fn byte(token: Token, at: u64) -> u8 {
    let mixed = (token.0 ^ at.wrapping_mul(0x9e37_79b9)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed.to_le_bytes()[7]
}

impl World {
    /// Has an attached process do one thing with what it has. It loses that if it is killed.
    pub(crate) fn with_local<T>(
        &self,
        process: &Rc<Process>,
        act: impl FnOnce(&mut Local, SlotRef) -> T,
    ) -> Option<T> {
        let me = process.slot.get()?;
        let fresh = Local::new(process.region.geometry());
        let mut local = process.local.replace(fresh);
        let done = self.run(process, || {
            let done = act(&mut local, me);
            *process.local.borrow_mut() = local;
            done
        });
        done
    }

    /// Makes a DMB for `writer` and tells it.
    pub(crate) fn invite(&self, process: &Rc<Process>, writer: &Rc<Process>) {
        let Some(to) = writer.slot.get() else { return };
        let class = [0, 0, 0, 1, 2, 4][self.random.below(6)];
        self.with_local(process, |local, me| {
            let region = &process.region;
            let class = class.min(region.geometry().largest_class());
            let granule = local.allocator.allocate(class).or_else(|| {
                let extent = region.claim_extent(me)?;
                if !region.open_extent(extent, me) {
                    region.free_extent(extent, me);
                    return None;
                }
                local.allocator.add_extent(extent);
                local.allocator.allocate(class)
            });
            let Some(granule) = granule else { return };
            let (token, place) = region.invite_dmb(granule, class, to).expect("an idle place");
            local.reads.push((token, class, Consumer::new(place)));
            writer.inbox.borrow_mut().push(Invitation { token, class, owner: me });
        });
    }

    /// Attaches to a DMB that it was told of.
    pub(crate) fn attach(&self, process: &Rc<Process>) {
        let Some(invitation) = process.inbox.borrow_mut().pop() else { return };
        let Invitation { token, class, owner } = invitation;
        self.with_local(process, |local, me| {
            let attached = process.region.attach_dmb(token, class, me, owner);
            assert!(process.region.attach_dmb(token, class, me, owner).is_err(), "attached twice");
            if let Ok(place) = attached {
                count(&self.counts.sessions);
                local.writes.push((token, Producer::new(place)));
            }
        });
    }

    /// Writes into one of the DMBs of others.
    pub(crate) fn write(&self, process: &Rc<Process>) {
        let nth = self.random.below(64);
        let most = 1 + self.random.below(48);
        self.with_local(process, |local, _| {
            let all = local.writes.len().max(1);
            let Some((token, producer)) = local.writes.get_mut(nth % all) else { return };
            let from = producer.produced();
            let bytes: Vec<u8> = (from..).map(|at| byte(*token, at)).take(most).collect();
            producer.write(process.region.memory(), &bytes).expect("nobody breaks a rule");
        });
    }

    /// Reads from one of its own DMBs: what is there is what its one writer wrote.
    pub(crate) fn read(&self, process: &Rc<Process>) {
        let nth = self.random.below(64);
        self.with_local(process, |local, _| {
            let all = local.reads.len().max(1);
            let Some((token, _, consumer)) = local.reads.get_mut(nth % all) else { return };
            let view = process.region.memory();
            view.taken.borrow_mut().clear();
            let from = consumer.consumed();
            let mut into = [MaybeUninit::uninit(); 64];
            consumer.read(view, &mut into).expect("nobody breaks a rule");
            for (at, found) in (from..).zip(view.taken.take()) {
                assert_eq!(found, byte(*token, at), "byte {at} of {token} is another's");
                count(&self.counts.bytes);
            }
        });
    }

    /// Lets go of a DMB of another.
    pub(crate) fn detach(&self, process: &Rc<Process>) {
        let nth = self.random.below(64);
        self.with_local(process, |local, me| {
            if !local.writes.is_empty() {
                let (token, _) = local.writes.swap_remove(nth % local.writes.len());
                assert!(process.region.detach_dmb(token, me), "{token} was taken from {me}");
            }
        });
    }

    /// Lets go of a DMB of its own.
    pub(crate) fn release(&self, process: &Rc<Process>) {
        let nth = self.random.below(64);
        self.with_local(process, |local, _| {
            if !local.reads.is_empty() {
                let (token, class, _) = local.reads.swap_remove(nth % local.reads.len());
                self.let_go(process, local, token, class);
            }
        });
    }

    fn let_go(&self, process: &Process, local: &mut Local, token: Token, class: u8) {
        match process.region.release_dmb(token) {
            Release::Free => assert!(local.allocator.free(token.granule(), class)),
            Release::WriterThere => local.limbo.push((token, class)),
        }
    }

    /// Looks which DMBs in limbo are idle by now, and gives idle extents back.
    pub(crate) fn sweep(&self, process: &Rc<Process>, keep: usize) {
        self.with_local(process, |local, me| {
            self.sweep_local(process, local, me, keep);
        });
    }

    fn sweep_local(&self, process: &Process, local: &mut Local, me: SlotRef, keep: usize) {
        let region = &process.region;
        for (token, class) in std::mem::take(&mut local.limbo) {
            if region.dmb_is_idle(token.granule()) {
                assert!(local.allocator.free(token.granule(), class));
            } else {
                local.limbo.push((token, class));
            }
        }
        for extent in local.allocator.take_idle_extents(keep) {
            assert!(region.free_extent(extent, me), "extent {extent} was taken from {me}");
        }
    }

    /// The process leaves the region, with its sessions closed before or not.
    pub(crate) fn leave(&self, process: &Rc<Process>) {
        let closes = self.random.below(2) == 0;
        let left = self.with_local(process, |local, me| {
            let region = &process.region;
            if closes {
                for (token, _) in std::mem::take(&mut local.writes) {
                    assert!(region.detach_dmb(token, me), "{token} was taken from {me}");
                }
                for (token, class, _) in std::mem::take(&mut local.reads) {
                    self.let_go(process, local, token, class);
                }
                self.sweep_local(process, local, me, 0);
            }
            process.life.leaving.set(true);
            self.shared.law.proof.set("leaves");
            region.mark_dead(me);
            self.shared.law.proof.set("other");
            region.reclaim(me);
            let Ok(()) = self.locks(process).unlock(region.slot_claim_offset(me.index));
        });
        if left.is_some() {
            count(&self.counts.leaves);
            self.kill(process);
        }
    }

    /// An operator says of one who is dead that it is, through any process.
    pub(crate) fn declare_dead(&self, process: &Rc<Process>, at: SlotRef) {
        self.run(process, || {
            self.shared.law.proof.set("word");
            process.region.mark_dead(at);
            self.shared.law.proof.set("other");
            process.region.reclaim(at);
        });
    }

    /// Looks that a process that lives has all that it believes it has.
    pub(crate) fn check(&self, process: &Process) {
        let Some(me) = process.slot.get().filter(|_| !process.busy.get()) else { return };
        let words = &self.shared.words;
        let state = |token: Token| self.shared.law.state(words, token.granule());
        let local = process.local.borrow();
        assert!(self.shared.law.lives(me));
        for (token, _) in &local.writes {
            let state = state(*token);
            assert_eq!((state.attached(), state.generation), (Some(me), token.0 >> 32));
        }
        for (token, ..) in &local.reads {
            let state = state(*token);
            assert!(state.held && state.generation == token.0 >> 32, "{token}: {state:?}");
        }
    }
}
