"""What the chapter's cells do not say of `cnnbook.overlap`: random maps against scikit-learn, odd inputs, order."""
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score

from cnnbook import overlap
from cnnbook.overlap import dice, iou, mean_iou, weighted_error, weighted_f_measure
from cnnbook.world import shapes


def test_100_random_maps_equal_scikit_learn():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        k, shape = int(rng.integers(2, 7)), tuple(rng.integers(3, 9, rng.integers(1, 4)))
        pred, target = (rng.integers(0, k, shape).astype(rng.choice([np.uint8, np.int64])) for _ in range(2))
        ignore = 255 if seed % 2 else None
        if ignore: target = np.where(rng.random(shape) < .2, 255, target)
        keep = target != 255
        labels, pair = list(range(k)), (target[keep].ravel(), pred[keep].ravel())
        there = np.isin(labels, np.concatenate(pair))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            want = jaccard_score(*pair, labels=labels, average=None), f1_score(*pair, labels=labels, average=None)
            got = [f(pred, target, k, ignore).numpy() for f in (iou, dice)]
            mean = mean_iou(pred, target, k, ignore)
        for g, w in zip(got, want): assert np.allclose(g[there], w[there]) and np.isnan(g[~there]).all()
        assert np.isclose(mean, want[0][there].mean())


def test_the_order_of_the_pixels_does_not_matter_to_counts():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(5, (4, 20, 20), generator=g) for _ in range(2))
    mix = torch.randperm(a.numel(), generator=g)
    for f in (dice, iou): assert torch.equal(f(a, b, 5), f(a.flatten()[mix], b.flatten()[mix], 5))
    assert torch.equal(dice(a, b, 5), dice(b, a, 5)) and torch.equal(iou(a.mT, b.mT, 5), iou(a, b, 5))


def test_fault_57_nothing_is_nan_with_a_warning():
    none = torch.zeros(0, dtype=torch.int64)
    for f in (dice, iou):
        with pytest.warns(UserWarning, match=r'NaN for \[0, 1\]'): assert f(none, none, 2).isnan().all()
    with pytest.warns(UserWarning, match='NaN'): assert np.isnan(mean_iou(none, none, 2))
    with pytest.warns(UserWarning, match='NaN'):                            # every pixel is ignored
        assert iou(torch.zeros(3).long(), torch.full((3,), 9), 2, ignore_index=9).isnan().all()
    with pytest.warns(UserWarning, match='the mask is empty'):
        assert np.isnan(weighted_f_measure(np.ones((4, 4)), np.zeros((4, 4), bool)))
    with pytest.warns(UserWarning, match='the mask is empty'):
        assert np.isnan(weighted_f_measure(np.ones((0, 4)), np.zeros((0, 4), bool)))


def test_fault_58_bad_inputs_are_named():
    a = torch.tensor([[0, 1], [1, 2]])
    for f in (dice, iou, mean_iou):
        with pytest.raises(ValueError, match='pred: expected shape'): f(a[0], a, 3)
        with pytest.raises(ValueError, match='pred: expected shape'): f(a[0], a, 3, ignore_index=1)
        with pytest.raises(TypeError, match='pred: expected whole numbers'): f(a.float(), a, 3)
        with pytest.raises(TypeError, match='target: expected whole numbers'): f(a, a.float(), 3)
        with pytest.raises(TypeError, match='target: expected whole numbers'): f(a, a.float(), 3, ignore_index=1)
        with pytest.raises(ValueError, match='target: expected labels 0..1, got 2'): f(a % 2, a, 2)
        with pytest.raises(ValueError, match='pred: expected labels 0..1, got 2'): f(a, a % 2, 2)
        with pytest.raises(ValueError, match='target: expected labels 0..2, got -1'): f(a, a - 1, 3)
    m = np.eye(3, dtype=bool)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=rf'score: expected finite numbers, got {bad} at pixel \(1, 2\)'):
            weighted_f_measure(np.where(np.arange(9).reshape(3, 3) == 5, bad, .5), m)
    for bad in (-1e-9, 1.1):
        with pytest.raises(ValueError, match='score: expected numbers in 0..1'): weighted_error(np.full((3, 3), bad), m)
    for beta in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match='beta'): weighted_f_measure(m, m, beta=beta)


def test_fault_59_odd_arrays():
    rng = np.random.default_rng(0)
    score, mask = rng.random((40, 30)), shapes(1, size=40).masks[0, :, 5:35].numpy()
    want = weighted_f_measure(score, mask)
    t = torch.tensor(score, requires_grad=True)
    odd = {'tensor': t, 'float32': score.astype(np.float32), 'lists': score.tolist(), 'half': t.half(),
           'fortran': np.asfortranarray(score), 'bfloat16': t.bfloat16()}
    for name, s in odd.items(): assert abs(weighted_f_measure(s, mask) - want) < 5e-3, name
    for m in (torch.tensor(mask), mask.astype(np.uint8), mask.astype('>i4'), mask[::-1][::-1]):
        assert weighted_f_measure(score, m) == want
    kept = score.copy(), mask.copy()
    weighted_error(score, mask)
    assert np.array_equal(kept[0], score) and np.array_equal(kept[1], mask)


def test_weighted_f_measure_is_between_0_and_1_and_falls_with_false_alarms():
    rng = np.random.default_rng(0)
    for seed, mask in enumerate(shapes(20, size=32).masks.numpy()):
        score = rng.random(mask.shape)
        assert 0 <= weighted_f_measure(score, mask) < 1 and weighted_f_measure(mask, mask) == 1
        far = np.zeros_like(mask)
        far.flat[rng.permutation(np.flatnonzero(~mask))[:5 + seed]] = True
        assert weighted_f_measure(mask | far, mask) < 1
        assert weighted_f_measure(np.where(far, 1, score), mask) <= weighted_f_measure(score, mask)
        low, high = (weighted_f_measure(mask & ~far | far, mask, beta) for beta in (.3, 3))
        assert low < high                                                   # recall is perfect, and counts more
        error, weight = weighted_error(score, mask)
        assert (error <= np.abs(mask - score) + 1e-15).all() and weight.min() == 1 and weight.max() < 2


CHECKS = [getattr(overlap, n) for n in overlap.__all__ if n.startswith('check_')]


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_checks_accept_their_solution_and_name_the_mistake(check):
    assert check.judge(check.solution)
    for answer, words in check.wrong:
        verdict = check.judge(answer)
        assert verdict.passed is False and words in verdict.message, verdict
