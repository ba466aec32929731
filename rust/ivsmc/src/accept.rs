//! The accepting side of a set-up: one connection whose client announced an intent.
//!
//! The thread that accepts begins it, and ends it if the client is quick and no other one comes;
//! else the background thread goes on, and never waits. The stages, and what may come in each:
//!
//! ```text
//!   Announced --PENDING, ESTABLISHED: match--> Matched --COMMITTED--> Proposal --Accept--> Confirm
//!       |                                         |                      |                   |
//!       | byte, end, withdrawn, 1 s               | byte, end, 1 s:      | not CLC, Decline: | Decline: plain
//!       v                                         v refuse               | plain             | Confirm: session
//!     plain                                     plain                    | else: closed      | else: closed
//! ```
//!
//! *Plain* hands the connection to the application with every byte still unread. *Closed* means
//! that the client, which has committed itself, connects anew in plain TCP; the application never
//! sees this connection.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use ivsmc_proto::clc::{AcceptConfirm, Device, Diagnosis, Eid, FirstContact, Message, Proposal};
use ivsmc_proto::control::{READER_ABORTED, READER_CLOSED, WRITER_ABORTED, WRITER_CLOSED};
use ivsmc_proto::dmb::Token;
use ivsmc_proto::failpoint::reached;
use ivsmc_proto::intent::{IntentRef, IntentState};
use ivsmc_proto::ring::Consumer;
use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net;
use ivsmc_shm::poll::{self, PollFd};

use crate::acceptor::{Accepted, Acceptor};
use crate::attachment::{Attachment, OwnDmb, PeerDmb};
use crate::fallback::{Fallback, Reason, Side};
use crate::handshake::{self, Heard, Inbox, Received, CLC_WAIT};
use crate::reactor::{lock, Key, Source};
use crate::session::Session;
use crate::spin;
use crate::Deadline;

/// Time between two looks at an intent whose client has not yet noticed that it is connected.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// How long a thread that accepts shakes hands itself: as long as a client takes that is awake.
const HURRY: Duration = Duration::from_millis(2);

/// Time between two looks at an intent meanwhile.
const NAP: Duration = Duration::from_micros(50);

/// A client that has not shaken hands after this long is slow.
const SLOW: Duration = Duration::from_millis(10);

/// A handshake in progress.
pub(crate) struct Handshake {
    acceptor: Arc<Acceptor>,
    begun: Instant,
    key: OnceLock<Key>,
    /// `None` once it is over.
    work: Mutex<Option<Work>>,
}

struct Work {
    conn: Fd,
    peer: SocketAddr,
    /// The intent, and the region it is in.
    attachment: Arc<Attachment>,
    intent: IntentRef,
    stage: Stage,
    inbox: Inbox,
    deadline: Instant,
    watched: bool,
}

enum Stage {
    Announced,
    Matched,
    Proposal,
    Confirm(Box<Offer>),
}

/// What an Accept has offered to whom.
struct Offer {
    own: OwnDmb,
    client: SlotRef,
    device: Device,
    eid: Eid,
}

/// What one look at a handshake leads to.
enum Step {
    /// Look again at once: the stage has changed.
    Again,
    Wait,
    Over(End),
}

/// How a handshake ends.
enum End {
    Plain(Fallback),
    Shared { own: OwnDmb, tx: PeerDmb, client: SlotRef },
    Closed,
}

/// An intent for a connection just accepted.
pub(crate) struct Announcement {
    pub(crate) attachment: Arc<Attachment>,
    pub(crate) intent: IntentRef,
}

impl Handshake {
    /// Takes over a connection whose client announced it.
    ///
    /// With the listening `socket`, from a thread that has nothing else to do until the next
    /// connection comes: then the handshake may be over at once, and its result is returned.
    pub(crate) fn start(
        acceptor: &Arc<Acceptor>,
        conn: Fd,
        peer: SocketAddr,
        announcement: Announcement,
        socket: Option<&OwnedFd>,
    ) -> Option<Accepted> {
        let Announcement { attachment, intent } = announcement;
        let handshake = Arc::new(Self {
            acceptor: Arc::clone(acceptor),
            begun: Instant::now(),
            key: OnceLock::new(),
            work: Mutex::new(Some(Work {
                conn,
                peer,
                attachment,
                intent,
                stage: Stage::Announced,
                inbox: Inbox::default(),
                deadline: Instant::now() + handshake::commit_wait(),
                watched: false,
            })),
        });
        let key = acceptor.reactor().register(Arc::clone(&handshake) as Arc<dyn Source>);
        let _ = handshake.key.set(key);
        if !acceptor.begin_handshake(key, &handshake) {
            handshake.abort();
            return None;
        }
        let result = handshake.go_on(lock(&handshake.work), socket)?;
        acceptor.end_handshake(key, result)
    }

    /// Whether it takes longer than a client needs that is awake.
    pub(crate) fn is_slow(&self) -> bool {
        self.begun.elapsed() > SLOW
    }

    /// Goes on, on the background thread.
    fn advance(&self) {
        if let (Some(result), Some(&key)) = (self.go_on(lock(&self.work), None), self.key.get()) {
            self.acceptor.hand_out(key, result);
        }
    }

    /// Looks at its deadline, and at an intent that may be withdrawn, on the background thread.
    pub(crate) fn look(&self) {
        // Whoever is at it looks as well; the background does not wait for that.
        let Ok(guard) = self.work.try_lock() else { return };
        if let (Some(result), Some(&key)) = (self.go_on(guard, None), self.key.get()) {
            self.acceptor.hand_out(key, result);
        }
    }

    /// Goes on as far as it can. The result, once there is one: a connection for the application,
    /// or none.
    fn go_on(
        &self,
        mut guard: MutexGuard<'_, Option<Work>>,
        socket: Option<&OwnedFd>,
    ) -> Option<Option<Accepted>> {
        let hurry = socket.map(|socket| (socket, Instant::now() + HURRY));
        let work = guard.as_mut()?;
        let end = loop {
            match work.step(&self.acceptor) {
                Step::Again => {}
                Step::Over(end) => break end,
                Step::Wait => {
                    if hurry.is_some_and(|(socket, end)| work.rest(socket, end)) {
                        continue;
                    }
                    match self.keep_watch(work) {
                        Ok(()) => return None,
                        Err(_) => break work.give_up(),
                    }
                }
            }
        };
        let work = guard.take()?;
        drop(guard);
        Some(self.finish(work, end))
    }

    /// Ends it without a result: the listener is being closed.
    pub(crate) fn abort(&self) {
        let work = lock(&self.work).take();
        if let Some(work) = work {
            work.close_intent();
            self.leave_reactor(&work);
        }
    }

    fn keep_watch(&self, work: &mut Work) -> crate::Result<()> {
        let Some(&key) = self.key.get() else { return Ok(()) };
        let reactor = self.acceptor.reactor();
        if !work.watched {
            reactor.watch(key, &work.conn, poll::IN | poll::RDHUP | poll::ET)?;
            work.watched = true;
        }
        if matches!(work.stage, Stage::Announced) {
            reactor.at(Instant::now() + LOOK_AGAIN, key);
        }
        Ok(())
    }

    fn leave_reactor(&self, work: &Work) {
        let reactor = self.acceptor.reactor();
        if work.watched {
            reactor.unwatch(&work.conn);
        }
        if let Some(&key) = self.key.get() {
            reactor.forget(key);
        }
    }

    fn finish(&self, work: Work, end: End) -> Option<Accepted> {
        self.leave_reactor(&work);
        if matches!(end, End::Closed) {
            work.close_intent();
        }
        let Work { conn, peer, .. } = work;
        match end {
            End::Closed => None,
            End::Plain(fallback) => Some(self.acceptor.plain(conn, peer, fallback)),
            End::Shared { own, tx, client } => {
                let lease = self.acceptor.lease().clone();
                // Without it, the client sees a connection that ended.
                Session::smc(conn, tx, own, client, lease).ok().map(|session| Ok((session, peer)))
            }
        }
    }
}

impl Source for Handshake {
    fn ready(&self, _events: u32) {
        self.advance();
    }

    fn expired(&self) {
        self.advance();
    }
}

impl Work {
    fn step(&mut self, acceptor: &Acceptor) -> Step {
        match self.stage {
            Stage::Announced => self.announced(),
            Stage::Matched => self.matched(),
            Stage::Proposal => self.proposal(acceptor),
            Stage::Confirm(_) => self.confirm(),
        }
    }

    /// The connection is about to be closed: the intent will not be looked at any more.
    fn close_intent(&self) {
        if !matches!(self.stage, Stage::Announced) {
            // A client that is matched sees the refusal, one that is committed the end of the
            // connection. An abandoned intent is freed: this was who it waited for.
            let _ = self.attachment.region().refuse_intent(&self.intent);
        }
    }

    fn is_late(&self) -> bool {
        Instant::now() >= self.deadline
    }

    /// Waits a moment for the client; whether to go on at once. A connection that comes to the
    /// listening `socket` goes first.
    fn rest(&self, socket: &OwnedFd, end: Instant) -> bool {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let nap = match self.stage {
            Stage::Announced | Stage::Matched => {
                let state = || self.attachment.region().intent_state(&self.intent);
                let before = state();
                if spin::fully(Deadline::At(end), || state() != before) {
                    return true;
                }
                left.min(NAP)
            }
            Stage::Proposal | Stage::Confirm(_) => left,
        };
        let mut fds = [PollFd::new(&self.conn, poll::IN), PollFd::new(socket, poll::IN)];
        poll::poll(&mut fds, Some(nap)).is_ok() && fds[1].revents() == 0
    }

    /// As it ends when it can go on no longer: before the client's commitment in plain TCP.
    fn give_up(&mut self) -> End {
        let reason = "the handshake could not be watched";
        match self.stage {
            Stage::Announced => End::Plain(refused(reason)),
            Stage::Matched => match self.refuse(reason) {
                Step::Over(end) => end,
                Step::Again | Step::Wait => End::Closed,
            },
            Stage::Proposal | Stage::Confirm(_) => End::Closed,
        }
    }

    /// Not yet taken: the connection may still be an older one with the same addresses.
    fn announced(&mut self) -> Step {
        // In this order: what was there before the client had committed itself is a plain peer's.
        let received = handshake::peek(&self.conn);
        let region = self.attachment.region();
        let state = region.intent_state(&self.intent);
        match (state, received) {
            (Some(IntentState::Announced | IntentState::Pending), Received::Bytes(_)) => {
                Step::Over(End::Plain(spoke_first()))
            }
            (Some(IntentState::Announced), Received::Nothing) => {
                if !self.attachment.is_peer_alive(self.intent.owner()) {
                    // Killed while it connected; its port is somebody else's now.
                    Step::Over(End::Plain(plain_client()))
                } else if self.is_late() {
                    Step::Over(End::Plain(refused("the client did not finish its connect")))
                } else {
                    Step::Wait
                }
            }
            (Some(IntentState::Pending), Received::Nothing) => {
                // After the intent was seen pending: only the client's own connection can be
                // established now.
                let established = net::tcp_info_state(&self.conn)
                    .is_ok_and(|state| state == net::TCP_STATE_ESTABLISHED);
                if !established {
                    return Step::Over(End::Plain(plain_client()));
                }
                if region.match_intent(&self.intent).is_ok() {
                    self.stage = Stage::Matched;
                    self.deadline = Instant::now() + handshake::commit_wait();
                    // The client spins; it may have committed itself already.
                    return Step::Again;
                }
                Step::Over(End::Plain(withdrawn()))
            }
            (None, _) => Step::Over(End::Plain(withdrawn())),
            // Ended, or taken for another connection: this one is not the client's.
            _ => Step::Over(End::Plain(plain_client())),
        }
    }

    /// Taken; the client may commit itself, withdraw, or be a program that knows nothing of this.
    fn matched(&mut self) -> Step {
        // In this order, as above.
        let received = handshake::peek(&self.conn);
        match (self.attachment.region().intent_state(&self.intent), received) {
            (Some(IntentState::Committed), _) => self.committed(),
            (Some(IntentState::Abandoned), _) => self.refuse("the client gave up"),
            (Some(IntentState::Matched), Received::Nothing) if !self.is_late() => Step::Wait,
            (Some(IntentState::Matched), Received::Nothing) => {
                self.refuse("the client did not answer in time")
            }
            (Some(IntentState::Matched), Received::Bytes(_)) => {
                self.refuse("the client sent bytes before the handshake")
            }
            (Some(IntentState::Matched), Received::Ended) => {
                self.refuse("the client ended before the handshake")
            }
            _ => Step::Over(End::Plain(withdrawn())),
        }
    }

    fn committed(&mut self) -> Step {
        self.stage = Stage::Proposal;
        self.deadline = Instant::now() + CLC_WAIT;
        Step::Again
    }

    /// Turns back to plain TCP, unless the client has just committed itself.
    fn refuse(&mut self, why: &str) -> Step {
        match self.attachment.region().refuse_intent(&self.intent) {
            Err(Some(IntentState::Committed)) => self.committed(),
            // It had committed itself; what has come may be a part of a Proposal.
            Err(Some(IntentState::Abandoned)) => Step::Over(End::Closed),
            Ok(()) | Err(_) => Step::Over(End::Plain(refused(why))),
        }
    }

    /// The client has committed itself: the next bytes are CLC, if it keeps the rules.
    fn proposal(&mut self, acceptor: &Acceptor) -> Step {
        match self.inbox.receive(&self.conn) {
            Heard::Waiting if !self.is_late() => Step::Wait,
            Heard::Foreign => Step::Over(End::Plain(spoke_first())),
            Heard::Waiting | Heard::Broken(_) | Heard::Ended => Step::Over(End::Closed),
            Heard::Message(Message::Proposal(proposal)) => match self.answer(acceptor, &proposal) {
                Ok(()) => Step::Again,
                Err(end) => Step::Over(end),
            },
            Heard::Message(Message::Decline(decline)) => {
                Step::Over(End::Plain(handshake::declined(decline.diagnosis)))
            }
            Heard::Message(Message::Unsupported { version, .. }) => Step::Over(self.decline(
                Diagnosis::VERSMISMAT,
                Fallback {
                    reason: Reason::PeerDeclined,
                    code: Diagnosis::VERSMISMAT.0,
                    sentence: format!(
                        "the client proposed no SMC-Dv2 (version {version}); declined with {}",
                        Diagnosis::VERSMISMAT
                    ),
                    side: Side::Local,
                },
            )),
            Heard::Message(_) => Step::Over(End::Closed),
        }
    }

    /// Chooses EID and region, makes a DMB for the client, and sends the Accept.
    fn answer(&mut self, acceptor: &Acceptor, proposal: &Proposal) -> Result<(), End> {
        let own_eids = match acceptor.eids() {
            Ok(eids) => eids,
            Err(wrong) => {
                let fallback = Fallback::new(Reason::EidMismatch, Side::Local, wrong.to_string());
                return Err(self.decline(Diagnosis::CNFERR, fallback));
            }
        };
        let Some(eid) = proposal.choose_eid(&own_eids) else {
            let sentence = format!(
                "no EID in common: the client has {}, this end {}",
                listed(&proposal.eids),
                listed(&own_eids)
            );
            let fallback = Fallback::new(Reason::EidMismatch, Side::Local, sentence);
            return Err(self.decline(Diagnosis::NOUEID, fallback));
        };
        let mut common = acceptor.attachments().iter().flat_map(|attachment| {
            proposal.devices.iter().filter_map(move |&device| {
                let client = handshake::slot_of(attachment, device)?;
                Some((attachment, device, client))
            })
        });
        // Who announced the connection in a region is who it says it is there.
        let mut fitting = common
            .by_ref()
            .filter(|(attachment, _, client)| {
                !Arc::ptr_eq(attachment, &self.attachment) || *client == self.intent.owner()
            })
            .peekable();
        if fitting.peek().is_none() {
            let sentence = format!(
                "the client shares none of the regions {} with this end",
                acceptor.regions()
            );
            let fallback = Fallback::new(Reason::NoCommonRegion, Side::Local, sentence);
            return Err(self.decline(Diagnosis::NOSMCD2DEV, fallback));
        }
        let class = acceptor.size_class();
        let made = fitting.find_map(|(attachment, device, client)| {
            let own = attachment.allocate(class, client).ok()?;
            Some(Offer { own, client, device, eid })
        });
        let Some(offer) = made else {
            let sentence = format!("no room for another DMB in {}", acceptor.regions());
            let fallback = Fallback::new(Reason::RegionFull, Side::Local, sentence);
            return Err(self.decline(Diagnosis::MAX_DMB, fallback));
        };
        let device = handshake::device_of(offer.own.attachment());
        let accept = AcceptConfirm {
            gid: device.gid,
            token: offer.own.token().0,
            size_class: offer.own.size_class(),
            linkid: u32::from(offer.client.index),
            chid: device.chid,
            eid,
            // Peers form no link groups: every contact is the first.
            first_contact: Some(FirstContact::new(acceptor.hostname())),
        };
        if !handshake::send(&self.conn, &accept.encode_accept()) {
            return Err(End::Closed);
        }
        reached("clc.accept");
        self.stage = Stage::Confirm(Box::new(offer));
        self.deadline = Instant::now() + CLC_WAIT;
        Ok(())
    }

    fn decline(&self, diagnosis: Diagnosis, fallback: Fallback) -> End {
        if handshake::send_decline(&self.conn, diagnosis) {
            End::Plain(fallback)
        } else {
            End::Closed
        }
    }

    fn confirm(&mut self) -> Step {
        let confirm = match self.inbox.receive(&self.conn) {
            Heard::Waiting if !self.is_late() => return Step::Wait,
            Heard::Message(Message::Confirm(confirm)) => confirm,
            Heard::Message(Message::Decline(decline)) => {
                return Step::Over(End::Plain(handshake::declined(decline.diagnosis)));
            }
            _ => return Step::Over(End::Closed),
        };
        let Stage::Confirm(offer) = std::mem::replace(&mut self.stage, Stage::Proposal) else {
            return Step::Over(End::Closed);
        };
        let Offer { own, client, device, eid } = *offer;
        let agreed = confirm.gid == device.gid && confirm.chid == device.chid && confirm.eid == eid;
        if !agreed {
            return Step::Over(End::Closed);
        }
        let attachment = own.attachment();
        let attached = attachment
            .attach(Token(confirm.token), confirm.size_class, client)
            .ok()
            .or_else(|| ring_of_the_gone(&own, client));
        Step::Over(attached.map_or(End::Closed, |tx| End::Shared { own, tx, client }))
    }
}

/// The DMB of a client that has closed its session, or died, right after the Confirm: what it sent
/// is to be read all the same. Its own DMB is gone; this one stands for it, says so, and is never
/// read. `None` if the client is still there.
fn ring_of_the_gone(own: &OwnDmb, client: SlotRef) -> Option<PeerDmb> {
    let attachment = own.attachment();
    let memory = attachment.memory();
    // A client that closes sets its flags before it lets go of its DMB.
    let flags = Consumer::new(own.place()).writer_flags(memory);
    let says = if flags & WRITER_ABORTED != 0 {
        READER_ABORTED
    } else if flags & WRITER_CLOSED != 0 {
        READER_CLOSED
    } else if attachment.is_peer_alive(client) {
        return None;
    } else {
        0
    };
    let stand_in = attachment.allocate(0, attachment.me()).ok()?;
    Consumer::new(stand_in.place()).set_flags(memory, says);
    attachment.attach(stand_in.token(), stand_in.size_class(), attachment.me()).ok()
}

fn listed(eids: &[Eid]) -> String {
    let names: Vec<_> = eids.iter().map(Eid::to_string).collect();
    names.join(", ")
}

/// A plain TCP client.
pub(crate) fn plain_client() -> Fallback {
    Fallback::new(Reason::PlainClient, Side::Peer, "the client announced no intent to use SMC")
}

fn withdrawn() -> Fallback {
    Fallback::new(Reason::NotMatched, Side::Peer, "the client gave up waiting for an answer")
}

fn spoke_first() -> Fallback {
    let sentence = "the client sent bytes before the handshake: it speaks plain TCP";
    Fallback::new(Reason::PeerSpokeFirst, Side::Peer, sentence)
}

fn refused(why: &str) -> Fallback {
    Fallback::new(Reason::Refused, Side::Local, why)
}
