"""Which files belong to a run: a model of another run, phase or start is never taken for its own."""

import shutil

import pytest
from small_runs import change, during, refused, said, start, stop, train

import evaluate
from engine import runs

pytestmark = pytest.mark.usefixtures("handlers")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A finished stage 1 with another seed. Read it, and change nothing."""
    folder = tmp_path_factory.mktemp("other") / "1"
    assert train(1, start(1, folder.parent, folder, "--seed", "7")) == 0
    return folder


@pytest.fixture
def stopped(whole, tmp_path):
    """A function that stops a stage 1 at a step of a phase, after last.pt -> its folder."""

    def begin(phase, step, *more):
        with during(phase, step, stop):
            assert train(1, start(1, whole, tmp_path / "stopped", *more)) == 143
        return tmp_path / "stopped"

    return begin


def test_a_best_model_that_is_missing_is_said_and_the_next_best_is_kept(stopped, capfd):
    folder = stopped("robust", 2, "--eval-every", "0.5")  # validated after each step
    (folder / "robust.pt").unlink()
    assert train(1, ["--resume", str(folder)]) == 0
    assert "robust.pt, the best model so far, is missing" in capfd.readouterr().out and (folder / "robust.pt").exists()


@pytest.mark.parametrize("name, phase", [("teacher.pt", "robust"), ("robust.pt", "finished")])
def test_a_run_whose_model_is_gone_for_good_is_not_called_complete(stopped, run, capfd, name, phase):
    folder = stopped("robust", 1) if phase == "robust" else run
    (folder / name).unlink()
    assert name in refused(capfd, 1, ["--resume", str(folder)])


@pytest.mark.parametrize(
    "name, what, told",
    [
        ("teacher.pt", "of another run", "another teacher"),
        ("teacher.pt", "damaged", "teacher.pt is corrupt"),
        ("teacher.pt", "the robust model", "another teacher"),
        ("robust.pt", "of another run", "robust.pt is not of the run"),
        ("robust.pt", "damaged", "robust.pt is corrupt"),
    ],
)
def test_a_model_that_is_not_the_runs_own_is_refused_and_kept(stopped, other, capfd, name, what, told):
    folder = stopped("robust", 2, "--eval-every", "0.5")
    source = folder / "robust.pt" if what == "the robust model" else other / name
    content = source.read_bytes()[: 1000 if what == "damaged" else None]
    (folder / name).write_bytes(content)
    assert told in refused(capfd, 1, ["--resume", str(folder)])
    assert (folder / name).read_bytes() == content


@pytest.mark.parametrize("option", ["--teacher", "--pretrained"])
def test_a_file_that_the_run_did_not_start_with_is_refused_on_resume(stopped, other, capfd, option):
    argv = ["--resume", str(stopped("robust", 1)), option, str(other / "teacher.pt")]
    capfd.readouterr()
    assert train(1, argv) == 2 and option in capfd.readouterr().err


def test_a_checkpoint_of_another_phase_is_not_continued(stopped, capfd):
    folder = stopped("teacher", 1)
    change(folder / "last.pt", phase="student")
    assert "phase student" in refused(capfd, 1, ["--resume", str(folder)])


def test_other_start_weights_than_those_of_the_start_are_refused(stopped, other, whole, capfd):
    weights = shutil.copy(whole / "1/teacher.pt", other.parent / "start.pt")
    folder = stopped("robust", 1, "--pretrained", str(weights), "--robust-from", "start")
    argv = ["--resume", str(folder), "--pretrained", str(other / "teacher.pt")]
    assert "not the file that this run started from" in refused(capfd, 1, argv)


def test_a_robust_model_is_paired_with_its_own_teacher_alone(whole, other, tmp_path, capfd):
    folder = shutil.copytree(whole / "1", tmp_path / "mixed")
    shutil.copy(other / "teacher.pt", folder)
    assert "teacher" in refused(capfd, 2, start(2, tmp_path, tmp_path / "2", "--stage1", str(folder)))
    assert runs.guarded(evaluate.main, evaluate.options([str(folder), "--limit", "2", "--device", "cpu"])) == 2
    assert "robust.pt was made with another teacher" in said(capfd)
    pair = [*start(2, whole, tmp_path / "3")[:-4], "--out", str(tmp_path / "3"), "--max-minutes", "1e-6"]
    twice = ["--teacher", f"{whole}/1/teacher.pt", "--robust", f"{whole}/1/teacher.pt"]
    assert "swap" in refused(capfd, 2, [*pair, *twice])
    assert train(2, [*pair, "--teacher", f"{other}/teacher.pt", "--robust", f"{whole}/1/robust.pt"]) == 0  # on purpose
    assert "robust.pt was distilled from another teacher" in capfd.readouterr().out


def test_a_folder_with_the_previous_checkpoint_alone_is_of_an_earlier_run(whole, tmp_path, capfd):
    shutil.copy(whole / "1/last.previous.pt", tmp_path)
    assert train(1, start(1, whole, tmp_path)) == 2 and f"--resume {tmp_path}" in capfd.readouterr().err


def test_the_folder_of_the_data_is_no_run_folder(exported, capfd):
    argv = f"--backbone segformer_tiny --size 32 --data folder --root {exported}/folder --out {exported}/folder".split()
    assert "folder of the data" in refused(capfd, 1, argv)
