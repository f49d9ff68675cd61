"""``slotmamba doctor``: what is installed, which backends are live, whether the slot memory computes right values."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterable, Iterator
from importlib import metadata

from rich.console import Console
from rich.table import Table

from slotmamba.dependencies import dependencies, install_command, tested_versions
from slotmamba.environment import cpu_model, describe_gpus, usable_cores

LOW_DISK = 2 * 10**9
"""Bytes; a checkpoint of a small model with its optimizer state fits a few times."""

TOLERANCE = 1e-9
"""Largest float64 difference, relative to the largest entry, between two backends that compute the same function."""


def run() -> int:
    """Print the report; return 0 if SlotMamba is usable here, 1 if not, with the reasons printed last."""
    console = Console(highlight=False)
    console.print(f"SlotMamba {metadata.version('slotmamba')}\n")
    console.print(_package_table())
    _print_extras(console)
    problems = [
        f"{each.requirement} is required, {each.installed or 'nothing'} is installed: {install_command(None)}"
        for each in dependencies()
        if each.extra is None and not each.accepted
    ]
    if not problems:
        problems += _print_backends(console)
    free = shutil.disk_usage(".").free
    console.print(f"free disk here: {free / 1e9:.1f} GB")
    if free < LOW_DISK:
        problems.append(f"only {free / 1e9:.1f} GB of disk are free here, too little for checkpoints")
    for problem in problems:
        console.print(f"problem: {problem}", markup=False, soft_wrap=True)
    console.print("not usable" if problems else "usable")
    return 1 if problems else 0


def print_findings(findings: Iterable[tuple[str, str]]) -> int:
    """Print what was found of a cluster, as it is found: `ok`, `note` or `problem`, and a line; return as `run`."""
    console, problems = Console(highlight=False), 0
    for state, text in findings:
        console.print(f"{state:8} {text}", markup=False, soft_wrap=True)
        problems += state == "problem"
    console.print("not usable" if problems else "usable")
    return 1 if problems else 0


def _package_table() -> Table:
    tested = tested_versions()
    table = Table("package", "installed", "accepted", "tested", "for", box=None, padding=(0, 2, 0, 0))
    for each in dependencies():
        accepted = str(each.requirement.specifier) or "any"
        mark = "" if each.accepted else " (!)" if each.installed else ""
        installed = f"{each.installed or '-'}{mark}"
        table.add_row(each.name, installed, accepted, tested.get(each.name, "-"), each.extra or "core")
    return table


def _print_extras(console: Console) -> None:
    extras = dict.fromkeys(each.extra for each in dependencies() if each.extra is not None)
    console.print()
    for extra in extras:
        missing = [each.name for each in dependencies() if each.extra == extra and not each.accepted]
        state = f"needs {', '.join(missing)}: {install_command(extra)}" if missing else "installed"
        console.print(f"extra {extra}: {state}", markup=False, soft_wrap=True)
    console.print()


def _print_backends(console: Console) -> list[str]:
    """Print every backend's state and return what makes SlotMamba unusable."""
    import torch

    problems = []
    console.print(f"cpu: {cpu_model()}, {usable_cores()} cores, torch uses {torch.get_num_threads()} threads")
    for index, gpu in enumerate(describe_gpus()):
        console.print(f"cuda:{index}: {gpu['name']}, {gpu['memory'] / 1e9:.0f} GB, capability {gpu['capability']}")
    if not torch.cuda.is_available():
        console.print("cuda: no GPU visible")
    console.print(f"triton: {_triton_state()}")
    console.print(f"mamba-ssm: {_import_state('mamba_ssm')}")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        error = max(_slot_memory_errors(device))
        verdict = "ok" if error <= TOLERANCE else "WRONG"
        console.print(f"slot memory on {device}: {verdict}, forward and backward {error:.0e} off the definition")
        if error > TOLERANCE:
            problems.append(f"the slot memory computes wrong values on {device}, off by {error:.0e}")
    return problems


def _triton_state() -> str:
    import torch

    state = _import_state("triton")
    return state if torch.cuda.is_available() or state != "importable" else "importable, interpreter only (no GPU)"


def _import_state(module: str) -> str:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not usable ({error})"
    return "importable"


def _slot_memory_errors(device: str) -> Iterator[float]:
    """Relative float64 differences of HKSA's `torch` backend from the reference: the output's, then each gradient's."""
    import torch

    from slotmamba_kernels import hksa, kronecker_topk

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    batch, length, heads, steps, width, factors, factor_size, top_k = 2, 12, 2, 2, 8, 2, 4, 3
    token = (batch, length, heads)
    write_idx, write_w = kronecker_topk(normal(*token, factors, factor_size), top_k)
    read_idx, read_w = kronecker_topk(normal(*token, factors, factor_size), top_k)
    inputs = [
        normal(*token, width),  # q
        torch.nn.functional.normalize(normal(*token, steps, width), dim=-1),  # k
        normal(*token, steps, width),  # u_k
        normal(*token, steps, width),  # u_v
        2 * normal(*token, steps).sigmoid(),  # beta
        write_w,
        read_w,
        torch.ones(heads, dtype=torch.float64, device=device),  # gamma
    ]
    weight = normal(*token, width)

    def output_and_gradients(backend: str) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        q, k, u_k, u_v, beta, w_write, w_read, gamma = leaves
        output, _ = hksa(
            *(q, k, u_k, u_v, beta, write_idx, w_write, read_idx, w_read, gamma),
            num_slots=factor_size**factors,
            backend=backend,
        )
        return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]

    for computed, expected in zip(output_and_gradients("torch"), output_and_gradients("reference"), strict=True):
        yield float((computed - expected).abs().max() / expected.abs().max())
