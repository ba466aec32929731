//! Which id a newcomer gets.
//!
//! QEMU's device frees its record of a peer that leaves, and writes into the freed memory when the
//! same id joins again (`hw/misc/ivshmem-pci.c`, `close_peer_eventfds` and `process_msg_connect`;
//! 7.2 and all later ones known). So a client that has heard that an id left must never hear of
//! that id again. An id *rests* while such a client is there: the others are given out first, and
//! when all rest, the clients that heard of the one before do not hear of its new holder. They
//! wake it over TCP.

/// In what order ids are given out, of those that do not rest.
///
/// In either order an id is given out again only after everything its last holder left in the
/// region has been marked dead, and never if the ivshmem server ended before that one did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdOrder {
    /// The lowest id that is free.
    #[default]
    Lowest,
    /// The one after the last given out, from 0 again after 65535.
    Rolling,
}

/// Hands out ids, 0..=65535.
#[derive(Debug)]
pub(super) struct Ids {
    order: IdOrder,
    /// Where [`IdOrder::Rolling`] goes on.
    next: u16,
    /// By id: clients with a lower serial have heard that it left.
    heard: Vec<u64>,
}

impl Ids {
    pub(super) fn new(order: IdOrder) -> Self {
        Self { order, next: 0, heard: vec![0; 1 << 16] }
    }

    /// An id that `is_free`, if there is one, and the serial from which on clients may hear of it.
    /// `oldest` is the lowest serial of the clients that are there.
    pub(super) fn take(
        &mut self,
        oldest: Option<u64>,
        is_free: impl Fn(u16) -> bool,
    ) -> Option<(u16, u64)> {
        let first = match self.order {
            IdOrder::Lowest => 0,
            IdOrder::Rolling => self.next,
        };
        let heard = &self.heard;
        let rests = |id: u16| oldest.is_some_and(|oldest| oldest < heard[usize::from(id)]);
        let ids = (0..=u16::MAX).map(|step| first.wrapping_add(step));
        let mut free = ids.filter(|&id| is_free(id));
        let lowest = free.clone().next()?;
        let (id, heard_from) = match free.find(|&id| !rests(id)) {
            Some(id) => (id, 0),
            None => (lowest, heard[usize::from(lowest)]),
        };
        self.next = id.wrapping_add(1);
        Some((id, heard_from))
    }

    /// The holder of `id` has left, heard by all clients there, whose serials are below `next`.
    pub(super) fn left(&mut self, id: u16, next: u64) {
        self.heard[usize::from(id)] = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is taken, of ids that nobody has heard leave.
    fn taken(ids: &mut Ids, is_free: impl Fn(u16) -> bool) -> Option<u16> {
        let (id, heard_from) = ids.take(None, is_free)?;
        assert_eq!(heard_from, 0);
        Some(id)
    }

    #[test]
    fn lowest_fills_gaps() {
        let mut ids = Ids::new(IdOrder::Lowest);
        assert_eq!(taken(&mut ids, |_| true), Some(0));
        assert_eq!(taken(&mut ids, |id| id != 0), Some(1));
        assert_eq!(taken(&mut ids, |_| true), Some(0));
        assert_eq!(taken(&mut ids, |id| id == 65_535), Some(65_535));
        assert_eq!(taken(&mut ids, |_| false), None);
    }

    #[test]
    fn rolling_goes_round() {
        let mut ids = Ids::new(IdOrder::Rolling);
        assert_eq!(taken(&mut ids, |_| true), Some(0));
        assert_eq!(taken(&mut ids, |_| true), Some(1));
        assert_eq!(taken(&mut ids, |id| id > 4), Some(5));
        assert_eq!(taken(&mut ids, |id| id == 65_535), Some(65_535));
        assert_eq!(taken(&mut ids, |id| id != 0), Some(1));
        assert_eq!(taken(&mut ids, |_| false), None);
    }

    #[test]
    fn an_id_rests_while_somebody_is_there_who_heard_it_leave() {
        let mut ids = Ids::new(IdOrder::Lowest);
        // The client with the serial 1 stays, 2 and 3 had the ids 4 and 5.
        ids.left(4, 3);
        ids.left(5, 4);
        assert_eq!(ids.take(Some(1), |id| id > 3), Some((6, 0)));
        // There is no other: only who came after its last holder left may hear of it.
        assert_eq!(ids.take(Some(1), |id| id == 4), Some((4, 3)));
        assert_eq!(ids.take(Some(1), |id| id == 5), Some((5, 4)));
        // The oldest that is left came when 4 had left and 5 had not.
        assert_eq!(ids.take(Some(3), |id| id > 3), Some((4, 0)));
        assert_eq!(ids.take(Some(3), |id| id == 5), Some((5, 4)));
        // Nobody is left who could have heard anything.
        assert_eq!(ids.take(None, |id| id == 5), Some((5, 0)));
    }
}
