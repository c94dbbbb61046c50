"""Segments pictures with a trained model, from whichever of its modalities there are.

    python predict.py runs/deliver/student.pt --input rgb=a.png depth=b.png --out predictions
    python predict.py runs/deliver/student.pt --input rgb=my/rgb depth=my/depth      # folders, matched by name
    python predict.py runs/deliver/student.pt --data deliver --count 8 --modalities event,lidar
    python predict.py runs/demo --panel panel.png                     # teacher and student, side by side
    python predict.py runs/demo/student.pt --export student.pt2       # a torch.export program, see engine/program.py

Writes for every frame, at its own size: NAME_label.png (class ids, 8 bit), NAME_colour.png (the checkpoint's palette)
and NAME_overlay.png (on the first modality). Never replaces a file that this program did not write. A run folder stands
for its final model; --panel shows its teacher as well. An image without any variation, as of a dead sensor, is missing.
"""

import argparse
import itertools
import operator
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import metrics
from data import IGNORED, by_comma, incomplete, normalise, resize, resized_to, say
from datasets.files import LARGEST_OF, checked, scaled
from datasets.layouts import label_table
from engine import pictures, runs
from engine.checkpoint import fitting
from engine.inference import given_depth, input_frames, load_models, open_data, samples, titles
from engine.options import COUNT, RATE, RECIPES, Parser
from engine.output import check_output, write_picture
from engine.program import export
from segformer import upsample


class Segmenter:
    """A trained model on arrays, in any size and from any of its modalities.

    path: model file, or run folder for its final model. device: None: a GPU if there is one. size: shorter side, or
    (rows, columns), that the network sees; None: as in validation. keep_constant: constant images are not missing.
    """

    def __init__(self, path: Path | str, device: str | None = None, size=None, keep_constant: bool = False):
        with fitting(f"the device {device!r} cannot be used"):
            device = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
        with fitting(f"the size {size!r} is neither a side of at least 32 pixels nor (rows, columns)"):
            sides = [operator.index(side) for side in np.ravel(size).tolist()] if size is not None else [32]
            if min(sides) < 32 or len(sides) > 2:
                raise ValueError("a side is too small, or there are more than two")
        torch.backends.cudnn.allow_tf32 = False  # the same bits as in evaluation
        self.models, _, self.meta = load_models(Path(path), device)
        self.size = self.meta["val_size"] if size is None else sides[0] if len(sides) == 1 else tuple(sides)
        self.keep_constant = keep_constant

    def __call__(self, **images: np.ndarray | None) -> np.ndarray:
        """Images by modality -> class ids (H, W) uint8, to the bit those of predict.py.

        (H, W), (H, W, 1) or (H, W, 3) of one H, W; uint8, uint16 (of 65535), or float: 0..1 for what was 8 or 16 bit
        in training, metres for raw depth of nyuv2 (uint16: millimetres), else as data.py decodes it. None, not given or
        constant: missing. ValueError names the modality.
        """
        return self.answer(list(self.models)[-1], self.working(images, stored=True))

    def working(self, images: dict[str, np.ndarray | None], stored: bool = False) -> dict[str, np.ndarray]:
        """The images that count, as (H, W, 1 or 3) uint8 or float32; stored: they are as in files, not yet decoded."""
        found, known = {}, self.meta["modalities"]
        metric = stored and (self.meta["data"], self.meta["depth"]) == ("nyuv2", "raw")
        for name, image in images.items():
            if name not in known:
                raise ValueError(f"the model has no modality {name}; it has {', '.join(known)}.")
            if image is None:
                continue
            image = np.atleast_3d(np.array(np.ma.filled(image, 0), order="C"))  # torch takes no flipped views
            image = image.astype(image.dtype.newbyteorder("="), copy=False)
            right = image.dtype.kind == "f" or image.dtype in (np.uint8, np.uint16)
            if not right or image.ndim != 3 or image.shape[2] not in (1, 3) or not image.size:
                raise ValueError(f"{name} is {image.dtype} {image.shape}; give (H, W, 1 or 3) uint8, uint16 or float.")
            image = image.astype(np.float32) if image.dtype.kind == "f" else image
            image = given_depth("depth", image, "raw", 0.001) if metric and name == "depth" else image
            ranges = self.meta.get("ranges", {})
            top = LARGEST_OF.get(ranges.get(name, ["float"])[0])
            if image.dtype == np.float32 and top:  # of 8 or 16 bit
                if not -1e-5 <= image.min() <= image.max() <= 1 + 1e-5:
                    raise ValueError(f"{name} has values in {image.min():g}..{image.max():g}; floats must be in 0..1.")
                image = image.clip(0, 1)
                checked(np.rint(top * image).astype(np.uint8 if top == 255 else np.uint16), name, "the array", ranges)
            else:
                image = checked(image, name, "the array", ranges)
            if self.keep_constant or (image != image[:1, :1]).any():
                found[name] = image
        return found

    @torch.inference_mode()
    def answer(self, model: str, images: dict[str, np.ndarray], frame: str = "given") -> np.ndarray:
        """Class ids (H, W) uint8 by the model of this name, from `working` images."""
        if not images:
            raise ValueError(f"frame {frame} has no image that varies; --keep-constant takes constant ones as well.")
        shape, *others = {image.shape[:2] for image in images.values()}
        if others:
            sizes = ", ".join(f"{name} {image.shape[:2]}" for name, image in images.items())
            raise ValueError(f"frame {frame} has images of several sizes: {sizes}; align them first.")
        net, known = self.models[model], self.meta["modalities"]
        sizes = resized_to(shape, self.size)
        x = torch.zeros(1, len(known), 3, *sizes[-1])
        for name, image in images.items():
            for size in sizes:
                image = resize(image, size)
            x[0, known.index(name)] = torch.from_numpy(scaled(image)).permute(2, 0, 1)  # (3 or 1, h, w)
        x, present = normalise(x, *self.meta["normalisation"]), torch.tensor([[name in images for name in known]])
        x, present = incomplete(x, present, net.absent)
        logits = net(x.to(next(net.parameters()).device), present).logits
        return metrics.class_ids(upsample(logits, shape), [frame])[0].to(torch.uint8).cpu().numpy()


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
    given = "aligned files of a frame, or folders of them; other modalities are missing"
    add("--input", nargs="+", default=[], metavar="MODALITY=PATH", help=given)
    add("--data", choices=RECIPES)
    add("--root", help="folder of the data set")
    add("--split", choices=("train", "val", "test"), help="None: val")
    add("--count", type=COUNT, help="frames, spread over the split. None: 8")
    add("--modalities", type=by_comma, help="use only these, by comma, the others are missing. None: all")
    add("--depth-unit", type=RATE, help="metres of a step of 16-bit raw depth (--input, nyuv2). None: 0.001")
    add("--keep-constant", action="store_true", help="an image without any variation is not a missing one")
    add("--size", type=image_size, help="shorter side, or HxW, that the network sees. None: the training's --val-size")
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="DIR", help="pictures of each frame. None: predictions, unless --panel or --export is given")
    views = "from all modalities and from --modalities (None: without the first, and the first two)"
    add("--panel", metavar="FILE.png", help=f"frames by row; modalities, ground truth, what each model says {views}")
    add("--file-ids", action="store_true", help="NAME_label.png in the ids of the training files, by their label map")
    add("--export", metavar="FILE.pt2", help="torch.export program for any of the modalities; about.json beside it")
    args = parser.parse_args(argv)
    foreign = [name for name in ("data", "root", "modalities", "panel", "split", "count") if getattr(args, name)]
    if args.input and foreign:
        parser.error(f"--input has its own frames and modalities: leave out --{' and --'.join(foreign)}.")
    useless = [name for name in ("input", "modalities", "count", "split", "data", "root") if getattr(args, name)]
    if args.file_ids and args.panel and not args.out:
        parser.error("--file-ids has no effect on --panel: leave it out, or add --out.")
    if args.export and useless and not (args.out or args.panel):
        parser.error(f"--{useless[0]} has no effect on --export, which needs no frame: leave it out, or add --out.")
    found = {}
    for modality, _, path in (text.partition("=") for text in args.input):
        if not modality or not os.path.exists(path):
            parser.error(f"'{modality}={path}' must be MODALITY=PATH with a file or folder that exists.")
        if modality in found:
            parser.error("--input names a modality twice; give each one file, or one folder for several frames.")
        if Path(path) in found.values():
            parser.error(f"--input gives {path} to two modalities; each has files of its own.")
        found[modality] = Path(path)
    args.input = found
    args.out = args.out or (None if args.panel or args.export else "predictions")
    return args


def comparison(segmenter: Segmenter, models: list[str], frames: Iterable[tuple], views: list, data: str) -> Image.Image:
    """Rows: frames. Columns: modalities, ground truth, each model's answer from each view, a list of modalities."""
    grid, sides, occurring, meta = [], [], set(), segmenter.meta
    classes, palette = meta["classes"], meta["palette"]
    for frame, images, label in frames:
        working, maps = segmenter.working(images), [(label, "")]
        for model, view in itertools.product(models, views):
            ids = segmenter.answer(model, {m: image for m, image in working.items() if m in view}, frame.name)
            matrix = metrics.confusion(torch.from_numpy(ids), torch.from_numpy(label), len(classes))
            maps.append((ids, f"{metrics.scores(matrix)['miou_occurring']:.0f}" if (label != IGNORED).any() else ""))
        cells = [pictures.Cell(pictures.photograph(image), smooth=m == "rgb") for m, image in images.items()]
        grid.append(cells + [pictures.Cell(pictures.label_map(ids, palette), says) for ids, says in maps])
        occurring.update(*(np.unique(ids).tolist() for ids, _ in maps))
        sides.append(", ".join(word for word in (frame.name, frame.condition, frame.case) if word != "none"))
    missing = [" and ".join(m for m in meta["modalities"] if m not in view) for view in views]
    says = [f"{missed} missing" if missed else "all modalities" for missed in missing]
    heads = [*titles(data, list(images)), "ground truth", *(f"{model}: {view}" for model in models for view in says)]
    key = [(classes[i], tuple(palette[i])) if i < len(classes) else ("ignored", (0, 0, 0)) for i in sorted(occurring)]
    note = "In the corners: mIoU of the frame in per cent, over the classes in it. A missing modality is left out."
    return pictures.draw(grid, heads, sides, key, note)


def main(args: argparse.Namespace) -> None:
    check_output(args.panel, ".png")
    check_output(args.export, ".pt2")
    segmenter = Segmenter(args.checkpoint, None, args.size, args.keep_constant)
    meta, size, final = segmenter.meta, segmenter.size, list(segmenter.models)[-1]
    known = meta["modalities"]
    chosen = list(args.input) or args.modalities or known
    if unknown := [modality for modality in chosen if modality not in known]:
        raise ValueError(f"{args.checkpoint} has no modality {unknown[0]}; it has {', '.join(known)}.")
    if args.depth_unit and ("depth" not in args.input or (meta["data"], meta["depth"]) != ("nyuv2", "raw")):
        raise ValueError("--depth-unit has no effect but on --input depth=... of a model of nyuv2 with raw depth.")
    if args.file_ids and not meta["label_map"]:
        raise ValueError(f"--file-ids has no effect: {args.checkpoint} was trained without --label-map.")

    def frames(modalities: list[str]) -> Iterable[tuple]:
        if args.input:
            return input_frames(args.input, meta, args.depth_unit or 0.001)
        where = meta, args.data, args.root, args.split or "val", size
        return samples(open_data(*where, limit=args.count or 8, modalities=modalities))

    if args.checkpoint.is_dir():
        say(f"{final} answers, the last model in {args.checkpoint}")
    dead = []  # frames that nothing is written for
    if args.panel:
        views = [known, chosen] if args.modalities else [view for view in (known, known[1:], known[2:]) if view]
        models = [name for name in segmenter.models if name != "robust" or final == "robust"]  # the student's start
        shown = comparison(segmenter, models, frames(known), views, args.data or meta["data"])
        write_picture(args.panel, shown)
        say(f"{args.panel} shows {' and '.join(models)}")
    if args.out:
        folder, ids_of = Path(args.out), np.arange(256).astype(np.uint8)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is a file; give a folder.")
        data, root = args.data or meta["data"], args.root or meta["root"]
        if not args.input and data == "folder" and folder.resolve().is_relative_to(Path(root or os.devnull).resolve()):
            raise ValueError(f"--out {folder} is in the folder of the data, where it is a modality; choose another.")
        if args.file_ids:
            table = label_table(meta["label_map"], len(meta["classes"]))
            ids_of = np.array([np.flatnonzero(table == k)[:1].sum() for k in range(len(meta["classes"]))])
            ids_of = ids_of.astype(np.uint8 if ids_of.max() < 256 else np.uint16)
        for frame, images, _ in frames(chosen):
            working = segmenter.working(images)
            if not working:
                dead.append(frame.name)
                continue
            ids = segmenter.answer(final, working, frame.name)
            colour = pictures.label_map(ids, meta["palette"])
            overlay = Image.blend(pictures.photograph(next(iter(working.values()))), colour, 0.5)
            file = folder / frame.name
            file.parent.mkdir(parents=True, exist_ok=True)
            for kind, image in (("label", Image.fromarray(ids_of[ids])), ("colour", colour), ("overlay", overlay)):
                write_picture(f"{file}_{kind}.png", image)
            missing = [m + " (constant)" * (m in images) for m in known if m not in working] or ["none"]
            say(f"{file}_*.png: {', '.join(working)}; missing {', '.join(missing)}")
    if args.export:
        export(segmenter.models[final].cpu(), meta, size, args.export)
    if dead:
        what = f"nothing is written for {len(dead)} frame(s) without an image that varies, such as {dead[0]}"
        raise ValueError(f"{what}; --keep-constant takes constant ones as well.")


if __name__ == "__main__":
    sys.exit(runs.guarded(main, options()))
