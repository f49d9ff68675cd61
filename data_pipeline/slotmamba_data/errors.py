"""The error for what a user can put right."""

from __future__ import annotations


class InputError(ValueError):
    """Something that was given (a recipe, a file, an argument) cannot be used; the text says what and why.

    The command line prints the text and exits 2. Any other ValueError, one of NumPy's or torch's for instance, is a bug
    and keeps its traceback there.
    """


class CorruptShardError(InputError):
    """What a shard or its index holds is not what was written; the text names the file and, in a shard, the byte."""
