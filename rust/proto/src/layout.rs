//! Where everything lies in a region: a pure function of its size.
//!
//! ```text
//!   0            superblock                                     4 KiB
//!                peer slots            S x 256 B                S = 16 ..= 1024
//!                host records          S x 1 KiB
//!                directory words       4 S x 8 B                dense: scanned at each connect
//!                directory details     4 S x 64 B
//!                intents               4 S x 128 B
//!                extent words          E x 8 B
//!   page         control blocks        one per granule, 320 B
//!   extent size  extents               E x (64 KiB ..= 1 MiB)
//! ```
//!
//! Every process computes [`Geometry`] for itself from the size of the memory that it mapped and
//! never believes a number in the region about it; the superblock's copy is only compared. So an
//! offset made here is always inside the memory.

use core::ops::Range;

use crate::control;
use crate::region::RegionError;
use crate::ring::Place;

/// Bytes of a page: the unit of mapping and of a region's size.
pub const PAGE: u64 = 4096;

/// The smallest region, in bytes.
pub const MIN_REGION: u64 = 1 << 20;

/// Bytes of a region that are used at most; what lies above stays untouched.
pub const MAX_REGION: u64 = 1 << 45;

/// Bytes of a granule: the smallest DMB, and the share of memory that has a control block.
pub const GRANULE: u64 = 16 << 10;

/// The largest size class: a DMB has `GRANULE << class` bytes, 16 KiB to 1 MiB, as in SMC-D.
pub const MAX_SIZE_CLASS: u8 = 6;

/// Bytes of the largest and of the smallest extent.
const EXTENTS: Range<u64> = 64 << 10..1 << 20;

/// Bytes of a peer slot.
pub const SLOT: u64 = 256;
/// Bytes of a host record.
pub const HOST_RECORD: u64 = 1024;
/// Bytes of the details of a directory entry.
pub const DIRECTORY_DETAIL: u64 = 64;
/// Bytes of an intent.
pub const INTENT: u64 = 128;
/// Bytes of a word.
pub const WORD: u64 = 8;

/// Offset of the directory bound, in the superblock's page but not of it: it starts from zero
/// and only grows.
pub(crate) const DIRECTORY_BOUND: u64 = 256;

/// Directory entries, and intents, for each slot.
const ENTRIES_PER_SLOT: u64 = 4;

/// The offsets and counts of one region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes of the region: the memory's size rounded down to pages.
    size: u64,
    /// Peer slots, a power of two, 16..=1024.
    slots: u16,
    /// Extents, 15 or more.
    extents: u32,
    /// Bytes of an extent, a power of two.
    extent_size: u64,
    /// Offset of the extent words.
    extent_words: u64,
    /// Offset of the control blocks, page-aligned.
    control_blocks: u64,
    /// Offset of the first extent, a multiple of the extent size.
    data: u64,
}

impl Geometry {
    /// The geometry of a region in a memory of `size` bytes.
    ///
    /// # Errors
    /// [`RegionError::TooSmall`] below [`MIN_REGION`].
    pub fn of(size: u64) -> Result<Geometry, RegionError> {
        let size = size / PAGE * PAGE;
        if size < MIN_REGION {
            return Err(RegionError::TooSmall { found: size });
        }
        let used = size.min(MAX_REGION);
        let slots = power_of_two_below(used / (64 << 10)).clamp(16, 1024);
        let extent_size = power_of_two_below(used / 32).clamp(EXTENTS.start, EXTENTS.end);
        let entries = ENTRIES_PER_SLOT * slots;
        let extent_words =
            PAGE + slots * (SLOT + HOST_RECORD) + entries * (WORD + DIRECTORY_DETAIL + INTENT);
        let per_extent = extent_size / GRANULE * control::SIZE;
        // As many extents as there would be without rounding, then down to what fits.
        let mut extents = (used - extent_words) / (extent_size + per_extent + WORD);
        loop {
            let control_blocks = (extent_words + extents * WORD).next_multiple_of(PAGE);
            let data = (control_blocks + extents * per_extent).next_multiple_of(extent_size);
            if data + extents * extent_size <= used {
                return Ok(Geometry {
                    size,
                    slots: narrow(slots),
                    extents: narrow(extents),
                    extent_size,
                    extent_words,
                    control_blocks,
                    data,
                });
            }
            extents -= 1;
        }
    }

    /// Bytes of the region.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Number of peer slots.
    #[must_use]
    pub fn slots(&self) -> u16 {
        self.slots
    }

    /// Number of directory entries.
    #[must_use]
    pub fn directory_entries(&self) -> u32 {
        narrow(self.entries())
    }

    /// Number of intents.
    #[must_use]
    pub fn intents(&self) -> u32 {
        narrow(self.entries())
    }

    /// Number of extents.
    #[must_use]
    pub fn extents(&self) -> u32 {
        self.extents
    }

    /// Bytes of an extent.
    #[must_use]
    pub fn extent_size(&self) -> u64 {
        self.extent_size
    }

    /// Granules of an extent: 4 to 64, a power of two.
    #[must_use]
    pub fn granules_per_extent(&self) -> u32 {
        narrow(self.extent_size / GRANULE)
    }

    /// Granules of the region.
    #[must_use]
    pub fn granules(&self) -> u32 {
        self.extents * self.granules_per_extent()
    }

    /// The largest size class of which a DMB fits into an extent.
    #[must_use]
    pub fn largest_class(&self) -> u8 {
        narrow(u64::from(self.granules_per_extent().trailing_zeros()))
    }

    /// Offset of slot `index`.
    pub(crate) fn slot(&self, index: u16) -> u64 {
        PAGE + u64::from(index) * SLOT
    }

    /// Offset of the host record of slot `index`.
    pub(crate) fn host_record(&self, index: u16) -> u64 {
        self.host_records() + u64::from(index) * HOST_RECORD
    }

    /// Offset of the word of directory entry `index`.
    pub(crate) fn directory_word(&self, index: u32) -> u64 {
        self.directory_words() + u64::from(index) * WORD
    }

    /// Offset of the details of directory entry `index`.
    pub(crate) fn directory_detail(&self, index: u32) -> u64 {
        self.directory_details() + u64::from(index) * DIRECTORY_DETAIL
    }

    /// Offset of intent `index`.
    pub(crate) fn intent(&self, index: u32) -> u64 {
        self.intent_table() + u64::from(index) * INTENT
    }

    /// Offset of the word of extent `index`.
    pub(crate) fn extent_word(&self, index: u32) -> u64 {
        self.extent_words + u64::from(index) * WORD
    }

    /// Offset of the control block of `granule`.
    pub(crate) fn control_block(&self, granule: u32) -> u64 {
        self.control_blocks + u64::from(granule) * control::SIZE
    }

    /// The extent of `granule`.
    pub(crate) fn extent_of(&self, granule: u32) -> u32 {
        granule / self.granules_per_extent()
    }

    /// The granules of extent `index`.
    pub(crate) fn granules_of(&self, index: u32) -> Range<u32> {
        let per_extent = self.granules_per_extent();
        index * per_extent..(index + 1) * per_extent
    }

    /// The place of a DMB of `size_class` at `granule`: aligned to its size, inside one extent.
    pub(crate) fn place(&self, granule: u32, size_class: u8) -> Option<Place> {
        if size_class > self.largest_class()
            || granule >= self.granules()
            || granule % (1 << size_class) != 0
        {
            return None;
        }
        Some(Place::new(
            self.control_block(granule),
            self.data + u64::from(granule) * GRANULE,
            GRANULE << size_class,
        ))
    }

    /// The bytes that every attachment uses: they must be backed by memory before
    /// [`crate::region::Region::attach`].
    #[must_use]
    pub fn fixed_range(&self) -> Range<u64> {
        0..self.control_blocks
    }

    /// The bytes that the owner of extent `index` uses: its control blocks, and its data. Both must
    /// be backed by memory before [`crate::region::Region::open_extent`]. The data may be given
    /// back (punched) before the extent is freed; the control blocks stay, for others read them.
    ///
    /// # Panics
    /// If there is no such extent.
    #[must_use]
    pub fn extent_ranges(&self, index: u32) -> (Range<u64>, Range<u64>) {
        assert!(index < self.extents, "extent {index} of {}", self.extents);
        let granules = self.granules_of(index);
        let data = self.data + u64::from(index) * self.extent_size;
        (
            self.control_block(granules.start)..self.control_block(granules.end),
            data..data + self.extent_size,
        )
    }

    /// What the superblock says of the layout, in its order.
    pub(crate) fn described(&self) -> [u64; 12] {
        [
            u64::from(self.slots),
            self.slot(0),
            self.host_records(),
            self.entries(),
            self.directory_words(),
            self.directory_details(),
            self.intent_table(),
            u64::from(self.extents),
            self.extent_size,
            self.extent_words,
            self.control_blocks,
            self.data,
        ]
    }

    /// Directory entries, or intents.
    fn entries(&self) -> u64 {
        ENTRIES_PER_SLOT * u64::from(self.slots)
    }

    /// Offset of the host records.
    fn host_records(&self) -> u64 {
        PAGE + u64::from(self.slots) * SLOT
    }

    /// Offset of the directory words.
    fn directory_words(&self) -> u64 {
        self.host_records() + u64::from(self.slots) * HOST_RECORD
    }

    /// Offset of the directory details.
    fn directory_details(&self) -> u64 {
        self.directory_words() + self.entries() * WORD
    }

    /// Offset of the intents.
    fn intent_table(&self) -> u64 {
        self.directory_details() + self.entries() * DIRECTORY_DETAIL
    }
}

/// The largest power of two that is at most `number` (which is at least 1).
fn power_of_two_below(number: u64) -> u64 {
    1 << number.ilog2()
}

/// A count that its bounds make fit into the smaller type.
fn narrow<T: TryFrom<u64>>(number: u64) -> T {
    T::try_from(number).unwrap_or_else(|_| unreachable!("{number} is bounded by MAX_REGION"))
}

const _: () = {
    assert!(PAGE % SLOT == 0 && PAGE % HOST_RECORD == 0 && PAGE % GRANULE == PAGE);
    assert!(GRANULE << MAX_SIZE_CLASS == EXTENTS.end);
    // A granule fits into 32 bits, a slot into 12, an extent's granules into a 64-bit mask.
    assert!(MAX_REGION / GRANULE <= u32::MAX as u64);
    assert!(EXTENTS.end / GRANULE <= 64);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_of_every_size_are_laid_out_without_overlap() {
        let mut sizes: alloc::vec::Vec<u64> =
            (0..2048).map(|n| MIN_REGION + n * 37 * PAGE).collect();
        sizes.extend(
            (20..50).flat_map(|bits| [(1 << bits) - 1 + PAGE, 1 << bits, (1 << bits) + 12345]),
        );
        for size in sizes.into_iter().filter(|size| *size >= MIN_REGION) {
            let geometry = Geometry::of(size).unwrap();
            let described = geometry.described();
            let offsets = [1, 2, 4, 5, 6, 9, 10, 11].map(|i| described[i]);
            assert!(offsets.windows(2).all(|pair| pair[0] < pair[1]), "{size}: {geometry:?}");
            assert!(offsets.iter().all(|offset| offset % 8 == 0));
            assert!(geometry.extents() >= 14, "{size}: {geometry:?}");
            assert_eq!(geometry.data % geometry.extent_size, 0);
            let (control, data) = geometry.extent_ranges(geometry.extents() - 1);
            assert!(control.end <= geometry.data && data.end <= size);
            assert_eq!(geometry.fixed_range().end, geometry.extent_ranges(0).0.start);
            // At most an extent for alignment, and what the tables take, is lost.
            if size <= MAX_REGION {
                assert!(size - data.end < 2 * geometry.extent_size, "{size}: {geometry:?}");
            }
        }
    }

    #[test]
    fn the_bounds_of_the_layout_are_reached() {
        let small = Geometry::of(MIN_REGION).unwrap();
        assert_eq!((small.slots(), small.extent_size(), small.extents()), (16, 64 << 10, 15));
        assert_eq!(small.largest_class(), 2);
        let large = Geometry::of(64 << 20).unwrap();
        assert_eq!((large.slots(), large.extent_size()), (1024, 1 << 20));
        assert_eq!((large.directory_entries(), large.intents()), (4096, 4096));
        assert_eq!(large.largest_class(), MAX_SIZE_CLASS);
        assert!(matches!(
            Geometry::of(MIN_REGION - 1),
            Err(RegionError::TooSmall { found }) if found == MIN_REGION - PAGE
        ));
        assert_eq!(
            Geometry::of(u64::MAX).unwrap().granules(),
            Geometry::of(MAX_REGION).unwrap().granules()
        );
    }

    #[test]
    fn a_place_is_aligned_and_inside_one_extent() {
        let geometry = Geometry::of(MIN_REGION).unwrap();
        assert!(geometry.place(4, 2).is_some());
        assert!(geometry.place(2, 2).is_none());
        assert!(geometry.place(0, 3).is_none());
        assert!(geometry.place(0, u8::MAX).is_none());
        assert!(geometry.place(u32::MAX, 0).is_none());
        assert!(geometry.place(geometry.granules(), 0).is_none());
        let last = geometry.place(geometry.granules() - 1, 0).unwrap();
        assert!(last.data + last.capacity <= geometry.size());
    }
}
