"""A validate.py (and inference.py) in miniature: the options that the launcher needs; main() notes what it got."""

import argparse
import json

from timm.data import create_dataset, create_loader
from timm.utils import ParseKwargs

parser = argparse.ArgumentParser(prog="validate.py")
parser.add_argument("data", nargs="?")
for name, kind, default in (
    ("data_dir", str, None), ("dataset", str, ""), ("split", str, "validation"), ("class_map", str, ""),
    ("input_key", str, None), ("input_img_mode", str, None), ("valid_labels", str, ""), ("model", str, "dpn92"),
    ("checkpoint", str, ""), ("num_classes", int, None), ("in_chans", int, None), ("img_size", int, None),
    ("crop_mode", str, None), ("device", str, "cuda"),
):  # fmt: skip
    parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default)
parser.add_argument("--amp", action="store_true")
parser.add_argument("-j", "--workers", type=int, default=4)
parser.add_argument("--input-size", type=int, nargs=3)
parser.add_argument("--mean", type=float, nargs="+")
parser.add_argument("--std", type=float, nargs="+")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)


def main():
    args = parser.parse_args()
    data = create_dataset(args.dataset, root=args.data or args.data_dir, split=args.split, class_map=args.class_map)
    size = (args.in_chans or 3, 32, 32)
    scale = dict(mean=args.mean or (0.5,), std=args.std or (0.5,))
    loader = create_loader(data, size, 4, use_prefetcher=False, num_workers=0, persistent_workers=False, **scale)
    batches = [batch.tolist() for _, batch in loader]
    seen = {"targets": sum(batches, []), "batches": list(map(len, batches))}
    with open("seen.json", "w") as file:
        json.dump({"args": vars(args), **seen, "filenames": loader.dataset.filenames(basename=True)}, file)


if __name__ == "__main__":
    main()
