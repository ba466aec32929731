//! Hostile clients of our ivshmem server: they come and go, say what they like, do not read, fill the
//! eventfds they share, and scribble over the region. Afterwards an honest one is welcome.
#![no_main]

use std::num::NonZeroU16;
use std::path::Path;

use ivsmc::server::{Backing, Server, ServerOptions};
use ivsmc::{Plain, Timeout};
use ivsmc_fuzz::wire::{self, Descriptors, Usual};
use ivsmc_fuzz::{memory, Input, Scratch};
use ivsmc_proto::ivshmem::{ClientEvent, ClientProtocol, MESSAGE_LENGTH};
use ivsmc_shm::fd::Fd;
use ivsmc_shm::file;
use ivsmc_shm::net::{self, Passed};
use libfuzzer_sys::fuzz_target;

/// More are turned away.
const CLIENTS: usize = 5;

struct Client {
    socket: Fd,
    got: Vec<Fd>,
}

impl Client {
    fn connect(path: &Path) -> Option<Self> {
        let socket = net::unix_connect_nonblocking(path).ok()?;
        Some(Self { socket, got: Vec::new() })
    }

    /// Reads a message, whole or not.
    fn read(&mut self, length: usize) -> Option<([u8; MESSAGE_LENGTH], usize, bool)> {
        let mut bytes = [0; MESSAGE_LENGTH];
        let into = &mut bytes[..length];
        let (count, passed) = net::recv_with_fd(&self.socket, into, net::MSG_DONTWAIT).ok()?;
        let has_fd = matches!(passed, Passed::One(_));
        self.got.extend(passed.one());
        Some((bytes, count, has_fd))
    }
}

fn turn(server: &Server) {
    server
        .serve_for(Timeout::NonBlocking, &Plain, |event| drop(event.to_string()))
        .expect("a turn");
}

/// What one of the clients does.
fn act(input: &mut Input<'_>, client: &mut Client, descriptors: &Descriptors) {
    match input.below(6) {
        0 => {
            let fds = descriptors.choose(input, Usual::Nothing);
            let length = input.byte();
            wire::push(&client.socket, input.bytes(length.into()), &fds);
        }
        1 => {
            let ways =
                [std::net::Shutdown::Read, std::net::Shutdown::Write, std::net::Shutdown::Both];
            let _ = net::shutdown(&client.socket, ways[input.below(ways.len())]);
        }
        2 => {
            // Of an eventfd this fills the counter, of the region it is a word.
            let at = u64::from(input.u16()) * 8;
            let value = input.u64();
            if let Some(fd) = client.got.get(input.below(16)) {
                // This one does not wait itself.
                let _ = net::set_nonblocking(fd, true);
                if rustix::io::write(fd, &(u64::MAX - 1).to_ne_bytes()).is_err() {
                    let _ = file::write_at(fd, at, &value.to_le_bytes());
                }
                let _ = net::set_nonblocking(fd, input.flip());
            }
        }
        _ => {
            for _ in 0..=input.below(8) {
                client.read(1 + input.below(MESSAGE_LENGTH));
            }
        }
    }
}

/// A client that keeps the rules is served.
fn welcome(server: &Server, vectors: u16) {
    let mut client = Client::connect(server.path()).expect("a place in the queue");
    let mut protocol = ClientProtocol::new();
    let (mut own, mut looks) = (0, 0);
    while own < vectors {
        turn(server);
        looks += 1;
        assert!(looks < 10_000, "an honest client waits for its vectors: {own} have come");
        while let Some((bytes, count, has_fd)) = client.read(MESSAGE_LENGTH) {
            assert_eq!(count, MESSAGE_LENGTH, "turned away");
            match protocol.message(i64::from_le_bytes(bytes), has_fd) {
                Ok(ClientEvent::OwnVector { .. }) => own += 1,
                Ok(_) => {}
                Err(wrong) => panic!("{wrong}"),
            }
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let scratch = Scratch::new();
    let vectors = NonZeroU16::new(u16::from(input.byte() % 5)).map_or(1, NonZeroU16::get);
    let server = Server::new(ServerOptions {
        backing: Backing::Memfd { size: 1 << 20 },
        vectors,
        max_clients: CLIENTS,
        ..ServerOptions::new(scratch.path("socket"))
    })
    .expect("an ivshmem server");
    let descriptors = Descriptors::new(memory(4096));
    let mut clients: Vec<Client> = Vec::new();
    while !input.is_over() {
        match input.below(8) {
            0 | 1 => clients.extend(Client::connect(server.path())),
            2 => turn(&server),
            3 if !clients.is_empty() => {
                drop(clients.swap_remove(input.below(clients.len().min(256))))
            }
            _ if clients.is_empty() => {}
            _ => {
                let which = input.below(clients.len().min(256));
                act(&mut input, &mut clients[which], &descriptors);
                if input.flip() {
                    turn(&server);
                }
            }
        }
        // Its queue of newcomers has an end.
        if clients.len() > 64 {
            turn(&server);
            clients.drain(..32);
        }
        let status = server.status().expect("a status");
        assert_eq!(status.joined - status.left, status.clients.len() as u64);
        assert!(status.clients.len() <= CLIENTS);
    }
    drop(clients);
    turn(&server);
    turn(&server);
    welcome(&server, vectors);
});
