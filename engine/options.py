"""The command lines of both training stages, and each data set's recipe.

Nothing heavy is imported here: `--help` and a mistyped option answer before torch is loaded.
`--data` picks the recipe whose values become the defaults; `python train_stage1.py --data deliver --help` shows them.
"""

import argparse
import json
import math
import os
import pathlib
import re
import sys

# Published (paper, section 5): AdamW 6e-5, weight decay 0.01, 10 epochs of warm-up from 0.1, poly 0.9, 200 epochs for
# the teacher, 120 for the student, 1024 x 1024.  The batch size is not stated there; 8 is the usual choice on DELIVER.
# Stage 2 has no published recipe at all.  The synthetic one was chosen for the time that a demo may take.
# lambda_kl is the published 50 / K; alpha is chosen here.
PUBLISHED = dict(backbone="segformer_b0", size=1024, epochs=200.0, distill_epochs=120.0, fsm_epochs=10.0,
                 student_epochs=120.0, batch_size=8, lr=6e-5, warmup_epochs=10.0, eval_every=10.0, lambda_kl=50 / 25,
                 alpha=1.0)  # fmt: skip
RECIPES = {
    "synthetic": dict(PUBLISHED, backbone="segformer_tiny", size=64, epochs=40.0, distill_epochs=20.0, fsm_epochs=2.0,
                      student_epochs=20.0, batch_size=16, lr=2e-3, warmup_epochs=1.0, eval_every=5.0, lambda_kl=0.3,
                      alpha=0.1),
    "deliver": PUBLISHED,
    "muses": dict(PUBLISHED, lambda_kl=50 / 19),
    "mcubes": dict(PUBLISHED, size=512, lambda_kl=50 / 20),
    "nyuv2": dict(PUBLISHED, size=480, lambda_kl=50 / 40),
    "folder": dict(PUBLISHED, size=512, lambda_kl=1.0),
}  # fmt: skip
ROOTS = {"deliver": "data/DELIVER", "muses": "data/MUSES", "mcubes": "data/MCubeS", "nyuv2": "data/NYUDepthv2"}
# Options that may change when a run is continued: they do not change what it computes.
FREE = {"resume", "config", "out", "root", "workers", "device", "max_minutes", "save_every", "tensorboard"}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=120)


class Parser(argparse.ArgumentParser):
    """Answers a wrong option with one sentence, where argparse would put all of the usage before it."""

    def __init__(self, script: str, doc: str):
        super().__init__(script, description=doc, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(kind: type, zero: bool = False):
    """An argparse type: a number of this kind above 0 (or from 0 on)."""

    def parse(text: str):
        value = kind(text)
        if not 0 <= value < math.inf or (value == 0 and not zero):
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} {'from 0 on' if zero else 'above 0'}"
    return parse


def names(text: str) -> list[str]:
    """An argparse type: names separated by commas, none twice."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found or len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"'{text}' must be names separated by commas, none twice")
    return found


def share(text: str) -> float:
    """An argparse type: a number in 0..1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be in 0..1")
    return value


def run_folder(text: str) -> str:
    """An argparse type: a run's folder, which may be named by one of its .pt files too."""
    return str(pathlib.Path(text).parent) if text.endswith(".pt") else text


def device(text: str) -> str:
    """An argparse type: auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"'{text}' must be auto, cpu, cuda or cuda:N")
    return text


def add_data_options(parser: argparse.ArgumentParser, recipe: dict) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data", choices=RECIPES, default="synthetic", help="data set; it also picks the recipe")
    group.add_argument("--root", help="folder of the data set, in its published layout (README); None: data/NAME")
    group.add_argument("--modalities", type=names,
                       help="sensors and their order, by comma; fewer train faster. None: all, of MUSES all but radar")
    group.add_argument("--depth", choices=("hha", "raw"), default="hha", help="DELIVER's depth; published models: hha")
    group.add_argument("--label-map", help='folder data: label ids to classes, "shift:-1" or "0=255,1=0"; 255 = ignore')
    group.add_argument("--classes", type=int, choices=(13, 40), help="nyuv2: which of its two label sets. None: 40")
    group.add_argument("--hold-out", type=positive(int, zero=True), default=0, metavar="N",
                       help="nyuv2: validate on N frames of the train list, kept aside to choose settings on; 0: on "
                            "the test list, as everyone reports it")
    group.add_argument("--size", type=positive(int), default=recipe["size"],
                       help="side of the training crop, pixels, from 32 on; larger sees more, costs its square")
    group.add_argument("--val-size", type=positive(int),
                       help="shorter side of the frames in validation and evaluation, pixels. None: --size")
    group.add_argument("--limit", type=positive(int), help="use only N frames of each split, spread evenly; for trials")
    group.add_argument("--skip-broken", type=positive(int, zero=True), default=0, metavar="N",
                       help="go on past at most N broken frames (each is listed) instead of stopping at the first")
    workers = 0 if recipe["size"] < 128 else min(4, os.cpu_count() or 1)
    group.add_argument("--workers", type=positive(int, zero=True), default=workers,
                       help="loader processes per training process; more while the log shows a data_wait above 0.05")


def add_training_options(parser: argparse.ArgumentParser, recipe: dict) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--batch-size", type=positive(int), default=recipe["batch_size"],
                       help="frames per step over all processes; halve --lr when you halve it")
    group.add_argument("--lr", type=positive(float), default=recipe["lr"], help="peak learning rate of AdamW; "
                       "1e-5..3e-3: with pretrained weights 6e-5, a tiny model from scratch 2e-3; too high diverges")
    group.add_argument("--weight-decay", type=positive(float, zero=True), default=0.01, help="none for 1-D parameters")
    group.add_argument("--warmup-epochs", type=positive(float, zero=True), default=recipe["warmup_epochs"],
                       help="linear rise from a tenth of --lr; at most half a phase is used")
    group.add_argument("--drop-path", type=share, default=0.1, help="rate of the last block; 0 for very small models")
    group.add_argument("--dropout", type=share, default=0.1, help="of the decoder's channels")
    group.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off",
                       help="mixed precision: bf16 on CPUs with AMX and on GPUs from 8.0, fp16 on older GPUs")
    group.add_argument("--compile", action="store_true",
                       help="torch.compile the models: takes minutes at the start; the gain was not measured")
    group.add_argument("--eval-every", type=positive(float), default=recipe["eval_every"],
                       help="epochs between validations (fractions allowed); the best model so far is kept")
    group.add_argument("--seed", type=positive(int, zero=True), default=0, help="same seed, same machine: same numbers")


def add_run_options(parser: argparse.ArgumentParser, out: str) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--out", default=out, help="run folder; must be empty or new, unless --resume continues it")
    group.add_argument("--resume", metavar="RUN", help="continue this run folder (or its last.pt) exactly")
    group.add_argument("--config", metavar="FILE", help="take the options of a run's config.json; others overrule them")
    group.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--deterministic", action="store_true", help="bit-for-bit repeatable on a GPU as well; slower")
    group.add_argument("--save-every", type=positive(int), default=200, metavar="STEPS", help="steps between last.pt")
    group.add_argument("--max-minutes", type=positive(float), help="save and stop by the clock, exit status 0")
    group.add_argument("--tensorboard", action="store_true", help="also write curves, if tensorboard is installed")


def early(argv: list[str], *flags: str) -> argparse.Namespace:
    """A few flags of this command line, read before the real parse because they decide its defaults."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        first.add_argument(flag)
    return first.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]


def read_config(parser: argparse.ArgumentParser, path: str, script: str) -> tuple[pathlib.Path, dict]:
    """The options of `script` in a run folder's config.json; path: that file, its folder, or a .pt file beside it."""
    file = pathlib.Path(path)
    file = file.parent / "config.json" if file.suffix == ".pt" else file
    file = file / "config.json" if file.suffix != ".json" else file
    try:
        return file, json.loads(file.read_text())[script]["options"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{file} holds no options of {script} ({type(error).__name__}); is {path} a run folder of it?")


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The command line, over --config or the resumed run's config.json, over the defaults."""
    o = parser.parse_args(argv)
    if o.resume or o.config:
        file, saved = read_config(parser, o.resume or o.config, parser.prog)
        if unknown := sorted(set(saved) - set(vars(o))):
            parser.error(f"{file} holds options this version does not know: {', '.join(unknown)}.")
        parser.set_defaults(**{k: v for k, v in saved.items() if k not in ("resume", "config", "out")})
        o = parser.parse_args(argv)
        if o.resume:
            o.out = str(file.parent)
            if pathlib.Path(o.resume).suffix == ".pt" and pathlib.Path(o.resume).name != "last.pt":
                parser.error(f"--resume {o.resume}: give the run folder or its last.pt, where all is that a run needs.")
            if o.config or pathlib.Path(early(argv, "--out").out or file.parent) != file.parent:
                parser.error(f"--resume {o.resume} has its own folder and options: give neither --out nor --config.")
            for name, value in saved.items():
                if name not in FREE and getattr(o, name) != value:
                    flag = f"--{name.replace('_', '-')} {getattr(o, name)}"
                    parser.error(f"{flag} contradicts {file}, which says {value}: leave it out, "
                                 f"or start a new run with --config {file} --out DIR.")  # fmt: skip
    if o.config and not early(argv, "--out").out:
        parser.error(f"--config {o.config} repeats a run: give it a folder of its own with --out DIR.")
    if o.data == "folder" and not o.root:
        parser.error("--data folder needs --root, the folder that holds classes.txt.")
    if o.size < 32:
        parser.error(f"--size {o.size} is too small: the coarsest stage needs at least 32 pixels.")
    if o.label_map and o.data != "folder":
        parser.error(f"--label-map is for --data folder; {o.data} has its own label ids.")
    o.root = o.root or ROOTS.get(o.data)
    if o.data != "nyuv2" and (o.classes or o.hold_out):
        parser.error(f"--classes and --hold-out are for --data nyuv2, not for {o.data}.")
    o.classes = o.classes or (40 if o.data == "nyuv2" else None)
    o.val_size = o.val_size or o.size
    return o


def stage1_options(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    first = early(argv, "--data", "--teacher", "--classes")
    data, recipe = first.data, RECIPES.get(first.data, RECIPES["synthetic"])
    recipe = dict(recipe, lambda_kl=50 / 13) if (data, first.classes) == ("nyuv2", "13") else recipe
    parser = Parser("train_stage1.py", doc)
    add_data_options(parser, recipe)
    group = parser.add_argument_group("model")
    group.add_argument("--backbone", default=None if first.teacher else recipe["backbone"],
                       help="segformer_b0..b5 or cmnext_b0..b5, or segformer_tiny, cmnext_tiny for trials; "
                       "with --teacher its own")  # fmt: skip
    group.add_argument("--pretrained", help="MiT ImageNet weights or a published model's, to start the teacher from")
    group.add_argument("--teacher", help="a trained teacher: skip its training")
    add_training_options(parser, recipe)
    group = parser.add_argument_group("stage 1")
    group.add_argument("--epochs", type=positive(float), default=recipe["epochs"],
                       help="of the teacher, on all sensors; all that follows starts from it")
    group.add_argument("--distill-epochs", type=positive(float, zero=True), default=recipe["distill_epochs"],
                       help="of the robust model, sensors dropped at random; 0: the teacher only")
    group.add_argument("--robust-from", choices=("teacher", "start"), default="teacher",
                       help="what the robust model starts from: the teacher, as in the paper, or, as the published "
                            "script has it, the weights that the teacher started from (--pretrained, or --seed)")
    group.add_argument("--losses", choices=("rmmss", "anyseg"), default="rmmss",
                       help="anyseg: the losses and weights of that paper, the baseline; --lambda-kl, --alpha and "
                            "--beta do not act there")
    group.add_argument("--lambda-kl", type=positive(float, zero=True), default=recipe["lambda_kl"],
                       help="weight of KL(teacher || student) per pixel, 0..10; published: 50 / K, 2 for 25 classes")
    group.add_argument("--kl-teacher", choices=("full", "subset"), default="full",
                       help="not in the paper: subset shows the teacher the student's modalities alone for that KL")
    group.add_argument("--alpha", type=positive(float, zero=True), default=recipe["alpha"],
                       help="weight of the prototype distance, 0..30; 0 leaves plain distillation; published: 100 / K "
                            "times the mean number of present modalities, 10 for 25 classes and 4 modalities")
    group.add_argument("--match", choices=("random", "same"), default="random",
                       help="teacher modality a student modality answers to: random is the paper's, same its ablation")
    group.add_argument("--prototypes", choices=("mean", "published"), default="mean",
                       help="mean is the paper's; published divides by the pixel count twice, as its code (hpdm.py)")
    group.add_argument("--fused-prototypes", action="store_true",
                       help="not in the paper: prototypes of the fused features instead of each modality's")
    group.add_argument("--beta", type=positive(float, zero=True), default=0.0,
                       help="weight of intra-class feature variation (CVPR 2026 version: 12), 0 = off")
    group.add_argument("--variation", choices=("dominant", "all"), default="dominant",
                       help="modalities that --beta counts: the dominant half of the present ones, or all of them")
    group.add_argument("--feedback", type=positive(float, zero=True), default=0.0,
                       help="the teacher learns, too, at a tenth of --lr: CE and this weight times feature variation "
                            "towards the student, on the modalities that are not dominant (CVPR 2026 version, eq. 9)")
    group.add_argument("--complete", type=share, default=0.0,
                       help="share of the robust model's inputs that are complete in any case; 0 is the paper's")
    group.add_argument("--conditioned", action="store_true",
                       help="not in the paper: a robust model that knows which modalities are present (model.py)")
    group.add_argument("--average", type=positive(float, zero=True), default=0.0, metavar="N",
                       help="not in the paper: the robust model is the mean of its weights over the last N epochs")
    add_run_options(parser, f"runs/{data or 'synthetic'}")
    o = parse(parser, argv)
    if o.teacher and o.pretrained and o.robust_from == "teacher":
        parser.error("--teacher and --pretrained contradict each other: a trained teacher needs no start weights.")
    return o


def stage2_options(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    first = early(argv, "--data", "--stage1")
    first.stage1 = first.stage1 and run_folder(first.stage1)
    parser = Parser("train_stage2.py", doc)
    stage1 = read_config(parser, first.stage1, "train_stage1.py")[1] if first.stage1 else {}
    recipe = RECIPES.get(first.data or stage1.get("data"), RECIPES["synthetic"])
    add_data_options(parser, recipe)
    group = parser.add_argument_group("models")
    group.add_argument("--stage1", type=run_folder, metavar="RUN",
                       help="run folder of stage 1, for its teacher.pt and robust.pt")
    group.add_argument("--teacher", help="the full-modality teacher, instead of --stage1")
    group.add_argument("--robust", help="the robust model, instead of --stage1")
    add_training_options(parser, recipe)
    group = parser.add_argument_group("stage 2")
    group.add_argument("--fsm-epochs", type=positive(float), default=recipe["fsm_epochs"],
                       help="of the feature selection; it has few parameters and needs few")
    group.add_argument("--student-epochs", type=positive(float, zero=True), default=recipe["student_epochs"],
                       help="of the final student, started from the robust model; 0: the selection only")
    group.add_argument("--rule", choices=("score", "candidate"), default="score",
                       help="relaxation the FSM is trained through (fsm.py)")
    group.add_argument("--temperature", type=positive(float), default=0.2,
                       help="of that softmax, 0.05..1; smaller is closer to the hard rule, and harder to train")
    group.add_argument("--unconditioned-scores", action="store_true",
                       help="scores that do not know which sensors are present (fsm.py)")
    group.add_argument("--unconditioned-student", action="store_true",
                       help="a student that does not know which sensors are present (model.py)")
    group.add_argument("--complete", type=share, default=0.5,
                       help="share of inputs that are complete in any case, for scores and student; the others are "
                            "random subsets")
    group.add_argument("--gamma-logits", type=positive(float, zero=True), default=1.0,
                       help="weight of KL(student || the ensemble's answer); 0 with --gamma-features 0: no FSM targets")
    group.add_argument("--gamma-features", type=positive(float, zero=True), default=0.1,
                       help="weight of the distance to the selected features, 0..10")
    add_run_options(parser, first.stage1 or "runs/stage2")
    inherited = ("data", "root", "modalities", "depth", "label_map", "classes", "hold_out", "size", "val_size", "limit",
                 "skip_broken", "batch_size", "lr", "amp", "seed")  # fmt: skip
    parser.set_defaults(**{name: stage1[name] for name in inherited if name in stage1})
    o = parse(parser, argv)
    if bool(o.stage1) == bool(o.teacher or o.robust):
        parser.error("give either --stage1 RUN, or both --teacher FILE and --robust FILE.")
    if not o.stage1 and not (o.teacher and o.robust):
        parser.error("--teacher and --robust belong together: give both, or --stage1 RUN.")
    return o
