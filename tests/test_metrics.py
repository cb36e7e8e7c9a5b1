"""What the cells of chapters 04b, 04d, 04e and 05 do not say: random rounds against scikit-learn and brute force,
faults 57 to 59, huge counts, other types of input."""
import copy
import gc
import math
import pickle
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from cnnbook import calibration, confusion, metrics, rates
from cnnbook.calibration import Reliability
from cnnbook.metrics import Confusion, Metrics, confusion_matrix, report, top_k_accuracy

AVERAGES = [None, 'macro', 'micro', 'weighted']
CHECKS = [c for m in (confusion, rates, calibration, metrics) for n, c in vars(m).items() if n.startswith('check_')
          and hasattr(c, 'wrong')]


def quiet(f, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **options)


def labels(seed, most=200):
    "A random case: K classes of which some may be missing from either side, and weights with zeros."
    rng = np.random.default_rng(seed)
    k, n = int(rng.integers(2, 12)), int(rng.integers(1, most))
    there, called = (rng.choice(k, int(rng.integers(1, k + 1)), replace=False) for _ in range(2))
    weight = rng.random(n)*rng.integers(0, 2, n) if seed % 2 else None
    return k, rng.choice(called, n), rng.choice(there, n), weight


def brute(pred, target, k, weight=None):
    "TP, FP, FN, TN of each class by counting, in float64."
    w = np.ones(len(pred)) if weight is None else weight
    return [[sum(w[i] for i in range(len(pred)) if (pred[i] == c) == p and (target[i] == c) == t)
             for p, t in ((1, 1), (1, 0), (0, 1), (0, 0))] for c in range(k)]


@pytest.mark.parametrize('part', range(4))
def test_two_hundred_cases_equal_scikit_learn(part):
    "scikit-learn with zero_division=nan agrees on what is undefined, but for means in which nothing has a weight."
    for seed in range(50*part, 50*part + 50):
        k, p, t, w = labels(seed)
        if w is not None and not w.any(): continue                     # scikit-learn refuses
        c, names = Confusion(confusion_matrix(p, t, k, w)), list(range(k))
        assert np.allclose(c.matrix, sk.confusion_matrix(t, p, labels=names, sample_weight=w), rtol=0, atol=1e-9)
        if w is None: assert c.matrix.dtype == torch.int64
        assert abs(metrics.accuracy(p, t, k, w) - sk.accuracy_score(t, p, sample_weight=w)) < 1e-7
        for average in AVERAGES:
            for beta in (.5, 2):
                want = quiet(sk.precision_recall_fscore_support, t, p, beta=beta, labels=names, average=average,
                             sample_weight=w, zero_division=np.nan)[:3]
                got = quiet(c.precision, average), quiet(c.recall, average), quiet(c.f_beta, beta, average)
                for ours, theirs in zip(got, want):
                    if average == 'weighted' and math.isnan(ours):
                        assert not (c.tp + c.fn)[~quiet(c.precision).isnan()].any()
                        continue
                    assert np.allclose(ours, theirs, rtol=0, atol=1e-7, equal_nan=True), (seed, average, ours, theirs)


def test_brute_force_where_scikit_learn_has_nothing():
    "Specificity, both kinds of error and IoU, in every mean, undefined classes included."
    ratio = lambda a, b: a/b if b > 1e-12 else math.nan
    for seed in range(60):
        k, p, t, w = labels(seed, 40)
        counts = brute(p, t, k, w)
        c = Confusion(confusion_matrix(p, t, k, w))
        each = {'specificity': [(tn, tn + fp) for tp, fp, fn, tn in counts],
                'type_1': [(fp, fp + tn) for tp, fp, fn, tn in counts],
                'type_2': [(fn, fn + tp) for tp, fp, fn, tn in counts]}
        for name, pairs in each.items():
            values = [ratio(*pair) for pair in pairs]
            assert np.allclose(quiet(getattr(c, name)), values, rtol=0, atol=1e-7, equal_nan=True), (seed, name)
            known = [v for v in values if v == v]
            macro = sum(known)/len(known) if known else math.nan
            micro = ratio(sum(a for a, _ in pairs), sum(b for _, b in pairs))
            assert np.allclose([quiet(getattr(c, name), a) for a in ('macro', 'micro')], [macro, micro],
                               rtol=0, atol=1e-7, equal_nan=True)


def test_order_does_not_matter():
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(500, 7)).round(1), rng.integers(0, 7, 500)
    turn = rng.permutation(500)
    a, b = Metrics(7, top_k=2), Metrics(7, top_k=2)
    a.update(s, t)
    b.update(s[turn], t[turn])
    assert a.compute() == b.compute()
    for average in AVERAGES:
        assert np.array_equal(metrics.f1(s, t, 7, average), metrics.f1(s[turn], t[turn], 7, average))


def brute_ranks(s, t):
    return [sum(v > row[y] or v == row[y] and c < y for c, v in enumerate(row)) for row, y in zip(s, t)]


def test_ranks_and_top_k_equal_brute_force_with_ties():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        k = int(rng.integers(1, 9))
        s, t = rng.integers(0, 4, (30, k)).astype(float), rng.integers(0, k, 30)
        want = brute_ranks(s.tolist(), t.tolist())
        assert calibration.ranks(s, t).tolist() == want
        assert top_k_accuracy(s, t, 1) == metrics.accuracy(s, t)
        for n in range(1, k): assert abs(top_k_accuracy(s, t, n) - np.mean([r < n for r in want])) < 1e-12
        if k > 2:   # scikit-learn lets the last of equal scores win: turn the classes round
            turned = sk.top_k_accuracy_score(k - 1 - t, s[:, ::-1], k=2, labels=range(k))
            assert abs(top_k_accuracy(s, t, 2) - turned) < 1e-12


def brute_calibration(probs, t, bins):
    "Sort float64 rows into bins one by one; exactly 1 has a bin of its own."
    sums = np.zeros((bins + 1, 2))
    for row, y in zip(probs, t): sums[int(max(row)*bins)] += (np.argmax(row) == y, max(row))
    return np.abs(sums[:, 0] - sums[:, 1]).sum()/len(t)


def test_calibration_equals_brute_force():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        logits, t = rng.normal(size=(200, 5))*rng.choice([.5, 3, 30]), rng.integers(0, 5, 200)
        probs = torch.tensor(logits).softmax(1)
        for bins in (1, 7, 15):
            want = brute_calibration(probs.numpy(), t, bins)
            assert abs(metrics.calibration_error(logits, t, bins) - want) < 1e-7
            assert abs(metrics.calibration_error(probs, t, bins) - want) < 1e-7


def test_peers_agree():
    "torchmetrics, where it is installed: the calibration error, also where confidences are exactly 1."
    peer = pytest.importorskip('torchmetrics').classification
    for scale in (1, 5, 40):
        g = torch.Generator().manual_seed(scale)
        logits, t = torch.randn(2000, 10, generator=g)*scale, torch.randint(0, 10, (2000,), generator=g)
        for x in (logits, logits.softmax(1)):
            want = peer.MulticlassCalibrationError(10, n_bins=15)(x, t).item()
            assert abs(metrics.calibration_error(x, t, 15) - want) < 1e-5
        third = peer.MulticlassAccuracy(10, top_k=3, average='micro')(logits, t).item()
        assert abs(top_k_accuracy(logits, t, 3) - third) < 1e-6
        assert torch.equal(confusion_matrix(logits, t, 10), peer.MulticlassConfusionMatrix(10)(logits, t))


@pytest.mark.parametrize('target', [[0, 0, 0], [1, 1, 1], []])
def test_fault_57_one_class_or_none(target):
    "Never 0 or 1 for what is undefined, and always a warning."
    pred = list(target)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        found = [f(pred, target, 2) for f in (metrics.precision, metrics.recall, metrics.specificity)]
        n_said = len(said)
        m = Metrics(2)
        empty = m.compute()
        m.update(pred, target)
        after = m.compute()
    assert n_said == 3 and all(v.isnan().any() for v in found)
    assert all(math.isnan(v) for k, v in empty.items() if k != 'samples')
    assert (found[0].nan_to_num() + found[1].nan_to_num()).sum() == (2 if target else 0)
    assert math.isnan(after['accuracy']) == (not target)


BAD = [(lambda s: (s*math.nan, [0, 1, 2, 0]), ValueError, 'pred: expected finite scores, got nan at row 0'),
       (lambda s: (s.half().clone().fill_(math.inf), [0, 1, 2, 0]), ValueError, 'got inf at row 0'),
       (lambda s: (s, [0, 1, 2, 3]), ValueError, 'target: expected labels 0..2, got 3 at index 3'),
       (lambda s: (s, [0, 1, 2, -100]), ValueError, 'target: expected labels 0..2, got -100 at index 3'),
       (lambda s: (s, [0, 1, 2]), ValueError, 'pred: expected shape (3,), got (4,)'),
       (lambda s: (s[:, :2], [0, 1, 1, 0]), ValueError, 'pred: expected 3 scores a row, got 2'),
       (lambda s: (s, torch.tensor([0., 1, 2, 0])), TypeError, 'target: expected whole numbers, got torch.float32'),
       (lambda s: (s[:, 0], [0, 1, 2, 0]), TypeError, 'pred: expected whole numbers, got torch.float32'),
       (lambda s: (s.long(), [0, 1, 2, 0]), TypeError, 'pred: expected scores as floats, got torch.int64'),
       (lambda s: ([0, 1, 2, 0], [0, 1, 2, 0]), ValueError, 'pred: expected scores as before, got labels'),
       (lambda s: (s*3, [0, 1, 2, 0]), ValueError, 'expected probabilities that add up to 1, got a sum of 3 at row 0')]


@pytest.mark.parametrize('case', range(len(BAD)))
def test_fault_58_a_refused_batch_changes_nothing(case):
    make, kind, words = BAD[case]
    m, s = Metrics(3, top_k=1, logits=False), torch.eye(3)[[0, 1, 2, 2]]
    m.update(s, [0, 1, 2, 0])
    was, found = pickle.dumps(vars(m)), m.compute()
    with pytest.raises(kind) as e: m.update(*make(s))
    assert words in str(e.value)
    assert pickle.dumps(vars(m)) == was and m.compute() == found


def test_fault_59_counts_past_float32():
    "Doubling by merging: 33 times gives 2**33 of each, and one more is still seen."
    m = Metrics(2, top_k=1)
    m.update(torch.tensor([[.75, .25], [.75, .25]]), [0, 1])
    for _ in range(33): m.merge(copy.deepcopy(m))
    m.update(torch.tensor([[.75, .25]]), [0])
    assert m.matrix.tolist() == [[2**33 + 1, 0], [2**33, 0]] and m.ranks.tolist() == [2**33 + 1, 2**33]
    n = 2**34 + 1
    assert quiet(m.compute)['accuracy'] == (2**33 + 1)/n and m.confusion.recall()[0] == 1
    assert quiet(m.compute)['calibration_error'] == (.75*n - 2**33 - 1)/n
    big = Confusion(torch.tensor([[2**40 + 1, 1], [3, 2**40]]))
    assert big.fn.tolist() == [1, 3] and big.tn.tolist() == [2**40, 2**40 + 1]


def test_fault_59_one_pass_past_float32():
    "More samples of one class than float32 can count, in one call."
    t = np.zeros(2**24 + 3, np.uint8)
    t[-1] = 1
    assert confusion_matrix(t, t, 2).tolist() == [[2**24 + 2, 0], [0, 1]]


@pytest.mark.parametrize('kind', ['float16', 'bfloat16', 'float32', 'float64'])
def test_fault_59_any_float_and_huge_logits(kind):
    g = torch.Generator().manual_seed(0)
    s = torch.randint(-9, 9, (300, 4), generator=g).to(getattr(torch, kind))
    t = torch.randint(0, 4, (300,), generator=g)
    m, whole = Metrics(4, top_k=2), Metrics(4, top_k=2)
    for i in range(0, 300, 7): m.update(s[i:i + 7], t[i:i + 7])
    whole.update(s.double(), t)
    assert m.ranks.tolist() == np.bincount(brute_ranks(s.tolist(), t.tolist()), minlength=4).tolist()
    a, b = m.compute(), whole.compute()
    assert abs(a.pop('calibration_error') - b.pop('calibration_error')) < 1e-6 and a == b
    if kind != 'float16':
        huge = Metrics(4)
        huge.update(s*1e30, t)
        assert huge.compute()['accuracy'] == a['accuracy'] and huge.compute()['calibration_error'] <= 1


def test_fault_59_memory_layouts_types_and_read_only():
    t, p = np.arange(24) % 3, (np.arange(24)//2) % 3
    want = sk.confusion_matrix(t, p)
    for kind in ('i1', 'u1', 'i2', '>i4', 'u8', '>i8'):
        a, b = p.astype(kind), t.astype(kind)
        a.flags.writeable = False
        assert np.array_equal(confusion_matrix(a, b, 3), want)
        assert np.array_equal(confusion_matrix(a[::-1], b[::-1], 3), want)
        assert np.array_equal(confusion_matrix(a.reshape(4, 6).T, b.reshape(4, 6).T, 3), want)
    assert np.array_equal(confusion_matrix(p.tolist(), torch.tensor(t), 3), want)
    assert confusion_matrix(torch.tensor([True, False]), [True, True]).tolist() == [[0, 0], [1, 1]]
    s = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).T
    assert not s.is_contiguous() and top_k_accuracy(s, t, 2) == top_k_accuracy(s.contiguous(), t, 2)


def test_fault_59_no_graph_is_kept_and_inputs_stay_as_they_are():
    x = torch.randn(8, 3, requires_grad=True)
    s = x*2
    was, m, t = s.detach().clone(), Metrics(3), torch.arange(8) % 3
    m.update(s, t)
    r = Reliability.of(s, t)
    assert torch.equal(s, was) and torch.equal(t, torch.arange(8) % 3)
    node = weakref.ref(s)
    del s
    gc.collect()
    assert node() is None and not r.confidence.requires_grad
    assert report({'m': m})['m'] == m.compute()


def test_merge_leaves_the_other_as_it_is_and_copies_are_independent():
    a, b = Metrics(3), Metrics(3)
    for m in (a, b): m.update([0, 1, 2], [0, 1, 1])
    other = copy.copy(b)
    was = pickle.dumps(vars(b))
    a.merge(b).update([0], [0])
    assert pickle.dumps(vars(b)) == was == pickle.dumps(vars(other)) and a.matrix.sum() == 7
    a.reset()
    assert a.matrix.sum() == 0 and b.matrix.sum() == 3


def test_names_import_from_metrics():
    names = '''confusion_matrix accuracy top_k_accuracy precision recall specificity f1 f_beta dice iou mean_iou
               weighted_f_measure calibration_error report Metrics'''.split()
    assert all(callable(getattr(metrics, n)) for n in names) and 'matplotlib.pyplot' not in vars(metrics)


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_checks_survive_nonsense(check):
    for answer in ('nonsense', -1, float('nan'), [], (1, 2), lambda *a: None, lambda *a: 'x'):
        assert check.judge(answer).passed is False


if __name__ == '__main__': sys.exit(pytest.main([__file__]))
