"""What the chapter's cells do not say of `cnnbook.thresholds`: random rounds against brute force, scikit-learn and
scipy, odd inputs, and the faults that apply (56 to 58)."""
import math
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from cnnbook.thresholds import (
    at_threshold,
    bootstrap_interval,
    choose_threshold,
    no_false_negatives,
    plot_threshold,
    predictive_values,
    rule_of_three,
)

matplotlib.use('agg')


def a_case(seed):
    "Scores with many, few or no ties, both kinds present."
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 120))
    t = (rng.random(n) < rng.choice([.5, .1])).astype(rng.choice([np.int64, np.uint8, bool]))
    t[:2] = 0, 1
    s = (rng.normal(size=n) + t).round(int(rng.integers(0, 6))).astype(rng.choice([np.float32, np.float64]))
    return s, t


def test_300_random_cases_cost_no_more_than_any_other_threshold():
    for seed in range(300):
        s, t = a_case(seed)
        rng = np.random.default_rng(seed)
        fn, fp = rng.choice([0., 1., 3., 10.], 2) + [0, .5]
        share = None if seed % 2 else rng.random()
        got = choose_threshold(s, t, fn, fp, share, draws=0)
        pi, p = t.mean() if share is None else share, t == 1
        every = {float(a): pi*fn*(s[p] < a).mean() + (1 - pi)*fp*(s[~p] >= a).mean() for a in (*s, np.inf)}
        assert math.isclose(got.cost, min(every.values()), abs_tol=1e-12)
        equal = [a for a, cost in every.items() if math.isclose(cost, got.cost, abs_tol=1e-12)]
        assert got.threshold == min(equal)                                   # of equal costs the one that finds most
        assert math.isclose(every[got.threshold], got.cost, abs_tol=1e-12)


def test_counts_and_shares_equal_scikit_learn():
    for seed in range(60):
        s, t = a_case(seed)
        for at in (*np.random.default_rng(seed).choice(s, 3).tolist(), -math.inf, math.inf):
            c = at_threshold(s, t, at)
            assert np.array_equal(c.matrix, sk.confusion_matrix(t, s >= at, labels=[0, 1]))
            assert c.recall('binary') == (s[t == 1] >= at).mean()


def test_the_threshold_is_read_in_the_precision_of_the_scores():
    for kind in (torch.float16, torch.float32, torch.float64):
        s = torch.tensor([.1, .7, .7, .9], dtype=kind)
        t = torch.tensor([0, 1, 0, 1])
        assert at_threshold(s, t, s[1]).matrix.tolist() == [[1, 1], [0, 2]]
        at = no_false_negatives(s, t, draws=0)
        assert at.threshold == s[1].item() and at.sensitivity == 1 and at.judge(s, t, draws=0) == at
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert at_threshold(np.float32([1, 2]), [0, 1], 1e300).matrix[:, 1].sum() == 0


@pytest.mark.parametrize('shape', ['normal', 'heavy', 'uniform'])
def test_the_next_positive_is_missed_once_in_n_plus_1(shape):
    rng = np.random.default_rng(0)
    draw = {'normal': rng.standard_normal, 'heavy': rng.standard_cauchy, 'uniform': rng.random}[shape]
    for n in (3, 20):
        missed = [draw() < draw(n).min() for _ in range(20_000)]
        assert abs(np.mean(missed) - 1/(n + 1)) < 4*math.sqrt(1/(n + 1)/20_000)


def test_intervals_equal_the_binomial_and_cover():
    rng = np.random.default_rng(0)
    for _ in range(5):
        n, m = rng.integers(30, 80, 2)
        s, t = np.append(rng.normal(1, 1, n), rng.normal(0, 1, m)), np.repeat([1, 0], [n, m])
        got = no_false_negatives(s, t).judge(s, t).intervals['specificity']
        kept = (s[t == 0] < s[t == 1].min()).sum()
        wanted = stats.binom.ppf((.025, .975), m, kept/m)/m
        if 0 < kept < m: assert np.abs(wanted - got).max() <= 1.01/m
    inside = 0
    for seed in range(60):                                                   # 95 % hold the truth about as often
        s, t = np.append(rng.normal(1, 1, 60), rng.normal(0, 1, 60)), np.repeat([1, 0], 60)
        low, high = bootstrap_interval(lambda s, p: (s[p] >= 0).mean(), s, t, draws=200, seed=seed)
        inside += low <= stats.norm.cdf(1) <= high
    assert 50 <= inside <= 60


def test_rule_of_three_equals_clopper_and_pearson():
    for n in (1, 2, 10, 299, 10**6):
        for level in (.5, .95, .999):
            assert math.isclose(rule_of_three(n, level), stats.beta.ppf(level, 1, n), rel_tol=1e-9)


def test_predictive_values_equal_counts():
    rng = np.random.default_rng(0)
    for _ in range(100):
        tn, fp, fn, tp = rng.integers(1, 1000, 4)
        ppv, npv = predictive_values(tp/(tp + fn), tn/(tn + fp), (tp + fn)/(tn + fp + fn + tp))
        assert math.isclose(ppv, tp/(tp + fp)) and math.isclose(npv, tn/(tn + fn))


def test_inputs_are_left_alone_and_the_global_random_state_too():
    s, t = a_case(3)
    before, state, torch_state = (s.copy(), t.copy()), np.random.get_state()[1].copy(), torch.get_rng_state()
    choose_threshold(s, t, 3), no_false_negatives(s, t), plot_threshold(s, t, 0.)
    assert np.array_equal(s, before[0]) and np.array_equal(t, before[1])
    assert np.array_equal(np.random.get_state()[1], state) and torch.equal(torch.get_rng_state(), torch_state)
    assert choose_threshold(s, t, 3) == choose_threshold(s, t, 3)


def test_fault_56_figures_are_closed_and_labels_are_plain_text():
    plot_threshold([.1, .4, .5, .9], [0, 1, 0, 1], math.inf)
    fig = plot_threshold([1., 1.], [0, 1], 1., (r'$\frac$', '<script>'))      # all scores equal
    fig.canvas.draw()
    assert plt.get_fignums() == []
    html = at_threshold([.1, .9], [0, 1], .5, (r'$\frac$', '<script>'))._repr_html_()
    assert '<script>' not in html and '&lt;script&gt;' in html


@pytest.mark.parametrize('t', [[], [0, 0], [1, 1]])
def test_fault_57_one_kind_or_nothing_is_an_error_never_0_or_1(t):
    s = [.1, .2][:len(t)]
    for f in (choose_threshold, no_false_negatives, lambda s, t: plot_threshold(s, t, 0.),
              lambda s, t: bootstrap_interval(lambda s, p: 0., s, t)):
        with pytest.raises(ValueError, match='target: expected at least one'): f(s, t)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        c = at_threshold(s, t, .15)
        values = [c.recall('binary')]*(1 not in t) + [c.specificity('binary')]*(0 not in t)
    assert values and all(map(math.isnan, values)) and said


def test_fault_57_a_judge_of_one_kind_is_an_error():
    with pytest.raises(ValueError, match='at least one positive case'):
        no_false_negatives([.1, .9], [0, 1]).judge([.3, .4], [0, 0])


@pytest.mark.parametrize('f', [choose_threshold, no_false_negatives, lambda s, t: at_threshold(s, t, .5),
                               lambda s, t: plot_threshold(s, t, .5),
                               lambda s, t: bootstrap_interval(lambda s, p: 0., s, t)])
def test_fault_58_bad_scores_and_labels_are_named(f):
    for s, t, kind, words in (([.1, math.nan], [0, 1], ValueError, 'expected finite numbers, got nan at index 1'),
                              ([math.inf, .1], [0, 1], ValueError, 'got inf at index 0'),
                              ([.1, .2], [0, 2], ValueError, 'target: expected labels 0..1, got 2 at index 1'),
                              ([.1, .2], [0, -1], ValueError, 'target: expected labels 0..1, got -1 at index 1'),
                              ([.1, .2], [0., 1.], TypeError, 'target: expected whole numbers'),
                              ([.1, .2], [0, 1, 1], ValueError, 'target: expected shape'),
                              ([[.1, .9], [.2, .8]], [0, 1], ValueError, 'scores: expected shape')):
        with pytest.raises(kind, match=words.replace('(', r'\(')): f(s, t)


def test_fault_58_bad_thresholds_costs_and_shares_are_named():
    s, t = [.1, .9], [0, 1]
    for f, kind, words in ((lambda: at_threshold(s, t, math.nan), ValueError, 'threshold'),
                           (lambda: at_threshold(s, t, None), TypeError, 'threshold'),
                           (lambda: choose_threshold(s, t, math.nan), ValueError, 'costs'),
                           (lambda: choose_threshold(s, t, math.inf), ValueError, 'costs'),
                           (lambda: choose_threshold(s, t, 'dear'), TypeError, 'costs'),
                           (lambda: choose_threshold(s, t, prevalence=-.1), ValueError, 'prevalence'),
                           (lambda: predictive_values(.9, math.nan, .1), ValueError, 'specificity'),
                           (lambda: rule_of_three(10, 95), ValueError, 'level')):
        with pytest.raises(kind, match=f'{words}: expected'): f()
