"""Segments pictures with a trained model, from whichever of its modalities there are.

    python predict.py runs/deliver/student.pt --input rgb=a.png depth=b.png --out predictions
    python predict.py runs/deliver/student.pt --input rgb=my/rgb depth=my/depth      # folders, matched by file stem
    python predict.py runs/deliver/student.pt --data deliver --count 8 --modalities event,lidar
    python predict.py runs/demo --panel panel.png                     # teacher and student, side by side
    python predict.py runs/demo/student.pt --export student.pt2 --modalities rgb,depth    # a torch.export program

Writes for every frame, at its own size: NAME_label.png (class ids, 8 bit), NAME_colour.png (the checkpoint's palette)
and NAME_overlay.png (on the first modality). Never replaces a file that this program did not write. A run folder stands
for its student (or the last model before it); --panel shows its teacher as well.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import metrics
from data import IGNORED
from engine import pictures, runs
from engine.inference import input_frames, load_models, open_data, samples, titles
from engine.options import COUNT, RATE, RECIPES, Parser, names
from engine.output import check_output, write_picture
from engine.program import export
from segformer import upsample


def image_size(text: str) -> int | tuple[int, int]:
    """An argparse type: '512', or '480x640' for rows x columns."""
    sides = tuple(int(side) for side in text.split("x"))
    if len(sides) > 2 or min(sides) < 32:
        raise argparse.ArgumentTypeError(f"'{text}' must be S or HxW, with sides of at least 32 pixels")
    return sides if len(sides) == 2 else sides[0]


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("predict.py", __doc__)
    parser.add_argument("checkpoint", type=Path, help="model file, or run folder for its final model")
    what = "your files, or a data set (None: what the checkpoint was trained on)"
    add = parser.add_argument_group("input", what).add_argument
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="MODALITY=PATH",
        help="aligned files of a frame, or folders of them; other modalities are missing",
    )
    add("--data", choices=RECIPES)
    add("--root", help="folder of the data set")
    add("--split", choices=("train", "val", "test"), default="val")
    add("--count", type=COUNT, default=8, help="frames, spread over the split")
    add("--modalities", type=names, help="use only these, by comma, the others are missing. None: all")
    add("--depth-unit", type=RATE, default=0.001, help="metres of a step of 16-bit raw depth (--input, nyuv2)")
    add("--size", type=image_size, help="shorter side, or HxW, that the network sees. None: the training's --val-size")
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="DIR", help="pictures of each frame. None: predictions, if no other is asked")
    add(
        "--panel",
        metavar="FILE.png",
        help="frames by row; modalities, ground truth, and what each model says from "
        "all modalities and from --modalities (None: without the first, and the first two)",
    )
    add("--export", metavar="FILE.pt2", help="torch.export program of the model for --modalities (engine/program.py)")
    args = parser.parse_args(argv)
    if args.input and (args.data or args.root or args.modalities or args.panel):
        parser.error("--input has its own frames and modalities: leave out --data, --root, --modalities and --panel.")
    found = {}
    for modality, _, path in (text.partition("=") for text in args.input):
        if not modality or not path or not Path(path).exists():
            parser.error(f"'{modality}={path}' must be MODALITY=PATH with a file or folder that exists.")
        if modality in found:
            parser.error("--input names a modality twice; give each one file, or one folder for several frames.")
        found[modality] = Path(path)
    args.input = found
    args.out = args.out or (None if args.panel or args.export else "predictions")
    return args


@torch.inference_mode()
def segment(model: nn.Module, images: Tensor, view: Iterable[str], size: tuple[int, int], name: str) -> np.ndarray:
    """Class ids (H, W) uint8 of this size for a frame's images (M, 3, h, w), from the modalities of this view."""
    present = torch.tensor([[modality in view for modality in model.modalities]])  # (1, M)
    logits = model(images[None].to(next(model.parameters()).device), present).logits
    return metrics.class_ids(upsample(logits, size), [name])[0].to(torch.uint8).cpu().numpy()


def comparison(models: dict, frames: Iterable[tuple], views: list[list[str]], meta: dict, data: str) -> Image.Image:
    """Rows: frames. Columns: modalities, ground truth, and what every model says from each view (some modalities)."""
    grid, sides, occurring, classes, palette = [], [], set(), meta["classes"], meta["palette"]
    for frame, images, shown, label in frames:
        found = [segment(model, images, view, label.shape, frame.name) for model in models.values() for view in views]
        cells = [pictures.Cell(image, smooth=modality == "rgb") for modality, image in shown.items()]
        for ids in (label, *found):
            right = (ids == label)[label != IGNORED]
            share = f"{100 * right.mean():.0f} %" if right.size and ids is not label else ""
            cells.append(pictures.Cell(pictures.label_map(ids, palette), share))
            occurring |= set(np.unique(ids).tolist())
        grid.append(cells)
        sides.append(", ".join(word for word in (frame.name, frame.condition, frame.case) if word != "none"))
    missing = [" and ".join(m for m in meta["modalities"] if m not in view) for view in views]
    says = [f"{missed} missing" if missed else "all modalities" for missed in missing]
    heads = [*titles(data, list(shown)), "ground truth", *(f"{name}: {say}" for name in models for say in says)]
    key = [(classes[i], tuple(palette[i])) if i < len(classes) else ("ignored", (0, 0, 0)) for i in sorted(occurring)]
    return pictures.draw(
        grid, heads, sides, key, "In the corners: share of the pixels that are right. A missing modality is left out."
    )


def main(args: argparse.Namespace) -> None:
    check_output(args.panel, ".png")
    check_output(args.export, ".pt2")
    models, _, meta = load_models(args.checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if len(models) == 3:
        del models["robust"]  # the student's start, and much like it
    final, known, size = list(models.values())[-1], meta["modalities"], args.size or meta["val_size"]
    chosen = list(args.input) or args.modalities or known
    if unknown := [modality for modality in chosen if modality not in known]:
        raise ValueError(f"{args.checkpoint} has no modality {unknown[0]}; it has {', '.join(known)}.")

    def frames(modalities: list[str]) -> Iterable[tuple]:
        found = (
            input_frames(args.input, meta, size)
            if args.input
            else [open_data(meta, args.data, args.root, args.split, size, limit=args.count, modalities=modalities)]
        )
        return samples(found, meta, args.depth_unit)

    if args.panel:
        views = [known, chosen] if args.modalities else [known, known[1:], known[2:]]
        views = [view for view in views if view]
        write_picture(args.panel, comparison(models, frames(known), views, meta, args.data or meta["data"]))
        print(f"{args.panel} shows {' and '.join(models)}")
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        for frame, images, shown, label in frames(chosen):
            name, ids = frame.name.replace("/", "_"), segment(final, images, shown, label.shape, frame.name)
            colour = pictures.label_map(ids, meta["palette"])
            overlay = Image.blend(next(iter(shown.values())), colour, 0.5)
            for kind, image in (("label", Image.fromarray(ids)), ("colour", colour), ("overlay", overlay)):
                write_picture(folder / f"{name}_{kind}.png", image)
            missing = [modality for modality in known if modality not in shown] or ["none"]
            print(f"{folder / name}_*.png: {', '.join(shown)}; missing {', '.join(missing)}")
    if args.export:
        export(final.cpu(), meta, [m for m in known if m in chosen], size, args.export)


if __name__ == "__main__":
    sys.exit(runs.guarded(main, options()))
