//! Clients that die while they connect to a listener that lives.

use std::net::{SocketAddr, TcpListener};

use ivsmc_proto::directory::Bound;
use ivsmc_proto::host::Endpoint;
use ivsmc_proto::intent::{IntentKey, IntentState};
use ivsmc_proto::reclaim::Census;

use super::process::Process;
use super::stage::{until, Ground, Leaves, Stage, LIVE};
use crate::attachment::Attachment;

/// A live slot with an intent.
const INTENT: Census = Census { intents: 1, ..LIVE };
/// With an extent besides.
const EXTENT: Census = Census { extents: 1, ..INTENT };
/// With a DMB in it.
const DMB: Census = Census { dmbs_held: 1, ..EXTENT };

dies_at! {
    an_intent_is_claimed: "intent.claimed" => |name| connects(name, &[], Leaves::Exactly(INTENT));
    an_intent_is_written: "intent.written" => |name| connects(name, &[], Leaves::Exactly(INTENT));
    an_intent_is_announced:
        "intent.announced" => |name| connects(name, &[], Leaves::Exactly(INTENT));
    // A plain connection, as far as the application sees, that its client ended at once.
    the_connection_is_there:
        "intent.connected" => |name| connects(name, &["tcp 0 eof"], Leaves::Something);
    an_intent_is_pending:
        "intent.pending" => |name| connects(name, &["tcp 0 eof"], Leaves::Exactly(INTENT));
    // From here on the application sees nothing until the handshake is done.
    an_intent_is_committed:
        "intent.committed" => |name| connects(name, &[], Leaves::Exactly(INTENT));
    the_proposal_is_sent: "clc.proposal" => |name| connects(name, &[], Leaves::Exactly(INTENT));
    an_extent_is_claimed: "extent.claimed" => |name| connects(name, &[], Leaves::Exactly(EXTENT));
    an_extent_is_backed: "extent.backed" => |name| connects(name, &[], Leaves::Exactly(EXTENT));
    an_extent_is_opened: "extent.opened" => |name| connects(name, &[], Leaves::Exactly(EXTENT));
    a_dmb_is_cleared: "dmb.cleared" => |name| connects(name, &[], Leaves::Exactly(EXTENT));
    a_dmb_is_invited: "dmb.invited" => |name| connects(name, &[], Leaves::Exactly(DMB));
    // The listener's DMB has a writer then, and the listener does not rest until it is gone.
    the_peers_dmb_is_attached: "dmb.attached" => |name| connects(name, &[], Leaves::Nothing);
    the_confirm_is_sent: "clc.confirm" => |name| connects(name, &["smc 0 reset"], Leaves::Nothing);
    an_intent_is_finished:
        "intent.finished" => |name| connects(name, &["smc 0 reset"], Leaves::Nothing);
    an_intent_is_withdrawn: "intent.withdrawn" => misses;
    an_intent_is_abandoned: "intent.abandoned" => is_deserted;
}

fn connects(name: &str, ends: &[&str], leaves: Leaves) {
    let stage = Stage::new(Ground::File);
    stage.victim(1, name).dies_at(name);
    stage.hears(ends);
    stage.is_left(leaves);
    stage.heals();
}

/// Nobody takes its connection.
fn misses(name: &str) {
    let stage = Stage::new(Ground::File);
    let address = stage.quiet().local_addr().to_string();
    Process::start(&["misser", stage.device(), &address], Some((name, 1))).dies_at(name);
    stage.is_left(Leaves::Exactly(LIVE));
    stage.heals();
}

/// Whoever took its connection ends it when it has committed itself.
fn is_deserted(name: &str) {
    let stage = Stage::new(Ground::File);
    let acceptor = Attachment::open(&stage.device().parse().unwrap()).unwrap();
    let region = acceptor.region();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = socket.local_addr().unwrap();
    let entry = region.register_listener(acceptor.me(), Bound::Any4, address.port()).unwrap();
    let victim = stage.victim_of(address, name);
    let (conn, peer) = socket.accept().unwrap();
    let key = IntentKey { client: Endpoint::from(peer), server: Endpoint::from(address) };
    let intent = until("a pending intent", || match region.find_intent(&key) {
        Some((intent, IntentState::Pending)) => Some(intent),
        _ => None,
    });
    region.match_intent(&intent).unwrap();
    until("a commitment", || {
        (region.intent_state(&intent) == Some(IntentState::Committed)).then_some(())
    });
    drop(conn);
    victim.dies_at(name);
    assert_eq!(region.intent_state(&intent), Some(IntentState::Abandoned));
    assert!(region.unregister_listener(entry));
    // It had seen its death coming, and nobody else can.
    stage.is_left(Leaves::Exactly(Census { live: 2, ..LIVE }));
    drop(acceptor);
    stage.heals();
}
