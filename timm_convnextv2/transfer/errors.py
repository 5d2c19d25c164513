"""An image that becomes unreadable during a run."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..data.formats.errors import MissingPackageError


class UnreadableError(ValueError):
    """A file cannot be used; names the file and the reason."""

    def __str__(self) -> str:
        # an error from a data worker has the worker's traceback before its message
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns errors of a file into an `UnreadableError` whose message begins with `what`."""
    try:
        yield
    except MissingPackageError:
        raise
    except (ValueError, OSError) as e:
        raise UnreadableError(f"{what} cannot be used: {' '.join(str(e).split())}") from e
