//! Notifying the peer of a session, and being notified: by doorbell, else by a byte on the TCP
//! connection.
//!
//! A doorbell may get lost where nobody sees it: QEMU drops those that come early. So it is used
//! only once the peer has said, in the control block of its DMB, that one has come through (HEARD).
//! Each end sends one as a test when the session begins, and another now and then for as long as it
//! has to send bytes instead.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use ivsmc_proto::frame::WAKE;
use ivsmc_proto::ring::{Place, Producer};
use ivsmc_proto::slot::SlotRef;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net::{self, MSG_DONTWAIT};

use super::smc::Link;
use super::{Inner, Path};
use crate::attachment::{Attachment, Notified, PeerDmb};
use crate::reactor::lock;

/// How the peer of a session is notified by doorbell. What it is made of holds as long as the peer's
/// slot is in this generation.
pub(super) struct Outlet {
    /// A closed session keeps no attachment.
    attachment: Weak<Attachment>,
    peer: SlotRef,
    ivposition: u16,
    vector: u16,
    /// The peer's summary bit for this session.
    number: u16,
    /// The DMB whose control block says whether the peer has heard.
    place: Place,
}

impl Outlet {
    /// The way to the owner of `tx`; `None` if there is none from this device, or it has no doorbell.
    pub(super) fn to(tx: &PeerDmb, peer: SlotRef) -> Option<Self> {
        let attachment = tx.attachment();
        attachment.doorbells()?;
        let info = attachment.region().slot_info(peer)?;
        Some(Self {
            attachment: Arc::downgrade(attachment),
            peer,
            ivposition: info.ivposition?,
            vector: info.vector?,
            number: tx.number(),
            place: tx.place(),
        })
    }

    fn is_heard(&self) -> bool {
        self.attachment
            .upgrade()
            .is_some_and(|attachment| Producer::new(self.place).is_heard(attachment.memory()))
    }

    /// Notifies the peer; false if that is not possible now.
    ///
    /// The caller has published, has passed a full fence, and has taken the peer's wait word.
    fn notify(&self) -> bool {
        let Some(attachment) = self.attachment.upgrade() else { return false };
        let Some(doorbells) = attachment.doorbells() else { return false };
        // The bit first: who drains the doorbell looks at the bits afterwards. Where the doorbell
        // turns out not to be possible, it costs the peer one look.
        attachment.region().set_summary(self.peer, self.number);
        doorbells.notify(self.ivposition, self.vector)
    }
}

impl Inner {
    /// Has doorbells about this session told to it, and tests whether its own reach the peer.
    pub(super) fn begin_to_hear(self: &Arc<Self>, link: &Link) {
        let session: Weak<Self> = Arc::downgrade(self);
        let is_there = lock(&link.rx).as_ref().is_none_or(|rx| rx.dmb().tell(session));
        if !is_there {
            self.departed();
        }
        if !self.is_heard(link) {
            self.test(link);
        }
    }

    /// Whether the peer has heard this end's doorbells.
    pub(super) fn is_heard(&self, link: &Link) -> bool {
        link.outlet.as_ref().is_some_and(Outlet::is_heard)
    }

    /// Wakes the peer.
    pub(super) fn notify(&self, link: &Link) {
        if !(self.is_heard(link) && self.notify_by_doorbell(link)) {
            if let Ok(conn) = self.conn() {
                self.send_wake(link, &conn);
            }
        }
    }

    /// As [`Inner::notify`], of a session that no longer has its connection and the peer's DMB.
    pub(super) fn wake_peer(&self, link: &Link, conn: &Fd, heard: bool) {
        if !(heard && self.notify_by_doorbell(link)) {
            self.send_wake(link, conn);
        }
    }

    fn notify_by_doorbell(&self, link: &Link) -> bool {
        let sent = link.outlet.as_ref().is_some_and(Outlet::notify);
        if sent {
            link.doorbells_sent.fetch_add(1, Ordering::Relaxed);
        }
        sent
    }

    /// One byte on the connection. A full connection wakes as well.
    fn send_wake(&self, link: &Link, conn: &Fd) {
        let before = link.wakes_sent.fetch_add(1, Ordering::Relaxed);
        // Any other failure is the connection's end, which the background thread sees.
        let _ = net::send(conn, &[WAKE], MSG_DONTWAIT);
        // The first, second, fourth, eighth ... time: doorbells may get through by now.
        if (before + 1).is_power_of_two() {
            self.test(link);
        }
    }

    /// Sends a doorbell for the peer to say that it has come.
    fn test(&self, link: &Link) {
        if link.outlet.as_ref().is_some_and(Outlet::notify) {
            link.doorbells_sent.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Notified for Inner {
    fn notified(&self) {
        let Path::Smc(link) = &self.path else { return };
        link.doorbells_received.fetch_add(1, Ordering::Relaxed);
        link.sleeper.wake_all();
        self.settle(link);
    }

    fn departed(&self) {
        let Path::Smc(link) = &self.path else { return };
        self.ended(link);
        link.sleeper.wake_all();
        self.settle(link);
    }
}
