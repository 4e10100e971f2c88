"""``python -m unveil`` and ``torchrun -m unveil``."""

import sys

from unveil.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
