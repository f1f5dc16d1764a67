"""Times of variants are predicted from those measured: exactly where they follow the model, and never absurdly."""

import itertools
import random
import statistics
from collections import deque

import pytest
import torch

from ctrlcompile.variant_cost import CostModel, Observation, Size, fit, seconds


def some_size() -> Size:
    rows, inputs, outputs = (random.choice((16, 64, 256, 1024)) for _ in range(3))
    return Size(rows, inputs, outputs, random.uniform(0.05, 1), random.choice((2, 4)))


def error(coefficients, observations) -> float:
    return sum((seconds(coefficients, seen.size) / seen.seconds - 1) ** 2 for seen in observations)


def best_by_brute_force(observations) -> float:
    """The least squared relative error of all sets of terms with FLOPs among them, in double precision."""
    units = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    terms = torch.tensor([[seconds(unit, seen.size) / seen.seconds for unit in units] for seen in observations])
    terms = terms.double() / terms.amax(0)
    wanted, found = torch.ones(len(observations), 1, dtype=torch.float64), []
    for others in ((), (0,), (2,), (0, 2)):
        part = terms[:, sorted((1, *others))]
        solution = torch.linalg.lstsq(part, wanted, driver="gelsd").solution
        if bool((solution >= 0).all()):
            found.append(float((part @ solution - wanted).square().sum()))
    return min(found)


def test_times_that_follow_the_model_give_its_coefficients():
    for _ in range(20):
        true = (random.uniform(1e-5, 1e-4), random.uniform(1e-11, 1e-10), random.uniform(1e-10, 1e-9))
        observations = [Observation(size, seconds(true, size)) for size in (some_size() for _ in range(40))]
        found = fit(observations)
        for size in (some_size() for _ in range(20)):
            assert seconds(found, size) == pytest.approx(seconds(true, size), rel=1e-4)


def test_a_fit_has_the_least_relative_error_without_a_negative_coefficient():
    for _ in range(30):
        true = [random.choice((0.0, 1.0)) * c for c in (1e-4, 1e-10, 1e-9)]
        observations = [
            Observation(size, (1e-6 + seconds(tuple(true), size)) * random.uniform(0.7, 1.3))
            for size in (some_size() for _ in range(random.randrange(6, 64)))
        ]
        found = fit(observations)
        assert min(found) >= 0 < found[1]
        assert error(found, observations) <= best_by_brute_force(observations) * (1 + 1e-5) + 1e-9


def test_one_product_at_many_densities_cannot_tell_all_terms_apart_and_is_fitted_all_the_same():
    size = some_size()
    true = (1e-4, 1e-10, 0.0)
    observations = [Observation(s, seconds(true, s)) for s in (size._replace(share=k / 20) for k in range(1, 21))]
    found = fit(observations)
    for share in (0.03, 0.5, 0.99):
        moved = size._replace(share=share)
        assert seconds(found, moved) == pytest.approx(seconds(true, moved), rel=1e-3)


def test_a_single_density_never_says_that_others_cost_the_same():
    size = some_size()._replace(share=1.0)
    found = fit([Observation(size, random.uniform(0.9, 1.1)) for _ in range(10)])
    assert seconds(found, size._replace(share=0.1)) == pytest.approx(0.1 * seconds(found, size))


def test_errors_are_those_of_predictions_made_before_their_measurement():
    model, own, expected = CostModel(), deque(maxlen=3), []
    for number, _ in enumerate(itertools.repeat(None, 30)):
        seen = Observation(some_size(), random.uniform(1e-4, 1e-2))
        predicted = model.predict("kind", own, seen.size)
        assert (predicted is None) == (number == 0)
        if predicted is not None:
            expected.append(abs(predicted / seen.seconds - 1))
        model.observe("kind", own, seen)
    assert model.error == pytest.approx(statistics.median(expected))
