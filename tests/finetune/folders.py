"""Folders of images, one sub-folder a class, and of a classifier."""

import timm
from PIL import Image
from timm.models import save_for_hf

CLASSES = ("a", "b", "c")


def write_images(root, classes=CLASSES, n=8, size=32):
    """A split: a folder of `n` PNGs a class, each class of a colour of its own."""
    for i, label in enumerate(classes):
        (root / label).mkdir(parents=True)
        for j in range(n):
            colour = [(40 + 3 * (root.name != "train") + 7 * j + 60 * (i == channel)) % 256 for channel in range(3)]
            Image.new("RGB", (size, size), tuple(colour)).save(root / label / f"{j}.png")


def write_model(folder, in_chans=3):
    """A timm folder of a classifier of a, b and c."""
    shape = dict(patch_size=1, depths=[1, 1, 1, 1], dims=[8, 8, 8, 8])
    model = timm.create_model("convnextv2_atto", num_classes=3, in_chans=in_chans, **shape)
    cfg = dict(input_size=(in_chans, 32, 32), num_classes=3, label_names=["a", "b", "c"], license="mit")
    args = {**shape, "in_chans": in_chans}
    save_for_hf(model, folder, model_config=dict(pretrained_cfg=cfg), model_args=args, safe_serialization=True)
    return folder
