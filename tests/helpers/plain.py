"""What runs are held against: plain DDP, computed once, and how far half precision may take a run from it."""

from functools import cache

import torch

from .ranks import run_on_ranks
from .training import SERIES, TOLERANCE, WEIGHT_TOLERANCE, differences, train

LAYOUTS = {"tp2xdp2": (2, 2), "tp4xdp1": (4, 1), "tp1xdp2": (1, 2), "tp2xdp1": (2, 1)}


@cache
def plain_ddp(spec, dp):
    """What every run is held against. Computed once a session."""
    assert spec.tp is None
    return run_on_ranks(train, dp, spec)


# What half precision does to plain DDP at least, or it was not on. Single precision moves a run by 1e-6.
BF16_SEEN = {"series": 10 * TOLERANCE, "weights": WEIGHT_TOLERANCE}
FP16_SEEN = {"series": 1e-5, "weights": 1e-5}


def assert_as_close_as_rounding(actual, reference, exact, seen=BF16_SEEN):
    """Within what half precision itself does to plain DDP; see `drift` for the limits."""
    off, own = drift(actual, reference), drift(reference, exact)
    assert all(own[name] > seen[name] for name in seen), f"no half precision to be seen: {own}"
    ratios = {name: off[name] / own[name] for name in off}
    assert all(ratios[name] <= LIMITS[name] for name in LIMITS), f"against plain DDP's own drift of {own}: {ratios}"


# Two bf16 runs that differ by rounding alone are about as far from each other as each is from fp32: a ratio of 1. Over
# 144 runs (six models, tied or not, AdamW and SGD, two starts, three layouts) it was at most 1.92 for the series and
# 1.19 for the weights, while the ratio of the *largest* differences, which a few values decide, went up to 5.5.
LIMITS = {"series": 3.0, "weights": 1.5}


def drift(actual, reference):
    """Root mean squares: of the relative differences of all losses and norms, and over all weights as one vector."""
    assert differences(actual, reference)["learning_rates"] == 0  # and the same samples, steps and shapes
    squares = []
    for rank, record in enumerate(actual):
        expected = reference[rank * len(reference) // len(actual)]
        for name in set(SERIES) - {"learning_rates"}:
            got, wanted = (torch.tensor(getattr(r, name), dtype=torch.float64).flatten() for r in (record, expected))
            squares.append(((got - wanted) / wanted).square())
    got, wanted = (torch.cat([w.flatten().double() for w in r[0].weights.values()]) for r in (actual, reference))
    weights = (got - wanted).norm() / wanted.norm()
    return {"series": torch.cat(squares).mean().sqrt().item(), "weights": weights.item()}
