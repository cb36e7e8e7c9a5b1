"""Chapter 05e where a cell is not enough: random settings against closed forms, schedules resumed at every step."""
import math
import random

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from cnnbook.schedules import SCHEDULES, count_steps, make_schedule, schedule_curve, schedule_interval, warmup


def sgd(*rates):
    return torch.optim.SGD([{'params': [torch.zeros(1)], 'lr': lr} for lr in rates], momentum=.9)


def drive(optimizer, schedule, calls, losses=(), start=0):
    "Rates of all groups before each of `calls` calls of step()."
    seen = []
    for t in range(start, calls):
        seen.append([g['lr'] for g in optimizer.param_groups])
        optimizer.step()
        if schedule is not None: schedule.step(*losses[t:t + 1])
    return seen


def settings_of(name, draw, total):
    drawn = {'step_size': draw.randint(1, 5), 'gamma': draw.uniform(.1, 1), 'min_lr': draw.uniform(0, 1e-3),
             'pct_start': draw.uniform(.05, .95), 'warmup_steps': draw.randint(0, total - 1), 'total_steps': total,
             'factor': draw.uniform(.1, .9), 'patience': draw.randint(0, 3)}
    return {key: drawn[key] for key in SCHEDULES[name]}


def closed_form(name, lr, t, epochs, total, s):
    half = lambda a, b, share: b + (a - b)*(1 + math.cos(math.pi*share))/2
    if name == 'step': return lr*s['gamma']**(t//s['step_size'])
    if name == 'exponential': return lr*s['gamma']**t
    if name == 'cosine': return half(lr, s['min_lr'], t/epochs)
    if name == 'one_cycle':
        top = s['pct_start']*total - 1
        return half(lr/25, lr, t/top) if t <= top else half(lr, lr/25e4, (t - top)/(total - 1 - top))
    w = s['warmup_steps']
    return lr*(t + 1)/(w + 1) if t < w else half(lr, s['min_lr'], (t - w)/(total - w))


@pytest.mark.parametrize('name', ['step', 'exponential', 'cosine', 'one_cycle', 'warmup_cosine'])
def test_random_settings_equal_the_closed_form(name):
    draw = random.Random(name)
    for _ in range(40):
        epochs, per_epoch, lr = draw.randint(2, 12), draw.randint(2, 9), 10**draw.uniform(-3, 0)
        s = settings_of(name, draw, epochs*per_epoch)
        got = schedule_curve(name, lr, epochs, per_epoch, **s)
        each_step = name in ('one_cycle', 'warmup_cosine')
        for t, rate in enumerate(got):
            wanted = closed_form(name, lr, t if each_step else t//per_epoch, epochs, epochs*per_epoch, s)
            assert math.isclose(rate, wanted, rel_tol=1e-7, abs_tol=1e-12), (s, t)


@pytest.mark.parametrize('name', list(SCHEDULES))
def test_fault_28_resumed_at_any_step_equals_unbroken(name):
    draw = random.Random(name)
    losses = [draw.random() for _ in range(30)] if name == 'plateau' else []
    s = settings_of(name, draw, 30)
    make = lambda o: make_schedule(name, o, 5, 6, **s)
    whole = drive(o := sgd(.1, .02), make(o), 30, losses)
    for cut in range(30):
        first = make(o := sgd(.1, .02))
        drive(o, first, cut, losses)
        second = make(again := sgd(.1, .02))
        again.load_state_dict(o.state_dict())
        if first is not None: second.load_state_dict(first.state_dict())
        assert drive(again, second, 30, losses, start=cut) == whole[cut:], cut


def test_fault_30_a_warm_up_run_made_longer_follows_the_longer_curve():
    draw = random.Random(0)
    for _ in range(20):
        old, w = draw.randint(5, 30), draw.randint(0, 4)
        new = old + draw.randint(1, 30)
        o = sgd(.1, .02)
        first = warmup(o, w, old, min_lr=.001)
        drive(o, first, old)
        again = sgd(.1, .02)
        second = warmup(again, w, new, min_lr=.001)
        again.load_state_dict(o.state_dict())
        second.load_state_dict(first.state_dict())
        whole = drive(o := sgd(.1, .02), warmup(o, w, new, min_lr=.001), new)
        assert drive(again, second, new, start=old)[1:] == whole[old + 1:]


def test_state_of_every_schedule_is_plain_data():
    plain = lambda v: v is None or isinstance(v, (bool, int, float, str)) or (
        isinstance(v, (list, tuple)) and all(map(plain, v))) or (isinstance(v, dict) and all(map(plain, v.values())))
    for name in SCHEDULES:
        schedule = make_schedule(name, sgd(.1, .02), 5, 6)
        assert schedule is None or plain(schedule.state_dict()), (name, schedule.state_dict())


def test_steps_of_random_loaders():
    draw = random.Random(0)
    for _ in range(200):
        n, size, acc, drop = draw.randint(1, 300), draw.randint(1, 70), draw.randint(1, 5), draw.random() < .5
        batches = len(torch.utils.data.DataLoader(range(n), size, drop_last=drop))
        assert count_steps(n, size, drop, acc) == len(range(0, batches, acc))


def test_one_cycle_leaves_the_momentum_of_plain_sgd_alone():
    plain = torch.optim.SGD([torch.zeros(1)], .1)
    schedule = make_schedule('one_cycle', plain, 2, 5)
    assert isinstance(schedule, OneCycleLR) and schedule_interval(schedule) == 'step'
    drive(plain, schedule, 10)
    assert plain.param_groups[0]['momentum'] == 0


@pytest.mark.parametrize('name, kind, bad', [
    ('step', ValueError, {'step_size': 0}), ('step', TypeError, {'step_size': True}),
    ('step', ValueError, {'gamma': 0.}),
    ('exponential', ValueError, {'gamma': 1.1}), ('exponential', TypeError, {'gamma': '0.9'}),
    ('cosine', ValueError, {'min_lr': -1.}), ('cosine', ValueError, {'min_lr': math.nan}),
    ('cosine', ValueError, {'min_lr': math.inf}), ('one_cycle', ValueError, {'pct_start': 1.5}),
    ('one_cycle', ValueError, {'total_steps': 0}), ('warmup_cosine', ValueError, {'warmup_steps': 30}),
    ('warmup_cosine', ValueError, {'warmup_steps': -1}), ('plateau', ValueError, {'factor': 1.}),
    ('plateau', ValueError, {'patience': -1}), ('plateau', ValueError, {'gamma': .5})])
def test_settings_out_of_range_are_named(name, kind, bad):
    with pytest.raises(kind, match=f'^{next(iter(bad))}: expected '): make_schedule(name, sgd(.1), 5, 6, **bad)
