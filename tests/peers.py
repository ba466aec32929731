"""What the other processes of tests do."""

import ivsmc
from endpoints import LOOPBACK
from processes import Here
from random_stream import exchange


def exchange_with_client(
    here: Here, device: str, send_seed: int, receive_seed: int, total: int
) -> str:
    """Accept one session and exchange streams with it; return its transport."""
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        here.send(listener.getsockname())
        session, _ = listener.accept()
    with session:
        exchange(session, send_seed, receive_seed, total)
        return session.transport


def connect_and_echo(_here: Here, device: str, address: tuple[str, int]) -> str:
    """Send back what comes, to its end; return the transport."""
    with ivsmc.create_connection(address, device=device, require="smc") as session:
        while data := session.recv(65536):
            session.sendall(data)
        return session.transport
