"""What the chapters' cells do not say of `cnnbook.ranking` and `cnnbook.curves`: random rounds against scikit-learn and
against brute force, a million scores, odd inputs."""
import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from cnnbook import curves, ranking
from cnnbook.curves import auroc, average_precision, pr_curve, roc_curve
from cnnbook.ranking import count_alarms

ALL = [auroc, average_precision, roc_curve, pr_curve]


def brute_auroc(s, t, w=None):
    "Pairs counted one by one in float64."
    s, w = np.asarray(s, np.float64), np.ones(len(s)) if w is None else np.asarray(w)
    a, b, wa, wb = s[t == 1][:, None], s[t == 0], w[t == 1][:, None], w[t == 0]
    return (((a > b) + .5*(a == b))*wa*wb).sum()/(wa.sum()*wb.sum())


def brute_ap(s, t):
    total, before = 0, 0
    for at in np.unique(s)[::-1]:
        hits = t[s >= at]
        total, before = total + (hits.sum() - before)*hits.mean(), hits.sum()
    return total/t.sum()


def a_case(seed):
    "Scores with many, few or no ties, of two kinds and three sizes; weights in every third round."
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 400))
    t = (rng.random(n) < rng.choice([.5, .1])).astype(rng.choice([np.int64, np.uint8, bool]))
    t[:2] = 0, 1
    s = (rng.normal(size=n) + t)*rng.choice([1, 100, 1e-3])
    s = s.round(int(rng.integers(0, 5))).astype(rng.choice([np.float32, np.float64]))
    return s, t, rng.integers(0, 4, n) + (t*1 + .5) if seed % 3 == 0 else None


@pytest.mark.parametrize('part', range(4))
def test_200_random_cases_equal_scikit_learn(part):
    for seed in range(50*part, 50*part + 50):
        s, t, w = a_case(seed)
        assert abs(auroc(s, t, sample_weight=w) - sk.roc_auc_score(t, s, sample_weight=w)) < 1e-7
        assert abs(average_precision(s, t, sample_weight=w) - sk.average_precision_score(t, s, sample_weight=w)) < 1e-7
        ours, theirs = roc_curve(s, t, w), sk.roc_curve(t, s, sample_weight=w, drop_intermediate=False)
        for a, b in zip((ours.fpr, ours.tpr, ours.thresholds), theirs): assert np.allclose(a, b, rtol=0, atol=1e-7)
        ours, theirs = pr_curve(s, t, w), sk.precision_recall_curve(t, s, sample_weight=w)
        for a, b in zip((ours.precision, ours.recall, ours.thresholds), theirs):
            assert np.allclose(a.flip(0), b[:len(a)], rtol=0, atol=1e-7)
        assert abs(ours.area - average_precision(s, t, sample_weight=w)) < 1e-9
        assert abs(auroc(s, t, sample_weight=w) - brute_auroc(s, t == 1, w)) < 1e-9


def test_random_cases_of_many_classes_equal_scikit_learn_and_classes_may_be_missing():
    for seed in range(16):
        rng = np.random.default_rng(seed)
        n, k = int(rng.integers(20, 200)), int(rng.integers(3, 6))
        p = rng.dirichlet(np.ones(k), n).round(2) + 1e-3
        p /= p.sum(1, keepdims=True)
        t = rng.integers(0, k, n)
        t[:k] = range(k)
        w = rng.random(n) + .1 if seed % 2 else None
        for average in ('macro', 'weighted', 'micro', None):
            want = sk.roc_auc_score(t, p, multi_class='ovr', average=average, sample_weight=w)
            assert np.allclose(auroc(p, t, average, w), want, rtol=0, atol=1e-7)
            want = sk.average_precision_score(np.eye(k)[t], p, average=average, sample_weight=w)
            assert np.allclose(average_precision(p, t, average, w), want, rtol=0, atol=1e-7)
        p, t, w = (None if a is None else a[t != 1] for a in (p, t, w))      # scikit-learn refuses: brute force
        each = [brute_auroc(p[:, j], t == j, w) for j in range(k) if j != 1]
        with pytest.warns(UserWarning, match='auroc: NaN for class 1,'): got = auroc(p, t, sample_weight=w)
        assert abs(got - np.mean(each)) < 1e-9


def test_a_million_scores_equal_scikit_learn():
    rng = np.random.default_rng(0)
    t = (rng.random(1_000_000) < .3).astype(np.int64)
    s = (rng.normal(size=1_000_000) + t).round(5).astype(np.float32)
    assert s.min() < 0
    assert abs(auroc(s, t) - sk.roc_auc_score(t, s)) < 1e-7
    assert abs(average_precision(s, t) - sk.average_precision_score(t, s)) < 1e-7
    ours, (fpr, tpr, at) = roc_curve(s, t), sk.roc_curve(t, s, drop_intermediate=False)
    for a, b in ((ours.fpr, fpr), (ours.tpr, tpr), (ours.thresholds, at)): assert np.allclose(a, b, rtol=0, atol=1e-7)


def test_the_order_of_the_samples_does_not_matter():
    for seed in range(20):
        s, t, w = a_case(seed)
        mix = np.random.default_rng(seed).permutation(len(s))
        for f in (auroc, average_precision):
            a, b = (f(x, y, sample_weight=z) for x, y, z in ((s, t, w), (s[mix], t[mix], w if w is None else w[mix])))
            assert a == b if w is None else abs(a - b) < 1e-12
        for f in (roc_curve, pr_curve):
            a, b = f(s, t), f(s[mix], t[mix])
            assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in vars(a))


def test_fault_57_empty_and_one_class_are_nan_with_a_warning():
    for s, t in (([], []), ([.5], [1]), ([.5, .1], [0, 0]), ([-3., 2, 2], [1, 1, 1])):
        for f in ALL:
            with pytest.warns(UserWarning, match='NaN'): got = f(s, t)
            assert np.isnan(got if isinstance(got, float) else got.area)
    with pytest.warns(UserWarning, match='positives'): assert np.isnan(auroc([1., 2], [0, 1], sample_weight=[1, 0]))
    with pytest.warns(UserWarning, match='class 0, 1, 2'): assert auroc(np.zeros((0, 3)), [], None).isnan().all()
    with pytest.warns(UserWarning, match='class 0, 1, 2'): assert np.isnan(auroc(np.zeros((2, 3)), [1, 1], 'weighted'))
    for f in (roc_curve, pr_curve):
        with pytest.warns(UserWarning): assert len(f(np.zeros((2, 3)), [0, 1])) == 3


@pytest.mark.parametrize('f', ALL)
def test_fault_58_bad_inputs_are_named(f):
    s, t = np.array([.1, .2, .3, .4]), np.array([0, 1, 0, 1])
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=f'scores: expected finite numbers, got {bad} at index 3'):
            f(np.array([.1, .2, .3, bad]), t)
        with pytest.raises(ValueError, match='at index 2, 1'): f(torch.tensor([[0, 1.], [0, 1], [0, bad], [0, 1]]), t)
        with pytest.raises(ValueError, match='sample_weight: expected finite numbers of at least 0, got .* at index 3'):
            f(s, t, sample_weight=[1, 1, 1, bad])
    for wrong, kind, words in ((t[:3], ValueError, r'expected shape \(4,\)'), (t/1, TypeError, 'expected whole'),
                               (t - 1, ValueError, 'expected labels 0..1, got -1 at index 0'),
                               (t + 1, ValueError, 'expected labels 0..1, got 2 at index 1')):
        with pytest.raises(kind, match=f'target: {words}'): f(s, wrong)
    for wrong, kind in ((s[None, None], ValueError), (s[:, None], ValueError), (s + 1j, TypeError)):
        with pytest.raises(kind, match='scores: expected'): f(wrong, t)
    with pytest.raises(ValueError, match='sample_weight: expected shape'): f(s, t, sample_weight=s[:2])


def test_fault_59_ties_sizes_and_kinds_equal_brute_force_in_float64():
    rng = np.random.default_rng(0)
    t = rng.integers(0, 2, 500)
    logits = torch.tensor(rng.normal(size=500)*10)
    cases = {'all ties': np.full(500, -.3), 'two values': t*1., 'reversed': -t*1., 'both zeros': np.where(t, 0., -0.),
             'float16': logits.half(), 'bfloat16': logits.bfloat16(), '1e30': (1e30*logits).float(), 'whole': t - 7,
             'wide float32': torch.exp(logits*5).float().clamp(1e-45, 3e38), 'wide float64': torch.exp(logits*20),
             'subnormal': np.float32(1e-45)*rng.integers(-3, 4, 500).astype(np.float32), 'bytes': t.astype(np.uint8),
             'other end': rng.normal(size=500).astype('>f4'), 'strided': rng.normal(size=1500)[::-3], 'bool': t > 0,
             'graph': logits.clone().requires_grad_(), 'largest': np.array([3.4e38, -3.4e38]*250, np.float32)}
    for name, s in cases.items():
        plain = s.detach().double().numpy() if isinstance(s, torch.Tensor) else np.asarray(s).astype(np.float64)
        assert abs(auroc(s, t) - brute_auroc(plain, t)) < 1e-12, name
        assert abs(average_precision(s, t) - brute_ap(plain, t)) < 1e-12, name
        assert np.array_equal(roc_curve(s, t).thresholds[1:], np.unique(plain)[::-1]), name
    assert auroc(cases['all ties'], t) == .5 and auroc(cases['reversed'], t) == 0 and auroc(t, t) == 1
    assert not roc_curve(cases['graph'], t).tpr.requires_grad
    twice = np.tile(logits.numpy(), 2), np.tile(t, 2)                        # duplicates change nothing
    assert abs(auroc(*twice) - auroc(logits, t)) < 1e-12
    kept = logits.clone()
    for f in ALL: f(logits, torch.tensor(t))
    assert torch.equal(kept, logits)
    frozen = logits.numpy().copy()
    frozen.flags.writeable = False
    assert auroc(frozen, t) == auroc(logits, t)


def test_fault_59_counts_beyond_float32():
    n = 2**24 + 4                                                            # 2**24 + 1 is no float32
    s = np.zeros(n, np.float32)
    s[:2] = 1
    a = count_alarms(s, np.arange(n) >= 1)
    assert a.tp.tolist() == [1, n - 1] and a.fp.tolist() == [1, 1]
    assert auroc(s, np.arange(n) >= 1) == (1 + 0)/2/(n - 1)


def test_keys_keep_the_order_of_random_bits():
    rng = np.random.default_rng(0)
    for kind, bits in ((np.float32, np.uint32), (np.float64, np.uint64)):
        s = rng.integers(0, np.iinfo(bits).max, 20_000, dtype=bits, endpoint=True).view(kind)
        s = s[np.isfinite(s) & (np.abs(s) < 1e18) & (np.abs(s) > 1e-18)]
        keys, offset = ranking.sort_keys(s, rng.random(len(s)) < .5)
        assert np.array_equal(ranking.read_keys(keys, offset), s)
        assert np.array_equal(ranking.read_keys(np.sort(keys), offset), np.sort(s)[::-1])


def test_curves_can_be_copied_and_kept():
    c = roc_curve([.1, .2, .3], [0, 1, 1])
    for twin in (copy.deepcopy(c), pickle.loads(pickle.dumps(c))): assert torch.equal(twin.tpr, c.tpr)
    with pytest.raises(AttributeError): c.tpr = None
    assert repr(c) == 'RocCurve of 4 points, area 1.0000'
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        auroc([1.], [1]), roc_curve([1.], [1])
    assert {w.filename for w in heard} == {__file__}                          # the warning points at the caller's line


CHECKS = [getattr(m, n) for m in (curves, ranking) for n in m.__all__ if n.startswith('check_')]


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_checks_accept_their_solution_and_name_the_mistake(check):
    assert check.judge(check.solution)
    for answer, words in check.wrong:
        verdict = check.judge(answer)
        assert verdict.passed is False and words in verdict.message, verdict
