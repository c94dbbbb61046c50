"""A trained model as a torch.export program, for machines without this project: predict.py --export."""

import copy
import io
import json
import time
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from data import incomplete, normalise, say
from datasets.files import LARGEST_OF
from engine.checkpoint import fitting
from engine.output import MARK, check_output, write_output
from engine.subsets import present_of
from model import CMNeXt


class Program(nn.Module):
    """What is exported: images (B, M, 3, H, W) in 0..1 and present (B, M) bool -> logits (B, K, H, W). At least one
    modality of each image must be present. Absent ones may hold anything; they cost as much as the others."""

    def __init__(self, model: nn.Module, meta: dict):
        super().__init__()
        self.model, self.normalisation = copy.deepcopy(model), meta["normalisation"]

    def forward(self, images: Tensor, present: Tensor | None = None) -> Tensor:
        x = normalise(images, *self.normalisation)
        if present is None:  # a CMNeXt without zero images selects rows by value, which torch.export cannot trace
            return self.model(x).logits
        x = x.masked_fill(~present[:, :, None, None, None], 0)
        x, present = incomplete(x, present, self.model.absent)
        if isinstance(self.model, CMNeXt):
            return self.model(x).logits
        return self.model.answer(self.model.encode(x), present, x.shape[-2:]).logits


@torch.no_grad()
def export(model: nn.Module, meta: dict, size: int | tuple[int, int], file: str) -> None:
    """Writes a torch.export program for any number of images of this size, and about.json beside it. It is read back
    first, compared with the model on complete and incomplete images, and timed."""
    beside, names = Path(file).with_name("about.json"), meta["modalities"]
    check_output(beside)
    with fitting(f"{file} cannot be exported beside {beside}; choose another folder"):
        if beside.exists() and (other := json.loads(beside.read_text())["program"]) != Path(file).name:
            raise ValueError(f"it describes {other}")
    height, width = (size, size) if isinstance(size, int) else size
    rows = not isinstance(model, CMNeXt) or model.absent == "zero"  # whether it takes `present`
    kinds = [meta.get("ranges", {}).get(name, ["8 bit"])[0] for name in names]
    about = {"file": MARK, "program": Path(file).name, "inputs": ["images", "present"] if rows else ["images"]}
    about |= {"modalities": names, "divisors": [LARGEST_OF.get(kind, 1) for kind in kinds], "size": [height, width]}
    about |= {"classes": meta["classes"], "palette": meta["palette"]}
    about["note"] = "each image needs a modality that is present, else its logits are NaN"
    images, buffer = torch.rand(2, len(names), 3, height, width), io.BytesIO()
    present = torch.stack([present_of(subset, (len(names),)) for subset in (range(len(names)), [len(names) - 1])])
    given = (images, present) if rows else (images,)
    with fitting(f"{file} is not written, torch.export fails or gives another program than the model"):
        batch = {0: torch.export.Dim("batch", min=1)}
        made = torch.export.export(Program(model, meta).eval(), given, dynamic_shapes=(batch,) * len(given))
        torch.export.save(made, buffer, extra_files={"about.json": json.dumps(about)})
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.comment = MARK.encode()  # at the end: so a later run may replace the file
        buffer.seek(0)
        program = torch.export.load(buffer).module()
        x, seen = incomplete(normalise(images, *meta["normalisation"]), present, model.absent)
        found, expected = program(*given), model(x, seen if rows else None).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1, expected.abs().max().item()))
        begun = time.perf_counter()
        program(*(x[:1] for x in given))
        ms = 1000 * (time.perf_counter() - begun)
    write_output(file, buffer.getvalue())
    write_output(beside, json.dumps(about, indent=1) + "\n")
    weights = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters"
    speed = f"{ms:.0f} ms an image on this CPU with {torch.get_num_threads()} thread(s)"
    shape = f"(B, {', '.join(map(str, images.shape[1:]))}) of {', '.join(names)}"
    say(f"{file}: {' and '.join(about['inputs'])}, {shape}; {weights}, {speed}. {beside} says what it takes.")
    if not rows:
        say("This CMNeXt's program needs all modalities: torch.export cannot trace how it leaves out absent ones.")
