//! Which id a newcomer gets.

/// In what order ids are given out.
///
/// In either order an id is given out again only after everything its last holder left in the
/// region has been marked dead, and never if the ivshmem server ended before that one did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdOrder {
    /// The lowest id that is free.
    #[default]
    Lowest,
    /// The one after the last given out, from 0 again after 65535: an id rests as long as it can.
    Rolling,
}

/// Hands out ids, 0..=65535.
#[derive(Debug)]
pub(super) struct Ids {
    order: IdOrder,
    /// Where [`IdOrder::Rolling`] goes on.
    next: u16,
}

impl Ids {
    pub(super) fn new(order: IdOrder) -> Self {
        Self { order, next: 0 }
    }

    /// An id that `is_free`, if there is one.
    pub(super) fn take(&mut self, is_free: impl Fn(u16) -> bool) -> Option<u16> {
        let first = match self.order {
            IdOrder::Lowest => 0,
            IdOrder::Rolling => self.next,
        };
        let id = (0..=u16::MAX).map(|step| first.wrapping_add(step)).find(|&id| is_free(id))?;
        self.next = id.wrapping_add(1);
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_fills_gaps() {
        let mut ids = Ids::new(IdOrder::Lowest);
        assert_eq!(ids.take(|_| true), Some(0));
        assert_eq!(ids.take(|id| id != 0), Some(1));
        assert_eq!(ids.take(|_| true), Some(0));
        assert_eq!(ids.take(|id| id == 65_535), Some(65_535));
        assert_eq!(ids.take(|_| false), None);
    }

    #[test]
    fn rolling_goes_round() {
        let mut ids = Ids::new(IdOrder::Rolling);
        assert_eq!(ids.take(|_| true), Some(0));
        assert_eq!(ids.take(|_| true), Some(1));
        assert_eq!(ids.take(|id| id > 4), Some(5));
        assert_eq!(ids.take(|id| id == 65_535), Some(65_535));
        assert_eq!(ids.take(|id| id != 0), Some(1));
        assert_eq!(ids.take(|_| false), None);
    }
}
