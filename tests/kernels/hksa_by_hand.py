"""HKSA written a second time, from hksa.md sections 2, 3 and 6, in plain loops over numpy vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tests.kernels.hksa_cases import INJECT, STATE, SURPRISE, Case

Array = np.ndarray
Values = dict[str, Array]
Error = tuple[float, float]
"""Prediction error of a slot's key content and of its value content."""


def by_hand(case: Case, errors: list[Error] | None = None) -> tuple[Values, list[Error]]:
    """Outputs by name as `Case.outputs` has them, and the prediction errors in the order in which they were measured.

    errors: what an earlier run measured, to be used instead of measuring again. The gradient of hksa is that of this
    function with the errors held fixed.
    """
    inputs = {name: tensor.detach().numpy() for name, tensor in case.tensors.items()}
    batch, length, heads, dim = inputs["q"].shape
    memory = (
        {name: inputs[name].copy() for name in STATE} if "z" in inputs else _empty(batch, heads, case.num_slots, dim)
    )
    replayed = None if errors is None else iter(errors)
    measured: list[Error] = []
    o = np.zeros((batch, length, heads, dim))
    for b in range(batch):
        for t in range(length):
            if case.doc_start is not None and case.doc_start[b, t] == t:
                for name, fresh in _empty(1, heads, case.num_slots, dim).items():
                    memory[name][b] = fresh[0]
            for h in range(heads):
                token = {name: x[b, t, h] for name, x in inputs.items() if name not in (*STATE, *SURPRISE, "gamma")}
                token.update((name, inputs[name][h]) for name in (*SURPRISE, "gamma") if name in inputs)
                of_head = {name: x[b, h] for name, x in memory.items()}
                for active in range(len(token["write_idx"])):
                    measured.append(_write(token, active, of_head, replayed))
                o[b, t, h] = _read(token, of_head)
    return {"o": o, **memory}, measured


def _empty(batch: int, heads: int, slots: int, dim: int) -> Values:
    return {
        "S_k": np.zeros((batch, heads, slots, dim)),
        "S_v": np.zeros((batch, heads, slots, dim)),
        "z": np.full((batch, heads, slots), 1 / slots),
        "surprise": np.zeros((batch, heads, slots)),
    }


def _write(token: Values, active: int, memory: Values, replayed: Iterator[Error] | None) -> Error:
    """One token's write to one slot of one head; changes `memory`, arrays [M, ...], and returns the error before it."""
    i, w = token["write_idx"][active], float(token["write_w"][active])
    k, u_k, u_v, beta = (token[name] for name in ("k", "u_k", "u_v", "beta"))
    s_k, s_v, z = memory["S_k"][i], memory["S_v"][i], memory["z"][i]
    error = _error(s_k / z, u_k, beta), _error(s_v / z, u_v, beta)
    if replayed is not None:
        error = next(replayed)
    if "a_s" in token:
        a_s, eta = token["a_s"], token["eta"]
        e = a_s * error[0] + (1 - a_s) * error[1]
        memory["surprise"][i] += (1 - eta) * w * (e - memory["surprise"][i])
    a = math.exp(token["gamma"] * math.log1p(-min(w, 0.999)))
    s_k, s_v, z = a * s_k, a * s_v, a * z + w
    for j in range(len(beta)):
        s_k = s_k + w * beta[j] * (u_k[j] - k[j] * np.dot(k[j], s_k))
        s_v = s_v + w * beta[j] * (u_v[j] - k[j] * np.dot(k[j], s_v))
    if "c_k" in token and w > 0:
        c_k, c_v, lam_k, lam_v = (token[name][active] for name in INJECT)
        s_k = (1 - lam_k) * s_k + lam_k * z * c_k
        s_v = (1 - lam_v) * s_v + lam_v * z * c_v
    memory["S_k"][i], memory["S_v"][i], memory["z"][i] = s_k, s_v, z
    return error


def _error(content: Array, u: Array, beta: Array) -> float:
    """Mean squared distance of what a slot holds from the mean of what is written; step sizes of 0 write nothing, 0."""
    mean = sum(beta[j] * u[j] for j in range(len(beta))) / beta.sum() if beta.sum() > 0 else np.zeros_like(content)
    return float(np.mean((content - mean) ** 2))


def _read(token: Values, memory: Values) -> Array:
    scores, contents = [], []
    for i, weight in zip(token["read_idx"], token["read_w"], strict=True):
        content_k, content_v = memory["S_k"][i] / memory["z"][i], memory["S_v"][i] / memory["z"][i]
        scores.append(np.dot(token["q"], content_k) / math.sqrt(len(content_k)) + math.log(max(weight, 1e-30)))
        contents.append(content_v)
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return np.sum([e * content for e, content in zip(exponentials, contents, strict=True)], 0) / sum(exponentials)
