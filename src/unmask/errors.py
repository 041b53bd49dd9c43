"""What unmask says when the mistake is the user's."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake of the user's, told in one line that says what to do; the command line prints it and exits with 2."""

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(line.strip() for line in str(message).splitlines() if line.strip()))


def suggest(name: str, known: Iterable[str], kind: str) -> UserError:
    """Return (not raise) the error for an unknown `name` of a `kind`, with the nearest known name, if any is near."""
    names = sorted(set(known))
    folded = {candidate.lower(): candidate for candidate in names}
    near = get_close_matches(name.lower(), folded, n=1)
    guess = f"; did you mean {folded[near[0]]!r}?" if near else "."
    listing = f"Known: {', '.join(names)}" if names else f"There is no {kind} to choose from"
    return UserError(f"unknown {kind} {name!r}{guess} {listing}")
