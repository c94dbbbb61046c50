"""A trained model as a torch.export program, for machines without this project: predict.py --export.

The program takes images (B, modalities, 3, H, W) as data.normalise gives them, B free, and gives logits (B, K, H, W).
Its modalities are fixed: a robust model can be written for the modalities that a machine has.
"""

import copy
import io
import json

import torch
from torch import Tensor, nn

from engine.files import write_output
from engine.subsets import present_of
from model import CMNeXt


class Logits(nn.Module):
    """What is exported: (B, modalities, 3, H, W) normalised -> (B, K, H, W), the modalities fixed and all there."""

    def __init__(self, model: nn.Module, modalities: list[str]):
        super().__init__()
        if isinstance(model, CMNeXt) and modalities != model.modalities:
            raise ValueError(f"a CMNeXt is exported with all of its modalities: {', '.join(model.modalities)}.")
        self.model = copy.deepcopy(model)
        self.model.modalities = modalities
        # Conditioned weights have rows for each modality, for "all are there" and for "some are missing". The program
        # always sees all of its own, so the row that the whole model would use goes where "all are there" is.
        columns = [model.modalities.index(modality) for modality in modalities]
        state = len(model.modalities) + (len(columns) < len(model.modalities))
        rows = [*columns, state, state]
        if model.decoder.film is not None:
            self.model.decoder.film = nn.Parameter(model.decoder.film[:, rows])
        if getattr(model, "fusion_logits", None) is not None:
            self.model.fusion_logits = nn.Parameter(model.fusion_logits[rows][:, columns])

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


@torch.no_grad()
def export(model: nn.Module, meta: dict, modalities: list[str], size: int | tuple[int, int], file: str) -> None:
    """Writes the program for images of this size, after it was read back and compared with the model and its mask."""
    height, width = (size, size) if isinstance(size, int) else size
    about = {"modalities": modalities, "size": [height, width], "normalisation": meta["normalisation"],
             "classes": meta["classes"], "palette": meta["palette"]}  # fmt: skip
    shape, buffer = (len(modalities), 3, height, width), io.BytesIO()
    program = torch.export.export(Logits(model, modalities).eval(), (torch.randn(2, *shape),),
                                  dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))  # fmt: skip
    torch.export.save(program, buffer, extra_files={"about.json": json.dumps(about)})
    buffer.seek(0)
    read = torch.export.load(buffer).module()
    subset = tuple(map(meta["modalities"].index, modalities))
    images = torch.randn(3, len(meta["modalities"]), *shape[1:])  # another batch size than it was made with
    expected = model(images, present_of(subset, images.shape[:2])).logits
    worst, largest = (read(images[:, list(subset)]) - expected).abs().max().item(), expected.abs().max().item()
    if not worst <= 1e-4 * max(1.0, largest):
        raise ValueError(f"the program differs from the model by {worst:.2g}, logits up to {largest:.2g}; not written.")
    write_output(file, buffer.getvalue())
    print(f"{file}: images (B, {', '.join(map(str, shape))}) of {', '.join(modalities)}; as the model to {worst:.1g}")
