"""Settings that must stand before anything else is imported, and fixtures that several modules share."""

import contextlib
import multiprocessing
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


@pytest.fixture
def root(tmp_path):
    """A folder data set of noise, with rgb, event and labels of five classes."""
    from data_files import folder_dataset

    return folder_dataset(tmp_path / "d")


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """The test runs in its `tmp_path`, and names its files from there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data_py(monkeypatch, capsys):
    """A function that runs data.py with these options -> exit status, what was printed."""
    import data

    def run(options):
        monkeypatch.setattr("sys.argv", ["data.py", *options.split()])
        return data.main(), capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A run folder with teacher.pt and student.pt of chance, for the painted scenes. Read it, and change nothing."""
    from models import MODALITIES, about_scenes, with_wide_weights

    from engine.checkpoint import save_model
    from model import build_model

    folder, meta = tmp_path_factory.mktemp("untrained"), about_scenes()
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        model = build_model("segformer_tiny", len(meta["classes"]), MODALITIES)
        save_model(folder / f"{name}.pt", with_wide_weights(model), meta)
    return folder


@contextlib.contextmanager
def alone():
    """One thread, as in runs that are processes of their own (other threads, other sums); signals return at its end."""
    from engine.loop import EXIT_STATUS

    threads, handlers = torch.get_num_threads(), {number: signal.getsignal(number) for number in EXIT_STATUS}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def handlers():
    """For tests that train, and send themselves signals: they leave neither handlers nor loader workers behind."""
    with alone():
        yield
    assert multiprocessing.active_children() == []  # a loader worker left behind would keep a script from ending


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Run folders of both stages that nothing interrupted. Read them, and change nothing."""
    from small_runs import start, train

    folder = tmp_path_factory.mktemp("whole")
    with alone():
        for stage in (1, 2):
            assert train(stage, start(stage, folder, folder / str(stage))) == 0
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the finished stage 1, for a test that breaks something in it."""
    return shutil.copytree(whole / "1", tmp_path / "1")
