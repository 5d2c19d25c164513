"""A segmenter: UPerNet on any backbone of timm; its folder on the disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..files import whole_file
from .backbone import Backbone, create_backbone, open_backbone
from .upernet import FCNHead, UPerHead, resize

__all__ = ["IGNORE_INDEX", "Segmenter", "build_segmenter", "open_segmenter", "export_segmenter"]

IGNORE_INDEX = 255
AUXILIARY_WEIGHT = 0.4  # of mmsegmentation's configurations of UPerNet
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Segmenter(nn.Module):
    """UPerNet; made by `build_segmenter` and `open_segmenter`.

    Args:
        backbone: Its last four maps are read.
        num_classes: Classes, the background (where there is one) included.
        channels: Of the head.
        auxiliary_channels: Of the auxiliary head, which only trains; 0 for none.
        ignore_index: In the targets, of pixels without a class.
        classes: Names of the classes, '0', '1', ... if None.

    Attributes:
        classes: Names of the classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int = 512,
        auxiliary_channels: int = 256,
        ignore_index: int = IGNORE_INDEX,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, expected at least 2 (the background counts).")
        names = [str(i) for i in range(num_classes)] if classes is None else list(classes)
        if len(names) != num_classes:
            raise ValueError(f"There are {len(names)} names for {num_classes} classes.")
        self.backbone, self.classes, self.ignore_index = backbone, names, ignore_index
        self.sizes = dict(channels=channels, auxiliary_channels=auxiliary_channels)
        # a ConvNeXt's maps come without a norm; the official segmentation code adds the same ones
        self.norms = nn.ModuleList(LayerNorm2d(n) for n in backbone.channels)
        self.head = UPerHead(backbone.channels, num_classes, channels)
        self.auxiliary = FCNHead(backbone.channels[-2], num_classes, auxiliary_channels) if auxiliary_channels else None
        for name, values in (("mean", backbone.mean), ("std", backbone.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        """Losses in train mode, logits in eval mode.

        Args:
            images: Float `[B, C, H, W]`, as `data.load_image` gives them and uint8 divided by 255; any H and W. They
                are normalised here.
            targets: Classes of the pixels, int64 `[B, H, W]`; in train mode only.

        Returns:
            In train mode a dict of scalars: `loss_seg`, and `loss_aux` (weighted). In eval mode logits
            `[B, num_classes, H, W]`.

        Raises:
            ValueError: Train mode has no targets, or one image only (batch normalisation needs several).
        """
        if self.training and targets is None:
            raise ValueError("A segmenter in train mode takes images and targets; call eval() for logits.")
        if self.training and len(images) < 2:
            raise ValueError("A batch of one image cannot train a segmenter (batch normalisation); give two or more.")
        height, width = images.shape[-2:]
        stride = self.backbone.strides[-1]
        # whole patches, or a ConvNeXt would leave out what remains at the right and at the bottom
        x = F.pad((images - self.mean) / self.std, (0, -width % stride, 0, -height % stride))
        maps = [norm(features) for norm, features in zip(self.norms, self.backbone(x), strict=True)]

        def full(logits: Tensor) -> Tensor:
            return resize(logits.float(), x.shape[-2:])[..., :height, :width]

        logits = full(self.head(maps))
        if targets is None or not self.training:
            return logits
        losses = {"loss_seg": self._loss(logits, targets)}
        if self.auxiliary is not None:
            losses["loss_aux"] = AUXILIARY_WEIGHT * self._loss(full(self.auxiliary(maps[-2])), targets)
        return losses

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, its mean over the pixels with a class; 0 where none has one."""
        total = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="sum")
        return total / (targets != self.ignore_index).sum().clamp(min=1)


def build_segmenter(
    name: str,
    num_classes: int,
    in_chans: int | None = None,
    *,
    pretrained: bool = True,
    frozen: bool = False,
    channels: int = 512,
    auxiliary_channels: int = 256,
    ignore_index: int = IGNORE_INDEX,
    classes: Sequence[str] | None = None,
    drop_path_rate: float | None = None,
    **kwargs: Any,
) -> Segmenter:
    """UPerNet on a backbone, which comes with its weights; the heads are random.

    Args:
        name: A model of timm, `local-dir:FOLDER` or `hf-hub:USER/NAME`.
        num_classes: Classes, the background (where there is one) included.
        in_chans: Channels of the images; the model's own if None.
        pretrained: Load the backbone's weights; else they are random.
        frozen: Train the heads only.
        channels: Of the head; the paper's 512.
        auxiliary_channels: Of the auxiliary head; 0 for none.
        ignore_index: In the targets, of pixels without a class.
        classes: Names of the classes.
        drop_path_rate: Of the backbone in training.
        kwargs: More of `timm.create_model`.

    Raises:
        ValueError: See `create_backbone` and `Segmenter`.
    """
    backbone = create_backbone(name, pretrained=pretrained, in_chans=in_chans, drop_path_rate=drop_path_rate, **kwargs)
    backbone.requires_grad_(not frozen)
    return Segmenter(
        backbone, num_classes, channels=channels, auxiliary_channels=auxiliary_channels, ignore_index=ignore_index,
        classes=classes,
    )  # fmt: skip


def export_segmenter(model: Segmenter, folder: str | Path, *, metrics: dict[str, Any] | None = None) -> Path:
    """Writes a folder that `open_segmenter` opens: config.json, model.safetensors and README.md.

    Args:
        model: The segmenter.
        folder: Made where it is missing; files of these names are replaced.
        metrics: Plain values, stated in config.json and README.md.

    Returns:
        The folder.

    Raises:
        WriteError: (an OSError) A file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backbone = model.backbone
    config = {
        "task": "segmentation",
        "backbone": backbone.spec,
        "mean": backbone.mean,
        "std": backbone.std,
        "pixels": backbone.pixels,
        "classes": model.classes,
        "ignore_index": model.ignore_index,
        **model.sizes,
        "metrics": metrics or {},
    }
    with whole_file(folder / WEIGHTS) as part:
        save_file({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, part)
    with whole_file(folder / CONFIG) as part:
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with whole_file(folder / "README.md") as part:
        part.write_text(_card(config), encoding="utf-8")
    return folder


def _card(config: dict[str, Any]) -> str:
    rows = "".join(f"| {k} | {v:.4f} |\n" for k, v in config["metrics"].items() if isinstance(v, float))
    return (
        f"# UPerNet on {config['backbone']['architecture']}\n\n"
        f"Classes, from index 0: {', '.join(config['classes'])}.\n\n"
        "```python\nfrom timm_convnextv2.data import load_image\n"
        "from timm_convnextv2.transfer import find_classes, open_segmenter\n\n"
        f'segmenter = open_segmenter("FOLDER")\nimage = load_image("IMAGE", {len(config["mean"])})\n'
        "classes = find_classes(segmenter, image)  # [H, W]\n```\n"
        + (f"\n| metric on the validation images | |\n| --- | --- |\n{rows}" if rows else "")
    )


def open_segmenter(folder: str | Path, device: str | torch.device = "cpu") -> Segmenter:
    """The segmenter of a folder, in eval mode; needs this package, and no network.

    Args:
        folder: Written by `export_segmenter`, such as `model` in the folder of a run, or that of the run.
        device: Where it goes.

    Raises:
        ValueError: There is no such folder, or its files do not fit together.
    """
    folder = Path(folder)
    folder = folder / "model" if not (folder / CONFIG).is_file() and (folder / "model").is_dir() else folder
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"'{folder}' is no folder of a segmenter: it has no {CONFIG}. Give the folder of a run of "
            "`timm-convnextv2 segment train`, after its first evaluation."
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config.get("task") != "segmentation":
            raise ValueError(f"the task is {config.get('task')!r}, expected 'segmentation'")
        backbone = open_backbone(config["backbone"], mean=config["mean"], std=config["std"], pixels=config["pixels"])
        sizes = {key: config[key] for key in ("channels", "auxiliary_channels", "ignore_index", "classes")}
        model = Segmenter(backbone, len(config["classes"]), **sizes)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as e:
        what = " ".join(str(e).split())
        raise ValueError(f"The segmenter in '{folder}' cannot be opened ({type(e).__name__}: {what}).") from e
    return model.eval().to(device)
