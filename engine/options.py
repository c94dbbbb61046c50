"""The command lines of both training stages, and each data set's recipe, which `--data` picks: its values become the
defaults, as `python train_stage1.py --data deliver --help` shows."""

import argparse
import contextlib
import json
import os
import pathlib
import sys

# As published (docs/paper_vs_code.md), where it is: the batch size is usual on DELIVER, alpha was chosen on real frames
# (docs/results.md), and stage 2 has no published recipe at all. The synthetic recipe suits a short demo.
REAL = dict(
    backbone="segformer_b0",
    size=1024,
    epochs=200.0,
    distill_epochs=120.0,
    fsm_epochs=10.0,
    student_epochs=120.0,
    batch_size=8,
    lr=6e-5,
    warmup_epochs=10.0,
    eval_every=10.0,
    lambda_kl=50 / 25,
    alpha=0.3,
    workers=min(4, os.cpu_count() or 1),
)
RECIPES = {
    "synthetic": dict(
        REAL,
        backbone="segformer_tiny",
        size=64,
        epochs=40.0,
        distill_epochs=20.0,
        fsm_epochs=2.0,
        student_epochs=20.0,
        batch_size=16,
        lr=2e-3,
        warmup_epochs=1.0,
        eval_every=5.0,
        lambda_kl=0.3,
        alpha=0.1,
        workers=0,
    ),
    "deliver": REAL,
    "muses": dict(REAL, lambda_kl=50 / 19),
    "mcubes": dict(REAL, size=512, lambda_kl=50 / 20),
    "nyuv2": dict(REAL, size=480, lambda_kl=50 / 40),
    "folder": dict(REAL, size=512, lambda_kl=1.0),
}
ROOTS = {"deliver": "data/DELIVER", "muses": "data/MUSES", "mcubes": "data/MCubeS", "nyuv2": "data/NYUDepthv2"}
# Options that may change when a run is continued: they do not change what it computes.
FREE = {"resume", "config", "out", "root", "workers", "device", "max_minutes", "save_every"}
# What stage 2 takes over from the run of stage 1 that it starts from.
INHERITED = (
    "data",
    "root",
    "modalities",
    "depth",
    "label_map",
    "classes",
    "hold_out",
    "size",
    "val_size",
    "limit",
    "skip_broken",
    "batch_size",
    "lr",
    "amp",
    "seed",
)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the script's docstring as it is."""


class Parser(argparse.ArgumentParser):
    """Answers a wrong option with one sentence, where argparse would put all of the usage before it."""

    def __init__(self, script: str, doc: str):
        super().__init__(script, description=doc, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, least: float, most: float = 1e9):
    """Type of an option: a number of this kind from `least` to `most`."""

    def parse(text: str):
        if not least <= kind(text) <= most:
            raise ValueError
        return kind(text)

    parse.__name__ = f"{kind.__name__} from {least:g} to {most:g}"
    return parse


DEVICES = ("auto", "cpu", "cuda", *(f"cuda:{n}" for n in range(16)))
COUNT, COUNT_OR_0, SIDE = number(int, 1), number(int, 0), number(int, 32)
RATE, WEIGHT, SHARE, DROP = number(float, 1e-9), number(float, 0), number(float, 0, 1), number(float, 0, 0.99)


def names(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found or len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"'{text}' must be names separated by commas, none twice")
    return found


def run_folder(text: str) -> str:
    return str(pathlib.Path(text).parent) if text.endswith(".pt") else text


def common_options(script: str, doc: str) -> Parser:
    """What both stages have: data, training, run. The defaults of what the recipe decides come later, in `parse`."""
    parser = Parser(script, doc)
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=RECIPES, default="synthetic", help="data set; it also picks the recipe")
    add("--root", help="its folder, laid out as in docs/data.md; None: data/DELIVER and the like")
    add("--modalities", type=names, help="by comma. None: all; of MUSES all but radar, of NYUv2 rgb,depth")
    add("--depth", choices=("hha", "raw"), default="hha", help="of DELIVER and NYUv2; published models: hha")
    add("--label-map", help='folder: label ids to classes, "shift:-1" or "0=255,1=0"; 255 = ignore')
    add("--classes", type=int, choices=(13, 40), default=40, help="NYUv2: which of its two label sets")
    add("--hold-out", type=COUNT_OR_0, default=0, metavar="N", help="NYUv2: validate on N frames of the train list")
    add("--size", type=SIDE, help="side of the training crop in pixels, from 32 on: the coarsest stage needs them")
    add("--val-size", type=SIDE, help="shorter side in validation and evaluation. None: --size")
    add("--limit", type=COUNT, help="use only N frames of each split, spread evenly; for trials")
    add("--skip-broken", type=COUNT_OR_0, default=0, metavar="N", help="leave out at most N broken frames, listed")
    add("--workers", type=COUNT_OR_0, help="loader processes; more while the log's data_wait is above 0.05")
    add = parser.add_argument_group("training").add_argument
    add("--batch-size", type=COUNT, help="frames per step over all processes; halve --lr when you halve it")
    add("--lr", type=RATE, help="peak of AdamW, 1e-5..3e-3; pretrained: 6e-5, a tiny model from scratch: 2e-3")
    add("--weight-decay", type=WEIGHT, default=0.01, help="of weights; none for biases and norms")
    add("--warmup-epochs", type=WEIGHT, help="linear rise from a tenth of --lr; at most half a phase is used")
    add("--drop-path", type=DROP, default=0.1, help="rate of the last block; 0 for very small models")
    add("--dropout", type=DROP, default=0.1, help="of the decoder's channels")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision; bf16: AMX or GPUs from 8.0")
    add("--compile", action="store_true", help="torch.compile the models: minutes at the start, gain not measured")
    add("--eval-every", type=RATE, help="epochs between validations (fractions allowed); the best model is kept")
    add("--seed", type=COUNT_OR_0, default=0, help="same seed, same machine: same numbers")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="run folder, new or empty. None: runs/DATA; in stage 2 that of --stage1")
    add("--resume", metavar="RUN", help="continue this run exactly: its folder, or a .pt file in it")
    add("--config", metavar="FILE", help="take the options of a run's config.json; others overrule them")
    add("--device", choices=DEVICES, default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")
    add("--deterministic", action="store_true", help="bit-for-bit repeatable on a GPU as well; slower")
    add("--save-every", type=COUNT, default=200, metavar="STEPS", help="steps between last.pt")
    add("--max-minutes", type=RATE, help="save and stop by the clock, exit status 0")
    return parser


def read_config(file: pathlib.Path) -> dict:
    """The config.json of a run, {script: {"options": ..., "versions": ...}}; {} if there is no such file."""
    config = None
    with contextlib.suppress(ValueError):  # not JSON
        config = json.loads(file.read_text()) if file.is_file() else {}
    if not isinstance(config, dict) or config.keys() - {"train_stage1.py", "train_stage2.py"}:
        raise ValueError(f"{file} was not written by this program: choose another folder with --out.")
    return config


def saved_options(parser: Parser, where: str, script: str) -> tuple[pathlib.Path, dict]:
    """A config.json, named by itself, its folder or a .pt file beside it, and the options of a script in it."""
    file = pathlib.Path(where if where.endswith(".json") else f"{run_folder(where)}/config.json")
    try:
        options = read_config(file)[script]["options"]
        return file, {name: value for name, value in options.items() if name not in ("resume", "config", "out")}
    except (ValueError, KeyError, TypeError, AttributeError):
        parser.error(f"{file} holds no options of {script}; is {where} its run folder?")


def argument(name: str, value) -> str:
    """An option as it stands on the command line."""
    text = ",".join(map(str, value)) if isinstance(value, list) else value
    return f"--{name.replace('_', '-')}{'' if value is True else f'={text}'}"


def parse(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """The command line, over the options of --resume or --config, over those of --stage1, over the recipe."""
    argv, saved = sys.argv[1:] if argv is None else argv, {}
    plain = [word for word in argv if word not in ("-h", "--help")]  # help waits until its defaults are known
    args = parser.parse_args(plain)
    if empty := [name for name, value in vars(args).items() if not str(value).strip()]:
        parser.error(f"{argument(empty[0], '')} is empty; is a variable of the shell not set?")
    if vars(args).get("stage1"):
        stage1 = saved_options(parser, args.stage1, "train_stage1.py")[1]
        saved = {name: stage1[name] for name in INHERITED if name in stage1}
    if args.resume or args.config:
        file, own = saved_options(parser, args.resume or args.config, parser.prog)
        own = {
            name: value
            for name, value in own.items()  # but for options that are gone and off, or were switches
            if (isinstance(value, bool) == isinstance(getattr(args, name), bool) if name in args else value)
        }
        saved |= own
        said = own.keys() | {word[2:].partition("=")[0].replace("-", "_") for word in plain}
        if gone := [argument(name, own[name]) for name in own if name not in args]:
            parser.error(f"{file} is of a version with other options: this has no {gone[0]}; go on with that one.")
        if new := [argument(name, True) for name in sorted(vars(args).keys() - said - FREE)]:
            parser.error(f"{file} is of a version with other options: give {' and '.join(new)}, too.")
    before = [argument(name, value) for name, value in saved.items() if value is not None and value is not False]
    args = parser.parse_args([*before, *plain])  # on one command line, what was saved is checked as if given now
    recipe = RECIPES[args.data] | ({"backbone": None} if args.teacher else {})
    recipe |= {"lambda_kl": 50 / 13} if (args.data, args.classes) == ("nyuv2", 13) else {}
    parser.set_defaults(**{name: value for name, value in {**recipe, **saved}.items() if name in args})
    args = parser.parse_args([*before, *argv])
    if args.resume:
        if args.config or (args.out and pathlib.Path(args.out) != file.parent):
            parser.error(f"--resume {args.resume} has its own folder and options: give neither --out nor --config.")
        args.out = str(file.parent)
        for name in sorted(own.keys() - FREE):
            if getattr(args, name) != own[name]:
                parser.error(
                    f"{argument(name, getattr(args, name))} contradicts {file}, which has "
                    f"{argument(name, own[name])}: start a new run with --config {file} --out DIR."
                )
    args.root, args.val_size = args.root or ROOTS.get(args.data), args.val_size or args.size
    return args


def stage1_options(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_options("train_stage1.py", doc)
    add = parser.add_argument_group("model").add_argument
    add("--backbone", help="segformer_b0..b5, cmnext_b0..b5; for trials segformer_tiny, cmnext_tiny")
    add("--pretrained", help="MiT ImageNet weights or a published model's, to start the teacher from")
    add("--teacher", help="a trained teacher: skip its training")
    add = parser.add_argument_group("stage 1").add_argument
    add("--epochs", type=RATE, help="of the teacher")
    add("--distill-epochs", type=WEIGHT, help="of the robust model, modalities dropped; 0: the teacher only")
    add("--robust-from", choices=("teacher", "start"), default="teacher", help="start: where the teacher started")
    add("--losses", choices=("rmmss", "anyseg"), default="rmmss", help="anyseg: the baseline, with its weights")
    add("--lambda-kl", type=WEIGHT, help="weight of KL(teacher || student) per pixel, 0..10; published: 50 / K classes")
    add("--alpha", type=WEIGHT, help="weight of the prototype distance, 0..30; 0: without; published on DELIVER: 10")
    add("--match", choices=("random", "same"), default="random", help="of modalities; same is the ablation")
    add("--prototypes", choices=("mean", "published"), default="mean", help="published: as that code has it (hpdm.py)")
    add("--beta", type=WEIGHT, default=0.0, help="weight of intra-class feature variation; CVPR 2026 version: 12")
    add("--variation", choices=("dominant", "all"), default="dominant", help="present modalities that --beta counts")
    add("--feedback", type=WEIGHT, default=0.0, help="weight of variation in a teacher that learns too; 0: it does not")
    add = parser.add_argument_group("stage 1, not in the paper").add_argument
    add("--complete", type=SHARE, default=0.0, help="share of the robust model's inputs that are complete in any case")
    add("--teacher-subsets", type=WEIGHT, default=0.4, help="weight of CE on random modality subsets; the paper: 0")
    add("--conditioned", action="store_true", help="a robust model that knows which modalities are present")
    args = parse(parser, argv)
    args.out = args.out or f"runs/{args.data}"
    if args.teacher and not args.distill_epochs:
        parser.error(f"--teacher {args.teacher} with --distill-epochs 0 trains nothing: leave one of them out.")
    if args.conditioned and not args.distill_epochs:
        parser.error("--conditioned is for the robust model, which --distill-epochs 0 leaves out.")
    if args.teacher and args.pretrained and args.robust_from == "teacher":
        parser.error("--teacher and --pretrained contradict each other: a trained teacher needs no start weights.")
    return args


def stage2_options(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_options("train_stage2.py", doc)
    add = parser.add_argument_group("models").add_argument
    add("--stage1", type=run_folder, metavar="RUN", help="run folder of stage 1, or one of its models: both are used")
    add("--teacher", help="the teacher, instead of --stage1")
    add("--robust", help="the robust model, instead of --stage1")
    add = parser.add_argument_group("stage 2").add_argument
    add("--fsm-epochs", type=RATE, help="of the feature selection, which has few parameters and needs few")
    add("--student-epochs", type=WEIGHT, help="of the final student, from the robust model on; 0: the selection only")
    add("--rule", choices=("score", "candidate"), default="score", help="relaxation to train the FSM through (fsm.py)")
    add("--temperature", type=RATE, default=0.2, help="of its softmax, 0.05..1; smaller is closer to the hard rule")
    add("--unconditioned-scores", action="store_true", help="scores that do not know which modalities are present")
    add("--unconditioned-student", action="store_true", help="a student that does not know it either (model.py)")
    add("--complete", type=SHARE, default=0.5, help="share of inputs that are complete in any case")
    add("--gamma-logits", type=WEIGHT, default=1.0, help="weight of KL(ensemble || student) per pixel, 0..10")
    add("--gamma-features", type=WEIGHT, default=0.1, help="weight of the distance to the selected features, 0..10")
    args = parse(parser, argv)
    args.out = args.out or args.stage1 or "runs/stage2"
    if args.stage1 and not saved_options(parser, args.stage1, "train_stage1.py")[1].get("distill_epochs", 1):
        parser.error(
            f"{args.stage1} was trained with --distill-epochs 0 and has no robust model to select from; train "
            f"one with train_stage1.py --teacher {args.stage1}/teacher.pt, or evaluate.py {args.stage1}."
        )
    if bool(args.stage1) == bool(args.teacher or args.robust) or bool(args.teacher) != bool(args.robust):
        parser.error("give either --stage1 RUN, or both --teacher FILE and --robust FILE.")
    return args
