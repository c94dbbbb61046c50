"""Nothing lost and nothing silent: weights that are none, memory and workers that give out, streams and disks that end.

What the machine does is caused for real where a CPU can: sizes that no machine has, a worker that kills itself, a pipe
without a reader, a full disk. What only CUDA or a container can say is raised with their words.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from kill_and_resume import SMALL, train
from small_runs import during, log, said

import evaluate
import predict
import segformer
from data import FrameDataset
from datasets import files
from engine import checkpoint, loop, runs
from engine.pretrained import load_pretrained
from model import build_model

SHORT = [*SMALL, "--backbone", "segformer_tiny", "--epochs", "1", "--distill-epochs", "1"]
WEIGHT, VARIANCE = "decoder.linear.0.weight", "decoder.bn.running_var"
HERE = pathlib.Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("handlers")


@pytest.fixture(scope="module")
def run(one_thread, tmp_path_factory):
    """A run of stage 1."""
    folder = tmp_path_factory.mktemp("nothing-lost") / "run"
    before = {number: signal.getsignal(number) for number in loop.EXIT_STATUS}
    assert train(1, [*SHORT, "--out", str(folder)]) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    return folder


# ---- weights to start from ------------------------------------------------------------------------------------------
def refused(path: pathlib.Path, *parts: str) -> None:
    model = build_model("segformer_tiny", 7, ["rgb"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_pretrained(model, str(path))
    sentence = str(caught.value)
    assert all(part in sentence for part in (path.name, *parts)) and "\n" not in sentence, sentence
    assert "--pretrained" not in sentence  # which gave the file
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def spoilt(value: torch.Tensor, bad: float) -> torch.Tensor:
    value.view(-1)[3] = bad
    return value


@pytest.mark.parametrize(
    "name, change, part",
    [
        (WEIGHT, lambda value: 3, "dense tensor"),
        (WEIGHT, lambda value: value.tolist(), "dense tensor"),
        (WEIGHT, lambda value: value.to_sparse(), "dense tensor"),
        (WEIGHT, lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "dense tensor"),
        (WEIGHT, lambda value: value.to("meta"), "dense tensor"),
        (WEIGHT, lambda value: value.to(torch.int8), "floating point"),
        (WEIGHT, lambda value: value > 0, "floating point"),
        (WEIGHT, lambda value: value.to(torch.complex64), "floating point"),
        (WEIGHT, lambda value: spoilt(value, torch.nan), "finite"),
        (WEIGHT, lambda value: spoilt(value, -torch.inf), "finite"),
        (WEIGHT, lambda value: spoilt(value.double(), 1e300), "finite"),
        (VARIANCE, lambda value: spoilt(value, torch.nan), "finite"),
        (VARIANCE, lambda value: spoilt(value, -0.1), "below 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*TypedStorage", "ignore:.*quantized")
def test_a_value_that_is_no_weight_is_refused_by_name(tmp_path, name, change, part):
    state = build_model("segformer_tiny", 7, ["rgb"]).state_dict()
    torch.save({**state, name: change(state[name].clone())}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", name, part)


def test_two_flipped_bits_in_a_pth_are_noticed_by_its_checksum(tmp_path):
    state = build_model("segformer_tiny", 7, ["rgb"]).state_dict()
    torch.save(state, tmp_path / "x.pth")
    data = bytearray((tmp_path / "x.pth").read_bytes())
    data[data.index(state[WEIGHT].numpy().tobytes()) + 1] ^= 0b11  # so little that every value stays finite
    (tmp_path / "x.pth").write_bytes(data)
    refused(tmp_path / "x.pth", "checksum")


def spans(change, surplus: int = 0):
    """Writes a .safetensors whose header has been changed; the first two tensors have one size."""

    def write(path: pathlib.Path) -> None:
        state = build_model("segformer_tiny", 7, ["rgb"]).state_dict()
        state = dict(sorted(state.items(), key=lambda item: item[0] not in (VARIANCE, VARIANCE.replace("var", "mean"))))
        header, body = {}, b""
        for name, value in state.items():
            raw = value.numpy().tobytes()
            kind = {torch.float32: "F32", torch.int64: "I64"}[value.dtype]
            offsets = [len(body), len(body) + len(raw)]
            header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": offsets}
            body += raw
        change([about["data_offsets"] for about in header.values()], list(header.values()))
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + body + bytes(surplus))

    return write


def shift(offsets, by: int) -> None:
    for span in offsets:
        span[:] = [span[0] + by, span[1] + by]


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(spans(lambda offsets, _: shift(offsets[1:2], -4)), id="overlapping"),
        pytest.param(spans(lambda offsets, _: shift(offsets, 4), surplus=4), id="shifted"),
        pytest.param(spans(lambda offsets, _: offsets[1].__setitem__(slice(2), offsets[0])), id="duplicated"),
        pytest.param(spans(lambda offsets, _: shift(offsets[:1], -4)), id="negative"),
        pytest.param(spans(lambda offsets, _: offsets[0].reverse()), id="reversed"),
        pytest.param(spans(lambda offsets, _: None, surplus=8), id="surplus"),
        pytest.param(spans(lambda offsets, _: shift(offsets[-1:], 4)), id="past the end"),
        pytest.param(spans(lambda _, about: about[0].update(dtype="I32")), id="I32"),
    ],
)
def test_safetensors_whose_ranges_or_types_are_not_the_formats_are_refused(tmp_path, write):
    write(tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "is not a readable checkpoint")
    spans(lambda *_: None)(tmp_path / "good.safetensors")
    load_pretrained(build_model("segformer_tiny", 7, ["rgb"]), str(tmp_path / "good.safetensors"))


def test_a_checkpoint_of_other_classes_starts_all_but_the_classifier(run, tmp_path, capfd):
    state = torch.load(run / "teacher.pt", weights_only=True)
    same, many = state["meta"]["classes"], len(state["meta"]["classes"])
    model = build_model("segformer_tiny", many, state["meta"]["modalities"])
    assert load_pretrained(model, str(run / "teacher.pt"), same).missing == []
    report = load_pretrained(model, str(run / "teacher.pt"), [*same[:-1], "another"])  # as many, but others
    assert report.missing == ["decoder.classify.weight", "decoder.classify.bias"] and "classifier" in str(report)
    fewer = build_model("segformer_tiny", many - 2, state["meta"]["modalities"])
    checkpoint.save_model(tmp_path / "a.pt", fewer, {**state["meta"], "classes": same[2:]})
    assert train(1, [*SHORT, "--out", str(tmp_path / "out"), "--pretrained", str(tmp_path / "a.pt")]) == 0
    assert "a.pt: this project, but of other classes: the classifier starts fresh" in capfd.readouterr().out


# ---- memory, workers, streams, disks --------------------------------------------------------------------------------
SCRIPTS = {
    "training": lambda run, out: train(1, [*SHORT, "--out", str(out)]),
    "evaluate": lambda run, out: runs.guarded(evaluate.main, evaluate.options([str(run), "--device", "cpu"])),
    "predict": lambda run, out: runs.guarded(predict.main, predict.options([str(run), "--out", str(out)])),
    "export": lambda run, out: runs.guarded(predict.main, predict.options([str(run), "--export", f"{out}.pt2"])),
}


@pytest.mark.parametrize(
    "script, needs",
    [  # while it traces, torch.export takes no memory
        *((script, lambda: torch.empty(2**50)) for script in SCRIPTS if script != "export"),
        *((script, lambda: np.empty(2**50)) for script in SCRIPTS),
        ("training", lambda: bytearray(2**62)),
    ],
)
def test_too_little_memory_is_one_sentence_in_every_script(run, tmp_path, monkeypatch, capfd, script, needs):
    monkeypatch.setattr(segformer.MSegFormer, "encode", lambda *_: needs())
    assert SCRIPTS[script](run, tmp_path / "out") == 2
    sentence = said(capfd)
    assert all(part in sentence for part in ("out of memory", "--batch-size", "--size")), sentence


def fail(error: Exception):
    raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_what_cuda_and_the_system_say_of_memory_is_understood(error, capfd):
    assert runs.guarded(fail, error) == 2
    assert "--batch-size" in said(capfd)


@pytest.mark.parametrize(
    "act, option",
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "--workers 0"),
        (
            lambda: fail(RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)")),
            "--workers 0",
        ),
        (lambda: fail(RuntimeError("unable to allocate shared memory(shm) for file </torch_7_1>")), "--workers 0"),
        (lambda: bytearray(2**62), "--batch-size"),
    ],
)
def test_a_loader_worker_that_gives_out_is_one_sentence(run, tmp_path, monkeypatch, capfd, act, option):
    monkeypatch.setattr(FrameDataset, "__getitem__", lambda *_: act())
    assert train(1, [*SHORT, "--workers", "1", "--out", str(tmp_path / "out")]) == 2
    assert option in said(capfd)


@pytest.mark.parametrize("closed", ["no reader", "no stdout"])
@pytest.mark.parametrize("script", ["evaluate.py", "train_stage1.py"])
def test_a_closed_stdout_costs_nothing(run, tmp_path, script, closed):
    out = tmp_path / "out.json"
    words = [str(run), "--json", str(out), "--limit", "2"] if script == "evaluate.py" else [*SHORT, "--out", str(out)]
    reader, writer = os.pipe()
    os.close(reader)
    shell = 'exec "$@" >&-' if closed == "no stdout" else 'exec "$@"'
    command = ["sh", "-c", shell, "sh", sys.executable, HERE / script, *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "") and out.exists()


def test_a_full_disk_at_a_log_line_ends_in_one_sentence_and_the_run_goes_on(run, tmp_path, monkeypatch, capfd):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    file = tmp_path / "out/log.jsonl"
    with monkeypatch.context() as patch:
        during(patch, "teacher", 1, lambda *_: file.symlink_to("/dev/full"))
        assert train(1, [*SHORT, "--out", str(tmp_path / "out")]) == 2
    sentence = said(capfd)
    assert all(part in sentence for part in (str(file), "No space left", f"--resume {tmp_path / 'out'}"))
    file.unlink()
    assert train(1, ["--resume", str(tmp_path / "out")]) == 0
    assert [line["phase"] for line in log(tmp_path / "out")] == [line["phase"] for line in log(run)]


# ---- told at once, told rightly -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "variables", [{"RANK": "abc"}, {"WORLD_SIZE": "two"}, {"LOCAL_RANK": ""}, {"RANK": "1"}, {"LOCAL_RANK": "-1"}]
)
def test_variables_that_torchrun_did_not_set(run, tmp_path, monkeypatch, capfd, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert train(1, [*SHORT, "--out", str(tmp_path / "out")]) == 2
    assert next(iter(variables)) in said(capfd) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--backbone", "cmnext_tiny", "--batch-size", "1"], ["--batch-size", "--size", "BatchNorm"]),
        (["--backbone", "cmnext_own"], ["cmnext_own"]),
        (["--device", "cuda:15"], ["--device cuda:15"]),
    ],
)
def test_options_that_cannot_train_are_told_before_training(tmp_path, monkeypatch, capfd, words, parts):
    stages = segformer.PRESETS["b0"]._replace(stages=segformer.mit_stages)  # an encoder of one's own, as in lite0
    monkeypatch.setitem(segformer.PRESETS, "own", stages)
    assert train(1, [*SHORT, "--out", str(tmp_path / "out"), *words]) == 2
    sentence = said(capfd)
    assert all(part in sentence for part in parts) and not (tmp_path / "out/last.pt").exists()


def test_a_missing_file_advises_skip_broken_for_a_new_run_only(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.png .*new run with --skip-broken"):
        files.read_file(tmp_path / "a.png")


@pytest.mark.parametrize("score, told", [(60.0, True), (40.0, False)])
def test_a_robust_model_below_its_teacher_is_told(run, tmp_path, monkeypatch, capfd, score, told):
    def validate(predict, dataset, subsets, run):
        teaches = not any(p.requires_grad for p in predict.args[0].parameters())
        return {"miou": score if teaches and len(subsets) == 7 else 50.0}

    monkeypatch.setattr(loop, "validate", validate)
    teacher = ["--teacher", str(run / "teacher.pt")]
    assert train(1, [*SHORT, "--out", str(tmp_path / "out"), *teacher]) == 0
    out = capfd.readouterr().out
    assert ("the robust model reaches 50.00 mIoU, its teacher 60.00" in out) == told
