"""Import of MinkowskiEngine, an optional library for sparse tensors that must be built from source."""

import collections
import collections.abc
import functools
from importlib import import_module
from typing import Any

BUILD = (
    "It must be built from source, which takes minutes (docs/performance.md, 'MinkowskiEngine'): a BLAS with headers "
    "(`apt-get install libopenblas-dev`), `pip install 'setuptools<65' 'numpy<2' ninja`, `pip download --no-binary "
    ":all: --no-deps --no-build-isolation MinkowskiEngine==0.5.4`, and in the unpacked folder `python setup.py install "
    "--cpu_only --blas=openblas`."
)


@functools.cache
def engine() -> Any:
    """Imports MinkowskiEngine; a RuntimeError says how to build it if it is missing or built for another PyTorch."""
    lent = not hasattr(collections, "Sequence")  # its last release imports the name, which Python 3.10 removed
    if lent:
        collections.Sequence = collections.abc.Sequence  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return import_module("MinkowskiEngine")
    except (ImportError, AttributeError, OSError) as error:
        raise RuntimeError(f"MinkowskiEngine cannot be imported ({error}). {BUILD}") from error
    finally:
        if lent:
            del collections.Sequence  # pyright: ignore[reportAttributeAccessIssue]
