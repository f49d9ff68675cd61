"""A tiny training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from slotmamba.checkpoint import CheckpointStore, TensorContents

CONFIG: dict[str, Any] = {"d_model": 5, "slots": {"factors": 2, "top_k": 1}, "decoder_inject_layers": [0, 1]}


class Toy(nn.Module):
    """Uneven sizes, a tied head, a buffer, a scalar, and a layer that is not in use."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        self.unused = nn.Linear(3, 1)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x * self.temperature)


class ToyRun:
    """A model, its optimizer and their store; `advance` makes one step."""

    fused = True

    def __init__(self, run_dir: Path, keep: int = 2, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Toy()
        self.store = self.prepare(run_dir, keep)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=self.fused)
        self.step = 0

    def prepare(self, run_dir: Path, keep: int) -> CheckpointStore:
        return CheckpointStore(run_dir, keep, CONFIG)

    @property
    def contents(self) -> TensorContents:
        return TensorContents(self.model, self.optimizer)

    def advance(self, steps: int = 1) -> ToyRun:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            tokens = torch.randint(7, (1 + self.step % 4, 6), generator=generator)
            noise = torch.randn(*tokens.shape, 7, generator=generator)
            self.optimizer.zero_grad()
            ((self.model(tokens) - noise) ** 2).mean().backward()
            self.optimizer.step()
            self.step += 1
        return self

    def save(self) -> Path:
        return self.store.save(self.step, self.contents, {"samples": 10 * self.step})

    def resume(self) -> bool:
        loaded = self.store.load_latest(self.contents)
        if loaded is None:
            return False
        self.step, progress = loaded
        assert progress == {"samples": 10 * self.step}
        return True

    def snapshot(self) -> dict[str, Any]:
        """Everything that decides the steps to come; equal snapshots are equal in every bit."""
        tensors = dict(self.model.state_dict())
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
        return {name: (str(value.dtype), value.shape, value.numpy().tobytes()) for name, value in tensors.items()}
