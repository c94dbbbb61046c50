"""Draws every figure of the docs but the panels, which predict.py draws.

    python -m benchmarks.figures pipeline --out docs/pipeline.png                            # both stages, with shapes
    python -m benchmarks.figures derived data/NYUDepthv2 --out docs/derived.png              # real frames
    python -m benchmarks.figures prototypes runs/demo --out docs/prototypes.png    # do the modalities agree on a class?
    python -m benchmarks.figures selection runs/demo --out docs/selection.png      # where the FSM takes the teacher
    python -m benchmarks.figures lost runs/demo/results.json --out docs/lost.png   # mIoU over lost modalities
    python -m benchmarks.figures curves runs/demo/log.jsonl --out docs/curves.png  # losses and mIoU while training
    python -m benchmarks.figures sweep benchmarks/results/synthetic-segformer_tiny.json --out docs/sweep.png
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import kernels
from data import normalise, open_dataset
from engine.files import check_output, write_picture
from engine.pictures import Cell, draw, photograph
from engine.runs import guarded
from engine.subsets import all_subsets, present_of, subset_outputs
from engine.trained import load_models, open_data, titles
from hpdm import labels_at

INK, PALE, GRID = (40, 40, 40), (110, 110, 110), (225, 225, 225)
COLOURS = {"teacher": (40, 90, 190), "robust": (200, 60, 40), "fsm": (150, 120, 40), "student": (40, 140, 70)}


def chart(title: str, x_label: str, ticks: dict[float, str], series: dict[str, list], colours: dict) -> Image.Image:
    """Lines over x, at most eight, their legend below. ticks: x -> text. series: name -> [(x, values)]; of several
    values at an x the line shows the mean, a band the range. colours: of each name."""
    series = {name: points for name, points in series.items() if points}
    shown = [value for points in series.values() for _, values in points for value in values]
    if not shown:
        raise ValueError(f"nothing to draw for {title}: the file does not hold these numbers.")
    step = next(m * 10**e for e in range(-3, 9) for m in (1, 2, 5) if max(shown) - min(shown) <= 6 * m * 10**e)
    low = math.floor(min(shown) / step)  # the axis goes from low * step to high * step
    high = max(math.ceil(max(shown) / step), low + 1)
    left, top, right, bottom, first, last = 120, 120, 1480, 700, min(ticks), max(ticks)
    image = Image.new("RGB", (1520, bottom + 340), "white")  # as many rows for the legend as may be needed
    pen, font, small = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(36), ImageFont.load_default(32)

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + 50 + (x - first) / (last - first or 1) * (right - left - 100)
        return across, bottom - (y / step - low) / (high - low) * (bottom - top)

    pen.text((left, 48), title, INK, ImageFont.load_default(44), "lm")
    pen.text(((left + right) / 2, bottom + 84), x_label, INK, font, "mm")
    for n in range(low, high + 1):
        y = at(first, n * step)[1]
        pen.line((left, y, right, y), GRID, 2)
        pen.text((left - 16, y), f"{n * step:g}", PALE, small, "rm")
    for x, text in ticks.items():
        pen.text((at(x, 0)[0], bottom + 36), text, PALE, small, "mm")
    for i, (name, points) in enumerate(series.items()):
        colour, line = colours[name], [at(x, fmean(values)) for x, values in points]
        pen.polygon([at(x, max(v)) for x, v in points] + [at(x, min(v)) for x, v in points[::-1]], (*colour, 40))
        pen.line(line, colour, 6, "curve")
        for point in line if len(line) < 30 else ():
            pen.circle(point, 9, colour)
        x, y = left + 690 * (i % 2), bottom + 150 + 50 * (i // 2)
        pen.line((x, y, x + 60, y), colour, 8)
        pen.text((x + 80, y), name, INK, font, "lm")
    return image


def sweep(file: Path) -> Image.Image:
    """mIoU over the weight of HPDM, with both matchings; a JSON file of benchmarks.reproduce --rows main,sweep."""
    results, charts = json.loads(file.read_text()), []
    scores, alpha = results.get("scores", {}), results.get("values", {}).get("alpha", 0)
    lines = {"random matching (the paper's)": ["kl", "random_0.1", "random_1", "random_5", "hpdm"],
             "same-modality matching": ["kl", "same_0.1", "same_1", "same_5", "same"],
             "modalities dropped, CE only": ["dropped"] * 5, "AnySeg's losses": ["anyseg"] * 5}  # fmt: skip
    colours = dict(zip(lines, (COLOURS[name] for name in ("robust", "teacher", "student", "fsm")), strict=True))
    ticks = dict(enumerate(("0", "0.1", "1", "5", f"{alpha:.3g}")))
    for column, what in (("full", "all modalities"), ("missing", "mean of the subsets with some missing")):
        values = {row: [seed[column] for seed in seeds.values()] for row, seeds in scores.items() if seeds}
        series = {name: [(i, values[row]) for i, row in enumerate(rows) if row in values]
                  for name, rows in lines.items()}  # fmt: skip
        charts.append(chart(f"mIoU in per cent, {what}", "alpha; 0: KL alone, last: published", ticks, series, colours))
    return Image.fromarray(np.hstack(charts))


def lost(file: Path) -> Image.Image:
    """Mean mIoU over the subsets in which 0, 1, 2 ... modalities are lost; a JSON file of evaluate.py."""
    results, series, ticks = json.loads(file.read_text()).get("results", {}), {}, {}
    for model in (name for name in COLOURS if "any" in results.get(name, {})):
        scores, values = results[model]["any"].values(), {}
        modalities = len(scores).bit_length()  # 15 subsets of 4
        for subset, score in zip(all_subsets(modalities), scores, strict=True):
            values.setdefault(modalities - len(subset), []).append(score["miou_published"])
        series[model] = [(n, [fmean(values[n])]) for n in sorted(values)]
        ticks = {n: f"{n} of {modalities}" for n in values}
    return chart("mIoU in per cent, mean over the subsets", "modalities lost", ticks, series, COLOURS)


def curves(file: Path) -> Image.Image:
    """Losses and validation mIoU of all phases of a run, one after the other; its log.jsonl."""
    losses, scores, colours, begun, now = {}, {}, {}, {}, 0
    for line in map(json.loads, file.read_text().splitlines()):
        phase = line["phase"]
        now = begun.setdefault(phase, now) + line["step"]  # steps since the run began
        if "lr" in line:  # a report, its losses stand before the learning rate
            terms = list(line.values())[3 : list(line).index("lr")]
            losses.setdefault(phase, []).append((now, [sum(terms)]))
            continue
        colours[f"{phase}, all"] = COLOURS[phase]
        colours[f"{phase}, some missing"] = tuple((255 + c) // 2 for c in COLOURS[phase])
        full = line.get("miou_full", line["miou"])  # the teacher is validated on all modalities alone
        scores.setdefault(f"{phase}, all", []).append((now, [full]))
        if "miou_missing" in line:
            scores.setdefault(f"{phase}, some missing", []).append((now, [line["miou_missing"]]))
    ticks, x_label = {0: "0", now: str(now)}, "steps, all phases one after the other"
    left = chart("Loss, sum of its terms", x_label, ticks, losses, COLOURS)
    right = chart("Validation mIoU in per cent", x_label, ticks, scores, colours)
    return Image.fromarray(np.hstack((left, right)))


@torch.inference_mode()
def prototypes(run: Path) -> Image.Image:
    """Cosine between two modalities' class prototypes (eq. 4, each the mean over 64 frames), mean over the classes.
    Their mean over the classes is subtracted first: the softmax of the loss does not see it either."""
    models, _, meta = load_models(run, torch.device("cpu"))
    dataset = open_data(meta, None, None, "val", meta["val_size"], limit=64)
    names, k = dataset.modalities, len(dataset.classes)
    pairs = list(itertools.combinations(range(len(names)), 2))
    by_stage, by_pair = {}, {}
    for model_name, model in models.items():
        sums, counts = [0.0] * 4, [0.0] * 4
        for image, label, _ in dataset:
            features = model(normalise(image[None], names, dataset.normalisation)).per_modality  # 4 x (1, M, C, h, w)
            for i, f in enumerate(features):
                mean, count = kernels.prototype_pool(f, labels_at(label[None].long(), f.shape[-2:]), k)
                sums[i] += mean[0] * count[0, :, None]  # (M, K, C)
                counts[i] += count[0]  # (K,)
        p = [(total / count[:, None])[:, count > 0] for total, count in zip(sums, counts, strict=True)]
        p = [torch.nn.functional.normalize(x - x.mean(1, keepdim=True), dim=2) for x in p]
        cosines = [[float((x[m] * x[n]).sum(1).mean()) for m, n in pairs] for x in p]  # stages x pairs
        by_stage[model_name] = [(stage, [fmean(row)]) for stage, row in enumerate(cosines, 1)]
        by_pair[model_name] = [(i, [cosine]) for i, cosine in enumerate(cosines[-1])]
    ticks, title = {i: str(i) for i in range(1, 5)}, "Cosine between two modalities' prototypes"
    left = chart(title, "stage, mean over the pairs", ticks, by_stage, COLOURS)
    ticks = {i: f"{names[m]}-{names[n]}" for i, (m, n) in enumerate(pairs)}
    right = chart("The same at stage 4", "pair of modalities", ticks, by_pair, COLOURS)
    return Image.fromarray(np.hstack((left, right)))


@torch.inference_mode()
def selection(run: Path) -> Image.Image:
    """Where the FSM takes the teacher: by its own rule and the published one, with and without the first modality."""
    models, fsm, meta = load_models(run, torch.device("cpu"))
    if not fsm or not {"teacher", "robust"} <= set(models):
        raise ValueError(f"{run} must hold teacher.pt, robust.pt and fsm.pt: give a run that has finished both stages.")
    dataset = open_data(meta, None, None, "val", meta["val_size"], limit=1)
    names, (image, _, frame), grid, sides = dataset.modalities, dataset[0], [], []
    scene = photograph(image[0].permute(1, 2, 0).numpy())
    images, every = normalise(image[None], names, dataset.normalisation), tuple(range(len(names)))
    for rule, subset in itertools.product(dict.fromkeys((fsm.rule, "hard")), (every, every[1:])):
        sources = [next(subset_outputs(models[name], images, [subset])) for name in ("teacher", "robust")]
        selected = fsm(sources, present_of(subset, images.shape[:2]), rule)
        grid.append([Cell(scene)])
        for x, teacher, robust in zip(*((*out.fused, out.logits) for out in (selected, *sources)), strict=True):
            apart = teacher - robust  # (1, C, h, w); x = robust + share * apart
            share = ((x - robust) * apart).sum(1)[0] / apart.square().sum(1)[0].clamp(min=1e-12)  # (h, w)
            grey = Image.fromarray((255 * share.clamp(0, 1)).byte().numpy())
            picture = ImageOps.colorize(grey, COLOURS["robust"], COLOURS["teacher"]).resize(scene.size, 0)  # nearest
            grid[-1].append(Cell(picture, f"{100 * share.mean():.0f} %"))
        sides.append(f"rule {rule}: {', '.join(names[m] for m in subset)}")
    columns = [f"{names[0]} of {frame}", *(f"stage {i}" for i in range(1, 5)), "logits"]
    key = [("the teacher's feature", COLOURS["teacher"]), ("the robust model's", COLOURS["robust"])]
    return draw(grid, columns, sides, key, "In the corners: mean weight of the teacher. Rule hard: the published one.")


def derived(root: Path) -> Image.Image:
    """Three real frames of NYU Depth v2 with the event and lidar images that are computed from them."""
    names, grid = ["rgb", "depth", "event", "lidar"], []
    dataset = open_dataset("nyuv2", root, "test", names, None, depth="raw")
    dataset.frames = [f for f in dataset.frames if f.name in ("0015", "0411", "1347")] or dataset.frames[:3]
    for images, _, _ in dataset:
        images = images.float() / (255 if images.dtype == torch.uint8 else 1)
        grid.append([Cell(photograph(image.transpose(1, 2, 0))) for image in images.numpy()])
    return draw(grid, titles("nyuv2", names), [frame.name for frame in dataset.frames], note=(
        "Real frames of NYU Depth v2. Event and lidar are derived: computed from rgb and depth, not measured. "
        "Depth: far is bright. Events: red is brighter, green darker after a small motion. Lidar: near is bright."))


FROZEN, TRAINED, TENSOR, LOSS = (222, 232, 245), (253, 231, 205), (246, 246, 246), (250, 222, 222)
COLUMNS = [(30, 250), (370, 250), (740, 300), (1130, 220), (1430, 190)]  # left and width
BOXES = {  # column, middle, colour, title, lines below it
    "images": (0, 145, TENSOR, "images", "all M modalities", "(B, M, 3, H, W)"),
    "some": (0, 330, TENSOR, "the same images", "present (B, M): a random", "subset for each sample"),
    "T": (1, 145, FROZEN, "teacher T", "frozen"),
    "R": (1, 330, TRAINED, "robust model R", "trained, starts as T"),
    "out T": (2, 145, TENSOR, "logits (B, K, H, W)", "features by modality", "4 x (B, M, C, h, w)"),
    "out R": (2, 330, TENSOR, "logits (B, K, H, W)", "features by modality", "4 x (B, M, C, h, w)"),
    "P T": (3, 180, TENSOR, "prototypes", "(B, M, K, C), eq. 4"),
    "P R": (3, 295, TENSOR, "prototypes", "(B, M, K, C), eq. 4"),
    "KL": (4, 105, LOSS, "KL(T || R)"),
    "hpdm": (4, 238, LOSS, "L_hpdm", "m of R against", "pi(m) of T, eq. 5"),
    "CE": (4, 365, LOSS, "CE (OHEM)", "against the labels"),
    "images 2": (0, 680, TENSOR, "images", "present (B, M): half of", "the samples complete"),
    "T 2": (1, 565, FROZEN, "teacher T", "frozen"),
    "R 2": (1, 695, FROZEN, "robust model R", "frozen"),
    "S": (1, 845, TRAINED, "student S", "trained, starts as R;", "alone at inference"),
    "out T 2": (2, 565, TENSOR, "logits (B, K, H, W)", "fused features", "4 x (B, C, h, w)"),
    "out R 2": (2, 695, TENSOR, "logits (B, K, H, W)", "fused features", "4 x (B, C, h, w)"),
    "out S": (2, 845, TENSOR, "logits (B, K, H, W)", "fused features", "4 x (B, C, h, w)"),
    "FSM": (3, 630, TRAINED, "FSM", "scores s (B, 1, h, w);", "the larger (1 + s) f", "is selected"),
    "fit": (4, 755, LOSS, "KL + distance", "to what the FSM", "selects"),
    "CE 2": (4, 875, LOSS, "CE (OHEM)", "against the labels"),
}
ARROWS = """images>T, some>R, T>out T, R>out R, out T>P T, out R>P R, P T>hpdm, P R>hpdm, out T>KL, out R>KL, out R>CE,
images 2>T 2, images 2>R 2, images 2>S, T 2>out T 2, R 2>out R 2, S>out S, out T 2>FSM, out R 2>FSM, FSM>fit,
out S>fit, out S>CE 2"""


def pipeline() -> Image.Image:
    """Both stages: teacher, robust model, feature selection and student, with the shapes that pass between them."""
    image = Image.new("RGB", (3300, 1860), "white")  # the boxes' places and sizes twice
    pen, font, big = ImageDraw.Draw(image), ImageFont.load_default(38), ImageFont.load_default(50)
    for arrow in ARROWS.split(","):
        source, target = arrow.strip().split(">")
        (column, y0, *_), (next_column, y, *_) = BOXES[source], BOXES[target]
        x0, x = sum(COLUMNS[column]), COLUMNS[next_column][0]
        bend = x0 + (20 if source == "out T" else 45)  # two sources whose lines must not meet
        pen.line([2 * v for v in (x0, y0, bend, y0, bend, y, x - 10, y)], INK, 6, "curve")
        pen.polygon([2 * v for v in (x, y, x - 14, y - 7, x - 14, y + 7)], INK)
    for column, middle, colour, title, *lines in BOXES.values():
        x, width = COLUMNS[column]
        height = 50 + 26 * len(lines)
        corners = [2 * v for v in (x, middle - height / 2, x + width, middle + height / 2)]
        pen.rounded_rectangle(corners, 24, colour, PALE, 3)
        for i, line in enumerate((title, *lines)):
            place = 2 * x + width, 2 * middle - 26 * len(lines) + 52 * i
            pen.text(place, line, PALE if i else INK, font if i else big, "mm")
    pen.text((60, 70), "Stage 1: Hybrid Prototype Distillation", INK, ImageFont.load_default(60), "lm")
    pen.text((60, 980), "Stage 2: Feature Selection, and one student", INK, ImageFont.load_default(60), "lm")
    return image.reduce(2)


def main(argv: list[str] | None = None) -> None:
    figures = {f.__name__: f for f in (pipeline, derived, prototypes, selection, lost, curves, sweep)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=figures)
    parser.add_argument("source", type=Path, nargs="?", help="what to draw it from, as above; the pipeline needs none")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    args = parser.parse_args(argv)
    if (args.source is None) != (args.figure == "pipeline"):
        parser.error(f"{args.figure} is drawn from {'nothing' if args.source else 'a file or folder: name it'}.")
    check_output(args.out, ".png")
    figure = figures[args.figure](*([args.source] if args.source else []))
    figure = ImageOps.expand(figure.crop(ImageOps.invert(figure).getbbox()), 20, "white")  # the same margin all round
    write_picture(args.out, figure.quantize(160, dither=Image.Dither.NONE))


if __name__ == "__main__":
    sys.exit(guarded(main))
