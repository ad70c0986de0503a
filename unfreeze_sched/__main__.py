"""`python -m unfreeze_sched`."""

import sys

from unfreeze_sched.cli import main

if __name__ == "__main__":
    sys.exit(main())
