"""Folders of runs that nobody has trained, with everything that a report can show."""

import csv
import json
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from timm_convnextv2.commands.pretrain import parse_options
from timm_convnextv2.config import flat
from timm_convnextv2.runs.folder import head_comment

EVIL = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
COMMAND = f"timm-convnextv2 pretrain --data-dir '/data/{EVIL}'\n--seed 1"


def plant(folder: Path, epochs: int = 6, *, full: bool = True, evil: str = EVIL, options: tuple[str, ...] = ()) -> Path:
    """The folder of a run; where not `full`, what one without measures has."""
    folder.mkdir(parents=True)
    config, _ = parse_options(["--data-dir", f"/data/{evil}", "--epochs", str(epochs), "--device", "cpu", *options])
    text = head_comment("timm_convnextv2 0.2.0", f"{COMMAND}{evil}") + yaml.safe_dump(flat(config))
    (folder / "args.yaml").write_text(text)
    rows = [
        {"epoch": e, "train_loss": 1 / (e + 2), "train_images_per_s": 31.5, "train_data_wait": 0.0625,
         "train_seconds": 60.0, "train_memory_gib": 1.25 + e, "train_bad_images": 1, "lr": 1e-3 / (e + 1)}
        for e in range(epochs)
    ]  # fmt: skip
    if full:
        for e, row in enumerate(rows):
            measured = e in (0, 2, epochs - 1)
            row |= {"eval_loss": 0.6 - 0.01 * e, "eval_distance": 0.4, "eval_dead": 0.015}
            row |= {"eval_knn": 50.0 + e if measured else "", "eval_ridge": 40.0 + e if measured else ""}
            row |= {"eval_rank": 20.0 + e if measured else ""}
    table(folder / "summary.csv", rows)
    draw(folder / "reconstructions", range(1, epochs + 1))
    (folder / "encoder").mkdir()
    (folder / "encoder" / "config.json").write_text("{}")
    progress = {"epoch": epochs, "num_images": 1234, "bad_steps": 2, "bad_images": {evil: f"{evil}.png: truncated"}}
    torch.save({"progress": progress, "state_dict": {"x": torch.zeros(9)}}, folder / "last.pth.tar")
    if full:
        plant_measures(folder, epochs)
    return folder


def plant_measures(folder: Path, epochs: int) -> None:
    """Files of the collapse, of the probe and of neighbours."""
    rows = [
        {"epoch": e, "block": f"stages.0.blocks.{b}", "depth": b / 3, "distance": 0.5 - 0.02 * e * b, "dead": 0.1 * b}
        for e in range(1, epochs + 1)
        for b in range(4)
    ]
    table(folder / "collapse.csv", rows)
    probe = {"data_dir": "/labelled", "classes": ["a", "b"], "train": 80, "test": 20, "k": 20}
    probe["baselines"] = {"random": {"knn": 49.0, "ridge": 52.0, "rank": 9.0}, "pixels": {"knn": 60.0, "ridge": 33.0}}
    against = {"random": {"knn": "+6.0 (-4.0 to +16.0): no difference shown"}}
    probe["latest"] = {"epoch": epochs, "against": against}
    (folder / "probe.json").write_text(json.dumps(probe))
    draw(folder / "neighbours", {1, (epochs + 1) // 2, epochs})


def table(path: Path, rows: list[dict]) -> None:
    """A CSV."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def draw(folder: Path, epochs) -> None:
    """Images of noise, another for each epoch."""
    folder.mkdir()
    for epoch in epochs:
        pixels = np.random.default_rng(epoch).integers(0, 255, (60, 80 + epoch, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"epoch-{epoch:04d}.png")
