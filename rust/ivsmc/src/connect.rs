//! Connecting: over shared memory where the listener is in a region of this process, else over TCP.
//!
//! Without a live listener of the destination in any region this is `socket` and `connect`, and
//! nothing more. With one, the client announces the connection (its *intent*), connects, waits a
//! moment for the listener to take the intent, and exchanges CLC messages on the connection. Up to
//! its own commitment not a byte is sent, so every failure there leaves a clean TCP connection;
//! after it, failures lead to one more connection, in plain TCP.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ivsmc_proto::clc::{
    AcceptConfirm, Diagnosis, Eid, FirstContact, Message, Proposal, MAX_DEVICES,
};
use ivsmc_proto::dmb::Token;
use ivsmc_proto::failpoint::reached;
use ivsmc_proto::host::{Endpoint, Ip};
use ivsmc_proto::intent::{IntentKey, IntentRef, IntentState};
use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net::{self, Family};
use ivsmc_shm::poll::{self, PollFd};
use ivsmc_shm::{errno, fork};

use crate::attachment::Attachment;
use crate::fallback::{Fallback, Reason, Side};
use crate::handshake::{self, Heard, Inbox, CLC_WAIT};
use crate::host::{Deadline, Host, Timeout};
use crate::runtime::{Lease, Runtime};
use crate::session::Session;
use crate::setup::{Regions, Setup};
use crate::source;
use crate::spin;
use crate::{Error, Result};

/// Source ports tried before shared memory is given up.
const PORTS_TRIED: usize = 32;

/// The first and the longest time between two looks at the intent.
const LOOKS: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(2));

/// Whether a session may go over TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Require {
    /// Over shared memory or TCP.
    #[default]
    Any,
    /// Over shared memory, or not at all: [`Error::Required`] instead of any fallback.
    Smc,
}

/// How to connect.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// For the whole of it; [`Timeout::NonBlocking`] is refused with `WouldBlock`.
    pub timeout: Timeout,
    /// Where to connect from; port 0 is any.
    pub source: Option<SocketAddr>,
    /// Device specs, comma list; else `IVSMC_DEVICE`, else what is found.
    pub device: Option<String>,
    /// Whether the session may go over TCP.
    pub require: Require,
    /// Size of the receive ring in bytes, rounded up to 16 KiB..1 MiB; 256 KiB by default.
    pub buffer: Option<u32>,
    /// EIDs, comma list; else `IVSMC_EID`, else the default one.
    pub eid: Option<String>,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            timeout: Timeout::Never,
            source: None,
            device: None,
            require: Require::Any,
            buffer: None,
            eid: None,
        }
    }
}

/// Connects to `address`.
///
/// # Errors
/// Those of a TCP connect; `TimedOut`; `Required` instead of a fallback where that is asked for;
/// `Device` if `options.device` names one that cannot be used. Nothing is left behind.
pub fn connect(address: SocketAddr, options: &ConnectOptions, host: &impl Host) -> Result<Session> {
    if options.timeout == Timeout::NonBlocking {
        return Err(Error::WouldBlock);
    }
    let deadline = options.timeout.deadline();
    let lease = Runtime::current()?.lease()?;
    let connecting = Connecting { address, options, deadline, host, lease };
    let fallback = match connecting.candidates()? {
        Ok(candidates) => match connecting.through(&candidates)? {
            Outcome::Session(session) => return Ok(session),
            Outcome::Plain(conn, fallback) => {
                return connecting.fall_back(fallback, || {
                    net::set_nonblocking(&conn, false)?;
                    Ok(conn)
                });
            }
            Outcome::Nothing(fallback) => fallback,
        },
        Err(fallback) => fallback,
    };
    connecting.fall_back(fallback, || connecting.plain())
}

/// One call of [`connect`].
struct Connecting<'a, H> {
    address: SocketAddr,
    options: &'a ConnectOptions,
    deadline: Deadline,
    host: &'a H,
    lease: Lease,
}

/// A region with a live listener of the destination.
struct Candidate {
    attachment: Arc<Attachment>,
    listener: SlotRef,
}

/// What an attempt at shared memory led to.
enum Outcome {
    Session(Session),
    /// A connection on which neither end has sent or read a byte of the stream.
    Plain(Fd, Fallback),
    /// No connection.
    Nothing(Fallback),
}

/// How the look for a match ended.
enum Seen {
    Committed,
    /// The other end sent a byte, or ended.
    Spoke,
    Refused,
    /// Nobody took the intent in time.
    Missed,
    /// The intent is gone: this process was declared dead.
    Lost,
}

impl<H: Host> Connecting<'_, H> {
    /// The regions in which the destination listens, fastest wake-up first; else why there is none.
    fn candidates(&self) -> Result<Result<Vec<Candidate>, Fallback>> {
        let (lease, device) = (&self.lease, self.options.device.as_deref());
        let regions = if Regions::are_at_hand(lease, device) {
            Regions::open(lease, device)?
        } else {
            // A device may take seconds to open, and need what other threads of this process do.
            let opened = self.host.blocking(|| Regions::open(lease, device))?;
            // A signal that came meanwhile interrupts nothing that comes now.
            if self.host.handles_signals() {
                self.host.interrupted()?;
            }
            opened
        };
        if regions.attachments.is_empty() {
            return Ok(Err(regions.fallback()));
        }
        let to = self.destination();
        let candidates: Vec<_> = regions
            .attachments
            .iter()
            .filter_map(|attachment| {
                let listener = live_listener(attachment, to)?;
                Some(Candidate { attachment: Arc::clone(attachment), listener })
            })
            .take(MAX_DEVICES)
            .collect();
        let Some(first) = candidates.first() else {
            let sentence = format!("no live listener for {} in {}", self.address, regions.names());
            return Ok(Err(Fallback::new(Reason::PeerNoSmc, Side::Peer, sentence)));
        };
        if self.lease.runtime().recently_missed(self.address, first.listener) {
            let sentence = format!(
                "the listener for {} in {} did not answer just now; it is asked again later",
                self.address,
                first.attachment.spec()
            );
            let fallback = Fallback::new(Reason::RecentlyNotMatched, Side::Peer, sentence);
            return Ok(Err(fallback));
        }
        Ok(Ok(candidates))
    }

    /// Where the connection goes, as the directory and the intents have it.
    ///
    /// `::` is loopback; 0.0.0.0 is the source address, or else loopback.
    fn destination(&self) -> Endpoint {
        let given = self.options.source.map(|source| source.ip());
        let ip = match (self.address.ip(), given) {
            (IpAddr::V4(any), Some(source)) if any.is_unspecified() => source,
            (ip, _) => ip,
        };
        Endpoint { ip: Ip::from(ip).as_destination(), port: self.address.port() }
    }

    /// Tries for shared memory, in any of `candidates`, of which there is one.
    fn through(&self, candidates: &[Candidate]) -> Result<Outcome> {
        let first = &candidates[0];
        let eids = handshake::own_eids(self.options.eid.as_deref())?;
        if first.listener == first.attachment.me() {
            Setup::current()?.connects_to_itself(self.address.port());
        }
        let (conn, mut intent) = match self.dial(&first.attachment)? {
            Ok(dialled) => dialled,
            Err(fallback) => return Ok(Outcome::Nothing(fallback)),
        };
        let until = self.share(handshake::match_wait())?;
        let seen = loop {
            match self.host.blocking(|| look_for_match(&mut intent, &conn, until)) {
                Err(error) if is_interruption(&error) => self.host.interrupted()?,
                other => break other?,
            }
        };
        let missed = matches!(seen, Seen::Missed);
        if missed || matches!(seen, Seen::Committed) {
            self.lease.runtime().note_match(self.address, first.listener, !missed);
        }
        let listener =
            || format!("the listener for {} in {}", self.address, first.attachment.spec());
        let (reason, side, sentence) = match seen {
            Seen::Committed => return self.shake_hands(conn, intent, candidates, eids),
            Seen::Spoke => (
                Reason::PeerSpokeFirst,
                Side::Peer,
                format!(
                    "{} sent bytes or ended before the handshake: it speaks plain TCP",
                    self.address
                ),
            ),
            Seen::Refused => {
                (Reason::Refused, Side::Peer, format!("{} refused the handshake", listener()))
            }
            Seen::Missed => (
                Reason::NotMatched,
                Side::Peer,
                format!(
                    "{} did not take the connection in time: it does not accept, or the address \
                     is translated on the way",
                    listener()
                ),
            ),
            Seen::Lost => (
                Reason::NotMatched,
                Side::Local,
                format!("this process was declared dead in {}", first.attachment.spec()),
            ),
        };
        // Before anybody can use the connection.
        drop(intent);
        Ok(Outcome::Plain(conn, Fallback::new(reason, side, sentence)))
    }

    /// Announces and makes a connection.
    fn dial<'r>(
        &self,
        attachment: &'r Arc<Attachment>,
    ) -> Result<Result<(Fd, Intent<'r>), Fallback>> {
        let local =
            |reason, sentence: String| Ok(Err(Fallback::new(reason, Side::Local, sentence)));
        let given = self.options.source.filter(|source| !source.ip().is_unspecified());
        let ip = match given {
            Some(source) => source.ip(),
            None => match net::source_address(self.address) {
                Ok(ip) => ip,
                // There is no way there; the plain connect says so.
                Err(error) => {
                    let sentence = format!("no source address for {}: {error}", self.address);
                    return local(Reason::NoSourcePort, sentence);
                }
            },
        };
        let fixed = self.options.source.map(|source| source.port()).filter(|port| *port != 0);
        let ports = Setup::current()?.ports();
        for _ in 0..PORTS_TRIED {
            let port = match fixed {
                Some(port) => port,
                None => ports.random()?,
            };
            let conn = net::tcp_socket(Family::of(&self.address))?;
            let chosen = match fixed {
                Some(port) => source::bind(&conn, self.address, ip, port),
                None => source::choose(&conn, self.address, ip, given.is_none(), port),
            };
            match chosen {
                Ok(()) => {}
                Err(error) if fixed.is_none() && source::is_taken(&error) => continue,
                Err(error) => return Err(error.into()),
            }
            let key =
                IntentKey { client: Endpoint { ip: ip.into(), port }, server: self.destination() };
            let Some(intent) = Intent::publish(attachment, &key) else {
                return local(
                    Reason::IntentsFull,
                    format!("the intent table of {} is full", attachment.spec()),
                );
            };
            net::set_nonblocking(&conn, true)?;
            match self.finish_connect(&conn, net::connect(&conn, &self.address)) {
                Ok(()) => {
                    reached("intent.connected");
                    // Nobody but this process takes it back.
                    let _ = attachment.region().connected_intent(&intent.entry);
                    return Ok(Ok((conn, intent)));
                }
                Err(Error::Os(error)) if fixed.is_none() && source::is_taken(&error) => {}
                Err(error) => return Err(error),
            }
        }
        local(
            Reason::NoSourcePort,
            format!("none of {PORTS_TRIED} random source ports was free for {}", self.address),
        )
    }

    /// The CLC exchange, after the commitment.
    fn shake_hands(
        &self,
        conn: Fd,
        intent: Intent<'_>,
        candidates: &[Candidate],
        eids: Vec<Eid>,
    ) -> Result<Outcome> {
        let mut intent = intent;
        let exchanged = self.exchange(&conn, &mut intent, candidates, eids);
        // In every case the intent has served; and before the connection is closed.
        drop(intent);
        match exchanged {
            Ok(Exchanged::Shared(shared)) => {
                let Shared { tx, own, server } = *shared;
                let lease = self.lease.clone();
                Session::smc(conn, tx, own, server, lease).map(Outcome::Session)
            }
            Ok(Exchanged::Plain(fallback)) => Ok(Outcome::Plain(conn, fallback)),
            Ok(Exchanged::Failed(cause)) => {
                // A reset: the address must be free for the next connection from the same port.
                let _ = net::set_linger(&conn, Some(0));
                let sentence = format!(
                    "the handshake with {} failed: {cause}; connected anew in plain TCP",
                    self.address
                );
                Ok(Outcome::Nothing(Fallback::new(Reason::HandshakeFailed, Side::Peer, sentence)))
            }
            Err(error) => Err(error),
        }
    }

    fn exchange(
        &self,
        conn: &Fd,
        intent: &mut Intent<'_>,
        candidates: &[Candidate],
        eids: Vec<Eid>,
    ) -> Result<Exchanged> {
        let until = self.share(CLC_WAIT)?;
        let devices = candidates.iter().map(|c| handshake::device_of(&c.attachment)).collect();
        let proposal = Proposal::new(devices, eids.clone());
        if !handshake::send(conn, &proposal.encode()) {
            return Ok(Exchanged::Failed("the Proposal could not be sent".into()));
        }
        reached("clc.proposal");
        let heard = self.hear(conn, until)?;
        intent.answered = heard.is_ok();
        let accept = match heard {
            Ok(Message::Accept(accept)) => accept,
            Ok(Message::Decline(decline)) => {
                return Ok(Exchanged::Plain(handshake::declined(decline.diagnosis)));
            }
            Ok(other) => {
                return Ok(Exchanged::Failed(format!("{} instead of an Accept", other.kind())));
            }
            Err(cause) => return Ok(Exchanged::Failed(cause)),
        };
        let device = ivsmc_proto::clc::Device { chid: accept.chid, gid: accept.gid };
        let chosen = candidates.iter().find_map(|candidate| {
            Some((&candidate.attachment, handshake::slot_of(&candidate.attachment, device)?))
        });
        let Some((attachment, server)) = chosen else {
            return Ok(Exchanged::Failed("the Accept names a peer that is not there".into()));
        };
        if !eids.contains(&accept.eid) {
            return Ok(Exchanged::Failed(format!("the Accept chose the EID {}", accept.eid)));
        }
        let class = handshake::size_class(self.options.buffer);
        let Ok(own) = attachment.allocate(class, server) else {
            if !handshake::send_decline(conn, Diagnosis::MAX_DMB) {
                return Ok(Exchanged::Failed("the Decline could not be sent".into()));
            }
            let sentence = format!("no room for another DMB in {}", attachment.spec());
            let fallback = Fallback::new(Reason::RegionFull, Side::Local, sentence);
            return Ok(Exchanged::Plain(fallback));
        };
        let tx = match attachment.attach(Token(accept.token), accept.size_class, server) {
            Ok(tx) => tx,
            Err(wrong) => {
                return Ok(Exchanged::Failed(format!("the DMB of the Accept: {wrong}")));
            }
        };
        let me = handshake::device_of(attachment);
        let confirm = AcceptConfirm {
            gid: me.gid,
            token: own.token().0,
            size_class: own.size_class(),
            linkid: accept.linkid,
            chid: me.chid,
            eid: accept.eid,
            first_contact: Some(FirstContact::new(Setup::current()?.hostname())),
        };
        if !handshake::send(conn, &confirm.encode_confirm()) {
            return Ok(Exchanged::Failed("the Confirm could not be sent".into()));
        }
        reached("clc.confirm");
        Ok(Exchanged::Shared(Box::new(Shared { tx, own, server })))
    }

    /// Waits for one message, until `until`; else what went wrong.
    fn hear(&self, conn: &Fd, until: Instant) -> Result<Result<Message, String>> {
        let mut inbox = Inbox::default();
        loop {
            let heard = self.host.blocking(|| loop {
                match inbox.receive(conn) {
                    Heard::Waiting => {}
                    heard => return Ok(Some(heard)),
                }
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(None);
                }
                poll::poll(&mut [PollFd::new(conn, poll::IN)], Some(left))?;
            });
            let cause = match heard.map_err(|error: io::Error| Error::from(error)) {
                Err(error) if is_interruption(&error) => {
                    self.host.interrupted()?;
                    continue;
                }
                Err(error) => return Err(error),
                Ok(None) => "no answer in time".to_owned(),
                Ok(Some(Heard::Message(message))) => return Ok(Ok(message)),
                Ok(Some(Heard::Broken(wrong))) => wrong,
                Ok(Some(Heard::Ended)) => "the connection ended".to_owned(),
                Ok(Some(Heard::Foreign | Heard::Waiting)) => {
                    "bytes that are no CLC message".to_owned()
                }
            };
            return Ok(Err(cause));
        }
    }

    /// The end of a wait of at most `longest`, which leaves half of the caller's time.
    fn share(&self, longest: Duration) -> Result<Instant> {
        let wait = self.deadline.left()?.map_or(longest, |left| longest.min(left / 2));
        Ok(Instant::now() + wait)
    }

    /// A session over TCP, unless shared memory is required.
    fn fall_back(&self, fallback: Fallback, conn: impl FnOnce() -> Result<Fd>) -> Result<Session> {
        if self.options.require == Require::Smc {
            return Err(Error::Required(Box::new(fallback)));
        }
        Session::tcp(conn()?, fallback, self.lease.clone())
    }

    /// What a program without ivsmc does.
    fn plain(&self) -> Result<Fd> {
        let conn = net::tcp_socket(Family::of(&self.address))?;
        if let Some(source) = &self.options.source {
            net::bind(&conn, source)?;
        } else {
            source::share(&conn)?;
        }
        let waits = self.deadline != Deadline::Never;
        if waits {
            net::set_nonblocking(&conn, true)?;
        }
        let to = self.address;
        let begun = self.host.blocking(|| net::connect(&conn, &to));
        if let Err(error) = &begun {
            if error.kind() == io::ErrorKind::Interrupted {
                self.host.interrupted()?;
            }
        }
        self.finish_connect(&conn, begun)?;
        if waits {
            net::set_nonblocking(&conn, false)?;
        }
        Ok(conn)
    }

    /// Waits for a connect that has begun.
    fn finish_connect(&self, conn: &Fd, begun: io::Result<()>) -> Result<()> {
        match begun {
            Ok(()) => return Ok(()),
            Err(error)
                if error.kind() == io::ErrorKind::Interrupted
                    || errno::is(&error, errno::EINPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        loop {
            let left = self.deadline.left()?;
            let polled =
                self.host.blocking(|| poll::poll(&mut [PollFd::new(conn, poll::OUT)], left));
            match polled {
                Ok(0) => {}
                Ok(_) => return Ok(net::take_error(conn)?),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    self.host.interrupted()?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// How the CLC exchange ended.
enum Exchanged {
    Shared(Box<Shared>),
    /// Declined; the stream is clean.
    Plain(Fallback),
    /// The connection is of no use any more.
    Failed(String),
}

struct Shared {
    tx: crate::attachment::PeerDmb,
    own: crate::attachment::OwnDmb,
    server: SlotRef,
}

/// A listener of the destination that its prover does not know to be dead.
fn live_listener(attachment: &Attachment, to: Endpoint) -> Option<SlotRef> {
    let (region, me) = (attachment.region(), attachment.record());
    // Each dead one is reclaimed with its entries; who writes them anew is not followed for ever.
    (0..=region.geometry().slots())
        .map_while(|_| region.find_listener(to, &me))
        .find(|listener| attachment.is_peer_alive(*listener))
}

fn is_interruption(error: &Error) -> bool {
    error.errno() == Error::Interrupted.errno()
}

/// A published intent; dropped, it is withdrawn, finished or abandoned.
struct Intent<'a> {
    attachment: &'a Attachment,
    entry: IntentRef,
    committed: bool,
    /// After the commitment, the other end has answered with a CLC message.
    answered: bool,
    generation: u32,
}

impl<'a> Intent<'a> {
    fn publish(attachment: &'a Attachment, key: &IntentKey) -> Option<Self> {
        let entry = attachment.region().publish_intent(attachment.me(), key)?;
        let generation = fork::generation();
        Some(Self { attachment, entry, committed: false, answered: false, generation })
    }

    fn state(&self) -> Option<IntentState> {
        self.attachment.region().intent_state(&self.entry)
    }
}

impl Drop for Intent<'_> {
    fn drop(&mut self) {
        if !fork::is_current(self.generation) {
            return;
        }
        let region = self.attachment.region();
        // Refused only where the intent is gone: this process was declared dead.
        let _ = match (self.committed, self.answered) {
            (false, _) => region.withdraw_intent(&self.entry),
            (true, true) => region.finish_intent(&self.entry),
            (true, false) => region.abandon_intent(&self.entry),
        };
    }
}

/// Looks until `until` whether somebody takes the intent, and commits to it then.
fn look_for_match(intent: &mut Intent<'_>, conn: &Fd, until: Instant) -> Result<Seen> {
    spin::fully(Deadline::At(until), || intent.state() != Some(IntentState::Pending));
    let mut wait = LOOKS.0;
    loop {
        let state = intent.state();
        let left = until.saturating_duration_since(Instant::now());
        let sleep = match state {
            Some(IntentState::Pending) if left.is_zero() => return Ok(Seen::Missed),
            Some(IntentState::Pending) => wait.min(left),
            Some(IntentState::Matched) => Duration::ZERO,
            Some(IntentState::Refused) => return Ok(Seen::Refused),
            // Nobody else makes it any of these while this process lives.
            Some(IntentState::Announced | IntentState::Committed | IntentState::Abandoned)
            | None => return Ok(Seen::Lost),
        };
        // Whatever comes before the commitment is a plain peer's.
        let events = poll::IN | poll::RDHUP;
        if poll::poll(&mut [PollFd::new(conn, events)], Some(sleep))? > 0 {
            return Ok(Seen::Spoke);
        }
        if state == Some(IntentState::Matched) {
            if intent.attachment.region().commit_intent(&intent.entry).is_ok() {
                intent.committed = true;
                return Ok(Seen::Committed);
            }
        } else {
            wait = (wait * 2).min(LOOKS.1);
        }
    }
}
