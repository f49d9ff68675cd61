"""The command line, ``slotmamba COMMAND ...``.

Exit codes: 0 done, 1 failure, 2 bad input, 130 interrupted. Bad input and failures that are nobody's bug are one line
each on stderr; a bug keeps its traceback. Handlers import what they need, so that help and `validate` need no torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from slotmamba.errors import InputError, suggestion
from slotmamba.outcome import DONE, FAILURE, outcome
from slotmamba.runs_cli import add_runs_commands
from slotmamba_data.cli import add_data_commands

if TYPE_CHECKING:
    from pathlib import Path

    from slotmamba.config import Recipe
    from slotmamba.config.cells import Sweep
    from slotmamba_data.inspect_cli import PlannedRun

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
    Handler = Callable[[argparse.Namespace], int]


class UsageError(InputError):
    """A command line that does not parse."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, near matches, and help that may be made only when it is asked for."""

    more_help: Callable[[], str] | None = None

    def format_help(self) -> str:
        return super().format_help() + (self.more_help() if self.more_help else "")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            near = suggestion(str(value), choices) or f"; expected one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"{value} is not known{near}")


def build_parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = Parser(prog="slotmamba", description="Train and use SlotMamba language models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = _add_recipe_command(commands, "train", _train, "train a model; the same command again resumes the run")
    train.add_argument(
        "--seed-checkpoint",
        action="store_true",
        help="only write the initial weights as checkpoint 0, which any engine and number of processes starts from",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="build and shard the model for all processes on this one, and run nothing",
    )
    validate = _add_recipe_command(
        commands,
        "validate",
        _validate,
        "check a recipe without running it, and say which of its data are not there yet",
    )
    validate.add_argument("--print", action="store_true", help="print the resolved recipe with all its keys")
    _add_recipe_command(commands, "estimate", _estimate, "parameters, FLOPs per token and memory of a recipe, by part")
    _add_submit(commands)
    _add_generate(commands)
    _add_evaluate(commands)
    add_runs_commands(commands)
    add_data_commands(commands, _planned)
    _add_doctor(commands)
    return parser


def _add_recipe_command(commands: Commands, name: str, handler: Handler, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of an installed recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe keys to set, such as optim.lr=3e-4")
    parser.set_defaults(handler=handler)
    assert isinstance(parser, Parser)
    parser.more_help = _recipe_key_help
    return parser


def _add_submit(commands: Commands) -> None:
    parser = _add_recipe_command(commands, "submit", _submit, "train a recipe as a Slurm job that survives preemption")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the recipe, the batch script, the memory it needs, and what the cluster says to it",
    )
    parser.epilog = (
        "cluster=local, beside the keys of the recipe, runs the same on this machine, and cluster=debug in this "
        "process; cluster=slurm is the default."
    )


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser("doctor", help="what is installed, which backends work, what is missing")
    parser.add_argument("--slurm", action="store_true", help="what the cluster allows, tried with a short job")
    parser.add_argument(
        "overrides",
        metavar="slurm.KEY=value",
        nargs="*",
        help="with --slurm: what the job asks for, such as slurm.partition=gpu slurm.gpus_per_node=8",
    )
    parser.set_defaults(handler=_doctor)


def _recipe_key_help() -> str:
    from slotmamba.config import installed_recipes
    from slotmamba.config.reference import key_list

    return f"\ninstalled recipes: {', '.join(installed_recipes())}\n\nrecipe keys:\n{key_list()}\n"


def _add_generate(commands: Commands) -> None:
    summary = "continue a prompt with a trained model"
    parser = commands.add_parser("generate", help=summary, description=f"{summary.capitalize()}, token by token.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run folder or one of its checkpoints")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 (the default) takes the likeliest token each time",
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="X", help="draw from the likeliest tokens that add up to X only")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws, default %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default %(default)s")
    parser.set_defaults(handler=_generate)


def _add_evaluate(commands: Commands) -> None:
    summary = "measure a trained model"
    parser = commands.add_parser("evaluate", help=summary, description=f"{summary.capitalize()}.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run folder or one of its checkpoints")
    parser.add_argument("--suite", choices=("recall", "perplexity"), required=True, help="what to measure")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="recall: samples of each setting (default: 1000, as published)"
    )
    parser.set_defaults(handler=_evaluate)


def _load_recipe(args: argparse.Namespace) -> Recipe:
    from slotmamba.config import load_recipe

    return load_recipe(args.recipe, args.overrides)


def _load_sweep(args: argparse.Namespace) -> Sweep:
    from slotmamba.config.cells import load_sweep

    return load_sweep(args.recipe, args.overrides)


def _planned(name: str, overrides: Sequence[str]) -> PlannedRun:
    """The data of a recipe, for `data inspect`."""
    from slotmamba.config import load_recipe

    recipe = load_recipe(name, overrides)
    from slotmamba.batch import training_plan
    from slotmamba_data.inspect_cli import PlannedRun

    plan, step = training_plan(recipe), recipe.rows_per_step
    rows, ends = recipe.train.total_steps * step, plan.ends()
    if ends is not None:
        rows = min(rows, ends[0] // step * step)
    return PlannedRun(recipe.name, plan, rows, step, recipe.data.tokenizer)


def _train(args: argparse.Namespace) -> int:
    recipe = _load_recipe(args)  # before the slow import: a wrong key should show at once
    if recipe.sweep is not None:
        raise InputError(
            f"{recipe.name} is a sweep over {', '.join(recipe.sweep)}: `slotmamba submit` trains it, with "
            "cluster=local on this machine; sweep=null is the recipe without it"
        )
    if args.seed_checkpoint:
        from slotmamba.seed_checkpoint import write_seed_checkpoint

        print(f"{recipe.name}: initial weights: {write_seed_checkpoint(recipe)}")
        return DONE
    if args.dry_run:
        from slotmamba.dry_run import dry_run

        print(dry_run(recipe))
        return DONE
    from slotmamba.config.duration import seconds
    from slotmamba.signals import StopFlag

    limit = recipe.train.time_limit
    with StopFlag(
        seconds(limit) if limit else None
    ) as stop:  # before the slow import: a signal in the first seconds should not be lost
        from slotmamba.train import train

        return train(recipe, stop)


def _validate(args: argparse.Namespace) -> int:
    from slotmamba.config import recipe_yaml
    from slotmamba.readiness import missing_data

    recipe = _load_recipe(args)
    if args.print:
        print(recipe_yaml(recipe), end="")
    cells = _load_sweep(args).cells if recipe.sweep is not None else ()
    print(f"{recipe.name}: ok{f', a sweep of {len(cells)} cells' if cells else ''}")
    for cell in cells:
        print(f"  {cell.name}")
    for line in dict.fromkeys(
        line for each in [recipe, *(cell.recipe for cell in cells)] for line in missing_data(each)
    ):
        print(f"to be made before training: {line}")
    return DONE


def _estimate(args: argparse.Namespace) -> int:
    recipe = _load_recipe(args)
    sweep = _load_sweep(args) if recipe.sweep is not None else None
    from slotmamba.estimate import report, report_cells

    print(report(recipe) if sweep is None else report_cells(sweep))
    return DONE


def _submit(args: argparse.Namespace) -> int:
    # Not a key of the recipe: a run is the same one wherever it goes on.
    clusters = [text.removeprefix("cluster=") for text in args.overrides if text.startswith("cluster=")]
    args.overrides = [text for text in args.overrides if not text.startswith("cluster=")]
    cluster = clusters[-1] if clusters else "slurm"
    from slotmamba_slurm.submit import CLUSTERS, preview, submit

    if cluster not in CLUSTERS:
        raise UsageError(f"cluster={cluster}: expected {', '.join(CLUSTERS)}{suggestion(cluster, CLUSTERS)}")
    from slotmamba_slurm.fill import fill_nodes

    fill = None if cluster == "debug" else fill_nodes(args.recipe, args.overrides)
    if fill is not None:
        args.overrides += fill.overrides
        print(fill)
    recipe = _load_recipe(args)
    if recipe.sweep is not None:
        return _submit_sweep(_load_sweep(args), cluster, args.dry_run)
    if args.dry_run:
        from slotmamba.estimate import report
        from slotmamba.estimate.gpus import gpu_line

        costs = "\n\n".join(filter(None, [report(recipe), gpu_line(recipe)]))
        print(preview(recipe, cluster, costs), end="")
        return DONE
    from slotmamba.environment import git_state

    return submit(recipe, cluster, _train_file, git_state())


def _submit_sweep(sweep: Sweep, cluster: str, dry_run: bool) -> int:
    from slotmamba.sweep_report import write_results
    from slotmamba.sweep_results import not_to_submit
    from slotmamba_slurm.sweep import preview_sweep, submit_sweep

    if dry_run:
        from slotmamba.estimate import report_cells

        print(preview_sweep(sweep, cluster, not_to_submit(sweep), report_cells(sweep)), end="")
        return DONE
    from slotmamba.environment import git_state

    return submit_sweep(sweep, cluster, not_to_submit(sweep), write_results, git_state())


def _train_file(recipe: Path) -> int:
    return main(["train", str(recipe)])


def _generate(args: argparse.Namespace) -> int:
    from slotmamba.generation import generate_text

    pieces = generate_text(
        args.checkpoint,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        device=args.device,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return DONE


def _evaluate(args: argparse.Namespace) -> int:
    from slotmamba.evaluate import run

    return run(args.checkpoint, args.suite, args.samples)


def _doctor(args: argparse.Namespace) -> int:
    from slotmamba import doctor

    if not args.slurm:
        if args.overrides:
            raise UsageError(f"unknown arguments: {' '.join(args.overrides)}")
        return doctor.run()
    from slotmamba.config import load_recipe

    recipe = load_recipe("mqar-tiny", args.overrides)  # any one: its section slurm is asked for
    from slotmamba_slurm.doctor import diagnose

    return doctor.print_findings(diagnose(recipe.slurm))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, rest = build_parser().parse_known_args(argv)
    # argparse fills positional arguments once, so key=value after an option is left over.
    if hasattr(args, "overrides") and all("=" in text and not text.startswith("-") for text in rest):
        args.overrides += rest
    elif rest:
        raise UsageError(f"unknown arguments: {' '.join(rest)}")
    return args


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; ``--help`` leaves through SystemExit(0), as argparse does."""
    # Read when torch loads OpenMP, that is, in the handlers. A thread that spins while it waits for one that has lost
    # its core makes training on a busy machine ten times slower (docs/lab-log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        args = _parse(argv)
        code: int = args.handler(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        # Python flushes stdout once more at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except (Exception, KeyboardInterrupt) as error:
        known = outcome(error)
        if known is None:
            raise
        return _fail(known.message, known.code)


if __name__ == "__main__":
    sys.exit(main())
