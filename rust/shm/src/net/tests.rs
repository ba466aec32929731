use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

use super::*;
use crate::fd::Fd;
use crate::{errno, file};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn listener() -> (Fd, SocketAddr) {
    let fd = tcp_socket(Family::V4).unwrap();
    bind(&fd, &SocketAddr::new(LOOPBACK, 0)).unwrap();
    listen(&fd, 8).unwrap();
    let address = local_addr(&fd).unwrap();
    (fd, address)
}

fn tcp_pair() -> (Fd, Fd) {
    let (listener, address) = listener();
    let client = tcp_socket(Family::of(&address)).unwrap();
    connect(&client, &address).unwrap();
    let (server, from) = accept(&listener).unwrap();
    assert_eq!(from, local_addr(&client).unwrap());
    assert_eq!(peer_addr(&client).unwrap(), local_addr(&server).unwrap());
    (client, server)
}

#[test]
fn bytes_go_over_a_connection_and_can_be_peeked_at() {
    let (client, server) = tcp_pair();
    assert_eq!(send(&client, b"hello", 0).unwrap(), 5);
    let mut bytes = [MaybeUninit::uninit(); 8];
    assert_eq!(recv(&server, &mut bytes, MSG_PEEK).unwrap(), 5);
    assert_eq!(unread_bytes(&server).unwrap(), 5);
    let mut bytes = [0; 8];
    assert_eq!(recv_bytes(&server, &mut bytes, 0).unwrap(), 5);
    assert_eq!(&bytes, b"hello\0\0\0");
    let error = recv_bytes(&server, &mut bytes, MSG_DONTWAIT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    shutdown(&client, Shutdown::Write).unwrap();
    assert_eq!(recv_bytes(&server, &mut bytes, 0).unwrap(), 0);
    assert_eq!(tcp_info_state(&server).unwrap(), TCP_STATE_CLOSE_WAIT);
}

#[test]
fn thrown_away_bytes_leave_zeros_and_no_uninitialised_ones() {
    let (client, server) = tcp_pair();
    send(&client, b"hello", 0).unwrap();
    let mut bytes = [MaybeUninit::new(7_u8); 4];
    assert_eq!(recv(&server, &mut bytes, MSG_TRUNC).unwrap(), 4);
    // SAFETY: `recv` initialised as many as it returned: all four.
    assert_eq!(bytes.map(|byte| unsafe { byte.assume_init() }), [0; 4]);
    assert_eq!(unread_bytes(&server).unwrap(), 1);
}

#[test]
fn several_buffers_are_one_stream() {
    let (client, server) = tcp_pair();
    let parts = [IoSlice::new(b"ab"), IoSlice::new(b""), IoSlice::new(b"cde")];
    assert_eq!(send_vectored(&client, &parts, 0).unwrap(), 5);
    let (mut one, mut two) = ([0; 1], [0; 9]);
    let mut into = [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
    assert_eq!(recv_vectored(&server, &mut into, MSG_DONTWAIT).unwrap(), 5);
    assert_eq!((&one, &two[..4]), (b"a", &b"bcde"[..]));
    let many = vec![IoSlice::new(b"x"); 1500];
    assert_eq!(send_vectored(&client, &many, 0).unwrap(), 1024);
}

#[test]
fn sending_to_nobody_is_an_error_and_no_signal() {
    let (client, server) = socketpair_stream().unwrap();
    drop(server);
    assert_eq!(send(&client, b"x", 0).unwrap_err().kind(), ErrorKind::BrokenPipe);
    let error = send_vectored(&client, &[IoSlice::new(b"x")], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    assert_eq!(send_with_fd(&client, b"x", None).unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn a_non_blocking_connect_and_accept_do_not_wait() {
    let (listener, address) = listener();
    assert_eq!(tcp_info_state(&listener).unwrap(), TCP_STATE_LISTEN);
    set_nonblocking(&listener, true).unwrap();
    assert!(is_nonblocking(&listener).unwrap());
    assert_eq!(accept(&listener).unwrap_err().kind(), ErrorKind::WouldBlock);
    let client = tcp_socket(Family::V4).unwrap();
    set_nonblocking(&client, true).unwrap();
    match connect(&client, &address) {
        Err(error) if errno::is(&error, errno::EINPROGRESS) => {}
        other => other.unwrap(),
    }
    crate::poll::poll(&mut [crate::poll::PollFd::new(&client, crate::poll::OUT)], None).unwrap();
    take_error(&client).unwrap();
    assert_eq!(tcp_info_state(&client).unwrap(), TCP_STATE_ESTABLISHED);
    let (accepted, _) = accept(&listener).unwrap();
    assert!(!is_nonblocking(&accepted).unwrap());
}

#[test]
fn a_refused_connection_is_said_once() {
    let (listener, address) = listener();
    drop(listener);
    let client = tcp_socket(Family::V4).unwrap();
    set_nonblocking(&client, true).unwrap();
    let refused = match connect(&client, &address) {
        Err(error) if errno::is(&error, errno::EINPROGRESS) => {
            let mut fds = [crate::poll::PollFd::new(&client, crate::poll::OUT)];
            crate::poll::poll(&mut fds, None).unwrap();
            take_error(&client).unwrap_err()
        }
        other => other.unwrap_err(),
    };
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    take_error(&client).unwrap();
    assert_eq!(peer_addr(&client).unwrap_err().kind(), ErrorKind::NotConnected);
}

#[test]
fn options_are_bytes_or_ints() {
    let fd = tcp_socket(Family::V6).unwrap();
    set_option_int(&fd, IPPROTO_TCP, TCP_NODELAY, 1).unwrap();
    assert_eq!(get_option_int(&fd, IPPROTO_TCP, TCP_NODELAY).unwrap(), 1);
    assert_eq!(get_option_int(&fd, SOL_SOCKET, SO_DOMAIN).unwrap(), Family::V6.number());
    set_linger(&fd, Some(3)).unwrap();
    let mut linger = [0; 8];
    assert_eq!(get_option(&fd, SOL_SOCKET, SO_LINGER, &mut linger).unwrap(), 8);
    assert_eq!(linger, [1, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(get_option(&fd, SOL_SOCKET, SO_LINGER, &mut linger[..2]).unwrap(), 2);
    let error = get_option(&fd, IPPROTO_TCP, 35, &mut [0; 64]).unwrap_err();
    assert!(errno::is(&error, errno::ENOPROTOOPT));
    let error = set_option(&fd, IPPROTO_IP, 64, &[0; 128]).unwrap_err();
    assert!(errno::is(&error, errno::ENOPROTOOPT));
}

#[test]
fn the_namespace_has_a_cookie() {
    let (one, two) = (tcp_socket(Family::V4).unwrap(), tcp_socket(Family::V4).unwrap());
    let cookie = netns_cookie(&one).unwrap();
    assert_ne!(cookie, 0);
    assert_eq!(cookie, netns_cookie(&two).unwrap());
}

#[test]
fn the_source_of_one_destination_does_not_stick_to_the_next() {
    let source = |ip: IpAddr, port| source_address(SocketAddr::new(ip, port)).unwrap();
    assert_eq!(source(LOOPBACK, 80), LOOPBACK);
    let others = interface_addresses().unwrap();
    assert!(others.contains(&LOOPBACK));
    for ip in others {
        let scoped = matches!(ip, IpAddr::V6(v6) if v6.segments()[0] & 0xffc0 == 0xfe80);
        if !scoped {
            assert_eq!(source(ip, 0), ip);
        }
    }
    assert_eq!(source(LOOPBACK, 0), LOOPBACK);
}

#[test]
fn threads_may_ask_for_sources_at_once() {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    let source = source_address(SocketAddr::new(LOOPBACK, 9)).unwrap();
                    assert_eq!(source, LOOPBACK);
                }
            });
        }
    });
}

#[test]
fn an_address_watch_is_quiet_while_nothing_changes() {
    let watch = address_watch().unwrap();
    assert!(!drain_address_watch(&watch).unwrap());
}

#[test]
fn ipv6_addresses_come_back_whole() {
    let fd = tcp_socket(Family::V6).unwrap();
    let address = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0);
    match bind(&fd, &address) {
        // A machine without IPv6 has no such address.
        Err(error) => assert_eq!(error.kind(), ErrorKind::AddrNotAvailable),
        Ok(()) => assert_eq!(local_addr(&fd).unwrap().ip(), address.ip()),
    }
}

#[test]
fn a_unix_listener_knows_who_connects() {
    let name = format!("ivsmc-shm-{:032x}.sock", file::random_u128().unwrap());
    let path = std::env::temp_dir().join(name);
    let listener = unix_listen(&path, 4).unwrap();
    assert_eq!(unix_listen(&path, 4).unwrap_err().kind(), ErrorKind::AddrInUse);
    let client = unix_connect(&path).unwrap();
    let server = unix_accept(&listener).unwrap();
    file::unlink(&path).unwrap();
    let credentials = peer_credentials(&server).unwrap();
    assert_eq!(credentials.uid, file::effective_uid());
    assert_eq!(u32::try_from(credentials.pid).unwrap(), std::process::id());
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap();
    let groups: Vec<u32> = groups.split_whitespace().map(|gid| gid.parse().unwrap()).collect();
    assert_eq!(peer_groups(&server).unwrap(), groups);
    assert!(unsent_bytes(&client).unwrap() == 0);
    send(&client, b"x", 0).unwrap();
    assert!(unsent_bytes(&client).unwrap() > 0);
    assert_eq!(local_addr(&client).unwrap_err().kind(), ErrorKind::InvalidInput);
    let long = "x".repeat(108);
    for bad in ["", "a\0b", &long] {
        let error = unix_connect(std::path::Path::new(bad)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn a_descriptor_travels_with_its_message() {
    let (one, two) = socketpair_stream().unwrap();
    let sent = file::memfd(c"sent").unwrap();
    send_with_fd(&one, &[1; 8], None).unwrap();
    send_with_fd(&one, &[2; 8], Some(sent.as_fd())).unwrap();
    send_with_fd(&one, &[3; 8], Some(sent.as_fd())).unwrap();
    let mut bytes = [0; 8];
    let (got, passed) = recv_with_fd(&two, &mut bytes, 0).unwrap();
    assert!((got, bytes[0]) == (8, 1) && matches!(passed, Passed::Nothing));
    for expected in [2, 3] {
        let (got, passed) = recv_with_fd(&two, &mut bytes, 0).unwrap();
        assert_eq!((got, bytes[0]), (8, expected));
        let fd = passed.one().unwrap();
        assert_eq!(file::status(&fd).unwrap(), file::status(&sent).unwrap());
        // SAFETY: F_GETFD takes any number and touches no memory.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags, libc::FD_CLOEXEC);
    }
    drop(one);
    assert_eq!(recv_with_fd(&two, &mut bytes, 0).unwrap().0, 0);
}

#[test]
fn more_descriptors_than_one_are_refused_and_closed() {
    for count in [2, 40] {
        let (one, two) = socketpair_stream().unwrap();
        let (passed, end) = socketpair_stream().unwrap();
        send_many(&one, &passed, count);
        drop(passed);
        let error = recv_with_fd(&two, &mut [0; 8], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        // All copies of the other end are closed.
        assert_eq!(recv_bytes(&end, &mut [0], MSG_DONTWAIT).unwrap(), 0);
    }
}

/// Sends a byte with `count` copies of `passed`.
fn send_many(fd: &Fd, passed: &Fd, count: usize) {
    let mut control = [0_u64; 64];
    let mut byte = 0_u8;
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let mut message = transfer::empty_message();
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    let bytes = u32::try_from(count * 4).unwrap();
    // SAFETY: the control data has room for 40 descriptors and is aligned for the header; the
    // message points to locals that outlive the call.
    unsafe {
        message.msg_controllen = libc::CMSG_SPACE(bytes) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(bytes) as _;
        for index in 0..count {
            let to = libc::CMSG_DATA(header).cast::<i32>().add(index);
            to.write_unaligned(passed.as_raw_fd());
        }
        assert_eq!(libc::sendmsg(fd.as_raw_fd(), &raw const message, 0), 1);
    }
}

#[test]
fn datagrams_reach_a_path_and_a_name_beside_the_file_system() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    let name = format!("ivsmc-datagram-{}", std::process::id());
    let path = std::env::temp_dir().join(&name);
    let at_path = UnixDatagram::bind(&path).unwrap();
    let aside = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let targets = [(at_path, path.clone().into_os_string()), (aside, format!("@{name}").into())];
    for (socket, target) in targets {
        let sender = unix_datagram_to(&target).unwrap();
        send_with_fd(&sender, b"READY=1", Some(sender.as_fd())).unwrap();
        let mut bytes = [0; 16];
        let (length, passed) = recv_with_fd(&socket, &mut bytes, 0).unwrap();
        assert_eq!((&bytes[..length], passed.one().is_some()), (&b"READY=1"[..], true));
        drop(socket);
        assert!(send_with_fd(&sender, b"?", None).is_err());
        assert!(unix_datagram_to(&target).is_err());
    }
    for wrong in [String::from("@"), format!("@{}", "x".repeat(108)), String::new()] {
        assert_eq!(unix_datagram_to(wrong.as_ref()).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    std::fs::remove_file(path).unwrap();
}
