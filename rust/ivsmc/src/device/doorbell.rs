//! Doorbells: how the processes attached to one region notify each other, where a device can.

use ivsmc_shm::poll::EventFd;

/// The doorbells of an attached device.
pub(crate) trait Doorbells: Send + Sync {
    /// The id of this device at the ivshmem server, which peers notify.
    fn ivposition(&self) -> u16;

    /// The vector on which this attachment alone is notified of what is in its summary bits, with
    /// the eventfd that counts; `None` if nothing comes in.
    fn own(&self) -> Option<(u16, &EventFd)>;

    /// The eventfd of vector 0, if that is another one: the ivshmem server notifies it when a peer
    /// has left.
    fn departures(&self) -> Option<&EventFd>;

    /// Notifies `vector` of `ivposition`; false if this device has no way there. True is no
    /// promise: a doorbell may be dropped on its way. Who is notified sees all that was stored before.
    fn notify(&self, ivposition: u16, vector: u16) -> bool;
}
