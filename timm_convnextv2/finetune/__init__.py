"""Finetuning, validation and prediction with timm's own scripts, fed with this package's images.

Finetuning: `plan` checks everything and derives train.py's options, `launch` runs train.py and exports the result.
`evaluation` does the same for validate.py and inference.py. Below them: `scripts` finds and imports timm's scripts,
`options` resolves their options, `folders` and `images` give them data, `model` and `checkpoints` check the files that
they would load. Recipes are in `recipes/`.
"""
