"""QEMU's machine protocol: commands to a running QEMU, and its events."""

import json
import socket
from typing import Any


class Qmp:
    """The connection that a QEMU has made to us."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._events: list[str] = []
        assert "QMP" in self._read()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """Run ``command``; return what it returns."""
        message = {"execute": command, "arguments": arguments}
        self._connection.sendall(json.dumps(message).encode())
        while "event" in (answer := self._read()):
            self._events.append(answer["event"])
        assert "return" in answer, answer
        return answer["return"]

    def wait(self, event: str) -> None:
        """Wait for ``event``, if it has not come since it was last waited for."""
        while event not in self._events:
            self._events.append(self._read()["event"])
        self._events.remove(event)

    def close(self) -> None:
        self._lines.close()
        self._connection.close()

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise ConnectionError("QEMU has ended")
        message: dict[str, Any] = json.loads(line)
        return message
