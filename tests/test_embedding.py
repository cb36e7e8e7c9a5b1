"""Feature space and its maps: against scikit-learn, on odd tables, in figures by the hundred (fault 56)."""
import gc
import resource
import subprocess
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.path import Path
from sklearn.decomposition import PCA as TheirPCA
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors

from cnnbook.codes import Neighbours
from cnnbook.embedding import by_chance, frame_wrong, neighbour_purity, pca, silhouette
from cnnbook.flatmaps import draw_map, shape_marker, show_point, show_thumbnails, tsne
from cnnbook.images import Images
from cnnbook.world import SHAPES, shapes


def table(seed, kind=torch.float64):
    g = torch.Generator().manual_seed(seed)
    n, d, classes = (int(torch.randint(*r, (), generator=g)) for r in ((12, 300), (1, 40), (2, 6)))
    y = torch.randint(classes, (n,), generator=g)
    y[:2*classes] = torch.arange(classes).repeat(2)                         # no class of one by accident
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64)
    return (x + 3*torch.randn(d, generator=g, dtype=torch.float64)).to(kind), y


@pytest.mark.parametrize('seed', range(20))
def test_pca_equals_scikit_learn(seed):
    x, _ = table(seed)
    k = min(len(x) - 1, x.shape[1])
    ours, theirs = pca(x, k), TheirPCA(k, svd_solver='full').fit(x.numpy())
    side = torch.from_numpy(theirs.components_)
    side = side*(side*ours.components).sum(1, keepdim=True).sign()
    gap = torch.minimum(*(-ours.variance.diff(prepend=ours.variance[:1]*2, append=torch.zeros(1)) for _ in range(2)))
    clear = gap[:k] > 1e-3*ours.variance[0]                                 # where two variances tie, so do directions
    torch.testing.assert_close(ours.components[clear], side[clear], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.variance, torch.from_numpy(theirs.explained_variance_), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.mean, torch.from_numpy(theirs.mean_), rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.inverse(ours.transform(x)), torch.from_numpy(
        theirs.inverse_transform(theirs.transform(x.numpy()))), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.transform(x).var(0), ours.variance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('kind', [torch.float32, torch.float64])
@pytest.mark.parametrize('rank', [1, 3, 7])
def test_rank_is_found_whatever_the_place_and_the_scale(kind, rank):
    g = torch.Generator().manual_seed(rank)
    for scale, far in ((1., 0.), (1e-3, 0.), (1e4, 0.), (1., 100.)):
        a, b = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((50, rank), (rank, 9)))
        found = pca((scale*a @ b + far).to(kind))
        assert len(found.variance) == rank and found.share.sum() > .999


def test_signs_do_not_depend_on_the_order_of_rows_or_on_the_sign_of_the_table():
    x, _ = table(3)
    turned = pca(x.flip(0), 3).components
    torch.testing.assert_close(turned, pca(x, 3).components, rtol=0, atol=1e-9)
    torch.testing.assert_close(pca(-x, 3).components, pca(x, 3).components, rtol=0, atol=1e-9)
    tie = torch.tensor([[1., -1.], [-1., 1.], [2., -2.]])                   # of equal size: the first is positive
    assert pca(tie).components[0, 0] > 0 > pca(tie).components[0, 1]


@pytest.mark.parametrize('bad, kind, words', [
    (torch.ones(1, 3), ValueError, 'at least 2 rows'), (torch.zeros(0, 3), ValueError, 'at least 2 rows'),
    (torch.ones(5, 0), ValueError, 'at least 2 rows'), (torch.ones(5), ValueError, r'expected shape \(N, D\)'),
    (torch.full((5, 2), 1e8), ValueError, 'got 5 equal ones'), (torch.full((400, 3), .1).double(), ValueError, 'equal'),
    (torch.tensor([[1., 2], [torch.inf, 3]]), ValueError, 'first 1'), (np.ones((3, 3)), TypeError, 'got ndarray')])
def test_tables_that_have_no_directions_are_refused(bad, kind, words):
    with pytest.raises(kind, match=words): pca(bad)
    if not words.endswith(('ones', 'equal')):
        y = torch.arange(len(bad)) % 2
        for f in (lambda x: neighbour_purity(x, y, 1), lambda x: silhouette(x, y), lambda x: tsne(x, 2.)):
            with pytest.raises(kind): f(bad)


def test_whole_numbers_and_gradients_are_taken():
    x = torch.tensor([[1, 2], [3, 5], [9, 4]])
    assert torch.equal(pca(x).components, pca(x.double()).components)
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert not pca(x).components.requires_grad and neighbour_purity(x, torch.arange(9) % 2, 3) >= 0


@pytest.mark.parametrize('k', [0, 8, 2.5, True, '3', -1])
def test_wrong_numbers_of_directions_and_neighbours(k):
    x, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    with pytest.raises(ValueError, match='k: expected 1 to 3, the rank'): pca(x, k)
    with pytest.raises(ValueError, match='k: expected 1 to 7'): neighbour_purity(x, y, k)


@pytest.mark.parametrize('seed', range(20))
def test_silhouette_and_purity_equal_scikit_learn(seed):
    x, y = table(seed)
    torch.testing.assert_close(silhouette(x, y, each=True), torch.from_numpy(silhouette_samples(x.numpy(), y.numpy())),
                               rtol=0, atol=1e-6)
    k = min(7, len(x) - 1)
    near = NearestNeighbors(n_neighbors=k).fit(x.numpy()).kneighbors()[1]
    wanted = (y[torch.from_numpy(near)] == y[:, None]).double().mean().item()
    assert abs(neighbour_purity(x, y, k) - wanted) < 1e-9
    shift, names = x*7 - 100, torch.tensor([9, -4, 70, 2, 5])[y]            # place, scale and names do not matter
    assert abs(silhouette(shift, names) - silhouette(x, y)) < 1e-9
    assert neighbour_purity(shift, names, k) == neighbour_purity(x, y, k)


def test_more_rows_than_a_block():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(700, 3, generator=g).double(), torch.randint(4, (700,), generator=g)
    torch.testing.assert_close(silhouette(x, y, each=True), torch.from_numpy(silhouette_samples(x.numpy(), y.numpy())),
                               rtol=0, atol=1e-6)
    near = NearestNeighbors(n_neighbors=5).fit(x.numpy()).kneighbors()[1]
    assert abs(neighbour_purity(x, y, 5) - (y[torch.from_numpy(near)] == y[:, None]).double().mean().item()) < 1e-9


def test_a_double_counts_and_the_point_itself_does_not():
    x = torch.tensor([[0.], [0.], [0.], [5.]])
    assert neighbour_purity(x, torch.tensor([0, 1, 2, 3]), 1) == 0          # itself at distance 0 is no neighbour
    assert neighbour_purity(x, torch.tensor([0, 0, 0, 1]), 2) == 3/4


def test_chance_is_what_counting_gives():
    x, y = torch.randn(120, 4, generator=torch.Generator().manual_seed(0)), torch.arange(120) % 3
    dealt = by_chance(lambda v: neighbour_purity(x, v, 5), y, 50)
    n = 40
    assert abs(dealt.mean() - (n - 1)/119) < .01
    state = torch.get_rng_state()
    by_chance(lambda v: 0., y)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_shape_has_a_marker_that_is_the_shape():
    side = np.linspace(-1, 1, 21)
    u, v = (g.ravel() for g in np.meshgrid(side, side))
    for name, (distance, _) in SHAPES.items():
        inside, marker = distance(u, v), shape_marker(name)
        assert isinstance(marker, Path)
        polygons = [Path(p) for p in marker.to_polygons()]
        found = sum(p.contains_points(np.stack([u, -v], 1)).astype(int) for p in polygons) % 2
        sure = np.abs(inside) > .05
        assert (found[sure] == (inside < 0)[sure]).all(), name


@pytest.mark.parametrize('seed', range(3))
def test_tsne_is_repeatable_and_leaves_the_random_state_alone(seed):
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(seed))
    before = x.clone(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert torch.equal(tsne(x, 5, seed, 'random'), tsne(x, 5, seed, 'random'))
    assert torch.equal(x, before[0]) and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def few(n=12):
    images = shapes(n, 16, seed=5)
    images = Images(images.x, images.y, images.classes, images.source)
    points = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    near = torch.cdist(points, points).fill_diagonal_(torch.inf).argsort(1)[:, :3]
    return images, points, near


def test_fault_56_a_hundred_figures_are_closed_and_memory_stays_flat():
    images, points, near = few()
    pred, found = images.y.roll(1), Neighbours(near[:1], torch.ones(1, 3))

    def draw(i):
        if i % 20 == 0: return show_point(points, images, pred, near, i % 12, bool(i % 2)).canvas.draw()
        if i % 2: show_thumbnails(points, images, pred != images.y).canvas.draw()
        else: frame_wrong(found, images, images.subset([0])).canvas.draw()

    for i in range(3): draw(i)
    gc.collect()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(100): draw(i)
    assert plt.get_fignums() == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < 60_000      # KB at the peak


def test_fault_56_labels_are_plain_text_and_no_display_is_needed():
    images, points, near = few()
    odd = replace(images, y=images.y.clamp(max=1), classes=(r'$\frac$', '<script>', *images.classes[2:]))
    show_point(points, odd, odd.y, near, 0).canvas.draw()
    fig, ax = plt.subplots()
    draw_map(ax, points, odd.y, odd.classes)
    ax.legend()
    fig.canvas.draw()
    plt.close(fig)
    code = ('import sys, cnnbook.flatmaps; '
            'sys.exit(any(m in sys.modules for m in ("matplotlib.pyplot", "sklearn.manifold", "ipywidgets")))')
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


@pytest.mark.parametrize('call', [
    lambda i, p, n: show_point(p, i, i.y, n, -1), lambda i, p, n: show_point(p, i, i.y, n, 12),
    lambda i, p, n: show_thumbnails(p[:5], i), lambda i, p, n: show_thumbnails(p[:, :1], i)])
def test_fault_56_an_error_leaves_no_figure_open(call):
    with pytest.raises(ValueError, match='expected'): call(*few())
    assert plt.get_fignums() == []
