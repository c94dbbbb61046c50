"""Stage 2 of RMMSS: Feature Selection over the frozen teacher and robust model, then the final student.

    python train_stage2.py --stage1 runs/synthetic
    python train_stage2.py --teacher teacher.pt --robust robust.pt

The data are those of the robust model's run; so are size, batch, rate, precision and seed unless given. Writes into the
folder of --stage1, else into runs/stage2 (or --out): config.json, log.jsonl, fsm.pt, student.pt, and last.pt to
continue from (--resume). Next: python evaluate.py RUN.

What we read of the paper stops at the selection. How it is trained, and the student, are this project's choice.
"""

import copy
import sys
from functools import partial

import torch
from torch import nn

import hpdm
from data import draw_present, incomplete
from engine.checkpoint import SAME, checksum, describe, load_model
from engine.options import stage2_options
from engine.runs import Phase, Run, guarded
from engine.subsets import all_subsets, load_fsm, selected_logits, subset_logits
from fsm import FSM, decode, ensemble_logits, feature_distance


def train_fsm(run: Run, teacher: nn.Module, robust: nn.Module, train, val, meta: dict, state: dict | None) -> None:
    """Section 4.3: only the scores learn; both models are frozen and see the same, possibly incomplete, input."""
    args, modalities = run.args, len(train.modalities)
    torch.manual_seed(args.seed)
    about = {"rule": args.rule, "temperature": args.temperature, "conditioned": not args.unconditioned_scores}
    fsm = FSM(robust.widths, len(train.classes), modalities, **about).to(run.device)
    meta = {**meta, **about, "widths": list(robust.widths)}
    phase = Phase(run, "fsm", fsm, args.fsm_epochs, meta, state)

    for images, labels in phase.batches(train):  # (B, M, 3, H, W), (B, H, W)
        present = draw_present(args.batch_size, modalities, phase.generator, args.complete)[run.share]  # (B, M)
        given = incomplete(images, present, args.absent)
        with run.autocast():
            with torch.no_grad():
                sources = [teacher(*given), robust(*given)]
            selected = phase.model(sources, present)
            decoded = decode(selected, teacher, robust, present)  # (B, K, H, W)
        losses = {"ce_logits": hpdm.ohem_cross_entropy(selected.logits, labels)}
        losses["ce_features"] = hpdm.ohem_cross_entropy(decoded, labels)
        phase.learn(losses)
        phase.keep(partial(selected_logits, fsm, teacher, robust), val, all_subsets(modalities))


def train_student(
    run: Run, teacher: nn.Module, robust: nn.Module, fsm: FSM | None, train, val, meta: dict, state: dict | None
) -> None:
    """One model, started from the robust one: ground truth, and the selection's logits and features as targets.

    fsm None is the ablation without targets.
    """
    args, modalities = run.args, len(train.modalities)
    student = copy.deepcopy(robust).requires_grad_(True)
    phase = Phase(run, "student", student, args.student_epochs, meta, state)

    for images, labels in phase.batches(train):  # (B, M, 3, H, W), (B, H, W)
        present = draw_present(args.batch_size, modalities, phase.generator, args.complete)[run.share]  # (B, M)
        given = incomplete(images, present, args.absent)
        with run.autocast():
            if fsm:
                with torch.no_grad():
                    selected = fsm([teacher(*given), robust(*given)], present)
                    target = ensemble_logits(selected, teacher, robust, present)  # (B, K, H, W)
            out = phase.model(*given)
        losses = {"ce": hpdm.ohem_cross_entropy(out.logits, labels)}
        if args.gamma_logits:
            losses["kl"] = args.gamma_logits * hpdm.distill_logits(out.logits, target)
        if args.gamma_features:
            losses["features"] = args.gamma_features * feature_distance(out.fused, selected.fused)
        phase.learn(losses)
        phase.keep(partial(subset_logits, student), val, all_subsets(modalities))


def main(argv: list[str] | None = None) -> None:
    args = stage2_options(__doc__, argv)
    run = Run(args, "train_stage2.py")
    train, val = run.open_splits()
    state = run.claim(("fsm", "student"))
    selection = f"FSM by rule {args.rule}, temperature {args.temperature:g}, {args.fsm_epochs:g} epochs"
    student = f"student {args.student_epochs:g} epochs, {args.complete:.0%} complete inputs"
    loss = f"CE + {args.gamma_logits:g} KL + {args.gamma_features:g} distance of features"
    run.say(f"stage 2, chosen by this project: {selection}; {student}, {loss}")

    meta = describe(args, train, "")
    expect = {name: meta[name] for name in SAME}
    files = args.teacher or f"{args.stage1}/teacher.pt", args.robust or f"{args.stage1}/robust.pt"
    teacher, from_teacher = load_model(files[0], run.device, expect)
    meta["backbone"] = expect["backbone"] = from_teacher["backbone"]  # the FSM selects between models of one backbone
    robust, from_robust = load_model(files[1], run.device, expect)
    if from_teacher.get("phase") == "robust" or from_robust.get("phase") == "teacher":
        raise ValueError(f"{files[0]} is a robust model, or {files[1]} a teacher: swap them.")
    meta["sources"] = [checksum(from_teacher), checksum(from_robust)]
    if from_robust.get("teacher", meta["sources"][0]) != meta["sources"][0]:
        if args.stage1:
            raise ValueError(f"{files[1]} was distilled from another teacher than {files[0]}; put back its own.")
        run.say(f"note: {files[1]} was distilled from another teacher than {files[0]}")
    teacher.requires_grad_(False)
    robust.requires_grad_(False)

    fsm = None
    if args.gamma_logits or args.gamma_features or not args.student_epochs:  # else nothing needs a selection
        if not (state and state["phase"] == "student"):  # a resumed run may be past this phase
            train_fsm(run, teacher, robust, train, val, meta, state)
            state = None
        fsm = load_fsm(run.folder / "fsm.pt", run.device, expect | {"sources": meta["sources"]}).requires_grad_(False)
    if args.student_epochs:
        train_student(run, teacher, robust, fsm, train, val, meta, state)
    run.say(f"stage 2 is complete, its models are in {run.folder}.\nNext: python evaluate.py {run.folder}")


if __name__ == "__main__":
    sys.exit(guarded(main))
