"""Augmentation that can be repeated: real worker processes (faults 19 and 21), threads, a slow twin in plain Python."""
import math
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cnnbook.augment import Augment, Params, uniform
from cnnbook.world import shapes

WORLD = shapes(64, seed=1)
ALL_FOUR = Augment(flip=True, shift=3, rotate=20, scale=.2)


class Jitter(Dataset):
    "Keeps a generator of its own, as many data sets do."
    def __init__(self): self.generator = np.random.default_rng(0)
    def __len__(self): return 64
    def __getitem__(self, i): return i % 2, self.generator.random()


class Augmented(Dataset):
    def __init__(self, augment=ALL_FOUR): self.augment, self.epoch = augment, 0
    def __len__(self): return len(WORLD)
    def __getitem__(self, i): return i, self.augment(WORLD.x[i:i + 1], [i], seed=5, epoch=self.epoch)[0]


def reseed(worker_id):
    info = get_worker_info()
    info.dataset.generator = np.random.default_rng(info.seed)


def numbers(workers, **options):
    "The numbers that each of the workers deals out in two epochs; batch k comes from worker k % workers."
    loader = DataLoader(Jitter(), batch_size=8, num_workers=workers, **options)
    epochs = [[batch[1].tolist() for batch in loader] for _ in range(2)]
    return [sum(e[k::workers], []) for e in epochs for k in range(workers)]


def test_fault_19_a_generator_of_the_data_set_repeats_in_every_worker_and_epoch():
    streams = numbers(2)
    assert streams[0] == streams[1] == streams[2] == streams[3]            # what the chapter warns of, for real


def test_fault_19_worker_init_fn_cures_it_for_a_fixed_number_of_workers():
    seeded = lambda: {'worker_init_fn': reseed, 'generator': torch.Generator().manual_seed(0)}
    streams = numbers(2, **seeded())
    assert len({v for s in streams for v in s}) == 128                     # two workers, two epochs: no number twice
    assert numbers(2, **seeded()) == streams


def test_fault_21_the_same_images_with_no_worker_and_with_two():
    def run(workers):
        data, epochs, order = Augmented(), [], torch.Generator().manual_seed(3)
        loader = DataLoader(data, batch_size=16, shuffle=True, num_workers=workers, generator=order)
        for data.epoch in range(2): epochs.append([torch.cat(part) for part in zip(*loader)])
        return epochs

    alone, two = run(0), run(2)
    for epoch, ((i, x), (j, z)) in enumerate(zip(alone, two)):
        assert torch.equal(i, j) and torch.equal(x, z)                     # order and pixels
        assert torch.equal(x, ALL_FOUR(WORLD.x[i], i, seed=5, epoch=epoch))
    assert not torch.equal(alone[0][0], alone[1][0])
    assert not torch.equal(alone[0][1][alone[0][0].argsort()], alone[1][1][alone[1][0].argsort()])


def test_no_random_state_is_read_or_changed():
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()
    first = ALL_FOUR(WORLD.x, range(64))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    assert pickle.dumps(np.random.get_state()) == before[1]
    torch.manual_seed(9), np.random.seed(9)
    assert torch.equal(ALL_FOUR(WORLD.x, range(64)), first)


def test_the_number_of_threads_changes_nothing():
    was = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(ALL_FOUR(WORLD.x, range(64)))
    finally: torch.set_num_threads(was)
    assert torch.equal(*found)


def by_loops(x, p, fill):
    "The definition, pixel by pixel, in Python's own floats; None where the source point is a tie or nearly one."
    h, w = x.shape[1:]
    out = {}
    for r in range(h):
        for c in range(w):
            a, dx, dy = math.radians(p.angle[0]), c - (w - 1)/2 - p.dx[0], r - (h - 1)/2 - p.dy[0]
            u = (math.cos(a)*dx - math.sin(a)*dy)/p.scale[0]*(-1 if p.flip[0] else 1) + (w - 1)/2
            v = (math.sin(a)*dx + math.cos(a)*dy)/p.scale[0] + (h - 1)/2
            if min(abs(t - math.floor(t) - .5) for t in (u, v)) < 1e-4: continue
            inside = 0 <= round(u) < w and 0 <= round(v) < h
            out[r, c] = x[:, round(v), round(u)].tolist() if inside else [fill]*len(x)
    return out


@pytest.mark.parametrize('shape', [(1, 1, 1), (3, 1, 9), (2, 8, 1), (1, 5, 12), (3, 11, 7), (4, 8, 8)])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_nearest_is_the_definition(shape, dtype):
    r = np.random.default_rng(0)
    augment = Augment(flip=True, shift=4, rotate=180, scale=.5, fill=7)
    compared = 0
    for k in range(10):
        x = torch.from_numpy(r.integers(0, 255, (1, *shape))).to(dtype)
        p = augment.parameters([k])
        got = augment.apply(x, p)
        assert got.dtype == dtype and got.shape == x.shape
        for (row, col), want in by_loops(x[0], p, 7).items():
            compared += 1
            assert got[0, :, row, col].tolist() == want, (k, row, col)
    assert compared > 8*shape[1]*shape[2]


@pytest.mark.parametrize('layout', [lambda x: x, lambda x: x.contiguous(memory_format=torch.channels_last),
                                    lambda x: x.flip(0).flip(0), lambda x: x[:, :, ::1].expand(*x.shape)])
def test_neither_layout_nor_company_matters_and_the_input_is_kept(layout):
    x = layout(WORLD.x[:20].clone())
    before = x.clone()
    for interpolation in ('nearest', 'bilinear'):
        augment = Augment(True, 3, 20, .2, interpolation, fill=9)
        whole = augment(x, range(20))
        assert torch.equal(whole, augment(WORLD.x[:20], range(20))) and torch.equal(x, before)
        assert torch.equal(torch.cat([augment(x[k:k + 1], [k]) for k in range(20)]), whole)


def test_whole_shifts_are_exact_with_bilinear_too():
    x = torch.rand(8, 3, 9, 10, dtype=torch.float64)
    smooth, p = Augment(interpolation='bilinear', fill=.25), Augment(flip=True, shift=4).parameters(range(8))
    assert torch.equal(smooth.apply(x, p), Augment(fill=.25).apply(x, p))


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_bilinear_keeps_a_constant_image_and_its_kind(dtype):
    x = torch.full((4, 1, 12, 12), 200, dtype=dtype)
    got = Augment(rotate=180, scale=.3, interpolation='bilinear', fill=200)(x, range(4))
    assert got.dtype == dtype and torch.allclose(got.double(), x.double(), atol=1e-3)


def test_gradients_pass_through():
    x = torch.rand(3, 1, 6, 6, requires_grad=True)
    for interpolation in ('nearest', 'bilinear'):
        (grad,) = torch.autograd.grad(Augment(rotate=30, interpolation=interpolation)(x, range(3)).sum(), x)
        assert grad.isfinite().all() and grad.sum() > 0


def test_seed_and_epoch_are_not_mixed_up():
    "A sum or product of seed and epoch would make (1, 2) and (2, 1) the same; no two of 8,000 addresses may collide."
    found = [uniform(s, e, range(20), stream=t) for s in range(10) for e in range(10) for t in range(4)]
    assert len(np.unique(found)) == 8000
    assert len({Augment(), Augment(), ALL_FOUR}) == 2 and pickle.loads(pickle.dumps(ALL_FOUR)) == ALL_FOUR


@pytest.mark.parametrize('bad, words', [
    ({'flip': math.nan}, 'flip: expected 0 to 1, got nan'),
    ({'flip': None}, 'flip: expected True, False or a probability, got None'),
    ({'rotate': 181}, 'rotate: expected 0 to 180, got 181'),
    ({'scale': -.1}, 'scale: expected 0 to 0.9, got -0.1'),
    ({'scale': math.inf}, 'scale: expected 0 to 0.9, got inf'),
    ({'shift': 2.}, 'shift: expected whole pixels, got 2.0'),
    ({'fill': math.nan}, 'fill: expected -1e+30 to 1e+30, got nan'),
    ({'interpolation': None}, "expected 'nearest' or 'bilinear', got None")])
def test_bad_settings_are_refused_in_words(bad, words):
    with pytest.raises((ValueError, TypeError)) as e: Augment(**bad)
    assert words in str(e.value)


def test_params_are_checked():
    assert len(Params.same(0)) == 0 and Augment().apply(WORLD.x[:0], Params.same(0)).shape == (0, 3, 32, 32)
    for bad in ({'scale': -1}, {'scale': math.inf}, {'angle': math.inf}):
        with pytest.raises(ValueError, match=f'{[*bad][0]}: expected'): Params.same(2, **bad)
