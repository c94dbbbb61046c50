"""What several test files make models of: the golden arrays of the authors' implementation (weights follow from the
parameter names, inputs from a seed), and models with nothing left at its start value."""

import json
import pathlib
import zlib

import numpy as np
import torch

from datasets.layouts import open_layout
from engine.checkpoint import checksum, read
from engine.pretrained import load_pretrained
from model import build_model

GOLDEN = pathlib.Path(__file__).parent / "golden"
MODALITIES = ["rgb", "depth", "event", "lidar"]


def golden_weights(keys: np.ndarray) -> dict[str, torch.Tensor]:
    """The weights that follow from the published names and shapes."""
    state = {}
    for name, shape in json.loads(bytes(keys)).items():
        r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("num_batches_tracked"):
            r = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith("running_var"):
            r = 0.8 + 0.2 * r.abs()
        elif r.ndim > 1:
            r = r / r[0].numel() ** 0.5
        else:
            r = float(name.endswith("weight")) + 0.1 * r
        state[name] = r
    return state


def golden_images(generator: torch.Generator) -> torch.Tensor:
    return torch.stack([torch.randn(2, 3, 64, 96, generator=generator) for _ in range(4)], 1)  # (B, M, 3, H, W)


def published(tmp_path, file: str, backbone: str):
    golden = np.load(GOLDEN / file)
    torch.save(golden_weights(golden["keys"]), tmp_path / "published.pth")
    model = build_model(backbone, 25, MODALITIES).eval()
    return golden, model, load_pretrained(model, str(tmp_path / "published.pth"))


def agree(ours: torch.Tensor, golden: np.ndarray, atol: float = 1e-4) -> None:
    assert ours.shape == golden.shape
    torch.testing.assert_close(ours, torch.from_numpy(golden), rtol=0, atol=atol)


def about(**changes) -> dict:
    """What a checkpoint says of its model (`checkpoint.describe`): an own data set of RGB and depth, two classes."""
    meta = {"backbone": "segformer_tiny", "modalities": ["rgb", "depth"], "classes": ["a", "b"]}
    meta |= {"data": "folder", "root": None, "label_map": None, "depth": "hha", "hold_out": 0, "size": 64}
    meta |= {"val_size": 64, "absent": "skip", "options": {}, **changes}
    count = len(meta["modalities"])
    numbers, palette = [[[0.5] * 3] * count, [[0.25] * 3] * count], [[k] * 3 for k in range(len(meta["classes"]))]
    return {"normalisation": numbers, "palette": palette, **meta}


def about_scenes(**changes) -> dict:
    """What a checkpoint says of a model of all modalities of the painted scenes."""
    _, _, classes, palette = open_layout("synthetic", None, "hha", 40)
    scenes = {"data": "synthetic", "modalities": MODALITIES, "classes": classes, "palette": palette.tolist()}
    return about(**scenes, normalisation=[[[0.485, 0.456, 0.406]] * 4, [[0.229, 0.224, 0.225]] * 4], **changes)


def sources_in(folder: pathlib.Path) -> list[int]:
    """What a fsm.pt says of the models in this folder."""
    return [checksum(read(folder / f"{name}.pt")["meta"]) for name in ("teacher", "robust")]


def with_random_weights(model):
    """Weights, biases and statistics far from their trivial start values, so that predictions vary; eval mode."""
    shapes = {name: list(v.shape) for name, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    model.load_state_dict(golden_weights(json.dumps(shapes).encode()), strict=False)
    return model.eval()


def with_wide_weights(model):
    """Untrained models answer one class everywhere; wider weights make maps of many classes."""
    for parameter in model.parameters():
        parameter.data.mul_(1 + (parameter.ndim > 1))
    return model.eval()


def random_present(b: int, m: int, seed: int) -> torch.Tensor:
    present = torch.rand(b, m, generator=torch.Generator().manual_seed(seed)) < 0.5
    present[torch.arange(b), torch.randint(0, m, (b,))] = True
    return present


def poisoned(images: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Absent slices hold NaN: whoever reads one shows."""
    return images.masked_fill(~present[:, :, None, None, None], torch.nan)
