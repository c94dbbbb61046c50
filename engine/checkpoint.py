"""Checkpoints that nothing can ruin: atomic, checked, self-describing, and read without running any code."""

import contextlib
import io
import json
import sys
import zipfile
import zlib
from pathlib import Path

import torch
from torch import nn

from engine.output import replace
from model import build_model

KEYS = {
    "model": {"format", "meta", "model"},
    "training run": {"script", "options", "phase", "step", "steps", "best", "logged", "threads", "meta", "parts"},
}
# Options that may change when a run is continued: they do not change what it computes (another device: its last bits).
FREE = {"resume", "out", "root", "workers", "device", "max_minutes", "save_every"}
FILES = {"stage1", "teacher", "robust", "pretrained"}  # what a run started from: may be renamed
# Options that are entries of a model's meta by themselves, and all entries that a meta must have.
OPTIONS = ("data", "root", "depth", "label_map", "hold_out", "size", "val_size", "absent")
SAYS = ("backbone", "classes", "modalities", "palette", "normalisation", "options", *OPTIONS)
# Entries that must be equal in models that work together, or that continue one another.
SAME = ("data", "classes", "modalities", "normalisation", "depth", "label_map", "hold_out")


def write(path: Path, state: dict, keep_previous: bool = False) -> None:
    """Saves atomically. Raises OSError with the space needed when the disk is full; the old file stays as it was."""
    buffer = io.BytesIO()
    torch.save({**state, "checksum": checksum(state)}, buffer)
    replace(path, buffer.getvalue(), path.with_suffix(".previous.pt") if keep_previous else None)


def read(path: Path, what: str = "model", says: tuple[str, ...] = (), expect: dict | None = None) -> dict:
    """Loads a file that `write` saved. what: a key of KEYS; says: entries that its meta must have; expect: entries that
    must agree, see `require`. Raises FileNotFoundError or ValueError with one sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file.")
    with fitting(f"{path} is corrupt, or no checkpoint of tensors and plain values"):
        state = unpack(path.read_bytes())
    if not isinstance(state, dict) or not KEYS[what] <= state.keys() or not isinstance(state["meta"], dict):
        hint = "a run's models are teacher.pt, robust.pt and student.pt; published weights go through --pretrained"
        raise ValueError(f"{path} is not a {what} that this version of the project saved: {hint}.")
    if (known := state.pop("checksum", None)) not in (None, checksum(state)):
        raise ValueError(f"{path} was edited after it was saved (checksum {known}); restore it.")
    if lacking := [name for name in says if name not in state["meta"]]:
        raise ValueError(f"{path} does not say its {lacking[0]}: an older version wrote it; train again.")
    require(path, state["meta"], expect or {})
    return state


def checksum(state: dict) -> int:
    """Of all entries but the tensors, whose own is in the zip container: an edited step or range shows. Of a model's
    meta, it tells which run and phase the model is of, wherever the data lie."""
    words = {key: value for key, value in state.items() if key not in ("model", "parts", "root")}
    return zlib.crc32(json.dumps(words, sort_keys=True, default=repr).encode())


def unpack(data: bytes) -> object:
    """The object that torch.save made these bytes of; runs no code in them. Damaged bytes raise any exception."""
    if data[:2] == b"PK":  # not so before torch 1.6
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if bad := archive.testzip():  # by the CRC-32 that the zip container holds for every tensor
                raise ValueError(f"the checksum of {bad} is wrong")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def load_last(folder: Path, warn: bool = True) -> dict | None:
    """A run's last checkpoint, or with a warning the one before if that is corrupt; None if there is none at all."""
    last, previous = folder / "last.pt", folder / "last.previous.pt"
    try:
        return read(last, "training run") if last.exists() or previous.exists() else None
    except (ValueError, OSError) as error:
        if not previous.exists():
            raise
        state = read(previous, "training run")
        if warn:
            print(f"warning: {error} Instead: {previous}, step {state['step']}.", file=sys.stderr)
        return state


def save_model(path: Path, model: nn.Module, meta: dict) -> None:
    """A model that describes itself: evaluate.py and predict.py need only the path."""
    write(path, {"format": "rmmss 1", "meta": {**meta, "phase": path.stem}, "model": model.state_dict()})


def has_model(file: Path, meta: dict) -> bool:
    """Whether the model with this meta is there; ValueError if the file is damaged, or of another run."""
    if file.exists() and checksum(read(file)["meta"]) != checksum({**meta, "phase": file.stem}):
        raise ValueError(f"{file} is not of the run in last.pt: move it away, or put back the right one.")
    return file.exists()


def load_model(path: Path | str, device: torch.device, expect: dict | None = None) -> tuple[nn.Module, dict]:
    """Rebuilds a model from its checkpoint -> (model in eval mode, meta). `model.absent` says what an absent modality
    is to the model: left out ("skip"), or a zero image ("zero"). expect: entries of meta that must agree, else
    ValueError with both descriptions."""
    state = read(Path(path), says=SAYS, expect=expect)
    meta = state["meta"]
    with fitting(f"{path} does not hold the weights of a {meta['backbone']}"):
        model = build_model(meta["backbone"], len(meta["classes"]), meta["modalities"])
        model.load_state_dict(state["model"])
        torch.tensor(meta["normalisation"]).view(2, len(meta["modalities"]), 3)  # these fail for another shape
        torch.tensor(meta["palette"], dtype=torch.uint8).view(len(meta["classes"]), 3)
        if not meta["val_size"] >= 32 or any(high < low for _, low, high, *_ in meta.get("ranges", {}).values()):
            raise ValueError("val_size is below 32, or a range is empty")
    model.absent = meta["absent"]
    return model.to(device).eval(), meta


@contextlib.contextmanager
def fitting(failure: str):
    """Makes one sentence of whatever is raised by a file that does not hold what it should: `failure`, and why."""
    try:
        yield
    except Exception as error:
        text = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)
        why = " ".join(text.split()[:40]).split(". ")[0].rstrip(".")  # torch can say pages: its first sentence
        raise ValueError(f"{failure}: {why or type(error).__name__}.") from error


def require(path: Path | str, found: dict, expect: dict) -> None:
    """Refuses a checkpoint of another backbone, class list, ... with both descriptions."""
    for name in [name for name, value in expect.items() if found.get(name) != value]:
        if name == "normalisation":  # this and the next are too long to print
            raise ValueError(f"{path} was made with other data: normalisation differs.")
        if name in ("teacher", "sources"):  # checksums
            what = "teacher" if name == "teacher" else "teacher or robust model"
            raise ValueError(f"{path} was made with another {what} than the one that is here; put back its own.")
        there, here = (", ".join(map(str, v)) if isinstance(v, list) else v for v in (found.get(name), expect[name]))
        hint = {"val_size": " Choose with --size.", "label_map": " Choose with --label-map."}.get(name, "")
        raise ValueError(f"{path} was trained with {name} {there}, but here it is {here}.{hint}")


def frame_names(dataset) -> str:
    names = [frame.name for frame in dataset.frames]
    return f"{names[0]} to {names[-1]} (checksum {zlib.crc32(repr(names).encode()):08x})"


def describe(args, dataset, backbone: str | None, state: dict | None = None) -> dict:
    """What a model's checkpoint says of itself; state: what the run continues from."""
    meta = {"backbone": backbone, "modalities": list(dataset.modalities), "classes": list(dataset.classes)}
    meta |= {"palette": dataset.palette.tolist(), "frames": len(dataset), "frame names": frame_names(dataset)}
    meta |= {"normalisation": dataset.normalisation, "ranges": dataset.ranges}
    meta["options"] = {name: value for name, value in vars(args).items() if name not in FREE | FILES}
    meta |= {"start": state["meta"].get("start")} if state and args.pretrained else {}
    return meta | {name: getattr(args, name) for name in OPTIONS}
