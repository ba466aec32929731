//! The CLC exchange: what both ends of a set-up share.
//!
//! Messages are read exactly: the header is peeked at, then as many bytes are read as it says.
//! Bytes that begin no CLC message stay unread, because they are a plain peer's. Nothing here
//! waits; [`mod@crate::connect`] sleeps between calls, [`mod@crate::accept`] is called when there is more.

use std::time::Duration;

use ivsmc_proto::clc::{
    self, Chid, Decline, Device, Diagnosis, Eid, Gid, InvalidMessage, Message, HEADER_LENGTH,
};
use ivsmc_proto::failpoint::reached;
use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net::{self, MSG_DONTWAIT, MSG_PEEK};

use crate::attachment::Attachment;
use crate::fallback::{Fallback, Reason, Side};
use crate::setting::Setting;
use crate::{Error, Result};

/// How long a CLC message may take (`CLC_WAIT_TIME` of Linux).
pub(crate) const CLC_WAIT: Duration = Duration::from_secs(6);

/// How long the listener may take to match an intent, unless `IVSMC_MATCH_MS` says otherwise.
const MATCH_WAIT: Duration = Duration::from_millis(250);

/// Milliseconds, instead.
static MATCH: Setting = Setting::new("IVSMC_MATCH_MS", 1, "whole milliseconds from 1");

/// Refuses an environment that asks for nonsense.
///
/// # Errors
/// `ApiMisuse`, in words.
pub(crate) fn judge_environment() -> Result<()> {
    MATCH.judge()
}

/// Sets how long connects of this process wait for a listener that is there to take them over
/// shared memory, from now on; `None` is what the environment says. A listener waits for its
/// clients four times as long.
pub fn set_match_wait(wait: Option<Duration>) {
    MATCH.set(wait.map(millis), default_wait);
}

/// How long a listener may take to match an intent.
pub(crate) fn match_wait() -> Duration {
    Duration::from_millis(MATCH.get(default_wait))
}

/// How long a client may take to commit itself, and before that to notice that it is connected.
pub(crate) fn commit_wait() -> Duration {
    match_wait().saturating_mul(4)
}

fn default_wait() -> u64 {
    millis(MATCH_WAIT)
}

fn millis(wait: Duration) -> u64 {
    u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)
}

/// Size class of a DMB of 256 KiB: smaller is up to three times slower, larger no faster.
const DEFAULT_CLASS: u8 = 4;

/// Bytes of a DMB of class 0.
const SMALLEST: u32 = 16 << 10;

/// The largest size class, 1 MiB.
const LARGEST_CLASS: u8 = 6;

/// The smallest class of at least `buffer` bytes.
pub(crate) fn size_class(buffer: Option<u32>) -> u8 {
    let Some(buffer) = buffer else { return DEFAULT_CLASS };
    (0..LARGEST_CLASS).find(|&class| SMALLEST << class >= buffer).unwrap_or(LARGEST_CLASS)
}

/// What there is of a CLC message so far.
#[derive(Default)]
pub(crate) struct Inbox {
    bytes: Vec<u8>,
    /// Bytes of the whole message; 0 while its header has not been seen.
    length: usize,
}

/// What an [`Inbox`] found.
#[derive(Debug)]
pub(crate) enum Heard {
    /// Not all of a message.
    Waiting,
    /// A whole message.
    Message(Message),
    /// Bytes that are no CLC message; all of them are still unread.
    Foreign,
    /// A broken CLC message: what is wrong.
    Broken(String),
    /// The connection ended, or broke.
    Ended,
}

impl Inbox {
    /// Reads as much of one message as is there, and not a byte behind it.
    pub(crate) fn receive(&mut self, conn: &Fd) -> Heard {
        if self.length == 0 {
            let mut header = [0; HEADER_LENGTH];
            match receive(conn, &mut header, MSG_PEEK) {
                Received::Nothing => return Heard::Waiting,
                Received::Ended => return Heard::Ended,
                Received::Bytes(n) if n < HEADER_LENGTH => {
                    return if begins_clc(&header[..n]) { Heard::Waiting } else { Heard::Foreign };
                }
                Received::Bytes(_) => match clc::expected_length(&header) {
                    Ok(length) => self.length = length,
                    Err(InvalidMessage::BadEyecatcher { .. }) => return Heard::Foreign,
                    Err(wrong) => return Heard::Broken(wrong.to_string()),
                },
            }
        }
        while self.bytes.len() < self.length {
            let got = self.bytes.len();
            self.bytes.resize(self.length, 0);
            let received = receive(conn, &mut self.bytes[got..], 0);
            self.bytes.truncate(match received {
                Received::Bytes(n) => got + n,
                _ => got,
            });
            match received {
                Received::Bytes(_) => {}
                Received::Nothing => return Heard::Waiting,
                Received::Ended => return Heard::Ended,
            }
        }
        let decoded = clc::decode(&self.bytes);
        self.bytes.clear();
        self.length = 0;
        match decoded {
            Ok(message) => Heard::Message(message),
            Err(wrong) => Heard::Broken(wrong.to_string()),
        }
    }
}

/// Whether `bytes`, fewer than a header, may become one.
fn begins_clc(bytes: &[u8]) -> bool {
    let n = bytes.len().min(4);
    [clc::Eyecatcher::Smcr, clc::Eyecatcher::Smcd]
        .iter()
        .any(|eyecatcher| eyecatcher.bytes()[..n] == bytes[..n])
}

/// What one `recv` brought.
pub(crate) enum Received {
    Nothing,
    Bytes(usize),
    Ended,
}

fn receive(conn: &Fd, into: &mut [u8], flags: i32) -> Received {
    loop {
        return match net::recv_bytes(conn, into, flags | MSG_DONTWAIT) {
            Ok(0) => Received::Ended,
            Ok(n) => Received::Bytes(n),
            Err(error) => match error.kind() {
                std::io::ErrorKind::WouldBlock => Received::Nothing,
                std::io::ErrorKind::Interrupted => continue,
                _ => Received::Ended,
            },
        };
    }
}

/// Whether there is a byte to read, or the end; reads nothing.
pub(crate) fn peek(conn: &Fd) -> Received {
    receive(conn, &mut [0], MSG_PEEK)
}

/// Sends a whole message; false if the connection does not take it at once.
pub(crate) fn send(conn: &Fd, message: &[u8]) -> bool {
    // A message is far smaller than the send buffer of a connection that carried nothing else.
    net::send(conn, message, MSG_DONTWAIT).is_ok_and(|sent| sent == message.len())
}

/// Declines for `diagnosis`; false if that cannot be sent.
pub(crate) fn send_decline(conn: &Fd, diagnosis: Diagnosis) -> bool {
    let sent = send(conn, &Decline::new(diagnosis).encode());
    if sent {
        reached("clc.decline");
    }
    sent
}

/// The fallback after a Decline of the other end.
pub(crate) fn declined(diagnosis: Diagnosis) -> Fallback {
    let reason = match diagnosis {
        Diagnosis::NOUEID => Reason::EidMismatch,
        Diagnosis::NOSMCD2DEV => Reason::NoCommonRegion,
        Diagnosis::MAX_DMB => Reason::RegionFull,
        _ => Reason::PeerDeclined,
    };
    let sentence = format!("the other end declined: {diagnosis}");
    Fallback { reason, code: diagnosis.0, sentence, side: Side::Peer }
}

/// This process's attachment as CLC names it.
pub(crate) fn device_of(attachment: &Attachment) -> Device {
    let (uuid, me) = (attachment.region().uuid(), attachment.me());
    Device { chid: Chid::of_region(uuid), gid: Gid::of_slot(uuid, me.index, me.generation) }
}

/// The live peer slot of this attachment's region that `device` names.
pub(crate) fn slot_of(attachment: &Attachment, device: Device) -> Option<SlotRef> {
    let uuid = attachment.region().uuid();
    if device.chid != Chid::of_region(uuid) || !device.gid.is_in_region(uuid) {
        return None;
    }
    let (index, generation) = device.gid.slot()?;
    let slot = SlotRef { index, generation };
    attachment.region().is_live(slot).then_some(slot)
}

/// The EIDs of this process: `chosen`, else `IVSMC_EID`, else the default; a comma list.
pub(crate) fn own_eids(chosen: Option<&str>) -> Result<Vec<Eid>> {
    let variable = match chosen {
        Some(_) => None,
        None => std::env::var("IVSMC_EID").ok(),
    };
    let Some(names) = chosen.or(variable.as_deref()) else { return Ok(vec![Eid::DEFAULT]) };
    names
        .split(',')
        .map(|name| {
            Eid::new(name.trim())
                .map_err(|wrong| Error::ApiMisuse(format!("EID {:?}: {wrong}", name.trim())))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_round_up_to_a_class() {
        assert_eq!(size_class(None), 4);
        for (bytes, class) in
            [(0, 0), (1, 0), (16384, 0), (16385, 1), (262_144, 4), (524_289, 6), (u32::MAX, 6)]
        {
            assert_eq!(size_class(Some(bytes)), class, "{bytes}");
        }
    }

    #[test]
    fn eids_are_a_comma_list() {
        let eids = own_eids(Some("a, B-2")).unwrap();
        assert_eq!(eids, [Eid::new("A").unwrap(), Eid::new("B-2").unwrap()]);
        let wrong = own_eids(Some("a,_")).unwrap_err().to_string();
        assert!(wrong.contains("\"_\""), "{wrong}");
    }

    fn pair() -> (Fd, Fd) {
        net::socketpair_stream().unwrap()
    }

    #[test]
    fn reads_a_message_and_not_a_byte_more() {
        let (near, far) = pair();
        let mut bytes = Decline::new(Diagnosis::MEM).encode();
        let length = bytes.len();
        bytes.extend_from_slice(b"after");
        let mut inbox = Inbox::default();
        for (at, byte) in bytes.iter().enumerate().take(length - 1) {
            send(&far, &[*byte]);
            assert!(matches!(inbox.receive(&near), Heard::Waiting), "{at}");
        }
        send(&far, &bytes[length - 1..]);
        let Heard::Message(Message::Decline(decline)) = inbox.receive(&near) else {
            panic!("no message")
        };
        assert_eq!(decline.diagnosis, Diagnosis::MEM);
        let mut rest = [0; 8];
        assert!(matches!(receive(&near, &mut rest, 0), Received::Bytes(5)));
        assert_eq!(&rest[..5], b"after");
    }

    #[test]
    fn leaves_foreign_bytes_unread() {
        for (bytes, foreign) in [
            (&b"GET / HTTP/1.1"[..], true),
            (b"G", true),
            (&[0xE2, 0xD4, 0xC3], false),
            (&[0xE2, 0xD4, 0xC3, b'X', 0], true),
        ] {
            let (near, far) = pair();
            send(&far, bytes);
            match Inbox::default().receive(&near) {
                Heard::Foreign => assert!(foreign),
                Heard::Waiting => assert!(!foreign),
                other => panic!("{other:?}"),
            }
            let mut rest = [0; 32];
            assert!(matches!(receive(&near, &mut rest, 0), Received::Bytes(n) if n == bytes.len()));
        }
    }

    #[test]
    fn names_what_is_broken() {
        let (near, far) = pair();
        send(&far, &[0xE2, 0xD4, 0xC3, 0xD9, 9, 0, 224, 0x26]);
        assert!(matches!(Inbox::default().receive(&near), Heard::Broken(_)));
        drop(far);
        let (near, far) = pair();
        drop(far);
        assert!(matches!(Inbox::default().receive(&near), Heard::Ended));
    }
}
