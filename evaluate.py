"""Evaluates models on every protocol of the paper: which modalities are missing, how they fail, in which weather.

    python evaluate.py runs/deliver/student.pt --data deliver
    python evaluate.py runs/demo                                    # all models of a run, with switch and FSM ensemble
    python evaluate.py a.pt b.pt --protocol any,emm,rmm,nm,condition,case --json out.json --markdown table.md

Under emm and rmm the failure is not announced: every modality is declared present to the models. The switch and the
ensemble's selection do know which modalities work, an advantage in those rows.
Writes nothing but what --json and --markdown name. Seeded per frame: no batch size, worker or process count changes
a number. torchrun --nproc_per_node=N evaluate.py ... shares the frames out.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

import kernels
import metrics
from data import IGNORED, FrameDataset, by_comma, random_missing, sensor_noise
from engine import loop, runs
from engine.checkpoint import require
from engine.inference import load_models, open_data, titles
from engine.options import COUNT, COUNT_OR_0, DEVICES, RECIPES, SIDE, Parser
from engine.output import MARK, check_output, write_output
from engine.subsets import all_subsets, selected_logits, subset_logits, switch_logits

PROTOCOLS = {  # paper, section 5
    "any": "any-modality: every subset, the other modalities left out",
    "emm": "EMM: every subset, the others zero-filled; E(p): expectation when each fails with probability p",
    "rmm": "RMM: every subset, the others lose each value with probability r; means, and E(p) as in EMM",
    "nm": "NM: all modalities, with salt and pepper and Gaussian noise",
    "condition": "all modalities, by weather",
    "case": "all modalities, by sensor failure",
}
RMM_RATES = (0.25, 0.5, 0.75)
NM_LEVELS = ("low", "mid", "high")
FAILURE_RATES = (0.2, 0.1, 0.05)
RULES = {"published": "absent classes count as 0, as published", "occurring": "over the classes that occur"}
GROUPED = ("condition", "case")  # answered with all modalities, counted by what each frame is of


def options(argv: list[str] | None = None) -> argparse.Namespace:
    listed = "\n".join(f"    {name:<9}  {what}" for name, what in PROTOCOLS.items())
    parser = Parser("evaluate.py", f"{__doc__}\nprotocols:\n{listed}")
    parser.add_argument("checkpoint", nargs="+", help="model files, or run folders: all that they hold")
    parser.add_argument("--only", type=by_comma, help="of all the rows that run folders give, these, by comma")
    parser.add_argument("--protocol", type=by_comma, default=["any"], help=f"all, or by comma: {', '.join(PROTOCOLS)}")
    add = parser.add_argument_group("data", "by default what the first checkpoint was trained on").add_argument
    add("--data", choices=RECIPES)
    add("--root", help="folder of the data set")
    add("--split", default="val", choices=("train", "val", "test"), help="papers report val")
    add("--size", type=SIDE, help="shorter side in pixels, then both go up to multiples of 32. None: --val-size")
    add("--label-map", help="folder data: label ids to classes, as in training")
    add("--skip-broken", type=COUNT_OR_0, default=0, metavar="N", help="leave out at most N broken frames, listed")
    add("--limit", type=COUNT, help="only N frames, spread evenly")
    add("--batch-size", type=COUNT, help="frames; changes memory and speed only. None: 8; of folder data 1")
    add("--workers", type=COUNT_OR_0, default=0, help="loader processes")
    add("--device", choices=DEVICES, default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision")
    add("--seed", type=COUNT_OR_0, default=0, help="of the rmm and nm corruptions")
    add = parser.add_argument_group("models and output").add_argument
    add("--fsm-rule", choices=kernels.RULES, help="of the FSM ensemble. None: the one it was trained with")
    add("--json", metavar="FILE", help="every score of every column")
    add("--markdown", metavar="FILE", help="the printed tables, for a paper or README")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.protocol) - {*PROTOCOLS, "all"}):
        parser.error(f"--protocol {unknown[0]} is unknown; choose of {', '.join(PROTOCOLS)}, or all.")
    args.protocol = list(PROTOCOLS) if "all" in args.protocol else args.protocol
    return args


def load_rows(paths: list[str], device: torch.device, same: list[str], rule=None) -> tuple[dict, dict]:
    """Row name -> predict(images, subsets, degraded), and the first model's meta. A folder gives a row per model, the
    switch and the ensemble. same: the entries of meta in which all must agree; rule: as for `selected_logits`."""
    rows, first = {}, {}
    for path in map(pathlib.Path, paths):
        if len([other for other in paths if pathlib.Path(other).resolve() == path.resolve()]) > 1:
            raise ValueError(f"{path} is given twice.")
        models, selection, meta = load_models(path, device, same)
        first = first or meta
        require(path, meta, {name: first.get(name) for name in same})
        found = {name: partial(subset_logits, model) for name, model in models.items()}
        if {"teacher", "robust"} <= set(models):
            sources = models["teacher"], models["robust"]
            found["switch"] = partial(switch_logits, *sources)
            if selection:
                found["FSM ensemble"] = partial(selected_logits, selection, *sources, rule=rule)
        elif selection:
            print(f"{path}: no row for the FSM ensemble, its teacher.pt and robust.pt lie elsewhere", file=sys.stderr)
        for name, predict in found.items():
            row = f"{path}/{name}" if path.is_dir() and len(paths) > 1 else name
            rows[str(path) if row in rows else row] = predict  # two files of one name keep a row each
    return rows, first


def subset_name(subset: tuple[int, ...], modalities: list[str]) -> str:
    """Initials in order, 'RDEL'; whole names where two modalities share an initial."""
    initials = [name[0].upper() for name in modalities]
    if len(set(initials)) < len(initials):
        return "+".join(modalities[m] for m in subset)
    return "".join(initials[m] for m in subset)


def evaluate(predict: Callable, dataset: FrameDataset, run: runs.Run) -> dict[str, dict]:
    """protocol -> column -> metrics.scores, over this data set."""
    args, modalities, subsets = run.args, dataset.modalities, all_subsets(len(dataset.modalities))
    frames, named = {frame.name: frame for frame in dataset.frames}, [subset_name(s, modalities) for s in subsets]
    columns = {"any": named, "emm": named, "rmm": [f"{name} {r}" for r in RMM_RATES for name in named], "nm": NM_LEVELS}
    columns |= {group: sorted({getattr(frame, group) for frame in dataset.frames}) for group in GROUPED}

    def answers(images: Tensor, labels: Tensor, names: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each column: classes (B, H, W) of these B frames, and the labels that they are compared with."""
        # a modality's damage does not depend on which others are missing, so all subsets share it
        spared, zeros = torch.zeros(images.shape[:2], dtype=torch.bool), torch.zeros_like(images[:1])
        calls = {
            "any": [(images, subsets)],
            "emm": [(images, subsets, zeros)],
            "rmm": ((images, subsets, random_missing(images, spared, r, names, args.seed)) for r in RMM_RATES),
            "nm": ((sensor_noise(images, level, names, modalities, args.seed), subsets[-1:]) for level in NM_LEVELS),
        }
        for protocol in args.protocol:
            wanted = [labels]
            if protocol in GROUPED:
                groups = np.array([getattr(frames[name], protocol) for name in names])[:, None, None]  # (B, 1, 1)
                others = [torch.tensor(groups != group, device=labels.device) for group in columns[protocol]]
                wanted = [labels.masked_fill(other, IGNORED) for other in others]
            for call in calls.get(protocol, [(images, subsets[-1:])]):
                for logits in predict(*call):
                    ids = metrics.class_ids(logits, names)
                    yield from ((ids, part) for part in wanted)

    found = iter(loop.score(answers, sum(len(columns[p]) for p in args.protocol), dataset, args.batch_size, run))
    return {protocol: {column: next(found) for column in columns[protocol]} for protocol in args.protocol}


def summary(protocol: str, values: list[float], modalities: list[str]) -> dict[str, float]:
    """The summary columns of a protocol's table from the mIoU values of its other columns. They are kept apart from
    those, whose names come from the data: a weather may be called "mean"."""
    table = {}
    if protocol == "any":
        *missing, table["full"] = values
        table |= {"missing": fmean(missing)} if missing else {}
    there = np.array([len(subset) for subset in all_subsets(len(modalities))])
    for i, rate in enumerate({"emm": [""], "rmm": [f"r={r}" for r in RMM_RATES]}.get(protocol, [])):
        part = values[i * len(there) : (i + 1) * len(there)]  # of all subsets, at this rate
        table |= {rate: fmean(part)} if rate else {}
        for p in FAILURE_RATES:
            odds = p ** (len(modalities) - there) * (1 - p) ** there
            table[f"{rate} E({p})".strip()] = float(np.average(part, weights=odds))
    return {**table, "mean": fmean(values)}


def table(title: str, cells: list[list[str]]) -> str:
    """An aligned Markdown table; the first row of cells heads the others."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (cells[0], rule, *cells[1:])]
    return "\n".join([f"**{title}**\n", *(f"| {' | '.join(row)} |" for row in rows)])


def tables(results: dict, modalities: list[str], protocols: list[str], rule: str = "published") -> str:
    """A table for each protocol, by this rule of RULES and with the mean by the other one; with several rows,
    differences to the first in the summary columns."""
    out, (other,) = [], RULES.keys() - {rule}
    for protocol in protocols:
        first, cells = {}, []
        for name, scores in results.items():
            values = {column: score[f"miou_{rule}"] for column, score in scores[protocol].items()}
            last = fmean(score[f"miou_{other}"] for score in scores[protocol].values())
            means = summary(protocol, list(values.values()), modalities)
            shown = {} if protocol == "rmm" else values
            texts = [f"{v:.2f}" + (f" ({v - first[c]:+.2f})" if first else "") for c, v in means.items()]
            cells.append([name, *(f"{v:.2f}" for v in shown.values()), *texts, f"{last:.2f}"])
            first = first or means
        if list(values) == ["none"]:  # the only group: frames without one
            out.append(f"No table of {protocol}: this data set does not name it for its frames.")
            continue
        title = f"{PROTOCOLS[protocol]}; mIoU in per cent, {RULES[rule]}"
        out.append(table(title, [["", *shown, *means, f"mean, {other}"], *cells]))
    return "\n\n".join(out)


def class_tables(results: dict, classes: list[str]) -> str:
    """For each row of `any`, the IoU of each class by subset; "-" where a class is in neither labels nor answers."""
    out = []
    for name, scores in results.items():
        columns = [["-" if v is None else f"{v:.1f}" for v in score["iou"]] for score in scores["any"].values()]
        cells = [["", *scores["any"]], *map(list, zip(classes, *columns, strict=True))]
        out.append(table(f"IoU of each class in per cent, any-modality: {name}", cells))
    return "\n\n".join(out)


def main(args: argparse.Namespace) -> None:
    check_output(args.json, ".json")  # now, not after an hour of evaluation
    check_output(args.markdown, ".md")
    run = runs.Run(args, "evaluate.py")
    same = ["classes", "modalities", "depth", "normalisation"]
    same += [name for name, given in (("label_map", args.label_map), ("val_size", args.size)) if not given]
    rows, meta = load_rows(args.checkpoint, run.device, same, args.fsm_rule)
    if unknown := sorted(set(args.only or ()) - set(rows)):
        raise ValueError(f"--only {unknown[0]}: {args.checkpoint[0]} gives no such row, but {', '.join(rows)}.")
    if args.fsm_rule and not any(row.endswith("FSM ensemble") for row in args.only or rows):
        raise ValueError(f"--fsm-rule {args.fsm_rule} has no effect without a row of the FSM ensemble: leave it out.")
    size = args.size or meta["val_size"]
    asked = {name: getattr(args, name) for name in ("limit", "label_map", "skip_broken")}
    dataset = open_data(meta, args.data, args.root, args.split, size, run.say, **asked)
    args.batch_size = args.batch_size or (1 if dataset.name == "folder" else 8)  # your own frames may differ in size
    for problem in dataset.broken:
        run.say(f"left out: {problem}")
    results = {name: evaluate(rows[name], dataset, run) for name in rows if name in (args.only or rows)}
    if run.rank:
        return
    split, shown = args.split, ", ".join(titles(dataset.name, dataset.modalities))
    if dataset.name == "nyuv2" and split == "val" and meta["hold_out"]:
        split = "val (held out of the train list)"
    about = f"{dataset.name} {split}, {len(dataset)} frames, {shown}, size {size}"
    rule = metrics.rule_for(dataset.name)
    parts = [about, tables(results, dataset.modalities, args.protocol, rule)]
    text = "\n\n".join([*parts, *([class_tables(results, meta["classes"])] if "any" in args.protocol else [])]) + "\n"
    report = {"file": MARK, "about": about, "options": vars(args), "versions": loop.versions()}
    report |= {"classes": meta["classes"], "rule": rule, "results": results}
    try:
        if args.json:  # first, and with a line for each list of numbers
            lines = re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\n\s*", " ", m[0]), json.dumps(report, indent=1))
            write_output(args.json, lines + "\n")
        if args.markdown:
            write_output(args.markdown, f"<!-- {MARK} -->\n{text}")
    finally:  # the disk may be full
        run.say(text)


if __name__ == "__main__":
    sys.exit(runs.guarded(main, options()))
