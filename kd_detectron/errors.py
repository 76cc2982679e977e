"""The errors a user can cause, as one sentence each.

Every message names the config key, the values that disagree and the fix. ``tools/train_net.py``
prints the message alone and exits with code 2; ``--debug`` shows the traceback.
"""

import difflib
from collections.abc import Iterable

_MANY = 12


class ConfigError(ValueError):
    """Something that the user wrote, or that a file holds, cannot work; nothing was trained."""


class NonFiniteLossError(FloatingPointError):
    """A loss, or the weights, became NaN or infinite in training; the last checkpoint is intact."""


class CorruptImageError(RuntimeError):
    """More images than allowed cannot be read; the last checkpoint is intact."""


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Returns ``"; did you mean A or B?"`` with the known names nearest to ``name``.

    Where none is near, those that there are, up to a dozen; "" where there are none.
    """
    known = sorted(known)
    if not known:
        return ""
    lowered = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=limit, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(lowered[candidate] for candidate in near) + "?"
    more = f", ... ({len(known)} in all)" if len(known) > _MANY else ""
    return "; known: " + ", ".join(known[:_MANY]) + more
