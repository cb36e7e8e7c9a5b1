"""What chapter 32y does not say in a cell: measuring changes nothing, devices that are not here, random clocks."""
import itertools
import math
import random
import sys
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cnnbook import bench as B
from cnnbook.cifar import ClassicNet
from cnnbook.device import describe
from cnnbook.steps import Precision
from cnnbook.trace import no_trace


class Clock:
    def __init__(self, seconds): self.now, self.seconds = 0., seconds
    def __call__(self): return self.now
    def step(self): self.now += next(self.seconds)


def test_a_bench_changes_nothing():
    flags = lambda: (torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
                     torch.backends.cudnn.benchmark, torch.backends.mkldnn.enabled, torch.get_default_dtype(),
                     torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled(),
                     threading.active_count())
    net, before = ClassicNet(), flags()
    with no_trace(net): B.bench('cpu', 4, '32', .02)                 # random states, modes, hooks, .grad
    assert flags() == before
    with no_trace(net), pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as m:
        m.setattr(B, 'rate', lambda *_, **__: np.random.rand() + torch.rand(1) + 1/0)
        B.bench('cpu', 4, '32', .02)                                 # nor does one that fails
    assert flags() == before


@pytest.mark.parametrize('around', [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_around_it(around):
    with around(): assert B.bench('cpu', 2, '32', .02).train > 0


def test_another_default_dtype_is_neither_used_nor_changed():
    torch.set_default_dtype(torch.float64)
    try:
        net, train, infer = B.classic_steps(Precision(), 2)
        assert infer().dtype == torch.float32 == next(net.parameters()).dtype and train().dtype == torch.float32
        assert torch.get_default_dtype() == torch.float64
    finally: torch.set_default_dtype(torch.float32)


def test_precision_is_what_was_computed():
    assert B.bench('cpu', 2, '64', .02).precision == '64'
    assert B.classic_steps(Precision('64'), 2)[2]().dtype == torch.float64
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        got = B.bench('cpu', 2, 'bf16-mixed', .02).precision
    there = describe().cpu_bf16
    assert got == ('bf16-mixed' if there else '32') and any('bfloat16' in str(w.message) for w in said) == (not there)


def test_none_means_the_defaults(monkeypatch):
    sizes = []
    monkeypatch.setattr(B, 'rate', lambda step, size, *_, **__: sizes.append(size) or B.Rounds((1., 2., 4.)))
    monkeypatch.setattr(B, 'describe', lambda: describe(arch='x86_64'))
    monkeypatch.setattr(B, 'defaults', lambda *_: SimpleNamespace(batch_size=7, precision='32'))
    got = B.bench('cpu')
    assert (got.batch_size, sizes, got.precision, got.train, got.spread) == (7, [7, 7], '32', 2., 1.5)


def test_training_learns_and_inference_only_looks():
    net, train, infer = B.classic_steps(Precision('32', channels_last=True), 16)
    with no_trace(net): first = infer()
    losses = [train().item() for _ in range(30)]
    assert losses[-1] < losses[0] and not torch.equal(infer(), first) and not first.requires_grad
    again = B.classic_steps(Precision('32', channels_last=True), 16)[1]
    assert torch.isfinite(again())


def test_random_clocks():
    rng = random.Random(0)
    for _ in range(50):
        step, seconds = 10**rng.uniform(-3, 1), rng.uniform(.1, 3)
        images, rounds = rng.randint(1, 300), rng.randint(1, 7)
        clock = Clock(itertools.chain([50.]*2, itertools.repeat(step)))
        found, start = B.rate(clock.step, images, seconds, clock, rounds=rounds), 100.
        assert len(found.rates) == rounds and math.isclose(found.median, images/step, rel_tol=1e-6)
        assert found.spread < 1e-6
        most = max(1.5*seconds + 2*seconds/rounds, (rounds + 1)*step)     # the warm-up is two rounds at most
        assert clock.now - start <= most*1.001
    held = Clock(itertools.chain([.25]*25, [99.], itertools.repeat(.25)))             # one round is held up
    assert B.rate(held.step, 1, 5., held).median == 4.


@pytest.mark.parametrize('wrong, error, words', [
    ({'seconds': 0}, ValueError, 'seconds: expected above 0'), ({'seconds': math.inf}, ValueError, 'got inf'),
    ({'seconds': True}, TypeError, 'seconds: expected a number, got True'),
    ({'batch_size': -3}, ValueError, 'batch_size: expected at least 1, got -3'),
    ({'batch_size': True}, TypeError, 'batch_size: expected a whole number'),
    ({'precision': ''}, ValueError, "precision: expected 64, 32, bf16-mixed, 16-mixed, got ''"),
    ({'precision': '32-true'}, ValueError, "got '32-true'"), ({'device': 'gpu'}, ValueError, 'device: expected cpu')])
def test_wrong_input(wrong, error, words, monkeypatch):
    monkeypatch.setattr(B, 'classic_steps', lambda *_: pytest.fail('measured all the same'))
    with pytest.raises(error, match=words): B.bench(**{'device': 'cpu'} | wrong)


def test_devices_that_are_not_here(monkeypatch):
    waited, gpu = [], torch.device('cuda', 1)
    monkeypatch.setattr(torch.cuda, 'synchronize', waited.append)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda d: 'Orin')
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda d: 3_000_000)
    B._waiter(gpu)()
    assert waited == [gpu] and B._waiter(torch.device('cpu'))() is None and B.peak_memory(gpu) == 3.
    assert B._words(gpu, SimpleNamespace(jetson='Jetson Orin Nano', power_mode='2')) == \
        'Jetson Orin Nano, power mode 2, Orin'
    assert B._words(gpu, SimpleNamespace(jetson='', power_mode='')) == 'Orin'
    assert B._words(torch.device('mps'), None) == 'Apple GPU'
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    assert B._words(torch.device('cpu'), None) == 'CPU, 1 thread'
    rss = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=500_000))
    monkeypatch.setitem(sys.modules, 'resource', rss)
    for platform, mb in (('linux', 512.), ('darwin', .5)):
        monkeypatch.setattr(sys, 'platform', platform)
        assert B.peak_memory('cpu') == mb
