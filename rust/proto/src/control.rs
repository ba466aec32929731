//! The control block of a DMB: its state word, the ring's cursors, end flags and wait words.
//!
//! A control block lies in a table apart from the bytes of its DMB, so that a misplaced copy of
//! data cannot reach it. Each line of 64 bytes has one writer in the steady state, so that two
//! busy ends never fight for a line:
//!
//! ```text
//!   0  STATE                      whoever claims, attaches, lets go (dmb)
//!  64  PRODUCED, WRITER_FLAGS     the writer only
//! 128  CONSUMED, READER_FLAGS     the reader only
//! 192  READER_WAIT                set by the reader before it sleeps, taken by the writer
//! 256  WRITER_WAIT                set by the writer before it sleeps, taken by the reader
//! ```
//!
//! All words but [`STATE`] are zero when a writer is invited ([`RING_WORDS`]).

/// Bytes of one control block: five cache lines.
pub const SIZE: u64 = 5 * LINE;

/// Bytes of a cache line: what one end writes never shares a line with what the other writes.
pub const LINE: u64 = 64;

/// Offset of the state word: owner held, writer, generation.
pub const STATE: u64 = 0;

/// Offset of `produced`: bytes written since the DMB was invited, free-running.
pub const PRODUCED: u64 = LINE;

/// Offset of the writer's end flags, [`DONE_WRITING`] and others; bits are only ever added.
pub const WRITER_FLAGS: u64 = LINE + 8;

/// Offset of `consumed`: bytes read since the DMB was invited, free-running, `<= produced`.
pub const CONSUMED: u64 = 2 * LINE;

/// Offset of the reader's flags, [`READER_CLOSED`] and others; bits that end something are only
/// ever added.
pub const READER_FLAGS: u64 = 2 * LINE + 8;

/// Offset of the reader's wait word: nonzero while the reader wants to be woken by a publication.
pub const READER_WAIT: u64 = 3 * LINE;

/// Offset of the writer's wait word: the value of `consumed` at which the writer wants to be
/// woken, zero while it does not.
pub const WRITER_WAIT: u64 = 4 * LINE;

/// The words that must be zero before a writer is invited.
pub const RING_WORDS: [u64; 6] =
    [PRODUCED, WRITER_FLAGS, CONSUMED, READER_FLAGS, READER_WAIT, WRITER_WAIT];

/// Writer flag: no byte follows `produced`; the other direction goes on (`shutdown(SHUT_WR)`).
pub const DONE_WRITING: u64 = 1;

/// Writer flag: the writer's session was closed; no byte follows `produced`.
pub const WRITER_CLOSED: u64 = 2;

/// Writer flag: the writer gave up; after the bytes published comes a reset, not an end of stream.
pub const WRITER_ABORTED: u64 = 4;

/// Every writer flag this version knows; others are not looked at.
pub const WRITER_FLAGS_KNOWN: u64 = DONE_WRITING | WRITER_CLOSED | WRITER_ABORTED;

/// Reader flag: the reader's session was closed; it takes no more bytes.
pub const READER_CLOSED: u64 = 1;

/// Reader flag: the reader gave up, bytes may be unread.
pub const READER_ABORTED: u64 = 2;

/// Reader flag: the reader has received a doorbell of the writer's slot, so the writer may notify it
/// by doorbell instead of a byte. It ends nothing, and may be taken back.
pub const READER_HEARD: u64 = 4;

/// Every reader flag that ends the direction; others are not looked at there.
pub const READER_ENDS: u64 = READER_CLOSED | READER_ABORTED;

const _: () = {
    let mut i = 0;
    while i < RING_WORDS.len() {
        assert!(RING_WORDS[i] % 8 == 0 && RING_WORDS[i] + 8 <= SIZE);
        assert!(RING_WORDS[i] / LINE != STATE / LINE);
        i += 1;
    }
    assert!(PRODUCED / LINE == WRITER_FLAGS / LINE);
    assert!(CONSUMED / LINE == READER_FLAGS / LINE);
    assert!(PRODUCED / LINE != CONSUMED / LINE);
    assert!(READER_WAIT / LINE != WRITER_WAIT / LINE);
};
