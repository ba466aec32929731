//! Why a session goes over TCP.
//!
//! Each reason has a stable name, the diagnosis code SMC uses for the same thing (`smcss` prints
//! those), a sentence for people that names the regions looked at, and whose side it was.

use std::fmt;

/// Whose side made the session fall back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// This process.
    Local,
    /// The other end.
    Peer,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal, $code:literal;)+) => {
        /// The documented values of a session's fallback reason.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[doc = $doc])+ $name,)+ }

        impl Reason {
            /// Every reason, in the order of the documentation.
            pub const ALL: &'static [Reason] = &[$(Reason::$name,)+];

            /// Stable name, as users see it.
            pub fn name(self) -> &'static str {
                match self { $(Reason::$name => $text,)+ }
            }

            /// SMC's diagnosis code (Linux `net/smc/smc_clc.h`) for the same condition.
            pub fn code(self) -> u32 {
                match self { $(Reason::$name => $code,)+ }
            }
        }
    };
}

reasons! {
    /// No live listener of the destination in any region this process has.
    PeerNoSmc = "PEER_NO_SMC", 0x0301_0000;
    /// Shared memory is switched off (`device="none"` or `IVSMC_DEVICE=none`).
    Disabled = "DISABLED", 0x0300_0000;
    /// No device could be attached.
    NoDevice = "NO_DEVICE", 0x0303_0000;
    /// The private `local` directory is not safe to use, and there is no other device.
    LocalUnsafe = "LOCAL_UNSAFE", 0x0303_0000;
    /// The memory of the only device there is is not cached, so it would be slower than TCP.
    RegionUncached = "REGION_UNCACHED", 0x0303_0000;
    /// The listener is in the directory, but nobody took the intent in time: it does not accept,
    /// or the address is translated on the way.
    NotMatched = "NOT_MATCHED", 0x0301_0000;
    /// The last connects to this listener were not matched; it is not asked again for a while.
    RecentlyNotMatched = "RECENTLY_NOT_MATCHED", 0x0301_0000;
    /// The acceptor gave up on the intent, or bytes came before the handshake.
    Refused = "REFUSED", 0x0301_0000;
    /// The other end sent bytes, or ended, before the handshake: it speaks plain TCP.
    PeerSpokeFirst = "PEER_SPOKE_FIRST", 0x0301_0000;
    /// An accepted connection that announced no intent: a plain TCP client.
    PlainClient = "PLAIN_CLIENT", 0x0301_0000;
    /// No source port of the ephemeral range could be bound.
    NoSourcePort = "NO_SOURCE_PORT", 0x0999_0000;
    /// The region's intent table is full.
    IntentsFull = "INTENTS_FULL", 0x0101_0000;
    /// The region has no room for another DMB, or no memory could be reserved for it.
    RegionFull = "REGION_FULL", 0x030d_0000;
    /// The two ends have no enterprise id (EID) in common.
    EidMismatch = "EID_MISMATCH", 0x0303_0008;
    /// The two ends share no region.
    NoCommonRegion = "NO_COMMON_REGION", 0x0303_0007;
    /// The other end declined; the code is its diagnosis.
    PeerDeclined = "PEER_DECLINED", 0x0500_0000;
    /// The handshake broke off; the connection was made anew in plain TCP.
    HandshakeFailed = "HANDSHAKE_FAILED", 0x0304_0000;
}

/// Why a session is not on shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// The documented value.
    pub reason: Reason,
    /// SMC's diagnosis code; the peer's own where it declined.
    pub code: u32,
    /// One sentence for people.
    pub sentence: String,
    /// Whose side it was.
    pub side: Side,
}

impl Fallback {
    /// A fallback with the reason's own code.
    pub fn new(reason: Reason, side: Side, sentence: impl Into<String>) -> Self {
        Self { reason, code: reason.code(), sentence: sentence.into(), side }
    }
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:#010x}): {}", self.reason.name(), self.code, self.sentence)
    }
}
