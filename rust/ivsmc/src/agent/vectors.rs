//! Which client is notified on which vector.
//!
//! ```text
//!   vector 0 ---------> agent ------> departures of every client
//!   vector 1 ---------------------->  doorbell of one client
//!   vector 2 ---------------------->  doorbell of one client
//!   vector 3, the last -> agent ----> doorbells of all clients there are beyond
//! ```
//!
//! A client alone on its vector is notified by the device, without the agent in between; so is one on the
//! last vector, until a second one comes there. A device with one vector has all clients share that.
//!
//! When a vector is wired anew whoever is on it is notified once for nothing: a doorbell may have come
//! just then.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use ivsmc_shm::poll::EventFd;

use super::device::OwnedDevice;

/// The eventfds of one client.
#[derive(Debug)]
pub(super) struct Bells {
    /// Counts on the client's vector.
    pub(super) doorbell: Arc<EventFd>,
    /// Notified when peers have left; absent where the vector is 0.
    pub(super) departures: Option<Arc<EventFd>>,
}

/// The vectors of a device, handed out to clients.
#[derive(Debug)]
pub(super) struct Vectors {
    /// 1..=65536
    count: u16,
    /// Vector 0 is wired to it.
    first: EventFd,
    /// The last vector is wired to it while it is shared, if that is not vector 0.
    last: EventFd,
    /// [`Vectors::last`] is wired.
    is_relayed: bool,
    /// By client.
    given: BTreeMap<u64, Given>,
}

#[derive(Debug)]
struct Given {
    vector: u16,
    doorbell: Arc<EventFd>,
    departures: Option<Arc<EventFd>>,
}

impl Vectors {
    /// Wires vector 0 of `device`.
    pub(super) fn new(device: &dyn OwnedDevice) -> io::Result<Self> {
        let first = EventFd::new()?;
        device.wire(0, &first)?;
        Ok(Self {
            count: device.vectors(),
            first,
            last: EventFd::new()?,
            is_relayed: false,
            given: BTreeMap::new(),
        })
    }

    /// What vector 0 is counted by: [`Vectors::relay_first`] is to be called when it has something.
    pub(super) fn first(&self) -> &EventFd {
        &self.first
    }

    /// What the last vector is counted by while it is shared: then [`Vectors::relay_last`] is to be called
    /// when it has something.
    pub(super) fn last(&self) -> &EventFd {
        &self.last
    }

    /// Passes on what has come on vector 0.
    pub(super) fn relay_first(&self) {
        // What comes after is told anew.
        let _ = self.first.drain();
        self.notify_departures();
    }

    /// Passes on what has come on the last vector.
    pub(super) fn relay_last(&self) {
        let _ = self.last.drain();
        self.notify_all_on(self.count - 1);
    }

    /// Has every client look whether its peers still live.
    pub(super) fn notify_departures(&self) {
        for given in self.given.values() {
            // Clients have it, too, and one may mean ill: never waits.
            let _ = given.departures.as_ref().unwrap_or(&given.doorbell).notify_shared();
        }
    }

    fn notify_all_on(&self, vector: u16) {
        for given in self.given.values().filter(|given| given.vector == vector) {
            let _ = given.doorbell.notify_shared();
        }
    }

    /// Gives `client` a vector: one of its own, if there is one.
    pub(super) fn give(
        &mut self,
        device: &dyn OwnedDevice,
        client: u64,
    ) -> io::Result<(u16, Bells)> {
        let doorbell = Arc::new(EventFd::new()?);
        let departures = if self.count > 1 { Some(Arc::new(EventFd::new()?)) } else { None };
        let last = self.count - 1;
        let vector = (1..last).find(|&vector| self.on(vector) == 0).unwrap_or(last);
        if vector > 0 && self.on(vector) == 0 {
            device.wire(vector, &doorbell)?;
        } else if vector > 0 && !self.is_relayed {
            device.wire(vector, &self.last)?;
            self.is_relayed = true;
            self.notify_all_on(vector);
        }
        let bells = Bells { doorbell: Arc::clone(&doorbell), departures: departures.clone() };
        self.given.insert(client, Given { vector, doorbell, departures });
        Ok((vector, bells))
    }

    /// Takes the vector of `client` back.
    pub(super) fn take_back(&mut self, device: &dyn OwnedDevice, client: u64) {
        let Some(given) = self.given.remove(&client) else { return };
        let vector = given.vector;
        if !self.is_relayed || vector != self.count - 1 {
            return;
        }
        let mut rest = self.given.values().filter(|given| given.vector == vector);
        let wired = match (rest.next(), rest.next()) {
            // Alone from now on. Should it fail it goes on as it was.
            (Some(alone), None) => device.wire(vector, &alone.doorbell),
            (None, _) => Ok(()),
            (Some(_), Some(_)) => return,
        };
        self.is_relayed = wired.is_err();
        self.relay_last();
    }

    /// Whether `client` shares its vector.
    pub(super) fn is_shared(&self, client: u64) -> bool {
        self.given.get(&client).is_some_and(|given| self.on(given.vector) > 1)
    }

    /// Clients on `vector`.
    fn on(&self, vector: u16) -> usize {
        self.given.values().filter(|given| given.vector == vector).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ivsmc_proto::agent::Part;
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::sync::Mutex;

    /// Its vectors, and what they are wired to.
    struct Wires {
        wires: Mutex<Vec<Option<OwnedFd>>>,
        is_broken: Mutex<bool>,
    }

    impl Wires {
        fn new(vectors: usize) -> Self {
            let wires = (0..vectors).map(|_| None).collect();
            Self { wires: Mutex::new(wires), is_broken: Mutex::new(false) }
        }

        /// What a peer's doorbell does.
        fn notify(&self, vector: usize) {
            let wires = self.wires.lock().unwrap();
            let fd = wires[vector].as_ref().unwrap().try_clone().unwrap();
            EventFd::adopt(fd.into()).unwrap().notify().unwrap();
        }
    }

    impl OwnedDevice for Wires {
        fn ivposition(&self) -> u16 {
            0
        }
        fn vectors(&self) -> u16 {
            u16::try_from(self.wires.lock().unwrap().len()).unwrap()
        }
        fn wire(&self, vector: u16, eventfd: &EventFd) -> io::Result<()> {
            if *self.is_broken.lock().unwrap() {
                return Err(io::ErrorKind::Other.into());
            }
            let fd = eventfd.as_fd().try_clone_to_owned()?;
            self.wires.lock().unwrap()[usize::from(vector)] = Some(fd);
            Ok(())
        }
        fn descriptor(&self) -> BorrowedFd<'_> {
            unreachable!()
        }
        fn memory(&self) -> Part {
            unreachable!()
        }
        fn registers(&self) -> Part {
            unreachable!()
        }
        fn can_map_registers(&self) -> bool {
            unreachable!()
        }
    }

    fn counts(bells: &[&Bells]) -> Vec<u64> {
        bells.iter().map(|bells| bells.doorbell.drain().unwrap()).collect()
    }

    #[test]
    fn each_has_a_vector_of_its_own_while_there_are_some() {
        let device = Wires::new(4);
        let mut vectors = Vectors::new(&device).unwrap();
        let (one, a) = vectors.give(&device, 1).unwrap();
        let (two, b) = vectors.give(&device, 2).unwrap();
        let (three, c) = vectors.give(&device, 3).unwrap();
        assert_eq!([one, two, three], [1, 2, 3]);
        for (vector, expected) in [(1, [1, 0, 0]), (2, [0, 1, 0]), (3, [0, 0, 1])] {
            // By the device itself: nothing is relayed.
            device.notify(vector);
            assert_eq!(counts(&[&a, &b, &c]), expected);
        }
        assert_eq!(vectors.last().drain().unwrap(), 0);
        vectors.take_back(&device, 2);
        assert_eq!(vectors.give(&device, 4).unwrap().0, 2);
    }

    #[test]
    fn when_they_run_out_the_last_one_is_shared() {
        let device = Wires::new(3);
        let mut vectors = Vectors::new(&device).unwrap();
        let (_, a) = vectors.give(&device, 1).unwrap();
        let (_, b) = vectors.give(&device, 2).unwrap();
        assert!(!vectors.is_shared(2));
        let (vector, c) = vectors.give(&device, 3).unwrap();
        assert_eq!(vector, 2);
        assert!(vectors.is_shared(2) && vectors.is_shared(3) && !vectors.is_shared(1));
        // The one that was there looks once, for what may have come meanwhile.
        assert_eq!(counts(&[&a, &b, &c]), [0, 1, 0]);
        device.notify(2);
        vectors.relay_last();
        assert_eq!(counts(&[&a, &b, &c]), [0, 1, 1]);

        // Alone again: without the agent in between. What was under way is not lost.
        device.notify(2);
        vectors.take_back(&device, 2);
        assert_eq!(counts(&[&a, &b, &c]), [0, 0, 1]);
        device.notify(2);
        assert_eq!(counts(&[&a, &b, &c]), [0, 0, 1]);
        assert!(!vectors.is_shared(3));
        vectors.take_back(&device, 3);
        let (_, d) = vectors.give(&device, 4).unwrap();
        device.notify(2);
        assert_eq!(counts(&[&a, &c, &d]), [0, 0, 1]);
    }

    #[test]
    fn departures_are_told_to_all() {
        for count in [1, 2, 4] {
            let device = Wires::new(count);
            let mut vectors = Vectors::new(&device).unwrap();
            let clients: Vec<_> =
                (0..3).map(|client| vectors.give(&device, client).unwrap().1).collect();
            for bells in &clients {
                bells.doorbell.drain().unwrap();
            }
            device.notify(0);
            vectors.relay_first();
            for bells in &clients {
                let told = bells.departures.as_ref().unwrap_or(&bells.doorbell);
                assert_eq!(told.drain().unwrap(), 1);
                assert_eq!(bells.departures.is_some(), count > 1);
                // Of sessions nothing was said.
                assert_eq!(bells.doorbell.drain().unwrap(), 0);
            }
        }
    }

    #[test]
    fn one_vector_is_for_all() {
        let device = Wires::new(1);
        let mut vectors = Vectors::new(&device).unwrap();
        let (_, a) = vectors.give(&device, 1).unwrap();
        let (vector, b) = vectors.give(&device, 2).unwrap();
        assert_eq!(vector, 0);
        device.notify(0);
        vectors.relay_first();
        assert_eq!(counts(&[&a, &b]), [1, 1]);
        vectors.take_back(&device, 1);
        device.notify(0);
        vectors.relay_first();
        assert_eq!(counts(&[&a, &b]), [0, 1]);
    }

    #[test]
    fn what_cannot_be_wired_changes_nothing() {
        let device = Wires::new(2);
        let mut vectors = Vectors::new(&device).unwrap();
        let (_, a) = vectors.give(&device, 1).unwrap();
        *device.is_broken.lock().unwrap() = true;
        assert!(vectors.give(&device, 2).is_err());
        device.notify(1);
        assert_eq!(counts(&[&a]), [1]);
        *device.is_broken.lock().unwrap() = false;
        let (_, b) = vectors.give(&device, 2).unwrap();
        *device.is_broken.lock().unwrap() = true;
        // It stays as it was: through the agent.
        vectors.take_back(&device, 1);
        counts(&[&b]);
        device.notify(1);
        vectors.relay_last();
        assert_eq!(counts(&[&b]), [1]);
    }
}
