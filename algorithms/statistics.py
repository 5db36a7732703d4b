"""What calibration leaves per linear layer: moments of its inputs, never the inputs. (Of weights: `profiles`.)"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from autoprune.algorithms.updates import Factor, factor

# Elements that are taken to fp64 at a time (2 MiB per intermediate), so that the memory beside the data stays small.
CHUNK = 1 << 18

GRAM_READERS = frozenset({"h_inv_diag", "gram"})  # what cannot be had without the Gram matrix
SUMS = ("sum", "sum_of_squares", "sum_of_magnitudes", "sum_of_cubes", "sum_of_fourths")
DERIVED = "derived."  # before the names of statistics, where moments are written down


class NotFiniteError(ValueError):
    """An input of a layer is infinite or NaN: mostly since a 16-bit dtype overflows."""


class InputMoments:
    """Sums over the inputs of a linear layer, on the CPU; every statistic of the inputs follows from them.

    features: number of inputs of the layer. wants: names of statistics that will be asked for (see `statistic`), or
    "gram"; sums that none of them needs are not made. Sums of features are fp64, the Gram matrix Σ x xᵀ is fp32
    [features, features]. They are independent of how the inputs were split into calls but for rounding, and those of
    several shards of the text add up (`merge`). damping: that of the factor, once something has asked for it (see
    `algorithms.updates`).
    """

    def __init__(self, features: int, wants: Iterable[str] = ()) -> None:
        wants = frozenset(wants)
        self.count = 0
        self.sum = torch.zeros(features, dtype=torch.float64)
        self.sum_of_squares = torch.zeros(features, dtype=torch.float64)
        self.sum_of_magnitudes = torch.zeros(features, dtype=torch.float64) if "x_absmean" in wants else None
        self.sum_of_cubes = torch.zeros(features, dtype=torch.float64) if "x_kurtosis" in wants else None
        self.sum_of_fourths = torch.zeros(features, dtype=torch.float64) if "x_kurtosis" in wants else None
        self.gram = torch.zeros(features, features) if wants & GRAM_READERS else None
        self._factor: Factor | None = None
        self.damping: float | None = None
        self._derived: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take inputs [..., features] of any floating dtype and device into account.

        Raises ValueError where the shape is wrong, NotFiniteError where an input is not finite, and leaves the sums as
        they were.
        """
        features = len(self.sum)
        if x.ndim == 0 or x.shape[-1] != features:
            raise ValueError(f"inputs must be [..., {features}], got shape {tuple(x.shape)}")
        rows = x.reshape(-1, features)
        added = [torch.zeros_like(self.sum) for _ in self._sums()]
        for chunk in fp64_chunks(rows):
            terms = [chunk, chunk.square()]
            if self.sum_of_magnitudes is not None:
                terms.append(chunk.abs())
            if self.sum_of_cubes is not None:
                terms += [terms[1] * chunk, terms[1].square()]
            for total, term in zip(added, terms, strict=True):
                total += term.sum(dim=0).cpu()
        if not added[1].isfinite().all():
            feature = int((~added[1].isfinite()).nonzero()[0])
            raise NotFiniteError(f"an input of the layer is not finite (feature {feature} of {features})")
        self.count += len(rows)
        for total, more in zip(self._sums(), added, strict=True):
            total += more
        if self.gram is not None:
            rows = rows.float()
            if rows.is_cuda:
                self.gram += (rows.T @ rows).cpu()
            else:
                self.gram.addmm_(rows.T, rows)
        self._factor = None
        self._derived.clear()

    def merge(self, other: InputMoments) -> None:
        """Become the moments of both sets of inputs; nothing is lost, since sums add up."""
        if len(other.sum) != len(self.sum):
            raise ValueError(f"cannot merge moments of {len(other.sum)} features into moments of {len(self.sum)}")
        if len(other._sums()) != len(self._sums()) or (other.gram is None) != (self.gram is None):
            raise ValueError("cannot merge moments that hold different sums")
        self.count += other.count
        for total, more in zip(self._sums(), other._sums(), strict=True):
            total += more
        if self.gram is not None:
            self.gram += other.gram
        self._factor = None
        self._derived.clear()

    def _sums(self) -> list[Tensor]:
        return [total for name in SUMS if (total := getattr(self, name)) is not None]

    def statistic(self, name: str) -> Tensor:
        """Float32 [features] by name.

        x_norm: root mean square, Wanda's ‖X_j‖₂ / √tokens; x_mean; x_std: population standard deviation;
        x_absmean: mean of |x|; x_kurtosis: E[(x − μ)⁴] / σ⁴, 0 where σ is 0; h_inv_diag: diagonal of the inverse of
        SparseGPT's damped Hessian (see `algorithms.updates`).
        Raises ValueError before the first input, and KeyError for a name that was not among `wants`.
        """
        if not self.count:
            raise ValueError("there are no moments before the first input was added")
        if name not in self._derived:
            self._derived[name] = STATISTIC[name](self).float()
        return self._derived[name]

    @property
    def factor(self) -> Factor:
        """Cholesky factor of the inverse Hessian, made once; needs the Gram matrix."""
        if self._factor is None:
            self._factor = factor(self.gram, self.count)
            self.damping = self._factor.damping
        return self._factor

    def drop_gram(self) -> None:
        """Free the Gram matrix and its factor; statistics that were asked for before stay."""
        self.gram, self._factor = None, None

    def tensors(self) -> dict[str, Tensor]:
        """All that these moments hold but for `count`, `damping`, the Gram matrix and its factor, by name; `restored`
        reads it."""
        return {name: value for name in SUMS if (value := getattr(self, name)) is not None} | {
            DERIVED + name: value for name, value in self._derived.items()
        }

    @classmethod
    def restored(cls, count: int, damping: float | None, tensors: Mapping[str, Tensor]) -> InputMoments:
        """Moments that answer as those did whose `count`, `damping` and `tensors` these are."""
        moments = cls(len(tensors["sum"]))
        moments.count, moments.damping = count, damping
        for name in SUMS:
            setattr(moments, name, tensors.get(name))
        moments._derived = {
            name.removeprefix(DERIVED): value for name, value in tensors.items() if name.startswith(DERIVED)
        }
        return moments

    def _mean(self, total: Tensor | None) -> Tensor:
        if total is None:
            raise KeyError("these moments were not asked to hold the sums that this statistic needs")
        return total / self.count

    def _variance(self) -> Tensor:
        variance = self._mean(self.sum_of_squares) - self._mean(self.sum).square()
        return variance.clamp(min=0)  # rounding can leave a tiny negative variance

    def _kurtosis(self) -> Tensor:
        mean, second = self._mean(self.sum), self._mean(self.sum_of_squares)
        third, fourth = self._mean(self.sum_of_cubes), self._mean(self.sum_of_fourths)
        central = fourth - 4 * mean * third + 6 * mean.square() * second - 3 * mean**4
        variance = self._variance()
        # A feature that does not vary leaves nothing but rounding.
        varies = variance > 1e-12 * second
        return torch.where(varies, central / variance.square().where(varies, torch.ones_like(variance)), 0.0)


STATISTIC: dict[str, Callable[[InputMoments], Tensor]] = {
    "x_norm": lambda m: m._mean(m.sum_of_squares).sqrt(),
    "x_mean": lambda m: m._mean(m.sum),
    "x_std": lambda m: m._variance().sqrt(),
    "x_absmean": lambda m: m._mean(m.sum_of_magnitudes),
    "x_kurtosis": lambda m: m._kurtosis(),
    "h_inv_diag": lambda m: m.factor.inverse_diagonal,
}


def fp64_chunks(rows: Tensor) -> Iterator[Tensor]:
    """Consecutive rows of a matrix, about CHUNK elements at a time, as fp64 copies that the caller may overwrite."""
    for part in rows.split(max(1, CHUNK // max(1, rows.shape[1]))):
        yield part.to(torch.float64, copy=True)
