"""Registers, spills, shared memory, occupancy and widths of loads of every Triton kernel, without a GPU.

    python -m benchmarks.triton_kernels

Compiles each kernel with Triton's ahead-of-time compiler and reads what the machine code takes, with the `cuobjdump`
that comes with Triton, and the widths of its loads from the PTX. Writes the figures with their conditions to
`benchmarks/results/triton_kernels.csv`.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.measure import conditions, write_csv
from timm_convnextv2.ops.triton import depthwise, layernorm, token_mlp

ARCHITECTURES = (80, 90, 100)
DTYPES = ("float32", "bfloat16", "float16")
KERNELS = {
    layernorm: ("_layer_norm", "_layer_norm_backward"),
    token_mlp: ("_gelu_square_sum", "_gelu_scale", "_gelu_reductions", "_gelu_backward"),
    depthwise: ("_depthwise", "_depthwise_weight_grad"),
}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


class CompileOnly:
    """In place of a kernel: a launch compiles it for a GPU that need not be there, and launches nothing.

    Attributes:
        compiled: What the compiler returned, one for each launch.
    """

    def __init__(self, kernel: triton.JITFunction, arch: int, options: dict | None = None) -> None:
        self.kernel, self.target, self.options = kernel, GPUTarget("cuda", arch, 32), options or {}
        self.compiled: list = []

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps: int, **constants) -> None:
        signature, attributes = {}, {}
        for place, (name, arg) in enumerate(zip(self.kernel.arg_names, args, strict=False)):
            if isinstance(arg, torch.Tensor):
                signature[name] = TYPES[arg.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]  # as torch allocates
            elif arg is None:
                constants[name] = arg
            else:
                signature[name] = "i32"
                if name in ("F", "bias_step") and arg % 16 == 0:  # as a launch specialises them
                    attributes[(place,)] = [["tt.divisibility", 16]]
        signature = {name: signature.get(name, "constexpr") for name in self.kernel.arg_names}
        source = triton.compiler.ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": num_warps, **self.options}
        self.compiled.append(triton.compile(source, target=self.target, options=options))


def launch_all(dtype: torch.dtype, channels: int, kernel_size: int = 7) -> None:
    """One call of every launcher, on the CPU: what runs must be `CompileOnly`."""
    tokens, grad = torch.zeros(2, 2, 63, channels, dtype=dtype)
    bias = torch.zeros(channels, dtype=dtype)
    _, mean, rstd = layernorm.layer_norm(tokens, bias, bias, 1e-6, dtype)
    layernorm.layer_norm_backward(grad, tokens, mean, rstd, bias, True, True)
    h, grad = torch.zeros(2, 2, 63, 4 * channels, dtype=dtype)  # between the Linears
    row, wide_bias = torch.zeros(2, 1, 4 * channels), torch.zeros(4 * channels, dtype=dtype)
    token_mlp.gelu_norms(h, None)
    token_mlp.gelu_scale(h, None, row, wide_bias)
    token_mlp.gelu_reductions(h, None, grad, row, wide_bias, True)
    token_mlp.gelu_backward(h, None, grad, row, row)
    x, grad = torch.zeros(2, 3, 2, 2, channels, dtype=dtype)
    weight = torch.zeros(channels, 1, kernel_size, kernel_size, dtype=dtype)
    index = torch.full((3, kernel_size + 1, kernel_size + 1), 12)
    depthwise.window_conv(x, weight, bias if channels > 1 else None, index)
    depthwise.window_conv_input_grad(grad, weight, index)
    depthwise.window_conv_weight_grad(x, grad, index, kernel_size)


def compile_all(dtype: torch.dtype, arch: int, channels: int = 384, **options) -> Iterator[tuple[str, Any]]:
    """`(name, compiled kernel)` of every kernel, as launched for `channels` channels.

    Args:
        dtype: Of inputs and weights; statistics are float32.
        arch: 80 for sm_80, and so on.
        channels: Of the tokens and of the patches; GELU and GRN have four times as many, as in a block.
        options: For the compiler, such as `maxnreg`.
    """
    with ExitStack() as stack:
        kernels = {}
        for module, names in KERNELS.items():
            for name in names:
                kernels[name] = CompileOnly(getattr(module, name), arch, options)
                stack.enter_context(mock.patch.object(module, name, kernels[name]))
        launch_all(dtype, channels)
    for name, kernel in kernels.items():
        # the depthwise kernel is launched forward, with a bias, and turned round
        for turned, compiled in enumerate(kernel.compiled):
            yield name.lstrip("_") + (" turned" if turned else ""), compiled


def resources(compiled) -> dict[str, Any]:
    """Registers a thread, bytes of stack a thread (spilled registers lie there), bytes of shared memory a block, share
    of a multiprocessor's warps, and how many loads take how many bytes a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}
    return {
        "registers": found["REG"],
        "spilled bytes": found["STACK"] + found["LOCAL"],
        "shared memory bytes": compiled.metadata.shared,
        "occupancy": round(occupancy(found["REG"], compiled.metadata.shared, compiled.metadata.num_warps), 2),
        "bytes x loads": " ".join(f"{size}x{n}" for size, n in load_sizes(compiled.asm["ptx"]).items()),
    }


def occupancy(registers: int, shared: int, warps: int) -> float:
    """Share of the 64 warps of a multiprocessor that its registers and its shared memory leave room for.

    65536 registers, given to a warp 256 at a time, and 164 KiB (the least of sm_80, sm_90 and sm_100), of which a block
    takes 1 KiB more than it asks for (CUDA C++ Programming Guide, compute capabilities).
    """
    blocks = min(64 // warps, 65536 // (-(-registers * 32 // 256) * 256) // warps, 164 * 1024 // (shared + 1024))
    return blocks * warps / 64


def load_sizes(ptx: str) -> dict[int, int]:
    """How many loads from global memory take how many bytes a thread, the widest first."""
    found = Counter(
        int(width or 1) * int(bits) // 8
        for width, bits in re.findall(r"\bld\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[bfus](\d+)", ptx)
    )
    return dict(sorted(found.items(), reverse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES), metavar="SM")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--channels", type=int, nargs="+", default=[40, 384, 2816])
    args = parser.parse_args()
    rows = []
    for arch, dtype, channels in product(args.architectures, args.dtypes, args.channels):
        for name, compiled in compile_all(getattr(torch, dtype), arch, channels):
            case = {"architecture": f"sm_{arch}", "dtype": dtype, "channels": channels, "kernel": name}
            rows.append({**case, **resources(compiled)})
            print(*rows[-1].values(), flush=True)
    about = conditions(torch.device("cpu"), torch.get_num_threads())
    about["hardware"] = "none: compiled ahead of time"
    about["versions"] += f", triton {triton.__version__}"
    about["inputs"] = "7x7 kernel, patches of 2x2 tokens; GELU, GRN: 4 times the channels; statistics are float32"
    print(write_csv("triton_kernels", rows, about))


if __name__ == "__main__":
    main()
