"""`timm-convnextv2 predict`: classifies images with timm's own inference.py."""

from .validate import evaluate


def main(argv: list[str] | None = None) -> int:
    return evaluate("predict", argv)
