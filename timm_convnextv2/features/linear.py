"""Linear classifiers on frozen features: ridge regression in closed form, and the linear probe."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .extract import check_features


class Estimate(NamedTuple):
    """A measure and its 95 % interval from a bootstrap, see `resampled`; without one, all three are equal."""

    value: float
    low: float
    high: float


def accuracy_or_map(scores: Tensor, labels: Tensor) -> float:
    """Accuracy 0 to 1 of scores `[M, num_classes]`; for labels 0 and 1 `[M, num_classes]` mean average precision.

    The mean is over the classes of at least one image, NaN if there are none.
    """
    labels = labels.to(scores.device)
    if labels.ndim == 1:
        return float((scores.argmax(1) == labels).double().mean())
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = labels.gather(0, order).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device).unsqueeze(1)
    positives = hits.sum(0)
    average = (precision * hits).sum(0) / positives
    return float(average[positives > 0].mean())


def resampled(
    scores: Tensor, labels: Tensor, *, draws: int = 1000, seed: int = 0, groups: Tensor | None = None
) -> Tensor:
    """`accuracy_or_map` of all test images, and of `draws` resamples with replacement: float64 `[1 + draws]`.

    Resamples are of images, or of whole groups (numbers from 0, int64 `[M]`), because images of one patient or video
    are not independent. Calls with one `seed` and as many images or groups draw the same resamples, so that the values
    of two models can be subtracted. Several labels take longer and get a tenth of `draws`.
    """
    scores, labels = scores.cpu(), labels.cpu()
    generator, n = torch.Generator().manual_seed(seed), len(labels) if groups is None else int(groups.max()) + 1
    picks = (
        torch.randint(n, (n,), generator=generator) for _ in range(draws if labels.ndim == 1 else draws // 10 or 1)
    )
    if labels.ndim == 1:
        right = (scores.argmax(1) == labels).double()
        sizes = torch.ones(n).double() if groups is None else groups.bincount(minlength=n).double()
        right = right if groups is None else torch.zeros(n).double().index_add(0, groups, right)
        found = [float(right[pick].sum() / sizes[pick].sum()) for pick in picks]
    else:
        members = [*torch.arange(n)[:, None]] if groups is None else [(groups == i).nonzero()[:, 0] for i in range(n)]
        chosen = (torch.cat([members[i] for i in pick.tolist()]) for pick in picks)
        found = [accuracy_or_map(scores[images], labels[images]) for images in chosen]
    return torch.tensor([accuracy_or_map(scores, labels), *found], dtype=torch.float64)


def estimate(values: Tensor) -> Estimate:
    """The first of the values with the 95 % interval of the others, see `resampled`.

    It covers the choice of test images or groups, not the variation between trainings. The difference of two models'
    values gives the paired interval.
    """
    low, high = values[1:].nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Estimate(float(values[0]), low, high)


def bootstrap(scores: Tensor, labels: Tensor, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """`accuracy_or_map` with its 95 % interval over test images, see `resampled`."""
    return estimate(resampled(scores, labels, draws=draws, seed=seed))


def difference(values: Tensor, others: Tensor) -> str:
    """How much better a model is than another, in points, with the paired 95 % interval and a verdict, as text."""
    gain = estimate(100 * (values - others))
    verdict = "above" if gain.low > 0 else "below" if gain.high < 0 else "no difference shown"
    return f"{gain.value:+.1f} ({gain.low:+.1f} to {gain.high:+.1f}): {verdict}"


PENALTIES = tuple(10.0**e for e in range(-6, 4))  # times N, for features with mean square 1
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
HELD_OUT = 0.2
BATCH_SIZE = 256


def _targets(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    return (F.one_hot(labels, num_classes) if labels.ndim == 1 else labels).to(dtype)


def _split(images: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    held = max(1, round(images * HELD_OUT))
    return order[held:], order[:held]


def _check(train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> None:
    check_features(train, labels, test)
    if len(train) < 2 or num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, for {len(train)} training images; expected at least 2 each.")


def ridge(
    train: Tensor, train_labels: Tensor, test: Tensor, *, num_classes: int, seed: int = 0,
    penalties: Sequence[float] = PENALTIES
) -> Tensor:  # fmt: skip
    """Scores `[M, num_classes]` of ridge regression on the labels as 0 and 1, in closed form and float64 on the CPU.

    The penalty minimises the squared error on a fifth of the training images, drawn by `seed`; the regression is then
    solved on all of them. Test images have no influence. Labels are int64 `[N]`, or 0 and 1 `[N, num_classes]`;
    penalties are in units of N times the mean square of the features.
    """
    _check(train, train_labels, test, num_classes)
    x, rows = train.to("cpu", torch.float64), test.to("cpu", torch.float64)
    y = _targets(train_labels.cpu(), num_classes, torch.float64)
    fit, held = _split(len(x), seed)
    errors = [(scores - y[held]).square().mean() for scores in _solve(x[fit], y[fit], x[held], penalties)]
    best = penalties[int(torch.stack(errors).argmin())]
    return _solve(x, y, rows, [best])[0]


def _solve(x: Tensor, y: Tensor, rows: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """Scores of `rows`, `[M, C]`, per penalty, from one eigendecomposition of the smaller of `x'x` and `xx'`."""
    center, offset = x.mean(0), y.mean(0)
    x, rows, y = x - center, rows - center, y - offset
    scale = x.square().mean().sqrt()
    if scale > 0:
        x, rows = x / scale, rows / scale
    if x.shape[0] >= x.shape[1]:
        values, vectors = torch.linalg.eigh(x.T @ x)
        left, right = rows @ vectors, vectors.T @ (x.T @ y)
    else:
        values, vectors = torch.linalg.eigh(x @ x.T)
        left, right = (rows @ x.T) @ vectors, vectors.T @ y
    values = values.clamp_min(0).unsqueeze(1)
    return [left @ (right / (values + penalty * len(x))) + offset for penalty in penalties]


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, *, num_classes: int, seed: int = 0,
    rates: Sequence[float] = RATES, epochs: int = 50, device: str | torch.device = "cpu"
) -> Tensor:  # fmt: skip
    """Scores `[M, num_classes]` of a linear classifier after a BatchNorm without parameters, trained by SGD.

    One classifier per learning rate is trained on four fifths of the training images; the best rate on the other fifth
    (see `accuracy_or_map`) then trains on all of them, with momentum 0.9, a cosine schedule, no weight decay and no
    augmentation. Test images have no influence. The loss is cross-entropy, binary for several labels per image.

    Source: BatchNorm without parameters as in MAE (https://arxiv.org/abs/2111.06377, appendix A.1), a grid of learning
    rates at once as in DINOv2 (https://arxiv.org/abs/2304.07193).
    """
    _check(train, train_labels, test, num_classes)
    x, labels, rows = train.float().to(device), train_labels.to(device), test.float().to(device)
    fit, held = (part.to(device) for part in _split(len(x), seed))
    options = {"num_classes": num_classes, "seed": seed, "epochs": epochs, "batch_size": BATCH_SIZE}
    tried = _train(x[fit], labels[fit], x[held], rates=rates, **options)
    best = max(range(len(rates)), key=lambda i: accuracy_or_map(tried[i], labels[held]))
    return _train(x, labels, rows, rates=[rates[best]], **options)[0].cpu()


def _train(
    x: Tensor, labels: Tensor, rows: Tensor, *, rates: Sequence[float], num_classes: int, seed: int, epochs: int,
    batch_size: int,
) -> Tensor:  # fmt: skip
    """Scores of `rows`, `[G, M, C]`, from one classifier per learning rate."""
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm1d(x.shape[1], affine=False).to(x.device)
    weight = (0.01 * torch.randn(1, x.shape[1], num_classes, generator=generator)).to(x.device)
    weight = weight.repeat(len(rates), 1, 1).requires_grad_()
    bias = torch.zeros(len(rates), 1, num_classes, device=x.device, requires_grad=True)
    scale = torch.tensor(rates, device=x.device)
    # each loss is multiplied by its learning rate, so that one optimizer trains all classifiers
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)
    targets = _targets(labels, num_classes, torch.float32)
    batches = -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    with torch.enable_grad():
        for _ in range(epochs):
            # batches of nearly equal size: BatchNorm cannot train on a single image
            for part in torch.randperm(len(x), generator=generator).to(x.device).tensor_split(batches):
                if len(x) == 1:
                    break
                logits = norm(x[part]) @ weight + bias
                if labels.ndim == 1:
                    loss = -(logits.log_softmax(-1) * targets[part]).sum(-1)
                else:
                    expected = targets[part].expand_as(logits)
                    loss = F.binary_cross_entropy_with_logits(logits, expected, reduction="none").sum(-1)
                optimizer.zero_grad()
                (loss.mean(1) * scale).sum().backward()
                optimizer.step()
                schedule.step()
    norm.eval()
    with torch.no_grad():
        return norm(rows) @ weight + bias
