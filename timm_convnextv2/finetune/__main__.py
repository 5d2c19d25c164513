"""python -m timm_convnextv2.finetune; torchrun -m timm_convnextv2.finetune"""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
