"""An image that was fine when a run began and cannot be read in its middle."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..data.formats.errors import MissingPackageError


class UnreadableError(ValueError):
    """A file cannot be used; says which one, and why."""

    def __str__(self) -> str:
        # from a data worker it comes with the worker's traceback before it
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Makes what goes wrong with a file an `UnreadableError`, which begins with this name of it."""
    try:
        yield
    except MissingPackageError:
        raise
    except (ValueError, OSError) as e:
        raise UnreadableError(f"{what} cannot be used: {' '.join(str(e).split())}") from e
