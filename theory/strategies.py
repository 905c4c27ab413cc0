"""Random worlds for hypothesis: `@for_all(world=worlds(), beta=betas())` reads as it is meant."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from theory.world import World, bradley_terry_labels, random_labels

WORLDS = 40  # worlds per check

SHAPES = [(2, 1), (2, 6), (3, 1), (3, 2), (3, 3), (3, 4), (4, 3), (4, 4), (5, 2), (5, 3)]  # (|V|, T), small
LARGE_SHAPES = [(3, 6), (4, 5), (5, 4), (5, 6)]  # up to 5,461 responses of distinct text
seeds = st.integers(0, 2**32 - 1)


def for_all(**strategies: st.SearchStrategy) -> Callable:
    """Check the property on WORLDS worlds, the same ones on every run."""

    def decorate(test: Callable) -> Callable:
        checked = settings(
            max_examples=WORLDS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        return checked(given(**strategies)(test))

    return decorate


def betas() -> st.SearchStrategy[float]:
    """beta > 0, from nearly nothing to strong guidance."""
    return st.floats(0.05, 5.0)


@st.composite
def worlds(draw: st.DrawFn, shapes: list[tuple[int, int]] = SHAPES + LARGE_SHAPES) -> World:
    """Flat and peaked references, full and missing tokens, small and large rewards, with and without ties."""
    vocabulary, horizon = draw(st.sampled_from(shapes))
    return World.random(
        draw(seeds),
        vocabulary,
        horizon,
        sharpness=draw(st.sampled_from([0.3, 1.0, 2.0])),
        reward_scale=draw(st.sampled_from([0.3, 1.0, 3.0])),
        ties=draw(st.booleans()),
        zeros=draw(st.sampled_from([0.0, 0.3])),
    )


@st.composite
def labelled_worlds(draw: st.DrawFn, any_labeler: bool = True, shapes: list[tuple[int, int]] = SHAPES) -> World:
    """A small world with a labeler: Bradley-Terry on its rewards, or (if allowed) an arbitrary one."""
    world = draw(worlds(shapes))
    if any_labeler and draw(st.booleans()):
        return world.with_labels(random_labels(draw(seeds), len(world.prefixes[-1])))
    return world.with_labels(bradley_terry_labels(world.rewards[-1]))
