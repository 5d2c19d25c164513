"""`python -m timm_convnextv2.pretrain`."""

import sys

from .loop import main

if __name__ == "__main__":
    sys.exit(main())
