"""Segments pictures with a trained model, from whichever of its sensors there are.

    python predict.py runs/deliver/student.pt --input rgb=a.png depth=b.png --out predictions
    python predict.py runs/deliver/student.pt --input rgb=my/rgb depth=my/depth      # folders, matched by file stem
    python predict.py runs/deliver/student.pt --data deliver --split val --count 8 --sensors event,lidar
    python predict.py runs/demo --data synthetic --count 4 --panel panel.png         # teacher and student side by side
    python predict.py runs/demo/student.pt --export student.pt2 --sensors rgb,depth  # a torch.export program

Writes, at the size of the input, for every frame: NAME_label.png (class ids, 8 bit), NAME_colour.png (the
checkpoint's palette), NAME_overlay.png (on the first sensor given) and NAME_panel.png. A run folder stands for its
student (or its robust model while there is none); --panel shows its teacher as well.
"""

import argparse


def sensor_file(text: str) -> tuple[str, str]:
    """An argparse type: 'sensor=path'."""
    sensor, equals, path = text.partition("=")
    if not (sensor and equals and path):
        raise argparse.ArgumentTypeError(f"'{text}' must be SENSOR=PATH, e.g. rgb=a.png")
    return sensor, path


def image_size(text: str) -> int | tuple[int, int]:
    """An argparse type: '512', or '480x640' for rows x columns."""
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2 or min(sides) < 32:
        raise argparse.ArgumentTypeError(f"'{text}' must be S or HxW, with sides of at least 32 pixels")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def options(argv: list[str] | None = None) -> argparse.Namespace:
    from engine.options import RECIPES, Parser, names, positive

    parser = Parser("predict.py", __doc__)
    parser.add_argument("checkpoint", help="model file, or run folder for its final model")
    group = parser.add_argument_group("input", "your files, or a data set (None: what the checkpoint was trained on)")
    group.add_argument("--input", nargs="+", type=sensor_file, metavar="SENSOR=PATH",
                       help="aligned files of a frame, or folders of them, decoded as in training; other sensors are "
                            "missing")  # fmt: skip
    group.add_argument("--data", choices=RECIPES)
    group.add_argument("--root", help="folder of the data set")
    group.add_argument("--split", choices=("train", "val", "test"), help="None: val")
    group.add_argument("--count", type=positive(int), help="frames, spread over the split. None: 8")
    group.add_argument("--sensors", type=names, help="use only these, by comma, the others count as missing. None: all")
    group.add_argument("--size", type=image_size,
                       help="shorter side, or HxW, that the network sees; outputs keep the frame's. None: the frame's, "
                            "for synthetic and --export the training crop's")  # fmt: skip
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", help="pictures of each frame. None: predictions, if no other is asked")
    group.add_argument("--panel", metavar="FILE",
                       help="one picture: frames by row; sensors, ground truth, and what each model says with all "
                            "sensors and with --sensors (None: without the first, and the first two)")  # fmt: skip
    group.add_argument("--export", metavar="FILE.pt2",
                       help="torch.export program: images (B, sensors, 3, H, W) as data.normalise gives them -> logits "
                            "(B, classes, H, W), B free; compared with the model after writing")  # fmt: skip
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    o = parser.parse_args(argv)
    if o.input and (o.data or o.root or o.split or o.count or o.panel or o.sensors):
        parser.error("--input says by itself which frames and sensors: leave out --data, --root, --split, --count, "
                     "--sensors and --panel.")  # fmt: skip
    o.split, o.count = o.split or "val", o.count or 8
    if o.input and len({sensor for sensor, _ in o.input}) < len(o.input):
        parser.error("--input names a sensor twice; give each sensor one file, or one folder for several frames.")
    if o.panel and not o.panel.lower().endswith((".png", ".jpg")):
        parser.error(f"--panel {o.panel} must end in .png or .jpg.")
    if o.export and not o.export.endswith(".pt2"):
        parser.error(f"--export {o.export} must end in .pt2, the file type of torch.export.")
    if not (o.out or o.panel or o.export):
        o.out = "predictions"
    return o


if __name__ == "__main__":
    OPTIONS = options()  # before torch is imported, so that --help and typing errors answer at once

import copy  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from typing import NamedTuple  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from data import IGNORED, SUFFIXES, Frame, FrameDataset, normalise, open_dataset  # noqa: E402
from engine import (
    pictures,  # noqa: E402
    runs,  # noqa: E402
)
from engine.checkpoint import load_model, read  # noqa: E402
from engine.options import ROOTS  # noqa: E402
from model import CMNeXt, MSegFormer, present_of  # noqa: E402
from segformer import MIN_SIDE, upsample  # noqa: E402

ROLES = {"teacher": "teacher, trained with all sensors", "robust": "robust model, trained for missing sensors",
         "student": "student, trained for missing sensors"}  # fmt: skip


class Sample(NamedTuple):
    name: str
    kind: str  # weather and failure, as far as they are known
    given: list[str]  # G sensors
    shown: Tensor  # (G, 3, H, W) in 0..1, at the frame's own size
    network: Tensor  # (G, 3, h, w) normalised, what the model sees
    label: np.ndarray | None  # (H, W) uint8


def main(o) -> None:
    if o.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    device = torch.device("cuda" if o.device != "cpu" and torch.cuda.is_available() else "cpu")
    models, meta = load_models(o.checkpoint, device)
    for sensor in o.sensors or [sensor for sensor, _ in o.input or ()]:
        if sensor not in meta["modalities"]:
            raise ValueError(f"sensor '{sensor}' is unknown to {o.checkpoint}: it has {', '.join(meta['modalities'])}.")
    if o.export:
        sensors = [m for m in meta["modalities"] if m in (o.sensors or meta["modalities"])]
        export(list(models.values())[-1].cpu(), meta, sensors, o.size or meta["size"], pathlib.Path(o.export))
    if o.panel:
        draw_comparison(models, meta, samples(o, meta, meta["modalities"]), o.sensors, pathlib.Path(o.panel))
    if o.out:
        folder = pathlib.Path(o.out)
        folder.mkdir(parents=True, exist_ok=True)
        written = set()
        for sample in samples(o, meta, o.sensors or meta["modalities"]):
            if sample.name in written:
                raise ValueError(f"two frames would both be written to {folder} as {sample.name}_*; rename one.")
            written.add(sample.name)
            ids = segment(list(models.values())[-1].to(device), sample, sample.given)
            write_pictures(folder, sample, ids, meta)
            missing = [m for m in meta["modalities"] if m not in sample.given]
            print(f"{sample.name}: {', '.join(sample.given)}" + (f"; missing {', '.join(missing)}" if missing else ""))
        print(f"labels, colours, overlays and panels are in {folder}")


def load_models(path: str, device: torch.device) -> tuple[dict[str, nn.Module], dict]:
    """A model file as {its name: model}; a run folder as its teacher and then its student, or robust model."""
    files = [pathlib.Path(path)]
    if files[0].is_dir():
        found = {name: files[0] / f"{name}.pt" for name in ROLES if (files[0] / f"{name}.pt").exists()}
        if "student" in found:
            found.pop("robust", None)  # the student's start, and much like it
        if not found:
            raise FileNotFoundError(f"{path} holds no teacher.pt, robust.pt or student.pt.")
        files = list(found.values())
    models, meta = {}, None
    for file in files:
        if "rule" in read(file).get("meta", {}):
            raise ValueError(f"{file} is a feature selection, no model of its own; give a student.pt or a run folder.")
        models[file.stem], meta = load_model(file, device, meta and {k: meta[k] for k in ("classes", "modalities")})
    return models, meta


# ---- frames ---------------------------------------------------------------------------------------------------------


def samples(o, meta: dict, sensors: list[str]) -> Iterator[Sample]:
    """The frames of --input, or of the data set with these sensors, decoded and scaled as in training."""
    if o.input:
        # Files of a data set keep its decoding, e.g. MUSES' 16-bit ranges; exported painted scenes are a plain folder.
        decoding = "folder" if meta["data"] == "synthetic" else meta["data"]
        for name, files in input_frames(o.input).items():
            frame = Frame(name, "none", "none", tuple(files.values()))
            dataset = FrameDataset(decoding, [frame], meta["classes"], meta["palette"], list(files), size=None,
                                   augment=False, seed=0, table=None)  # fmt: skip
            dataset.dtype, dataset.normalisation = np.float32, meta["normalisation"]
            yield sample_of(dataset, 0, o.size)
        return
    data, painted = o.data or meta["data"], (o.data or meta["data"]) == "synthetic"
    root = o.root or (meta["root"] if data == meta["data"] else ROOTS.get(data))
    dataset = open_dataset(data, root, o.split, sensors, size=(o.size or meta["size"]) if painted else None,
                           limit=o.count, depth=meta["depth"],
                           label_map=meta["label_map"] if data == "folder" else None)  # fmt: skip
    if list(dataset.classes) != meta["classes"]:
        raise ValueError(f"{o.checkpoint} knows the classes {', '.join(meta['classes'])}; "
                         f"{data} has {', '.join(dataset.classes)}.")  # fmt: skip
    dataset.normalisation = meta["normalisation"]  # the model's, should the data set's differ
    for i in range(len(dataset)):
        yield sample_of(dataset, i, None if painted else o.size)


def input_frames(given: list[tuple[str, str]]) -> dict[str, dict[str, pathlib.Path]]:
    """Frame name -> sensor -> file. In folders, files of the same stem are a frame, which may lack some sensors."""
    paths = {sensor: pathlib.Path(path) for sensor, path in given}
    for sensor, path in paths.items():
        if not path.exists():
            raise FileNotFoundError(f"--input {sensor}={path}: no such file or folder.")
    folders = [path for path in paths.values() if path.is_dir()]
    if not folders:
        return {next(iter(paths.values())).stem: paths}
    if len(folders) < len(paths):
        raise ValueError(f"--input mixes files and folders ({folders[0]} is a folder); give one kind for all sensors.")
    frames: dict[str, dict[str, pathlib.Path]] = {}
    for sensor, folder in paths.items():
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        if others := [path.name for path in files if path.suffix.lower() not in SUFFIXES]:
            print(f"{folder}: left out {others[0]}{f' and {len(others) - 1} more' if others[1:] else ''}, which end in "
                  f"none of {', '.join(SUFFIXES)}", file=sys.stderr)  # fmt: skip
        if len(others) == len(files):
            raise ValueError(f"--input {sensor}={folder} holds no file that ends in {', '.join(SUFFIXES)}.")
        for path in files:
            if path.suffix.lower() in SUFFIXES and frames.setdefault(path.stem, {}).setdefault(sensor, path) != path:
                raise ValueError(f"{path} and {frames[path.stem][sensor]} are of the same frame; remove one of them.")
    if not frames or len(paths) > 1 and max(map(len, frames.values())) == 1:
        raise ValueError(f"--input: {' and '.join(map(str, paths.values()))} have no file stem in common; name the "
                         f"files of a frame alike, with an ending of {', '.join(SUFFIXES)}.")  # fmt: skip
    return dict(sorted(frames.items()))


def sample_of(dataset: FrameDataset, index: int, size: int | tuple[int, int] | None) -> Sample:
    """size: what the network sees, as in `open_dataset`; None: the frame's own, or what it needs at least."""
    shown, label, name = dataset[index]
    if not size and min(shown.shape[-2:]) < MIN_SIDE:
        size = MIN_SIDE
    resized = copy.copy(dataset)
    resized.size = size
    network = normalise(resized[index][0] if size else shown, dataset.modalities, dataset.normalisation)
    frame = dataset.frames[index]
    kind = ", ".join(word for word in (frame.condition, frame.case) if word != "none")
    known = frame.label is not None or dataset.name == "synthetic"
    return Sample(name.replace("/", "_"), kind or frame.name.split("/")[-1], list(dataset.modalities),
                  shown.float() / 255 if shown.dtype == torch.uint8 else shown, network,
                  label.numpy().astype(np.uint8) if known else None)  # fmt: skip


@torch.inference_mode()
def segment(model: nn.Module, sample: Sample, sensors: list[str]) -> np.ndarray:
    """Class ids (H, W) uint8 at the frame's own size, from these of its sensors."""
    device = next(model.parameters()).device
    images = torch.zeros(1, len(model.modalities), *sample.network.shape[1:])  # (1, M, 3, h, w)
    for sensor in sensors:
        images[0, model.modalities.index(sensor)] = sample.network[sample.given.index(sensor)]
    present = present_of(tuple(map(model.modalities.index, sensors)), images.shape[:2])  # (1, M)
    logits = upsample(model(images.to(device), present).logits, sample.shown.shape[-2:])  # (1, K, H, W)
    return logits.argmax(1)[0].to(torch.uint8).cpu().numpy()


# ---- pictures -------------------------------------------------------------------------------------------------------


def sensor_cells(sample: Sample) -> list[pictures.Cell]:
    sparse = ("event", "lidar", "radar")  # drawn pixel by pixel
    pairs = zip(sample.given, sample.shown, strict=True)
    return [pictures.Cell(pictures.photograph(image.numpy()), smooth=sensor not in sparse) for sensor, image in pairs]


def scored(ids: np.ndarray, sample: Sample, meta: dict) -> pictures.Cell:
    """A prediction, with the share of the labelled pixels that it has right."""
    right = (ids == sample.label)[sample.label != IGNORED] if sample.label is not None else np.empty(0)
    return pictures.Cell(pictures.label_map(ids, meta["palette"]), f"{100 * right.mean():.0f} %" if right.size else "")


def write_pictures(folder: pathlib.Path, sample: Sample, ids: np.ndarray, meta: dict) -> None:
    """NAME_label.png, NAME_colour.png, NAME_overlay.png and NAME_panel.png."""
    cells, colour = sensor_cells(sample), pictures.label_map(ids, meta["palette"])
    overlay = Image.blend(cells[0].image, colour, 0.5)
    truth = [] if sample.label is None else [pictures.Cell(pictures.label_map(sample.label, meta["palette"]))]
    titles = [*sample.given, *["ground truth"] * len(truth), "prediction", f"prediction on {sample.given[0]}"]
    drawn = pictures.draw([[*cells, *truth, scored(ids, sample, meta), pictures.Cell(overlay, smooth=True)]], titles,
                       key=pictures.legend([ids, *[sample.label] * len(truth)], meta["classes"], meta["palette"]),
                       note="In the corner: share of the pixels that are right." if truth else "")  # fmt: skip
    for kind, image in (("label", Image.fromarray(ids)), ("colour", colour), ("overlay", overlay), ("panel", drawn)):
        image.save(folder / f"{sample.name}_{kind}.png")


def draw_comparison(models: dict, meta: dict, frames: Iterator[Sample], sensors: list[str] | None, file: pathlib.Path):
    """Rows: frames. Columns: sensors, ground truth, every model with all sensors and with some missing."""
    known = meta["modalities"]
    subsets = [known, *([sensors] if sensors else [known[1:], known[2:] or known[:1]])]
    subsets = [s for i, s in enumerate(subsets) if i == 0 or 0 < len(s) < len(known)]
    missing = [" and ".join(m for m in known if m not in s) for s in subsets]
    titles = [f"{names} missing" if names else "all sensors" for names in missing]
    grid, sides, maps = [], [], []
    for sample in frames:
        answers = [segment(model, sample, subset) for model in models.values() for subset in subsets]
        truth = np.full(answers[0].shape, IGNORED, np.uint8) if sample.label is None else sample.label
        cells = [pictures.Cell(pictures.label_map(truth, meta["palette"])), *(scored(ids, sample, meta) for ids in answers)]
        grid.append([*sensor_cells(sample), *cells])
        sides.append(sample.kind)
        maps += [truth, *answers]
    groups = [("what the sensors see", len(known)), ("", 1)]
    groups += [(ROLES.get(name, name), len(subsets)) for name in models]
    drawn = pictures.draw(grid, [*known, "ground truth", *titles * len(models)], groups, sides,
                       pictures.legend(maps, meta["classes"], meta["palette"]), "In the corners: share of the pixels that "
                       "are right. A missing sensor is left out: the same model answers from the others.")  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(file)
    print(f"{file} shows {'; '.join(sides)} by {' and '.join(models)}")


# ---- torch.export ---------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """What is exported: (B, sensors, 3, H, W) normalised -> (B, K, H, W), the sensors fixed and all there."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, sensors: list[str]):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.model.modalities = sensors
        rows = [model.modalities.index(sensor) - 1 for sensor in sensors[1:]]  # of the auxiliary sensors
        if isinstance(model, CMNeXt) and len(sensors) < len(model.modalities):
            if sensors[0] != model.modalities[0] or not rows:
                raise ValueError(f"a CMNeXt program needs {model.modalities[0]} and at least one more sensor, but "
                                 f"--sensors has {', '.join(sensors)}.")  # fmt: skip
            for extra in self.model.aux:  # its own norm and score for each sensor: the others go
                extra.embed.weight = nn.Parameter(extra.embed.weight[rows])
                extra.embed.bias = nn.Parameter(extra.embed.bias[rows])
                extra.hub.depthwise = nn.ModuleList(extra.hub.depthwise[row] for row in rows)
                extra.hub.pointwise = nn.ModuleList(extra.hub.pointwise[row] for row in rows)
        if model.decoder.film is not None:  # its sensors are fixed now, so what depends on them goes into the weights
            columns = [model.modalities.index(sensor) for sensor in sensors]
            present, decoder = present_of(tuple(columns), (1, len(model.modalities))), self.model.decoder
            scale, shift = decoder.scale_and_shift(present)[:, 0]
            decoder.bn.bias.copy_(decoder.bn.bias * scale + shift)
            decoder.bn.weight.mul_(scale)
            decoder.film = None
            if isinstance(model, MSegFormer):
                logits = model.fusion_logits.new_zeros(len(sensors) + 2, len(sensors))
                logits[-2] = model.fusion_weights(present)[0, columns].log()  # the row of "all sensors are there"
                self.model.fusion_logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


@torch.no_grad()
def export(model: nn.Module, meta: dict, sensors: list[str], size: int | tuple[int, int], file: pathlib.Path) -> None:
    """Writes the program for images of this size, reads it back and compares it with the model and its mask."""
    height, width = (size, size) if isinstance(size, int) else size
    about = {"sensors": sensors, "size": [height, width], "classes": meta["classes"], "palette": meta["palette"]}
    program = torch.export.export(Logits(model, sensors).eval(), (torch.randn(2, len(sensors), 3, height, width),),
                                  dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, file, extra_files={"about.json": json.dumps(about)})
    written, worst, largest = torch.export.load(file).module(), 0.0, 0.0
    subset = tuple(map(meta["modalities"].index, sensors))
    for batch in (1, 3):
        images = torch.randn(batch, len(meta["modalities"]), 3, height, width)
        expected = model(images, present_of(subset, images.shape[:2])).logits
        worst = max(worst, (written(images[:, list(subset)]) - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    if not worst <= 1e-4 * max(1.0, largest):
        raise ValueError(f"{file} differs from the model by {worst:.2g} (logits up to {largest:.2g}); do not use it.")
    print(f"{file}: images (B, {len(sensors)}, 3, {height}, {width}) of {', '.join(sensors)}; differs from the model "
          f"by at most {worst:.2g} at B = 1 and 3 (logits up to {largest:.2g})")  # fmt: skip


if __name__ == "__main__":
    sys.exit(runs.guarded(main, OPTIONS))
