//! This host's addresses: which there are, when they change, and which one reaches a destination.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use super::address::{family, RawAddress};
use super::tcp::{bind_raw, connect_raw, local_addr, socket, Family};
use crate::call;
use crate::fd::Fd;
use crate::fork;

/// The addresses of all interfaces that are up, loopback included, each once.
///
/// # Errors
/// Those of `getifaddrs`.
pub fn interface_addresses() -> io::Result<Vec<IpAddr>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: getifaddrs stores the head of a list it allocates into a local.
    call::check(unsafe { libc::getifaddrs(&raw mut list) })?;
    let mut found = Vec::new();
    let mut next = list;
    // SAFETY: until freeifaddrs, every entry of the list and the address it points to (if any) are
    // valid and unchanging; the address has the size of its family, which is looked at first.
    unsafe {
        while let Some(entry) = next.as_ref() {
            next = entry.ifa_next;
            let up = entry.ifa_flags & libc::IFF_UP as libc::c_uint != 0;
            if let Some(ip) = up.then(|| ip_of(entry.ifa_addr)).flatten() {
                if !found.contains(&ip) {
                    found.push(ip);
                }
            }
        }
        libc::freeifaddrs(list);
    }
    Ok(found)
}

/// The address that `address` points to, if it is an internet address.
///
/// # Safety
/// It is null, or points to an address structure of its family's size.
unsafe fn ip_of(address: *const libc::sockaddr) -> Option<IpAddr> {
    if address.is_null() {
        return None;
    }
    // SAFETY: not null, so it points to a structure that starts with the family, and that is a
    // `sockaddr_in` or `sockaddr_in6` if the family says so; read unaligned.
    unsafe {
        match libc::c_int::from((&raw const (*address).sa_family).read_unaligned()) {
            libc::AF_INET => {
                let v4 = address.cast::<libc::sockaddr_in>().read_unaligned();
                Some(IpAddr::from(v4.sin_addr.s_addr.to_ne_bytes()))
            }
            libc::AF_INET6 => {
                let v6 = address.cast::<libc::sockaddr_in6>().read_unaligned();
                Some(IpAddr::from(v6.sin6_addr.s6_addr))
            }
            _ => None,
        }
    }
}

/// A non-blocking descriptor that becomes readable when an address of this network namespace comes
/// or goes.
///
/// # Errors
/// Those of `socket` and `bind`.
pub fn address_watch() -> io::Result<Fd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK;
    let fd = socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE)?;
    // SAFETY: `sockaddr_nl` is integers, for which all zeros are valid.
    let mut address: libc::sockaddr_nl = unsafe { MaybeUninit::zeroed().assume_init() };
    address.nl_family = family(libc::AF_NETLINK);
    address.nl_groups = (libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR) as u32;
    bind_raw(&fd, &RawAddress::from(address))?;
    Ok(fd)
}

/// Takes all notices off an [`address_watch`]; whether there were any, so addresses may have changed.
///
/// Notices that were lost for want of room count.
///
/// # Errors
/// Those of `recv`.
pub fn drain_address_watch(fd: impl AsFd) -> io::Result<bool> {
    let mut changed = false;
    // A datagram is taken off whole, however little of it is read.
    let mut start = [0; 16];
    loop {
        match super::recv_bytes(&fd, &mut start, libc::MSG_DONTWAIT) {
            Ok(_) => changed = true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(changed),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => changed = true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The source address a connection to `destination` would have.
///
/// A connected UDP socket tells; it sends nothing. One socket per family is kept.
///
/// # Errors
/// Those of `connect`: `NetworkUnreachable`, ...
pub fn source_address(destination: SocketAddr) -> io::Result<IpAddr> {
    let family = Family::of(&destination);
    let kept = &KEPT[usize::from(family == Family::V6)];
    let fd = match kept.take() {
        Some(fd) => fd,
        None => socket(family.number(), libc::SOCK_DGRAM, 0)?,
    };
    // Port 0 would do for Linux; 9 is "discard", in case somebody counts.
    let mut destination = destination;
    if destination.port() == 0 {
        destination.set_port(9);
    }
    connect_raw(&fd, &RawAddress::from(&destination))?;
    let source = local_addr(&fd)?.ip();
    // Without this the next connect would keep the source of this one.
    connect_raw(&fd, &RawAddress::unspecified())?;
    kept.put(fd);
    Ok(source)
}

/// Closes the sockets that [`source_address`] keeps; it makes new ones when it is asked again.
pub fn close_kept_sockets() {
    for kept in &KEPT {
        drop(kept.take());
    }
}

static KEPT: [Kept; 2] = [Kept::new(), Kept::new()];

/// A place for one descriptor that threads take from and put back without a lock, so that a fork in
/// between leaves nothing locked.
struct Kept(AtomicU64);

impl Kept {
    /// No descriptor: the low half is -1.
    const EMPTY: u64 = 0xffff_ffff;

    const fn new() -> Kept {
        Kept(AtomicU64::new(Kept::EMPTY))
    }

    fn take(&self) -> Option<Fd> {
        // AcqRel: pairs with itself and with `put`; who takes the number is its only owner.
        let word = self.0.swap(Kept::EMPTY, Ordering::AcqRel);
        // -1 as the low half is no descriptor number.
        let number = RawFd::try_from(word & 0xffff_ffff).ok()?;
        // A number of an earlier generation was closed by the fork handler.
        if word >> 32 != u64::from(fork::generation()) {
            return None;
        }
        // SAFETY: `from_raw_fd` needs an open descriptor without another owner: `put` gave up the
        // ownership of this number, in this generation, and the swap gives it to one taker.
        Some(Fd::from(unsafe { OwnedFd::from_raw_fd(number) }))
    }

    fn put(&self, fd: Fd) {
        let Ok(number) = u64::try_from(fd.as_raw_fd()) else {
            return;
        };
        let word = u64::from(fork::generation()) << 32 | number;
        // AcqRel: see `take`. If somebody else has put one back, this one is dropped.
        let put = self.0.compare_exchange(Kept::EMPTY, word, Ordering::AcqRel, Ordering::Relaxed);
        if put.is_ok() {
            // The word owns it now; it stays registered, so that a forked child closes it.
            std::mem::forget(fd);
        }
    }
}
