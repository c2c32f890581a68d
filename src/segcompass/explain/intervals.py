"""Intervals of what was measured: a bootstrap over pictures, and a fitted line with its band."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

RESAMPLES = 1000
CONFIDENCE = 0.95
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


def bootstrap(
    columns: Float[np.ndarray, "n c"],
    figure: Callable[[Float[np.ndarray, "r c"]], Float[np.ndarray, "r f"]],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
) -> Float[np.ndarray, "2 f"]:
    """Percentile interval of figures that are made of sums over samples.

    Whole clusters are drawn: questions about one picture are not independent of each other.

    Args:
        columns: what is summed, one row a sample.
        figure: from r rows of sums to r rows of figures; may give NaN where one is undefined.
        clusters: the picture of each sample.
        seed: of the drawing.

    Returns:
        Lower and upper end of every figure's 95 % interval; NaN where it is never defined.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(names), columns.shape[1]))
    np.add.at(sums, [names[name] for name in clusters], columns)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of figures that are never defined
        return np.asarray(np.nanquantile(figure(drawn @ sums), _TAILS, axis=0))


class Line(NamedTuple):
    """An ordinary least squares line through n points, and how well it fits."""

    n: int
    slope: float
    intercept: float
    r: float  # Pearson
    r_interval: tuple[float, float]  # 95 %, by Fisher's transform
    p: float  # of r = 0, two-sided
    mean_x: float
    spread_x: float  # sum of squared deviations of x
    error: float  # residual standard deviation, n - 2 degrees of freedom

    def band(
        self, x: Float[np.ndarray, " m"]
    ) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        """The 95 % confidence band of the mean of y at x."""
        middle = self.intercept + self.slope * x
        width = self.error * np.sqrt(1 / self.n + (x - self.mean_x) ** 2 / self.spread_x)
        reach = float(stats.t.ppf(_TAILS[1], self.n - 2)) * width
        return middle - reach, middle + reach

    def summary(self) -> dict[str, Any]:
        """What a caption states."""
        return {
            "n": self.n,
            "r": self.r,
            "r_interval": list(self.r_interval),
            "p": self.p,
            "slope": self.slope,
            "intercept": self.intercept,
        }


def fit_line(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Line | None:
    """Fit a line; None for fewer than four points, or where x or y is constant."""
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    found: Any = stats.linregress(x, y)
    r = float(np.clip(found.rvalue, -1, 1))
    limits = stats.pearsonr(x, y).confidence_interval(CONFIDENCE)
    residuals = y - (found.intercept + found.slope * x)
    return Line(
        n=len(x),
        slope=float(found.slope),
        intercept=float(found.intercept),
        r=r,
        r_interval=(float(limits.low), float(limits.high)),
        p=float(found.pvalue),
        mean_x=float(np.mean(x)),
        spread_x=float(((x - np.mean(x)) ** 2).sum()),
        error=float(np.sqrt((residuals**2).sum() / (len(x) - 2))),
    )
