"""Measuring trained models: `slotmamba evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slotmamba.checkpoint import open_checkpoint, recipe_path
from slotmamba.config import load_recipe
from slotmamba.device import choose_device
from slotmamba.errors import InputError
from slotmamba.evaluate import perplexity, recall
from slotmamba.evaluate.pulse import Pulse
from slotmamba.files import write_json
from slotmamba.models import SlotMambaForCausalLM, SlotMambaForSeq2Seq
from slotmamba_data.files import write_file

SUITES: dict[str, Callable[..., recall.RecallReport | perplexity.PerplexityReport]] = {
    "recall": recall.evaluate,
    "perplexity": perplexity.evaluate,
}


def run(checkpoint: Path | str, suite: str, samples: int | None = None) -> int:
    """Measures a checkpoint with a suite, prints how far it is and then a table, writes RUN_DIR/evaluation; returns the
    exit code 0.

    Args:
        checkpoint: a run folder (its newest checkpoint that is not damaged) or a checkpoint.
        suite: "recall" or "perplexity"; the file written is SUITE.json, and for recall SUITE.png.
        samples: of each recall setting; None is the published number.

    Raises:
        InputError: no such suite, samples below 1 or of another suite, no checkpoint, a suite that does not fit the
            run, or data that are not there.
        SlotMambaError: the checkpoint is not as it was written, or each of the run's is not.
        OSError: the results cannot be written.
    """
    if suite not in SUITES:
        raise InputError(f"suite {suite!r} is not known: expected one of {', '.join(SUITES)}")
    if samples is not None and (suite != "recall" or samples < 1):
        raise InputError(f"samples={samples}: expected at least 1, and with the suite recall only")
    recipe_file = recipe_path(Path(checkpoint))
    recipe = load_recipe(recipe_file)
    device = choose_device("auto", "device")
    model, path = open_checkpoint(checkpoint, device)
    assert isinstance(model, SlotMambaForCausalLM | SlotMambaForSeq2Seq)
    options = {} if samples is None else {"samples": samples}
    pulse = Pulse()
    pulse.say(f"{recipe.name}, {path.resolve().name}: {suite} on {device}")
    report = SUITES[suite](model, recipe, device, pulse, **options)

    print(f"\n{report.text()}\n")
    folder = recipe_file.parent / "evaluation"
    folder.mkdir(exist_ok=True)
    results = {"checkpoint": path.resolve().name, **report.as_json()}
    write_json(folder / f"{suite}.json", results)
    print(folder / f"{suite}.json")
    if isinstance(report, recall.RecallReport):
        write_file(folder / f"{suite}.png", report.plot(f"{recipe.name}, {path.resolve().name}"))
        print(folder / f"{suite}.png")
    return 0
