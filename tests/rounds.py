"""Rounds of connecting, exchanging a little and closing, as both ends of them play them."""

import random
import socket
import time
from collections import Counter
from dataclasses import dataclass

import ivsmc
from endpoints import LOOPBACK, Endpoint, receive_all, receive_exactly
from processes import Here

RING = 16 << 10
"""Bytes of either buffer: the smallest, so that much of what is sent waits for room."""
SIZES = (0, 1, 100, 4_000, RING // 2)
LARGE = (*SIZES, RING, 5 * RING // 2)


@dataclass
class Script:
    """What both ends of one connection do; both know it from the client's port."""

    kind: str
    client_first: bool
    sizes: tuple[int, int]
    pieces: int
    pauses: tuple[float, float]

    @classmethod
    def of(cls, seed: int, port: int) -> "Script":
        chance = random.Random(f"{seed} {port}")
        kind = chance.choice(("one sends", "both send", "answer", "nothing", "both close"))
        sizes = LARGE if kind in ("one sends", "answer") else SIZES
        return cls(
            kind=kind,
            client_first=chance.random() < 0.5,
            sizes=(chance.choice(sizes), chance.choice(sizes)),
            pieces=chance.randrange(1, 6),
            pauses=(_pause(chance), _pause(chance)),
        )


def _pause(chance: random.Random) -> float:
    return chance.choice((0, 0, chance.uniform(0, 0.0001)))


def _let_pass(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def play(end: Endpoint, is_client: bool, script: Script) -> None:
    """Do one end's part, as a proper program does: no close with data unread."""
    is_first = script.client_first == is_client
    own, other = script.sizes if is_first else script.sizes[::-1]
    match script.kind:
        case "one sends" if is_first:
            _send(end, own, script)
        case "one sends":
            assert len(receive_all(end)) == other
        case "both send":
            _send(end, own, script)
            end.shutdown(socket.SHUT_WR)
            assert len(receive_all(end)) == other
        case "answer" if is_first:
            _send(end, own, script)
            assert len(receive_exactly(end, other)) == other
        case "answer":
            assert len(receive_exactly(end, other)) == other
            _send(end, own, script)
            assert receive_all(end) == b""
        case "nothing" if not is_first:
            assert receive_all(end) == b""
    _let_pass(script.pauses[is_first])


def _send(end: Endpoint, size: int, script: Script) -> None:
    sent = 0
    for piece in range(script.pieces, 0, -1):
        part = (size - sent) // piece
        if part:  # not even nothing is to be sent to a peer that has closed
            end.sendall(bytes(part))
        sent += part
        _let_pass(script.pauses[0])


def _wakes(session: ivsmc.Session) -> int:
    stats = session.stats()
    wakes: int = stats["wakes_sent"] + stats["doorbells_sent"]
    return wakes


def serve(here: Here, device: str, seed: int, count: int) -> tuple[Counter[str], int]:
    """Accept ``count`` connections and play the server's part.

    Return what they went over, and how often the other end was woken.
    """
    transports: Counter[str] = Counter()
    wakes = 0
    with ivsmc.create_server(LOOPBACK, device=device, buffer=RING) as listener:
        here.send(listener.getsockname())
        for _ in range(count):
            session, address = listener.accept()
            with session:
                transports[session.transport] += 1
                script = Script.of(seed, address[1])
                try:
                    play(session, False, script)
                except Exception as error:
                    error.add_note(f"server of port {address[1]}, {session.transport}: {script}")
                    raise
            wakes += _wakes(session)
    return transports, wakes


def connect(
    _here: Here, device: str, address: tuple[str, int], seed: int, count: int
) -> tuple[Counter[str], int]:
    """Connect ``count`` times and play the client's part; return as ``serve``."""
    transports: Counter[str] = Counter()
    wakes = 0
    for _ in range(count):
        with ivsmc.create_connection(address, device=device, buffer=RING) as session:
            transports[session.transport] += 1
            script = Script.of(seed, session.getsockname()[1])
            try:
                play(session, True, script)
            except Exception as error:
                error.add_note(f"client of {session!r}: {script}")
                raise
        wakes += _wakes(session)
    return transports, wakes
