"""`slotmamba runs list | show | logs | stop`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from slotmamba.errors import InputError, one_line, suggestion
from slotmamba.outcome import DONE, INTERRUPTED

if TYPE_CHECKING:
    from slotmamba.runs.status import Status

T = TypeVar("T")


def add_runs_commands(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `runs` and its four commands; without one of them it lists."""
    summary = "list runs, look at one, read its logs, stop it"
    runs = subparsers.add_parser("runs", help=summary, description=f"{summary.capitalize()}.")
    _add_list_options(runs, state=[], sort=None, json=False)
    commands = runs.add_subparsers(dest="runs_command", metavar="COMMAND")
    _add_list(commands)
    _add_show(commands)
    _add_logs(commands)
    _add_stop(commands)
    runs.set_defaults(handler=_list, folder=None)


def _add_list(commands: argparse._SubParsersAction[Any]) -> None:
    summary = "all runs below a folder, a line each"
    parser = commands.add_parser("list", help=summary, description=f"{summary.capitalize()}.")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="default: runs/")
    _add_list_options(parser, *[argparse.SUPPRESS] * 3)  # or else they would undo what stands before `list`
    parser.set_defaults(handler=_list)


def _add_list_options(
    parser: argparse.ArgumentParser, state: list[str] | str, sort: str | None, json: bool | str
) -> None:
    """With these defaults."""
    parser.add_argument("--state", action="append", default=state, help="only runs in this state; may be repeated")
    parser.add_argument("--sort", metavar="KEY", default=sort, help="a key of the JSON output; default: name")
    parser.add_argument("--json", action="store_true", default=json, help="an array of objects, for scripts")


def _add_show(commands: argparse._SubParsersAction[Any]) -> None:
    summary = "one run in full, with its curves; also writes them as PNG files into the run folder"
    parser = commands.add_parser("show", help=summary, description=f"{summary.capitalize()}.")
    _add_run(parser)
    parser.set_defaults(handler=partial(_one, _show))


def _add_logs(commands: argparse._SubParsersAction[Any]) -> None:
    summary = "what the processes of a run wrote, merged in the order of time"
    parser = commands.add_parser("logs", help=summary, description=f"{summary.capitalize()}.")
    _add_run(parser)
    parser.add_argument("--rank", type=int, metavar="N", help="of this rank only")
    parser.add_argument("--follow", action="store_true", help="go on with new lines until the run has ended, or Ctrl-C")
    parser.add_argument("--lines", type=int, metavar="N", help="only the last N lines, and new ones")
    parser.set_defaults(handler=partial(_one, _logs))


def _add_stop(commands: argparse._SubParsersAction[Any]) -> None:
    summary = "have a run save and end; it is not queued again, and the same recipe resumes"
    parser = commands.add_parser("stop", help=summary, description=f"{summary.capitalize()}.")
    _add_run(parser)
    parser.add_argument("--now", action="store_true", help="cancel it, without a checkpoint and without waiting")
    parser.set_defaults(handler=partial(_one, _stop))


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, or the name of one below runs/")


def _list(args: argparse.Namespace) -> int:
    from slotmamba.runs import listing
    from slotmamba.runs.status import STATES

    for state in args.state:
        _check(state, STATES, "--state")
    key = args.sort or "name"
    _check(key, listing.KEYS, "--sort")
    statuses = [each for each in _statuses(args.folder) if not args.state or each.state in args.state]
    statuses = listing.ordered(statuses, key)
    if args.json:
        print(listing.as_json(statuses))
    elif statuses:
        print(listing.as_table(statuses))
    else:
        print("no runs")
    _note_broken(statuses)
    return DONE


def _one(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a command that does not list."""
    if args.state or args.sort or args.json:
        raise InputError(f"--state, --sort and --json are options of `runs list`, not of `runs {args.runs_command}`")
    return command(args)


def _check(value: str, valid: Sequence[str], option: str) -> None:
    if value not in valid:
        raise InputError(f"{option} {value}: expected one of {', '.join(valid)}{suggestion(value, valid)}")


def _statuses(folder: str | None) -> list[Status]:
    """Of all runs below `folder`, the default one if it is None."""
    from slotmamba.runs.folder import DEFAULT_FOLDER, find_runs
    from slotmamba.runs.status import LAST_BYTES, status
    from slotmamba.runs_jobs import last_jobs, open_run

    top = DEFAULT_FOLDER if folder is None else Path(folder)
    if folder is not None and not top.is_dir():
        raise InputError(f"{folder} is not a folder")
    found = find_runs(top, lambda error: _note(_said(error))) if top.is_dir() else ()
    names = [(str(path.relative_to(top)) if path != top else path.resolve().name, path) for path in found]
    runs = [(name, run) for name, path in names if (run := _sound(name, partial(open_run, path, LAST_BYTES)))]
    jobs = last_jobs([run for _, run in runs])
    _note_all(jobs.problems)
    found_out = [_sound(name, partial(status, name, run, jobs.jobs.get(run.path))) for name, run in runs]
    return [each for each in found_out if each is not None]


def _sound(name: str, look: Callable[[], T]) -> T | None:
    """What `look` finds in the folder of a run; None, and a note, where that is damaged: the other runs are listed."""
    try:
        return look()
    except OSError as error:
        _note(f"{name}: {_said(error)}")
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:  # a sound line that has unsound values
        _note(f"{name}: a file of it is damaged, and the run left out: {one_line(error)}")
    return None


def _show(args: argparse.Namespace) -> int:
    from slotmamba.config.sweep_file import is_sweep
    from slotmamba.runs.folder import find_run

    path = find_run(args.run)
    if is_sweep(path):
        from slotmamba.sweep_report import write_results

        print(write_results(path), end="")
        return DONE
    return _show_run(args.run, path)


def _show_run(name: str, path: Path) -> int:
    from slotmamba.plots import plot_records
    from slotmamba.runs.show import curves, facts, starts_table
    from slotmamba.runs.status import RUNNING, status
    from slotmamba.runs_jobs import last_jobs, open_run

    run = open_run(path)
    jobs = last_jobs([run])
    _note_all(jobs.problems)
    found = status(name, run, jobs.jobs.get(path))
    parts = [facts(found, run)]
    if run.starts:
        parts.append(starts_table(run.starts, running=found.state == RUNNING))
    parts.append(curves(run, braille=_has_braille()))
    print("\n\n".join(part for part in parts if part), flush=True)
    _note_broken([found])
    if not run.metrics[0]:
        return DONE
    try:
        plots = plot_records(path, run.metrics[0])
    except OSError as error:
        _note(f"no PNG files: {_said(error)}")
        return DONE
    print("".join(f"\n  {plot}" for plot in plots))
    return DONE


def _has_braille() -> bool:
    try:
        "\u28ff".encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return False
    return True


def _logs(args: argparse.Namespace) -> int:
    from slotmamba.runs.logs import RunLogs, follow, shown

    path = _one_run(args.run)
    if args.rank is not None:
        _check_rank(args.run, path, args.rank)
    if args.lines is not None and args.lines < 0:
        raise InputError(f"--lines {args.lines}: expected a number of lines")
    logs = RunLogs(path, args.rank)
    so_far = shown(logs.new(last=not args.follow), args.rank is None)
    for line in so_far if args.lines is None else so_far[max(0, len(so_far) - args.lines) :]:
        print(line)
    if args.follow:
        with suppress(KeyboardInterrupt):
            follow(logs, partial(_is_over, path, set()), partial(print, flush=True))
    elif not so_far:
        _note(f"{args.run}: nothing is logged{'' if args.rank is None else f' by rank {args.rank}'}")
    return DONE


def _check_rank(name: str, path: Path, rank: int) -> None:
    from slotmamba.runs_jobs import open_run

    run = open_run(path, last_bytes=0)
    size = max([run.parallel.size, *(start.processes for start in run.starts)])
    if not 0 <= rank < size:
        ranks = f"{size} processes, of ranks 0 to {size - 1}" if size > 1 else "1 process, of rank 0"
        raise InputError(f"--rank {rank}: {name} has {ranks}")


def _is_over(path: Path, noted: set[str]) -> bool:
    """Whether a run has ended and no job of it waits or starts; `noted`: problems that were said already."""
    from slotmamba.runs.status import UNDER_WAY, status
    from slotmamba.runs_jobs import last_jobs, open_run

    run = open_run(path, last_bytes=0)
    if run.locked:
        return False
    jobs = last_jobs([run])
    _note_all([problem for problem in jobs.problems if problem not in noted])
    noted.update(jobs.problems)
    return status("", run, jobs.jobs.get(path)).state not in UNDER_WAY


def _stop(args: argparse.Namespace) -> int:
    from slotmamba.config.sweep_file import is_sweep
    from slotmamba.runs.folder import cells, find_run
    from slotmamba.runs_stop import stop_runs

    path = find_run(args.run)
    sweep = is_sweep(path)
    runs = {cell.name: cell for cell in cells(path)} if sweep else {args.run: path}
    try:
        stop_runs(runs, args.now, sweep)
    except KeyboardInterrupt:
        _note("not waiting any longer: what was told to stop still saves and ends")
        return INTERRUPTED
    return DONE


def _one_run(name: str) -> Path:
    from slotmamba.config.sweep_file import is_sweep
    from slotmamba.runs.folder import cells, find_run

    path = find_run(name)
    if is_sweep(path):
        raise InputError(f"{name} is a sweep: name one of its runs, such as {cells(path)[0]}")
    return path


def _note_all(problems: Sequence[str]) -> None:
    for problem in problems:
        _note(f"{problem}: what is said of jobs is from the run folders alone")


def _note_broken(statuses: Sequence[Status]) -> None:
    from slotmamba.runs.listing import broken_lines

    for name, count in broken_lines(statuses).items():
        _note(f"{name}: {count} lines of metrics.jsonl are damaged and left out")


def _said(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
