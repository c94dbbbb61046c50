"""Settings that must stand before anything else is imported."""

import os
import shutil
import signal

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be known before triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell ignores Ctrl-C for what it starts in the background, and nohup a closed terminal.
# The tests send themselves both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Folder with 12 synthetic scenes (6 train, 3 val, 3 test) in each of the layouts. Read it, and change nothing."""
    from datasets import export, layouts

    root = tmp_path_factory.mktemp("exported")
    for layout in layouts.LAYOUTS:
        export.export(root / layout, layout, count=12, size=64, seed=3)
    return root


@pytest.fixture
def mini(exported, tmp_path):
    """A function that copies one layout, for a test that breaks something in it."""
    return lambda layout: shutil.copytree(exported / layout, tmp_path / layout)
