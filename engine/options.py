"""The command lines of the training scripts, and each data set's recipe, which `--data` picks: its values become the
defaults, as `python train_stage1.py --data deliver --help` shows."""

import argparse
import os
import sys
from pathlib import Path

from data import by_comma
from engine.checkpoint import FILES, FREE, fitting, load_last, read

# The published recipe (docs/paper_vs_code.md), with the usual batch size on DELIVER. Stage 2 has no published recipe.
# A single model learns as long as teacher, robust model and student together. TINY suits a short demo.
REAL = dict(backbone="segformer_b0", size=1024, batch_size=8, lr=6e-5, warmup_epochs=10.0, eval_every=10.0)
REAL |= dict(epochs=200.0, distill_epochs=120.0, fsm_epochs=10.0, student_epochs=120.0, single_epochs=440.0)
REAL["workers"] = min(4, os.cpu_count() or 1)
TINY = dict(backbone="segformer_tiny", size=64, batch_size=16, lr=2e-3, warmup_epochs=1.0, eval_every=5.0, workers=0)
TINY |= dict(epochs=40.0, distill_epochs=20.0, fsm_epochs=2.0, student_epochs=20.0, single_epochs=80.0)
RECIPES = {"synthetic": REAL | TINY, "deliver": REAL, "muses": REAL, "mcubes": REAL | dict(size=512, val_size=1024)}
RECIPES |= {"nyuv2": REAL | dict(size=480), "folder": REAL | dict(size=512)}
ROOTS = {"deliver": "data/DELIVER", "muses": "data/MUSES", "mcubes": "data/MCubeS", "nyuv2": "data/NYUDepthv2"}
# The data sets that an option is for.
USERS = {"depth": ("deliver", "nyuv2"), "label_map": ("folder",), "classes": ("nyuv2",), "hold_out": ("nyuv2",)}
# What stage 2 takes over from the run of stage 1 that it starts from; the models fix some of it.
FIXED = ("data", "modalities", "depth", "label_map", "classes", "hold_out", "absent")
INHERITED = (*FIXED, "size", "val_size", "limit", "skip_broken", "batch_size", "lr", "amp", "seed")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, but not those that are None: their help says what None means."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        return action.help if default is None or default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Answers a wrong option with one sentence, where argparse would put all of the usage before it."""

    def __init__(self, script: str, doc: str):
        super().__init__(script, f"{script} [options]", doc, formatter_class=Help, allow_abbrev=False)

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
RATE, WEIGHT, SHARE, MINUTES = number(float, 1e-9), number(float, 0), number(float, 0, 1), number(float, 1e-6, 1e5)


def run_folder(text: str) -> str:
    if Path(text).name == "last.previous.pt":
        raise argparse.ArgumentTypeError(f"'{text}': the run goes on from last.pt; to go back, delete that first")
    return str(Path(text).parent) if text.endswith(".pt") and not Path(text).is_dir() else text


def data_options(parser: Parser) -> None:
    """Of the scripts that train from the data alone; stage 2 takes all of this from its models."""
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=RECIPES, default="synthetic", help="data set; it also picks the recipe")
    add("--modalities", type=by_comma, help="by comma; default: all; of MUSES all but radar, of NYUv2 rgb,depth")
    add("--depth", choices=("hha", "raw"), default="hha", help="of DELIVER and NYUv2; published models: hha")
    add("--label-map", help='folder: label ids to classes, "shift:-1" or "0=255,1=0"; 255 = ignore')
    add("--classes", type=int, choices=(13, 40), default=40, help="NYUv2: number of classes")
    add("--hold-out", type=COUNT_OR_0, default=0, metavar="N", help="NYUv2: validate on N frames of the train list")
    add = parser.add_argument_group("model").add_argument
    add("--backbone", help="segformer_b0..b5, cmnext_b0..b5; for trials segformer_tiny, cmnext_tiny")
    add("--pretrained", metavar="FILE", help="MiT ImageNet weights, a published model's, or a checkpoint to start from")


def training_options(parser: Parser) -> None:
    """What all training scripts have. The defaults of what the recipe decides come later, in `parse`."""
    add = parser.add_argument_group("training").add_argument
    add("--root", help="folder of the data, laid out as in docs/data.md; default: data/DELIVER and the like")
    add("--size", type=SIDE, help="side of the training crop in pixels; at least 32")
    add("--val-size", type=SIDE, help="shorter side in validation and evaluation; default: --size, MCubeS 1024")
    add("--limit", type=COUNT, metavar="N", help="use only N frames of each split, spread evenly; for trials")
    add("--skip-broken", type=COUNT_OR_0, default=0, metavar="N", help="leave out at most N broken frames, listed")
    add("--workers", type=COUNT_OR_0, help="loader processes; raise it while the log's data_wait is above 0.05")
    add("--batch-size", type=COUNT, help="frames per step over all processes; halve --lr when you halve it")
    add("--lr", type=RATE, help="peak of AdamW; from --pretrained 6e-5; from random weights 1e-3, a tiny model 2e-3")
    add("--warmup-epochs", type=WEIGHT, help="linear rise from a tenth of --lr; at most half a phase is used")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision; bf16: AMX or GPUs from 8.0")
    add("--eval-every", type=RATE, help="epochs between validations (fractions allowed); the best model is kept")
    add("--seed", type=COUNT_OR_0, default=0, help="same seed, same machine: same numbers")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="run folder, new or empty; default: runs/DATA, in stage 2 that of --stage1")
    add("--resume", type=run_folder, metavar="RUN", help="continue this run exactly: its folder, or a .pt file in it")
    add("--device", choices=DEVICES, default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")
    add("--deterministic", action="store_true", help="bit-for-bit repeatable on a GPU as well; slower")
    add("--save-every", type=COUNT, default=200, metavar="STEPS", help="steps between last.pt")
    add("--max-minutes", type=MINUTES, help="save and stop by the clock, exit status 0")


def argument(name: str, value) -> str:
    """An option as it stands on the command line."""
    text = ",".join(map(str, value)) if isinstance(value, list) else value
    return f"--{name.replace('_', '-')}{'' if value is True else f'={text}'}"


def saved_options(parser: Parser, folder: Path) -> dict:
    """The options of the run in this folder, from its last checkpoint; files in its folder move along with it."""
    state = load_last(folder, warn=False)  # the run itself will
    if state is None:
        parser.error(f"--resume {folder}: this folder holds no last.pt to continue from.")
    if state["script"] != parser.prog or state["options"].get("losses") != parser.get_default("losses"):
        begun = f"{state['script']} with the losses {state['options'].get('losses', 'of that script')}"
        parser.error(f"--resume {folder}: its last checkpoint was written by {begun}; continue it in the same way.")
    saved = state["options"]
    for name in FILES:
        if saved.get(name) and Path(saved[name]).is_relative_to(saved["out"]):
            saved[name] = str(folder / Path(saved[name]).relative_to(saved["out"]))
    return {**saved, "out": str(folder)}


def parse(parser: Parser, argv: list[str] | None, inherited=None) -> argparse.Namespace:
    """Each option from the command line, else from the run of --resume, else from `inherited`, else from the recipe."""
    argv = sys.argv[1:] if argv is None else argv
    first = parser.parse_args([word for word in argv if word not in ("-h", "--help")])  # its defaults are not known yet
    if empty := [name for name, value in vars(first).items() if not str(value).strip()]:
        parser.error(f"{argument(empty[0], '')} is empty; is a variable of the shell not set?")
    saved = inherited(first) if inherited and not {"-h", "--help"} & set(argv) else {}
    if first.resume:
        saved = saved_options(parser, Path(first.resume))
        if other := sorted(saved.keys() ^ {*vars(first), *FIXED}):
            name = argument(other[0], "...")
            parser.error(f"{first.resume} is of a version with other options, such as {name}: go on with that one.")
    data = saved.get("data") or getattr(first, "data", "synthetic")
    recipe = RECIPES[data] | ({"epochs": RECIPES[data]["single_epochs"]} if parser.prog == "train_single.py" else {})
    recipe |= {"backbone": None} if getattr(first, "teacher", None) else {}
    recipe |= {"lr": 1e-3} if data == "folder" and not getattr(first, "pretrained", None) else {}
    parser.set_defaults(**{name: value for name, value in recipe.items() if name in first} | saved)
    args = parser.parse_args(argv)
    moved = {name for name in FILES if saved.get(name)}  # a file that the run started from, perhaps in a new place
    fixed = saved.keys() - (FREE - {"out"}) - moved if first.resume else ()
    for name in sorted(fixed):
        mine, its = argument(name, getattr(args, name)), argument(name, saved[name])
        if mine != its:
            parser.error(f"{mine} contradicts the run in {saved['out']}, which has {its}: choose another --out.")
    parser.given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    for name, sets in USERS.items():
        refuse(parser, f"with --data {args.data}, only with {' and '.join(sets)}", args.data not in sets, name)
    args.root, args.val_size = args.root or ROOTS.get(args.data), args.val_size or args.size
    return args


def refuse(parser: Parser, where: str, when: object, *names: str) -> None:
    """Ends the script if `when` holds and the command line gives one of these options, which does nothing then."""
    if when and (given := [name for name in names if name in parser.given]):
        parser.error(f"--{given[0].replace('_', '-')} has no effect {where}: leave it out.")


def stage1_options(doc: str, argv: list[str] | None = None, losses: str = "paper_losses") -> argparse.Namespace:
    """losses: the name of the function that computes them; a run is resumed with the same one."""
    parser = Parser("train_stage1.py", doc)
    parser.set_defaults(losses=losses)
    data_options(parser)
    add = parser.add_argument_group("stage 1").add_argument
    add("--teacher", metavar="FILE", help="a trained teacher: skip its training")
    add("--epochs", type=RATE, help="of the teacher")
    add("--distill-epochs", type=WEIGHT, help="of the robust model, modalities dropped; 0: the teacher only")
    add("--robust-from", choices=("teacher", "start"), default="teacher", help="start: where the teacher started")
    add("--lambda-kl", type=WEIGHT, default=50.0, help="weight of KL(teacher || robust) on the logits")
    add("--alpha", type=WEIGHT, default=100.0, help="weight of the prototype distance; 0: without")
    add("--match", choices=("random", "same"), default="random", help="of modalities by HPDM; same: the ablation")
    add("--absent", choices=("skip", "zero"), default="skip", help="zero: absent modalities are encoded as zero images")
    training_options(parser)
    args = parse(parser, argv)
    args.out = args.out or f"runs/{args.data}"
    if args.teacher and not args.distill_epochs:
        parser.error(f"--teacher {args.teacher} with --distill-epochs 0 trains nothing: leave one of them out.")
    if not args.distill_epochs and losses != "paper_losses":
        parser.error(f"{losses} with --distill-epochs 0 trains only a teacher, which has no such losses.")
    if losses == "published" and not args.alpha:
        parser.error("published with --alpha 0 is the paper's script with --alpha 0.")
    others = "lambda_kl", "alpha", "match", "absent", "robust_from"
    refuse(parser, "with --distill-epochs 0", not args.distill_epochs, *others)
    refuse(parser, "on AnySeg's losses", losses == "anyseg", "lambda_kl", "alpha", "match")
    refuse(parser, f"with --teacher {args.teacher}", args.teacher, "epochs")
    refuse(parser, f"on --resume {args.resume}, which has a copy of it", args.resume, "teacher")
    refuse(parser, "with --alpha 0", not args.alpha, "match")
    if args.teacher and args.pretrained and args.robust_from == "teacher":
        parser.error("--teacher and --pretrained contradict each other: a trained teacher needs no start weights.")
    return args


def single_options(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("train_single.py", doc)
    data_options(parser)
    add = parser.add_argument_group("single model").add_argument
    add("--epochs", type=RATE, help="by default as many as of teacher, robust model and student together")
    add("--subset-weight", type=WEIGHT, default=0.4, help="of CE on random subsets; larger: better with some missing")
    training_options(parser)
    parser.set_defaults(absent="skip")
    args = parse(parser, argv)
    args.out = args.out or f"runs/{args.data}-single"
    return args


def require_robust(run: str | None) -> None:
    """Raises ValueError if a run of stage 1 has no robust model yet, or no longer."""
    last = load_last(Path(run)) if run else None
    if last and last["script"] == "train_stage1.py":
        complete = (last["phase"], last["step"]) == ("robust", last["steps"])
        if not complete or not Path(run, "robust.pt").exists():
            over = complete or not last["options"]["distill_epochs"]  # nothing is left to resume
            way = f"--teacher {run}/teacher.pt" if over else f"--resume {run}"
            what = f"{run} has no finished robust model (step {last['step']} of {last['steps']} of {last['phase']})"
            raise ValueError(f"{what}: train_stage1.py {way}, or name models with --teacher and --robust.")


def stage2_options(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("train_stage2.py", doc)
    add = parser.add_argument_group("models").add_argument
    add("--stage1", type=run_folder, metavar="RUN", help="run folder of stage 1, or one of its models: both are used")
    add("--teacher", metavar="FILE", help="the teacher, instead of --stage1")
    add("--robust", metavar="FILE", help="the robust model, instead of --stage1")
    add = parser.add_argument_group("stage 2 (this project's choices: the paper's are not known)").add_argument
    add("--fsm-epochs", type=RATE, help="of the feature selection, which has few parameters and needs few")
    add("--student-epochs", type=WEIGHT, help="of the final student, from the robust model on; 0: the selection only")
    add("--rule", choices=("score", "candidate"), default="score", help="relaxation to train the FSM through (fsm.py)")
    add("--temperature", type=number(float, 0.05, 1), default=0.2, help="of its softmax; small is near the hard rule")
    add("--unconditioned-scores", action="store_true", help="scores that do not know which modalities are present")
    add("--complete", type=SHARE, default=0.5, help="fraction of inputs that are complete in any case")
    add("--gamma-logits", type=WEIGHT, default=25.0, help="weight of KL(ensemble || student), as --lambda-kl")
    add("--gamma-features", type=number(float, 0, 10), default=0.1, help="weight of the distance to its features")
    training_options(parser)

    def from_models(args: argparse.Namespace) -> dict:
        if args.resume:
            return {}
        if bool(args.stage1) == bool(args.teacher or args.robust) or bool(args.teacher) != bool(args.robust):
            parser.error("give either --stage1 RUN, or both --teacher FILE and --robust FILE.")
        require_robust(args.stage1)
        robust = Path(args.robust or f"{args.stage1}/robust.pt")
        meta = read(robust, says=("options", "root"))["meta"]
        with fitting(f"{robust} does not say the options of its run"):
            options = {name: meta["options"][name] for name in INHERITED}
        return {**options, "root": meta["root"], "out": args.stage1 or "runs/stage2"}

    args = parse(parser, argv, from_models)
    if args.resume:
        for name in ("stage1", "teacher", "robust"):
            if (path := getattr(args, name)) and not os.path.exists(path):
                raise ValueError(f"{path}, which the run started from, is not there; name its new place by --{name}.")
        require_robust(args.stage1)  # which may be trained anew
    refuse(parser, "with --student-epochs 0", not args.student_epochs, "gamma_logits", "gamma_features")
    aimless = args.student_epochs and not args.gamma_logits and not args.gamma_features
    refuse(parser, "where the student has no target of the FSM", aimless, "rule", "temperature", "fsm_epochs")
    return args
