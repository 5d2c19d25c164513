"""Measures of features in which a signal was planted, or none."""

import pytest
import torch
import torch.nn.functional as F

from timm_convnextv2.features import Scoring, accuracy_or_map, bootstrap, knn, knn_scores, measure_features, rankme
from timm_convnextv2.features import linear as linear_module
from timm_convnextv2.features.evaluate import over_shuffles, shuffles
from timm_convnextv2.features.linear import difference, estimate, linear_probe, resampled, ridge
from timm_convnextv2.features.neighbours import nearest

CLASSES = 4


def planted(images=200, noise=0.1, width=16, seed=0):
    """Features around one direction for each class, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % CLASSES
    return torch.eye(CLASSES, width)[labels] + noise * torch.randn(images, width, generator=generator), labels


def test_features_that_separate_classes():
    (train, labels), (test, expected) = planted(), planted(seed=1)
    scoring = Scoring(k=(1, 10, 500), draws=50)
    found = measure_features(train, labels, test, expected, num_classes=CLASSES, scoring=scoring)
    assert list(found) == ["knn_1", "knn_10", "knn_200", "ridge", "probe", "rank"]
    assert all(found[name] == (1, 1, 1) for name in list(found)[:-1])
    assert 1 < found["rank"].value <= 16


def test_shuffled_labels_give_chance():
    """It lies in the 95 % interval, but for one draw in twenty."""
    inside = {name: [] for name in ("knn_20", "ridge", "probe")}
    (train, labels), (test, expected) = planted(120), planted(200, seed=1)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        shuffled = labels[torch.randperm(120, generator=generator)]
        answers = expected[torch.randperm(200, generator=generator)]  # else a whole cluster is right or wrong at once
        options = dict(num_classes=CLASSES, scoring=Scoring(k=(20,), draws=200, probe=seed < 4))  # it takes the longest
        for name, found in measure_features(train, shuffled, test, answers, **options).items():
            if name != "rank":
                inside[name].append(found.low <= 1 / CLASSES <= found.high)
                assert found.low < found.value < found.high < 0.5
    assert sum(inside["knn_20"]) >= 10 and sum(inside["ridge"]) >= 10 and sum(inside["probe"]) >= 3, inside


def test_the_control_of_clear_clusters_gives_chance():
    """A whole cluster is right or wrong at once, which one shuffle with resampled test images does not show."""
    (train, labels), (test, expected) = planted(120), planted(200, seed=1)
    how = dict(num_classes=CLASSES, scoring=Scoring(k=(20,), draws=1, probe=False))
    found = [over_shuffles((train, test, expected), shuffles(labels, seed), **how) for seed in range(40)]
    for name in ("knn_20", "ridge"):
        assert sum(of[name].low > 1 / CLASSES for of in found) <= 4  # one in forty is expected
        assert abs(sum(of[name].value for of in found) / 40 - 1 / CLASSES) < 0.05


def test_several_labels():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(240, 3, generator=generator) < 0.4).long()
    features = torch.cat([labels.float(), 0.1 * torch.randn(240, 5, generator=generator) + 0.2], 1)
    options = dict(num_classes=3, scoring=Scoring(k=(5,), draws=100))
    found = measure_features(features[:160], labels[:160], features[160:], labels[160:], **options)
    assert all(found[name].value > 0.98 for name in ("knn_5", "ridge", "probe"))
    noise = torch.randn(240, 8, generator=generator)
    found = measure_features(noise[:160], labels[:160], noise[160:], labels[160:], **options)
    assert all(found[name].value < 0.6 for name in ("knn_5", "ridge", "probe"))


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_neighbours_in_blocks_are_those_of_the_whole_product(chunk):
    train, test = planted(150, noise=1)[0], planted(40, noise=1, seed=1)[0]
    similar, rows = nearest(train, test, 20, chunk=chunk)
    expected = (F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).topk(20)
    assert torch.equal(rows, expected.indices) and torch.allclose(similar, expected.values)


def test_memory_stays_in_bounds(monkeypatch):
    """No product has more numbers than a block."""
    made, plain = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: made.append(plain(a, b)) or made[-1])
    train, labels = planted(300)
    knn(train, labels, planted(100, seed=1)[0], 5, chunk=32)
    assert made and max(product.numel() for product in made) <= 32 * 32


def test_several_labels_in_small_parts(monkeypatch):
    labels = (torch.rand(60, 3, generator=torch.Generator().manual_seed(0)) < 0.5).long()
    train = planted(60, noise=1)[0]
    whole = knn_scores(train, labels, train, [5])[5]
    monkeypatch.setitem(knn_scores.__globals__, "MULTILABEL_NUMBERS", 4 * 5 * 3)  # the module is hidden by its function
    assert torch.allclose(knn_scores(train, labels, train, [5])[5], whole, atol=1e-6)
    assert torch.allclose(whole[:, 0], knn_scores(train, labels[:, 0], train, [5])[5][:, 1], atol=1e-6)


def test_votes_are_weighted():
    """Two far neighbours of one class against one near of the other: the temperature decides."""
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    assert knn(train, labels, query, 3).tolist() == [0]
    assert knn(train, labels, query, 3, temperature=10.0).tolist() == [1]
    share = knn_scores(train, labels, query, [3])[3]
    near, far = torch.tensor([1.0, 0.8]).div(0.07).exp()
    assert share[0, 0].item() == pytest.approx(float(near / (near + 2 * far)), rel=1e-5)


def test_one_k_or_several():
    train, labels = planted(30)
    several = knn_scores(train, labels, train, (1, 10, 200, 100))
    assert list(several) == [1, 10, 30]  # no more neighbours than images
    assert torch.equal(several[10].argmax(1), knn(train, labels, train, 10))


@pytest.mark.parametrize("width", [16, 300])
def test_ridge_is_the_closed_form(width):
    """Primal and dual, against the normal equations; with one penalty, nothing is chosen."""
    (train, labels), (test, _) = planted(width=width, noise=1), planted(50, width=width, noise=1, seed=1)
    found = ridge(train, labels, test, num_classes=CLASSES, penalties=[0.01])
    x, y = train.double(), F.one_hot(labels).double()
    center, offset = x.mean(0), y.mean(0)
    penalty = 0.01 * (x - center).square().mean() * len(x)
    gram = (x - center).T @ (x - center) + penalty * torch.eye(width)
    weights = torch.linalg.solve(gram, (x - center).T @ (y - offset))
    assert torch.allclose(found, (test.double() - center) @ weights + offset, atol=1e-9)


@pytest.mark.parametrize("classifier", [ridge, linear_probe])
def test_repeatable_and_blind_to_the_test(classifier):
    """The same numbers each time, and a row's scores do not depend on the other rows of the test."""
    (train, labels), (test, _) = planted(100, noise=1), planted(40, noise=1, seed=1)
    scores = classifier(train, labels, test, num_classes=CLASSES)
    assert torch.equal(scores, classifier(train, labels, test, num_classes=CLASSES))
    others = torch.cat([test[:1], 1000 * test])
    alone = classifier(train, labels, others, num_classes=CLASSES)[:1]
    assert torch.allclose(alone, scores[:1], rtol=1e-4, atol=1e-5)


def test_penalty_comes_from_a_part_of_the_training_labels(monkeypatch):
    """Of noise the heaviest penalty is best, of a clear signal a light one; the part is a fifth, not the test."""
    seen, plain = [], linear_module._solve

    def spy(x, y, rows, penalties):
        seen.append((len(x), len(rows), list(penalties)))
        return plain(x, y, rows, penalties)

    monkeypatch.setattr(linear_module, "_solve", spy)
    train, labels = planted(100, noise=0.05)
    ridge(train, labels, train[:7], num_classes=CLASSES)
    shuffled = labels[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    ridge(train, shuffled, train[:7], num_classes=CLASSES)
    assert [call[:2] for call in seen] == [(80, 20), (100, 7)] * 2
    assert seen[1][2][0] <= 0.1 and seen[3][2][0] >= 1


def test_probe_chooses_the_rate_that_learns():
    train, labels = planted(100)
    test, expected = planted(40, seed=1)
    options = dict(num_classes=CLASSES, epochs=5)
    assert accuracy_or_map(linear_probe(train, labels, test, rates=[1e-9], **options), expected) < 0.8
    assert accuracy_or_map(linear_probe(train, labels, test, rates=[1e-9, 1.0], **options), expected) == 1


def test_classifiers_of_a_grid_do_not_touch_each_other():
    train, labels = planted(64, noise=1)
    options = dict(num_classes=CLASSES, seed=0, epochs=3, batch_size=16)
    both = linear_module._train(train, labels, train, rates=[0.01, 1.0], **options)
    alone = linear_module._train(train, labels, train, rates=[1.0], **options)
    assert torch.allclose(both[1], alone[0], rtol=1e-4, atol=1e-5) and not torch.allclose(both[0], both[1])


def test_rank_counts_directions():
    assert rankme(torch.eye(8)) == pytest.approx(8)
    assert rankme(torch.ones(50, 1) * torch.randn(1, 12)) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.zeros(4, 3)) == 0
    x = torch.randn(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share = torch.linalg.svdvals(x) / torch.linalg.svdvals(x).sum()
    expected = float((-(share * share.log()).sum()).exp())
    assert rankme(x) == pytest.approx(expected) and rankme(x.T) == pytest.approx(expected)


def test_mean_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    labels = torch.tensor([[1, 0], [0, 0], [1, 0]])  # the second class has no image and does not count
    assert accuracy_or_map(scores, labels) == pytest.approx((1 + 2 / 3) / 2)


def test_interval_is_that_of_a_share():
    """95 % of the bootstrap of a mean of 0 and 1: 1.96 standard errors to each side, not 1.64 (90 %) or 2.58 (99 %)."""
    right = torch.arange(400) % 4 != 0
    error = (0.75 * 0.25 / 400) ** 0.5
    found = [bootstrap(F.one_hot(right.long()).float(), torch.ones(400, dtype=torch.long), seed=s) for s in range(8)]
    assert all(estimate.value == 0.75 for estimate in found)
    low, high = (sum(abs(getattr(e, side) - 0.75) for e in found) / 8 / error for side in ("low", "high"))
    assert low == pytest.approx(1.96, abs=0.12) and high == pytest.approx(1.96, abs=0.12)


def test_no_difference_without_its_paired_interval():
    """20 against 17 of 56 images is no difference, though both have the same wide interval as 40 against 17."""
    labels = torch.ones(56, dtype=torch.long)
    seventeen, twenty, forty = (
        resampled(F.one_hot((torch.arange(56) < n).long(), 2).float(), labels) for n in (17, 20, 40)
    )
    shifted = resampled(F.one_hot((torch.arange(56) >= 36).long(), 2).float(), labels)  # 20 other images
    assert difference(shifted, seventeen).startswith("+5.4 (-") and difference(shifted, seventeen).endswith("shown")
    assert difference(forty, seventeen).endswith(": above") and difference(seventeen, forty).endswith(": below")
    assert difference(twenty, twenty) == "+0.0 (+0.0 to +0.0): no difference shown"


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("copies", [1, 9])
def test_copies_within_groups_do_not_narrow_intervals(copies, several):
    """Nine copies of each image are no more evidence than one; as images they would give a third of the interval."""
    labels = (torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) < 0.4).long()
    one, two = (labels + 0.8 * torch.randn(60, 2, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    labels = labels if several else labels[:, 0]
    groups = torch.arange(60).repeat_interleave(copies)
    images, clusters, plain = (
        [resampled(scores[index], labels[index], draws=2000, groups=by) for scores in (one, two)]
        for index, by in ((torch.arange(60), None), (groups, groups), (groups, None))
    )
    for values in (lambda pair: pair[0], lambda pair: pair[0] - pair[1]):  # a measure, and a paired difference
        width, of_groups, too_narrow = (
            (lambda e: e.high - e.low)(estimate(values(pair))) for pair in (images, clusters, plain)
        )
        assert of_groups == pytest.approx(width, rel=0.1)
        assert too_narrow == pytest.approx(width / copies**0.5, rel=0.25)


def test_groups_of_unequal_size_weigh_their_images():
    right, groups = torch.tensor([1, 1, 1, 0]), torch.tensor([0, 0, 0, 1])
    found = resampled(F.one_hot(right, 2).float(), torch.ones(4, dtype=torch.long), groups=groups)
    assert found[0] == 0.75 and {*found[1:].tolist()} == {0, 0.75, 1}


NAN = torch.full((4, 3), torch.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: rankme(NAN), "features of 4 of 4 images have NaN"),
        (lambda x, y: rankme(torch.ones(3)), r"are \[3\], expected \[N, D\]"),
        (lambda x, y: knn(x, y, NAN, 1), "test features of 4 of 4"),
        (lambda x, y: ridge(NAN, y[:4], x, num_classes=2), "training features of 4 of 4"),
        (lambda x, y: linear_probe(x, y, NAN, num_classes=2), "test features of 4 of 4"),
        (lambda x, y: knn(x, y[:3], x, 1), "do not fit"),
        (lambda x, y: ridge(x, y, x[:, :2], num_classes=2), "do not fit"),
        (lambda x, y: ridge(x, y, x, num_classes=1), "num_classes is 1"),
        (lambda x, y: knn(x, y, x, 0), r"k is \[0\]"),
        (lambda x, y: knn(x, y, x, 1, temperature=0), "temperature is 0"),
    ],
)
def test_what_cannot_be_measured(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(6, 3), torch.arange(6) % 2)
