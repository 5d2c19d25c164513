"""What a detector finds, as COCO's JSON, its average precision, and images of it beside the truth."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ...data import Pixels
from ...data.formats.pixels import PLAIN
from ...files import whole_file
from ...report.images import displayable
from ...runs.world import Seat
from .coco import Coco, DetectionSamples, collate, rle_codec

# the twelve numbers of COCO, in its order
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
METRICS += ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")

Result = dict[str, Any]


@torch.no_grad()
def find_objects(
    detector: nn.Module,
    coco: Coco,
    *,
    device: torch.device,
    in_chans: int,
    pixels: Pixels = PLAIN,
    batch_size: int = 1,
    workers: int = 0,
    amp_dtype: torch.dtype | None = None,
    seat: Any = Seat(0, 1, True),  # noqa: B008  an immutable value
    progress: Callable[[int], None] | None = None,
    sizes: dict[int, tuple[int, int]] | None = None,
) -> list[Result]:
    """What a detector finds in images, as COCO's results: `image_id`, `category_id`, `bbox`, `score`, `segmentation`.

    Args:
        detector: From `build_detector`, on the device; it is left in eval mode.
        coco: The images; their annotations are not looked at.
        device: Of the detector.
        in_chans: Channels of the images.
        pixels: How stored values become pixels, see `Pixels`.
        batch_size: Images at a time.
        workers: Processes that decode images.
        amp_dtype: Type of mixed precision, None for float32.
        seat: The process of several that share the images (`World`).
        progress: Told the number of images as they are done.
        sizes: Gets height and width of each image, by its id.

    Returns:
        The results of this process's share.
    """
    detector.eval()
    blank = coco._replace(images=[image._replace(annotations=[]) for image in coco.images[seat.rank :: seat.size]])
    if not blank.images:
        return []
    samples = DetectionSamples(blank, masks=False, in_chans=in_chans, pixels=pixels)
    keys: Any = [(0, i) for i in range(len(samples))]
    loader = DataLoader(
        samples, batch_size, sampler=keys, num_workers=workers, collate_fn=collate, generator=torch.Generator()
    )
    results: list[Result] = []
    done = 0
    for images, _ in loader:
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            found = detector([image.to(device) for image in images])
        for image, one in zip(images, found, strict=True):
            if sizes is not None:
                sizes[blank.images[done].id] = (image.shape[-2], image.shape[-1])
            results += _results(one, blank.images[done].id, coco.category_ids)
            done += 1
        if progress is not None:
            progress(len(images))
    return results


def _results(found: dict[str, Tensor], image_id: int, category_ids: list[int]) -> list[Result]:
    boxes = found["boxes"].float().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    results: list[Result] = [
        dict(image_id=image_id, category_id=category_ids[label - 1], bbox=[round(v, 2) for v in box], score=score)
        for box, label, score in zip(
            boxes.tolist(), found["labels"].tolist(), found["scores"].float().tolist(), strict=True
        )
    ]
    if "masks" in found and results:
        codec = rle_codec()
        masks = (found["masks"][:, 0] >= 0.5).cpu().numpy().astype(np.uint8)
        for result, mask in zip(results, masks, strict=True):
            code = codec.encode(np.asfortranarray(mask))
            counts = code["counts"]
            size = [int(n) for n in code["size"]]
            result["segmentation"] = dict(size=size, counts=counts.decode() if isinstance(counts, bytes) else counts)
    return results


def average_precision(coco: Coco, results: list[Result], *, masks: bool) -> dict[str, float]:
    """The twelve numbers of COCO, for boxes as `box_*` and for masks as `mask_*`, in 0..1; -1 where nothing counts.

    Computed by faster-coco-eval.

    Args:
        coco: The truth.
        results: See `find_objects`; of all images of `coco`.
        masks: Also those of masks; the truth and the results have them.

    Raises:
        ValueError: faster-coco-eval is missing.
    """
    rle_codec()  # says what is missing
    from faster_coco_eval import COCO, COCOeval_faster

    kinds: Any = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}

    truth = COCO(coco.content())
    found: dict[str, float] = {}
    for name, kind in kinds.items():
        # loadRes takes areas and boxes from the masks where there are any
        own = [{k: v for k, v in r.items() if kind == "segm" or k != "segmentation"} for r in results]
        evaluator: Any = COCOeval_faster(truth, truth.loadRes(own), kind)
        evaluator.run()
        found |= {f"{name}_{metric}": float(v) for metric, v in zip(METRICS, evaluator.stats[:12], strict=True)}
    return found


def evaluate_detector(
    detector: nn.Module, coco: Coco, *, masks: bool, world: Any = None, **how: Any
) -> tuple[dict[str, float], list[Result]]:
    """Average precision on images, shared among the processes; each one gets all numbers and results.

    Args:
        detector: From `build_detector`.
        coco: The images with the truth.
        masks: Also of masks.
        world: The processes; None for this one alone.
        how: Of `find_objects`.
    """
    own = find_objects(detector, coco, seat=world or Seat(0, 1, True), **how)
    results = own if world is None else world.gather(own)
    return average_precision(coco, results, masks=masks), results


def save_found(
    path: str | Path,
    coco: Coco,
    results: Sequence[Result],
    *,
    image_ids: Sequence[int],
    in_chans: int,
    masks: bool,
    pixels: Pixels = PLAIN,
    min_score: float = 0.5,
) -> None:
    """Draws the truth (left) and what was found (right) of some images as one PNG.

    Args:
        path: Of the PNG.
        coco: The images with the truth.
        results: Of a detector.
        image_ids: Which images, a row each.
        in_chans: Channels of the images; the first three are shown, or the first as grey.
        masks: Whether the results and the truth have masks.
        pixels: How stored values become pixels, see `Pixels`.
        min_score: What is less certain is left out.

    Raises:
        WriteError: (an OSError) It cannot be written.
    """
    from matplotlib.figure import Figure

    samples = DetectionSamples(coco, masks=masks, in_chans=in_chans, pixels=pixels)
    index = {image.id: i for i, image in enumerate(coco.images)}
    figure = Figure(figsize=(8, 4 * len(image_ids)), dpi=100, layout="constrained")
    axes = figure.subplots(len(image_ids), 2, squeeze=False)
    for row, image_id in zip(axes, image_ids, strict=True):
        image, truth = samples[0, index[image_id]]
        sure = [r for r in results if r["image_id"] == image_id and r["score"] >= min_score]
        shown = _as_rgb(image)
        for axis, title, target in (
            (row[0], coco.images[index[image_id]].name, truth),
            (row[1], f"found, score >= {min_score:g}", _target(sure, coco, masks)),
        ):
            axis.imshow(_drawn(shown, target, coco.classes).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_title(title, fontsize=8, parse_math=False)
            axis.axis("off")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def _as_rgb(pixels: Tensor) -> Tensor:
    """Float `[C, H, W]` as uint8 `[3, H, W]`; floats that are not in 0..1 are stretched."""
    zero, one = torch.zeros(len(pixels)), torch.ones(len(pixels))
    shown = displayable(pixels[None], zero, one)[0].permute(2, 0, 1)
    if shown.min() < 0 or shown.max() > 1:
        shown = (shown - shown.min()) / (shown.max() - shown.min()).clamp(min=1e-9)
    return (shown * 255).round().to(torch.uint8)


def _target(results: Sequence[Result], coco: Coco, masks: bool) -> dict[str, Any]:
    boxes = torch.tensor([r["bbox"] for r in results]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    label = {category: i for i, category in enumerate(coco.category_ids, 1)}
    target: dict[str, Any] = dict(
        boxes=boxes,
        labels=torch.tensor([label[r["category_id"]] for r in results]),
        scores=[r["score"] for r in results],
    )
    if masks and results:
        target["masks"] = torch.from_numpy(np.stack([rle_codec().decode(r["segmentation"]) for r in results]))
    return target


def _drawn(image: Tensor, target: dict[str, Any], classes: list[str]) -> Tensor:
    """The image with boxes, names and masks; small images are enlarged, so that the names can be read."""
    factor = max(1, 400 // max(image.shape[-2:]))
    image = image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    labels = target["labels"].tolist()
    if not labels:
        return image
    colours = [_COLOURS[(label - 1) % len(_COLOURS)] for label in labels]
    names = [classes[label - 1] for label in labels]
    if "scores" in target:
        names = [f"{name} {score:.2f}" for name, score in zip(names, target["scores"], strict=True)]
    if "masks" in target:
        masks = target["masks"].bool().repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        image = draw_segmentation_masks(image, masks, alpha=0.4, colors=colours)
    return draw_bounding_boxes(image, target["boxes"] * factor, names, colors=colours, width=2)


_COLOURS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#000075"]
