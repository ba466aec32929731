//! All tables of a region, whose words somebody scribbles over between any two accesses: every call
//! ends, and touches nothing but tables.
#![no_main]

use std::num::NonZeroU64;
use std::slice;

use ivsmc_fuzz::scribble::{Scribbled, Script};
use ivsmc_fuzz::Input;
use ivsmc_proto::allocator::Allocator;
use ivsmc_proto::directory::{Bound, ListenerEntry};
use ivsmc_proto::dmb::Token;
use ivsmc_proto::host::{Boot, Endpoint, HostIdentity, HostRecord, Ip, MAX_ADDRESSES};
use ivsmc_proto::intent::{IntentKey, IntentRef};
use ivsmc_proto::layout::{Geometry, MIN_REGION};
use ivsmc_proto::proof::Witness;
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotInfo, SlotRef};
use libfuzzer_sys::fuzz_target;

thread_local! {
    static MEMORY: Scribbled = Scribbled::new(MIN_REGION);
}

/// Who attaches, and what they have.
struct World<'m> {
    region: Region<&'m Scribbled>,
    allocator: Allocator,
    slots: Vec<SlotRef>,
    listeners: Vec<ListenerEntry>,
    intents: Vec<IntentRef>,
    tokens: Vec<Token>,
}

/// One of `all`; `None` if there is none.
fn one<T: Copy>(all: &[T], input: &mut Input<'_>) -> Option<T> {
    all.get(input.below(all.len().clamp(1, 256))).copied()
}

fn ip(input: &mut Input<'_>) -> Ip {
    let numbers = [[127, 0, 0, 1], [10, 0, 0, 1], [10, 0, 0, 2], [0, 0, 0, 0]];
    match one(&numbers, input) {
        Some(v4) if input.flip() => std::net::IpAddr::from(v4).into(),
        _ => std::net::IpAddr::from([u16::from(input.byte()), 0, 0, 0, 0, 0, 0, 1]).into(),
    }
}

fn endpoint(input: &mut Input<'_>) -> Endpoint {
    Endpoint { ip: ip(input), port: u16::from(input.byte()) }
}

fn prover(input: &mut Input<'_>) -> Prover {
    let id = input.byte();
    match input.below(5) {
        0 => Prover::None,
        1 => Prover::Lock { boot: id.into() },
        2 => Prover::IvPosition(id.into()),
        3 => Prover::Agent(id.into()),
        _ => Prover::VfioExclusive(id.into()),
    }
}

fn record(input: &mut Input<'_>) -> HostRecord {
    let identity = HostIdentity { boot: input.byte().into(), netns: 1, ivposition: 0 };
    let addresses: Vec<_> = (0..input.below(40)).map(|_| ip(input)).collect();
    HostRecord::new(identity, &addresses).on_machine(input.byte().into())
}

impl World<'_> {
    /// One of ours, or whatever the other end names.
    fn slot(&self, input: &mut Input<'_>) -> SlotRef {
        let hostile = SlotRef { index: input.u16(), generation: input.byte().into() };
        match input.flip() {
            true => one(&self.slots, input).unwrap_or(hostile),
            false => hostile,
        }
    }

    /// One of ours; such calls are made by who has it.
    fn own(&self, input: &mut Input<'_>) -> Option<SlotRef> {
        one(&self.slots, input)
    }

    /// A token of ours, or any.
    fn token(&self, input: &mut Input<'_>) -> Token {
        match input.flip() {
            true => one(&self.tokens, input).unwrap_or(Token(0)),
            false => Token(u64::from(input.byte()) << 32 | u64::from(input.u16())),
        }
    }

    fn attachments(&mut self, input: &mut Input<'_>) {
        let region = &self.region;
        match input.below(8) {
            0 => {
                let free = region.unclaimed().next();
                let claimed = free.and_then(|index| region.claim_slot(index, prover(input)));
                self.slots.extend(claimed);
            }
            1 => {
                region.mark_dead(self.slot(input));
            }
            2 => {
                region.reclaim(self.slot(input));
            }
            3 => {
                if let Some(me) = self.own(input) {
                    let info =
                        SlotInfo { ivposition: None, vector: Some(input.u16()), eid: [7; 32] };
                    region.set_slot_info(me, &info);
                }
                region.slot_info(self.slot(input));
            }
            4 => {
                if let Some(me) = self.own(input) {
                    region.write_host_record(me, &record(input));
                }
                let found = region.host_record(input.u16());
                assert!(found.is_none_or(|found| found.addresses().len() <= MAX_ADDRESSES));
                region.boot_of(self.slot(input));
            }
            5 => {
                region.is_live(self.slot(input));
                region.is_deserted();
                assert!(region.claimed().count() <= usize::from(region.geometry().slots()));
            }
            6 => {
                let boot = Boot { id: input.byte().into(), machine: input.byte().into() };
                let ivposition = Some(input.byte().into());
                let witness = Witness { boot, ivposition, is_exclusive: input.flip() };
                let (at, prover) = (self.slot(input), prover(input));
                witness.proves(region, at, prover);
                witness.proves_with_lock(region, at);
            }
            _ => {
                if let Some(me) = self.own(input) {
                    region.set_summary(me, input.u16());
                    region.take_summary(me, |number| assert!(number < 1024));
                }
                if let Some(instance) = NonZeroU64::new(input.u64()) {
                    region.set_marking_server(instance);
                    region.clear_marking_server(instance);
                }
                region.marking_server();
                assert!(region.ids_given() <= 65_536);
            }
        }
    }

    fn connections(&mut self, input: &mut Input<'_>) {
        let region = &self.region;
        match input.below(6) {
            0 => {
                let bound = match input.below(4) {
                    0 => Bound::Any4,
                    1 => Bound::Any6,
                    2 => Bound::AnyDual,
                    _ => Bound::One(ip(input)),
                };
                let entry = self
                    .own(input)
                    .and_then(|me| region.register_listener(me, bound, u16::from(input.byte())));
                self.listeners.extend(entry);
            }
            1 => {
                if let Some(entry) = one(&self.listeners, input) {
                    region.unregister_listener(entry);
                }
            }
            2 => {
                let found = region.find_listener(endpoint(input), &record(input));
                assert!(found.is_none_or(|at| at.index < region.geometry().slots()));
            }
            3 => {
                let key = IntentKey { client: endpoint(input), server: endpoint(input) };
                let intent = self.own(input).and_then(|me| region.publish_intent(me, &key));
                self.intents.extend(intent);
            }
            4 => {
                let key = IntentKey { client: endpoint(input), server: endpoint(input) };
                if let Some((intent, _)) = region.find_intent(&key) {
                    self.intents.push(intent);
                }
            }
            _ => {
                let Some(intent) = one(&self.intents, input) else { return };
                region.key_of(&intent);
                let _ = match input.below(7) {
                    0 => region.connected_intent(&intent),
                    1 => region.match_intent(&intent),
                    2 => region.refuse_intent(&intent),
                    3 => region.commit_intent(&intent),
                    4 => region.withdraw_intent(&intent),
                    5 => region.finish_intent(&intent),
                    _ => region.abandon_intent(&intent),
                };
            }
        }
    }

    fn memory(&mut self, input: &mut Input<'_>) {
        let region = &self.region;
        match input.below(7) {
            0 => {
                let Some(me) = self.own(input) else { return };
                let Some(extent) = region.claim_extent(me) else { return };
                // Who scribbles may have made it nobody's again: it is added once.
                let is_new = self.allocator.extents().all(|index| index != extent);
                if region.open_extent(extent, me) && is_new {
                    self.allocator.add_extent(extent);
                }
            }
            1 => {
                let class = input.byte() % 8;
                let Some(granule) = self.allocator.allocate(class) else { return };
                match region.invite_dmb(granule, class, self.slot(input)) {
                    Ok((token, place)) => {
                        assert!(place.data + place.capacity <= MIN_REGION);
                        assert_eq!(token.granule(), granule);
                        self.tokens.push(token);
                    }
                    Err(_) => assert!(self.allocator.free(granule, class)),
                }
            }
            2 => {
                let (class, owner) = (input.byte(), self.slot(input));
                let Some(me) = self.own(input) else { return };
                if let Ok(place) = region.attach_dmb(self.token(input), class, me, owner) {
                    assert!(place.data + place.capacity <= MIN_REGION);
                }
            }
            3 => {
                region.detach_dmb(self.token(input), self.slot(input));
            }
            4 => {
                let token = self.token(input);
                region.release_dmb(token);
                if token.granule() < region.geometry().granules() {
                    region.dmb_is_idle(token.granule());
                }
            }
            5 => {
                let Some(me) = self.own(input) else { return };
                for extent in self.allocator.take_idle_extents(usize::from(input.flip())) {
                    region.free_extent(extent, me);
                }
            }
            _ => {
                let census = region.census();
                assert!(census.extents <= region.geometry().extents());
            }
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    MEMORY.with(|m| {
        m.reset();
        let mut input = Input::new(bytes);
        let Ok(geometry) = Geometry::of(MIN_REGION) else { return };
        // A session's bytes are nobody's but the rings'.
        let (_, data) = geometry.extent_ranges(0);
        let tables = 0..data.start;
        m.allow(slice::from_ref(&tables));
        // An attacher meets others who format, or who never will.
        let script =
            if input.flip() { Script::read(&mut input, tables.end) } else { Script::default() };
        let attached = m.under(&script, || Region::attach(m, 7));
        let Ok(region) = attached.or_else(|_| {
            m.reset();
            m.allow(slice::from_ref(&tables));
            Region::attach(m, 7)
        }) else {
            panic!("empty memory is a region");
        };
        let mut world = World {
            allocator: Allocator::new(region.geometry()),
            region,
            slots: Vec::new(),
            listeners: Vec::new(),
            intents: Vec::new(),
            tokens: Vec::new(),
        };
        while !input.is_over() {
            let script = match input.below(4) {
                0 => Script::read(&mut input, tables.end),
                _ => Script::default(),
            };
            m.under(&script, || match input.below(3) {
                0 => world.attachments(&mut input),
                1 => world.connections(&mut input),
                _ => world.memory(&mut input),
            });
        }
    });
});
