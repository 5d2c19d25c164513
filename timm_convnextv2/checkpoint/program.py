"""A model as one file for other runtimes: ONNX, or a program of torch.export. It is kept only if it computes the same.

The file holds the weights, mean and std, and JSON under `METADATA`, which says what to feed and what comes out.
"""

import io
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..data import MissingPackageError
from ..data.formats.errors import installed
from ..files import whole_file

METADATA = "timm_convnextv2.json"  # a metadata property of ONNX, an extra file of torch.export
TOLERANCE = 1e-4  # of the model's largest output: other runtimes add float32 in another order
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONNX_LIMIT = 2**31 - 2**20  # bytes of a protobuf message, less the graph
_TIMED = 9  # calls, of which the median counts

Run = Callable[[Tensor], Sequence[Tensor]]


class Deployable(NamedTuple):
    """A model that takes float32 `images` `[B, C, H, W]` and returns a tensor, or several, with these names."""

    model: nn.Module
    shape: tuple[int, int, int]  # of an image
    stride: int
    outputs: tuple[str, ...]
    about: dict[str, Any]  # for `METADATA`


class Program(NamedTuple):
    """The measures of a file that `write_program` wrote."""

    content: dict[str, Any]  # of `METADATA`
    size: int  # bytes
    difference: float  # largest one from the model, in units of the model's largest output
    eager: float  # seconds per batch of the model
    exported: float  # seconds per batch of the file


class Normalized(nn.Module):
    """A model that normalises its images; a list of outputs becomes a tuple."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Any:
        found = self.model((images - self.mean) / self.std)
        return tuple(found) if isinstance(found, list) else found


def check_form(form: str) -> None:
    """Refuses 'onnx' without its packages."""
    if form == "onnx" and (missing := [name for name in _PACKAGES if not installed(name)]):
        remedy = "run `pip install 'timm_convnextv2[onnx]'`, or pass --format torch"
        raise MissingPackageError(f"--format onnx needs the packages {', '.join(missing)}: {remedy}.")


def write_program(
    what: Deployable, path: Path, form: str, *, batch_size: int = 1, dynamic: Sequence[str] = ()
) -> Program:
    """Exports a model for the CPU, compares the file with the model on random images, and times both.

    `form` is 'onnx' or 'torch'; `dynamic` names what may change from call to call: 'batch', 'size' (height and width,
    from twice the stride). If the file would compute something else, nothing is written, a `RuntimeError`.
    """
    model, least = what.model.eval().requires_grad_(False), 2 * what.stride
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if form == "onnx" and size > _ONNX_LIMIT:
        raise ValueError(f"The weights have {size / 2**30:.1f} GiB, an ONNX file at most 2 GiB. Pass --format torch.")
    if "size" in dynamic and min(what.shape[1:]) < least:
        raise ValueError(f"--dynamic size needs images of {least} pixels or more, got {what.shape[1]}: --img-size.")
    dims: dict[int, Any] = {0: Dim("batch", min=1)} if "batch" in dynamic else {}
    if "size" in dynamic:
        dims |= {2: Dim("height", min=least), 3: Dim("width", min=least)}
    shape = (batch_size, *what.shape)
    # a batch of one would become a constant
    traced = torch.rand(max(batch_size, 2) if 0 in dims else batch_size, *what.shape)
    other = tuple(n + more if i in dims else n for i, (n, more) in enumerate(zip(shape, (2, 0, 1, 2), strict=True)))
    make, load = _FORMS[form]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about their own code
        expected = {case: (images := torch.rand(case), _outputs(model(images))) for case in {shape, other}}
        content = what.about | {
            "input": {"name": "images", "shape": list(shape), "dtype": "float32"},
            "outputs": {n: list(v.shape) for n, v in zip(what.outputs, expected[shape][1], strict=True)},
            "dynamic": [*dynamic],
        }
        try:
            saved = make(model, traced, dims, what.outputs, json.dumps(content))
        except Exception as e:  # exporters raise anything
            how = f" with --dynamic {' '.join(dynamic)}" if dynamic else ""
            reason = str(e).strip().partition("\n")[0]
            raise RuntimeError(f"The model cannot be exported{how} ({type(e).__name__}: {reason}).") from e
        with whole_file(path) as part:
            part.write_bytes(saved)
            run = load(part)
            worst = max(_difference(run(images), wanted) for images, wanted in expected.values())
            if not worst <= TOLERANCE:  # `not`: NaN is refused as well
                raise RuntimeError(
                    f"The exported model differs from the model by {worst:.1e} of its largest output, more than "
                    f"{TOLERANCE:.0e}. Nothing was written."
                )
            eager, exported = _seconds((model, run), expected[shape][0])
    return Program(content, path.stat().st_size, worst, eager, exported)


def _outputs(found: Any) -> Sequence[Tensor]:
    return found if isinstance(found, tuple | list) else (found,)


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference in units of each output's largest value."""
    if [value.shape for value in found] != [value.shape for value in expected]:
        return float("inf")
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def _seconds(runs: Sequence[Callable[[Tensor], Any]], images: Tensor) -> list[float]:
    """The median time of a call of each, after one that does not count; they take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(_TIMED + 1):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(images)
            own.append(time.perf_counter() - start)
    return [statistics.median(own[1:]) for own in times]


def _make_torch(model: nn.Module, images: Tensor, dims: dict[int, Any], names: Sequence[str], text: str) -> bytes:
    program = torch.export.export(model, (images,), dynamic_shapes=(dims,), strict=False)
    buffer = io.BytesIO()  # in memory: PyTorch aborts the process if a disk is full
    torch.export.save(program, buffer, extra_files={METADATA: text})
    return buffer.getvalue()


def _load_torch(path: Path) -> Run:
    module = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda images: _outputs(module(images))


def _make_onnx(model: nn.Module, images: Tensor, dims: dict[int, Any], names: Sequence[str], text: str) -> bytes:
    how: Any = dict(dynamo=True, verbose=False, input_names=["images"], output_names=[*names])
    program: Any = torch.onnx.export(model, (images,), dynamic_shapes=(dims,), **how)
    program.model.metadata_props[METADATA] = text
    return program.model_proto.SerializeToString()


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]


_FORMS: dict[str, tuple[Callable[..., bytes], Callable[[Path], Run]]] = {
    "torch": (_make_torch, _load_torch),
    "onnx": (_make_onnx, _load_onnx),
}
