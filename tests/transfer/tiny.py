"""Small models and short runs for the tests of detection and segmentation."""

from timm_convnextv2.commands.main import main
from timm_convnextv2.transfer import build_detector, create_backbone

SIZES = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20))
# so few proposals and detections that a step takes a tenth of a second
FAST = dict(
    rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20, box_batch_size_per_image=16, box_detections_per_img=2
)  # fmt: skip
# words of a command line
BACKBONE = "--model convnextv2_atto --from-scratch --model-kwargs depths=(1,1,1,1) dims=(8,12,16,20)".split()
DETECTOR = "--out-channels 8 --warmup-updates 2 --detector-kwargs".split() + [f"{k}={v}" for k, v in FAST.items()]
SEGMENTER = "--channels 8 --auxiliary-channels 4".split()
TASKS = {"detect": DETECTOR, "segment": SEGMENTER}
SHORT = "--img-size 32 --device cpu --epochs 2 -b 4 -j 0".split()


def tiny_detector(num_classes=8, *, in_chans=3, **options):
    backbone = create_backbone("convnextv2_atto", pretrained=False, in_chans=in_chans, **SIZES)
    return build_detector(backbone, num_classes, **{"img_size": 64, "out_channels": 8, **FAST, **options})


def train(task, data, output, *more, status=0, start=BACKBONE):
    """Runs `detect train` or `segment train` on `data` and returns the folder of the run."""
    places = ["--data-dir", data, "--output", output, "--experiment", "run"]
    words = [task, "train", *start, *TASKS[task], *SHORT, *places, *more]
    assert main([str(word) for word in words]) == status
    return output / "run"
