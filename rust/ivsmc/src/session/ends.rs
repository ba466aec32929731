//! The two ends of rings that a session holds: its own DMB to read, the peer's to write.

use std::mem::MaybeUninit;

use ivsmc_proto::ring::{Consumer, PeerMisbehaved, Producer};

use crate::attachment::{OwnDmb, PeerDmb};
use crate::{Error, Result};

/// What this end writes into.
pub(super) struct Tx {
    ring: Producer,
    dmb: PeerDmb,
    /// Bytes so far.
    pub(super) sent: u64,
}

impl Tx {
    pub(super) fn new(dmb: PeerDmb) -> Self {
        Self { ring: Producer::new(dmb.place()), dmb, sent: 0 }
    }

    pub(super) fn capacity(&self) -> u64 {
        self.ring.place().capacity
    }

    #[inline]
    pub(super) fn room(&mut self) -> Result<u64> {
        self.ring.room(self.dmb.memory()).map_err(misbehaved)
    }

    #[inline]
    pub(super) fn write(&mut self, from: &[u8]) -> Result<usize> {
        self.ring.write(self.dmb.memory(), from).map_err(misbehaved)
    }

    /// Whether the reader is to be woken: it set its wait word, which is taken by this.
    #[inline]
    pub(super) fn take_reader_wait(&self) -> bool {
        self.ring.take_reader_wait(self.dmb.memory())
    }

    pub(super) fn want_room(&mut self, bytes: u64) -> Result<bool> {
        self.ring.want_room(self.dmb.memory(), bytes).map_err(misbehaved)
    }

    pub(super) fn clear_wait(&self) {
        self.ring.clear_wait(self.dmb.memory());
    }

    pub(super) fn set_flags(&self, bits: u64) {
        self.ring.set_flags(self.dmb.memory(), bits);
    }

    pub(super) fn reader_flags(&self) -> u64 {
        self.ring.reader_flags(self.dmb.memory())
    }
}

/// What this end reads from.
pub(super) struct Rx {
    ring: Consumer,
    dmb: OwnDmb,
    /// Bytes so far.
    pub(super) received: u64,
}

impl Rx {
    pub(super) fn new(dmb: OwnDmb) -> Self {
        Self { ring: Consumer::new(dmb.place()), dmb, received: 0 }
    }

    pub(super) fn dmb(&self) -> &OwnDmb {
        &self.dmb
    }

    pub(super) fn capacity(&self) -> u64 {
        self.ring.place().capacity
    }

    #[inline]
    pub(super) fn available(&mut self) -> Result<u64> {
        self.ring.available(self.dmb.memory()).map_err(misbehaved)
    }

    #[inline]
    pub(super) fn read(&mut self, into: &mut [MaybeUninit<u8>]) -> Result<usize> {
        self.ring.read(self.dmb.memory(), into).map_err(misbehaved)
    }

    pub(super) fn peek(&mut self, into: &mut [MaybeUninit<u8>]) -> Result<usize> {
        self.ring.peek(self.dmb.memory(), 0, into).map_err(misbehaved)
    }

    /// Whether the writer is to be woken: there is as much room as it waits for.
    #[inline]
    pub(super) fn take_writer_wait(&self) -> bool {
        self.ring.take_writer_wait(self.dmb.memory())
    }

    pub(super) fn want_data(&mut self, least: u64) -> Result<bool> {
        self.ring.want_data(self.dmb.memory(), least).map_err(misbehaved)
    }

    pub(super) fn clear_wait(&self) {
        self.ring.clear_wait(self.dmb.memory());
    }

    pub(super) fn set_flags(&self, bits: u64) {
        self.ring.set_flags(self.dmb.memory(), bits);
    }

    #[inline]
    pub(super) fn writer_flags(&self) -> u64 {
        self.ring.writer_flags(self.dmb.memory())
    }
}

fn misbehaved(error: PeerMisbehaved) -> Error {
    Error::PeerMisbehaved(error.to_string())
}
