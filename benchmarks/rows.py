"""What `reproduce` runs: every data set's recipe, and the rows, each of which isolates one thing."""

from collections import namedtuple

RDEL = "rgb,depth,event,lidar"
TINY = "--batch-size 16 --lr 2e-3 --warmup-epochs 1 --eval-every 10000"  # validated at the end alone: last weights kept
# epochs: of the teacher, of each model that starts from it, of the FSM; flags: of both training scripts
PUBLISHED = dict(
    backbone="segformer_b0", epochs=(200, 120, 10), classes=25, modalities=RDEL, split="val", limit=None, flags=""
)
RECIPES = {
    "synthetic": dict(
        backbone="segformer_tiny",
        epochs=(160, 48, 5),
        classes=12,
        modalities=RDEL,
        split="test",
        limit="300",
        flags=TINY,
    ),
    "nyuv2": dict(
        backbone="segformer_tiny",
        epochs=(80, 20, 5),
        classes=13,
        modalities="rgb,depth",
        split="test",
        limit=None,
        flags="--classes {classes} --depth raw --size 120 --hold-out 0 " + TINY,
    ),
    "deliver": PUBLISHED,
    "muses": dict(PUBLISHED, classes=19, modalities="rgb,event,lidar"),
    "mcubes": dict(PUBLISHED, classes=20, modalities="rgb,aolp,dolp,nir", split="test"),
}

# train: the flags of the row's run, or the name of another row's run; take: the row's name in evaluate.py's table.
# {x} is the folder of run x of the same seed; {long}, {short}, {both} (robust model and student together), {all} (the
# teacher, too) and {fsm} are epochs; {lambda} and {alpha} the published weights as
# train_stage1.py counts them.
Row = namedtuple("Row", "name groups what train take evaluation", defaults=("robust", ""))
GROUPS = ("main", "levers", "sweep", "cvpr", "ablation", "stage2")
ROBUST, LONGER = (f"--teacher {{teacher}}/teacher.pt --distill-epochs {{{epochs}}}" for epochs in ("short", "both"))
CE = " --lambda-kl 0 --alpha 0"
TEACHER = " --distill-epochs 0 --teacher-subsets 0"
HALF, TOLD = " --complete 0.5", " --conditioned"
SIMPLE = LONGER + CE + HALF
KL = ROBUST + " --lambda-kl {lambda}"
HPDM = KL + " --alpha {alpha}"
VARIATION = " --beta 12 --variation all"
SELECT, STUDENT = (f"--stage1 {{hpdm}} --fsm-epochs {{fsm}} --student-epochs {epochs}" for epochs in ("0", "{short}"))
PLAIN, UNTOLD = " --gamma-logits 0 --gamma-features 0", " --unconditioned-student"
ROWS = [
    Row("teacher", "main", "teacher", "--epochs {long}" + TEACHER, "teacher"),
    Row(
        "longer",
        "main",
        "teacher, trained on as long as robust model + student",
        "--pretrained {teacher}/teacher.pt --epochs {both}" + TEACHER,
        "teacher",
    ),
    Row("dropped", "main", "modalities dropped, CE only", ROBUST + CE),
    Row("dropped_longer", "main", "modalities dropped, CE only, as long as robust + student", LONGER + CE),
    Row("simple", "main", "simple baseline: the same, half of the inputs complete", SIMPLE),
    Row("conditioned", "main", "simple baseline, conditioned on its modalities", SIMPLE + TOLD),
    Row(
        "once",
        "levers",
        "teacher, as long as teacher + robust model + student at once",
        "--epochs {all}" + TEACHER,
        "teacher",
    ),
    Row(
        "alone",
        "levers",
        "one model, dropped from its first step on, half complete, conditioned, as long",
        "--teacher {teacher}/teacher.pt --robust-from start --distill-epochs {all}" + CE + HALF + TOLD,
    ),
    Row(
        "both_ways",
        "main",
        "one model, each batch complete and with random subsets, as long as all three",
        "--epochs {all} --distill-epochs 0 --teacher-subsets 0.4",
        "teacher",
    ),
    Row("anyseg", "main", "AnySeg's losses", ROBUST + " --losses anyseg"),
    Row("kl_0.3", "sweep", "CE + KL, lambda 0.3", ROBUST + " --lambda-kl 0.3 --alpha 0"),
    Row("kl_1", "sweep", "CE + KL, lambda 1", ROBUST + " --lambda-kl 1 --alpha 0"),
    Row("kl", "main sweep cvpr", "CE + KL, published lambda", KL + " --alpha 0"),
    *(
        Row(
            f"{match}_{a}", "sweep", f"CE + KL + HPDM, {match} matching, alpha {a}", f"{KL} --alpha {a} --match {match}"
        )
        for match in ("random", "same")
        for a in (0.1, 1, 5)
    ),
    Row("same", "main sweep", "CE + KL + HPDM, same matching, published alpha", HPDM + " --match same"),
    Row("hpdm", "main sweep cvpr", "CE + KL + HPDM, random matching, published alpha", HPDM),
    Row("prototypes", "ablation", "HPDM, published prototypes", HPDM + " --prototypes published"),
    Row("start", "ablation", "HPDM, from the teacher's start weights", HPDM + " --robust-from start"),
    Row("variation", "cvpr", "KL + feature variation", KL + " --alpha 0" + VARIATION),
    Row("both", "cvpr", "HPDM + feature variation", HPDM + VARIATION),
    Row("dominant", "cvpr", "HPDM + feature variation of dominant modalities", HPDM + " --beta 12"),
    Row("feedback", "cvpr", "HPDM + dominant feature variation + feedback", HPDM + " --beta 12 --feedback 12"),
    Row("fed_teacher", "cvpr", "the teacher after that feedback", "feedback", "teacher"),
    Row("switch", "main stage2", "switch: teacher if complete, else robust", "hpdm", "switch"),
    Row("hard", "stage2", "FSM, published hard rule", "candidate", "FSM ensemble", "--fsm-rule hard"),
    Row("candidate", "stage2", "FSM, relaxed candidates", SELECT + " --rule candidate", "FSM ensemble"),
    Row("score", "stage2", "FSM, scores", SELECT + " --unconditioned-scores", "FSM ensemble"),
    Row("fsm", "main stage2", "FSM, conditioned scores", "student", "FSM ensemble"),
    Row("neither", "stage2", "student, no targets, not conditioned", STUDENT + PLAIN + UNTOLD, "student"),
    Row("unconditioned", "stage2", "student, not conditioned", STUDENT + UNTOLD, "student"),
    Row("untargeted", "stage2", "student, no targets", STUDENT + PLAIN, "student"),
    Row("student", "main stage2", "student", STUDENT, "student"),
]
TRAIN = {row.name: row.train for row in ROWS if row.train.startswith("--")}
PAPER = {  # full and mean of the 15 subsets in the CVPR 2026 version (DELIVER val, MiT-B0), as others read its tables
    "kl": (61.34, 46.42),
    "variation": (59.71, 47.51),
    "hpdm": (60.11, 49.06),
    "both": (61.11, 48.63),
    "dominant": (61.26, 49.10),
    "feedback": (61.85, 49.91),
}
