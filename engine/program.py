"""A trained model as a torch.export program, for machines without this project: predict.py --export."""

import copy
import io
import json

import torch
from torch import Tensor, nn

from engine.checkpoint import fitting
from engine.output import write_output
from engine.subsets import present_of
from model import CMNeXt


class Program(nn.Module):
    """What is exported: images (B, modalities, 3, H, W) as data.normalise gives them -> logits (B, K, H, W). Its
    modalities are fixed: a robust model can be written for the modalities that a machine has."""

    def __init__(self, model: nn.Module, modalities: list[str]):
        super().__init__()
        if isinstance(model, CMNeXt) and modalities != model.modalities:
            raise ValueError(f"a CMNeXt is exported with all of its modalities: {', '.join(model.modalities)}.")
        self.columns = [model.modalities.index(modality) for modality in modalities]
        self.model = copy.deepcopy(model)
        self.model.modalities = modalities  # what it encodes

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.model, CMNeXt):
            return self.model(images).logits
        return self.model(images).logits


@torch.no_grad()
def export(model: nn.Module, meta: dict, modalities: list[str], size: int | tuple[int, int], file: str) -> None:
    """Writes a torch.export program for any number of images of this size; `about.json` in it says what it takes. It is
    read back first, and compared with the model and its mask."""
    height, width = (size, size) if isinstance(size, int) else size
    about = {
        "modalities": modalities,
        "size": [height, width],
        "normalisation": meta["normalisation"],
        "classes": meta["classes"],
        "palette": meta["palette"],
    }
    program, buffer = Program(model, modalities).eval(), io.BytesIO()
    images = torch.randn(3, len(model.modalities), 3, height, width)
    given = images[:, program.columns]
    made = torch.export.export(program, (given[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(made, buffer, extra_files={"about.json": json.dumps(about)})
    buffer.seek(0)
    present = present_of(program.columns, (3, len(model.modalities)))
    found, expected = torch.export.load(buffer).module()(given), model(images, present).logits
    with fitting(f"{file} is not written, the program differs from the model"):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1, expected.abs().max().item()))
    write_output(file, buffer.getvalue())
    print(f"{file}: images (B, {', '.join(map(str, given.shape[1:]))}) of {', '.join(modalities)}")
