"""These tests run kernels in Triton's interpreter, on CPU tensors.

The interpreter is chosen before Triton is first imported, so they live in a process of their
own, started by ``test_interpreter_suite.py``; collected in any other, they are left out.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
