"""Files made from a session are those the standard library makes from a socket."""

import io

import pytest

from endpoints import Endpoint, receive_all

Pair = tuple[Endpoint, Endpoint]


def test_lines_of_text(pair: Pair) -> None:
    near, far = pair
    with near.makefile("w", encoding="utf-8", newline="\n") as writer:
        writer.write("eins\nzwei\ndrei: größer\n")
    near.close()
    with far.makefile("r", encoding="utf-8") as reader:
        assert reader.readlines() == ["eins\n", "zwei\n", "drei: größer\n"]


def test_binary_both_ways(pair: Pair) -> None:
    near, far = pair
    with near.makefile("rwb") as ours, far.makefile("rwb") as theirs:
        assert isinstance(ours, io.BufferedRWPair)
        ours.write(b"question\n")
        ours.flush()
        assert theirs.readline() == b"question\n"
        theirs.write(b"answer" * 10_000)
        theirs.flush()
        assert ours.read(60_000) == b"answer" * 10_000


def test_unbuffered(pair: Pair) -> None:
    near, far = pair
    with near.makefile("wb", buffering=0) as writer, far.makefile("rb", buffering=0) as reader:
        assert isinstance(reader, io.RawIOBase)
        assert writer.write(b"raw") == 3
        into = bytearray(8)
        assert reader.readinto(into) == 3
    with pytest.raises(ValueError, match="binary"):
        near.makefile("r", buffering=0)
    with pytest.raises(ValueError, match="invalid mode"):
        near.makefile("a")  # type: ignore[call-overload]


def test_the_session_lives_as_long_as_its_files(pair: Pair) -> None:
    near, far = pair
    reader = near.makefile("rb")
    near.close()
    assert near.fileno() != -1
    far.sendall(b"still read")
    far.close()
    assert reader.read() == b"still read"
    reader.close()
    assert near.fileno() == -1


def test_the_last_file_closes_for_the_peer(pair: Pair) -> None:
    near, far = pair
    with near.makefile("wb") as writer:
        near.close()
        writer.write(b"flushed at close")
    assert receive_all(far) == b"flushed at close"


def test_a_timeout_spoils_a_file_as_it_does_with_sockets(pair: Pair) -> None:
    near, _ = pair
    near.settimeout(0.01)
    with near.makefile("rb") as reader:
        with pytest.raises(TimeoutError):
            reader.read(1)
        with pytest.raises(OSError, match="timed out object"):
            reader.read(1)


def test_a_non_blocking_file_reads_none(pair: Pair) -> None:
    near, _ = pair
    near.setblocking(False)
    with near.makefile("rb", buffering=0) as reader:
        assert reader.read(1) is None
