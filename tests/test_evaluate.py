"""evaluate.py: every protocol and every shortcut against plain forwards of composed images, frame by frame."""

import itertools
import json
import math
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from data_files import fails
from models import MODALITIES, about, about_scenes, sources_in, with_random_weights

import evaluate
import metrics
from data import FrameDataset, normalise, open_dataset, random_missing, sensor_noise
from datasets.export import write_file
from engine import loop, output
from engine.checkpoint import save_model
from engine.subsets import all_subsets, subset_logits
from fsm import FSM
from model import build_model

NAMES = [evaluate.subset_name(subset, MODALITIES) for subset in all_subsets(4)]
CPU, SAME = torch.device("cpu"), ["classes", "modalities"]
K = 12  # as many as the scenes have
pytestmark = pytest.mark.usefixtures("inside", "handlers")  # runs.Run takes over the signals


def random_model(backbone="segformer_tiny", modalities=4):
    return with_random_weights(build_model(backbone, K, MODALITIES[:modalities]))


def test_all_subsets_are_there_once_and_the_complete_one_is_last():
    expected = {s for n in (1, 2, 3, 4) for s in itertools.combinations(range(4), n)}
    assert set(all_subsets(4)) == expected and len(all_subsets(4)) == 15 and all_subsets(4)[-1] == (0, 1, 2, 3)
    assert NAMES[0] == "R" and NAMES[-1] == "RDEL" and "EL" in NAMES and len(set(NAMES)) == 15
    assert evaluate.subset_name((0, 2), ["rgb", "depth", "radar"]) == "rgb+radar"


def a_run(batch_size, workers=0, protocol=evaluate.PROTOCOLS):
    """As runs.Run in one process, with what `evaluate` needs of the options."""
    args = SimpleNamespace(batch_size=batch_size, workers=workers, seed=3, protocol=list(protocol))
    return SimpleNamespace(rank=0, world=1, device=CPU, reduce=lambda x: x, autocast=nullcontext, args=args)


def scenes(modalities, frames):
    """Validation scenes of every weather, some with a failing sensor."""
    dataset = open_dataset("synthetic", split="val", modalities=MODALITIES[:modalities], size=32, limit=30)
    dataset.frames = dataset.frames[30 - frames :]
    return dataset


def in_float64(model, images, subsets, *degraded):
    """Without rounding to speak of: a pixel on the border of two classes falls on one side in any batch."""
    return subset_logits(model.double(), images.double(), subsets, *(x.double() for x in degraded))


@pytest.mark.parametrize("backbone, modalities", [("segformer_tiny", 4), ("cmnext_tiny", 2)])
def test_no_batch_size_or_worker_changes_a_number(backbone, modalities):
    dataset, predict = scenes(modalities, frames=8), partial(in_float64, random_model(backbone, modalities))
    one = evaluate.evaluate(predict, dataset, a_run(1))
    assert one == evaluate.evaluate(predict, dataset, a_run(7, workers=1))
    counts, n = {protocol: len(columns) for protocol, columns in one.items()}, 2**modalities - 1
    assert counts == {"any": n, "emm": n, "rmm": 3 * n, "nm": 3, "condition": 5, "case": 2}


@torch.no_grad()
def test_every_protocol_equals_its_definition_frame_by_frame():
    dataset, model = scenes(4, frames=7), random_model()
    results = evaluate.evaluate(partial(in_float64, model), dataset, a_run(4))
    matrices = {}
    for index, frame in enumerate(dataset.frames):
        images, label, name = dataset[index]
        images = normalise(images[None], *dataset.normalisation)

        def count(protocol, column, given, present=None, label=label):
            matrix = metrics.confusion(model(given.double(), present).logits.argmax(1), label[None], K)
            matrices[protocol, column] = matrices.get((protocol, column), 0) + matrix

        for column, subset in (("R", (0,)), ("DL", (1, 3))):
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


# ---- tables -----------------------------------------------------------------------------------------------------
def scored(published, occurring):
    return {"miou_published": published, "miou_occurring": occurring}


def random_results(seed):
    """Invented scores with the columns that `evaluate` gives."""
    columns = {"any": NAMES, "emm": NAMES, "rmm": [f"{n} {r}" for r in evaluate.RMM_RATES for n in NAMES]}
    columns |= {"nm": ["low", "mid", "high"], "condition": ["fog", "sun"], "case": ["lidarjitter", "none"]}
    rng = np.random.default_rng(seed)
    return {protocol: {name: scored(*rng.uniform(0, 100, 2)) for name in names} for protocol, names in columns.items()}


def published(scores):
    return {column: score["miou_published"] for column, score in scores.items()}


@pytest.mark.parametrize("p", evaluate.FAILURE_RATES)
def test_the_expectation_is_over_sensors_that_fail_on_their_own(p):
    for protocol, rate in (("emm", ""), ("rmm", 0.25), ("rmm", 0.5), ("rmm", 0.75)):
        value, expectation = published(random_results(1)[protocol]), 0.0
        for works in itertools.product((True, False), repeat=4):
            if any(works):
                chance = math.prod(1 - p if w else p for w in works)
                name = "".join(letter for letter, w in zip("RDEL", works, strict=True) if w)
                expectation += chance * value[f"{name} {rate}".strip()]
        table = evaluate.summary(protocol, list(value.values()), MODALITIES)
        column = f"r={rate} E({p})" if rate else f"E({p})"
        assert table[column] == pytest.approx(expectation / (1 - p**4))  # given that at least one works
        assert table["mean"] == pytest.approx(sum(value.values()) / len(value))


def test_the_summaries_average_what_their_names_say():
    value = {protocol: published(scores) for protocol, scores in random_results(2).items()}
    table = {p: evaluate.summary(p, list(values.values()), MODALITIES) for p, values in value.items()}
    full, missing = value["any"]["RDEL"], [v for c, v in value["any"].items() if c != "RDEL"]
    assert len(missing) == 14
    mean = pytest.approx((sum(missing) + full) / 15)
    assert table["any"] == {"full": full, "missing": pytest.approx(sum(missing) / 14), "mean": mean}
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


@pytest.mark.parametrize("protocol", evaluate.PROTOCOLS)
def test_tables_hold_every_number_and_the_differences_to_the_first_row(protocol):
    results = {"teacher": random_results(3), "student": random_results(4)}
    title, (head, *rows) = cells_of(evaluate.tables(results, MODALITIES, [protocol]))
    values = {name: published(scores[protocol]) for name, scores in results.items()}
    means = {name: evaluate.summary(protocol, list(value.values()), MODALITIES) for name, value in values.items()}
    columns = [] if protocol == "rmm" else list(values["teacher"])
    assert evaluate.PROTOCOLS[protocol] in title and head == ["", *columns, *means["teacher"], "mean, occurring"]
    for name, row in zip(results, rows, strict=True):
        others = [score["miou_occurring"] for score in results[name][protocol].values()]
        assert row[0] == name and float(row[-1]) == pytest.approx(sum(others) / len(others), abs=0.006)
        plain = [float(cell) for cell in row[1 : 1 + len(columns)]]
        assert plain == pytest.approx([values[name][column] for column in columns], abs=0.006)
        for column, cell in zip(means[name], row[1 + len(columns) : -1], strict=True):
            number, _, difference = cell.partition(" ")
            assert float(number) == pytest.approx(means[name][column], abs=0.006)
            gap = means[name][column] - means["teacher"][column]
            assert (difference == "") == (name == "teacher")
            assert not difference or float(difference.strip("()")) == pytest.approx(gap, abs=0.006)


def test_a_weather_called_mean_and_a_modality_called_full_keep_their_columns():
    weather = {"condition": {"fog": scored(10.0, 10.0), "mean": scored(40.0, 40.0)}}
    _, (head, row) = cells_of(evaluate.tables({"a": weather}, MODALITIES, ["condition"]))
    assert head == ["", "fog", "mean", "mean", "mean, occurring"] and row[1:] == ["10.00", "40.00", "25.00", "25.00"]
    scores = {"any": {"full": scored(1.0, 1.0), "far": scored(2.0, 2.0), "full+far": scored(6.0, 6.0)}}
    _, (head, row) = cells_of(evaluate.tables({"a": scores}, ["full", "far"], ["any"]))
    assert head[1:7] == ["full", "far", "full+far", "full", "missing", "mean"]
    assert row[1:7] == ["1.00", "2.00", "6.00", "6.00", "1.50", "3.00"]


@pytest.mark.parametrize("rule, other", [("published", "occurring"), ("occurring", "published")])
def test_the_rule_for_absent_classes_is_in_the_head_and_decides_what_is_shown_first(rule, other):
    scores = scored(10.0, 40.0)
    title, (head, row) = cells_of(evaluate.tables({"a": {"any": {"R": scores}}}, ["rgb"], ["any"], rule))
    assert evaluate.RULES[rule] in title and evaluate.RULES[other] not in title
    assert head == ["", "R", "full", "mean", f"mean, {other}"]
    first, last = (f"{scores[f'miou_{name}']:.2f}" for name in (rule, other))
    assert row == ["a", first, first, first, last]


# ---- the script -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder with all four files. Read it, and change nothing."""
    folder, model, meta = tmp_path_factory.mktemp("runs") / "demo", random_model(), about_scenes(size=32, val_size=32)
    folder.mkdir()
    for name in ("teacher", "robust", "student"):
        save_model(folder / f"{name}.pt", model, meta)
        for p in model.parameters():
            p.data *= 1.1
    selection = {"rule": "score", "temperature": 0.2, "conditioned": True, "widths": list(model.widths)}
    save_model(folder / "fsm.pt", FSM(model.widths, K, 4), {**meta, **selection, "sources": sources_in(folder)})
    return folder


def main(*arguments):
    evaluate.main(evaluate.options([*map(str, arguments), "--device", "cpu"]))


def test_a_run_folder_gives_a_row_per_model_the_switch_and_the_ensemble(run_folder, capsys):
    for _ in range(2):  # what it wrote itself it may replace
        main(run_folder, "--limit", 3, "--protocol", "any,nm", "--json", "out.json", "--markdown", "out.md")
    printed, stored = capsys.readouterr().out, json.loads(Path("out.json").read_text())
    rows, kinds = stored["results"], {"miou_published", "miou_occurring", "accuracy", "mean_accuracy", "f1"}
    assert list(rows) == ["teacher", "robust", "student", "switch", "FSM ensemble"]
    for row, scores in rows.items():
        assert f"| {row} " in printed and f"| {row} " in Path("out.md").read_text()
        assert set(scores["any"]["EL"]) == kinds | {"iou", "confusion"}
        assert len(scores["any"]["EL"]["iou"]) == K == len(stored["classes"])
    assert rows["switch"]["any"]["RDEL"] == rows["teacher"]["any"]["RDEL"] != rows["robust"]["any"]["RDEL"]
    assert rows["switch"]["any"]["EL"] == rows["robust"]["any"]["EL"] != rows["teacher"]["any"]["EL"]


def test_files_and_folders_of_one_name_keep_a_row_each(run_folder):
    Path("demo").mkdir()
    for name in ("teacher", "student"):
        shutil.copy(run_folder / f"{name}.pt", "demo")
        rows, _ = evaluate.load_rows([f"{run_folder}/{name}.pt", f"demo/{name}.pt"], CPU, SAME)
        assert list(rows) == [name, f"demo/{name}.pt"]
    rows, _ = evaluate.load_rows([str(run_folder), "demo"], CPU, SAME)
    assert len(rows) == 7 and {f"{run_folder}/teacher", "demo/teacher"} <= set(rows)


def test_what_cannot_be_evaluated_is_named(run_folder):
    with pytest.raises(FileNotFoundError, match="holds no model: none of teacher.pt, .*single.pt"):
        evaluate.load_rows(["."], CPU, SAME)
    with pytest.raises(ValueError, match="an FSM selects between a teacher and a robust model"):
        evaluate.load_rows([str(run_folder / "fsm.pt")], CPU, SAME)
    with pytest.raises(ValueError, match="given twice"):
        evaluate.load_rows([str(run_folder), f"{run_folder}/"], CPU, SAME)
    Path("torn.pt").write_bytes((run_folder / "student.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="torn.pt is corrupt"):
        evaluate.load_rows(["torn.pt"], CPU, SAME)


def test_models_that_were_trained_on_other_images_are_not_compared(run_folder):
    Path("run").mkdir()
    shutil.copy(run_folder / "teacher.pt", "run")
    save_model(Path("run/student.pt"), random_model(), about_scenes(size=32, val_size=64))
    paths = [str(run_folder / "student.pt"), "run/student.pt"]
    assert len(evaluate.load_rows(paths, CPU, SAME)[0]) == 2
    for given in (paths, ["run"]):
        with pytest.raises(ValueError, match="student.pt .* with val_size 64, but here it is 32. Choose with --size"):
            evaluate.load_rows(given, CPU, [*SAME, "val_size"])


FOREIGN = "exists and is not marked as written by RMMSS"
OUTPUTS = [("--markdown student.pt", "must end in .md"), ("--json ", "must end in .json")]
OUTPUTS += [("--markdown folder.md", "is a folder"), ("--json nowhere/a.json", "its folder does not exist")]
OUTPUTS += [("--json foreign.json", FOREIGN), ("--markdown foreign.md", FOREIGN)]


@pytest.mark.parametrize("arguments, sentence", OUTPUTS)
def test_an_output_that_may_not_be_written_stops_before_any_work(arguments, sentence):
    for foreign in ("foreign.json", "foreign.md"):
        Path(foreign).write_text("{}, not ours" * 50)
    Path("folder.md").mkdir()
    with pytest.raises(ValueError, match=sentence):  # not that nowhere.pt does not exist
        main("nowhere.pt", *arguments.split(" "))
    assert Path("foreign.json").read_text() == Path("foreign.md").read_text() == "{}, not ours" * 50


def test_a_full_disk_leaves_the_old_file_and_the_tables_are_printed(run_folder, capsys, monkeypatch):
    command = run_folder / "student.pt", "--limit", 2, "--json", "out.json"
    main(*command)
    before = Path("out.json").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(output.os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="cannot write out.json .No space left on device.; what was there before"):
        main(*command)
    assert "| student " in capsys.readouterr().out
    assert Path("out.json").read_bytes() == before and list(Path().iterdir()) == [Path("out.json")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_stops_evaluation_and_validation_with_the_frames_name(value):
    dataset, run = scenes(4, frames=3), a_run(2, protocol=["any"])  # in batches of 2 and 1

    def predict(images, subsets, degraded=None):
        for _ in subsets:
            logits = torch.randn(len(images), K, 32, 32)
            logits[1:, 7, 5, 5] = value
            yield logits

    for judge in (partial(evaluate.evaluate, predict, dataset), partial(loop.validate, predict, dataset, [(0,)])):
        with fails(ValueError, f"frame {dataset.frames[1].name} is not finite"):
            judge(run)


def test_frames_without_a_label_give_no_scores(monkeypatch):
    item = torch.zeros(4, 3, 32, 32), torch.full((32, 32), 255, dtype=torch.uint8), "x"
    monkeypatch.setattr(FrameDataset, "__getitem__", lambda *_: item)
    dataset, predict, run = scenes(4, 2), partial(subset_logits, random_model()), a_run(1, protocol=["any"])
    for judge in (partial(evaluate.evaluate, predict, dataset), partial(loop.validate, predict, dataset, [(0,)])):
        with fails(ValueError, "not one pixel of the 2 val frames has a label"):
            judge(run)


def test_a_model_of_one_sensor_has_no_mean_over_missing_ones(monkeypatch):
    def validated(sensors, *scores):
        monkeypatch.setattr(loop, "score", lambda *_: [{"miou_published": score} for score in scores])
        return loop.validate(None, SimpleNamespace(name="none"), all_subsets(sensors), a_run(1))

    assert validated(1, 7.0) == {"miou": 7.0, "miou_full": 7.0}
    assert evaluate.summary("any", [7.0], ["rgb"]) == {"full": 7.0, "mean": 7.0}
    assert validated(2, 1.0, 3.0, 8.0) == {"miou": 4.0, "miou_full": 8.0, "miou_missing": 2.0}


@pytest.mark.parametrize("protocol", ["all", "all,any"])
def test_all_stands_for_every_protocol(protocol):
    assert evaluate.options(["student.pt", "--protocol", protocol]).protocol == list(evaluate.PROTOCOLS)


def test_a_rule_of_the_fsm_is_refused_where_it_gives_no_row(run_folder):
    for rows in ([run_folder / "student.pt"], [run_folder, "--only", "student"]):
        with pytest.raises(ValueError, match="--fsm-rule hard"):
            main(*rows, "--fsm-rule", "hard", "--limit", 1)
    main(run_folder, "--only", "FSM ensemble", "--fsm-rule", "hard", "--limit", 1)


def test_the_json_is_there_when_the_table_cannot_be_encoded_or_printed(run_folder, monkeypatch):
    folders = ["caf\udce9", "b"]  # the name of the first is no UTF-8
    for folder in folders:
        Path(folder).mkdir()
        shutil.copy(run_folder / "student.pt", folder)
    monkeypatch.setattr(evaluate.runs.Run, "say", lambda self, text: text.encode())  # as a terminal would
    with pytest.raises(UnicodeEncodeError):
        main(*folders, "--limit", 1, "--json", "out.json", "--markdown", "out.md")
    assert len(json.loads(Path("out.json").read_text())["results"]) == 2
    assert "caf\\udce9/student" in Path("out.md").read_text()


# ---- data of one's own ----------------------------------------------------------------------------------------------
@torch.no_grad()
def test_frames_of_different_sizes_are_evaluated_at_the_default_batch_and_each_class_is_shown(capsys):
    """Of a folder data set of one's own, in 4 of whose 6 classes there are pixels."""
    rng, modalities = np.random.default_rng(4), ["rgb", "depth"]
    write_file(Path("classes.txt"), "".join(f"kind {k}\n" for k in range(6)))
    for split, (i, size) in itertools.product(("train", "val"), enumerate([(40, 64), (64, 40), (48, 48)])):
        for modality in modalities:
            write_file(Path(f"{modality}/{split}/{split}{i}.png"), rng.integers(0, 256, (*size, 3), np.uint8))
        write_file(Path(f"labels/{split}/{split}{i}.png"), rng.integers(0, 4, size, np.uint8))
    dataset = open_dataset("folder", Path(), "val", modalities, size=32)
    model = with_random_weights(build_model("segformer_tiny", 6, modalities))
    meta = {"size": 32, "val_size": 32, "root": ".", "normalisation": dataset.normalisation}
    save_model(Path("single.pt"), model, about(classes=dataset.classes, **meta))
    main(".", "--protocol", "any,case", "--json", "out.json", "--markdown", "out.md")
    results = json.loads(Path("out.json").read_text())["results"]["single"]["any"]
    for column, present in (("R", [True, False]), ("RD", [True, True])):
        matrix = np.zeros((6, 6), int)
        for images, label, _ in dataset:
            ids = model(normalise(images[None], *dataset.normalisation), torch.tensor([present])).logits.argmax(1)[0]
            np.add.at(matrix, (label.numpy(), ids.numpy()), 1)
        assert np.abs(np.array(results[column]["confusion"]) - matrix).sum() <= 4  # of 6,144 pixels: ties
        assert sum(map(sum, results[column]["confusion"])) == matrix.sum()
    text = Path("out.md").read_text()
    assert text.split("\n", 1)[1].strip() in capsys.readouterr().out
    first, no_case, by_class = text.split("**")[1], text.split("No table of ")[1], text.split("IoU of each class")[1]
    assert evaluate.RULES["occurring"] in first and no_case.startswith("case") and "none" not in text
    _, (head, *rows) = cells_of(by_class.strip())
    assert head == ["", "R", "D", "RD"]
    for k, row in enumerate(rows):
        expected = [results[column]["iou"][k] for column in ("R", "D", "RD")]
        assert row == [f"kind {k}", *("-" if v is None else f"{v:.1f}" for v in expected)]
    assert len(rows) == 6 and len(Path("out.json").read_text().splitlines()) < 500  # a row of the matrix is a line
