"""Statistics of the network's input: mean, spread, flat patches and equal channels of normalised images."""

from collections.abc import Sequence

import torch

FLAT = 1e-6  # variance; the loss adds as much before it divides by the variance of a patch


class InputStatistics:
    """Statistics of normalised images of one size, added one by one with equal weight.

    Args:
        patch: Side of a patch in pixels, the encoder's stride.
        mean, std: Used for the normalisation, per channel.

    Attributes:
        low, high: Smallest and largest value after normalisation, `[C]`.
    """

    def __init__(self, patch: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.patch, self.images, channels = patch, 0, len(mean)
        self.given_mean, self.given_std = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
        self.low, self.high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
        # of each image: mean, variance and share of flat patches `[C]`; variance of each patch, all channels together
        self._rows: list[tuple[torch.Tensor, ...]] = []
        self._equal = torch.ones(channels, channels, dtype=torch.bool).triu(1)

    def add(self, image: torch.Tensor) -> None:
        """Adds a normalised image, float `[C, H, W]`, height and width multiples of the patch."""
        chans, height, width = image.shape
        patches = image.view(chans, height // self.patch, self.patch, width // self.patch, self.patch)
        variances, means = (x.flatten(1).double() for x in torch.var_mean(patches, dim=(2, 4), correction=0))
        mean, pixels = means.mean(1), self.patch**2
        flat = (variances * (pixels / max(1, pixels - 1)) <= FLAT).double().mean(1)
        together = variances.mean(0) + means.var(0, correction=0)
        together = together * chans * pixels / max(1, chans * pixels - 1)
        self._rows.append((mean, variances.mean(1) + means.var(1, correction=0), flat, together))
        low, high = image.amin((1, 2)), image.amax((1, 2))
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self._compare_channels(image, mean, low, high)
        self.images += 1

    def _compare_channels(self, image: torch.Tensor, *summaries: torch.Tensor) -> None:
        """Keeps the pairs of channels that are equal in this image too, up to rounding."""

        def stored(x: torch.Tensor) -> torch.Tensor:
            shape = (-1, *[1] * (x.ndim - 1))
            return x.double() * self.given_std.view(shape) + self.given_mean.view(shape)

        rounding = 1e-6 * (stored(torch.stack(summaries, 1)).abs().amax() + self.given_mean.abs().amax())
        for values in map(stored, summaries):  # leaves few pairs for the full comparison
            self._equal &= (values[:, None] - values).abs() <= rounding
        for a, b in self._equal.nonzero().tolist():
            one, other = (image[c].double() * self.given_std[c] + self.given_mean[c] for c in (a, b))
            self._equal[a, b] = bool((one - other).abs().amax() <= rounding)

    def _column(self, i: int) -> torch.Tensor:
        return torch.stack([row[i] for row in self._rows])

    @property
    def mean(self) -> torch.Tensor:
        """Mean after normalisation, `[C]` float64."""
        return self._column(0).mean(0)

    @property
    def std(self) -> torch.Tensor:
        """Standard deviation over all pixels of all images after normalisation, `[C]` float64."""
        return (self._column(1).mean(0) + self._column(0).var(0, correction=0)).sqrt()

    @property
    def stored_mean(self) -> torch.Tensor:
        """Mean of the decoded images before normalisation, the mean that would fit, `[C]` float64."""
        return self.mean * self.given_std + self.given_mean

    @property
    def stored_std(self) -> torch.Tensor:
        """Standard deviation before normalisation, `[C]` float64."""
        return self.std * self.given_std

    @property
    def flat(self) -> torch.Tensor:
        """Fraction of patches whose variance after normalisation is at most `FLAT`, `[C]` float64."""
        return self._column(2).mean(0)

    @property
    def patch_variance(self) -> float:
        """Median over patches of the variance over all channels, by which the loss divides."""
        return float(self._column(3).median())

    @property
    def constant(self) -> list[int]:
        """Channels with the same value in all pixels."""
        rounding = 1e-6 * (1 + self.low.abs())
        return (self.high - self.low <= rounding).nonzero().flatten().tolist()

    @property
    def equal(self) -> list[list[int]]:
        """Groups of channels that are equal in every image before normalisation, and not constant."""
        groups: list[list[int]] = []
        for a, b in self._equal.nonzero().tolist():
            if {a, b} & {*self.constant}:
                continue
            group = next((g for g in groups if a in g or b in g), None)
            if group is None:
                groups.append([a, b])
            else:
                group += [c for c in (a, b) if c not in group]
        return groups
