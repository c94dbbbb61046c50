"""evaluate.py: every protocol and every shortcut against plain forwards of composed images, frame by frame."""

import itertools
import json
import math
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import MODALITIES, golden_weights

import evaluate
import metrics
from data import normalise, open_dataset, random_missing, sensor_noise
from datasets.export import write_file
from engine import checkpoint, loop, output
from engine.subsets import all_subsets, subset_logits
from fsm import FSM
from model import build_model

BACKBONES = pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
SUBSETS = all_subsets(4)
CPU, SAME = torch.device("cpu"), ["classes", "modalities"]
NORMALISATION = [[[0.0] * 3] * 4, [[1.0] * 3] * 4]
K = 12  # as many as the scenes have


def random_model(backbone, modalities=4):
    model = build_model(backbone, K, MODALITIES[:modalities])
    shapes = {name: list(v.shape) for name, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    model.load_state_dict(golden_weights(json.dumps(shapes).encode()), strict=False)  # so that predictions vary
    return model.eval()


def random_images(size=(64, 64), samples=3, seed=0):
    return torch.randn(samples, 4, 3, *size, generator=torch.Generator().manual_seed(seed))


def assert_same_prediction(logits, expected):
    """Equal but for rounding: close logits, and at most 1 pixel in 10,000 with another class."""
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits.argmax(1) != expected.argmax(1)).double().mean() <= 1e-4
    assert expected.argmax(1).unique().numel() > 3  # a constant prediction would show nothing


def by_hand(model, images, degraded, subset):
    """One complete forward on images whose missing sensors were replaced one by one."""
    composed = images.clone()
    for m in range(images.shape[1]):
        if m not in subset:
            composed[:, m] = degraded[:, m]
    return model(composed).logits


def test_all_subsets_are_there_once_and_the_complete_one_is_last():
    assert len(set(SUBSETS)) == 15 and SUBSETS[-1] == (0, 1, 2, 3)
    assert {frozenset(s) for s in SUBSETS} == {
        frozenset(s) for n in (1, 2, 3, 4) for s in itertools.combinations(range(4), n)
    }
    names = [evaluate.subset_name(s, MODALITIES) for s in SUBSETS]
    assert names[0] == "R" and names[-1] == "RDEL" and "EL" in names and len(set(names)) == 15
    assert evaluate.subset_name((0, 2), ["rgb", "depth", "radar"]) == "rgb+radar"


@torch.no_grad()
@BACKBONES
def test_all_15_subsets_equal_complete_forwards_of_the_same_model(backbone):
    model, images = random_model(backbone), random_images()
    together = torch.stack(list(subset_logits(model, images, SUBSETS)))  # (15, B, K, H, W)
    present = torch.zeros(15, 4, dtype=torch.bool)
    for row, subset in zip(present, SUBSETS, strict=True):
        row[list(subset)] = True
    complete = torch.stack([model(images, row.expand(3, 4)).logits for row in present])
    assert_same_prediction(together.flatten(0, 1), complete.flatten(0, 1))


@torch.no_grad()
@BACKBONES
def test_zero_filled_and_damaged_sensors_equal_images_composed_by_hand(backbone):
    model, images = random_model(backbone), random_images((45, 64), samples=2)
    damaged = images * (torch.rand(images.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    subsets = SUBSETS if backbone == "segformer_tiny" else SUBSETS[::3] + SUBSETS[-1:]
    for degraded in (torch.zeros_like(images[:1]), damaged):
        ours = torch.cat(list(subset_logits(model, images, subsets, degraded)))
        assert_same_prediction(ours, torch.cat([by_hand(model, images, degraded, s) for s in subsets]))
    missing = [s for s in subsets if len(s) < 4]
    left_out, filled = (torch.cat(list(subset_logits(model, images, missing, d))) for d in (None, damaged))
    assert (left_out - filled).abs().max() > 0.1  # the two are different protocols


def a_run(batch_size, workers=0, protocol=evaluate.PROTOCOLS):
    """As runs.Run in one process, with what `evaluate` needs of the options."""
    args = SimpleNamespace(batch_size=batch_size, workers=workers, seed=3, amp="off", protocol=list(protocol))
    return SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), reduce=lambda x: x, args=args)


def scenes(modalities, frames):
    """Validation scenes of every weather, some with a failing sensor."""
    dataset = open_dataset("synthetic", split="val", modalities=MODALITIES[:modalities], size=32, limit=30)
    dataset.frames = dataset.frames[30 - frames :]
    return dataset


def in_float64(model):
    """A predictor without rounding to speak of: a pixel on the border of two classes falls on one side in any batch."""
    model = model.double()
    return lambda images, subsets, degraded=None: subset_logits(
        model, images.double(), subsets, None if degraded is None else degraded.double()
    )


@BACKBONES
def test_no_batch_size_or_worker_changes_a_number(backbone):
    modalities = 4 if backbone == "segformer_tiny" else 2
    dataset, predict = scenes(modalities, frames=8), in_float64(random_model(backbone, modalities))
    one = evaluate.evaluate(predict, dataset, a_run(1))
    seven = evaluate.evaluate(predict, dataset, a_run(7, workers=1))
    assert one == seven
    counts = {protocol: len(columns) for protocol, columns in one.items()}
    n = 2**modalities - 1
    assert counts == {"any": n, "emm": n, "rmm": 3 * n, "nm": 3, "condition": 5, "case": 2}


@torch.no_grad()
def test_every_protocol_equals_its_definition_frame_by_frame():
    dataset, model = scenes(4, frames=7), random_model("segformer_tiny")
    results = evaluate.evaluate(in_float64(model), dataset, a_run(4))
    model.double()
    matrices = {}
    for index, frame in enumerate(dataset.frames):
        images, label, name = dataset[index]
        images = normalise(images[None], *dataset.normalisation)

        def count(protocol, column, given, present=None, label=label):
            matrix = metrics.confusion(model(given.double(), present).logits.argmax(1), label[None], K)
            matrices[protocol, column] = matrices.get((protocol, column), 0) + matrix

        for subset in ((0,), (1, 3)):
            column = evaluate.subset_name(subset, MODALITIES)
            present = torch.tensor([[m in subset for m in range(4)]])
            count("any", column, images, present)
            count("emm", column, images * present[:, :, None, None, None])
            for r in (0.25, 0.5, 0.75):
                count("rmm", f"{column} {r}", random_missing(images, present, r, [name], seed=3))
        for level in ("low", "mid", "high"):
            count("nm", level, sensor_noise(images, level, [name], MODALITIES, seed=3))
        count("condition", frame.condition, images)
        count("case", frame.case, images)
    assert {column for protocol, column in matrices if protocol == "case"} == {"motionblur", "none"}
    for (protocol, column), matrix in matrices.items():
        assert results[protocol][column] == metrics.scores(matrix), (protocol, column)
    assert results["any"]["R"]["iou"] != results["emm"]["R"]["iou"] != results["rmm"]["R 0.5"]["iou"]


def test_a_damaged_sensor_loses_the_share_of_values_that_the_protocol_says():
    images = random_images(samples=2) + 10
    for r in evaluate.RMM_RATES:
        lost = random_missing(images, torch.tensor([[True, False, False, True]] * 2), r, ["a", "b"]) == 0
        assert not lost[:, [0, 3]].any()
        assert lost[:, 1:3].double().mean() == pytest.approx(r, abs=0.01)  # 49,152 values: a deviation of 0.002


# ---- tables -----------------------------------------------------------------------------------------------------


def random_results(seed, protocols=evaluate.PROTOCOLS):
    """Invented scores with the columns that `evaluate` gives."""
    g = torch.Generator().manual_seed(seed)
    names = [evaluate.subset_name(s, MODALITIES) for s in SUBSETS]
    columns = {
        "any": names,
        "emm": names,
        "rmm": [f"{n} {r}" for r in evaluate.RMM_RATES for n in names],
        "nm": ["low", "mid", "high"],
        "condition": ["fog", "sun"],
        "case": ["lidarjitter", "none"],
    }
    return {
        p: {
            c: {rule: 100 * float(torch.rand((), generator=g)) for rule in ("miou_published", "miou_occurring")}
            for c in columns[p]
        }
        for p in protocols
    }


@pytest.mark.parametrize("p", evaluate.FAILURE_RATES)
def test_the_expectation_is_over_sensors_that_fail_on_their_own(p):
    results = random_results(1)
    for protocol, rate in (("emm", ""), ("rmm", 0.25), ("rmm", 0.5), ("rmm", 0.75)):
        scores, expectation = results[protocol], 0.0
        for works in itertools.product((True, False), repeat=4):
            if any(works):
                chance = math.prod(1 - p if w else p for w in works)
                name = "".join(sensor[0].upper() for sensor, w in zip(MODALITIES, works, strict=True) if w)
                expectation += chance * scores[f"{name} {rate}".strip()]["miou_published"]
        table = evaluate.summary(protocol, [s["miou_published"] for s in scores.values()], MODALITIES)
        column = f"r={rate} E({p})" if rate else f"E({p})"
        assert table[column] == pytest.approx(expectation / (1 - p**4))  # given that at least one works
        assert table["mean"] == pytest.approx(sum(s["miou_published"] for s in scores.values()) / len(scores))


def test_the_summaries_average_what_their_names_say():
    results = random_results(2)
    value = {p: {c: s["miou_published"] for c, s in scores.items()} for p, scores in results.items()}
    table = {p: evaluate.summary(p, list(values.values()), MODALITIES) for p, values in value.items()}
    missing = [v for c, v in value["any"].items() if c != "RDEL"]
    assert set(table["any"]) == {"full", "missing", "mean"} and table["any"]["full"] == value["any"]["RDEL"]
    assert len(missing) == 14
    assert table["any"]["missing"] == pytest.approx(sum(missing) / 14)
    assert table["any"]["mean"] == pytest.approx((sum(missing) + value["any"]["RDEL"]) / 15)
    for r in (0.25, 0.5, 0.75):
        expected = [v for c, v in value["rmm"].items() if c.endswith(f" {r}")]
        assert len(expected) == 15 and table["rmm"][f"r={r}"] == pytest.approx(sum(expected) / 15)
    for p in ("nm", "condition", "case"):
        assert table[p] == {"mean": pytest.approx(sum(value[p].values()) / len(value[p]))}


def cells_of(text):
    """A table's title, and its rows of cells."""
    title, _, *lines = text.split("\n")
    assert len({len(line) for line in lines}) == 1  # aligned
    return title, [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "--" not in line]


def test_tables_hold_every_number_and_the_differences_to_the_first_row():
    results = {"teacher": random_results(3), "student": random_results(4)}
    for protocol, title in evaluate.PROTOCOLS.items():
        found, (head, *rows) = cells_of(evaluate.tables(results, MODALITIES, [protocol]))
        assert title in found
        columns = [] if protocol == "rmm" else list(results["teacher"][protocol])
        published, others = (
            {name: [score[rule] for score in scores[protocol].values()] for name, scores in results.items()}
            for rule in ("miou_published", "miou_occurring")
        )
        means = {name: evaluate.summary(protocol, published[name], MODALITIES) for name in results}
        assert head == ["", *columns, *means["teacher"], "mean, occurring"]
        for name, row in zip(results, rows, strict=True):
            assert row[0] == name and float(row[-1]) == pytest.approx(sum(others[name]) / len(others[name]), abs=0.006)
            plain = [float(cell) for cell in row[1 : 1 + len(columns)]]
            assert plain == pytest.approx(published[name][: len(columns)], abs=0.006)
            for column, cell in zip(means[name], row[1 + len(columns) : -1], strict=True):
                number, _, difference = cell.partition(" ")
                assert float(number) == pytest.approx(means[name][column], abs=0.006)
                gap = means[name][column] - means["teacher"][column]
                assert (difference == "") == (name == "teacher")
                assert not difference or float(difference.strip("()")) == pytest.approx(gap, abs=0.006)


def test_a_weather_called_mean_and_a_modality_called_full_keep_their_columns():
    weather = {"condition": {c: {"miou_published": v, "miou_occurring": v} for c, v in (("fog", 10.0), ("mean", 40.0))}}
    _, (head, row) = cells_of(evaluate.tables({"a": weather}, MODALITIES, ["condition"]))
    assert head == ["", "fog", "mean", "mean", "mean, occurring"] and row[1:] == ["10.00", "40.00", "25.00", "25.00"]
    modalities = ["full", "far"]
    names = [evaluate.subset_name(s, modalities) for s in all_subsets(2)]
    scores = {name: {"miou_published": v, "miou_occurring": v} for name, v in zip(names, (1.0, 2.0, 6.0), strict=True)}
    _, (head, row) = cells_of(evaluate.tables({"a": {"any": scores}}, modalities, ["any"]))
    assert dict(zip(head[1:4], row[1:4], strict=True)) == {"full": "1.00", "far": "2.00", "full+far": "6.00"}
    assert head[4:7] == ["full", "missing", "mean"] and row[4:7] == ["6.00", "1.50", "3.00"]


# ---- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with all four files."""
    dataset = open_dataset("synthetic", split="val", size=32, limit=1)
    meta = {
        "backbone": "segformer_tiny",
        "modalities": MODALITIES,
        "classes": list(dataset.classes),
        "palette": [],
        "size": 32,
        "val_size": 32,
        "data": "synthetic",
        "root": None,
        "depth": "hha",
        "label_map": None,
        "normalisation": dataset.normalisation,
        "hold_out": 0,
        "absent": "skip",
        "options": {},
    }
    folder = tmp_path / "demo"
    folder.mkdir()
    model = random_model("segformer_tiny")
    for name in ("teacher", "robust", "student"):
        checkpoint.save_model(folder / f"{name}.pt", model, meta)
        for p in model.parameters():
            p.data *= 1.1
    selection = {**meta, "rule": "score", "temperature": 0.2, "conditioned": True, "widths": list(model.widths)}
    checkpoint.save_model(folder / "fsm.pt", FSM(model.widths, K, 4), selection)
    return folder


@pytest.fixture
def signals():
    """runs.Run takes over the signals; give them back."""
    before = {number: signal.getsignal(number) for number in loop.EXIT_STATUS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_folder_gives_a_row_per_model_the_switch_and_the_ensemble(run_folder, tmp_path, capsys, signals):
    args = evaluate.options(
        [
            str(run_folder),
            "--limit",
            "3",
            "--protocol",
            "any,nm",
            "--device",
            "cpu",
            "--json",
            str(tmp_path / "out.json"),
            "--markdown",
            str(tmp_path / "out.md"),
        ]
    )
    evaluate.main(args)
    evaluate.main(args)  # what it wrote itself it may replace
    printed, stored = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert list(stored["results"]) == ["teacher", "robust", "student", "switch", "FSM ensemble"]
    for row in stored["results"]:
        assert f"| {row} " in printed and f"| {row} " in (tmp_path / "out.md").read_text()
        scores = stored["results"][row]["any"]["EL"]
        assert set(scores) == {
            "miou_published",
            "miou_occurring",
            "accuracy",
            "mean_accuracy",
            "f1",
            "iou",
            "confusion",
        }
        assert len(scores["iou"]) == K == len(stored["classes"])
    assert "published" in printed and "occurring" in printed
    rows = stored["results"]
    assert rows["switch"]["any"]["RDEL"] == rows["teacher"]["any"]["RDEL"] != rows["robust"]["any"]["RDEL"]
    assert rows["switch"]["any"]["EL"] == rows["robust"]["any"]["EL"] != rows["teacher"]["any"]["EL"]


def test_files_and_folders_of_one_name_keep_a_row_each(run_folder, tmp_path):
    other = tmp_path / "other" / "demo"
    other.mkdir(parents=True)
    for name in ("teacher", "student"):
        (other / f"{name}.pt").write_bytes((run_folder / f"{name}.pt").read_bytes())
    for name in ("teacher", "student"):
        rows, _ = evaluate.load_rows([f"{run_folder}/{name}.pt", f"{other}/{name}.pt"], CPU, SAME)
        assert list(rows) == [name, f"{other}/{name}.pt"]
    rows, _ = evaluate.load_rows([str(run_folder), str(other)], CPU, SAME)
    assert len(rows) == 7 and {f"{run_folder}/teacher", f"{other}/teacher"} <= set(rows)


def test_what_cannot_be_evaluated_is_named(run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model: none of teacher.pt, .*single.pt"):
        evaluate.load_rows([str(tmp_path)], CPU, SAME)
    with pytest.raises(ValueError, match="an FSM selects between a teacher and a robust model"):
        evaluate.load_rows([str(run_folder / "fsm.pt")], CPU, SAME)
    (tmp_path / "torn.pt").write_bytes((run_folder / "student.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="torn.pt is corrupt"):
        evaluate.load_rows([str(tmp_path / "torn.pt")], CPU, SAME)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--protocol any,enm", "--protocol enm is unknown; choose of any, emm"),
        ("--batch 4", "unrecognized arguments: --batch 4"),
        ("--limit 0", "--limit"),
        ("--device gpu", "invalid choice: 'gpu'"),
    ],
)
def test_a_wrong_option_stops_with_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.options(["student.pt", *arguments.split()])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_models_that_were_trained_on_other_images_are_not_compared(run_folder, tmp_path):
    state = torch.load(run_folder / "student.pt", weights_only=True)
    checkpoint.save_model(tmp_path / "other.pt", random_model("segformer_tiny"), {**state["meta"], "val_size": 64})
    paths = [str(run_folder / "student.pt"), str(tmp_path / "other.pt")]
    assert len(evaluate.load_rows(paths, CPU, SAME)[0]) == 2
    with pytest.raises(ValueError, match="other.pt .* with val_size 64, but here it is 32. Choose with --size"):
        evaluate.load_rows(paths, CPU, [*SAME, "val_size"])
    (tmp_path / "run").mkdir()
    checkpoint.save_model(tmp_path / "run/teacher.pt", random_model("segformer_tiny"), state["meta"])
    (tmp_path / "other.pt").rename(tmp_path / "run/student.pt")
    with pytest.raises(ValueError, match="student.pt was trained with val_size 64, but here it is 32"):
        evaluate.load_rows([str(tmp_path / "run")], CPU, [*SAME, "val_size"])


@pytest.mark.parametrize(
    "flag, name, sentence",
    [
        ("--markdown", "student.pt", "must end in .md"),
        ("--json", "", "must end in .json"),
        ("--json", "nowhere/a.json", "its folder does not exist"),
        ("--json", "config.json", "exists and is not marked as written by RMMSS"),
        ("--markdown", "README.md", "exists and is not marked as written by RMMSS"),
        ("--markdown", "folder.md", "is a folder"),
    ],
)
def test_an_output_that_may_not_be_written_stops_before_any_work(tmp_path, flag, name, sentence):
    for foreign in ("config.json", "README.md"):
        (tmp_path / foreign).write_text("{}, not ours" * 50)
    (tmp_path / "folder.md").mkdir()
    args = evaluate.options(["nowhere.pt", flag, str(tmp_path / name) if name else ""])
    with pytest.raises(ValueError, match=sentence):  # not that nowhere.pt does not exist
        evaluate.main(args)
    assert (tmp_path / "README.md").read_text() == "{}, not ours" * 50


def test_a_full_disk_leaves_the_old_file_and_the_tables_are_printed(run_folder, tmp_path, capsys, signals, monkeypatch):
    args = evaluate.options([str(run_folder / "student.pt"), "--limit", "2", "--json", str(tmp_path / "out.json")])
    evaluate.main(args)
    before = (tmp_path / "out.json").read_bytes()
    capsys.readouterr()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", full)
    with pytest.raises(OSError, match="cannot write .*out.json .No space left on device.; what was there before"):
        evaluate.main(args)
    assert "| student " in capsys.readouterr().out
    assert (tmp_path / "out.json").read_bytes() == before and [p.name for p in tmp_path.glob("out*")] == ["out.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_stops_evaluation_and_validation_with_the_frames_name(value):
    dataset = scenes(4, frames=5)
    broken = dataset.frames[3].name

    def predict(images, subsets, degraded=None):
        for _ in subsets:
            logits = torch.randn(len(images), K, 32, 32)
            if len(images) == 2:
                logits[1, 7, 5, 5] = value
            yield logits

    run = a_run(2, protocol=["any"])
    dataset.frames = dataset.frames[2:]  # batches of 2 and 1: the broken frame is the second of the first
    with pytest.raises(ValueError, match=f"frame {broken} is not finite"):
        evaluate.evaluate(predict, dataset, run)
    with pytest.raises(ValueError, match=f"frame {broken} is not finite"):
        loop.validate(predict, dataset, [(0,)], run)


def test_frames_without_a_label_give_no_scores():
    class Unlabelled:
        name, split, modalities, classes, frames, normalisation = (
            "none",
            "val",
            MODALITIES,
            list("abcde"),
            [],
            NORMALISATION,
        )

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.zeros(4, 3, 32, 32), torch.full((32, 32), 255, dtype=torch.uint8), "x"

    run, predict = a_run(1, protocol=["any"]), partial(subset_logits, random_model("segformer_tiny"))
    with pytest.raises(ValueError, match="not one pixel of the 2 val frames has a label"):
        evaluate.evaluate(predict, Unlabelled(), run)
    with pytest.raises(ValueError, match="not one pixel of the 2 val frames has a label"):
        loop.validate(predict, Unlabelled(), [(0,)], run)


def test_a_model_of_one_sensor_has_no_mean_over_missing_ones(monkeypatch):
    def validated(*scores):
        monkeypatch.setattr(loop, "score", lambda *_: [{"miou_published": score} for score in scores])
        return loop.validate(None, SimpleNamespace(name="none"), all_subsets(1 if len(scores) == 1 else 2), a_run(1))

    assert validated(7.0) == {"miou": 7.0, "miou_full": 7.0}
    assert evaluate.summary("any", [7.0], ["rgb"]) == {"full": 7.0, "mean": 7.0}
    assert validated(1.0, 3.0, 8.0) == {"miou": 4.0, "miou_full": 8.0, "miou_missing": 2.0}


@pytest.mark.parametrize("protocol", ["all", "all,any"])
def test_all_stands_for_every_protocol(protocol):
    assert evaluate.options(["student.pt", "--protocol", protocol]).protocol == list(evaluate.PROTOCOLS)


# ---- data of one's own, and for people -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, other", [("published", "occurring"), ("occurring", "published")])
def test_the_rule_for_absent_classes_is_in_the_head_and_decides_what_is_shown_first(rule, other):
    scores = {"R": {"miou_published": 10.0, "miou_occurring": 40.0}}
    text = evaluate.tables({"a": {"any": scores}}, ["rgb"], ["any"], rule)
    title, (head, row) = cells_of(text)
    assert evaluate.RULES[rule] in title and evaluate.RULES[other] not in title
    assert head == ["", "R", "full", "mean", f"mean, {other}"]
    first, last = (f"{scores['R'][f'miou_{name}']:.2f}" for name in (rule, other))
    assert row == ["a", first, first, first, last]


def test_frames_that_are_all_of_the_case_none_give_no_table():
    scores = {"none": {"miou_published": 10.0, "miou_occurring": 40.0}}
    text = evaluate.tables({"a": {"case": scores}}, ["rgb"], ["case"])
    assert "|" not in text and "case" in text


def own_frames(tmp_path, sizes):
    """A folder data set of frames of these sizes, in 4 of its 6 classes, and a model of it; val says "v0" and so on."""
    rng = np.random.default_rng(4)
    (tmp_path / "classes.txt").write_text("".join(f"kind {k}\n" for k in range(6)))
    for split, name in (("train", "t"), ("val", "v")):
        for i, size in enumerate(sizes):
            for modality in ("rgb", "depth"):
                write_file(tmp_path / modality / split / f"{name}{i}.png", rng.integers(0, 256, (*size, 3), np.uint8))
            write_file(tmp_path / "labels" / split / f"{name}{i}.png", rng.integers(0, 4, size, np.uint8))
    dataset = open_dataset("folder", tmp_path, "val", ["rgb", "depth"], size=32)
    model = build_model("segformer_tiny", 6, ["rgb", "depth"])
    shapes = {name: list(v.shape) for name, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    model.load_state_dict(golden_weights(json.dumps(shapes).encode()), strict=False)
    meta = {"backbone": "segformer_tiny", "modalities": ["rgb", "depth"], "classes": dataset.classes, "palette": []}
    meta |= {"size": 32, "val_size": 32, "data": "folder", "root": str(tmp_path), "depth": "hha", "label_map": None}
    meta |= {"normalisation": dataset.normalisation, "hold_out": 0, "absent": "skip", "options": {}}
    checkpoint.save_model(tmp_path / "single.pt", model, meta)
    return dataset, model.eval()


@torch.no_grad()
def test_frames_of_different_sizes_are_evaluated_at_the_default_batch_and_each_class_is_shown(
    tmp_path, capsys, signals
):
    sizes = [(40, 64), (64, 40), (48, 48)]
    dataset, model = own_frames(tmp_path, sizes)
    files = ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    evaluate.main(evaluate.options([str(tmp_path), "--protocol", "any,case", "--device", "cpu", *files]))
    results = json.loads((tmp_path / "out.json").read_text())["results"]["single"]["any"]
    for column, present in (("R", [True, False]), ("RD", [True, True])):
        matrix = np.zeros((6, 6), int)
        for images, label, _ in dataset:
            x = normalise(images[None], *dataset.normalisation)
            ids = model(x, torch.tensor([present])).logits.argmax(1)[0]
            np.add.at(matrix, (label.numpy(), ids.numpy()), 1)
        assert np.abs(np.array(results[column]["confusion"]) - matrix).sum() <= 4  # of 6,144 pixels: ties
        assert sum(map(sum, results[column]["confusion"])) == matrix.sum()
    text = (tmp_path / "out.md").read_text()
    assert text.split("\n", 1)[1].strip() in capsys.readouterr().out
    first, no_case, by_class = text.split("**")[1], text.split("No table of ")[1], text.split("IoU of each class")[1]
    assert evaluate.RULES["occurring"] in first and no_case.startswith("case")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in by_class.splitlines() if "|" in line]
    assert rows[0] == ["", "R", "D", "RD"] and [row[0] for row in rows[2:]] == [f"kind {k}" for k in range(6)]
    for k, row in enumerate(rows[2:]):
        expected = [results[column]["iou"][k] for column in ("R", "D", "RD")]
        assert row[1:] == ["-" if v is None else f"{v:.1f}" for v in expected]
    lines = (tmp_path / "out.json").read_text().splitlines()
    assert len(lines) < 500  # a row of the matrix is a line


def test_frames_of_different_sizes_in_one_batch_are_refused(tmp_path, signals):
    own_frames(tmp_path, [(40, 64), (64, 40)])
    with pytest.raises(ValueError, match="--batch-size 1"):
        evaluate.main(evaluate.options([str(tmp_path), "--batch-size", "2", "--device", "cpu"]))


@pytest.mark.parametrize("flag, value", [("--fsm-rule", "hard"), ("--fsm-level", "logits")])
def test_options_of_the_fsm_are_refused_where_it_gives_no_row(run_folder, signals, flag, value):
    for argv in ([str(run_folder / "student.pt")], [str(run_folder), "--only", "student"]):
        with pytest.raises(ValueError, match="--fsm-rule and --fsm-level"):
            evaluate.main(evaluate.options([*argv, flag, value, "--device", "cpu", "--limit", "1"]))
    rows = [str(run_folder), "--only", "FSM ensemble", flag, value]
    evaluate.main(evaluate.options([*rows, "--device", "cpu", "--limit", "1"]))


def test_the_json_is_there_when_the_table_cannot_be_encoded_or_printed(run_folder, tmp_path, signals, monkeypatch):
    name = "caf\udce9"  # a file whose name is no UTF-8
    (tmp_path / name).mkdir()
    for folder in (name, "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "student.pt").write_bytes((run_folder / "student.pt").read_bytes())
    files = ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    argv = [str(tmp_path / name), str(tmp_path / "b"), "--limit", "1", "--device", "cpu", *files]

    def say(self, text):
        text.encode()  # as a terminal would

    monkeypatch.setattr(evaluate.runs.Run, "say", say)
    with pytest.raises(UnicodeEncodeError):
        evaluate.main(evaluate.options(argv))
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 2
    assert "caf\\udce9/student" in (tmp_path / "out.md").read_text()
