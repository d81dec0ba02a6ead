"""What must have happened before commands of pages: ``python -m tests.docs.scenes NAME …``."""

from __future__ import annotations

import os
import sys


def killed(*arguments: str):
    """Run a command of moecc that dies once it has recorded a few tensors."""
    from moecc.cli.main import main
    from moecc.formats.files import Disk, injected

    class Dying(Disk):
        left = 4

        def append(self, descriptor, data):
            super().append(descriptor, data)
            self.left -= 1
            if not self.left:
                os._exit(0)

    with injected(Dying()):
        main(list(arguments))
    raise AssertionError("it ended by itself")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
