"""`python -m timm_convnextv2.embed`, also under torchrun."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
