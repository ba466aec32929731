//! Sockets, over [`std::net::SocketAddr`]: each function is one system call.
//!
//! Sending never raises SIGPIPE (`MSG_NOSIGNAL` always). Sockets are made in blocking mode; calls
//! that must not wait are given [`MSG_DONTWAIT`].

mod address;
mod interfaces;
mod options;
mod receipt;
mod tcp;
mod transfer;
mod unix;

pub use interfaces::{
    address_watch, close_kept_sockets, drain_address_watch, interface_addresses, source_address,
};
pub use options::*;
pub use receipt::{send_with_receipt, RECEIPT_BYTES, RECEIPT_COUNT};
pub use tcp::{accept, bind, connect, listen, local_addr, peer_addr, shutdown, tcp_socket, Family};
pub use transfer::{
    recv, recv_bytes, recv_vectored, send, send_vectored, MSG_DONTWAIT, MSG_OOB, MSG_PEEK,
    MSG_TRUNC, MSG_WAITALL,
};
pub use unix::{
    peer_credentials, peer_groups, recv_with_fd, send_with_fd, socketpair_stream, unix_accept,
    unix_connect, unix_connect_nonblocking, unix_datagram_to, unix_listen, Credentials, Passed,
};

#[cfg(test)]
mod tests;
