"""A train.py in small: timm's options, as far as launcher and recipes need them; main() notes what it got."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

import torch
import yaml
from timm.utils import ParseKwargs

config_parser = parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("-c", "--config", default="")
parser = argparse.ArgumentParser(prog="train.py")
parser.add_argument("data", nargs="?")
for name in ("pretrained", "amp", "sched_on_updates", "warmup_prefix", "model_ema", "model_ema_warmup", "pin_mem"):
    parser.add_argument("--" + name.replace("_", "-"), action="store_true")
for name, kind, default in (
    ("data_dir", str, None),
    ("dataset", str, ""),
    ("train_split", str, "train"),
    ("val_split", str, "validation"),
    ("class_map", str, ""),
    ("input_key", str, None),
    ("target_key", str, None),
    ("input_img_mode", str, None),
    ("model", str, "resnet50"),
    ("pretrained_path", str, None),
    ("initial_checkpoint", str, ""),
    ("resume", str, ""),
    ("num_classes", int, None),
    ("gp", str, None),
    ("in_chans", int, None),
    ("img_size", int, None),
    ("crop_pct", float, None),
    ("interpolation", str, ""),
    ("drop_path", float, None),
    ("head_init_scale", float, None),
    ("device", str, "cuda"),
    ("amp_dtype", str, "float16"),
    ("batch_size", int, 128),
    ("grad_accum_steps", int, 1),
    ("opt", str, "sgd"),
    ("opt_eps", float, None),
    ("weight_decay", float, 2e-5),
    ("clip_grad", float, None),
    ("layer_decay", float, None),
    ("layer_decay_min_scale", float, 0),
    ("layer_decay_no_opt_scale", float, None),
    ("lr", float, None),
    ("lr_base", float, 0.1),
    ("lr_base_size", int, 256),
    ("lr_base_scale", str, ""),
    ("sched", str, "cosine"),
    ("min_lr", float, 0),
    ("warmup_lr", float, 1e-5),
    ("warmup_epochs", int, 5),
    ("epochs", int, 300),
    ("cooldown_epochs", int, 0),
    ("aa", str, None),
    ("color_jitter", float, 0.4),
    ("train_interpolation", str, "random"),
    ("reprob", float, 0.0),
    ("remode", str, "pixel"),
    ("mixup", float, 0.0),
    ("cutmix", float, 0.0),
    ("smoothing", float, 0.1),
    ("model_ema_decay", float, 0.9998),
    ("hflip", float, 0.5),
    ("workers", int, 4),
    ("checkpoint_hist", int, 10),
    ("log_interval", int, 50),
    ("seed", int, 42),
    ("output", str, ""),
    ("experiment", str, ""),
):
    parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default)
parser.add_argument("--opt-betas", type=float, nargs="+")
parser.add_argument("--scale", type=float, nargs="+", default=[0.08, 1.0])
parser.add_argument("--ratio", type=float, nargs="+", default=[0.75, 1.33])
parser.add_argument("--input-size", type=int, nargs=3)
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
parser.add_argument("--device-modules", nargs="+")


class ClassificationTask:
    def prepare_distributed(self, device_ids=None, **kwargs):
        return device_ids, kwargs


for name in ("--mean", "--std"):
    parser.add_argument(name, type=float, nargs="+")


def main():
    config, remaining = config_parser.parse_known_args()
    if config.config:
        with open(config.config) as f:
            parser.set_defaults(**yaml.safe_load(f))
    args = parser.parse_args(remaining)
    for module in args.device_modules or []:
        importlib.import_module(module)
    if args.seed == 13:
        sys.exit(7)
    if args.seed == 14:
        raise KeyboardInterrupt
    if args.seed == 15:
        raise ValueError("from inside")
    if os.environ.get("RANK", "0") == "0":
        folder = Path(args.output) / args.experiment
        folder.mkdir(parents=True, exist_ok=True)
        seen = dict(args=vars(args), argv=sys.argv, config=Path(config.config).name)
        (folder / "seen.json").write_text(json.dumps(seen))
        if args.seed != 16:
            state = {"epoch": 2, "state_dict": {"x": torch.zeros(3)}, "optimizer": {}, "args": args}
            torch.save(state, folder / "last.pth.tar")
        if args.seed == 17:  # the disk is full in the middle of the next checkpoint
            (folder / "tmp.pth.tar").write_bytes((folder / "last.pth.tar").read_bytes()[:-100])
            raise RuntimeError("PytorchStreamWriter failed writing file data/0")


if __name__ == "__main__":
    main()
