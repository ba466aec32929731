//! The source port of a connection that is announced: it must be known before the connection is.
//!
//! Linux 6.3 and later can be told the one port to choose when it connects. It then shares the port
//! as it does for everybody: with connections to other places, and with what it remembers of ended
//! ones (TIME_WAIT). Elsewhere the port is bound, which is dearer for all: while a connection from
//! a bound port is remembered nobody gets that port who connects without binding, and a port that
//! somebody else came from cannot be bound unless his socket allowed it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};

use ivsmc_shm::errno;
use ivsmc_shm::fd::Fd;
use ivsmc_shm::net;

/// `IP_BIND_ADDRESS_NO_PORT` of `linux/in.h`: binding to port 0 leaves the port to connect().
const IP_BIND_ADDRESS_NO_PORT: i32 = 24;
/// `IP_LOCAL_PORT_RANGE` of `linux/in.h`: the lowest port, and in the upper half the highest.
const IP_LOCAL_PORT_RANGE: i32 = 51;

/// The kernel does not know `IP_LOCAL_PORT_RANGE`.
static BINDS: AtomicBool = AtomicBool::new(false);

/// Has `conn`, about to connect to `to`, come from `port` of the ephemeral range; and from `ip`, if
/// that is not what the kernel chooses. That the port is taken may also show only at connect().
pub(crate) fn choose(
    conn: &Fd,
    to: SocketAddr,
    ip: IpAddr,
    is_kernels: bool,
    port: u16,
) -> io::Result<()> {
    if chooses(conn, port)? {
        if is_kernels {
            return Ok(());
        }
        net::set_option_int(conn, net::IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)?;
        return net::bind(conn, &address(to, ip, 0));
    }
    share(conn)?;
    net::bind(conn, &address(to, ip, port))
}

/// Binds `conn`, about to connect to `to`, to a port that its user has chosen.
pub(crate) fn bind(conn: &Fd, to: SocketAddr, ip: IpAddr, port: u16) -> io::Result<()> {
    net::set_option_int(conn, net::SOL_SOCKET, net::SO_REUSEADDR, 1)?;
    net::bind(conn, &address(to, ip, port))
}

/// Lets others bind the port of `conn`, also while it is remembered after its end: where ports
/// must be bound the plain connections made here would take them all from the announced ones.
pub(crate) fn share(conn: &Fd) -> io::Result<()> {
    // Relaxed: only the flag matters.
    if !BINDS.load(Ordering::Relaxed) {
        return Ok(());
    }
    net::set_option_int(conn, net::SOL_SOCKET, net::SO_REUSEADDR, 1)
}

/// Whether another socket has the address.
pub(crate) fn is_taken(error: &io::Error) -> bool {
    errno::is(error, errno::EADDRINUSE) || errno::is(error, errno::EADDRNOTAVAIL)
}

/// Tells the kernel the port to choose; whether it can be told.
fn chooses(conn: &Fd, port: u16) -> io::Result<bool> {
    if BINDS.load(Ordering::Relaxed) {
        return Ok(false);
    }
    let both = u32::from(port) << 16 | u32::from(port);
    match net::set_option(conn, net::IPPROTO_IP, IP_LOCAL_PORT_RANGE, &both.to_ne_bytes()) {
        Ok(()) => Ok(true),
        Err(error) if errno::is(&error, errno::ENOPROTOOPT) => {
            BINDS.store(true, Ordering::Relaxed);
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn address(to: SocketAddr, ip: IpAddr, port: u16) -> SocketAddr {
    match (to, ip) {
        // A v6 socket names v4 addresses in v6 form.
        (SocketAddr::V6(_), IpAddr::V4(v4)) => (v4.to_ipv6_mapped(), port).into(),
        _ => (ip, port).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ivsmc_shm::net::Family;

    /// Connects to `to` from `ip` and a port that is free at the moment; returns that and the
    /// connection.
    fn connected(to: SocketAddr, ip: IpAddr, is_kernels: bool) -> (u16, Fd) {
        for port in 40_000..50_000 {
            let conn = net::tcp_socket(Family::of(&to)).unwrap();
            let chosen = choose(&conn, to, ip, is_kernels, port);
            match chosen.and_then(|()| net::connect(&conn, &to)) {
                Ok(()) => return (port, conn),
                Err(error) => assert!(is_taken(&error), "{error}"),
            }
        }
        panic!("no port of 10,000 is free");
    }

    fn comes_from_the_port_chosen() {
        for (at, from) in [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "127.0.0.2"), ("::1", "::1")] {
            let Ok(listener) = std::net::TcpListener::bind((at, 0)) else { continue };
            let (to, ip) = (listener.local_addr().unwrap(), from.parse().unwrap());
            let (port, conn) = connected(to, ip, at == from);
            assert_eq!(net::local_addr(&conn).unwrap(), SocketAddr::new(ip, port));
            assert_eq!(listener.accept().unwrap().1, SocketAddr::new(ip, port));
        }
    }

    #[test]
    fn comes_from_the_port_chosen_or_bound() {
        comes_from_the_port_chosen();
        BINDS.store(true, Ordering::Relaxed);
        comes_from_the_port_chosen();
        BINDS.store(false, Ordering::Relaxed);
    }
}
