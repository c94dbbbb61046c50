"""Stage 2 of RMMSS: Feature Selection over the frozen teacher and robust model, then the final student.

    python train_stage2.py --stage1 runs/synthetic
    python train_stage2.py --teacher teacher.pt --robust robust.pt --data deliver --root data/DELIVER

Data, size and batch come from the stage-1 run unless given. Writes into its folder (or --out): config.json, log.jsonl,
fsm.pt, student.pt, and last.pt to continue from (--resume). Next: python evaluate.py RUN/student.pt.

The paper stops at the selection; how it and the student are trained is this project's (relaxations: fsm.py).
"""

from engine.options import stage2_options

if __name__ == "__main__":
    OPTIONS = stage2_options(__doc__)  # before torch is imported, so that --help and typing errors answer at once

import copy
import sys

import torch
from torch import nn

import hpdm
from data import draw_present, normalise, open_dataset
from engine import loop, runs
from engine.checkpoint import describe, load_model
from fsm import FSM, decode, ensemble_logits, ensemble_predictor, feature_distance, load_fsm
from model import condition_on_sensors


def main(o) -> None:
    run = runs.Run(o, "train_stage2.py")
    kwargs = dict(root=o.root, modalities=o.modalities, seed=o.seed, limit=o.limit, depth=o.depth,
                  label_map=o.label_map, skip_broken=o.skip_broken)  # fmt: skip
    if o.data == "nyuv2":
        kwargs |= {"classes": o.classes, "hold_out": o.hold_out}
    train = open_dataset(o.data, split="train", size=o.size, augment=True, **kwargs)
    val = open_dataset(o.data, split="val", size=o.val_size, **kwargs)
    for problem in (*train.broken, *val.broken):
        run.say(f"left out: {problem}")
    if o.stage1:
        runs.require_complete(o.stage1)
    state = run.claim(("fsm", "student"))

    expect = {"classes": list(train.classes), "modalities": list(train.modalities),
              "normalisation": train.normalisation}  # fmt: skip
    teacher, teacher_meta = load_model(o.teacher or f"{o.stage1}/teacher.pt", run.device, expect)
    drops = {"drop_path": o.drop_path, "dropout": o.dropout}  # of the student, which is a copy of the robust model
    robust, robust_meta = load_model(o.robust or f"{o.stage1}/robust.pt", run.device, expect, **drops)
    if teacher_meta["backbone"] != robust_meta["backbone"]:
        kinds = f"{teacher_meta['backbone']} and {robust_meta['backbone']}"
        raise ValueError(f"teacher and robust model are {kinds}; "
                         "features can be selected only between models of one backbone.")  # fmt: skip
    if o.student_epochs and o.unconditioned_student and robust.decoder.film is not None:
        raise ValueError(f"--unconditioned-student: {o.robust or o.stage1} holds a robust model that is conditioned "
                         "on its sensors already; start from another one.")  # fmt: skip
    teacher.requires_grad_(False)
    robust.requires_grad_(False)
    meta = describe(o, train, robust_meta["backbone"])

    fsm = None
    if o.gamma_logits or o.gamma_features or not o.student_epochs:
        if not (state and state["phase"] == "student"):
            train_fsm(run, teacher, robust, train, val, meta, state)
        fsm = load_fsm(run.folder / "fsm.pt", run.device).requires_grad_(False)
    if o.student_epochs:
        state = state if state and state["phase"] == "student" else None
        train_student(run, teacher, robust, fsm, train, val, meta, state)
    run.say(f"stage 2 is complete, its models are in {run.folder}.\nNext: python evaluate.py {run.folder}")


def train_fsm(run, teacher: nn.Module, robust: nn.Module, train, val, meta: dict, state: dict | None) -> None:
    """The scores alone are trained; both models are frozen and see the same, possibly incomplete, input."""
    o = run.o
    torch.manual_seed(o.seed)
    fsm = FSM(robust.widths, len(train.classes), len(train.modalities), rule=o.rule, temperature=o.temperature,
              conditioned=not o.unconditioned_scores).to(run.device)  # fmt: skip
    meta = {**meta, "rule": o.rule, "temperature": o.temperature, "conditioned": not o.unconditioned_scores,
            "widths": list(robust.widths)}  # fmt: skip
    model, subsets = run.parallel(fsm), loop.all_subsets(len(train.modalities))
    optimizer, scaler = loop.adamw(fsm, o.lr, o.weight_decay), loop.grad_scaler(run.device, o.amp)
    progress = runs.Progress(run, "fsm", fsm, optimizer, scaler, len(train), o.fsm_epochs, meta, state)
    for step, (images, labels, names) in progress.batches(train):
        generator = loop.seed_step(o.seed, "fsm", step, run.rank)
        images = images.to(run.device, non_blocking=True)
        images = normalise(images, train.modalities, train.normalisation)  # (B, M, 3, H, W)
        labels = labels.to(run.device, non_blocking=True).long()  # (B, H, W)
        present = draw_present(o.batch_size, len(train.modalities), generator, o.complete)[run.rank :: run.world]

        with loop.autocast(run.device, o.amp):
            with torch.no_grad():
                sources = [teacher(images, present), robust(images, present)]
            selected = model(sources, present.to(run.device, non_blocking=True))
            decoded = decode(selected, teacher, robust, present)
        losses = {"ce_logits": hpdm.ohem_cross_entropy(selected.logits, labels),
                  "ce_features": hpdm.ohem_cross_entropy(decoded, labels)}  # fmt: skip

        loss = sum(losses.values())
        scaler.scale(loss).backward()
        progress.check(loss, losses, names)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if progress.validation_due():
            predict = ensemble_predictor(fsm, teacher, robust)
            scores = loop.summarise(loop.validate(predict, val, subsets, run))
            progress.validated(scores["miou"], **scores)


def train_student(
    run, teacher: nn.Module, robust: nn.Module, fsm: FSM | None, train, val, meta: dict, state: dict | None
) -> None:
    """One model, started from the robust one: ground truth, and the selection's logits and features as targets.

    It knows which sensors are present (`model.condition_on_sensors`). fsm None is the ablation without targets.
    """
    o = run.o
    student = copy.deepcopy(robust)
    if not o.unconditioned_student:
        condition_on_sensors(student)
    student.requires_grad_(True)
    model, subsets = run.parallel(student), loop.all_subsets(len(train.modalities))
    optimizer, scaler = loop.adamw(student, o.lr, o.weight_decay), loop.grad_scaler(run.device, o.amp)
    progress = runs.Progress(run, "student", student, optimizer, scaler, len(train), o.student_epochs, meta, state)
    for step, (images, labels, names) in progress.batches(train):
        generator = loop.seed_step(o.seed, "student", step, run.rank)
        images = images.to(run.device, non_blocking=True)
        images = normalise(images, train.modalities, train.normalisation)  # (B, M, 3, H, W)
        labels = labels.to(run.device, non_blocking=True).long()  # (B, H, W)
        present = draw_present(o.batch_size, len(train.modalities), generator, o.complete)[run.rank :: run.world]

        with loop.autocast(run.device, o.amp):
            if fsm:
                with torch.no_grad():
                    sources = [teacher(images, present), robust(images, present)]
                    selected = fsm(sources, present.to(run.device, non_blocking=True))
                    target = ensemble_logits(selected, teacher, robust, present)
            out = model(images, present)
        losses = {"ce": hpdm.ohem_cross_entropy(out.logits, labels)}
        if o.gamma_logits:
            losses["kl"] = o.gamma_logits * hpdm.distill_logits(out.logits, target)
        if o.gamma_features:
            losses["features"] = o.gamma_features * feature_distance(out.fused, selected.fused)

        loss = sum(losses.values())
        scaler.scale(loss).backward()
        progress.check(loss, losses, names)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if progress.validation_due():
            scores = loop.summarise(loop.validate(loop.predictor(student), val, subsets, run))
            progress.validated(scores["miou"], **scores)


if __name__ == "__main__":
    sys.exit(runs.guarded(main, OPTIONS))
