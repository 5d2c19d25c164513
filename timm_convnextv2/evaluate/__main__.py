"""`python -m timm_convnextv2.evaluate`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
