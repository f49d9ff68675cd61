"""Lines from all ranks to rank 0, which tell at once when a process is gone.

Collectives do not: NCCL's wait, on the GPU, until a timeout that has to be longer than the slowest step. The kernel
closes the sockets of a process however it ends, and its keep-alive probes find a machine that is gone within half a
minute, without a thread of the process having to run. So a process that is slow, stopped or busy is not taken for dead.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import selectors
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from slotmamba.world import World

logger = logging.getLogger(__name__)

GONE = {"kind": "gone"}
_CONNECT_TIMEOUT = 300.0
_SEND_TIMEOUT = 5.0
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}

Message = dict[str, Any]


@dataclass
class Line:
    """One connection: JSON messages, one a line. `rank` is that of the process at the other end."""

    socket: socket.socket
    rank: int
    open: bool = True
    _received: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        self.socket.settimeout(_SEND_TIMEOUT)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # Linux has them all
                self.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Message) -> bool:
        """Whether it could be sent; a process that is gone gets nothing."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> Iterator[Message]:
        """The messages that have come; `GONE` at the end of the connection. Waits if there is nothing."""
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            return
        except OSError:
            data = b""
        *lines, self._received = (self._received + data).split(b"\n")
        yield from map(json.loads, lines)
        if not data:
            self.open = False
            yield GONE

    def close(self) -> None:
        self.open = False
        self.socket.close()


class Link:
    """The lines of a process: rank 0 has one to every other rank, the others have one to rank 0."""

    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines
        self._selector = selectors.DefaultSelector()
        for line in lines:
            self._selector.register(line.socket, selectors.EVENT_READ, line)

    def poll(self, timeout: float) -> Iterator[tuple[int, Message]]:
        """Messages with the rank that they come from, for at most `timeout` seconds or until some have come."""
        for key, _ in self._selector.select(timeout):
            line: Line = key.data
            for message in line.receive():
                yield line.rank, message
            if not line.open:
                self._selector.unregister(line.socket)

    def send(self, message: Message) -> bool:
        """Sends to the other end of every line; whether all could be reached."""
        return all([line.send(message) for line in self.lines if line.open])

    def close(self) -> None:
        self._selector.close()
        for line in self.lines:
            line.close()


def connect(world: World) -> Link:
    """Connects all ranks with rank 0, on a port that it chooses. A collective.

    Raises:
        OSError: rank 0 cannot be reached at MASTER_ADDR, or not all ranks came within five minutes.
    """
    if not world.is_main:
        port, token = world.broadcast((0, ""))
        connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=_CONNECT_TIMEOUT)
        line = Line(connection, rank=0)
        line.send({"rank": world.rank, "token": token})
        return Link([line])
    with _listen(world.size) as server:
        token = secrets.token_hex(16)
        world.broadcast((server.getsockname()[1], token))
        server.settimeout(_CONNECT_TIMEOUT)
        lines: dict[int, Line] = {}
        while len(lines) < world.size - 1:
            caller = _accept(server, token)
            if caller is not None:
                lines[caller.rank] = caller
    return Link(list(lines.values()))


def _listen(size: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=size)
    return socket.create_server(("", 0), backlog=size)


def _accept(server: socket.socket, token: str) -> Line | None:
    """The line of the rank that calls next; None where somebody else does."""
    connection, _ = server.accept()
    connection.settimeout(_SEND_TIMEOUT)
    try:
        with connection.makefile("rb", buffering=0) as stream:
            hello = json.loads(stream.readline(1000))
        if hello["token"] == token:
            return Line(connection, hello["rank"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("something that is not a rank of this run called at its port: %s", error)
    connection.close()
    return None
