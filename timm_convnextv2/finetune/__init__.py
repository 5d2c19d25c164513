"""Finetuning with timm's own train.py and a recipe: `timm-convnextv2 finetune`.

`launcher` is the command and reads like a page; `train_script` finds and verifies train.py,
`preflight` checks model and data, `start` what weights are started from, `plan` resolves options and works out batch,
learning rate and length.
"""
