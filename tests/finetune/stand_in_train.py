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
TEXTS = dict(
    data_dir=None, dataset="", train_split="train", val_split="validation", class_map="", input_key=None,
    target_key=None, input_img_mode=None, model="resnet50", pretrained_path=None, initial_checkpoint="", resume="",
    gp=None, interpolation="", device="cuda", amp_dtype="float16", opt="sgd", lr_base_scale="", sched="cosine", aa=None,
    train_interpolation="random", remode="pixel", output="", experiment="",
)  # fmt: skip
COUNTS = dict(
    num_classes=None, in_chans=None, img_size=None, batch_size=128, grad_accum_steps=1, lr_base_size=256,
    warmup_epochs=5, epochs=300, cooldown_epochs=0, workers=4, checkpoint_hist=10, log_interval=50, seed=42,
    val_interval=1,
)  # fmt: skip
NUMBERS = dict(
    crop_pct=None, drop_path=None, head_init_scale=None, opt_eps=None, weight_decay=2e-5, clip_grad=None,
    layer_decay=None, layer_decay_min_scale=0, layer_decay_no_opt_scale=None, lr=None, lr_base=0.1, min_lr=0,
    warmup_lr=1e-5, color_jitter=0.4, reprob=0.0, mixup=0.0, cutmix=0.0, smoothing=0.1, model_ema_decay=0.9998,
    hflip=0.5,
)  # fmt: skip
for kind, options in ((str, TEXTS), (int, COUNTS), (float, NUMBERS)):
    for name, default in options.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default)
parser.add_argument("--opt-betas", type=float, nargs="+")
parser.add_argument("--scale", type=float, nargs="+", default=[0.08, 1.0])
parser.add_argument("--ratio", type=float, nargs="+", default=[0.75, 1.33])
parser.add_argument("--input-size", type=int, nargs=3)
parser.add_argument("--mean", type=float, nargs="+")
parser.add_argument("--std", type=float, nargs="+")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
parser.add_argument("--device-modules", nargs="+")


class ClassificationTask:
    def prepare_distributed(self, device_ids=None, **kwargs):
        return device_ids, kwargs


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
