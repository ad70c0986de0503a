"""`python -m unfreeze_sched`, also on the ranks of torchrun."""

import os
import sys
from typing import NoReturn

from unfreeze_sched.cli import main
from unfreeze_sched.parallel import is_launched_alone


def leave(code: int) -> NoReturn:
    """End a rank that has written everything.

    Its ordinary exit is aborted now and then: DDP keeps the process group, and with it gloo's threads, beyond
    `destroy_process_group`, and a thread that still lets go of a tensor finds no interpreter.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    code = main()
    if not is_launched_alone():
        leave(code)
    sys.exit(code)
