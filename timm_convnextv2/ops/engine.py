"""MinkowskiEngine, an optional library of sparse tensors that has to be built: its import, and what to do without."""

import collections
import collections.abc
import functools
from importlib import import_module
from typing import Any

BUILD = (
    "It has to be built from source, which takes minutes (docs/performance.md, 'MinkowskiEngine'): a BLAS with headers "
    "(`apt-get install libopenblas-dev`), `pip install 'setuptools<65' 'numpy<2' ninja`, `pip download --no-binary "
    ":all: --no-deps --no-build-isolation MinkowskiEngine==0.5.4`, and in the unpacked folder `python setup.py install "
    "--cpu_only --blas=openblas`."
)


@functools.cache
def engine() -> Any:
    """The module MinkowskiEngine.

    Raises:
        RuntimeError: It is not installed, or was built for another PyTorch; says how to build it.
    """
    lent = not hasattr(collections, "Sequence")  # Python 3.10 took the name away, from which its last release imports
    if lent:
        collections.Sequence = collections.abc.Sequence  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return import_module("MinkowskiEngine")
    except (ImportError, AttributeError, OSError) as error:
        raise RuntimeError(f"MinkowskiEngine cannot be imported ({error}). {BUILD}") from error
    finally:
        if lent:
            del collections.Sequence  # pyright: ignore[reportAttributeAccessIssue]
