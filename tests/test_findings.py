"What the cells of `samples` and `findings` do not say: random rounds, every kind of loader, odd inputs."
import math
import multiprocessing
import random

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom
from sklearn.linear_model import Ridge
from torch.utils.data import DataLoader, TensorDataset

from cnnbook import findings, samples
from cnnbook.data import Loader
from cnnbook.findings import Finding, input_values, label_counts, labels_and_inputs, validation_data
from cnnbook.samples import (
    expected_classes,
    label_test,
    pick_samples,
    random_features,
    ridge_scores,
    same_samples,
    score_labels,
    shared_samples,
    take_batches,
    two_passes,
)
from cnnbook.world import shapes


def gen(seed): return torch.Generator().manual_seed(seed)


WORLD = shapes(300, size=16, seed=0)
X, Y = WORLD.x.float()/255, WORLD.y
MAKE = {'loader': lambda: Loader(WORLD, 32, shuffle=True), 'list': lambda: list(zip(X.split(32), Y.split(32))),
        'dataloader': lambda: DataLoader(TensorDataset(X, Y), 32, shuffle=True),
        'own generator': lambda: DataLoader(TensorDataset(X, Y), 32, shuffle=True, generator=gen(3)),
        'pair': lambda: (X, Y)}


@pytest.mark.parametrize('kind', MAKE)
@pytest.mark.parametrize('n', [1, 32, 33, 300, 5000])
def test_taking_batches_changes_nothing_that_comes_after(kind, n):
    def run(look):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        data = MAKE[kind]()
        if look: taken = take_batches(data, n), two_passes(data, n, n), take_batches(data, n)
        after = [data] if kind == 'pair' else [*data, *data]
        numbers = torch.rand(3).tolist(), np.random.rand(), random.random()
        return after, numbers, taken if look else None
    plain, looked = run(False), run(True)
    assert same_samples(plain[0], looked[0]) and plain[1] == looked[1]
    first, passes, again = looked[2]
    assert same_samples(first, again) and same_samples(first, passes[0])
    assert sum(len(x) for x, _ in first) == (min(n, 300) if kind == 'pair' else min(-(-n//32)*32, 300))
    if kind != 'pair': assert same_samples(first, plain[0])


def test_worker_processes_end_with_the_look():
    data = DataLoader(TensorDataset(X, Y), 32, num_workers=1)
    assert same_samples(take_batches(data, 64), list(zip(X[:64].split(32), Y[:64].split(32))))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize('data, kind, words', [
    ([X], TypeError, 'got a Tensor in batch 0'),
    ([(X, 3)], TypeError, 'got a tuple of Tensor, int'),
    ([(X, Y, Y)], TypeError, 'tuple of Tensor, Tensor, Tensor'), ([()], TypeError, 'got a tuple in batch 0'),
    (X, TypeError, 'expected batches'), (3, TypeError, 'expected batches'),
    ((X, Y[:-1]), ValueError, 'as many labels as inputs'), ((X[:0], Y[:0]), ValueError, 'at least one'),
    ([(X, Y), (X, Y.sum())], ValueError, 'in batch 1'),
    ([(X, Y), (X[:, :1], Y)], ValueError, 'of one shape (3, 16, 16)')])
def test_what_is_no_batch_gets_one_clear_error(data, kind, words):
    was = torch.get_rng_state()
    with pytest.raises(kind) as e: take_batches(data, 999)
    assert words in str(e.value) and torch.equal(was, torch.get_rng_state())


def test_picked_samples_are_in_order_and_seeded():
    for seed in range(20):
        n, k = (int(v) for v in torch.randint(1, 200, (2,), generator=gen(seed)))
        x, y = pick_samples(torch.arange(n), torch.arange(n), k, seed)
        assert len(x) == min(n, k) and torch.equal(x, y) and (x.diff() > 0).all()


def test_expected_classes_against_drawing_without_replacement():
    for seed in range(20):
        counts = torch.randint(20, 400, (int(torch.randint(2, 12, (), generator=gen(seed))),), generator=gen(seed))
        n, size = int(counts.sum()), int(torch.randint(1, 17, (), generator=gen(seed + 99)))
        exact = sum(1 - hypergeom(n, int(k), size).pmf(0) for k in counts)
        assert expected_classes(counts, size) <= exact + 1e-9 and exact - expected_classes(counts, size) < .15


def test_ridge_in_its_dual_form_equals_the_peer():
    for seed in range(10):
        n, d, k = (int(v) for v in torch.randint(2, 40, (3,), generator=gen(seed)))
        f, t, new = (torch.randn(*s, generator=gen(seed), dtype=torch.float64) for s in ((n, d), (n, k), (7, d)))
        peer = Ridge(alpha=.5 + seed, fit_intercept=False).fit(f.numpy(), (t - t.mean(0)).numpy())
        wanted = torch.from_numpy(peer.predict(new.numpy()).reshape(7, k)) + t.mean(0)
        torch.testing.assert_close(ridge_scores(f, t, new, .5 + seed), wanted)


@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 1, 1), (3, 40, 33), (2, 5, 300), (7,), (4, 9)])
def test_features_of_any_shape_are_finite_and_draw_nothing(shape):
    was = torch.get_rng_state()
    x = torch.rand(12, *shape, generator=gen(0))
    f = random_features(x, seed=1, size=10)
    assert f.isfinite().all() and len(f) == 12 and torch.equal(f, random_features(x, 1, 10))
    assert random_features(x*0).abs().max() == 0 and torch.equal(was, torch.get_rng_state())


def test_shuffled_labels_hardly_ever_pass_and_labels_that_go_always_do():
    x = torch.randn(300, 10, generator=gen(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
    f = random_features(x)
    zs = [score_labels(f, y[torch.randperm(300, generator=gen(k))], k).z for k in range(40)]
    assert sum(z >= 2 for z in zs) <= 2 and max(zs) < 3.5
    assert min(score_labels(f, y, k).z for k in range(10)) > 5


def test_fault_labels_that_were_put_in_order_apart():
    many = shapes(600, size=16, seed=0)
    assert labels_and_inputs(many.x[:, :1, ::2, ::2].float()/255, many.y.sort()[0])[0].status in ('fail', 'warn')
    line = torch.linspace(-1, 1, 500)[:, None]
    assert labels_and_inputs(line, (line[:, 0] > 0).long())[0].status == 'pass'
    many = torch.arange(500) % 60                           # five a class: not asked
    few, = labels_and_inputs(line, many)
    assert few.status == 'skip' and '600 are needed' in few.saw
    assert labels_and_inputs(line[:499], many[:499] % 2)[0].status == 'skip'
    blank = labels_and_inputs(0*line.repeat(1, 4), torch.arange(500) % 10)[0]
    assert blank.status == 'fail'                           # blank images tell nothing
    assert labels_and_inputs(line.long(), many) == [] == labels_and_inputs(line, many.int())
    assert label_test(torch.rand(2500, 4, generator=gen(0)), torch.arange(2500) % 2).z < 3     # 2000 of them are used


def test_fault_25_the_units_of_the_inputs_over_random_rounds():
    for seed in range(30):
        c = 1 + seed % 4
        x = torch.rand(50, c, 9, 9, generator=gen(seed))
        mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        cause = lambda v, e=None: input_values(v, e)[0].cause
        told = mean.flatten().tolist(), std.flatten().tolist()
        assert cause(x) == cause((x - mean)/std) == cause((x - mean)/std, told) == cause(x.double()) == ''
        assert cause(255*x) == cause((255*x).byte()) == cause(255*x, told) == 'range 0..255'
        assert cause(x - 125) == cause(255*x - .5) == cause((x/255 - mean)/std) == 'wrong normalisation'
        assert cause(x, told) == cause(((x - mean)/std - mean)/std, told) == 'not the expected normalisation'
        x[seed, 0, 0, 0] = (math.nan, math.inf)[seed % 2]
        assert cause(x) == 'NaN in the data'


def test_unusual_inputs_get_an_answer_and_no_error():
    for v in (torch.zeros(4, 3, 8, 8), torch.ones(1, 1), torch.rand(5), torch.rand(2, 3, 4, 5, 6), -torch.rand(9, 2),
              torch.zeros(3, 2, dtype=torch.complex64), torch.zeros(3, 2, dtype=torch.int8), torch.tensor([[True]])):
        found, = input_values(v)
        assert isinstance(found, Finding) and str(found)
    with pytest.raises(ValueError, match='for each channel'): input_values(torch.rand(5), ((.5,), (.2,)))
    with pytest.raises(ValueError, match='std above 0'): input_values(torch.rand(5, 1, 4, 4), ((.5,), (0.,)))


def test_no_false_alarm_over_shuffled_label_batches():
    for seed in range(60):
        k, size = (int(torch.randint(2, most, (), generator=gen(seed + most))) for most in (30, 65))
        y = torch.randint(0, k, (800,), generator=gen(seed + 2))
        assert label_counts(list(y.split(size)))[0].status == 'pass', (seed, k, size)
        if size >= 4: assert label_counts(list(y.sort()[0].split(size)))[0].cause == 'not shuffled'
    for y in ([-100, 2], [4]): assert label_counts([torch.tensor(y)])[0].status == 'pass'


@pytest.mark.parametrize('k', [2, 3, 5, 20])
def test_fault_20_unbalanced_classes(k):
    y = torch.cat([torch.zeros(2000), torch.arange(1, k).repeat(5)]).long()
    y = y[torch.randperm(len(y), generator=gen(0))]
    assert label_counts(list(y.split(50)))[0].cause == 'unbalanced classes'


def test_validation_data_in_every_form():
    batches = take_batches((X[:200], Y[:200]))
    for valid in ((X[200:], Y[200:]), [(X[200:], Y[200:])], DataLoader(TensorDataset(X[200:], Y[200:]), 16)):
        assert validation_data(batches, valid)[0].status == 'pass'
    assert validation_data(batches, (X[199:], Y[199:]))[0].saw == '1 samples are in training and validation'
    assert validation_data(batches, (X[200:] + 1, Y[200:]))[0].cause == 'validation normalised otherwise'
    assert validation_data(batches, DataLoader(TensorDataset(X[200:], Y[200:]), 16, shuffle=True))[0].status == 'fail'
    assert shared_samples(batches, [(X[:1].repeat(5, 1, 1, 1), Y[:5])]) == 1       # the same one five times
    with pytest.raises(TypeError, match='expected batches'): validation_data(batches, 3)


CHECKS = [getattr(m, k) for m in (samples, findings) for k in dir(m) if k.startswith('check_')]


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_checks_refuse_nonsense(check):
    for answer in (7, 'x', [], lambda *a: 'x', lambda *a: -1., lambda *a: 1/0): assert not check.judge(answer)
