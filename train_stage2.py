"""Stage 2 of RMMSS: Feature Selection over the frozen teacher and robust model, then the final student.

    python train_stage2.py --stage1 runs/synthetic
    python train_stage2.py --teacher teacher.pt --robust robust.pt --data deliver --root data/DELIVER

Data, size and batch come from the stage-1 run unless given. Writes into its folder (or --out): config.json, log.jsonl,
fsm.pt, student.pt, and last.pt to continue from (--resume). Next: python evaluate.py RUN/student.pt.

The paper stops at the selection; how to train it and the student is this project's choice (relaxations: fsm.py).
"""

import copy
import pathlib
import sys
from functools import partial

import torch
from torch import nn

import hpdm
from data import draw_present
from engine import loop
from engine.checkpoint import SAME, describe, load_last, load_model
from engine.options import stage2_options
from engine.runs import Phase, Run, guarded
from engine.subsets import all_subsets, load_fsm, selected_logits, subset_logits
from fsm import FSM, decode, ensemble_logits, feature_distance
from model import condition_on_modalities


def main(argv: list[str] | None = None) -> None:
    args = stage2_options(__doc__, argv)
    run = Run(args, "train_stage2.py")
    begun = load_last(pathlib.Path(args.stage1)) if args.stage1 else None
    if begun and begun["script"] == "train_stage1.py" and (begun["phase"], begun["step"]) != ("robust", begun["steps"]):
        raise ValueError(
            f"stage 1 in {args.stage1} is not complete (step {begun['step']} of {begun['steps']} of phase "
            f"{begun['phase']}): finish it with train_stage1.py --resume {args.stage1}, or name its files "
            "with --teacher and --robust."
        )
    train, val = run.open_splits()
    state = run.claim(("fsm", "student"))

    meta = describe(args, train, "")
    expect = {name: meta[name] for name in SAME}
    teacher, found = load_model(args.teacher or f"{args.stage1}/teacher.pt", run.device, expect)
    meta["backbone"] = expect["backbone"] = found["backbone"]  # features are selected between models of one backbone
    drops = {"drop_path": args.drop_path, "dropout": args.dropout}  # of the student, a copy of the robust model
    robust, _ = load_model(args.robust or f"{args.stage1}/robust.pt", run.device, expect, **drops)
    if args.student_epochs and args.unconditioned_student and robust.decoder.film is not None:
        raise ValueError(
            f"--unconditioned-student: {args.robust or args.stage1} holds a robust model that is "
            "conditioned on its modalities already; start from another one."
        )
    teacher.requires_grad_(False)
    robust.requires_grad_(False)

    fsm = None
    if args.gamma_logits or args.gamma_features or not args.student_epochs:  # else nothing needs a selection
        if not (state and state["phase"] == "student"):  # a resumed run may be past this phase
            train_fsm(run, teacher, robust, train, val, meta, state)
            state = None
        fsm = load_fsm(run.folder / "fsm.pt", run.device, expect).requires_grad_(False)
    if args.student_epochs:
        train_student(run, teacher, robust, fsm, train, val, meta, state)
    run.say(f"stage 2 is complete, its models are in {run.folder}.\nNext: python evaluate.py {run.folder}")


def train_fsm(run: Run, teacher: nn.Module, robust: nn.Module, train, val, meta: dict, state: dict | None) -> None:
    """The scores alone are trained; both models are frozen and see the same, possibly incomplete, input."""
    args, modalities = run.args, len(train.modalities)
    torch.manual_seed(args.seed)
    about = {"rule": args.rule, "temperature": args.temperature, "conditioned": not args.unconditioned_scores}
    fsm = FSM(robust.widths, len(train.classes), modalities, **about).to(run.device)
    meta = {**meta, **about, "widths": list(robust.widths)}
    model, subsets = run.parallel(fsm), all_subsets(modalities)
    optimizer, scaler = loop.adamw(fsm, args.lr, args.weight_decay), loop.grad_scaler(run.device, args.amp)
    phase = Phase(run, "fsm", args.fsm_epochs, meta, state, model=fsm, optimizer=optimizer, scaler=scaler)

    for images, labels, names in phase.batches(train):  # (B, M, 3, H, W), (B, H, W)
        lr = loop.set_learning_rate(optimizer, phase.step, phase.steps, phase.warmup, args.lr)
        generator = loop.seed_step(args.seed, "fsm", phase.step, run.rank)
        model.train()
        present = draw_present(args.batch_size, modalities, generator, args.complete)[run.share]  # (B, M)

        with loop.autocast(run.device, args.amp):
            with torch.no_grad():
                sources = [teacher(images, present), robust(images, present)]
            selected = model(sources, present)
            decoded = decode(selected, teacher, robust, present)
        losses = {
            "ce_logits": hpdm.ohem_cross_entropy(selected.logits, labels),
            "ce_features": hpdm.ohem_cross_entropy(decoded, labels),
        }

        scaler.scale(sum(losses.values())).backward()
        phase.check(losses, names, fsm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        phase.step += 1

        if phase.due(50) or run.stopping:
            phase.report(lr)
        if phase.due(phase.eval_steps):
            predict = partial(selected_logits, fsm, teacher, robust)
            scores = loop.validate(predict, val, subsets, run)
            phase.log(**scores)
            if scores["miou"] > phase.best:
                phase.best = scores["miou"]
                run.save_model("fsm", fsm, meta)
        if phase.due(args.save_every) or run.stopping:
            phase.save()  # and end here, if a signal or the clock asked for it


def train_student(
    run: Run, teacher: nn.Module, robust: nn.Module, fsm: FSM | None, train, val, meta: dict, state: dict | None
) -> None:
    """One model, started from the robust one: ground truth, and the selection's logits and features as targets.

    It knows which modalities are present (`model.condition_on_modalities`). fsm None is the ablation without targets.
    """
    args, modalities = run.args, len(train.modalities)
    student = copy.deepcopy(robust)
    if not args.unconditioned_student:
        condition_on_modalities(student)
    student.requires_grad_(True)
    model, subsets = run.parallel(student), all_subsets(modalities)
    optimizer, scaler = loop.adamw(student, args.lr, args.weight_decay), loop.grad_scaler(run.device, args.amp)
    phase = Phase(run, "student", args.student_epochs, meta, state, model=student, optimizer=optimizer, scaler=scaler)

    for images, labels, names in phase.batches(train):  # (B, M, 3, H, W), (B, H, W)
        lr = loop.set_learning_rate(optimizer, phase.step, phase.steps, phase.warmup, args.lr)
        generator = loop.seed_step(args.seed, "student", phase.step, run.rank)
        model.train()
        present = draw_present(args.batch_size, modalities, generator, args.complete)[run.share]  # (B, M)

        with loop.autocast(run.device, args.amp):
            if fsm:
                with torch.no_grad():
                    sources = [teacher(images, present), robust(images, present)]
                    selected = fsm(sources, present)
                    target = ensemble_logits(selected, teacher, robust, present)
            out = model(images, present)
        losses = {"ce": hpdm.ohem_cross_entropy(out.logits, labels)}
        if args.gamma_logits:
            losses["kl"] = args.gamma_logits * hpdm.distill_logits(out.logits, target)
        if args.gamma_features:
            losses["features"] = args.gamma_features * feature_distance(out.fused, selected.fused)

        scaler.scale(sum(losses.values())).backward()
        phase.check(losses, names, student)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        phase.step += 1

        if phase.due(50) or run.stopping:
            phase.report(lr)
        if phase.due(phase.eval_steps):
            scores = loop.validate(partial(subset_logits, student), val, subsets, run)
            phase.log(**scores)
            if scores["miou"] > phase.best:
                phase.best = scores["miou"]
                run.save_model("student", student, meta)
        if phase.due(args.save_every) or run.stopping:
            phase.save()  # and end here, if a signal or the clock asked for it


if __name__ == "__main__":
    sys.exit(guarded(main))
