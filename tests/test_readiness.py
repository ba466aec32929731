"""``fileno()`` with poll and selectors: level-triggered, readable and writable, hang-up."""

import select
import selectors
import socket

from endpoints import Endpoint, fill, receive_exactly

Pair = tuple[Endpoint, Endpoint]
ALL = select.POLLIN | select.POLLOUT | select.POLLRDHUP


def events(end: Endpoint, timeout: int | None = 0, mask: int = ALL) -> int:
    """What poll says of ``end``; waits while it says nothing and ``timeout`` is None."""
    poller = select.poll()
    poller.register(end.fileno(), mask)
    return dict(poller.poll(timeout)).get(end.fileno(), 0)


def test_an_idle_end_is_writable_only(pair: Pair) -> None:
    near, far = pair
    assert events(near) == events(far) == select.POLLOUT
    assert near.fileno() == near.fileno()


def test_readable_while_there_is_data(pair: Pair) -> None:
    near, far = pair
    near.sendall(b"ab")
    assert events(far, None, select.POLLIN) == select.POLLIN
    assert events(far, None, select.POLLIN) == select.POLLIN
    assert far.recv(1) == b"a"
    assert events(far, 0, select.POLLIN) == select.POLLIN
    assert far.recv(1) == b"b"
    assert events(far, 0, select.POLLIN) == 0
    near.sendall(b"c")
    assert events(far, None, select.POLLIN) == select.POLLIN


def test_data_that_came_before_the_descriptor_was_asked_for(pair: Pair) -> None:
    near, far = pair
    near.sendall(b"early")
    assert far.recv(1, socket.MSG_PEEK) == b"e"
    assert events(far, None, select.POLLIN) == select.POLLIN


def test_writable_while_there_is_room(pair: Pair) -> None:
    near, far = pair
    far.fileno()
    sent = 0
    while events(near, 0, select.POLLOUT):
        sent += fill(near)
    assert len(receive_exactly(far, sent)) == sent
    assert events(near, None, select.POLLOUT) == select.POLLOUT


def test_a_whole_stream_moved_by_readiness_alone(pair: Pair) -> None:
    near, far = pair
    total, sent, received = 4 * 1024 * 1024, 0, 0
    near.setblocking(False)
    far.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(near, selectors.EVENT_WRITE)
        selector.register(far, selectors.EVENT_READ)
        while received < total:
            for key, _ in selector.select():
                if key.fileobj is far:
                    received += len(far.recv(50_000))
                elif sent < total:
                    sent += near.send(bytes(min(100_000, total - sent)))
                else:
                    selector.unregister(near)
    assert received == total


def test_the_end_of_the_stream_is_readable_and_half_a_hangup(pair: Pair) -> None:
    near, far = pair
    far.fileno()
    near.shutdown(socket.SHUT_WR)
    assert events(far, None, select.POLLIN) == select.POLLIN
    assert events(far, None, select.POLLRDHUP) == select.POLLRDHUP
    assert events(far) & select.POLLOUT
    assert far.recv(1) == b""
    assert events(far, 0, select.POLLIN) == select.POLLIN


def test_close_is_readable(pair: Pair) -> None:
    near, far = pair
    far.fileno()
    near.close()
    assert events(far, None, select.POLLIN) & select.POLLIN
    assert far.recv(1) == b""


def test_a_reset_is_readable(pair: Pair) -> None:
    near, far = pair
    far.fileno()
    far.sendall(b"unread")
    assert near.recv(1, socket.MSG_PEEK) == b"u"
    near.close()
    assert events(far, None, select.POLLIN) & select.POLLIN
