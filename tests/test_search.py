"Spaces, results, searches that are killed, and halving, against peers and at random."
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cnnbook.events import Callback
from cnnbook.halving import halving_plan, plan_cost, successive_halving
from cnnbook.results import SearchResult, Trial, edges, narrow, parallel_coordinates
from cnnbook.search import TrialFile, search
from cnnbook.space import Choice, Integers, LogUniform, Uniform, grid, sample
from cnnbook.state import run_lock
from cnnbook.trainer import Trainer

pytestmark = pytest.mark.filterwarnings('ignore:search. .*outer 10%')     # few trials often end at an edge
SPACE = {'x': LogUniform(1e-4, 1.), 'n': Integers(1, 40, log=True), 'kind': Choice(['a', 'b', None, True])}


def bowl(params, report): return abs(math.log10(params['x']) + 2) + params['n']/1000


def plainly(result): return [(t.number, t.params, t.score, t.status, t.note) for t in result.trials]


def a_range(g):
    low = 10**g.uniform(-6, 3)
    high = low*10**g.uniform(.1, 6)
    whole = g.randint(1, 50), g.randint(51, 5000)
    return g.choice([Uniform(-low, high), LogUniform(low, high), Integers(*whole, log=g.random() < .5),
                     Choice(g.sample(range(99), g.randint(1, 9)))])


def test_ranges_at_random():
    g = random.Random(0)
    for _ in range(500):
        r = a_range(g)
        values = [r.at(p) for p in (0, 1, *(g.random() for _ in range(20)))]
        part = r.around(values[2:6], margin=g.uniform(.01, .3))
        assert part.around(values[2:6], .01) is not None and type(part) is type(r)
        if isinstance(r, Choice):
            assert set(values) <= set(r.options) and set(part.options) == set(values[2:6])
            continue
        assert all(r.low <= v <= r.high for v in values)
        np.testing.assert_allclose(values[:2], [r.low, r.high])
        assert r.low <= part.low < part.high <= r.high                      # never beyond the old range
        assert all(part.low <= v <= part.high for v in values[2:6])
        assert all(-1e-12 <= r.place(v) <= 1 + 1e-12 for v in values)
        if not isinstance(r, Integers):
            np.testing.assert_allclose([r.place(r.at(p)) for p in (.1, .5, .9)], [.1, .5, .9])


def test_log_uniform_is_scipys():
    loguniform = pytest.importorskip('scipy.stats').loguniform
    r = LogUniform(1e-5, 3.)
    for p in np.linspace(0, 1, 50):
        np.testing.assert_allclose([r.at(p), r.place(r.at(p))], [loguniform(1e-5, 3.).ppf(p), p], atol=1e-12)


def test_every_whole_number_is_drawn_as_often_as_it_should():
    for r in (Integers(1, 6), Integers(1, 6, log=True)):
        seen = np.bincount([sample({'k': r}, 0, i)['k'] for i in range(4000)], minlength=7)[1:]/4000
        edges_ = np.arange(1, 8)
        wanted = np.diff(np.log(edges_))/np.log(7) if r.log else np.full(6, 1/6)
        np.testing.assert_allclose(seen, wanted, atol=.02)


def test_numpy_numbers_become_plain():
    space = {'n': Integers(np.int64(1), np.int64(9)), 'u': Uniform(np.float32(0), np.float64(1)),
             'c': Choice([np.int64(3), np.float64(.5), True])}
    for k in range(20): json.dumps(sample(space, 0, k))
    assert all(type(r) in (int, float, bool) for r in space['c'].options)


def test_fault_43_a_trial_depends_on_its_seed_alone():
    def noisy(params, report): return torch.rand(()).item() + random.random() + np.random.rand()
    quiet = dict(space={'x': Uniform(0., 1.)}, trials=5, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        first = search(noisy, **quiet, seed=3)
        torch.rand(7), random.random(), np.random.rand(5)                       # other use of the generators
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        again, other = search(noisy, **quiet, seed=3), search(noisy, **quiet, seed=4)
    assert plainly(first) == plainly(again) != plainly(other)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_grid_and_order_of_names():
    turned = dict(reversed(SPACE.items()))
    assert [sample(SPACE, 5, k) for k in range(9)] == [sample(turned, 5, k) for k in range(9)]
    assert len(grid(SPACE, 2)) == 2*2*4 and grid(SPACE, 2) == grid(SPACE, 2)


SCRIPT = '''
import sys, time
from cnnbook.search import search
from test_search import SPACE, bowl
def slow(params, report):
    print('trial', flush=True)
    time.sleep(.05)
    return bowl(params, report)
search(slow, SPACE, 60, path=sys.argv[1], progress=False)
'''


def test_fault_22_a_search_that_is_killed_goes_on(tmp_path):
    path = tmp_path/'rows.jsonl'
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.Popen([sys.executable, '-c', SCRIPT, str(path)], stdout=subprocess.PIPE, text=True, env=env)
    for _ in range(8): assert run.stdout.readline() == 'trial\n'
    with pytest.raises(ValueError, match='expected one run at a time'): search(bowl, SPACE, 60, path=path)
    run.kill()
    run.communicate()
    kept = path.read_bytes()
    assert 7 <= kept.count(b'\n') - 1 <= 9                                       # all but the one that was running
    path.write_bytes(kept + b'{"number": 59, "par')                              # and torn, as a power cut would
    calls = []
    def counting(params, report): return calls.append(1) or bowl(params, report)
    result = search(counting, SPACE, 60, path=path, progress=False)
    assert len(calls) == 60 - (kept.count(b'\n') - 1) and path.read_bytes().startswith(kept)
    assert plainly(result) == plainly(search(bowl, SPACE, 60, progress=False))   # as if nothing had happened


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.filterwarnings('ignore:.*multi-threaded.*fork')
def test_fault_22_killed_again_and_again(tmp_path):
    path, g, before = tmp_path/'rows.jsonl', random.Random(1), 0
    for _ in range(12):
        child = os.fork()
        if child == 0:
            def briefly(params, report): return threading.Event().wait(.004) or bowl(params, report)
            try: search(briefly, SPACE, 400, path=path, progress=False)
            finally: os._exit(0)
        threading.Event().wait(g.uniform(.02, .12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        rows = path.read_bytes().count(b'\n') if path.exists() else 0
        assert rows >= before
        before = rows
    assert before > 2
    assert plainly(search(bowl, SPACE, 100, path=path, progress=False)) == plainly(search(bowl, SPACE, 100))


class Press(Callback):
    "Ctrl-C in the second step."
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1: signal.raise_signal(signal.SIGINT)


@pytest.fixture
def plain_ctrl_c():
    "Ctrl-C as in a terminal; where the tests run in the background it is ignored."
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, was)


@pytest.mark.usefixtures('plain_ctrl_c')
def test_ctrl_c_within_a_trainer_leaves_no_row(tmp_path, capsys):
    data = [(torch.ones(2, 3), torch.zeros(2, 1))]*4
    def train_one(params, report):
        model = nn.Linear(3, 1)
        trainer = Trainer(callbacks=Press() if len(seen) == 2 else (), enable_progress_bar=False)
        seen.append(params)
        trainer.fit(model, data, None, torch.optim.SGD(model.parameters(), params['x']/100), nn.MSELoss())
        return bowl(params, report)
    seen, path = [], tmp_path/'rows.jsonl'
    result = search(train_one, SPACE, 6, path=path, progress=False)
    said = capsys.readouterr().out
    assert 'stopped in epoch 0' in said and 'stopped in trial 2; 2 of 6 trials are kept' in said
    assert len(seen) == 3 and len(result.trials) == 2 and path.read_bytes().count(b'\n') == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(search(train_one, SPACE, 6, path=path, progress=False).trials) == 6


def test_sigterm_ends_the_process_and_keeps_the_rows(tmp_path):
    def train_one(params, report):
        if params == sample(SPACE, 0, 3): signal.raise_signal(signal.SIGTERM)
        return bowl(params, report)
    with pytest.raises(SystemExit) as stopped: search(train_one, SPACE, 6, path=tmp_path/'r', progress=False)
    assert stopped.value.code == 143 and (tmp_path/'r').read_bytes().count(b'\n') == 4


def test_a_search_in_a_thread(tmp_path):
    found = []
    work = threading.Thread(target=lambda: found.append(search(bowl, SPACE, 5, path=tmp_path/'r', progress=False)))
    work.start()
    work.join()
    assert plainly(found[0]) == plainly(search(bowl, SPACE, 5, progress=False))


def test_a_full_disk_leaves_no_half_row(tmp_path, monkeypatch):
    path = tmp_path/'rows.jsonl'
    search(bowl, SPACE, 3, path=path, progress=False)
    kept = path.read_bytes()
    def full(*_): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space left'): search(bowl, SPACE, 6, path=path, progress=False)
    assert path.read_bytes() == kept
    assert len(search(bowl, SPACE, 6, path=path, progress=False).trials) == 6


def test_rows_that_are_no_trials_are_refused(tmp_path):
    path = tmp_path/'rows.jsonl'
    search(bowl, SPACE, 2, path=path, progress=False)
    good = path.read_bytes()
    for row in (b'{"score": 1}\n', b'{"number": 1, "colour": "red"}\n', b'{"number": "one"}\n'):
        path.write_bytes(good + row)
        with pytest.raises(ValueError, match='path: expected rows of trials in rows.jsonl, got'):
            search(bowl, SPACE, 3, path=path, progress=False)
    with pytest.raises(TypeError, match='seed: expected a whole number'): search(bowl, SPACE, 2, seed=1.5)


def test_two_searches_in_one_folder_take_turns(tmp_path):
    with run_lock(tmp_path), pytest.raises(ValueError, match='expected one run at a time'):
        search(bowl, SPACE, 2, path=tmp_path/'a', progress=False)
    for name in 'ab': assert len(search(bowl, SPACE, 2, path=tmp_path/name, progress=False).trials) == 2
    head = {'seed': 0}
    TrialFile(tmp_path/'c', head).add({'number': 0})
    assert TrialFile(tmp_path/'c', head).rows == [{'number': 0}]


def test_results_at_random():
    g = random.Random(2)
    scores = [g.choice([g.random(), math.nan, math.inf, -math.inf, None]) for _ in range(80)]
    states = [g.choice(['done', 'done', 'stopped', 'failed', 'dropped']) for _ in scores]
    trials = tuple(Trial(k, sample(SPACE, 0, k), s, c) for k, (s, c) in enumerate(zip(scores, states)))
    good = sorted((s, k) for k, (s, c) in enumerate(zip(scores, states))
                  if c == 'done' and s is not None and math.isfinite(s))
    for mode, order in (('min', good), ('max', sorted(good, key=lambda p: (-p[0], p[1])))):
        result = SearchResult(SPACE, trials, mode)
        assert [t.number for t in result.ranked][:len(good)] == [k for _, k in order]
        assert {t.number for t in result.ranked} == set(range(80)) and result.best.number == order[0][1]
        assert len(repr(result).splitlines()) == 12 + len(edges(result))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            fine = narrow(result, keep=4)
        best = [t.params for t in result.ranked[:4]]
        assert all(fine['x'].low <= p['x'] <= fine['x'].high and fine['n'].low <= p['n'] <= fine['n'].high
                   and p['kind'] in fine['kind'].options for p in best)
        assert len(parallel_coordinates(result).axes[0].lines) == 80 + 4


def test_the_warning_names_the_edge():
    with pytest.warns(UserWarning, match=r'search: x: the best, .* lies in the outer 10% of its range, .*extend low'):
        search(lambda params, report: params['x'], {'x': LogUniform(1e-3, 1.)}, 30, progress=False)


def test_halving_at_random():
    g = random.Random(3)
    for _ in range(10):
        n, start, factor, seed = g.randint(1, 60), g.randint(1, 3), g.randint(2, 4), g.randrange(99)
        paid = []
        def some(params, state, epochs, paid=paid):
            paid.append(epochs)
            return params['x'], (state or 0) + epochs
        plan = halving_plan(n, start, factor)
        result = successive_halving(some, SPACE, n, seed=seed, start=start, factor=factor, progress=False)
        assert sum(paid) == plan_cost(plan) and len(result.trials) == n and plan[-1][0] < factor
        assert result.best.params['x'] == min(t.params['x'] for t in result.trials) and result.best.steps == plan[-1][1]
        reached = sorted((t.steps for t in result.trials), reverse=True)
        for size, epochs in plan: assert sum(s >= epochs for s in reached) == size


def test_halving_goes_on_like_one_long_run():
    def some(params, state, epochs):
        model, optimizer = state or (m := nn.Linear(3, 1), torch.optim.SGD(m.parameters(), .1, momentum=.9))
        for _ in range(epochs):
            optimizer.zero_grad()
            (model(torch.ones(4, 3)) - params['x']).square().mean().backward()
            optimizer.step()
        return float((model.weight.sum() + model.bias - params['x']).detach()**2), (model, optimizer)
    best = successive_halving(some, SPACE, 9, progress=False).best
    torch.manual_seed(0)
    assert best.score == some(best.params, None, 9)[0]


def test_the_same_draws_in_optuna():
    optuna = pytest.importorskip('optuna')
    d = optuna.distributions
    pairs = ((LogUniform(1e-4, 1.), d.FloatDistribution(1e-4, 1., log=True)),
             (Uniform(0., .5), d.FloatDistribution(0., .5)),
             (Integers(16, 256, log=True), d.IntDistribution(16, 256, log=True)),
             (Integers(1, 6), d.IntDistribution(1, 6)))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials = [study.ask({str(i): theirs for i, (_, theirs) in enumerate(pairs)}).params for _ in range(400)]
    for i, (r, theirs) in enumerate(pairs):
        ours = [sample({'v': r}, 0, k)['v'] for k in range(400)]
        assert all(theirs._contains(theirs.to_internal_repr(v)) for v in ours)
        place = lambda vs, r=r: np.mean([r.place(v) for v in vs])
        assert abs(place(ours) - place([t[str(i)] for t in trials])) < .07
