"""metrics.py against counting pixel by pixel."""

import pytest
import torch

import metrics

K = 7


def random_maps(seed, shape=(3, 9, 11)):
    """Half of the predictions are right. Class 5 occurs nowhere, 2 only in predictions, 6 and 255 only in labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1, 3, 4, 6, 255])[torch.randint(0, 6, shape, generator=g)]
    guess = torch.tensor([0, 1, 2, 3, 4])[torch.randint(0, 5, shape, generator=g)]
    right = (torch.rand(shape, generator=g) < 0.5) & (labels < 6)
    return torch.where(right, labels, guess), labels


def pairs(prediction, labels):
    """(label, prediction) of every pixel that counts."""
    return [(t, p) for p, t in zip(prediction.flatten().tolist(), labels.flatten().tolist(), strict=True) if t != 255]


def test_confusion_counts_every_labelled_pixel_once():
    prediction, labels = random_maps(0)
    matrix, counted = metrics.confusion(prediction, labels, K), pairs(prediction, labels)
    assert matrix.tolist() == [[counted.count((t, p)) for p in range(K)] for t in range(K)]
    assert matrix.dtype == torch.int64 and matrix.sum() == (labels != 255).sum() < labels.numel()


def test_confusions_add_up_over_batches_and_past_what_float32_can_count():
    prediction, labels = random_maps(1)
    parts = [metrics.confusion(prediction[b], labels[b], K) for b in range(3)]
    assert torch.equal(sum(parts), metrics.confusion(prediction, labels, K))
    frame = torch.ones(512, 512, dtype=torch.int64)
    many = sum((metrics.confusion(frame, frame, 2) for _ in range(65)), torch.tensor([[0, 0], [0, 1]]))
    assert many[1, 1] == 65 * 512 * 512 + 1 > 2**24


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_a_slow_count_under_both_rules(seed):
    prediction, labels = random_maps(seed)
    counted = pairs(prediction, labels)
    iou, recall, f1 = {}, {}, {}
    for c in range(K):
        truth = {i for i, (t, _) in enumerate(counted) if t == c}
        found = {i for i, (_, p) in enumerate(counted) if p == c}
        if truth | found:
            iou[c] = 100 * len(truth & found) / len(truth | found)
            f1[c] = 200 * len(truth & found) / (len(truth) + len(found))
        if truth:
            recall[c] = 100 * len(truth & found) / len(truth)
    assert sorted(iou) == sorted(f1) == [0, 1, 2, 3, 4, 6] and sorted(recall) == [0, 1, 3, 4, 6]
    scores = metrics.scores(metrics.confusion(prediction, labels, K))
    assert scores["miou_published"] == pytest.approx(sum(iou.values()) / K)
    assert scores["miou_occurring"] == pytest.approx(sum(iou.values()) / 6)
    assert scores["accuracy"] == pytest.approx(100 * sum(t == p for t, p in counted) / len(counted))
    assert scores["mean_accuracy"] == pytest.approx(sum(recall.values()) / 5)
    assert scores["f1"] == pytest.approx(sum(f1.values()) / 6)
    assert scores["iou"][5] is None and scores["iou"][2] == 0.0 and scores["iou"][6] == 0.0
    assert [v for v in scores["iou"] if v is not None] == pytest.approx(list(iou.values()))


def test_without_a_labelled_pixel_all_scores_are_zero():
    prediction, labels = random_maps(3)
    scores = metrics.scores(metrics.confusion(prediction, torch.full_like(labels, 255), K))
    assert scores.pop("confusion") == [[0] * K] * K and scores.pop("iou") == [None] * K
    assert set(scores.values()) == {0.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_class_ids_are_the_largest_logits_and_one_bad_value_names_its_frame(dtype, value):
    logits = (60000 * torch.rand(3, K, 8, 8, generator=torch.Generator().manual_seed(7)).double()).to(dtype)
    ids = metrics.class_ids(logits, ["a", "b", "c"])  # finite, though their sum is beyond half precision
    assert torch.equal(logits.gather(1, ids[:, None])[:, 0], logits.amax(1))
    logits[1, 4, 7, 0] = value
    with pytest.raises(ValueError, match="answer to frame b is not finite"):
        metrics.class_ids(logits, ["a", "b", "c"])
