"""An estimate as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slotmamba.estimate import Estimate
from slotmamba.tables import table

SLOT_MEMORY = "slot memory"


def report_text(name: str, found: Estimate, micro_batch: int) -> str:
    """Tables of parameters and operations, of memory, and the totals of the run."""
    tables = [_parts(name, found), _memory(found, micro_batch), *communication_tables(found), _totals(found)]
    return "\n\n".join(tables)


def cells_text(found: Mapping[str, Estimate]) -> str:
    """A table of the totals of several recipes, by name."""
    rows = [
        (name, f"{each.total_parameters:,}", f"{each.training_flops:,.0f}", readable(each.memory.training))
        for name, each in found.items()
    ]
    return table(("cell", "parameters", "FLOPs/token training", "memory of a process"), rows)


def _parts(name: str, found: Estimate) -> str:
    slots = {key: flops for key, flops in found.forward.items() if key.startswith(f"{SLOT_MEMORY}: ")}
    operations = {key: flops.total for key, flops in found.forward.items() if key not in slots}
    operations[SLOT_MEMORY] = sum(flops.total for flops in slots.values())
    total = found.forward_flops
    rows = []
    for part in _in_order(found):
        rows.append(_part(part, found.parameters.get(part, 0), operations.get(part, 0.0), total))
        if part == SLOT_MEMORY:
            rows += [
                ("  " + key.removeprefix(f"{SLOT_MEMORY}: "), "", f"{flops.total:,.0f}", _share(flops.total, total))
                for key, flops in slots.items()
            ]
    rows.append(_part("total", found.total_parameters, total, total))
    products = sum(flops.matmul for flops in found.forward.values())
    return "\n".join(
        [
            table((name, "parameters", "FLOPs/token forward", "share"), rows),
            f"{_share(products, total)} of the FLOPs are matrix products",
            f"training: {found.training_flops:,.0f} FLOPs/token, three times the forward pass",
        ]
    )


def _in_order(found: Estimate) -> list[str]:
    order = [
        "embedding", "encoder Mamba-2", "encoder attention", "encoder MLP", "attention", "BD-LRU", SLOT_MEMORY,
        "injection", "MLP", "norms", "output",
    ]  # fmt: skip
    unknown = {key.partition(": ")[0] for key in (*found.parameters, *found.forward)} - set(order)
    assert not unknown, f"parts without a place in the table: {unknown}"
    return [part for part in order if part in found.parameters or part in found.forward or part == SLOT_MEMORY]


def _part(name: str, parameters: int, flops: float, total: float) -> tuple[str, str, str, str]:
    return name, f"{parameters:,}", f"{flops:,.0f}", _share(flops, total)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}"


def _memory(found: Estimate, micro_batch: int) -> str:
    memory = found.memory
    copy = ", ZeRO's copy of weights" if found.engine == "deepspeed" else ""
    operations = "Triton kernels" if found.gpu else "PyTorch operations"
    activations = f"activations of a micro-batch ({micro_batch} rows, {operations})"
    rows = [
        ("parameters (float32)", memory.parameters),
        ("gradients (float32)", memory.gradients),
        (f"optimizer state (AdamW, two float32 moments{copy})", memory.optimizer),
        *([("gathered while layers run, and buffers", memory.gathered)] if memory.gathered else []),
        ("weights in bfloat16 (autocast)", memory.autocast),
        (activations, sum(memory.activations.values())),
        *(("  " + part, number) for part, number in memory.activations.items()),
        ("slot states at segment ends", memory.boundary_states),
        ("training, total", memory.training),
        *([("offloaded to CPU memory", memory.host)] if memory.host else []),
        ("decoding state of a sequence, beside the parameters", memory.decoding_state),
    ]
    if memory.decoding_per_token:
        rows.append(("  and for every token (attention's cache)", memory.decoding_per_token))
    where = f"memory of a process, one of {found.processes} ({found.engine})"
    return _bytes_table("memory of a process" if found.engine == "single" else where, rows)


def communication_tables(found: Estimate) -> list[str]:
    """A table of what a process sends in a step; none where it is alone."""
    if not found.communication:
        return []
    rows = [*found.communication.items(), ("total", sum(found.communication.values()))]
    return [_bytes_table("sent by a process in a step", rows)]


def _bytes_table(title: str, rows: Sequence[tuple[str, float]]) -> str:
    return table((title, "bytes", ""), [(key, f"{number:,.0f}", readable(number)) for key, number in rows])


def readable(number: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def _totals(found: Estimate) -> str:
    row = found.row
    encoder = f", {row.encoder_tokens} of the encoder" if row.encoder_tokens else ""
    return "\n".join(
        [
            f"rows: {row.tokens} tokens{encoder}, {row.labelled:.1%} of them with a label",
            f"run: {found.steps:,} steps of {found.tokens_per_step:,} tokens = "
            f"{found.steps * found.tokens_per_step:,} tokens, {found.run_flops:.3g} FLOPs",
        ]
    )
