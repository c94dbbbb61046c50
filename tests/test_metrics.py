"""metrics.py against counting pixel by pixel."""

import pytest
import torch

import metrics

K = 7


def random_maps(seed, shape=(3, 9, 11)):
    """Labels with 255 and classes 2, 5 never; predictions that are half right, with class 5 never and class 2 at times.

    So 5 occurs nowhere, 2 only in predictions, and 6 only in labels.
    """
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
    matrix = metrics.confusion(prediction, labels, K)
    counted = pairs(prediction, labels)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[counted.count((t, p)) for p in range(K)] for t in range(K)]
    assert matrix.sum() == (labels != 255).sum() < labels.numel()


def test_confusions_add_up_over_batches_and_past_what_float32_can_count():
    prediction, labels = random_maps(1)
    parts = sum(metrics.confusion(prediction[b], labels[b], K) for b in range(3))
    assert torch.equal(parts, metrics.confusion(prediction, labels, K))
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
            iou[c] = len(truth & found) / len(truth | found)
            f1[c] = 2 * len(truth & found) / (len(truth) + len(found))
        if truth:
            recall[c] = len(truth & found) / len(truth)
    assert sorted(iou) == [0, 1, 2, 3, 4, 6] and sorted(recall) == [0, 1, 3, 4, 6]

    scores = metrics.scores(metrics.confusion(prediction, labels, K))
    expected = {
        "miou_published": 100 * sum(iou.values()) / K,
        "miou_occurring": 100 * sum(iou.values()) / 6,
        "accuracy": 100 * sum(t == p for t, p in counted) / len(counted),
        "mean_accuracy": 100 * sum(recall.values()) / 5,
        "f1": 100 * sum(f1.values()) / 6,
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    assert scores["iou"][5] is None and scores["iou"][2] == 0.0 and scores["iou"][6] == 0.0
    assert [v for v in scores["iou"] if v is not None] == pytest.approx([100 * v for v in iou.values()])


def test_without_a_labelled_pixel_all_scores_are_zero():
    prediction, labels = random_maps(3)
    scores = metrics.scores(metrics.confusion(prediction, torch.full_like(labels, 255), K))
    assert (
        scores.pop("confusion") == [[0] * K] * K and scores.pop("iou") == [None] * K and set(scores.values()) == {0.0}
    )


def test_perfect_predictions_score_100_where_classes_occur():
    _, labels = random_maps(4)
    scores = metrics.scores(metrics.confusion(labels.where(labels < K, 5), labels, K))
    assert scores["miou_occurring"] == scores["f1"] == scores["accuracy"] == pytest.approx(100)
    assert scores["miou_published"] == pytest.approx(100 * 5 / K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_class_ids_are_the_largest_logits_and_one_bad_value_names_its_frame(dtype):
    logits = (60000 * torch.rand(3, K, 8, 8, generator=torch.Generator().manual_seed(7)).double()).to(dtype)
    ids = metrics.class_ids(logits, ["a", "b", "c"])  # finite, though their sum is beyond half precision
    assert torch.equal(logits.gather(1, ids[:, None])[:, 0], logits.amax(1))
    for value in (float("nan"), float("inf"), float("-inf")):
        broken = logits.clone()
        broken[1, 4, 7, 0] = value
        with pytest.raises(ValueError, match="answer to frame b is not finite"):
            metrics.class_ids(broken, ["a", "b", "c"])
