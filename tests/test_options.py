"""Options that are wrong, contradict each other or have no effect: each script answers with one sentence."""

import re
from functools import partial

import pytest

import data
import evaluate
import predict
from benchmarks import figures, reproduce
from engine import options

pytestmark = pytest.mark.usefixtures("inside")
PARSERS = {name: partial(getattr(options, f"{name}_options"), "Trains.") for name in ("stage1", "stage2", "single")}
PARSERS |= {losses: partial(options.stage1_options, "", losses=losses) for losses in ("anyseg", "published")}
PARSERS |= {"predict": predict.options, "evaluate": evaluate.options, "data": data.main, "figures": figures.main}
PARSERS |= {"reproduce": reproduce.parse}


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("stage1 --epoch 3", "unrecognized arguments: --epoch 3"),
        ("stage1 --batch-size 0", "argument --batch-size: invalid int from 1 to 1e+09 value: '0'"),
        ("stage1 --lr nan", "argument --lr: invalid float from 1e-09 to 1e+09 value: 'nan'"),
        ("stage1 --epochs inf", "argument --epochs: invalid float from 1e-09 to 1e+09 value: 'inf'"),
        ("stage1 --data", "train_stage1.py: error: argument --data: expected one argument"),
        ("stage1 --out=", "--out= is empty; is a variable of the shell not set?"),
        ("stage1 --teacher=\t", "--teacher= is empty"),
        ("stage1 --device gpu", "argument --device: invalid choice: 'gpu' (choose from "),
        ("stage1 --size 16", "argument --size: invalid int from 32 to 1e+09 value: '16'"),
        ("stage1 --teacher a.pt --pretrained b.pth", "--teacher and --pretrained contradict"),
        ("stage1 --resume nowhere", "--resume nowhere: this folder holds no last.pt"),
        ("stage1 --resume WHOLE/1 --lr 0.5", "--lr=0.5 contradicts the run in WHOLE/1, which has --lr=0.002: "),
        ("stage1 --resume WHOLE/1 --out elsewhere", "--out=elsewhere contradicts"),
        ("stage2 --resume WHOLE/1", "train_stage1.py"),
        ("stage1 --resume WHOLE/2", "train_stage2.py"),
        ("stage1 --alpha 10 --distill-epochs 0", "--alpha has no effect with --distill-epochs 0"),
        ("stage1 --alpha 0 --match same", "--match has no effect"),
        ("stage1 --depth raw", "--depth has no effect with --data synthetic"),
        ("stage1 --data muses --hold-out 3", "--hold-out has no effect with --data muses"),
        ("stage1 --teacher t.pt --epochs 9", "--epochs has no effect"),
        ("anyseg --alpha 7", "--alpha has no effect"),
        ("published --distill-epochs 0", "published with --distill-epochs 0"),
        ("published --alpha 0", "published with --alpha 0"),
        ("stage1 --resume WHOLE/1/last.previous.pt", "delete"),
        ("stage2 --stage1 WHOLE/1 --student-epochs 0 --gamma-logits 1", "--gamma-logits has no effect"),
        ("stage2 --stage1 WHOLE/1 --gamma-logits=0 --gamma-features=0 --rule=score", "--rule has no effect"),
        ("stage1 --max-minutes 1e9", "argument --max-minutes: invalid float from 1e-06 to 100000 value: '1e9'"),
        ("stage1 --teacher a.pt --distill-epochs 0", "--teacher a.pt with --distill-epochs 0 trains nothing"),
        ("stage2", "give either --stage1 RUN, or both --teacher FILE and --robust FILE"),
        ("stage2 --teacher a.pt", "give either --stage1 RUN, or both"),
        ("stage2 --stage1 WHOLE/1 --robust a.pt", "give either --stage1 RUN, or both"),
        ("predict m.pt --input rgb", "must be MODALITY=PATH"),
        ("predict m.pt --input rgb=nowhere.png", "'rgb=nowhere.png' must be MODALITY=PATH with a file or folder that"),
        ("predict m.pt --input rgb=" + 300 * "x", "must be MODALITY=PATH"),
        ("predict m.pt --input rgb=. rgb=..", "names a modality twice"),
        ("predict m.pt --input rgb=. depth=.", "--input gives . to two modalities"),
        ("predict m.pt --input rgb=. --data deliver", "leave out --data"),
        ("predict m.pt --input rgb=. --panel a.png", "leave out --panel"),
        ("predict m.pt --size 8", "at least 32"),
        ("predict m.pt --export m.pt2 --count 3", "--count has no effect"),
        ("predict m.pt --export m.pt2 --split val", "--split has no effect"),
        ("predict m.pt --panel p.png --file-ids", "--file-ids has no effect"),
        ("evaluate m.pt --size 8", "--size"),
        ("evaluate m.pt --protocol any,enm", "--protocol enm is unknown; choose of any, emm"),
        ("evaluate m.pt --batch 4", "unrecognized arguments: --batch 4"),
        ("evaluate m.pt --limit 0", "--limit"),
        ("evaluate m.pt --device gpu", "invalid choice: 'gpu'"),
        ("data --check --count 3", "--count has no effect"),
        ("data --export x --data folder", "--data has no effect"),
        ("figures lost a.json b.json --out a.png", "b.json"),
        ("figures lost --out a.png", "source"),
        ("reproduce scenes --seeds=", "--seeds"),
        ("reproduce scenes --seeds=-", "--seeds"),
        ("reproduce deliver --pretrained=", "--pretrained is empty"),
        ("reproduce scenes --rows=x", "--rows x is unknown"),
        ("reproduce scenes --jobs=-1", "--jobs"),
        ("reproduce scenes --classes=13", "--classes"),
    ],
)
def test_wrong_or_contradictory_options_end_with_one_sentence(whole, monkeypatch, capsys, words, sentence):
    monkeypatch.setattr("sys.argv", words.replace("WHOLE", str(whole)).split(" "))
    with pytest.raises(SystemExit, match="2"):
        PARSERS[words.split()[0]]()
    text = capsys.readouterr().err
    assert sentence.replace("WHOLE", str(whole)) in text.splitlines()[-1] and "Traceback" not in text
    assert text.count("\n") == 1 or words.startswith("data ")  # which tells its usage first


@pytest.mark.parametrize("script, most", [("stage1", 34), ("stage2", 30), ("single", 34)])
def test_help_is_short_and_says_what_none_means(monkeypatch, capsys, script, most):
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit, match="0"):
        PARSERS[script]()
    text = capsys.readouterr().out
    assert len(re.findall(r"^  --", text, re.MULTILINE)) <= most and text.count("\n") <= 100
    assert "default: None" not in text and "default: False" not in text
