"""Settings that must stand before anything else is imported."""

import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be known before triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
