"""Checkpoints: atomic, checked, and never loaded wrong."""

import errno
import io
import os
import random
import zipfile

import pytest
import torch
from kill_and_resume import differences, leaves, same
from models import about

from engine import checkpoint, output
from model import build_model

CPU = torch.device("cpu")
META = about(classes=["road", "car", "sky"], data="deliver")


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    parts = {f"layer{i}.weight": torch.randn(3, 5, generator=generator) for i in range(3)}
    numbers = {"step": step, "steps": 9, "best": 0.5 * step, "logged": 0, "options": {}, "threads": 1}
    return {"script": "train_stage1.py", "phase": "teacher", "meta": {}, "parts": parts, **numbers}


def equal(a: dict, b: dict) -> bool:
    a, b = leaves(a), leaves(b)
    return a.keys() == b.keys() and all(same(a[place], b[place]) for place in a)


@pytest.fixture
def folder(tmp_path):
    """A run folder with two checkpoints, steps 1 and 2."""
    for step in (1, 2):
        checkpoint.write(tmp_path / "last.pt", state(step), keep_previous=True)
    return tmp_path


def test_the_newest_checkpoint_is_read_and_the_one_before_is_kept(folder):
    assert equal(checkpoint.load_last(folder), state(2))
    assert equal(checkpoint.read(folder / "last.previous.pt", "training run"), state(1))
    assert sorted(os.listdir(folder)) == ["last.previous.pt", "last.pt"]


def test_a_folder_without_checkpoints_has_no_state(tmp_path):
    assert checkpoint.load_last(tmp_path) is None
    assert checkpoint.load_last(tmp_path / "nowhere") is None


def flipped(whole: bytes):
    rng, directory = random.Random(1), range(len(whole) - 2500, len(whole))  # the zip's, at the end
    for place in rng.sample(range(len(whole)), 150) + rng.sample(directory, 150):
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def cut_off(whole: bytes):
    for length in [0, 1, 3, 4, 21, 22, *random.Random(2).sample(range(len(whole)), 50), len(whole) - 1]:
        yield whole[:length]


def zeroed(whole: bytes):
    """Blocks of zeros, as a crash leaves them."""
    for start in range(0, len(whole), 512):
        yield whole[:start] + bytes(len(whole[start : start + 512])) + whole[start + 512 :]


@pytest.mark.parametrize("damaged, least", [(flipped, 50), (cut_off, 57), (zeroed, 5)])
def test_damage_anywhere_falls_back_with_a_warning_or_changes_nothing(folder, capsys, damaged, least):
    """At least so many are noticed; a file that is cut off always is."""
    noticed = 0
    for i, data in enumerate(damaged((folder / "last.pt").read_bytes())):
        (folder / "last.pt").write_bytes(data)
        found, told = checkpoint.load_last(folder), capsys.readouterr().err
        assert equal(found, state(1 if told else 2)), f"damage {i}: step {found['step']}, warning {told!r}"
        if told:
            assert told.startswith(f"warning: {folder}/last.pt is ") and told.count("\n") == 1, told
            assert f"{folder}/last.previous.pt, step 1" in told
        noticed += bool(told)
    assert noticed >= least


def test_when_no_checkpoint_is_valid_one_sentence_says_so(folder):
    for name in ("last.pt", "last.previous.pt"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    with pytest.raises(ValueError, match="last.previous.pt is corrupt"):
        checkpoint.load_last(folder)
    (folder / "last.previous.pt").unlink()
    with pytest.raises(ValueError, match="last.pt is corrupt"):
        checkpoint.load_last(folder)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"phase": "teacher"}, {**state(3), "meta": None}])
def test_a_file_of_something_else_is_no_state_of_a_run(folder, capsys, content):
    torch.save(content, folder / "last.pt")
    assert equal(checkpoint.load_last(folder), state(1))
    assert "last.pt is not a training run that this version of the project saved" in capsys.readouterr().err


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is corrupt, or no checkpoint of tensors and plain values"):
        checkpoint.read(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


class FullDisk(io.FileIO):
    """A file that takes 1000 bytes, then fails as a full disk does."""

    sentence = r"cannot write .*last.pt \(No space left on device\); .* 1.0 MB of free space are needed"

    def write(self, data) -> int:
        super().write(bytes(data[:1000]))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class LossyDisk(io.FileIO):
    sentence = "cannot write .*last.pt .the disk gives back something else"

    def write(self, data) -> int:
        changed = bytearray(data)
        changed[len(changed) // 2 : len(changed) // 2 + 64] = bytes(64)
        return super().write(changed)


@pytest.mark.parametrize("disk", [FullDisk, LossyDisk])
def test_a_bad_disk_fails_the_save_and_keeps_both_old_checkpoints(folder, monkeypatch, disk):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    monkeypatch.setattr(output, "open", disk, raising=False)
    with pytest.raises(OSError, match=disk.sentence):
        parts = {"w": torch.randn(250_000)}  # 1 MB
        checkpoint.write(folder / "last.pt", {**state(3), "parts": parts}, keep_previous=True)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


@pytest.mark.parametrize("moment", [1, 2])
def test_a_crash_between_the_renames_leaves_a_valid_checkpoint(folder, monkeypatch, moment):
    calls, replace = [], os.replace

    def dying(*names):
        calls.append(names)
        if len(calls) == moment:
            raise KeyboardInterrupt
        replace(*names)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(folder / "last.pt", state(3), keep_previous=True)
    assert equal(checkpoint.load_last(folder), state(2))


def test_a_model_comes_back_as_it_was_saved(tmp_path):
    model = build_model("segformer_tiny", 3, ["rgb", "depth"])
    checkpoint.save_model(tmp_path / "a.pt", model, META)
    loaded, found = checkpoint.load_model(tmp_path / "a.pt", CPU, {"classes": ["road", "car", "sky"]})
    (tmp_path / "again").mkdir()
    checkpoint.save_model(tmp_path / "again" / "a.pt", loaded, found)
    assert differences(tmp_path, tmp_path / "again") == [] and not loaded.training
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ValueError, match="a.pt was trained with classes road, car, sky, but here it is road, sky"):
        checkpoint.load_model(tmp_path / "a.pt", CPU, {"classes": ["road", "sky"]})


OTHERS = ({"model": {}}, [1, 2], torch.zeros(3), {"format": "rmmss 1", "model": {}, "meta": None}, state(1))
SAVED = {"format": "rmmss 1", "model": {}, "meta": META}
FOUR_CLASSES = build_model("segformer_tiny", 4, ["rgb", "depth"]).state_dict()


@pytest.mark.parametrize(
    "content, sentence",
    [
        *((content, "is not a model that this version of the project saved") for content in OTHERS),
        ({**SAVED, "meta": {"backbone": "segformer_tiny"}}, "does not say its classes: an older version"),
        ({**SAVED, "model": {"weight": torch.zeros(2)}}, "does not hold the weights of a segformer_tiny"),
        ({**SAVED, "model": FOUR_CLASSES}, r".*size mismatch for decoder.classify.weight: .*\[4, .*\[3, "),
    ],
)
def test_a_file_of_another_project_or_of_other_weights_is_refused_by_name(tmp_path, content, sentence):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"a.pt {sentence}"):
        checkpoint.load_model(tmp_path / "a.pt", CPU)


def test_what_is_no_checkpoint_or_is_missing_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo.pt")
    for name in ("fifo.pt", "missing.pt"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist, or is no file"):
            checkpoint.load_model(tmp_path / name, CPU)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a.txt", "no checkpoint")
    with pytest.raises(ValueError, match="zip.pt is corrupt, or no checkpoint"):
        checkpoint.load_model(tmp_path / "zip.pt", CPU)
