"""What tests of kernels share."""

from __future__ import annotations

from typing import Any

import pytest

from slotmamba_kernels import backends

if backends.TRITON_INSTALLED and backends.interpreting():
    from triton.runtime.interpreter import InterpretedFunction

    _call = InterpretedFunction.__call__
    _called: set[str] = set()

    def _call_within_a_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ in _called:
            return self.rewrite()(*args, **kwargs)
        _called.add(self.fn.__module__)
        return _call(self, *args, **kwargs)

    # At every call of a jitted function within a kernel the interpreter replaces the functions of triton.language that
    # the function's module sees. Once a module is enough, since it never puts them back, and takes half the time.
    InterpretedFunction.__call__ = _call_within_a_kernel


@pytest.fixture
def many_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls of HKSA as large ones are run: no writes loaded ahead, and few slots in a bucket."""
    from slotmamba_kernels.hksa import event_plan, launch

    monkeypatch.setattr(launch, "FEWEST_PROGRAMS", 1)
    monkeypatch.setattr(event_plan, "EVENTS_PER_BUCKET", 1)
