//! Intents: how two ends of a TCP connection learn that both speak ivsmc, without one byte on it.
//!
//! The client announces the addresses of a connection before it connects; who accepts a connection
//! looks for its addresses. One word per intent says how far they are; it changes only by a
//! compare-exchange that names the incarnation (sequence, owner, generation) and the state left:
//!
//! ```text
//!            publish           connected         match           commit
//!   free ---------> ANNOUNCED ---------> PENDING -----> MATCHED ------> COMMITTED
//!    ^    (client)      |     (client)      | (acceptor)  |  | (client)   |    |
//!    |                  |                   |             |  | refuse     |    | abandon
//!    |   withdraw       |                   |             |  v (acceptor) |    v (client, reaper)
//!    +--- (client) <----+-------------------+-------------+- REFUSED      |  ABANDONED
//!    +---------------------------------- finish (client) <----------------+    |
//!    +---------------------------- refuse (acceptor), or publish in need <-----+
//! ```
//!
//! Why so many states (each is needed: `tests/intent_search.rs` leaves one out and finds how a
//! byte goes wrong):
//!
//! * ANNOUNCED, until connect() has succeeded. From then on no other connection with these
//!   addresses is ESTABLISHED anywhere; so a connection that is ESTABLISHED *after* its intent was
//!   seen PENDING is the client's own, or the client is dead. Without it an older connection, given
//!   up by a program that used the port before, is taken for the client's.
//! * MATCHED, until the client has agreed. It may have given up, and either may be killed.
//! * COMMITTED, after which neither turns back to plain TCP: the next byte is a CLC message.
//! * ABANDONED, when the client gives up or is killed there before the acceptor has answered. The
//!   acceptor may not have seen it commit yet; were the intent gone, it would take that for a
//!   withdrawal and give out CLC bytes as plain ones. The acceptor that sees it frees it; where
//!   none is left to see it, whoever needs an entry and finds no free one.
//!
//! An entry lies in a window of the table that the client's port selects.

use crate::failpoint::reached;
use crate::host::{Endpoint, Ip};
use crate::layout::WORD;
use crate::memory::Memory;
use crate::region::Region;
use crate::slot::{SlotRef, GENERATION_BITS};

/// Shift of the state.
const STATE_SHIFT: u32 = 61;
/// Shift of the sequence.
const SEQUENCE_SHIFT: u32 = 38;
/// Mask of the sequence, shifted down.
const SEQUENCES: u64 = (1 << 23) - 1;
/// Shift of the slot; the generation is below.
const SLOT_SHIFT: u32 = GENERATION_BITS;
/// Mask of slot and generation.
const OWNER: u64 = (1 << SEQUENCE_SHIFT) - 1;

/// The state of an entry that nobody owns.
const FREE: u64 = 0;
/// The state of an entry whose addresses are being written.
const WRITING: u64 = 1;

/// Offset of the ports in an intent: the client's lowest, the server's above.
const PORTS: u64 = 8;
/// Offset of the client's address, two words.
const CLIENT: u64 = 16;
/// Offset of the server's address, two words.
const SERVER: u64 = 32;

/// Entries that a client's port may have its intent in.
const WINDOW: u32 = 16;

/// How often a transition with several states to leave is tried; in as many attempts an intent
/// that changes by the rules is long at its end.
const TRIES: usize = 8;

/// Both ends of the connection that an intent is about, as the client sees them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct IntentKey {
    /// The end that connects.
    pub client: Endpoint,
    /// The end that accepts.
    pub server: Endpoint,
}

/// How far an intent is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum IntentState {
    /// The client is about to connect.
    Announced,
    /// The client's connection is established.
    Pending,
    /// An acceptor has the connection and speaks ivsmc.
    Matched,
    /// The client knows; the next byte on the connection is a CLC message.
    Committed,
    /// The acceptor has given the connection out as plain TCP.
    Refused,
    /// The client gave up or died after it had committed; the connection is nobody's.
    Abandoned,
}

impl IntentState {
    /// The state as the word has it.
    fn encode(self) -> u64 {
        match self {
            IntentState::Announced => 2,
            IntentState::Pending => 3,
            IntentState::Matched => 4,
            IntentState::Committed => 5,
            IntentState::Refused => 6,
            IntentState::Abandoned => 7,
        }
    }

    /// The state in a word, if somebody owns it and it is to be seen.
    fn decode(word: u64) -> Option<IntentState> {
        match word >> STATE_SHIFT {
            2 => Some(IntentState::Announced),
            3 => Some(IntentState::Pending),
            4 => Some(IntentState::Matched),
            5 => Some(IntentState::Committed),
            6 => Some(IntentState::Refused),
            7 => Some(IntentState::Abandoned),
            _ => None,
        }
    }
}

/// One incarnation of an entry: an intent from its publication until it is freed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct IntentRef {
    /// Number of the entry.
    index: u32,
    /// Sequence of the entry.
    sequence: u32,
    /// The client.
    owner: SlotRef,
}

impl IntentRef {
    /// The client that published it.
    #[must_use]
    pub fn owner(&self) -> SlotRef {
        self.owner
    }

    /// The word of this incarnation in `state`.
    fn word(&self, state: u64) -> u64 {
        state << STATE_SHIFT | u64::from(self.sequence) << SEQUENCE_SHIFT | owner_bits(self.owner)
    }

    /// The incarnation that `word` of entry `index` belongs to.
    #[allow(clippy::cast_possible_truncation)] // Masked to fewer bits than the types have.
    fn of(index: u32, word: u64) -> IntentRef {
        IntentRef {
            index,
            sequence: (word >> SEQUENCE_SHIFT & SEQUENCES) as u32,
            owner: SlotRef {
                index: (word >> SLOT_SHIFT & 0xfff) as u16,
                generation: (word & ((1 << GENERATION_BITS) - 1)) as u32,
            },
        }
    }
}

/// The owner as a word has it.
fn owner_bits(owner: SlotRef) -> u64 {
    u64::from(owner.index) << SLOT_SHIFT | u64::from(owner.generation)
}

/// The word of the free entry that follows `word`.
fn freed(word: u64) -> u64 {
    (((word >> SEQUENCE_SHIFT) + 1) & SEQUENCES) << SEQUENCE_SHIFT
}

/// Whether `word` is an abandoned intent, which is nobody's any more.
fn is_abandoned(word: u64) -> bool {
    IntentState::decode(word) == Some(IntentState::Abandoned)
}

impl<M: Memory> Region<M> {
    /// Announces that `owner`, the caller, is about to connect as `key` says. `None` if there is
    /// no room, or the owner is dead.
    ///
    /// The caller makes it [`IntentState::Pending`] when connect() has succeeded, and in the end
    /// withdraws or finishes it, before it closes the connection.
    pub fn publish_intent(&self, owner: SlotRef, key: &IntentKey) -> Option<IntentRef> {
        let entry = self
            .claim_intent(owner, key, |word| word >> STATE_SHIFT == FREE)
            .or_else(|| self.claim_intent(owner, key, is_abandoned))?;
        reached("intent.claimed");
        let at = self.geometry().intent(entry.index);
        // Pairs with the fence in `reclaim`: either it finds the entry, or we find us dead.
        self.memory().fence();
        if !self.is_live(owner) {
            self.replace(at, entry.word(WRITING), freed(entry.word(WRITING)));
            return None;
        }
        let ports = u64::from(key.server.port) << 16 | u64::from(key.client.port);
        self.set_word(at + PORTS, ports);
        for (base, ip) in [(CLIENT, key.client.ip), (SERVER, key.server.ip)] {
            let words = ip.to_words();
            self.set_word(at + base, words[0]);
            self.set_word(at + base + WORD, words[1]);
        }
        reached("intent.written");
        let announced = entry.word(IntentState::Announced.encode());
        self.step("intent.announced", at, entry.word(WRITING), announced).then_some(entry)
    }

    /// The state of `intent`; `None` if its incarnation has ended: the client withdrew, finished,
    /// or was reclaimed before it committed.
    pub fn intent_state(&self, intent: &IntentRef) -> Option<IntentState> {
        let word = self.word(self.geometry().intent(intent.index));
        if IntentRef::of(intent.index, word) == *intent {
            IntentState::decode(word)
        } else {
            None
        }
    }

    /// The intent of a live client for the connection `key`. Of several (more than one client may
    /// try for one port) the one whose connection is established.
    pub fn find_intent(&self, key: &IntentKey) -> Option<(IntentRef, IntentState)> {
        let mut best: Option<(IntentRef, IntentState)> = None;
        for index in self.window(key) {
            let word = self.word(self.geometry().intent(index));
            let state = IntentState::decode(word).filter(|_| !is_abandoned(word));
            let Some(state) = state else { continue };
            let intent = IntentRef::of(index, word);
            if self.key_of(&intent) != Some(*key) || !self.is_live(intent.owner) {
                continue;
            }
            match state {
                IntentState::Pending => return Some((intent, state)),
                IntentState::Announced => best = Some((intent, state)),
                _ => best = best.or(Some((intent, state))),
            }
        }
        best
    }

    /// The connection that `intent` is about, while its incarnation lasts.
    pub fn key_of(&self, intent: &IntentRef) -> Option<IntentKey> {
        let at = self.geometry().intent(intent.index);
        let ports = self.word(at + PORTS);
        let address = |base| Ip::from_words([self.word(at + base), self.word(at + base + WORD)]);
        let (client, server) = (address(CLIENT), address(SERVER));
        // Those words are written only before an incarnation is announced; see `Region::word`.
        self.intent_state(intent)?;
        let port = |shift: u32| u16::try_from(ports >> shift & 0xffff).ok();
        Some(IntentKey {
            client: Endpoint { ip: client, port: port(0)? },
            server: Endpoint { ip: server, port: port(16)? },
        })
    }

    /// Client, when connect() has succeeded: announced to pending.
    ///
    /// # Errors
    /// The state found; `None` if the incarnation has ended.
    pub fn connected_intent(&self, intent: &IntentRef) -> Result<(), Option<IntentState>> {
        self.advance("intent.pending", intent, IntentState::Announced, IntentState::Pending)
    }

    /// Acceptor, for a connection that it found ESTABLISHED *after* it found the intent pending:
    /// pending to matched.
    ///
    /// # Errors
    /// The state found; `None` if the incarnation has ended.
    pub fn match_intent(&self, intent: &IntentRef) -> Result<(), Option<IntentState>> {
        self.advance("intent.matched", intent, IntentState::Pending, IntentState::Matched)
    }

    /// Acceptor, when it gives up on a match (a byte, the end of the stream, a deadline): matched
    /// to refused, and the connection is plain TCP. If the client has committed meanwhile, it is
    /// not: the bytes are CLC messages. If the client has abandoned it, the acceptor closes the
    /// connection, and this has freed the intent.
    ///
    /// Also when a connection whose intent was committed has ended without an answer, for the last.
    ///
    /// # Errors
    /// The state found; `None` if the incarnation has ended, then the connection is plain TCP too.
    pub fn refuse_intent(&self, intent: &IntentRef) -> Result<(), Option<IntentState>> {
        let (from, to) = (IntentState::Matched, IntentState::Refused);
        let refused = self.advance("intent.refused", intent, from, to);
        if refused == Err(Some(IntentState::Abandoned)) {
            self.free_intent("intent.forgotten", intent, IntentState::Abandoned);
        }
        refused
    }

    /// Client, before its first CLC byte: matched to committed. Only while its connection is open
    /// and nothing came on it.
    ///
    /// # Errors
    /// The state found; `None` if the incarnation has ended.
    pub fn commit_intent(&self, intent: &IntentRef) -> Result<(), Option<IntentState>> {
        self.advance("intent.committed", intent, IntentState::Matched, IntentState::Committed)
    }

    /// Client: gives up on the intent, in whatever state but committed, and frees it. The
    /// connection is plain TCP.
    ///
    /// # Errors
    /// The state found; `None` if the incarnation has ended.
    pub fn withdraw_intent(&self, intent: &IntentRef) -> Result<(), Option<IntentState>> {
        // The acceptor may change it meanwhile, but never back.
        for _ in 0..TRIES {
            match self.intent_state(intent) {
                None => return Err(None),
                Some(found @ (IntentState::Committed | IntentState::Abandoned)) => {
                    return Err(Some(found));
                }
                Some(state) if self.free_intent("intent.withdrawn", intent, state) => return Ok(()),
                Some(_) => {}
            }
        }
        Err(self.intent_state(intent))
    }

    /// Client, when the acceptor has answered on the connection: frees a committed intent.
    ///
    /// # Errors
    /// The state found; `None` if the incarnation has ended.
    pub fn finish_intent(&self, intent: &IntentRef) -> Result<(), Option<IntentState>> {
        if self.free_intent("intent.finished", intent, IntentState::Committed) {
            Ok(())
        } else {
            Err(self.intent_state(intent))
        }
    }

    /// Client, when it gives up after it has committed and before the acceptor has answered; then
    /// it closes the connection.
    ///
    /// # Errors
    /// The state found; `None` if the incarnation has ended.
    pub fn abandon_intent(&self, intent: &IntentRef) -> Result<(), Option<IntentState>> {
        self.advance("intent.abandoned", intent, IntentState::Committed, IntentState::Abandoned)
    }

    /// Frees `intent` if it is in `state`; the step is the failpoint `name`.
    #[inline(always)] // Without failpoints there are no names.
    fn free_intent(&self, name: &'static str, intent: &IntentRef, state: IntentState) -> bool {
        let word = intent.word(state.encode());
        self.step(name, self.geometry().intent(intent.index), word, freed(word))
    }

    /// One transition: a compare-exchange of the whole word. It is the failpoint `name`.
    #[inline(always)] // Without failpoints there are no names.
    fn advance(
        &self,
        name: &'static str,
        intent: &IntentRef,
        from: IntentState,
        to: IntentState,
    ) -> Result<(), Option<IntentState>> {
        let at = self.geometry().intent(intent.index);
        if self.step(name, at, intent.word(from.encode()), intent.word(to.encode())) {
            Ok(())
        } else {
            Err(self.intent_state(intent))
        }
    }

    /// The entries that `key` may be in.
    fn window(&self, key: &IntentKey) -> impl Iterator<Item = u32> {
        let intents = self.geometry().intents();
        // Fibonacci hashing: ports in a row lie far apart.
        let first = u32::from(key.client.port).wrapping_mul(0x9e37_79b9) >> 16;
        (0..WINDOW).map(move |n| (first + n) % intents)
    }

    /// Claims an entry of the window whose word `may` be taken, for writing.
    fn claim_intent(
        &self,
        owner: SlotRef,
        key: &IntentKey,
        may: impl Fn(u64) -> bool,
    ) -> Option<IntentRef> {
        self.window(key).find_map(|index| {
            let at = self.geometry().intent(index);
            let word = self.word(at);
            if !may(word) {
                return None;
            }
            // What an abandoned incarnation was called must not come again: one further.
            let sequence = if word >> STATE_SHIFT == FREE { word } else { freed(word) };
            let entry = IntentRef { owner, ..IntentRef::of(index, sequence) };
            self.replace(at, word, entry.word(WRITING)).then_some(entry)
        })
    }

    /// Frees the intents of `dead`, and makes those abandoned that it had committed; how many
    /// this call changed.
    pub(crate) fn reclaim_intents(&self, dead: SlotRef) -> u32 {
        let changes = |index| {
            let at = self.geometry().intent(index);
            // A word that an acceptor changes meanwhile changes a bounded number of times.
            for _ in 0..TRIES {
                let word = self.word(at);
                let new = match IntentState::decode(word) {
                    Some(IntentState::Abandoned) => return false,
                    Some(IntentState::Committed) => {
                        IntentRef::of(index, word).word(IntentState::Abandoned.encode())
                    }
                    _ => freed(word),
                };
                if word >> STATE_SHIFT == FREE || word & OWNER != owner_bits(dead) {
                    return false;
                }
                if self.step("reclaim.intent", at, word, new) {
                    return true;
                }
            }
            false
        };
        (0..self.geometry().intents()).map(|index| u32::from(changes(index))).sum()
    }

    /// Entries that somebody owns; abandoned ones are nobody's.
    pub(crate) fn count_intents(&self) -> u32 {
        (0..self.geometry().intents())
            .map(|index| self.word(self.geometry().intent(index)))
            .map(|word| u32::from(word >> STATE_SHIFT != FREE && !is_abandoned(word)))
            .sum()
    }
}

#[cfg(test)]
mod tests;
