//! Socket addresses between Rust's form and the kernel's.

use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use crate::call::{self, socklen_of};

/// An address as the kernel takes and gives it, with its length.
pub(super) struct RawAddress {
    storage: libc::sockaddr_storage,
    /// Bytes of `storage` that count.
    length: libc::socklen_t,
}

impl RawAddress {
    /// No address yet: room for the kernel to fill in.
    pub(super) fn empty() -> RawAddress {
        RawAddress {
            // SAFETY: `sockaddr_storage` is integers and padding, for which all zeros are valid.
            storage: unsafe { MaybeUninit::zeroed().assume_init() },
            length: socklen_of::<libc::sockaddr_storage>(),
        }
    }

    /// The address that takes the destination off a UDP socket.
    pub(super) fn unspecified() -> RawAddress {
        RawAddress::of(&libc::sockaddr { sa_family: family(libc::AF_UNSPEC), sa_data: [0; 14] })
    }

    /// A kernel structure that starts with an address family.
    fn of<T: Copy>(address: &T) -> RawAddress {
        const { assert!(size_of::<T>() <= size_of::<libc::sockaddr_storage>()) };
        let mut raw = RawAddress::empty();
        // SAFETY: `write` needs a destination valid for a T and aligned: the storage is larger, as
        // asserted, and made for the alignment of every address structure.
        unsafe { (&raw mut raw.storage).cast::<T>().write(*address) };
        raw.length = socklen_of::<T>();
        raw
    }

    /// The same without its last `unused` bytes, where the length says where a name ends.
    pub(super) fn shortened(mut self, unused: usize) -> RawAddress {
        // Not truncated: an address has fewer bytes than the storage.
        #[allow(clippy::cast_possible_truncation)]
        {
            self.length = self.length.saturating_sub(unused as libc::socklen_t);
        }
        self
    }

    pub(super) fn as_ptr(&self) -> *const libc::sockaddr {
        (&raw const self.storage).cast()
    }

    pub(super) fn length(&self) -> libc::socklen_t {
        self.length
    }

    /// The two pointers a call needs that fills an address in.
    pub(super) fn as_mut_ptrs(&mut self) -> (*mut libc::sockaddr, *mut libc::socklen_t) {
        self.length = socklen_of::<libc::sockaddr_storage>();
        ((&raw mut self.storage).cast(), &raw mut self.length)
    }

    /// What the kernel filled in, as an internet address.
    pub(super) fn to_socket_addr(&self) -> io::Result<SocketAddr> {
        let length = self.length as usize;
        match libc::c_int::from(self.storage.ss_family) {
            libc::AF_INET if length >= size_of::<libc::sockaddr_in>() => {
                // SAFETY: the storage is initialised, aligned for and larger than `sockaddr_in`,
                // which is integers only.
                let v4 = unsafe { *(&raw const self.storage).cast::<libc::sockaddr_in>() };
                let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
                Ok(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
            }
            libc::AF_INET6 if length >= size_of::<libc::sockaddr_in6>() => {
                // SAFETY: as for `sockaddr_in`.
                let v6 = unsafe { *(&raw const self.storage).cast::<libc::sockaddr_in6>() };
                Ok(SocketAddrV6::new(
                    Ipv6Addr::from(v6.sin6_addr.s6_addr),
                    u16::from_be(v6.sin6_port),
                    // In network order in memory, as the C library's users see it; std gives it so.
                    v6.sin6_flowinfo,
                    v6.sin6_scope_id,
                )
                .into())
            }
            family => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("not an internet socket (address family {family})"),
            )),
        }
    }
}

impl From<&SocketAddr> for RawAddress {
    fn from(address: &SocketAddr) -> RawAddress {
        match address {
            SocketAddr::V4(v4) => RawAddress::of(&libc::sockaddr_in {
                sin_family: family(libc::AF_INET),
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from(*v4.ip()).to_be() },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(v6) => RawAddress::of(&libc::sockaddr_in6 {
                sin6_family: family(libc::AF_INET6),
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            }),
        }
    }
}

impl From<libc::sockaddr_nl> for RawAddress {
    fn from(address: libc::sockaddr_nl) -> RawAddress {
        RawAddress::of(&address)
    }
}

impl From<libc::sockaddr_un> for RawAddress {
    fn from(address: libc::sockaddr_un) -> RawAddress {
        RawAddress::of(&address)
    }
}

/// An address family as it stands in an address.
pub(super) const fn family(number: libc::c_int) -> libc::sa_family_t {
    assert!(number >= 0 && number < 256, "families are small numbers");
    // Not truncated: below 256, asserted above.
    #[allow(clippy::cast_possible_truncation)]
    {
        number as libc::sa_family_t
    }
}

/// Calls `fill`, a call that fills an address in and reports failure by -1.
pub(super) fn filled_in(
    fill: impl FnOnce(*mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int,
) -> io::Result<(libc::c_int, RawAddress)> {
    let mut raw = RawAddress::empty();
    let (address, length) = raw.as_mut_ptrs();
    let returned = call::check(fill(address, length))?;
    Ok((returned, raw))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_round_trip_with_port_scope_and_flow() {
        for address in [
            "127.0.0.1:80".parse().unwrap(),
            "0.0.0.0:0".parse().unwrap(),
            "[::ffff:10.1.2.3]:65535".parse().unwrap(),
            SocketAddr::V6(SocketAddrV6::new("fe80::1".parse().unwrap(), 9, 5, 3)),
        ] {
            assert_eq!(RawAddress::from(&address).to_socket_addr().unwrap(), address);
        }
    }

    #[test]
    fn other_families_and_short_addresses_are_refused() {
        let mut raw = RawAddress::from(&"127.0.0.1:80".parse::<SocketAddr>().unwrap());
        raw.length = 2;
        assert!(raw.to_socket_addr().is_err());
        assert!(RawAddress::unspecified().to_socket_addr().is_err());
    }
}
