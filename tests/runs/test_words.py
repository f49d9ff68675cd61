from __future__ import annotations

import pytest

from slotmamba.runs.words import folded


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("", ""),
        ("login", "login"),
        ("node1", "node1"),
        ("node2 node1 node2", "node[1-2]"),
        ("node1 node2 node3 node7 login", "node[1-3,7],login"),
        ("gpu008 gpu009 gpu010", "gpu[008-010]"),
        ("node9 node10 a1-b a2-b", "node[9-10],a1-b,a2-b"),
        ("10 11", "[10-11]"),
        ("n0 n1", "n[0-1]"),
        ("gpu098 gpu099 gpu100", "gpu[098-100]"),
    ],
)
def test_folded(hosts: str, expected: str) -> None:
    assert folded(hosts.split()) == expected
