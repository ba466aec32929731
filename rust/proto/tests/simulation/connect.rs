//! What a process does before it has sessions: listeners, and both parts of intents.

use std::net::SocketAddr;
use std::rc::Rc;

use ivsmc_proto::directory::Bound;
use ivsmc_proto::host::Endpoint;
use ivsmc_proto::intent::{IntentKey, IntentState};

use crate::world::{Process, World};

impl World {
    /// Enters a listener, or takes one out.
    pub(crate) fn listen(&self, process: &Rc<Process>) {
        self.with_local(process, |local, me| {
            if let Some(entry) = local.listeners.pop() {
                assert!(process.region.unregister_listener(entry), "a listener was taken out");
            } else {
                let port = u16::try_from(process.pid() % 60_000).unwrap();
                local.listeners.extend(process.region.register_listener(me, Bound::Any4, port));
            }
        });
    }

    /// One step of the client's part of an intent.
    pub(crate) fn intend(&self, process: &Rc<Process>) {
        let gives_up = self.random.below(3) == 0;
        self.with_local(process, |local, me| {
            let region = &process.region;
            let Some(intent) = local.intent else {
                local.intent = region.publish_intent(me, &key(process.pid()));
                return;
            };
            let state = region.intent_state(&intent);
            let ended = match state.expect("an intent of one who lives lasts") {
                IntentState::Committed if gives_up => {
                    region.abandon_intent(&intent).expect("only the client leaves that");
                    true
                }
                IntentState::Committed => region.finish_intent(&intent).is_ok(),
                IntentState::Matched if !gives_up => {
                    let _ = region.commit_intent(&intent);
                    false
                }
                IntentState::Announced if !gives_up => {
                    region.connected_intent(&intent).expect("only the client leaves that");
                    false
                }
                _ => {
                    region.withdraw_intent(&intent).expect("the client's own");
                    true
                }
            };
            if ended {
                local.intent = None;
            }
        });
    }

    /// One step of the acceptor's part of the intent of `client`.
    pub(crate) fn accept(&self, process: &Rc<Process>, client: usize) {
        let gives_up = self.random.below(3) == 0;
        self.with_local(process, |_, _| {
            let region = &process.region;
            let Some((intent, state)) = region.find_intent(&key(client)) else { return };
            let found = match state {
                IntentState::Pending => region.match_intent(&intent),
                IntentState::Matched | IntentState::Committed if gives_up => {
                    region.refuse_intent(&intent)
                }
                _ => Ok(()),
            };
            // Whatever it was told: the other may have been faster.
            let _ = found;
        });
    }
}

/// The connection of client `pid`.
fn key(pid: usize) -> IntentKey {
    let endpoint = |text: &str| Endpoint::from(text.parse::<SocketAddr>().unwrap());
    let port = u16::try_from(pid % 60_000).unwrap();
    IntentKey {
        client: Endpoint { port, ..endpoint("10.0.0.1:0") },
        server: endpoint("10.0.0.2:80"),
    }
}
