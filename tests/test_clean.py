"""Copies and doubled classes: the fast search against the plain definition, and real photographs."""
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from cnnbook.clean import merge_classes, near_duplicates, similar_names
from cnnbook.folders import image_folder
from cnnbook.images import Images
from cnnbook.world import shapes


def plainly(a, b):
    "The similarities of two sheets (C, 32, 32) in float64 by definition, at nine placements; number 4 is the middle."
    def form(sheet, down, right):
        cells = avg_pool2d(sheet[None, :, down:down + 30, right:right + 30], 5)[0].flatten(1)
        cells = cells - cells.mean(1, keepdim=True)
        return cells/cells.norm()

    return [(form(a, down, right)*form(b, 1, 1)).sum().item() for down in range(3) for right in range(3)]


def test_equals_the_definition():
    a, b = shapes(9, seed=0).x, shapes(7, seed=1).x
    b[:5] = (a[:5].float()*.8 + 20).to(torch.uint8).roll(1, 2)
    got = {(i, j): s for i, j, s in near_duplicates(a, b, threshold=.3)}
    for i in range(9):
        for j in range(7):
            tries = plainly(a[i].double()/255, b[j].double()/255)
            if (i, j) in got: assert abs(got[i, j] - max(tries)) < 1e-5 and max(tries) > .2999
            else: assert max(tries) < .3001 or tries[4] < .2001                   # the sieve looks at the middle first
    assert len(got) > 8 and {p for p, s in got.items() if s > .95} == {(k, k) for k in range(5)}


def test_order_of_the_result():
    pairs = near_duplicates(shapes(300).x, threshold=.6)
    assert pairs == sorted(pairs, key=lambda p: (-p[2], p[0], p[1])) and len(pairs) > 20
    assert all(i < j and type(i) is type(j) is int and isinstance(s, float) and .6 <= s <= 1 for i, j, s in pairs)


def test_planted_across_blocks():
    "4,000 against 5,000 rows are looked at in two blocks; copies sit at both ends and at the seam."
    a, b = shapes(4000, seed=0), shapes(5000, seed=1)
    places = [0, 3354, 3355, 3356, 3999]
    b.x[[9, 1, 4999, 77, 2500]] = a.x[places]
    assert sorted(p[:2] for p in near_duplicates(a, b)) == sorted(zip(places, [9, 1, 4999, 77, 2500]))


@pytest.mark.parametrize('size', [(32, 32), (48, 48), (40, 64), (97, 33), (224, 224)])
def test_any_size_finds_itself(size):
    small = shapes(20).x
    large = torch.nn.functional.interpolate(small.float(), size, mode='bilinear').to(torch.uint8)
    assert sorted(p[:2] for p in near_duplicates(large, small)) == [(k, k) for k in range(20)]


def test_flat_images_never_give_nan():
    flat = torch.arange(0, 256, 5).to(torch.uint8)[:, None, None, None].expand(-1, 3, 20, 20)
    pairs = near_duplicates(flat, threshold=.98)
    steps = {j - i for i, j, _ in pairs}
    assert steps == {1, 2, 3} and all(np.isfinite(s) for *_, s in pairs)          # up to 16 of 255
    red, blue = torch.zeros(2, 1, 3, 8, 8).unbind()
    red[:, 0], blue[:, 2] = 1, 1
    assert near_duplicates(red, blue) == [] and len(near_duplicates(red, red)) == 1


def test_inputs_are_left_alone():
    x = shapes(50).x
    before = x.clone()
    near_duplicates(x)
    leaf = x.float().div(255).requires_grad_()
    near_duplicates(leaf)
    assert torch.equal(x, before) and leaf.grad is None


def test_similar_names_are_quick_and_keep_numbers_apart():
    wnids = [f'n{k:08}' for k in range(1000)]
    start = time.perf_counter()
    assert similar_names(wnids) == [] and time.perf_counter() - start < 20
    cats = similar_names(['cat', 'cats', 'Cat 2', 'cat 3', 'dog'])
    assert [p[:2] for p in cats] == [('cat', 'cats'), ('cat', 'Cat 2'), ('cat', 'cat 3')]
    assert similar_names(['daisy', 'dandelion', 'roses', 'sunflowers', 'tulips']) == []
    assert similar_names([]) == [] and similar_names(['---', '___'])[0][2] == 1


def test_merge_keeps_every_name_or_its_new_one():
    r = np.random.default_rng(0)
    for _ in range(50):
        classes = tuple(r.permutation(list('abcdefg'))[:r.integers(1, 8)].tolist())
        y = torch.tensor(r.integers(0, len(classes), 20))
        names = {c: str(r.choice(list('abcxyz'))) for c in classes if r.random() < .5}
        images = Images(torch.zeros(20, 1, 2, 2, dtype=torch.uint8), y, classes, 'here')
        merged = merge_classes(images, names)
        want = [names.get(classes[k], classes[k]) for k in y]
        assert [merged.classes[k] for k in merged.y] == want and len(set(merged.classes)) == len(merged.classes)
        assert set(merged.classes) == {names.get(c, c) for c in classes}
        stay = [c for c in classes if names.get(c, c) == c]
        assert [c for c in merged.classes if c in stay] == stay


def real(name):
    path = Path(os.environ.get('CNNBOOK_DATA', 'nowhere'))/name
    if not path.exists(): pytest.skip(f'real data: expected {path}, got nothing there')
    return path


@pytest.mark.real
def test_flower_photographs_hold_a_copy():
    path = real('flower_photos')
    train, test = image_folder(path/'train'), image_folder(path/'test')
    pairs = near_duplicates(test, train)
    print('\nflowers, test and training:', pairs)
    assert 1 <= len(pairs) <= 3 and pairs[0][2] > .999
    i, j, _ = pairs[0]
    assert (test.x[i].int() - train.x[j].int()).abs().float().mean() < 3        # it is the same photograph


@pytest.mark.real
def test_cifar_holds_copies():
    "Barz and Denzler (2020) found near-duplicates of about 3 % of CIFAR-10's test images in its training set."
    import pickle
    path = real('cifar-10-batches-py')
    read = lambda name: pickle.loads((path/name).read_bytes(), encoding='bytes')[b'data']
    load = lambda name: torch.from_numpy(read(name).reshape(-1, 3, 32, 32))
    train, test = torch.cat([load(f'data_batch_{k}') for k in range(1, 6)]), load('test_batch')
    start = time.perf_counter()
    pairs = near_duplicates(test, train)
    found = len({i for i, _, _ in pairs})
    print(f'\nCIFAR-10: {len(pairs)} pairs, {found} test images, {time.perf_counter() - start:.0f} s')
    assert 150 < found < 350
