"""The lines to rank 0: messages, ends of processes, callers who are not ranks."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from slotmamba.faults.link import GONE, Link, connect
from slotmamba.world import World

pytestmark = pytest.mark.timeout(60)


@dataclass(frozen=True)
class ThreadWorld(World):
    """Ranks that are threads, for what `connect` needs of a world."""

    box: list[Any] = field(default_factory=list)
    told: threading.Event = field(default_factory=threading.Event)

    def broadcast(self, value: Any) -> Any:
        if self.is_main:
            self.box.append(value)
            self.told.set()
        self.told.wait()
        return self.box[0]


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[Link]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    box: list[Any] = []
    told = threading.Event()
    worlds = [ThreadWorld(rank, 3, rank, torch.device("cpu"), box, told) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(connect, worlds[0])
        told.wait()
        with socket.create_connection(("127.0.0.1", box[0][0])) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n")
            others = [pool.submit(connect, world) for world in worlds[1:]]
            return [first.result(), *(each.result() for each in others)]


def heard(link: Link) -> list[tuple[int, dict[str, Any]]]:
    found: list[tuple[int, dict[str, Any]]] = []
    while not found:
        found += link.poll(0.1)
    return found


def test_messages(links: list[Link]) -> None:
    assert links[1].send({"kind": "a"}) and links[1].send({"kind": "b"})
    assert heard(links[0]) == [(1, {"kind": "a"}), (1, {"kind": "b"})]
    assert links[0].send({"kind": "to all"})
    assert heard(links[1]) == heard(links[2]) == [(0, {"kind": "to all"})]
    assert list(links[0].poll(0)) == []


def test_a_process_that_ends(links: list[Link]) -> None:
    links[2].send({"kind": "last words"})
    links[2].close()
    found = heard(links[0])
    while len(found) < 2:
        found += links[0].poll(0.1)
    assert found == [(2, {"kind": "last words"}), (2, GONE)]
    assert list(links[0].poll(0)) == []
    assert links[0].send({"kind": "on"})
    assert heard(links[1]) == [(0, {"kind": "on"})]


def test_rank_0_ends(links: list[Link]) -> None:
    links[0].close()
    assert heard(links[1]) == heard(links[2]) == [(0, GONE)]
