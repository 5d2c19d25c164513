"""The command without its drawings, which take longer than training here."""

import sys

from timm_convnextv2.commands.pretrain import main
from timm_convnextv2.pretrain import loop, measures

loop.save_loss_curve = measures.save_reconstructions = lambda *_, **__: None

if __name__ == "__main__":
    sys.exit(main())
