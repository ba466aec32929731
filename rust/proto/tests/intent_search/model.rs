//! The model: TCP, the actors, and what each may do next.

use std::net::SocketAddr;

use ivsmc_proto::intent::{IntentKey, IntentRef, IntentState};
use ivsmc_proto::region::Region;
use ivsmc_proto::slot::{Prover, SlotRef};

use super::words::Words;

/// The rules of the protocol that a test can leave out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rules {
    /// An intent is pending only once connect() has succeeded.
    pub(crate) announced: bool,
    /// The client commits before it sends a CLC message.
    pub(crate) committed: bool,
    /// The acceptor matches only connections that are ESTABLISHED.
    pub(crate) established: bool,
    /// It looks at that after it has seen the intent pending, not before.
    pub(crate) looks_after_pending: bool,
    /// It matches only connections with an empty receive queue.
    pub(crate) empty_queue: bool,
    /// The acceptor refuses by a compare-exchange from matched, and believes what that finds.
    pub(crate) refuses: bool,
    /// The reaper makes committed intents abandoned and does not free them.
    pub(crate) reaper_abandons: bool,
    /// So does a client that gives up without an answer.
    pub(crate) client_abandons: bool,
    /// Not a rule of the protocol: a committed intent whose connection ended without a byte may be
    /// taken by the next connection.
    pub(crate) orphans: bool,
}

/// The protocol.
pub(crate) const RULES: Rules = Rules {
    announced: true,
    committed: true,
    established: true,
    looks_after_pending: true,
    empty_queue: true,
    refuses: true,
    reaper_abandons: true,
    client_abandons: true,
    orphans: false,
};

/// What a byte on a connection is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Byte {
    /// Of a program that speaks no ivsmc, or of a session on plain TCP.
    Plain,
    /// A CLC message.
    Clc,
}

/// What the connecting end believes of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum View {
    Undecided,
    Plain,
    Smc,
}

/// Where a connection is in the accepting process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Server {
    /// In the accept queue.
    Queued,
    /// Accepted; its intent is to be looked for (again).
    New,
    /// Found ESTABLISHED, its intent is to be looked for: only without `looks_after_pending`.
    Looked,
    /// Its intent was seen pending.
    Found(IntentRef),
    /// And the connection is ESTABLISHED, nothing has come on it.
    Checked(IntentRef),
    Matched(IntentRef),
    Committed(IntentRef),
    /// Given to the application, which has spoken or not.
    Plain {
        spoke: bool,
    },
    Smc,
    /// Closed, and the application never saw it.
    Dropped,
}

/// One TCP connection from the client's address to the server's.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Connection {
    /// The connecting end is open.
    open: bool,
    /// The accepting end has seen the end of the stream.
    ended: bool,
    /// A plain program's, which may still send a byte.
    program: Option<bool>,
    view: View,
    server: Server,
    to_server: Vec<Byte>,
    to_client: Vec<Byte>,
}

/// How far an ivsmc client is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Client {
    Idle,
    Announced(SlotRef, IntentRef),
    /// connect() has succeeded.
    Connected(SlotRef, IntentRef, usize),
    /// Waits for a match.
    Waiting(SlotRef, IntentRef, usize),
    /// Has seen one.
    Saw(SlotRef, IntentRef, usize),
    Committed(SlotRef, IntentRef, usize),
    /// Has sent a CLC message.
    Sent(SlotRef, IntentRef, usize),
    Smc(usize),
    /// Goes on in plain TCP; may still send a byte.
    Plain(usize, bool),
    Done,
    Killed(SlotRef),
}

/// One state of the model.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct World {
    /// The words of the region behind the superblock that are not zero.
    words: Vec<(u64, u64)>,
    clients: Vec<Client>,
    connections: Vec<Connection>,
    /// Connections that plain programs may still make.
    programs: usize,
    /// Intents whose connection ended without a byte after they were committed.
    orphans: Vec<IntentRef>,
}

impl World {
    /// Nothing has happened yet.
    pub(crate) fn start(clients: usize, programs: usize) -> World {
        World {
            words: Vec::new(),
            clients: vec![Client::Idle; clients],
            connections: Vec::new(),
            programs,
            orphans: Vec::new(),
        }
    }
}

/// The region whose memory is restored for each step, and the rules.
pub(crate) struct Model {
    region: Region<Words>,
    rules: Rules,
    key: IntentKey,
}

impl Model {
    pub(crate) fn new(rules: Rules) -> Model {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap().into();
        Model {
            region: Region::attach(Words::default(), 1).unwrap(),
            rules,
            key: IntentKey { client: address("10.0.0.1:40000"), server: address("10.0.0.2:80") },
        }
    }

    /// Every step that an actor can take.
    pub(crate) fn successors(&self, world: &World) -> Vec<(&'static str, World)> {
        let mut next = Vec::new();
        for client in 0..world.clients.len() {
            self.client_steps(world, client, &mut next);
        }
        self.program_steps(world, &mut next);
        for connection in 0..world.connections.len() {
            self.connection_steps(world, connection, &mut next);
        }
        next
    }

    fn client_steps(&self, world: &World, at: usize, next: &mut Vec<(&'static str, World)>) {
        let mut step = |label, client: Client, change: &dyn Fn(&mut World)| {
            let mut world = world.clone();
            world.clients[at] = client;
            change(&mut world);
            next.push((label, world));
        };
        let nothing = |_: &mut World| {};
        let mut killable = None;
        match world.clients[at] {
            // They are all alike: let them begin in turn.
            Client::Idle if world.clients[..at].contains(&Client::Idle) => {}
            Client::Idle => {
                let mut claimed = world.clone();
                let slot = self.on(&mut claimed, |region| {
                    let index = region.unclaimed().next().unwrap();
                    region.claim_slot(index, Prover::None).unwrap()
                });
                let intent = self.on(&mut claimed, |region| {
                    let intent = region.publish_intent(slot, &self.key).unwrap();
                    if !self.rules.announced {
                        region.connected_intent(&intent).unwrap();
                    }
                    intent
                });
                claimed.clients[at] = Client::Announced(slot, intent);
                next.push(("client publishes", claimed));
            }
            Client::Announced(slot, intent) => {
                killable = Some((slot, None));
                let mut connected = world.clone();
                if let Some(connection) = connect(&mut connected, None) {
                    connected.clients[at] = Client::Connected(slot, intent, connection);
                    next.push(("client connects", connected));
                } else {
                    self.withdraw(&mut connected, &intent);
                    connected.clients[at] = Client::Done;
                    next.push(("client cannot connect, withdraws", connected));
                }
            }
            Client::Connected(slot, intent, connection) => {
                killable = Some((slot, Some(connection)));
                let mut pending = world.clone();
                if self.rules.announced {
                    let found = self.on(&mut pending, |region| region.connected_intent(&intent));
                    assert_eq!(found, Ok(()), "nobody else changes an announced intent");
                }
                pending.clients[at] = Client::Waiting(slot, intent, connection);
                next.push(("client makes it pending", pending));
            }
            Client::Waiting(slot, intent, connection) => {
                killable = Some((slot, Some(connection)));
                let state = self.on(&mut world.clone(), |region| region.intent_state(&intent));
                if state == Some(IntentState::Matched) {
                    step("client sees the match", Client::Saw(slot, intent, connection), &nothing);
                }
                // A byte, an end of stream, a refusal, its deadline: all lead here.
                step("client withdraws", Client::Plain(connection, true), &|world| {
                    self.withdraw(world, &intent);
                    world.connections[connection].view = View::Plain;
                });
            }
            Client::Saw(slot, intent, connection) => {
                killable = Some((slot, Some(connection)));
                let mut committed = world.clone();
                let found = if self.rules.committed {
                    self.on(&mut committed, |region| region.commit_intent(&intent))
                } else {
                    Ok(())
                };
                // A byte or an end of stream that came before keeps it from committing.
                if !world.connections[connection].to_client.is_empty() || found.is_err() {
                    step(
                        "client sees more, withdraws",
                        Client::Plain(connection, true),
                        &|world| {
                            self.withdraw(world, &intent);
                            world.connections[connection].view = View::Plain;
                        },
                    );
                } else {
                    committed.clients[at] = Client::Committed(slot, intent, connection);
                    next.push(("client commits", committed));
                }
            }
            Client::Committed(slot, intent, connection) => {
                killable = Some((slot, Some(connection)));
                step(
                    "client sends a CLC message",
                    Client::Sent(slot, intent, connection),
                    &|world| {
                        world.connections[connection].to_server.push(Byte::Clc);
                    },
                );
            }
            Client::Sent(slot, intent, connection) => {
                killable = Some((slot, Some(connection)));
                if world.connections[connection].to_client == [Byte::Clc] {
                    step("client reads the answer", Client::Smc(connection), &|world| {
                        self.finish(world, &intent);
                        world.connections[connection].to_client.clear();
                        world.connections[connection].view = View::Smc;
                    });
                }
                step("client gives the handshake up", Client::Done, &|world| {
                    self.abandon(world, &intent);
                    world.connections[connection].open = false;
                });
            }
            // A client without an intent that is killed closes, and leaves nothing else.
            Client::Smc(connection) => {
                step("client closes the session", Client::Done, &|world| {
                    world.connections[connection].open = false;
                });
            }
            Client::Plain(connection, may_send) => {
                if may_send {
                    step("client sends a byte", Client::Plain(connection, false), &|world| {
                        world.connections[connection].to_server.push(Byte::Plain);
                    });
                }
                step("client closes", Client::Done, &|world| {
                    world.connections[connection].open = false;
                });
            }
            Client::Done => {}
            Client::Killed(slot) => {
                let mut reaped = world.clone();
                self.on(&mut reaped, |region| {
                    region.reclaim(slot);
                    if !self.rules.reaper_abandons {
                        region.memory().free_abandoned();
                    }
                });
                reaped.clients[at] = Client::Done;
                next.push(("the dead client is reaped", reaped));
            }
        }
        if let Some((slot, connection)) = killable {
            let mut killed = world.clone();
            killed.clients[at] = Client::Killed(slot);
            if let Some(connection) = connection {
                killed.connections[connection].open = false;
            }
            next.push(("client is killed", killed));
        }
    }

    fn program_steps(&self, world: &World, next: &mut Vec<(&'static str, World)>) {
        let mut connected = world.clone();
        if world.programs > 0 && connect(&mut connected, Some(true)).is_some() {
            connected.programs -= 1;
            next.push(("program connects", connected));
        }
        for (at, connection) in world.connections.iter().enumerate() {
            let Some(may_send) = connection.program.filter(|_| connection.open) else { continue };
            if may_send {
                let mut sent = world.clone();
                sent.connections[at].to_server.push(Byte::Plain);
                sent.connections[at].program = Some(false);
                next.push(("program sends a byte", sent));
            }
            let mut closed = world.clone();
            closed.connections[at].open = false;
            next.push(("program closes", closed));
        }
    }

    /// The accepting process, and the network.
    fn connection_steps(&self, world: &World, at: usize, next: &mut Vec<(&'static str, World)>) {
        let connection = &world.connections[at];
        let established = !connection.ended || !self.rules.established;
        let empty = connection.to_server.is_empty() || !self.rules.empty_queue;
        let may_match = established && empty;
        let mut step = |label, server: Server| {
            let mut world = world.clone();
            world.connections[at].server = server;
            next.push((label, world));
        };
        let plain = Server::Plain { spoke: false };
        match connection.server {
            Server::Queued => {
                let earlier = &world.connections[..at];
                if earlier.iter().all(|earlier| earlier.server != Server::Queued) {
                    step("acceptor accepts", Server::New);
                }
            }
            Server::New if !self.rules.looks_after_pending => {
                step("acceptor looks at it", if may_match { Server::Looked } else { plain });
            }
            Server::New | Server::Looked => {
                let found = self.on(&mut world.clone(), |region| region.find_intent(&self.key));
                match found {
                    Some((intent, IntentState::Pending)) => {
                        step("acceptor finds the intent", Server::Found(intent));
                    }
                    // Until it is pending; the deadline, a byte or an end of stream end that.
                    Some((_, IntentState::Announced)) => step("acceptor waits no longer", plain),
                    // Whether the connection that it belongs to ends without a byte.
                    Some((intent, _)) if self.rules.orphans && holds(world, intent) => {}
                    Some((intent, IntentState::Committed))
                        if world.orphans.contains(&intent) && may_match =>
                    {
                        step("acceptor takes an orphan", Server::Committed(intent));
                    }
                    _ => step("acceptor finds no intent", plain),
                }
            }
            Server::Found(intent) => {
                let may_match = may_match || !self.rules.looks_after_pending;
                let checked = if may_match { Server::Checked(intent) } else { plain };
                step("acceptor checks it", checked);
            }
            Server::Checked(intent) => {
                let mut matched = world.clone();
                let found = self.on(&mut matched, |region| region.match_intent(&intent));
                matched.connections[at].server =
                    if found.is_ok() { Server::Matched(intent) } else { plain };
                next.push(("acceptor matches", matched));
            }
            Server::Matched(intent) => {
                let state = self.on(&mut world.clone(), |region| region.intent_state(&intent));
                match state {
                    Some(IntentState::Matched) => {}
                    Some(IntentState::Committed) => {
                        step("acceptor sees it committed", Server::Committed(intent));
                    }
                    // It asks the word once more by refusing.
                    Some(IntentState::Abandoned) => {}
                    _ => step("acceptor sees it withdrawn", plain),
                }
                // A byte, an end of stream, a dead owner, its deadline: all lead here.
                let mut refused = world.clone();
                let found = self.on(&mut refused, |region| region.refuse_intent(&intent));
                refused.connections[at].server = match found {
                    Err(Some(IntentState::Committed)) if self.rules.refuses => {
                        Server::Committed(intent)
                    }
                    Err(Some(IntentState::Abandoned)) if self.rules.refuses => Server::Dropped,
                    _ => plain,
                };
                next.push(("acceptor gives up", refused));
            }
            Server::Committed(intent) => match connection.to_server.first() {
                Some(Byte::Clc) => {
                    let mut answered = world.clone();
                    answered.connections[at].server = Server::Smc;
                    answered.connections[at].to_server.remove(0);
                    answered.connections[at].to_client.push(Byte::Clc);
                    next.push(("acceptor answers", answered));
                }
                // A violation, found as such.
                Some(Byte::Plain) => step("acceptor reads a plain byte as CLC", Server::Smc),
                None => {
                    let mut dropped = world.clone();
                    dropped.connections[at].server = Server::Dropped;
                    // Its answer changes nothing; it frees the intent if that is abandoned.
                    let _ = self.on(&mut dropped, |region| region.refuse_intent(&intent));
                    if self.rules.orphans && connection.ended {
                        dropped.orphans.push(intent);
                    }
                    next.push(("acceptor drops it", dropped));
                }
            },
            Server::Plain { spoke: false } => {
                let mut spoke = world.clone();
                spoke.connections[at].server = Server::Plain { spoke: true };
                spoke.connections[at].to_client.push(Byte::Plain);
                next.push(("application speaks first", spoke));
            }
            Server::Plain { spoke: true } | Server::Smc | Server::Dropped => {}
        }
        if !connection.open && !connection.ended {
            let mut ended = world.clone();
            ended.connections[at].ended = true;
            next.push(("the end of the stream arrives", ended));
        }
    }

    /// The client's withdrawal; only a state it cannot withdraw from may keep it.
    fn withdraw(&self, world: &mut World, intent: &IntentRef) {
        let found = self.on(world, |region| region.withdraw_intent(intent));
        assert_eq!(found, Ok(()), "the client's own intent");
    }

    /// The client gives up after it has committed.
    fn abandon(&self, world: &mut World, intent: &IntentRef) {
        if self.rules.client_abandons {
            let found = self.on(world, |region| region.abandon_intent(intent));
            assert!(found.is_ok() || !self.rules.committed, "the client's own intent");
        } else {
            self.finish(world, intent);
        }
    }

    /// The client's end of a handshake.
    fn finish(&self, world: &mut World, intent: &IntentRef) {
        let found = self.on(world, |region| region.finish_intent(intent));
        assert!(found.is_ok() || !self.rules.committed, "the client's own intent");
    }

    /// Does something to the region of `world`.
    fn on<T>(&self, world: &mut World, act: impl FnOnce(&Region<Words>) -> T) -> T {
        self.region.memory().restore(&world.words);
        let result = act(&self.region);
        world.words = self.region.memory().save();
        result
    }

    /// What is left undone in a state from which nothing goes on.
    pub(crate) fn stuck(&self, world: &World) -> Option<&'static str> {
        let census = self.on(&mut world.clone(), |region| region.census());
        let idle = |connection: &Connection| {
            matches!(connection.server, Server::Plain { .. } | Server::Smc | Server::Dropped)
        };
        if census.intents != 0 && self.rules.committed {
            Some("an intent is left")
        } else if !world.connections.iter().all(idle) {
            Some("a connection is held for ever")
        } else if !world.clients.iter().all(|client| *client == Client::Done) {
            Some("a client waits for ever")
        } else {
            None
        }
    }
}

/// Whether the acceptor holds a connection for `intent`.
fn holds(world: &World, intent: IntentRef) -> bool {
    world.connections.iter().any(|connection| {
        connection.server == Server::Matched(intent)
            || connection.server == Server::Committed(intent)
    })
}

/// Connects, if the pair of addresses is free: earlier connections have ended then, and the
/// accepting end knows it, or it would not have answered.
fn connect(world: &mut World, program: Option<bool>) -> Option<usize> {
    if world.connections.iter().any(|connection| connection.open) {
        return None;
    }
    for connection in &mut world.connections {
        connection.ended = true;
    }
    world.connections.push(Connection {
        open: true,
        ended: false,
        program,
        view: if program.is_some() { View::Plain } else { View::Undecided },
        server: Server::Queued,
        to_server: Vec::new(),
        to_client: Vec::new(),
    });
    Some(world.connections.len() - 1)
}

/// Which promise this state breaks.
pub(crate) fn violation(world: &World) -> Option<&'static str> {
    for connection in &world.connections {
        let plain = matches!(connection.server, Server::Plain { .. });
        if plain && connection.to_server.contains(&Byte::Clc) {
            return Some("a CLC byte reached a plain end");
        }
        if connection.server == Server::Smc && connection.to_server.contains(&Byte::Plain) {
            return Some("a plain byte was taken for CLC");
        }
        if connection.view == View::Plain && connection.to_client.contains(&Byte::Clc) {
            return Some("a CLC byte reached a plain end");
        }
        if connection.view == View::Smc && connection.to_client.contains(&Byte::Plain) {
            return Some("a plain byte was taken for CLC");
        }
        match (connection.view, connection.server) {
            (View::Plain, Server::Smc) | (View::Smc, Server::Plain { .. }) => {
                return Some("the ends disagree");
            }
            (View::Plain, Server::Dropped) if connection.to_server.contains(&Byte::Plain) => {
                return Some("a plain byte was lost");
            }
            (View::Plain, Server::Dropped) if connection.open => {
                return Some("a plain connection was dropped");
            }
            _ => {}
        }
    }
    None
}

/// Takes out of a state what no step depends on any more, so that fewer states differ: bytes that
/// were read, and what still happens to connections that have been given out.
pub(crate) fn settle(world: &mut World) {
    for connection in &mut world.connections {
        if matches!(connection.server, Server::Plain { .. } | Server::Smc | Server::Dropped) {
            connection.ended = true;
            connection.to_server.clear();
        }
        if !connection.open || connection.view != View::Undecided {
            connection.to_client.clear();
            if let Server::Plain { spoke } = &mut connection.server {
                *spoke = true;
            }
        }
    }
}
