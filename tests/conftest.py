"""Settings that must stand before anything else is imported."""

import os
import signal

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be known before triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell ignores Ctrl-C for what it starts in the background, and nohup a closed terminal.
# The tests send themselves both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
