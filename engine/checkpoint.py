"""Checkpoints that nothing can ruin: atomic, checked, self-describing, and read without running any code.

    save_model("student.pt", model, meta)          model, meta = load_model("student.pt", device)
    write(folder / "last.pt", state)               state = load_last(folder)     # the newest valid one, or None
"""

import io
import os
import pathlib
import sys
import zipfile
import zlib

import torch
from torch import nn

from model import build_model, condition_on_modalities

KEYS = {"model": {"format", "meta", "model"},
        "training run": {"script", "phase", "step", "steps", "best", "logged", "meta", "parts"}}  # fmt: skip

def write(path: pathlib.Path, state: dict, keep_previous: bool = False) -> None:
    """Saves atomically: beside, flushed, verified, renamed; the previous file survives until then.

    Raises OSError with the space needed when the disk is full; the old file stays as it was.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    beside = path.with_suffix(".new")
    try:
        with open(beside, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if reason := damage(beside):
            raise OSError(reason)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"cannot save {path} ({error.strerror or error}): {buffer.tell() / 2**20:.1f} MB of free space "
                      "are needed there; what was saved before is still valid.") from error  # fmt: skip
    if keep_previous and path.exists():
        os.replace(path, path.with_suffix(".previous.pt"))
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name itself must reach the disk
    os.close(folder)


def damage(path: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint file, by the CRC-32 that its zip container holds for every tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        return f"the checksum of {bad} is wrong" if bad else None
    except Exception as error:  # flipped bytes of a zip's directory can raise nearly anything
        return f"it is cut off or overwritten ({error or type(error).__name__})"


def read(path: pathlib.Path, what: str = "model") -> dict:
    """Loads a file of `write`, one of KEYS. Raises FileNotFoundError or ValueError with one sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file.")
    if reason := damage(path):
        raise ValueError(f"{path} is corrupt: {reason}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of tensors and plain values ({type(error).__name__}).") from error
    if not isinstance(state, dict) or not KEYS[what] <= state.keys() or not isinstance(state["meta"], dict):
        raise ValueError(f"{path} is not a {what} that this version of the project saved; a run's models are "
                         "teacher.pt, robust.pt and student.pt, and published weights go through --pretrained.")
    return state


def load_last(folder: pathlib.Path) -> dict | None:
    """The newest valid of a run's checkpoints, with a warning if it is not the first; None if there is none at all."""
    problem = None
    for file in (folder / "last.pt", folder / "last.previous.pt"):
        try:
            state = read(file, "training run")
            if problem:
                print(f"warning: {problem} Continuing from {file}, step {state['step']}.", file=sys.stderr)
            return state
        except FileNotFoundError:
            continue
        except ValueError as error:
            problem = problem or error
    if problem:
        raise ValueError(f"{problem} No valid checkpoint is left in {folder}; start again in another folder.")
    return None


def save_model(path: pathlib.Path, model: nn.Module, meta: dict) -> None:
    """A model that describes itself: evaluate.py and predict.py need only the path."""
    write(path, {"format": "rmmss 1", "meta": meta, "model": model.state_dict()})


def load_model(
    path: pathlib.Path | str, device: torch.device, expect: dict | None = None, **overrides
) -> tuple[nn.Module, dict]:
    """Rebuilds a model from its checkpoint -> (model in eval mode, meta).

    expect: entries of meta that must agree (classes, modalities ...), else ValueError with both descriptions.
    overrides: entries of meta to replace, for training on with another drop_path or dropout.
    """
    state = read(pathlib.Path(path))
    meta = state["meta"]
    if lacking := {"backbone", "classes", "modalities", "drop_path", "dropout", "normalisation"} - meta.keys():
        raise ValueError(f"{path} does not say its {min(lacking)}: an older version wrote it; train again.")
    require(path, meta, expect or {})
    meta = {**meta, **overrides}
    model = build_model(meta["backbone"], len(meta["classes"]), meta["modalities"], meta["drop_path"], meta["dropout"])
    if "decoder.film" in state["model"]:
        condition_on_modalities(model)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        why = " ".join(str(error).split()[:40])
        raise ValueError(f"{path} does not hold the weights of a {meta['backbone']}: {why} ...") from error
    return model.to(device).eval(), meta


def require(path: pathlib.Path | str, found: dict, expect: dict) -> None:
    """Refuses a checkpoint of another backbone, class list, ... with both descriptions."""
    for name, value in expect.items():
        if found.get(name) != value:
            there, here = (", ".join(map(str, v)) if isinstance(v, list) else v for v in (found.get(name), value))
            raise ValueError(f"{path} was trained with {name} {there}, but here it is {here}.")


def describe(args, dataset, backbone: str | None) -> dict:
    """What a model's checkpoint says of itself."""
    names = [frame.name for frame in dataset.frames]
    return {"backbone": backbone, "modalities": list(dataset.modalities), "classes": list(dataset.classes),
            "palette": [[int(v) for v in colour] for colour in dataset.palette], "frames": len(dataset),
            "frame names": f"{names[0]} to {names[-1]} (checksum {zlib.crc32(repr(names).encode()):08x})",
            "data": args.data, "root": args.root, "depth": args.depth, "label_map": args.label_map,
            "hold_out": args.hold_out, "size": args.size, "val_size": args.val_size,
            "normalisation": dataset.normalisation, "ranges": dataset.ranges, "drop_path": args.drop_path,
            "dropout": args.dropout}  # fmt: skip
