"""First module that the fork server imports. From then on, the server ends with the process that started it."""

import os

from common.forkserver import PARENT, end_with_parent

if PARENT in os.environ:
    end_with_parent(int(os.environ.pop(PARENT)))
