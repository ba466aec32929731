//! The background thread's part in accepting: while no thread is inside `accept`, it takes the
//! connections, and it keeps the deadlines of handshakes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{reset, Acceptor, Taken};
use crate::reactor::{lock, Source};

/// How long the background leaves the socket alone after an error (descriptors have run out).
const ERROR_PAUSE: Duration = Duration::from_millis(100);

/// It takes a connection that other processes may accept only after this long: whoever of them waits
/// inside `accept` is sooner, and in hand here it would wait for this process alone. Less than a
/// client waits to be taken ([`mod@crate::connect`]).
const OTHERS_FIRST: Duration = Duration::from_millis(100);

/// The background thread's part; it may also be woken for nothing.
pub(super) struct Background(pub(super) Arc<Acceptor>);

impl Source for Background {
    fn end(&self) {
        self.0.close();
    }

    fn ready(&self, _events: u32) {
        let acceptor = &self.0;
        loop {
            let socket = {
                let mut state = lock(&acceptor.state);
                // A fork may have changed whether this process is to take any.
                acceptor.settle(&mut state);
                if !state.watching {
                    return;
                }
                if acceptor.is_shared() && !state.yielded {
                    state.yielded = true;
                    acceptor.pause(&mut state, OTHERS_FIRST);
                    return;
                }
                state.yielded = false;
                state.socket.clone()
            };
            let Some(socket) = socket else { return };
            let _taking = lock(&acceptor.taking);
            let accepted = match acceptor.take(&socket, false) {
                Ok(Taken::Nothing) => return,
                Ok(Taken::Announced) => continue,
                Ok(Taken::Connection(accepted)) => accepted,
                Err(_) => {
                    // Descriptors have run out, for instance: the next accept() says so.
                    acceptor.pause(&mut lock(&acceptor.state), ERROR_PAUSE);
                    return;
                }
            };
            let mut state = lock(&acceptor.state);
            if state.socket.is_none() {
                drop(state);
                reset([accepted]);
                return;
            }
            state.ready.push_back(accepted);
            // Only a full counter fails, and that wakes as well.
            let _ = acceptor.ready.notify();
            acceptor.settle(&mut state);
        }
    }

    fn expired(&self) {
        let acceptor = &self.0;
        let mut shaking = Vec::new();
        {
            let mut state = lock(&acceptor.state);
            // A timer that was meant for something else ends a pause early, which does no harm.
            state.paused = false;
            state.yielded &= acceptor.has_waiting(&state);
            acceptor.settle(&mut state);
            if state.sweep.is_some_and(|when| when <= Instant::now()) {
                state.sweep = None;
                if !state.shaking.is_empty() {
                    acceptor.sweep_later(&mut state);
                    shaking.extend(state.shaking.values().cloned());
                }
            }
        }
        for handshake in shaking {
            handshake.look();
        }
    }
}
