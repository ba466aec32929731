//! What a process does with a peer: intents of both, and rings in both directions.

use super::*;
use crate::control::{DONE_WRITING, READER_CLOSED, WRITER_CLOSED};
use crate::ring::{Consumer, Producer};

/// Bytes written at a time; less than the smallest ring holds.
const BLOCK: usize = 10_000;

/// The first bytes of every stream.
fn block() -> [u8; BLOCK] {
    core::array::from_fn(|n| ((n * 7) >> 3).to_le_bytes()[0])
}

/// An intent of `owner` for the connection from `port`, whose connection is there.
fn pending(region: &Process, owner: SlotRef, port: u16) -> Option<IntentRef> {
    let intent = region.publish_intent(owner, &key(port))?;
    region.connected_intent(&intent).ok().map(|()| intent)
}

/// Every transition of an intent, this process being the client and the acceptor.
pub(super) fn intents(own: &Process, slot: SlotRef, peers: &Process, peer: SlotRef) -> Option<()> {
    // The client: withdraws, finishes, abandons.
    for (port, is_committed) in [(2000, false), (2001, true), (2002, true)] {
        let intent = pending(own, slot, port)?;
        let _ = peers.match_intent(&intent);
        if is_committed {
            own.commit_intent(&intent).ok()?;
        }
        let _ = match port {
            2000 => own.withdraw_intent(&intent),
            2001 => own.finish_intent(&intent),
            _ => own.abandon_intent(&intent),
        };
        let _ = peers.refuse_intent(&intent);
    }
    // The acceptor: refuses, is committed to, frees what was abandoned.
    for port in [2003, 2004, 2005] {
        let intent = pending(peers, peer, port)?;
        let _ = own.match_intent(&intent);
        if port != 2003 {
            let _ = peers.commit_intent(&intent);
        }
        if port == 2005 {
            let _ = peers.abandon_intent(&intent);
        }
        let _ = own.refuse_intent(&intent);
        let _ = peers.withdraw_intent(&intent);
        let _ = peers.finish_intent(&intent);
    }
    Some(())
}

/// All that both ends of both rings do: `writes` and `reads` are the DMBs.
pub(super) fn rings(own: &Process, peers: &Process, dmbs: Option<(Token, Token)>) {
    let Some((writes, reads)) = dmbs else { return };
    let place = |token: Token| own.geometry().place(token.granule(), 0).unwrap();
    let mut ends = [
        (own, Producer::new(place(writes)), peers, Consumer::new(place(writes))),
        (peers, Producer::new(place(reads)), own, Consumer::new(place(reads))),
    ];
    for (writer, producer, reader, consumer) in &mut ends {
        let (writes_to, reads_from) = (writer.memory(), reader.memory());
        let mut bytes = [MaybeUninit::uninit(); BLOCK];
        // Sleeps for data, is woken; then the other for room.
        assert_eq!(consumer.want_data(reads_from, 1), Ok(false));
        assert_eq!(producer.write(writes_to, &block()), Ok(BLOCK));
        assert!(producer.take_reader_wait(writes_to));
        while producer.write(writes_to, &[0; 1000]).unwrap() > 0 {}
        assert_eq!(producer.want_room(writes_to, 1), Ok(false));
        assert_eq!(consumer.read(reads_from, &mut bytes), Ok(BLOCK));
        assert!(consumer.take_writer_wait(reads_from));
        producer.clear_wait(writes_to);
        consumer.clear_wait(reads_from);
        consumer.place().set_heard(reads_from);
        consumer.place().withdraw_heard(reads_from);
        consumer.set_flags(reads_from, READER_CLOSED);
        producer.set_flags(writes_to, DONE_WRITING | WRITER_CLOSED);
    }
}

/// What one who is killed leaves in the rings that it wrote is no more than it wrote: the peer
/// finds no garbage, and the bytes of that stream only.
pub(super) fn is_sound(peers: &Process) {
    for granule in 0..peers.geometry().granules() {
        if peers.open_extent_owner(peers.geometry().extent_of(granule)).is_none() {
            continue;
        }
        let place = peers.geometry().place(granule, 0).unwrap();
        // Nothing, or the first block and perhaps more.
        let published = Consumer::new(place).available(peers.memory()).unwrap();
        let bytes = peers.memory().memory.bytes(place.data, BLOCK);
        assert!(published == 0 || (published >= BLOCK as u64 && bytes == block()));
    }
}
