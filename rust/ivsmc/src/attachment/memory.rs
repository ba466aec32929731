//! Extents and DMBs of an attachment.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ivsmc_proto::allocator::Allocator;
use ivsmc_proto::dmb::{DmbError, Place, Release, Token};
use ivsmc_proto::failpoint::reached;
use ivsmc_proto::layout::Geometry;
use ivsmc_proto::slot::SlotRef;
use ivsmc_proto::summary;
use ivsmc_shm::mapping::Mapping;

use super::{Attachment, AttachmentStats};
use crate::device::{self, Backing};
use crate::reactor::lock;
use crate::retry::{retry, Tried};

/// The region has no room for another DMB, or no memory could be reserved for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// Idle extents that are kept, so that connecting again and again claims nothing.
const KEPT_IDLE: usize = 1;

/// When the limbo is looked at first: a peer that closes too has let go by then.
const SWEEP: Duration = Duration::from_millis(2);

/// The memory this process has claimed.
pub(super) struct Pool {
    allocator: Allocator,
    /// Released while the writer was there.
    limbo: Vec<Limbo>,
    /// The background thread looks after the limbo.
    sweeping: bool,
    extents: usize,
    dmbs: usize,
}

#[derive(Clone, Copy)]
struct Limbo {
    granule: u32,
    size_class: u8,
}

impl Pool {
    pub(super) fn new(geometry: &Geometry) -> Self {
        Self {
            allocator: Allocator::new(geometry),
            limbo: Vec::new(),
            sweeping: false,
            extents: 0,
            dmbs: 0,
        }
    }
}

impl Attachment {
    /// A DMB that `writer` may write into: of `size_class` (16 KiB << class), or the largest smaller
    /// one there is room for.
    pub(crate) fn allocate(
        self: &Arc<Self>,
        size_class: u8,
        writer: SlotRef,
    ) -> Result<OwnDmb, Full> {
        let largest = size_class.min(self.region.geometry().largest_class());
        for class in (0..=largest).rev() {
            let granule = self.granule(class, class == largest);
            if let Some(dmb) = granule.and_then(|granule| self.invite(granule, class, writer)) {
                return Ok(dmb);
            }
        }
        Err(Full)
    }

    /// Becomes the writer of the DMB `token` of `owner`.
    ///
    /// # Errors
    /// [`DmbError`] if there is no such DMB, or this process is not invited to it.
    pub(crate) fn attach(
        self: &Arc<Self>,
        token: Token,
        size_class: u8,
        owner: SlotRef,
    ) -> Result<PeerDmb, DmbError> {
        let place = self.region.attach_dmb(token, size_class, self.me, owner)?;
        let number = summary::number(token.granule(), size_class);
        Ok(PeerDmb { attachment: Arc::clone(self), token, place, number })
    }

    /// Frees the DMBs in limbo whose writer has let go; whether some remain.
    pub(crate) fn sweep(&self) -> bool {
        let (idle, remain) = {
            let mut pool = lock(&self.pool);
            let Pool { allocator, limbo, sweeping, .. } = &mut *pool;
            limbo.retain(|entry| {
                let idle = self.region.dmb_is_idle(entry.granule);
                if idle {
                    allocator.free(entry.granule, entry.size_class);
                }
                !idle
            });
            *sweeping &= !limbo.is_empty();
            (take_idle(&mut pool, KEPT_IDLE), !pool.limbo.is_empty())
        };
        self.give_back(idle);
        remain
    }

    /// What this attachment has, in numbers.
    pub(crate) fn stats(&self) -> AttachmentStats {
        let pool = lock(&self.pool);
        AttachmentStats { extents: pool.extents, dmbs: pool.dmbs, limbo: pool.limbo.len() }
    }

    /// A free granule of the process, from a new extent if need be; `thorough` looks for dead
    /// peers before it gives up.
    fn granule(&self, size_class: u8, thorough: bool) -> Option<u32> {
        if let Some(granule) = lock(&self.pool).allocator.allocate(size_class) {
            return Some(granule);
        }
        if !self.grow() {
            if !thorough {
                return None;
            }
            self.reap();
            self.sweep();
            // What the dead had may be free extents, or free granules in ours.
            if let Some(granule) = lock(&self.pool).allocator.allocate(size_class) {
                return Some(granule);
            }
            if !self.grow() {
                return None;
            }
        }
        lock(&self.pool).allocator.allocate(size_class)
    }

    /// Claims one more extent and reserves its memory.
    fn grow(&self) -> bool {
        if self.memory_is_ours() && !device::has_room(self.region.geometry().extent_size()) {
            return false;
        }
        let Some(extent) = self.region.claim_extent(self.me) else { return false };
        let is_backed = self.reserve(extent).is_ok();
        reached("extent.backed");
        if !is_backed || !self.region.open_extent(extent, self.me) {
            self.region.free_extent(extent, self.me);
            return false;
        }
        let mut pool = lock(&self.pool);
        pool.allocator.add_extent(extent);
        pool.extents += 1;
        true
    }

    fn reserve(&self, extent: u32) -> io::Result<()> {
        if self.whole {
            return Ok(());
        }
        let (control, data) = self.region.geometry().extent_ranges(extent);
        self.memory().reserve(control)?;
        self.memory().reserve(data)
    }

    /// Whether what is not used is to go back to the system, and what is used counts against the
    /// limits of whoever reserved it.
    fn memory_is_ours(&self) -> bool {
        matches!(self.backing, Backing::Local(_))
    }

    fn invite(self: &Arc<Self>, granule: u32, size_class: u8, writer: SlotRef) -> Option<OwnDmb> {
        match self.region.invite_dmb(granule, size_class, writer) {
            Ok((token, place)) => {
                lock(&self.pool).dmbs += 1;
                // Before the writer can learn of it.
                self.expect_doorbells(granule, size_class, place, writer);
                Some(OwnDmb { attachment: Arc::clone(self), token, granule, size_class, place })
            }
            // Somebody else has written where only this process may.
            Err(_) => {
                lock(&self.pool).limbo.push(Limbo { granule, size_class });
                None
            }
        }
    }

    fn release(self: &Arc<Self>, token: Token, granule: u32, size_class: u8) {
        self.expect_no_doorbells(granule, size_class);
        let released = self.region.release_dmb(token);
        let (idle, begin_to_sweep) = {
            let mut pool = lock(&self.pool);
            pool.dmbs -= 1;
            match released {
                Release::Free => {
                    pool.allocator.free(granule, size_class);
                }
                Release::WriterThere => pool.limbo.push(Limbo { granule, size_class }),
            }
            let idle = take_idle(&mut pool, KEPT_IDLE);
            let in_limbo = !pool.limbo.is_empty();
            (idle, in_limbo && !std::mem::replace(&mut pool.sweeping, in_limbo))
        };
        self.give_back(idle);
        if begin_to_sweep {
            self.sweep_later();
        }
    }

    /// Has the background thread sweep until the limbo is empty.
    fn sweep_later(self: &Arc<Self>) {
        let Some(reactor) = self.reactor.get().and_then(Weak::upgrade) else { return };
        let attachment = Arc::downgrade(self);
        retry(&reactor, SWEEP, move || {
            let Some(attachment) = attachment.upgrade() else { return Tried::Done };
            // A writer that does not let go may be dead.
            if attachment.sweep() && (attachment.reap() == 0 || attachment.sweep()) {
                Tried::Again
            } else {
                Tried::Done
            }
        });
    }

    /// Gives all idle extents back to the region.
    pub(super) fn give_back_idle(&self) {
        let idle = take_idle(&mut lock(&self.pool), 0);
        self.give_back(idle);
    }

    /// Gives idle extents back to the region.
    fn give_back(&self, extents: Vec<u32>) {
        for extent in extents {
            if self.memory_is_ours() {
                // Before anybody else can claim it. Only the data: generations of DMBs go on. What
                // cannot be given back to the system is still free for the next one.
                let (_, data) = self.region.geometry().extent_ranges(extent);
                let _ = self.memory().punch_hole(data);
                reached("extent.emptied");
            }
            self.region.free_extent(extent, self.me);
        }
    }
}

fn take_idle(pool: &mut Pool, keep: usize) -> Vec<u32> {
    let idle = pool.allocator.take_idle_extents(keep);
    pool.extents -= idle.len();
    idle
}

/// A DMB of this process: a peer writes into it, this process reads.
///
/// Dropping it releases it.
pub(crate) struct OwnDmb {
    pub(super) attachment: Arc<Attachment>,
    token: Token,
    pub(super) granule: u32,
    pub(super) size_class: u8,
    place: Place,
}

impl OwnDmb {
    /// Its name, for the writer.
    pub(crate) fn token(&self) -> Token {
        self.token
    }

    /// Its size: 16 KiB << class.
    pub(crate) fn size_class(&self) -> u8 {
        self.size_class
    }

    pub(crate) fn place(&self) -> Place {
        self.place
    }

    /// The memory it lies in.
    #[inline]
    pub(crate) fn memory(&self) -> &Mapping {
        self.attachment.memory()
    }

    pub(crate) fn attachment(&self) -> &Arc<Attachment> {
        &self.attachment
    }
}

impl Drop for OwnDmb {
    fn drop(&mut self) {
        if self.attachment.is_current() {
            self.attachment.release(self.token, self.granule, self.size_class);
        }
    }
}

/// A DMB of a peer: this process writes into it.
///
/// Dropping it lets go of it.
pub(crate) struct PeerDmb {
    attachment: Arc<Attachment>,
    token: Token,
    place: Place,
    number: u16,
}

impl PeerDmb {
    pub(crate) fn place(&self) -> Place {
        self.place
    }

    /// Its owner's summary bit for it.
    pub(crate) fn number(&self) -> u16 {
        self.number
    }

    pub(crate) fn attachment(&self) -> &Arc<Attachment> {
        &self.attachment
    }

    /// The memory it lies in.
    #[inline]
    pub(crate) fn memory(&self) -> &Mapping {
        self.attachment.memory()
    }
}

impl Drop for PeerDmb {
    fn drop(&mut self) {
        if self.attachment.is_current() {
            self.attachment.region.detach_dmb(self.token, self.attachment.me);
        }
    }
}
