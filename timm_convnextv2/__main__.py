"""`python -m timm_convnextv2 COMMAND`, the same as `timm-convnextv2 COMMAND`."""

import sys

from .commands.main import main

if __name__ == "__main__":
    sys.exit(main())
