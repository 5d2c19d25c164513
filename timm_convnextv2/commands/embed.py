"""The options of `timm-convnextv2 embed`."""

import time

import torch

from ..console import PROGRAM, CommandParser, refused, say
from ..features.embed import embed
from .images import add_place_options


# fmt: off
def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(prog=f"{PROGRAM} embed", description="Write one row of features for each image.")
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="a model of timm, local-dir:FOLDER or hf-hub:USER/NAME")
    add_place_options(add)
    add("--dataset", default="", metavar="NAME",
        help="hfds/NAME, torch/NAME, wds/, hfids/NAME, tfds/NAME, or embedded; a folder of images if left out")
    add("--split", default="train", metavar="NAME", help="split of --dataset; of wds/ the names of the shards")
    add("--input-key", metavar="NAME", help="field of --dataset that holds the image")
    add("--dataset-download", action="store_true", help="let torchvision or the reader download --dataset")
    add("--nodata", type=float, metavar="V",
        help="stored value of pixels without data, which get the others' mean (default: the model's; nan: none)")
    add("--num-samples", type=int, metavar="N",
        help="images of --dataset embedded; of a stream those that there are, where it does not say")
    add("--output", required=True, metavar="FILE", help="file to write, .npy, .safetensors or .parquet")
    add("-b", "--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    add("--img-size", type=int, metavar="N", help="side of the square crops in pixels (default: the model's)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("-j", "--workers", type=int, default=4, metavar="N",
        help="processes (of a stream: threads) that decode images; 0: this one (default: 4)")
    add("--amp", action="store_true", help="compute in bfloat16; rows stay float32")
    add("--max-bad-images", type=float, default=0.01, metavar="SHARE",
        help="stop when a larger share cannot be decoded (default: 0.01)")
    add("--resume", action="store_true", help="resume a run that was stopped, from OUTPUT.parts")
    add("--overwrite", action="store_true", help="replace --output, and the parts of a run that was stopped")
    return parser
# fmt: on


def main(argv: list[str] | None = None) -> int:
    """The command; whatever is wrong is one message and exit status 2."""
    try:
        options = vars(build_parser().parse_args(argv))
        options["download"] = options.pop("dataset_download")
        output, start = options["output"], time.perf_counter()
        rows, skipped = embed(**options, progress=True)
    except (ValueError, RuntimeError, OSError) as e:
        return refused("embed", e)
    except KeyboardInterrupt:
        say(f"Stopped. The finished rows are in '{output}.parts': resume with --resume.", error=True)
        return 130
    for reason in skipped.values():
        say(f"skipped: {reason}", error=True)
    rate = rows / (time.perf_counter() - start)
    say(f"{output}: {rows} rows; {len(skipped)} images skipped; {rate:.1f} images/s")
    return 0
