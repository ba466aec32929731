//! Which id a newcomer gets.
//!
//! **An id has the same eventfds for ever**, whoever holds it, and no client is told that it left.
//! QEMU's device frees its record of a peer that leaves, and writes into the freed memory when the same
//! id joins again (`hw/misc/ivshmem-pci.c`, `close_peer_eventfds` and `process_msg_connect`; 7.2 and
//! all later ones known): guests die of it. So a client hears of an id once, and what it then has
//! leads to the next holder as well. That the one before is gone clients see in the region; a doorbell
//! that still comes for it wakes the next one for nothing.
//!
//! So ids are not used up either, however many clients come and go beside one that stays: there are as
//! many as there were clients at once.

/// In what order ids are given out.
///
/// In either order an id is given out again only after everything its last holder left in the
/// region has been marked dead, and never if the ivshmem server ended before that one did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdOrder {
    /// The lowest id that is free.
    #[default]
    Lowest,
    /// The one after the last given out, from the first again after 64: each id keeps its eventfds.
    /// With more clients than that: the lowest of the others that is free.
    Rolling,
}

/// Ids that [`IdOrder::Rolling`] goes round.
const ROUND: u32 = 64;
/// Ids there are.
const ALL: u32 = 1 << 16;

/// Hands out ids, 0..=65535.
#[derive(Debug)]
pub(super) struct Ids {
    order: IdOrder,
    /// The lowest that may be given out, 0..=65536.
    first: u32,
    /// Where [`IdOrder::Rolling`] goes on, `first..=first + ROUND`.
    next: u32,
}

impl Ids {
    /// Those from `first` on.
    pub(super) fn new(order: IdOrder, first: u32) -> Self {
        Self { order, first, next: first }
    }

    /// An id that `is_free`, if there is one.
    pub(super) fn take(&mut self, is_free: impl Fn(u16) -> bool) -> Option<u16> {
        let round = match self.order {
            IdOrder::Lowest => self.first,
            IdOrder::Rolling => (self.first + ROUND).min(ALL),
        };
        let id = (self.next..round)
            .chain(self.first..round)
            .chain(round..ALL)
            .filter_map(|id| u16::try_from(id).ok())
            .find(|&id| is_free(id))?;
        if u32::from(id) < round {
            self.next = u32::from(id) + 1;
        }
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_fills_gaps() {
        let mut ids = Ids::new(IdOrder::Lowest, 0);
        assert_eq!(ids.take(|_| true), Some(0));
        assert_eq!(ids.take(|id| id != 0), Some(1));
        assert_eq!(ids.take(|_| true), Some(0));
        assert_eq!(ids.take(|id| id == 65_535), Some(65_535));
        assert_eq!(ids.take(|_| false), None);
    }

    #[test]
    fn rolling_goes_round() {
        let mut ids = Ids::new(IdOrder::Rolling, 0);
        assert_eq!(ids.take(|_| true), Some(0));
        assert_eq!(ids.take(|_| true), Some(1));
        assert_eq!(ids.take(|id| id > 4), Some(5));
        assert_eq!(ids.take(|id| id > 62), Some(63));
        assert_eq!(ids.take(|id| id != 0), Some(1));
        // Beyond the round it stays where it is.
        assert_eq!(ids.take(|id| id > 63), Some(64));
        assert_eq!(ids.take(|id| id == 65_535), Some(65_535));
        assert_eq!(ids.take(|_| true), Some(2));
        assert_eq!(ids.take(|_| false), None);
    }

    #[test]
    fn those_of_former_servers_are_never_given() {
        for order in [IdOrder::Lowest, IdOrder::Rolling] {
            for first in [7, ALL - 3] {
                let mut ids = Ids::new(order, first);
                for _ in 0..200 {
                    assert!(u32::from(ids.take(|_| true).unwrap()) >= first);
                }
            }
            assert_eq!(Ids::new(order, ALL).take(|_| true), None);
        }
    }
}
