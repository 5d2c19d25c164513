"""Writes Zarr stores with either generation of the package zarr; Python 3.10 gets 2.18, which knows format 2 only."""

from typing import Any

import pytest


def _package(version: int) -> Any:
    zarr = pytest.importorskip("zarr", reason="the package zarr is not installed")
    if version == 3 and not hasattr(zarr, "create_array"):
        pytest.skip("zarr 2 writes no stores of format 3: needs zarr 3")
    return zarr


def new_group(path: Any, version: int = 2) -> Any:
    zarr = _package(version)
    how = dict(zarr_format=version) if hasattr(zarr, "create_array") else {}
    return zarr.open_group(str(path), mode="w", **how)


def new_array(path: Any, version: int = 2, **how: Any) -> Any:
    """A store that is one array."""
    zarr = _package(version)
    if hasattr(zarr, "create_array"):
        return zarr.create_array(str(path), zarr_format=version, **how)
    return zarr.open_array(str(path), mode="w", **how)


def add_array(group: Any, name: str, **how: Any) -> Any:
    return getattr(group, "create_array", group.create_dataset)(name, **how)


def save_zarr(path: Any, x: Any, axes: str, side: int, ome: float = 0.5) -> None:
    """OME-Zarr with chunks of `side` x 16."""
    group = new_group(path, 3 if ome == 0.5 else 2)
    chunks = (*[1] * (x.ndim - 2), side, 16)
    add_array(group, "0", shape=x.shape, chunks=chunks, dtype=x.dtype)[...] = x
    scales = [{"version": str(ome), "axes": [{"name": a} for a in axes], "datasets": [{"path": "0"}]}]
    group.attrs.update({"ome": {"version": "0.5", "multiscales": scales}} if ome == 0.5 else {"multiscales": scales})
