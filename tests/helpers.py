"""What several tests share."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "train_scripts"
RECIPES = ROOT / "timm_convnextv2" / "finetune" / "recipes"
