"""`make demo`: trains on synthetic recall and on real text, on this machine's CPU, and checks that both were learned.

It runs the commands that a user would type, prints them, and leaves everything they wrote behind. Run again, it finds
the trained models and only reports.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path

from slotmamba.cli import main as slotmamba
from slotmamba.config import load_recipe
from slotmamba.metrics import read_metrics

AUSTEN = Path("data/austen")
TOKENIZER = AUSTEN / "tokenizer"
RECALL_TO_REACH = 0.95  # at 32 pairs, mqar-tiny
BITS_TO_GAIN = 1.0  # below the unigram entropy of the validation text, lm-tiny
PROMPT = "It is a truth universally acknowledged, that"


def main() -> int:
    started = time.monotonic()
    print("SlotMamba demo: a few minutes on two cores. Ctrl-C saves; running it again goes on from there.")
    if not _trained("mqar-tiny") or not _prepare_text() or not _trained("lm-tiny"):
        return 1
    if not _run("evaluate", "runs/lm-tiny", "--suite", "perplexity"):
        return 1
    if not _run("generate", "runs/lm-tiny", "--prompt", PROMPT, "--temperature", "0.8", "--top-k", "50"):
        return 1

    recall = _last("mqar-tiny", "recall/128x32")
    text = json.loads(Path("runs/lm-tiny/evaluation/perplexity.json").read_text())["sources"][0]
    bits, unigram = text["bits_per_token"], text["unigram_bits_per_token"]
    results = [
        (
            f"recall of 32 pairs without attention: {recall:.3f}",
            f"at least {RECALL_TO_REACH}",
            recall >= RECALL_TO_REACH,
        ),
        (
            f"validation text: {bits:.2f} bits a token, {unigram:.2f} by token frequencies alone",
            f"at least {BITS_TO_GAIN:g} bit lower",
            bits <= unigram - BITS_TO_GAIN,
        ),
    ]
    print(f"\nResults after {time.monotonic() - started:.0f} s")
    for measured, wanted, reached in results:
        print(f"  {'learned' if reached else 'NOT LEARNED'}  {measured} (wanted: {wanted})")
    print("Written")
    for path in ("runs/mqar-tiny/plots/recall.png", "runs/mqar-tiny/plots/loss.png", "runs/lm-tiny/plots/loss.png"):
        print(f"  {Path(path).resolve()}")
    print(f"  {Path('runs').resolve()}: recipes, metrics, checkpoints; {AUSTEN.resolve()}: tokenizer and shards")
    return 0 if all(reached for _, _, reached in results) else 1


def _run(*arguments: str) -> bool:
    print(f"\n$ slotmamba {shlex.join(arguments)}", flush=True)
    return slotmamba(list(arguments)) == 0


def _trained(name: str) -> bool:
    """Trains a recipe; False when that failed or was stopped before its end."""
    if not _run("train", name):
        return False
    recipe = load_recipe(name)
    return any(
        record["kind"] == "validation" and record["step"] == recipe.train.total_steps
        for record in read_metrics(recipe.run_path / "metrics.jsonl")
    )


def _prepare_text() -> bool:
    """The tokenizer and the shards of lm-tiny, unless they are there."""
    if not (TOKENIZER / "tokenizer.model").exists() and not _run(
        "data", "tokenizer", "--input", "austen:train", "--vocab-size", "2048", "--output", str(TOKENIZER)
    ):
        return False
    for split in ("train", "val"):
        folder, text = AUSTEN / split, f"austen:{split}"
        if not (folder / "manifest.json").exists() and not _run(
            "data", "build", "--input", text, "--tokenizer", str(TOKENIZER), "--output", str(folder)
        ):
            return False
    return True


def _last(name: str, key: str) -> float:
    """The newest value of a metric of a run."""
    return [record[key] for record in read_metrics(load_recipe(name).run_path / "metrics.jsonl") if key in record][-1]


if __name__ == "__main__":
    sys.exit(main())
