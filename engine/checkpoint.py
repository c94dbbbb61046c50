"""Checkpoints that nothing can ruin: atomic, checked, self-describing, and read without running any code.

    save_model("student.pt", model, meta)          model, meta = load_model("student.pt", device)
    write(folder / "last.pt", state)               state = load_last(folder)     # the newest valid one, or None
"""

import io
import os
import pathlib
import sys
import zipfile

import torch
from torch import nn

from model import build_model, condition_on_sensors


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
        size = f"{buffer.tell() / 2**20:.1f} MB"
        raise OSError(f"cannot save {path} ({error.strerror or error}): {size} of free space are needed there; "
                      "what was saved before is still valid.") from error  # fmt: skip
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


def read(path: pathlib.Path) -> dict:
    """Loads a file of `write`. Raises FileNotFoundError or ValueError with one sentence."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if reason := damage(path):
        raise ValueError(f"{path} is corrupt: {reason}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of tensors and plain values ({type(error).__name__}).") from error


def load_last(folder: pathlib.Path) -> dict | None:
    """The newest valid of a run's checkpoints, with a warning if it is not the first; None if there is none at all."""
    problem = None
    for file in (folder / "last.pt", folder / "last.previous.pt"):
        if file.exists():
            try:
                state = read(file)
                if not isinstance(state, dict) or "phase" not in state:
                    raise ValueError(f"{file} is not the state of a training run.")
            except ValueError as error:
                problem = problem or error
                continue
            if problem:
                print(f"warning: {problem} Continuing from {file}, step {state['step']}.", file=sys.stderr)
            return state
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
    if isinstance(state, dict) and "phase" in state:
        raise ValueError(f"{path} is the state of a training run; give a model of that folder, e.g. student.pt.")
    if not isinstance(state, dict) or state.get("format") != "rmmss 1":
        raise ValueError(f"{path} was not written by this project; published weights go through --pretrained.")
    if "normalisation" not in state["meta"]:
        raise ValueError(f"{path} does not say how its images are normalised: an older version wrote it; train again.")
    require(path, state["meta"], expect or {})
    meta = {**state["meta"], **overrides}
    model = build_model(meta["backbone"], len(meta["classes"]), meta["modalities"], meta["drop_path"], meta["dropout"])
    if "decoder.film" in state["model"]:
        condition_on_sensors(model)
    weights = state["model"], model.state_dict()
    there, here = ({k: list(getattr(v, "shape", ())) for k, v in m.items()} for m in weights)
    if there != here:
        name = min(k for k in {*there, *here} if there.get(k) != here.get(k))
        kind = f"a {meta['backbone']} for {len(meta['classes'])} classes"
        raise ValueError(f"{path} does not hold the weights of {kind}: "
                         f"{name} is {there.get(name, 'missing')} there, and {here.get(name, 'unknown')} in the model.")
    model.load_state_dict(state["model"])
    return model.to(device).eval(), meta


def require(path: pathlib.Path | str, found: dict, expect: dict) -> None:
    """Refuses a checkpoint of another backbone, class list, ... with both descriptions."""
    for name, value in expect.items():
        if found.get(name) != value:
            there, here = (", ".join(map(str, v)) if isinstance(v, list) else v for v in (found.get(name), value))
            raise ValueError(f"{path} was trained with {name} {there}, but here it is {here}.")


def describe(o, dataset, backbone: str) -> dict:
    """What a model's checkpoint says of itself."""
    return {"backbone": backbone, "modalities": list(dataset.modalities), "classes": list(dataset.classes),
            "palette": [[int(v) for v in colour] for colour in dataset.palette], "size": o.size, "val_size": o.val_size,
            "data": o.data, "root": o.root, "depth": o.depth, "label_map": o.label_map, "hold_out": o.hold_out,
            "drop_path": o.drop_path, "dropout": o.dropout, "normalisation": dataset.normalisation}  # fmt: skip
