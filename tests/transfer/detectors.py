"""Small detectors and data for the tests."""

from timm_convnextv2.transfer import build_detector, create_backbone

TINY = dict(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20))
# so few proposals and detections that a step takes a tenth of a second
FAST = dict(
    rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20, box_batch_size_per_image=16, box_detections_per_img=2
)  # fmt: skip


def tiny_detector(num_classes=8, *, in_chans=3, **options):
    backbone = create_backbone("convnextv2_atto", pretrained=False, in_chans=in_chans, **TINY)
    return build_detector(backbone, num_classes, **{"img_size": 64, "out_channels": 8, **FAST, **options})
