"""`python -m unfreeze_sched`, also on the ranks of torchrun."""

import os
import sys
from typing import NoReturn

from unfreeze_sched.cli import main


def leave(code: int) -> NoReturn:
    """End this process.

    A rank's ordinary exit is aborted now and then: DDP keeps the process group, and with it gloo's threads, beyond
    `destroy_process_group`, and a thread that still lets go of a tensor finds no interpreter. All is written by then.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
