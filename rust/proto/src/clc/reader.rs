//! A bounded reader over a peer's bytes, and the writer that is its mirror image.

use alloc::vec::Vec;

use super::InvalidMessage;

/// Reads a message from front to back; it knows where it is, and stops at the end.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    /// Bytes already read, 0..=bytes.len().
    at: usize,
}

impl<'a> Reader<'a> {
    /// A reader over `bytes` whose first `at` are already read.
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Reader<'a> {
        Reader { bytes, at: at.min(bytes.len()) }
    }

    /// Offset in the message of what is read next.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn bytes(
        &mut self,
        what: &'static str,
        count: usize,
    ) -> Result<&'a [u8], InvalidMessage> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        match rest.get(..count) {
            Some(read) => {
                self.at += count;
                Ok(read)
            }
            None => Err(InvalidMessage::Truncated {
                what,
                at: self.at,
                needed: count,
                found: rest.len(),
            }),
        }
    }

    pub(super) fn array<const N: usize>(
        &mut self,
        what: &'static str,
    ) -> Result<[u8; N], InvalidMessage> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(what, N)?);
        Ok(array)
    }

    pub(super) fn u8(&mut self, what: &'static str) -> Result<u8, InvalidMessage> {
        self.array(what).map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self, what: &'static str) -> Result<u16, InvalidMessage> {
        self.array(what).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, InvalidMessage> {
        self.array(what).map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, InvalidMessage> {
        self.array(what).map(u64::from_be_bytes)
    }

    /// Passes over bytes that mean nothing here.
    pub(super) fn skip(&mut self, what: &'static str, count: usize) -> Result<(), InvalidMessage> {
        self.bytes(what, count).map(|_| ())
    }

    /// Nothing may be left.
    pub(super) fn finish(self) -> Result<(), InvalidMessage> {
        match self.bytes.len() - self.at {
            0 => Ok(()),
            count => Err(InvalidMessage::TrailingBytes { at: self.at, count }),
        }
    }
}

/// Collects the body of a message.
#[derive(Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Writer {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn u8(&mut self, value: u8) -> &mut Writer {
        self.bytes(&[value])
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Writer {
        self.bytes(&value.to_be_bytes())
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Writer {
        self.bytes(&value.to_be_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Writer {
        self.bytes(&value.to_be_bytes())
    }

    pub(super) fn zeros(&mut self, count: usize) -> &mut Writer {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    pub(super) fn written(&self) -> &[u8] {
        &self.0
    }
}
