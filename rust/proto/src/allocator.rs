//! Which granules of a process's extents are in use: a list private to the process.
//!
//! Allocating touches nothing shared, so there is nothing to roll back when a process is killed:
//! its extents are found by their words. A DMB whose owner has let go before its writer is not
//! given back here until [`crate::region::Region::dmb_is_idle`].

use alloc::vec::Vec;

use crate::layout::{Geometry, MAX_SIZE_CLASS};

/// The granules of the extents that one process has claimed.
#[derive(Debug)]
pub struct Allocator {
    /// Granules of an extent, a power of two, 4 to 64.
    per_extent: u32,
    /// The extents, in the order in which they are filled.
    extents: Vec<Extent>,
}

/// One extent of the process.
#[derive(Debug)]
struct Extent {
    /// Its number in the region.
    index: u32,
    /// Bit n: its granule n is in use, or does not exist.
    used: u64,
}

impl Allocator {
    /// An allocator without extents for a region of this geometry.
    #[must_use]
    pub fn new(geometry: &Geometry) -> Allocator {
        Allocator { per_extent: geometry.granules_per_extent(), extents: Vec::new() }
    }

    /// Adds an extent that this process has claimed.
    pub fn add_extent(&mut self, index: u32) {
        debug_assert!(self.extents.iter().all(|extent| extent.index != index));
        let used = self.unused_mask();
        self.extents.push(Extent { index, used });
    }

    /// The first granule of a free place for a DMB of `size_class`, in the extent added first that
    /// has one. `None` if there is none.
    pub fn allocate(&mut self, size_class: u8) -> Option<u32> {
        let (run, ones) = run_of(size_class, self.per_extent)?;
        self.extents.iter_mut().find_map(|extent| {
            let at = (0..self.per_extent)
                .step_by(run as usize)
                .find(|at| extent.used & ones << at == 0)?;
            extent.used |= ones << at;
            Some(extent.index * self.per_extent + at)
        })
    }

    /// Gives the place of a DMB back. Whether it was in use as a whole.
    pub fn free(&mut self, granule: u32, size_class: u8) -> bool {
        let (index, at) = (granule / self.per_extent, granule % self.per_extent);
        let Some((run, ones)) = run_of(size_class, self.per_extent) else {
            return false;
        };
        let extent = self.extents.iter_mut().find(|extent| extent.index == index);
        match extent {
            Some(extent) if at % run == 0 && extent.used >> at & ones == ones => {
                extent.used &= !(ones << at);
                true
            }
            _ => false,
        }
    }

    /// Takes the extents out in which nothing is in use, but for `keep` of them: the caller frees
    /// them in the region.
    pub fn take_idle_extents(&mut self, keep: usize) -> Vec<u32> {
        let unused = self.unused_mask();
        let mut idle = 0;
        let mut taken = Vec::new();
        self.extents.retain(|extent| {
            if extent.used != unused {
                return true;
            }
            idle += 1;
            if idle > keep {
                taken.push(extent.index);
            }
            idle <= keep
        });
        taken
    }

    /// The extents that the allocator has.
    pub fn extents(&self) -> impl Iterator<Item = u32> + '_ {
        self.extents.iter().map(|extent| extent.index)
    }

    /// Granules in use.
    #[must_use]
    pub fn used_granules(&self) -> u32 {
        let unused = self.unused_mask();
        let used = |extent: &Extent| (extent.used & !unused).count_ones();
        self.extents.iter().map(used).sum()
    }

    /// The mask of an extent without DMBs: the granules that it does not have.
    fn unused_mask(&self) -> u64 {
        u64::MAX.checked_shl(self.per_extent).unwrap_or(0)
    }
}

/// Granules of a DMB of `size_class`, and as many ones. `None` if it does not fit into an extent.
fn run_of(size_class: u8, per_extent: u32) -> Option<(u32, u64)> {
    let run = 1u32 << (size_class <= MAX_SIZE_CLASS).then_some(size_class)?;
    (run <= per_extent).then_some((run, u64::MAX >> (64 - run)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MIN_REGION;

    fn allocator(size: u64) -> Allocator {
        Allocator::new(&Geometry::of(size).unwrap())
    }

    #[test]
    fn places_are_aligned_disjoint_and_come_back() {
        for size in [MIN_REGION, 16 << 20, 64 << 20] {
            let mut allocator = allocator(size);
            assert_eq!(allocator.allocate(0), None);
            allocator.add_extent(7);
            allocator.add_extent(2);
            let per_extent = allocator.per_extent;
            let mut taken = Vec::new();
            let mut random = 1u64;
            for _ in 0..2000 {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let class = u8::try_from(random >> 33 & 7).unwrap();
                if random >> 63 == 0 {
                    if let Some(granule) = allocator.allocate(class) {
                        assert_eq!(granule % (1 << class), 0);
                        assert!(granule / per_extent == 7 || granule / per_extent == 2);
                        let range = granule..granule + (1 << class);
                        assert_eq!(range.start / per_extent, (range.end - 1) / per_extent);
                        let disjoint = |(at, class): &(u32, u8)| {
                            at + (1 << class) <= range.start || range.end <= *at
                        };
                        assert!(taken.iter().all(disjoint));
                        taken.push((granule, class));
                    }
                } else if !taken.is_empty() {
                    let (granule, class) = taken.swap_remove((random >> 40) as usize % taken.len());
                    assert!(allocator.free(granule, class));
                    assert!(!allocator.free(granule, class));
                }
                let sum: u32 = taken.iter().map(|(_, class)| 1 << class).sum();
                assert_eq!(allocator.used_granules(), sum);
            }
            for (granule, class) in taken {
                assert!(allocator.free(granule, class));
            }
            assert_eq!(allocator.take_idle_extents(1), [2]);
            assert_eq!(allocator.extents().collect::<Vec<_>>(), [7]);
            assert_eq!(allocator.take_idle_extents(0), [7]);
        }
    }

    #[test]
    fn what_is_not_in_use_is_not_given_back() {
        let mut allocator = allocator(64 << 20);
        allocator.add_extent(0);
        assert_eq!(allocator.allocate(6), Some(0));
        assert_eq!(allocator.allocate(0), None);
        assert!(!allocator.free(64, 0));
        assert!(!allocator.free(1, 1));
        assert!(!allocator.free(0, 7));
        assert_eq!(allocator.take_idle_extents(0), []);
        assert!(allocator.free(0, 6));
    }
}
