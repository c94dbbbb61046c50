"""Checkpoints: atomic, checked, and never loaded wrong."""

import errno
import io
import os
import random
import subprocess
import zipfile

import pytest
import torch
from kill_and_resume import differences
from models import about

from engine import checkpoint, output
from model import build_model

CPU = torch.device("cpu")


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "phase": "teacher",
        "step": step,
        "steps": 9,
        "best": 0.5 * step,
        "script": "train_stage1.py",
        "logged": 0,
        "meta": {},
        "parts": {f"layer{i}.weight": torch.randn(3, 5, generator=generator) for i in range(3)},
    }


def equal(a: dict, b: dict) -> bool:
    if a.keys() != b.keys() or any(a[k] != b[k] for k in a if k != "parts") or a["parts"].keys() != b["parts"].keys():
        return False
    return all(torch.equal(a["parts"][k], b["parts"][k]) for k in a["parts"])


@pytest.fixture
def folder(tmp_path):
    """A run folder with two checkpoints, steps 1 and 2."""
    for step in (1, 2):
        checkpoint.write(tmp_path / "last.pt", state(step), keep_previous=True)
    return tmp_path


def meta(**changes) -> dict:
    return about(classes=["road", "car", "sky"], data="deliver", **changes)


def test_the_newest_checkpoint_is_read_and_the_one_before_is_kept(folder):
    assert equal(checkpoint.load_last(folder), state(2))
    assert equal(checkpoint.read(folder / "last.previous.pt", "training run"), state(1))
    assert sorted(os.listdir(folder)) == ["last.previous.pt", "last.pt"]


def test_a_folder_without_checkpoints_has_no_state(tmp_path):
    assert checkpoint.load_last(tmp_path) is None
    assert checkpoint.load_last(tmp_path / "nowhere") is None


def test_a_flipped_byte_anywhere_falls_back_with_a_warning_or_changes_nothing(folder, capsys):
    whole, rng = (folder / "last.pt").read_bytes(), random.Random(1)
    structure = [i for i in range(len(whole) - 2500, len(whole))]  # the zip's directory is at the end
    places = rng.sample(range(len(whole)), 150) + rng.sample(structure, 150)
    warned = 0
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        (folder / "last.pt").write_bytes(changed)
        found, told = checkpoint.load_last(folder), capsys.readouterr().err
        warned += bool(told)
        assert equal(found, state(1 if told else 2)), f"byte {place}: step {found['step']}, warning {told!r}"
        assert (not told or told.startswith(f"warning: {folder}/last.pt is ")) and told.count("\n") == bool(told), told
    assert warned > 50


def test_a_cut_off_file_always_falls_back_with_a_warning(folder, capsys):
    whole = (folder / "last.pt").read_bytes()
    for length in [0, 1, 3, 4, 21, 22, *random.Random(2).sample(range(len(whole)), 50), len(whole) - 1]:
        (folder / "last.pt").write_bytes(whole[:length])
        assert equal(checkpoint.load_last(folder), state(1)), length
        told = capsys.readouterr().err
        assert f"{folder}/last.pt is corrupt" in told and f"{folder}/last.previous.pt, step 1" in told, told


def test_blocks_of_zeros_as_a_crash_leaves_them_are_found(folder, capsys):
    whole = (folder / "last.pt").read_bytes()
    for start in range(0, len(whole), 512):
        changed = whole[:start] + bytes(len(whole[start : start + 512])) + whole[start + 512 :]
        if changed == whole:
            continue
        (folder / "last.pt").write_bytes(changed)
        found, told = checkpoint.load_last(folder), capsys.readouterr().err
        assert equal(found, state(1 if told else 2)), start


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
    """A file that takes `room` bytes, then fails as a full disk does."""

    room = 1000

    def write(self, data) -> int:
        if len(data) > self.room:
            super().write(bytes(data[: self.room]))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_fails_the_save_and_keeps_both_old_checkpoints(folder, monkeypatch):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    monkeypatch.setattr(output, "open", FullDisk, raising=False)
    size = len(before["last.pt"]) / 2**20
    sentence = rf"cannot write .*last.pt \(No space left on device\); .* {size:.1f} MB of free space are needed"
    with pytest.raises(OSError, match=sentence):
        checkpoint.write(folder / "last.pt", state(3), keep_previous=True)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_file_system_that_fills_up_keeps_the_old_checkpoint(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        big = {**state(1), "parts": {"w": torch.randn(100, 250)}}  # 100 kB: two fit, three do not
        checkpoint.write(tmp_path / "last.pt", big, keep_previous=True)
        checkpoint.write(tmp_path / "last.pt", {**big, "step": 2}, keep_previous=True)
        with pytest.raises(OSError, match=r"No space left on device\); .* 0.1 MB of free space are needed"):
            checkpoint.write(tmp_path / "last.pt", {**big, "step": 3}, keep_previous=True)
        assert checkpoint.load_last(tmp_path)["step"] == 2
        assert checkpoint.read(tmp_path / "last.previous.pt", "training run")["step"] == 1
        assert sorted(os.listdir(tmp_path)) == ["last.previous.pt", "last.pt"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_that_reads_back_wrong_never_replaces_the_old_one(folder, monkeypatch):
    class Lossy(io.FileIO):
        def write(self, data) -> int:
            changed = bytearray(data)
            changed[len(changed) // 2 : len(changed) // 2 + 64] = bytes(64)
            return super().write(changed)

    monkeypatch.setattr(output, "open", Lossy, raising=False)
    with pytest.raises(OSError, match="cannot write .*last.pt .the disk gives back something else"):
        checkpoint.write(folder / "last.pt", {**state(3), "parts": {"w": torch.randn(5000)}}, keep_previous=True)
    assert equal(checkpoint.load_last(folder), state(2))


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
    checkpoint.save_model(tmp_path / "a.pt", model, meta())
    loaded, found = checkpoint.load_model(tmp_path / "a.pt", CPU, {"classes": ["road", "car", "sky"]})
    (tmp_path / "again").mkdir()
    checkpoint.save_model(tmp_path / "again" / "a.pt", loaded, found)
    assert differences(tmp_path, tmp_path / "again") == [] and not loaded.training
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize(
    "name, here, sentence",
    [
        ("classes", ["road", "sky"], "a.pt was trained with classes road, car, sky, but here it is road, sky"),
        ("modalities", ["depth", "rgb"], "a.pt was trained with modalities rgb, depth, but here it is depth, rgb"),
        ("backbone", "cmnext_tiny", "a.pt was trained with backbone segformer_tiny, but here it is cmnext_tiny"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_with_both_descriptions(tmp_path, name, here, sentence):
    checkpoint.save_model(tmp_path / "a.pt", build_model("segformer_tiny", 3, ["rgb", "depth"]), meta())
    with pytest.raises(ValueError, match=sentence):
        checkpoint.load_model(tmp_path / "a.pt", CPU, {name: here})


def test_a_file_whose_weights_are_not_of_its_backbone_is_refused_by_name(tmp_path):
    checkpoint.save_model(tmp_path / "fsm.pt", torch.nn.Linear(2, 2), meta(rule="score"))
    with pytest.raises(ValueError, match="fsm.pt does not hold the weights of a segformer_tiny"):
        checkpoint.load_model(tmp_path / "fsm.pt", CPU)
    checkpoint.save_model(tmp_path / "a.pt", build_model("segformer_tiny", 4, ["rgb", "depth"]), meta())
    with pytest.raises(ValueError, match=r"a.pt .*size mismatch for decoder.classify.weight: .*\[4, .*\[3, "):
        checkpoint.load_model(tmp_path / "a.pt", CPU)


def test_a_file_of_another_project_or_a_missing_one_is_named(tmp_path):
    for content in ({"model": {}}, [1, 2], torch.zeros(3), {"format": "rmmss 1", "model": {}, "meta": None}, state(1)):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="other.pt is not a model that this version of the project saved"):
            checkpoint.load_model(tmp_path / "other.pt", CPU)
    torch.save({"format": "rmmss 1", "model": {}, "meta": {"backbone": "segformer_tiny"}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt does not say its classes: an older version"):
        checkpoint.load_model(tmp_path / "other.pt", CPU)
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(FileNotFoundError, match="fifo.pt does not exist, or is no file"):
        checkpoint.load_model(tmp_path / "fifo.pt", CPU)
    with pytest.raises(FileNotFoundError, match="missing.pt does not exist"):
        checkpoint.load_model(tmp_path / "missing.pt", CPU)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a.txt", "no checkpoint")
    with pytest.raises(ValueError, match="zip.pt is corrupt, or no checkpoint"):
        checkpoint.load_model(tmp_path / "zip.pt", CPU)
