//! Waiting on descriptors: `poll`, epoll, and eventfds.
//!
//! Event bits have the same values for `poll` and epoll on Linux, so there is one set of constants.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use crate::fd::Fd;
use crate::{aio, call};

/// There is something to read, or the stream has ended.
pub const IN: u32 = 0x001;
/// There is room to write.
pub const OUT: u32 = 0x004;
/// The descriptor has an error (always reported).
pub const ERR: u32 = 0x008;
/// The other end is gone altogether (always reported).
pub const HUP: u32 = 0x010;
/// The number is not open (`poll` only, always reported).
pub const NVAL: u32 = 0x020;
/// The other end will send no more.
pub const RDHUP: u32 = 0x2000;
/// Epoll: wake only one of several epolls that watch the same descriptor.
pub const EXCLUSIVE: u32 = 1 << 28;
/// Epoll: report once, until modified.
pub const ONESHOT: u32 = 1 << 30;
/// Epoll: report changes, not states.
pub const ET: u32 = 1 << 31;

const _: () = {
    assert!(IN == libc::EPOLLIN as u32 && IN == libc::POLLIN as u32);
    assert!(OUT == libc::EPOLLOUT as u32 && OUT == libc::POLLOUT as u32);
    assert!(ERR == libc::EPOLLERR as u32 && ERR == libc::POLLERR as u32);
    assert!(HUP == libc::EPOLLHUP as u32 && HUP == libc::POLLHUP as u32);
    assert!(NVAL == libc::POLLNVAL as u32);
    assert!(RDHUP == libc::EPOLLRDHUP as u32 && RDHUP == libc::POLLRDHUP as u32);
    assert!(EXCLUSIVE == libc::EPOLLEXCLUSIVE as u32);
    assert!(ONESHOT == libc::EPOLLONESHOT as u32);
    assert!(ET == libc::EPOLLET as u32);
};

/// One descriptor to wait on, and what was found.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct PollFd<'fd> {
    raw: libc::pollfd,
    borrowed: PhantomData<BorrowedFd<'fd>>,
}

impl<'fd> PollFd<'fd> {
    /// Waits for any of `events` on `fd` ([`IN`], [`OUT`], [`RDHUP`]; errors are always reported).
    #[inline]
    #[must_use]
    pub fn new(fd: &'fd impl AsFd, events: u32) -> PollFd<'fd> {
        PollFd {
            raw: libc::pollfd {
                fd: fd.as_fd().as_raw_fd(),
                // The bits of `poll` are the low 14.
                #[allow(clippy::cast_possible_truncation)]
                events: (events & 0x3fff) as i16,
                revents: 0,
            },
            borrowed: PhantomData,
        }
    }

    /// What the last [`poll`] found: bits of [`IN`], [`OUT`], [`RDHUP`], [`ERR`], [`HUP`], [`NVAL`].
    #[inline]
    #[must_use]
    pub fn revents(&self) -> u32 {
        u32::from(self.raw.revents as u16)
    }
}

/// Waits until one of `fds` has what it waits for; returns how many do, 0 after the timeout.
///
/// # Errors
/// `Interrupted` by a signal; else those of `ppoll`.
#[inline]
pub fn poll(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<usize> {
    let mut timeout = timeout.map(call::timespec);
    let timeout = timeout.as_mut().map_or(std::ptr::null(), |timeout| &raw const *timeout);
    // SAFETY: ppoll needs `nfds` entries that it may write (`PollFd` is a transparent `pollfd`, the
    // slice is exclusively borrowed, the descriptors are borrowed with it), a null or valid
    // timespec (a local that outlives the call), and a null signal mask.
    let found = unsafe {
        libc::ppoll(fds.as_mut_ptr().cast(), fds.len() as libc::nfds_t, timeout, std::ptr::null())
    };
    call::check_count(found as isize)
}

/// An epoll instance whose entries carry a `u64` key.
#[derive(Debug)]
pub struct Epoll(Fd);

/// One thing an [`Epoll`] reports.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct EpollEvent(libc::epoll_event);

impl EpollEvent {
    /// Bits of [`IN`], [`OUT`], [`RDHUP`], [`ERR`], [`HUP`].
    #[must_use]
    pub fn events(&self) -> u32 {
        self.0.events
    }

    /// The key the descriptor was added with.
    #[must_use]
    pub fn key(&self) -> u64 {
        self.0.u64
    }
}

impl Default for EpollEvent {
    fn default() -> EpollEvent {
        EpollEvent(libc::epoll_event { events: 0, u64: 0 })
    }
}

impl Epoll {
    /// A new instance.
    ///
    /// # Errors
    /// Those of `epoll_create1`.
    pub fn new() -> io::Result<Epoll> {
        // SAFETY: epoll_create1 takes flags only; the returned number is new and has no owner.
        unsafe {
            let number = call::check(libc::epoll_create1(libc::EPOLL_CLOEXEC))?;
            Ok(Epoll(Fd::from_call(number)))
        }
    }

    /// Watches `fd` for `events` under `key`.
    ///
    /// # Errors
    /// Those of `epoll_ctl`: `EEXIST` if it is watched already.
    pub fn add(&self, fd: impl AsFd, events: u32, key: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, &fd, events, key)
    }

    /// Changes what `fd` is watched for.
    ///
    /// # Errors
    /// Those of `epoll_ctl`: `ENOENT` if it is not watched.
    pub fn modify(&self, fd: impl AsFd, events: u32, key: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, &fd, events, key)
    }

    /// Watches `fd` no longer. Events already handed out by a running [`wait`](Self::wait) may follow.
    ///
    /// # Errors
    /// Those of `epoll_ctl`: `ENOENT` if it is not watched.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, &fd, 0, 0)
    }

    /// Waits for events and stores them at the start of `into`; returns how many, 0 after the timeout.
    ///
    /// The timeout is rounded up to milliseconds.
    ///
    /// # Errors
    /// `Interrupted` by a signal; `InvalidInput` if `into` is empty.
    pub fn wait(&self, into: &mut [EpollEvent], timeout: Option<Duration>) -> io::Result<usize> {
        let timeout = timeout.map_or(-1, |timeout| {
            let rounded = timeout.saturating_add(Duration::from_nanos(999_999)).as_millis();
            i32::try_from(rounded).unwrap_or(i32::MAX)
        });
        let room = i32::try_from(into.len()).unwrap_or(i32::MAX);
        // SAFETY: epoll_wait writes at most `room` events into the slice, which has that many
        // (`EpollEvent` is a transparent `epoll_event`) and is exclusively borrowed.
        let found = unsafe {
            libc::epoll_wait(self.0.as_raw_fd(), into.as_mut_ptr().cast(), room, timeout)
        };
        call::check_count(found as isize)
    }

    fn control(&self, what: i32, fd: &impl AsFd, events: u32, key: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events, u64: key };
        let number = fd.as_fd().as_raw_fd();
        // SAFETY: epoll_ctl reads one event, a local; both descriptors are borrowed and open.
        call::check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), what, number, &raw mut event) })
            .map(drop)
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A counter to wait on: what an interrupt of a doorbell arrives at.
#[derive(Debug)]
pub struct EventFd(Fd);

impl EventFd {
    /// A new one with count 0, non-blocking.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn new() -> io::Result<EventFd> {
        // SAFETY: eventfd takes numbers only; the returned number is new and has no owner.
        unsafe {
            let number = call::check(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK))?;
            Ok(EventFd(Fd::from_call(number)))
        }
    }

    /// Takes over one that came from an ivshmem server, and makes it non-blocking.
    ///
    /// That it is an eventfd is not known: whatever else it is only gives errors or no events.
    ///
    /// # Errors
    /// Those of `fcntl`.
    pub fn adopt(fd: Fd) -> io::Result<EventFd> {
        crate::net::set_nonblocking(&fd, true)?;
        Ok(EventFd(fd))
    }

    /// Adds 1, which wakes who waits. A counter that is full already wakes as well: no error.
    ///
    /// For an eventfd that nobody else has: it waits if somebody has cleared `O_NONBLOCK` and filled
    /// the counter.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn notify(&self) -> io::Result<()> {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: write reads 8 bytes of a local array.
        let written = unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        match call::check_count(written) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// As [`EventFd::notify`], for an eventfd that others have, too, who may mean ill: it never waits,
    /// whatever they do to the counter and to `O_NONBLOCK` (`aio.rs`).
    ///
    /// Where the kernel or a filter of system calls allows no asynchronous requests it sets
    /// `O_NONBLOCK` and looks for room just before it writes. Then only who clears the flag and fills the
    /// counter in the moment between makes it wait.
    ///
    /// # Errors
    /// Those of `io_submit` or `write`.
    pub fn notify_shared(&self) -> io::Result<()> {
        match aio::signal(self.0.as_fd()) {
            Ok(()) => Ok(()),
            Err(_) => self.notify_narrowly(),
        }
    }

    fn notify_narrowly(&self) -> io::Result<()> {
        crate::net::set_nonblocking(&self.0, true)?;
        let mut room = [PollFd::new(self, OUT)];
        if poll(&mut room, Some(Duration::ZERO))? == 0 || room[0].revents() & OUT == 0 {
            // Full, or as good as: that wakes as well.
            return Ok(());
        }
        self.notify()
    }

    /// Takes the count and sets it to 0; 0 if it was. It never waits, also where another who has the
    /// eventfd has cleared `O_NONBLOCK`.
    ///
    /// # Errors
    /// Those of `preadv2`.
    pub fn drain(&self) -> io::Result<u64> {
        let mut count = [0_u8; 8];
        let part = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
        // SAFETY: preadv2 writes at most 8 bytes into a local array; -1: the file has no offset.
        let read =
            unsafe { libc::preadv2(self.0.as_raw_fd(), &raw const part, 1, -1, libc::RWF_NOWAIT) };
        match call::check_count(read) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            // Linux before 5.8 knows no such reads of an eventfd, some filters not the call.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EPERM)
                ) =>
            {
                self.drain_narrowly()
            }
            Err(error) => Err(error),
        }
    }

    /// As [`EventFd::drain`]; waits if another drains it, too, and clears `O_NONBLOCK`, in the moment
    /// between the look and the read.
    fn drain_narrowly(&self) -> io::Result<u64> {
        crate::net::set_nonblocking(&self.0, true)?;
        let mut count = [0_u8; 8];
        if poll(&mut [PollFd::new(self, IN)], Some(Duration::ZERO))? == 0 {
            return Ok(0);
        }
        // SAFETY: read writes at most 8 bytes into a local array.
        let read =
            unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        match call::check_count(read) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Has it count from 0, and makes it non-blocking again, before it is given to another.
    ///
    /// # Errors
    /// Those of [`EventFd::drain`] and `fcntl`.
    pub fn renew(&self) -> io::Result<()> {
        crate::net::set_nonblocking(&self.0, true)?;
        self.drain().map(drop)
    }

    /// Gives the descriptor up, for instance to send it to somebody.
    #[must_use]
    pub fn into_fd(self) -> Fd {
        self.0
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    #[test]
    fn poll_finds_bytes_room_and_the_end() {
        let (one, two) = net::socketpair_stream().unwrap();
        let mut fds = [PollFd::new(&one, IN | RDHUP), PollFd::new(&two, OUT)];
        assert_eq!(poll(&mut fds, NOW).unwrap(), 1);
        assert_eq!((fds[0].revents(), fds[1].revents()), (0, OUT));
        net::send(&two, b"x", 0).unwrap();
        assert_eq!(poll(&mut fds, None).unwrap(), 2);
        assert_eq!(fds[0].revents(), IN);
        drop(two);
        let mut fds = [PollFd::new(&one, IN | RDHUP)];
        assert_eq!(poll(&mut fds, Some(Duration::MAX)).unwrap(), 1);
        assert_eq!(fds[0].revents(), IN | RDHUP | HUP);
        assert_eq!(poll(&mut [], Some(Duration::from_micros(1))).unwrap(), 0);
    }

    #[test]
    fn epoll_reports_keys_and_edges() {
        let (one, two) = net::socketpair_stream().unwrap();
        let epoll = Epoll::new().unwrap();
        let mut events = [EpollEvent::default(); 4];
        epoll.add(&one, RDHUP | ET, u64::MAX - 1).unwrap();
        assert_eq!(epoll.wait(&mut events, NOW).unwrap(), 0);
        net::send(&two, b"x", 0).unwrap();
        assert_eq!(epoll.wait(&mut events, NOW).unwrap(), 0);
        epoll.modify(&one, IN | ONESHOT, 5).unwrap();
        assert_eq!(epoll.wait(&mut events, None).unwrap(), 1);
        assert_eq!((events[0].key(), events[0].events()), (5, IN));
        assert_eq!(epoll.wait(&mut events, NOW).unwrap(), 0);
        epoll.modify(&one, RDHUP | ET, 6).unwrap();
        net::shutdown(&two, std::net::Shutdown::Write).unwrap();
        assert_eq!(epoll.wait(&mut events, None).unwrap(), 1);
        assert_eq!((events[0].key(), events[0].events()), (6, RDHUP));
        epoll.remove(&one).unwrap();
        assert_eq!(epoll.remove(&one).unwrap_err().raw_os_error(), Some(libc::ENOENT));
        assert!(epoll.wait(&mut [], NOW).is_err());
    }

    #[test]
    fn an_eventfd_counts_until_drained() {
        let event = EventFd::new().unwrap();
        assert_eq!(event.drain().unwrap(), 0);
        event.notify().unwrap();
        event.notify().unwrap();
        assert_eq!(poll(&mut [PollFd::new(&event, IN)], NOW).unwrap(), 1);
        assert_eq!(event.drain().unwrap(), 2);
        assert_eq!(poll(&mut [PollFd::new(&event, IN)], NOW).unwrap(), 0);
    }

    #[test]
    fn an_adopted_eventfd_never_waits_even_when_full() {
        // SAFETY: eventfd takes numbers; the returned number is new and has no owner.
        let blocking = unsafe { Fd::from_call(libc::eventfd(0, libc::EFD_CLOEXEC)) };
        let event = EventFd::adopt(blocking).unwrap();
        assert_eq!(event.drain().unwrap(), 0);
        let full = (u64::MAX - 1).to_ne_bytes();
        // SAFETY: write reads 8 bytes of a local array.
        unsafe { libc::write(event.as_fd().as_raw_fd(), full.as_ptr().cast(), 8) };
        event.notify().unwrap();
        assert_eq!(event.drain().unwrap(), u64::MAX - 1);
    }

    /// Clears `O_NONBLOCK` and fills the counter, as somebody who means ill.
    fn spoil(event: &EventFd) {
        net::set_nonblocking(event, false).unwrap();
        let full = (u64::MAX - 1).to_ne_bytes();
        // SAFETY: write reads 8 bytes of a local array.
        let written =
            unsafe { libc::write(event.as_fd().as_raw_fd(), full.as_ptr().cast(), full.len()) };
        assert_eq!(written, 8);
    }

    #[test]
    fn whoever_shares_an_eventfd_cannot_make_it_wait() {
        for notify in [EventFd::notify_shared, EventFd::notify_narrowly] {
            for drain in [EventFd::drain, EventFd::drain_narrowly] {
                let event = EventFd::new().unwrap();
                spoil(&event);
                notify(&event).unwrap();
                notify(&event).unwrap();
                assert!(drain(&event).unwrap() >= u64::MAX - 1);
                net::set_nonblocking(&event, false).unwrap();
                assert_eq!(drain(&event).unwrap(), 0);
                notify(&event).unwrap();
                notify(&event).unwrap();
                assert_eq!(drain(&event).unwrap(), 2);
            }
        }
    }

    #[test]
    fn shared_notifications_come_from_any_number_of_threads() {
        // More than the ring of requests holds, so that it is emptied on the way.
        const EACH: u64 = 20_000;
        let event = EventFd::new().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..EACH).for_each(|_| event.notify_shared().unwrap()));
            }
        });
        assert_eq!(event.drain().unwrap(), 4 * EACH);
    }

    #[test]
    fn asynchronous_requests_count_up_only_eventfds() {
        let event = EventFd::new().unwrap();
        aio::signal(event.as_fd()).unwrap();
        assert_eq!(event.drain().unwrap(), 1);
        let (one, _two) = net::socketpair_stream().unwrap();
        assert_eq!(aio::signal(one.as_fd()).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
