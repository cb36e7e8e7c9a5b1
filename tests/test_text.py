"""Words in scenes (chapters 23w to 24): what cells cannot say. Random rounds against twins, and faults by number."""
import itertools
import math
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from cnnbook import boxes
from cnnbook.scenes import FONTS, draw_word, text_scenes, word_stamp
from cnnbook.text import (
    Detector,
    SharedConv,
    decode,
    detect,
    encode,
    encode_all,
    evaluate,
    match_words,
    mean_scores,
    settle_norm,
    text_loss,
)
from cnnbook.textmaps import fit_rectangles, inside, shrink_quads
from cnnbook.trace import no_trace


def random_quads(g, n, size=96, bend=.2):
    "Convex quads, clockwise: turned rectangles with their corners moved."
    w, h, a = g.uniform(12, 60, n), g.uniform(8, 30, n), g.uniform(-math.pi, math.pi, n)
    corner = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])/2*np.stack([w, h], 1)[:, None]
    corner += bend*np.minimum(w, h)[:, None, None]*g.uniform(-1, 1, (n, 4, 2))
    c, s = np.cos(a)[:, None], np.sin(a)[:, None]
    x, y = corner[..., 0]*c - corner[..., 1]*s, corner[..., 0]*s + corner[..., 1]*c
    return torch.from_numpy(np.stack([x, y], -1) + g.uniform(.3*size, .7*size, (n, 1, 2)))


# -- scenes --

def test_scenes_are_the_same_in_another_process():
    code = ("from cnnbook.scenes import text_scenes as t; s = t(5, 64, seed=4); "
            "print(int(s.images.long().sum()), s.texts, [q.tolist() for q in s.quads])")
    told = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    s = text_scenes(9, 64, seed=4)
    assert told == f'{int(s.images[:5].long().sum())} {s.texts[:5]} {[q.tolist() for q in s.quads[:5]]}\n'


@pytest.mark.parametrize('font', FONTS)
def test_ink_lies_in_its_quad(font):
    g = np.random.default_rng(3)
    for q in random_quads(g, 12).numpy():
        share = draw_word(word_stamp('Reading', font), q, 96)
        side = np.roll(q, -1, 0) - q
        for least, limit in ((0, -1), (.2, None)):
            p = np.argwhere(share > least)[:, ::-1] + .5
            to = p[None] - q[:, None]
            depth = (side[:, None, 0]*to[..., 1] - side[:, None, 1]*to[..., 0])/np.hypot(*side.T)[:, None]
            if limit is not None: assert depth.min() > limit
            elif len(p): assert depth.min(1).max() < 3


def test_drawing_scenes_leaves_random_states_alone():
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    text_scenes(3, 64)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


# -- maps --

def twin_inside(p, quad):
    sides = zip(quad, quad[1:] + quad[:1])
    return all((b[0] - a[0])*(p[1] - a[1]) - (b[1] - a[1])*(p[0] - a[0]) >= 0 for a, b in sides)


def test_maps_against_a_loop():
    g = np.random.default_rng(0)
    for _ in range(15):
        quads = random_quads(g, 2)
        maps = encode(quads, 96)
        small, (rects, angle) = shrink_quads(quads), fit_rectangles(quads)
        for i, j in itertools.product(range(24), repeat=2):
            p = (4*j + 2, 4*i + 2)
            hits = [k for k in range(2) if twin_inside(p, small[k].tolist())]
            assert maps.score[0, i, j] == bool(hits)
            if len(hits) != 1: continue
            r, k = rects[hits[0]], hits[0]
            edge = [(r[n], r[(n + 1) % 4] - r[n]) for n in range(4)]
            far = [abs(d[0]*(p[1] - a[1]) - d[1]*(p[0] - a[0]))/d.norm() for a, d in edge]
            assert np.allclose(maps.geometry[:4, i, j], far, atol=1e-3) and maps.geometry[4, i, j] == angle[k].float()


def test_round_trip_of_rectangles():
    g = np.random.default_rng(1)
    angles = np.concatenate([g.uniform(-np.pi/2, np.pi/2, 150), np.deg2rad([-89.999999, -45, 0, 45, 89.999999, 90]*5)])
    for a in angles:
        w, h = g.uniform(20, 120), g.uniform(14, 60)
        q = np.array([(-w, -h), (w, -h), (w, h), (-w, h)])/2
        q = q@np.array([(np.cos(a), np.sin(a)), (-np.sin(a), np.cos(a))]) + g.uniform(90, 110, 2)
        maps = encode(torch.from_numpy(q)[None], (208, 200))
        back, scores = decode(maps.score, maps.geometry)
        assert len(back) == maps.score.sum() > 0 and (scores == 1).all()
        assert np.abs(back.numpy() - q).max() < 1e-3


def test_fitted_rectangle_is_the_smallest():
    shapely = pytest.importorskip('shapely')
    g = np.random.default_rng(2)
    quads = random_quads(g, 200, bend=.3)
    for q, r in zip(quads.tolist(), fit_rectangles(quads)[0].tolist()):
        best = shapely.Polygon(q).minimum_rotated_rectangle.area
        assert math.isclose(shapely.Polygon(r).area, best, rel_tol=1e-6)
        assert shapely.Polygon(r).buffer(1e-6).contains(shapely.Polygon(q))


def test_shrunk_quads_stay_inside():
    quads = random_quads(np.random.default_rng(4), 300)
    for share in (.1, .3, .49): assert all(inside(s, q[None]).all() for s, q in zip(shrink_quads(quads, share), quads))


def test_losses_of_random_maps_are_finite_and_kind():
    g = torch.Generator().manual_seed(0)
    maps = encode_all([random_quads(np.random.default_rng(k), k) for k in range(4)], 96)      # the first without text
    for spread in (1, 20, 1000):
        raw = (spread*torch.randn(4, 6, 24, 24, generator=g)).requires_grad_()
        s = raw.sigmoid()
        loss = text_loss(s[:, :1], torch.cat([96*s[:, 1:5], math.pi*(s[:, 5:] - .5)], 1), maps)
        loss.total.backward()
        assert all(v.isfinite() and v >= -1e-6 for v in loss) and raw.grad.isfinite().all()
        off = (maps.score == 0)[:, 0]
        assert not raw.grad[:, 1:].movedim(1, -1)[off].any()                  # geometry is asked in text alone
        assert not raw.grad[:, 0][maps.mask[:, 0] == 0].any() and not raw.grad[0, 1:].any()


# -- counting --

def best_assignment(table, threshold):
    n, k = table.shape
    wide = np.pad(table, ((0, 0), (0, n)))
    return max(sum(wide[i, j] > threshold for i, j in enumerate(p)) for p in itertools.permutations(range(n + k), n))


def test_matching_against_all_assignments():
    g = np.random.default_rng(5)
    for _ in range(80):
        one = torch.tensor([(0., 0), (30, 0), (30, 10), (0, 10)], dtype=torch.float64)
        words = torch.stack([one + torch.tensor([40*k, 0]) for k in range(3)])
        ignore = torch.from_numpy(g.random(3) < .3)
        found = words[g.integers(0, 3, 4)] + torch.from_numpy(g.normal(0, 4, (4, 1, 2)))
        rows = match_words(found, words, ignore)
        share = boxes.quad_iou(found, words.double())
        share = share*600/(1 + share)/300
        out = (share[:, ignore] > .5).any(1)
        assert torch.equal(rows == -2, out)
        table = boxes.quad_iou(found, words.double())[~out][:, ~ignore].numpy()
        assert (rows >= 0).sum() == best_assignment(table, .5) and not ignore[rows[rows >= 0]].any()
        assert len(set(rows[rows >= 0].tolist())) == (rows >= 0).sum()
        score = evaluate([found], [words], [ignore])
        assert (score.hits, score.found, score.truth) == ((rows >= 0).sum(), 4 - out.sum(), 3 - ignore.sum())


def test_fault_57_nothing_found_and_nothing_to_find():
    none, one = torch.zeros(0, 4, 2), torch.tensor([[(0., 0), (9, 0), (9, 9), (0, 9)]])
    for found, truth, ignore, nan in ((none, one, [False], 'precision'), (one, none, [], 'recall'),
                                      (one, one, [True], 'precision'), (none, none, [], 'hmean')):
        score = evaluate([found], [truth], [torch.tensor(ignore, dtype=torch.bool)])
        with pytest.warns(UserWarning, match=f'{nan}: NaN'): assert math.isnan(getattr(score, nan))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert evaluate([none], [one]).hmean == evaluate([none], [one]).recall == 0 and 'NaN' in repr(evaluate([], []))


# -- network --

def small(seed=0, size=64):
    torch.manual_seed(seed)
    return Detector(SharedConv('small'), size=size).eval()


class Said(nn.Module):
    "A network that runs another one and then says maps of its own."
    def __init__(self, score, geometry): super().__init__(); self.maps = score[None], geometry[None]
    def forward(self, x): return self.maps


def noisy_maps(seed):
    g = torch.Generator().manual_seed(seed)
    s = text_scenes(1, 96, seed=seed, hard=0)
    m = encode(s.quads[0], 96)
    noise = torch.randn(5, 24, 24, generator=g)*torch.tensor([1, 2, 1, 2, .05])[:, None, None]
    geometry = torch.cat([(m.geometry[:4] + noise[:4]).clamp(min=0), m.geometry[4:] + noise[4:]])
    return s, (m.score*(.7 + .3*torch.rand(1, 24, 24, generator=g))), geometry


@pytest.fixture
def without_cext(monkeypatch):
    def swap():
        monkeypatch.setattr(boxes, 'load_cext', lambda: (None, 'taken away by a test'))
        boxes._warn_slow.cache_clear()
    yield swap
    boxes._warn_slow.cache_clear()


def test_fault_64_the_slow_version_finds_the_same(without_cext):
    if boxes.load_cext()[0] is None: pytest.skip('no extension here')
    cases = [noisy_maps(k) for k in range(8)]
    fast = [detect(Said(score, geometry), s.images[0], .75) for s, score, geometry in cases]
    without_cext()
    with pytest.warns(RuntimeWarning, match='using slow Python version'):
        slow = [detect(Said(score, geometry), s.images[0], .75) for s, score, geometry in cases]
    assert sum(map(len, fast)) > 8
    for a, b in zip(fast, slow): assert torch.equal(a.quads, b.quads) and torch.equal(a.scores, b.scores)


def test_merging_noisy_cells_beats_a_single_one():
    gaps = []
    for k in range(20):
        s, score, geometry = noisy_maps(k)
        truth = fit_rectangles(s.quads[0].double())[0]
        quads, scores = decode(score, geometry, .7)
        found = detect(Said(score, geometry), s.images[0], .7).quads
        single = quads[boxes.quad_nms(quads, scores, .2)]
        gaps.append([(q[:, None].double() - truth).abs().mean((2, 3)).amin(1).mean().item() for q in (found, single)])
    merged, single = np.mean(gaps, 0)
    assert merged < .8*single


@pytest.mark.parametrize('h, w', [(1, 1), (31, 33), (32, 32), (50, 97), (64, 1)])
def test_any_size_of_image(h, w):
    model, g = small(), torch.Generator().manual_seed(1)
    nn.init.constant_(model.score.bias, 3.)                                   # every cell says text
    found = detect(model, torch.rand(3, h, w, generator=g), least=0.)
    assert found.cells == -(-h//32)*8*-(-w//32)*8 and found.quads.isfinite().all()


def test_fault_58_bad_images_and_bad_networks():
    model, x = small(), torch.rand(3, 40, 40)
    for image, words in ((x[0], 'image: expected (3, H, W), got (40, 40)'),
                         (x[:1], 'image: expected (3, H, W), got (1, 40, 40)'),
                         (x*math.inf, 'image: expected finite numbers, got'), (x/0, 'image: expected finite')):
        with pytest.raises(ValueError, match=re.escape(words)): detect(model, image)
    model.score.weight.data[0, 0] = math.nan
    with no_trace(model, x), pytest.raises(ValueError, match='score: expected finite numbers'): detect(model, x)
    model = small()
    model.distances.bias.data.fill_(-1e4)                                     # distances of exactly 0
    model.score.bias.data.fill_(9.)
    assert len(detect(model, x)) == 0


def test_detecting_leaves_no_trace():
    model, x = small().train(), torch.rand(3, 40, 40)
    model.score.bias.grad = torch.ones(1)
    with no_trace(model, x): detect(model, x, threshold=.01, least=0.)
    settle_norm(model, [torch.rand(2, 3, 32, 32)])
    assert model.training and all(m.momentum in (.1, .003) for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_mean_scores_against_a_loop():
    g = np.random.default_rng(6)
    score, quads = torch.rand(1, 24, 24), random_quads(g, 40)
    for q, got in zip(quads, mean_scores(score, quads)):
        for corners in (shrink_quads(q[None])[0], q):
            cells = [score[0, i, j].item() for i, j in itertools.product(range(24), repeat=2)
                     if twin_inside((4*j + 2, 4*i + 2), corners.tolist())]
            if cells: break
        assert math.isclose(got, np.mean(cells) if cells else 0, abs_tol=1e-6)
