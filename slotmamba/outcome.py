"""How an error ends a command: the exit code, and one line where the cause is known."""

from __future__ import annotations

from dataclasses import dataclass

from slotmamba.errors import InputError, SlotMambaError

DONE, FAILURE, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
BAD_PATH_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class Outcome:
    """What a user is told, one line or more, and the exit code."""

    message: str
    code: int


def outcome(error: BaseException) -> Outcome | None:
    """How `error` ends a command; None for a bug, which keeps its traceback."""
    match error:
        case KeyboardInterrupt():
            return Outcome("interrupted", INTERRUPTED)
        case ModuleNotFoundError():
            message = _missing_package(error)
            return Outcome(message, FAILURE) if message else None
        case InputError():
            return Outcome(str(error), BAD_INPUT)
        case OSError():
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
            return Outcome(message, BAD_INPUT if isinstance(error, BAD_PATH_ERRORS) else FAILURE)
        case SlotMambaError():
            return Outcome(str(error), FAILURE)
    return None


def _missing_package(error: ModuleNotFoundError) -> str | None:
    """Which extra to install for a package that is optional; None for anything else, which is a bug."""
    from slotmamba.dependencies import extra_that_installs, install_command

    extra = extra_that_installs(error.name or "")
    return extra and f"this needs the package {error.name}, which is not installed: {install_command(extra)}"
