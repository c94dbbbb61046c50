"""Evaluates models on every protocol of the paper: which sensors are missing, how they fail, in which weather.

    python evaluate.py runs/deliver/student.pt --data deliver
    python evaluate.py runs/demo                                    # all models of a run, with switch and FSM ensemble
    python evaluate.py a.pt b.pt --protocol any,emm,rmm,nm,condition,case --json out.json --markdown table.md

    any        every subset of the sensors, the others left out
    emm        every subset, the others' images zero after normalisation; mean and expectation E(p)     (section 5)
    rmm        as emm, each value of a missing sensor zero with probability 0.25, 0.5, 0.75
    nm         all sensors, salt and pepper and Gaussian noise: low, mid, high
    condition  all sensors, by weather;    case   all sensors, by sensor failure

Under emm and rmm the failure is not announced: every sensor is declared present to the models. The switch and the
ensemble's selection do know which sensors work, an advantage in those rows.
Writes nothing but what --json and --markdown name. Seeded per frame: no batch size, worker or process count changes
a number. torchrun --nproc_per_node=N evaluate.py ... shares the frames out.
"""

import argparse
import pathlib

PROTOCOLS = ("any", "emm", "rmm", "nm", "condition", "case")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    from engine.options import RECIPES, Parser, device, names, positive

    parser = Parser("evaluate.py", __doc__)
    parser.add_argument("checkpoint", nargs="+", help="model files, or run folders: all that they hold")
    parser.add_argument("--only", type=names, help="of all the rows that run folders give, these, by comma")
    parser.add_argument("--protocol", type=names, default=["any"], help=f"by comma, of {', '.join(PROTOCOLS)}, or all")
    group = parser.add_argument_group("data", "by default what the first checkpoint was trained on")
    group.add_argument("--data", choices=RECIPES)
    group.add_argument("--root", help="folder of the data set")
    group.add_argument("--split", default="val", choices=("train", "val", "test"), help="papers report val")
    group.add_argument("--size", type=positive(int),
                       help="shorter side in pixels. None: as in validation, at most --val-size of the training")
    group.add_argument("--label-map", help="folder data: label ids to classes, as in training")
    group.add_argument("--skip-broken", type=positive(int, zero=True), default=0, metavar="N",
                       help="go on past at most N broken frames, each is listed")
    group.add_argument("--limit", type=positive(int), help="only N frames, spread evenly")
    group.add_argument("--batch-size", type=positive(int), default=8, help="frames; changes memory and speed only")
    group.add_argument("--workers", type=positive(int, zero=True), default=0, help="loader processes")
    group.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision")
    group.add_argument("--seed", type=positive(int, zero=True), default=0, help="of the rmm and nm corruptions")
    group = parser.add_argument_group("test-time augmentation", "as some papers report; say so beside the numbers")
    group.add_argument("--flip", action="store_true", help="also mirrored, distributions averaged")
    group.add_argument("--scales", default="1", help="image scales to average over, e.g. 0.5,0.75,1,1.25,1.5")
    group.add_argument("--tile", type=positive(int), help="tiles of this side with half overlap, for images that do "
                       "not fit into memory; at least 32")  # fmt: skip
    group = parser.add_argument_group("ensemble", "of a run folder that holds an fsm.pt")
    group.add_argument("--fsm-rule", choices=("hard", "candidate", "score"), help="None: the one it was trained with")
    group.add_argument("--fsm-level", choices=("both", "features", "logits"), default="both", help="what is selected")
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="every score of every column")
    group.add_argument("--markdown", metavar="FILE", help="the printed tables, for a paper or README")
    o = parser.parse_args(argv)
    o.protocol = list(PROTOCOLS) if o.protocol == ["all"] else o.protocol
    if unknown := sorted(set(o.protocol) - set(PROTOCOLS)):
        parser.error(f"--protocol {unknown[0]} is unknown; choose of {', '.join(PROTOCOLS)}, or all.")
    try:
        o.scales = [positive(float)(s) for s in o.scales.split(",")]
    except ValueError:
        parser.error(f"--scales {o.scales} must be numbers above 0, by comma, e.g. 0.5,1,1.5.")
    if o.size and o.size < 32:
        parser.error(f"--size {o.size} is too small: at least 32.")
    for flag, path, ending in (("--json", o.json, ".json"), ("--markdown", o.markdown, ".md")):
        if path and (not path.endswith(ending) or pathlib.Path(path).name == "config.json"):
            parser.error(f"{flag} {path} must end in {ending}, and be no run's config.json.")
        if path and not pathlib.Path(path).parent.is_dir():  # now, not after an hour of evaluation
            parser.error(f"{flag} {path}: its folder does not exist.")
    if o.tile and o.tile < 32:
        parser.error(f"--tile {o.tile} is too small: at least 32.")
    return o


if __name__ == "__main__":
    OPTIONS = options()  # before torch is imported, so that --help and typing errors answer at once

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import metrics  # noqa: E402
from data import normalise, open_dataset, random_missing, sensor_noise  # noqa: E402
from engine import (
    loop,  # noqa: E402
    runs,  # noqa: E402
)
from engine.checkpoint import load_model, read  # noqa: E402
from engine.options import ROOTS  # noqa: E402
from fsm import ensemble_predictor, load_fsm, switch_predictor  # noqa: E402
from model import present_of  # noqa: E402

RMM_RATES = (0.25, 0.5, 0.75)
NM_LEVELS = ("low", "mid", "high")
EMM_ODDS = (0.2, 0.1, 0.05)


def main(o) -> None:
    o.deterministic, o.tensorboard, o.out = False, False, "."
    run = runs.Run(o, "evaluate.py")
    same = ["classes", "modalities", "depth", "normalisation"]
    same += [name for name, given in (("label_map", o.label_map), ("size", o.size), ("val_size", o.size)) if not given]
    rows, meta = load_rows(o.checkpoint, run.device, o.fsm_level, o.fsm_rule, same)
    if unknown := sorted(set(o.only or ()) - set(rows)):
        raise ValueError(f"--only {unknown[0]}: {o.checkpoint[0]} gives no such row, but {', '.join(rows)}.")
    rows = {name: predict for name, predict in rows.items() if not o.only or name in o.only}
    data = o.data or meta["data"]
    trained_here = data == meta["data"]
    size = o.size or (meta["size"] if data == "synthetic" else meta.get("val_size", meta["size"]))
    dataset = open_dataset(data, root=o.root or (meta["root"] if trained_here else ROOTS.get(data)), split=o.split,
                           modalities=meta["modalities"], size=size, limit=o.limit, seed=0, depth=meta["depth"],
                           label_map=o.label_map or (meta["label_map"] if trained_here else None),
                           skip_broken=o.skip_broken)  # fmt: skip
    dataset.normalisation = meta["normalisation"]  # the model's, should the data set's differ
    for problem in dataset.broken:
        run.say(f"left out: {problem}")
    if list(dataset.classes) != meta["classes"]:
        raise ValueError(f"{o.checkpoint[0]} knows the classes {', '.join(meta['classes'])}; "
                         f"{dataset.name} has {', '.join(dataset.classes)}.")  # fmt: skip
    results = {name: evaluate(augmented(predict, o), dataset, o.protocol, run) for name, predict in rows.items()}
    if run.rank:
        return
    text = "\n\n".join(tables(results, dataset, o.protocol))
    about = (f"{dataset.name} {o.split}, {len(dataset)} frames, size {size}; mIoU in per cent, "
             "absent classes count as 0 (published rule); last column: mean over the classes that occur")  # fmt: skip
    run.say(f"{about}\n\n{text}")
    if o.markdown:
        text = "\n\n".join([about, *tables(results, dataset, o.protocol, markdown=True)])
        pathlib.Path(o.markdown).write_text(text + "\n")
    if o.json:
        pathlib.Path(o.json).write_text(json.dumps({"about": about, "options": vars(o), "versions": loop.versions(),
                                                    "classes": meta["classes"], "results": results}, indent=1) + "\n")


def load_rows(
    paths: list[str], device: torch.device, level: str = "both", rule: str | None = None,
    same: Sequence[str] = ("classes", "modalities"),
) -> tuple[dict[str, Callable], dict]:  # fmt: skip
    """Row name -> predict(images, subsets, degraded); a folder gives a row per model, the switch and the ensemble.

    same: what all checkpoints must have been trained with, since all are evaluated on the same images.
    """
    rows, first = {}, None
    for path in map(pathlib.Path, paths):
        files = [path] if not path.is_dir() else [f for p in loop.PHASES if (f := path / f"{p}.pt").exists()]
        if not files:
            raise FileNotFoundError(f"{path} holds no teacher.pt, robust.pt, fsm.pt or student.pt.")
        models = {}
        for file in files:
            if "rule" in read(file).get("meta", {}):  # the selection: no model of its own
                models["fsm"] = load_fsm(file, device)
                continue
            expect = first and {k: first.get(k) for k in same}
            models[file.stem], meta = load_model(file, device, expect)
            first = first or meta
        if "fsm" in models and not {"teacher", "robust"} <= set(models):
            if len(models) == 1:
                raise ValueError(f"{path}: an FSM selects between a teacher and a robust model; give their run folder.")
            del models["fsm"]
            print(f"{path}: no row for the FSM ensemble, its teacher.pt and robust.pt lie elsewhere", file=sys.stderr)
        prefix = f"{path.name}/" if len(paths) > 1 and path.is_dir() else ""
        found = {name: loop.predictor(models[name]) for name in ("teacher", "robust") if name in models}
        if {"teacher", "robust"} <= set(models):
            found["switch"] = switch_predictor(models["teacher"], models["robust"])
        if "fsm" in models:
            sources = models["teacher"], models["robust"]
            found["FSM ensemble"] = ensemble_predictor(models["fsm"], *sources, level, rule)
        found |= {name: loop.predictor(models[name]) for name in models if name not in ("teacher", "robust", "fsm")}
        for name, predict in found.items():
            row = prefix + name
            if row in rows:  # another file or folder of this name was given, too
                row = f"{path}/{name}" if path.is_dir() else str(path)
            rows[row] = predict
    return rows, first


def augmented(predict: Callable, o) -> Callable:
    """`predict` averaged over scales and mirror images, and put together from tiles, as the options say."""
    if o.scales == [1.0] and not o.flip and not o.tile:
        return predict

    def one_view(images: Tensor, subset: tuple[int, ...], degraded: Tensor | None) -> Tensor:
        """(B, M, 3, H, W) -> class distribution (B, K, H, W), from tiles if they are smaller than the image."""
        if not o.tile or max(images.shape[-2:]) <= o.tile:
            return next(predict(images, [subset], degraded)).float().softmax(1)
        total = weight = 0
        for top in tile_starts(images.shape[-2], o.tile):
            for left in tile_starts(images.shape[-1], o.tile):
                window = (..., slice(top, top + o.tile), slice(left, left + o.tile))
                tile = next(predict(images[window], [subset], None if degraded is None else degraded[window]))
                if not torch.is_tensor(total):
                    total = tile.new_zeros((*tile.shape[:2], *images.shape[-2:]), dtype=torch.float32)
                    weight = torch.zeros_like(total[:1, :1])
                total[window] += tile.float().softmax(1)
                weight[window] += 1
        return total / weight

    def averaged(images: Tensor, subsets: list, degraded: Tensor | None = None) -> Iterator[Tensor]:
        for subset in subsets:
            total = 0
            for scale in o.scales:
                for mirrored in (False, True) if o.flip else (False,):
                    view = [None if x is None else rescale(x.flip(-1) if mirrored else x, scale)
                            for x in (images, degraded)]  # fmt: skip
                    p = one_view(view[0], subset, view[1])
                    p = F.interpolate(p, size=images.shape[-2:], mode="bilinear", align_corners=False)
                    total = total + (p.flip(-1) if mirrored else p)
            yield total

    return averaged


def rescale(images: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return images
    size = [max(32, round(side * scale)) for side in images.shape[-2:]]
    return F.interpolate(images.flatten(0, 1), size=size, mode="bilinear", align_corners=False).unflatten(
        0, images.shape[:2]
    )


def tile_starts(side: int, tile: int) -> list[int]:
    """Tiles that overlap by half; the last one ends at the border."""
    last = max(0, side - tile)
    return sorted({*range(0, last, tile // 2), last})


@torch.inference_mode()
def evaluate(predict: Callable, dataset, protocols: list[str], run) -> dict[str, dict[str, dict]]:
    """protocol -> column -> metrics.scores, over this data set."""
    m, k, o = len(dataset.modalities), len(dataset.classes), run.o
    subsets, full = loop.all_subsets(m), tuple(range(m))
    label = {s: subset_name(s, dataset.modalities) for s in subsets}
    grouped = [p for p in ("condition", "case") if p in protocols]
    groups = {p: sorted({getattr(frame, p) for frame in dataset.frames}) for p in grouped}
    columns = [("any", label[s]) for s in subsets] if "any" in protocols else []
    columns += [("emm", label[s]) for s in subsets] if "emm" in protocols else []
    columns += [("rmm", f"{label[s]} {r}") for r in RMM_RATES for s in subsets] if "rmm" in protocols else []
    columns += [("nm", level) for level in NM_LEVELS] if "nm" in protocols else []
    columns += [(p, group) for p, names in groups.items() for group in names]
    matrices = {c: torch.zeros(k, k, dtype=torch.int64, device=run.device) for c in columns}

    batches = [list(range(i, min(i + o.batch_size, len(dataset)))) for i in range(0, len(dataset), o.batch_size)]
    batches = batches[run.rank :: run.world]
    for indices, (images, labels, names) in zip(
        batches, loop.loader(dataset, batches, o.workers, run.device), strict=True
    ):
        images = images.to(run.device, non_blocking=True)
        images = normalise(images, dataset.modalities, dataset.normalisation)  # (B, M, 3, H, W)
        labels = labels.to(run.device, non_blocking=True).long()  # (B, H, W)

        def count(protocol: str, column: str, logits: Tensor, rows=slice(None), labels=labels) -> None:
            matrices[protocol, column] += metrics.confusion(logits[rows].argmax(1), labels[rows], k)

        with loop.autocast(run.device, o.amp):
            if "any" in protocols:
                for s, logits in zip(subsets, predict(images, subsets), strict=True):
                    count("any", label[s], logits)
            if "emm" in protocols:
                for s, logits in zip(subsets, predict(images, subsets, torch.zeros_like(images[:1])), strict=True):
                    count("emm", label[s], logits)
            for r in RMM_RATES if "rmm" in protocols else ():
                # a sensor's damage does not depend on which others are missing, so all subsets share it
                damaged = random_missing(images, ~present_of(full, images.shape[:2]), r, names, o.seed)
                for s, logits in zip(subsets, predict(images, subsets, damaged), strict=True):
                    count("rmm", f"{label[s]} {r}", logits)
            for level in NM_LEVELS if "nm" in protocols else ():
                noisy = sensor_noise(images, level, names, dataset.modalities, o.seed)
                count("nm", level, next(iter(predict(noisy, [full]))))
            if groups:
                logits = next(iter(predict(images, [full])))
                for protocol, members in groups.items():
                    for group in members:
                        rows = [i for i, n in enumerate(indices) if getattr(dataset.frames[n], protocol) == group]
                        if rows:
                            count(protocol, group, logits, rows)
    results: dict[str, dict] = {protocol: {} for protocol in protocols}
    totals = run.total(torch.stack(list(matrices.values())))
    if not totals.any():
        raise ValueError(f"not one pixel of the {len(dataset)} frames has a label; choose another --split or --root.")
    for (protocol, column), matrix in zip(columns, totals, strict=True):
        results[protocol][column] = metrics.scores(matrix)
    return results


def subset_name(subset: tuple[int, ...], modalities: list[str]) -> str:
    """Initials in order, 'RDEL'; whole names where two sensors share an initial."""
    initials = [name[0].upper() for name in modalities]
    if len(set(initials)) < len(initials):
        return "+".join(modalities[m] for m in subset)
    return "".join(initials[m] for m in subset)


def summary(protocol: str, scores: dict[str, dict], modalities: list[str], rule: str = "miou_published") -> dict:
    """The columns of a protocol's table -> value in per cent."""
    values = {column: s[rule] for column, s in scores.items()}
    subsets = loop.all_subsets(len(modalities))
    names = [subset_name(s, modalities) for s in subsets]
    full, missing = names[-1], names[:-1]

    def mean(columns: list[str]) -> float:
        return sum(values[c] for c in columns) / len(columns) if columns else float("nan")

    if protocol == "any":
        missing = {"missing": mean(missing)} if missing else {}
        return {**values, "full": values[full], **missing, "mean": mean(names)}
    if protocol == "emm":
        table = {**values, "mean": mean(names)}
        for p in EMM_ODDS:
            weights = [p ** (len(modalities) - len(s)) * (1 - p) ** len(s) for s in subsets]
            table[f"E({p})"] = sum(w * values[n] for w, n in zip(weights, names, strict=True)) / sum(weights)
        return table
    if protocol == "rmm":
        table = {f"r={r}": mean([f"{n} {r}" for n in names]) for r in RMM_RATES}
        return {**table, "mean": sum(table.values()) / len(table)}
    return {**values, "mean": mean(list(values))}


TITLES = {
    "any": "any-modality: the other sensors left out",
    "emm": "EMM: the other sensors zero-filled; E(p): expectation when each sensor fails with probability p",
    "rmm": "RMM: mean over the subsets, missing sensors lose values with probability r",
    "nm": "NM: all sensors noisy",
    "condition": "all sensors, by weather",
    "case": "all sensors, by sensor failure",
}


def tables(results: dict, dataset, protocols: list[str], markdown: bool = False) -> list[str]:
    """One aligned table per protocol; with several rows, differences to the first in the summary columns."""
    out = []
    for protocol in protocols:
        rows = {name: summary(protocol, r[protocol], dataset.modalities) for name, r in results.items()}
        columns, base = list(next(iter(rows.values()))), next(iter(rows.values()))
        summaries = [c for c in columns if c in ("full", "missing", "mean") or c.startswith(("E(", "r="))]
        cells = [["", *columns, "mean, occurring"]]  # the last column under the other rule for absent classes
        for name, row in rows.items():
            occurring = summary(protocol, results[name][protocol], dataset.modalities, "miou_occurring")["mean"]
            texts = [f"{row[c]:.2f}" + (f" ({row[c] - base[c]:+.2f})" if row is not base and c in summaries else "")
                     for c in columns]  # fmt: skip
            cells.append([name, *texts, f"{occurring:.2f}"])
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
                 for row in cells]  # fmt: skip
        if markdown:
            rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
            text = "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
            out.append(f"**{TITLES[protocol]}**\n\n{text}")
        else:
            out.append(f"{TITLES[protocol]}\n" + "\n".join("  ".join(line) for line in lines))
    return out


if __name__ == "__main__":
    sys.exit(runs.guarded(main, OPTIONS))
