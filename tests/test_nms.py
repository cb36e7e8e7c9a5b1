"""Quads and suppression: C++ against its Python twins, torchvision and shapely; faults 60 to 63."""
import hashlib
import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision

from cnnbook import boxes as front
from cnnbook.iou import box_iou_numpy
from cnnbook.polygons import quad_iou_python
from cnnbook.suppress import lanms_python, nms_numpy, quad_nms_python

CEXT, REASON = front.load_cext()
needs_cext = pytest.mark.skipif(CEXT is None, reason=f'C++ part not available ({REASON})')
TWINS = dict(box_iou=box_iou_numpy, quad_iou=quad_iou_python, nms=nms_numpy, quad_nms=quad_nms_python,
             lanms=lanms_python)
SQUARE = np.array([(0, 0), (4, 0), (4, 4), (0, 4)], np.float64)


def version(name, cpp): return getattr(CEXT, name) if cpp else TWINS[name]


BOTH = [pytest.param(True, id='cpp', marks=needs_cext), pytest.param(False, id='python')]


def some_boxes(r, n):
    "Boxes that overlap a lot, of sizes that differ a lot; some on a grid, some double, some without area."
    corner = r.uniform(0, 60, (n, 2))
    sides = r.uniform(0, 40, (n, 2))*10.**r.integers(-2, 2, (n, 1))*r.choice([0, 1, 1, 1, 1, 1], (n, 2))
    boxes = np.hstack([corner, corner + sides])
    kind = r.integers(0, 4)
    if kind == 0: boxes = boxes.round()
    if kind == 1: boxes = boxes.repeat(3, 0)[:n]
    return boxes


def some_quads(r, n):
    "Turned rectangles, pushed corners, corners in any order, on a grid, far from the origin, doubled with noise."
    angle = r.uniform(0, 2*np.pi, (n, 1))*r.choice([0, .02, 1])
    x, y = np.array([[-.5, .5, .5, -.5], [-.5, -.5, .5, .5]])[:, None]*r.uniform(1, 40, (2, n, 1))
    quads = np.stack([x*np.cos(angle) - y*np.sin(angle), x*np.sin(angle) + y*np.cos(angle)], -1)      # (n, 4, 2)
    quads += r.uniform(0, 50, (n, 1, 2))*r.choice([1, .2]) + r.choice([0, 0, 1e3, 1e6])
    if r.random() < .3: quads = quads.repeat(3, 0)[:n] + r.uniform(-.3, .3, (n, 4, 2))
    kind = r.integers(0, 6)
    if kind == 0: quads += r.uniform(-.3, .3, quads.shape)*np.ptp(quads, 1, keepdims=True)           # not all are quads
    if kind == 1: quads = quads.round()
    if kind == 2 and n: quads = np.stack([q[r.permutation(4)] for q in quads])
    return quads


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS = [lambda x: x.copy(), lambda x: np.repeat(x, 2, axis=0)[::2], lambda x: np.repeat(x, 3, axis=-1)[..., ::3],
           lambda x: x[::-1].copy()[::-1], np.asfortranarray, read_only, lambda x: x.astype('>f8'),
           lambda x: x.astype('>f4'), lambda x: x.astype('f4'), lambda x: x.astype('f4'),
           lambda x: x.clip(-6e4, 6e4).astype('f2')]


def outcome(f, *args):
    try: out = f(*args)
    except (ValueError, TypeError) as e: return type(e).__name__, str(e)
    return out if isinstance(out, tuple) else (out,)


def equal_rounds(rounds, seed, most):
    "Random rounds of all five functions: equal to the bit, also in their refusals; inputs untouched."
    r, refused = np.random.default_rng(seed), 0
    for k in range(rounds):
        n, m = r.integers(0, most + 1, 2)
        lay = lambda x: LAYOUTS[r.integers(len(LAYOUTS))](x)
        a, b, p, q = lay(some_boxes(r, n)), lay(some_boxes(r, m)), lay(some_quads(r, n)), lay(some_quads(r, m))
        scores = LAYOUTS[r.integers(2)](np.round(r.random(n), int(r.choice([1, 17]))))     # many ties, or none
        t = float(r.choice([0, .1, .3, .5, .9, 1, r.random()]))
        inputs = (a, b, p, q, scores)
        before = [x.tobytes() for x in inputs]
        for name, args in dict(box_iou=(a, b), quad_iou=(p, q), nms=(a, scores, t), quad_nms=(p, scores, t),
                               lanms=(p, scores, t)).items():
            got, want = outcome(getattr(CEXT, name), *args), outcome(TWINS[name], *args)
            same = len(got) == len(want) and all(np.array_equal(x, y) for x, y in zip(got, want))
            assert same, (seed, k, name, args, got, want)
            refused += isinstance(want[0], str)
        assert [x.tobytes() for x in inputs] == before
    return refused


@needs_cext
def test_fault_63_equal_to_the_twins_on_5000_rounds():
    assert 0 < equal_rounds(5000, seed=0, most=4) < 10_000


@needs_cext
@pytest.mark.slow
@pytest.mark.parametrize('seed', [1, 2, 3, 4])
def test_fault_63_equal_to_the_twins_on_100000_rounds(seed):
    equal_rounds(25_000, seed, most=seed + 2)


@needs_cext
@pytest.mark.parametrize('kind', [np.float32, np.float64])
def test_nms_equals_torchvision(kind):
    r = np.random.default_rng(0)
    sizes = [0, 1, 2, 3, 7, *r.integers(10, 300, 40), 999, 1000, 2000, 2000]
    for n in sizes:
        spread = r.choice([30, 100, 1000])
        corner = r.uniform(-spread, spread, (n, 2))
        boxes = np.hstack([corner, corner + r.uniform(0, 60, (n, 2))*r.choice([1, 1, .1, 5], (n, 1))]).astype(kind)
        scores = (r.permutation(n) - n//2).astype(kind)                      # no ties, negative ones too
        for t in (0, .3, .5, .7, float(r.random())):
            want = torchvision.ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), t).numpy()
            assert np.array_equal(front.nms(boxes, scores, t), want)


def skewed(r, n, kind):
    "Sizes and places that are hard on a grid."
    if kind == 'sizes over six decades': sides = 10**r.uniform(-3, 3, (n, 2))
    elif kind == 'a few giants': sides = np.where(r.random((n, 1)) < .01, 5000., 5.)*np.ones((1, 2))
    elif kind == 'long and thin': sides = np.stack([10**r.uniform(1, 3, n), np.full(n, .5)], 1)
    else: sides = np.full((n, 2), 8.)
    place = r.uniform(0, 3*np.sqrt(n)*sides.mean(0).clip(1, 60), (n, 2))
    if kind == 'two far clusters': place += np.where(np.arange(n)[:, None] % 2, 1e9, 0)
    if kind == 'one row': place *= [30, 0]
    if kind == 'the diagonal': place = np.arange(n)[:, None]*np.array([[800., 800]])
    return np.hstack([place, place + sides])


KINDS = ['sizes over six decades', 'a few giants', 'long and thin', 'two far clusters', 'one row', 'the diagonal',
         'even']


@needs_cext
@pytest.mark.parametrize('kind', KINDS)
def test_large_and_skewed_sets_equal_the_twin(kind):
    r = np.random.default_rng(1)
    boxes, scores = skewed(r, 1500, kind), np.round(r.random(1500), 2)
    quads = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    for t in (0, .001, .4, .9):
        assert np.array_equal(CEXT.nms(boxes, scores, t), nms_numpy(boxes, scores, t))
        kept = CEXT.quad_nms(quads, scores, t)                               # the same boxes: at most rounding differs
        assert abs(len(kept) - len(CEXT.nms(boxes, scores, t))) < 3
        table = CEXT.quad_iou(quads[kept[:300]], quads[kept[:300]])
        assert (table[~np.eye(len(table), dtype=bool)] <= t).all()


@needs_cext
@pytest.mark.parametrize('kind', KINDS)
def test_sixteen_times_as_many_do_not_cost_256_times(kind):
    r = np.random.default_rng(2)

    def cost(n):
        boxes, scores, times = skewed(r, n, kind), r.random(n), []
        for _ in range(3):
            start = time.process_time()
            CEXT.nms(boxes, scores, .5)
            times.append(time.process_time() - start)
        return min(times)

    cost(1000)
    assert cost(160_000) < 80*cost(10_000)                                   # more than 16: caches end


@needs_cext
def test_shapely_agrees():
    shapely = pytest.importorskip('shapely')
    r, worst = np.random.default_rng(3), 0
    for _ in range(60):
        a, b = some_quads(r, 12), some_quads(r, 12)
        try: table = CEXT.quad_iou(a, b)
        except ValueError: continue
        p, q = (shapely.convex_hull(shapely.multipoints(x - a[0, 0])) for x in (a, b))               # near the origin
        p = p[:, None]
        want = shapely.area(shapely.intersection(p, q))/shapely.area(shapely.union(p, q))
        worst = max(worst, abs(table - want).max())
    assert worst < 1e-9


@pytest.mark.parametrize('cpp', BOTH)
def test_ties_go_to_the_first_row(cpp):
    boxes = np.array([(0, 0, 4, 4), (0, 0, 4, 4), (9, 9, 12, 12), (1, 0, 5, 4)], np.float64)
    quads = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    for scores in ([1, 1, 1, 1], [0., -0., 0, -0.], [-1, -1, -1, -1], [5e-324]*4):
        for name, x in (('nms', boxes), ('quad_nms', quads)):
            assert version(name, cpp)(x, np.array(scores, float), .5).tolist() == [0, 2]
    order = version('nms', cpp)(boxes[[0, 2, 3]]*[[1], [10], [100]], np.array([-1e300, 1e300, -0.]), .5)
    assert order.tolist() == [1, 2, 0]


@pytest.mark.parametrize('cpp', BOTH)
def test_fault_61_values_of_quads_scores_and_thresholds(cpp):
    good = np.stack([SQUARE, SQUARE + 9])
    one = np.ones(2)

    def refuses(words, quads=good, scores=one, t=.5, name='lanms', kind=ValueError):
        with pytest.raises(kind) as e: version(name, cpp)(quads, scores, t)
        assert str(e.value) == words

    line, arrow = [(0, 0), (1, 1), (2, 2), (3, 3)], [(0, 0), (4, 0), (1, 1), (0, 4)]
    texts = {q: str(tuple(tuple(map(float, p)) for p in x)) for q, x in (('line', line), ('arrow', arrow))}
    refuses(f"quads: expected corners around an area, got {texts['line']} in row 1", np.stack([SQUARE, line]))
    refuses(f"quads: expected a convex quad, got {texts['arrow']} in row 0", np.stack([arrow, SQUARE]), name='quad_nms')
    twice = '((0.0, 0.0), (0.0, 0.0), (4.0, 4.0), (4.0, 4.0))'                                       # 2 distinct points
    refuses(f'quads: expected corners around an area, got {twice} in row 1', np.stack([SQUARE, SQUARE[[0, 0, 2, 2]]]))
    for value, word in ((np.nan, 'nan'), (np.inf, 'inf'), (-1e200, '-1e+200')):
        bad = good.copy()
        bad[1, 3, 1] = value
        refuses(f'quads: expected finite coordinates up to 1e150, got {word} in row 1', bad)
    refuses('quads: expected shape (N, 4, 2), got (2, 8)', good.reshape(2, 8))
    refuses('quads: expected an array of int or float, got bool', good > 0, kind=TypeError)
    refuses('scores: expected shape (2,), got (3,)', scores=np.ones(3))
    refuses('scores: expected shape (2,), got (2, 1)', scores=np.ones((2, 1)), name='quad_nms')
    refuses('scores: expected an array of int or float, got object', scores=one.astype(object), kind=TypeError)
    refuses('scores: expected finite numbers, got nan in row 1', scores=np.array([1, np.nan]), name='quad_nms')
    refuses('scores: expected finite numbers, got -inf in row 0', good[:, 0].repeat(2, 1)[:, [0, 2, 0, 2]],
            np.array([-np.inf, 1]), name='nms')
    refuses('scores: expected numbers from 0 to 1e150, got -0.5 in row 1', scores=np.array([1, -.5]))
    for t, word in ((np.nan, 'nan'), (-.1, '-0.1'), (1.5, '1.5'), (np.inf, 'inf')):
        for name in ('quad_nms', 'lanms'):
            refuses(f'iou_threshold: expected a number from 0 to 1, got {word}', t=t, name=name)
    huge = np.stack([SQUARE, SQUARE + .5])*1e149
    assert version('quad_nms', cpp)(huge, one, .5).tolist() == [0]
    tiny = np.stack([SQUARE, SQUARE + .5])*1e-120
    assert version('quad_nms', cpp)(tiny, one, .5).tolist() == [0]


@pytest.mark.parametrize('cpp', BOTH)
def test_fault_61_what_has_lost_its_digits_is_treated_alike(cpp):
    thin = np.array([(0, 0, 1e-150, 4), (0, 0, 4, 4)])                       # the first has no area
    for boxes in (thin, thin[:, [1, 0, 3, 2]]):
        for scores in ([2., 1], [1., 2]): assert len(version('nms', cpp)(boxes, np.array(scores), 0)) == 2
    for name in ('quad_nms', 'lanms'):
        with pytest.raises(ValueError, match='quads: expected corners around an area'):
            version(name, cpp)(np.stack([SQUARE, SQUARE])*1e-131, np.ones(2), .5)
    assert version('quad_nms', cpp)(np.stack([SQUARE, SQUARE + .5])*1e-129, np.ones(2), .5).tolist() == [0]


@needs_cext
def test_boxes_of_a_few_last_digits_equal_the_twin():
    "Near 2**52 a double counts in ones, so the centre of a box is rounded by as much as half its width."
    far = np.array([(2, 0, 3, 1), (2, 0, 5, 1), (-1, 0, 1, 1)]) + np.array([2.**52, 0, 2.**52, 0])
    assert CEXT.nms(far, np.array([.9, .8, .1]), .3).tolist() == [0, 2]
    r = np.random.default_rng(7)
    for k in range(3000):
        x, w, y = r.integers(0, 12, 8), r.integers(1, 6, 8), np.zeros(8)
        boxes = np.stack([x, y, x + w, y + 1], 1) + np.array([2.**52, 0, 2.**52, 0])*(-1)**k
        scores, t = r.permutation(8)/8, float(r.choice([0, .1, .15, .2, .25, .3, .4, .6]))
        assert np.array_equal(CEXT.nms(boxes, scores, t), nms_numpy(boxes, scores, t)), k


@pytest.mark.parametrize('cpp', BOTH)
def test_fault_63_merging(cpp):
    merge = version('lanms', cpp)
    near = np.stack([SQUARE, SQUARE + [1, 0]])
    quads, scores = merge(near, np.zeros(2), .3)                             # a sum of zero: both count the same
    assert np.array_equal(quads, [SQUARE + [.5, 0]]) and scores.tolist() == [0]
    quads, scores = merge(near, np.array([3, 1]), .3)
    assert np.array_equal(quads, [SQUARE + [.25, 0]]) and scores.tolist() == [4]
    turned = np.stack([near[0], near[1][[2, 3, 0, 1]]])                      # the same corners, begun elsewhere
    assert np.array_equal(merge(turned, np.array([3, 1]), .3)[0], quads)
    backwards = np.stack([near[0], near[1][::-1]])                           # counterclockwise
    assert np.array_equal(merge(backwards, np.array([3, 1]), .3)[0], quads)
    apart = np.stack([SQUARE, SQUARE + 50, SQUARE])                          # only neighbours merge: three runs
    quads, scores = merge(apart, np.array([1., 2, 3]), .3)
    assert scores.tolist() == [3, 2] and np.array_equal(quads, [SQUARE, SQUARE + 50])
    order = np.stack([SQUARE, SQUARE + [2, 0], SQUARE + [1, 0]])             # IoU 1/3, then 3/5 each
    assert merge(order, np.ones(3), .4)[1].tolist() == [2]                   # the second run (at 1.5) drops the first
    assert merge(order[[0, 2, 1]], np.ones(3), .3)[1].tolist() == [3]
    none = merge(np.zeros((0, 4, 2)), np.zeros(0), .5)
    assert none[0].shape == (0, 4, 2) and none[1].shape == (0,)


@pytest.mark.parametrize('kind', [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_the_kind_that_comes_in_goes_out(kind):
    boxes = torch.tensor([[0, 0, 4, 4], [1, 0, 5, 4], [9, 9, 12, 12]]).to(kind)
    quads = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    scores = torch.tensor([1, 2, 3]).to(kind)
    single = kind.is_floating_point and kind != torch.float64
    for x, f in ((boxes, front.nms), (quads, front.quad_nms)):
        rows = f(x, scores, .5)
        assert isinstance(rows, torch.Tensor) and rows.dtype == torch.int64 and rows.tolist() == [2, 1]
    merged, weights = front.lanms(quads, scores, .5)
    assert merged.dtype == weights.dtype == (torch.float32 if single else torch.float64)
    assert weights.tolist() == [3, 3] and merged.shape == (2, 4, 2)
    table = front.quad_iou(quads, quads)
    assert table.dtype == torch.float64 and torch.equal(table, table.T) and table[0, 1] == .6
    assert isinstance(front.nms(boxes.double().numpy(), scores.double().numpy(), .5), np.ndarray)
    assert front.nms([[0, 0, 1, 1]], [1], .5).tolist() == [0]
    with pytest.raises(TypeError, match='scores: expected the kind of boxes, Tensor, got list'):
        front.nms(boxes, [1, 2, 3], .5)
    with pytest.raises(TypeError, match='iou_threshold: expected a number, got NoneType'):
        front.nms(boxes, scores, None)


def busy_work():
    r = np.random.default_rng(5)
    boxes = skewed(r, 60_000, 'even')
    return boxes, r.random(60_000)


@needs_cext
def test_fault_62_the_lock_is_released():
    "While the C++ part works, another thread's Python runs: its clock ticks in the middle of the call."
    boxes, scores = busy_work()
    ticks, stop = [0.], threading.Event()

    def tick():
        while not stop.is_set(): ticks[0] = time.perf_counter()

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(20):
            start = time.perf_counter()
            CEXT.nms(boxes, scores, .5)
            end, last = time.perf_counter(), ticks[0]
            if start + .2*(end - start) < last <= end: break
        else: raise AssertionError('no tick during twenty calls')
    finally:
        stop.set()
        thread.join()


@needs_cext
def test_fault_62_eight_threads_are_right():
    r = np.random.default_rng(6)
    quads, scores = some_quads(np.random.default_rng(11), 300), r.random(300)
    boxes = some_boxes(r, 300)
    right = CEXT.nms(boxes, scores, .5), CEXT.quad_nms(quads, scores, .5), CEXT.lanms(quads, scores, .3)[0]
    mutated, stop = boxes.copy(), threading.Event()

    def churn():
        while not stop.is_set():
            mutated[:, 2:] += 1
            mutated[:, 2:] -= 1

    def work(_):
        for _ in range(20):
            got = CEXT.nms(boxes, scores, .5), CEXT.quad_nms(quads, scores, .5), CEXT.lanms(quads, scores, .3)[0]
            if not all(np.array_equal(x, y) for x, y in zip(got, right)): return False
            if not len(CEXT.nms(mutated, scores, .5)): return False
            try: CEXT.quad_nms(quads*np.nan, scores, .5)
            except ValueError: continue
            return False
        return True

    other = threading.Thread(target=churn)
    other.start()
    try:
        with ThreadPoolExecutor(8) as pool: assert all(pool.map(work, range(8)))
    finally:
        stop.set()
        other.join()


@needs_cext
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2 if hasattr(os, 'sched_getaffinity') else False, reason='one core')
def test_fault_62_eight_threads_are_faster_than_one():
    boxes, scores = busy_work()
    block = b'0'*(len(boxes)*600)

    def times_as_fast(work):
        def seconds(threads):
            start = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool: list(pool.map(work, range(16)))
            return time.perf_counter() - start
        return seconds(1)/seconds(8)

    tries = []                                  # (ours, that of a function which is known to let others run)
    for _ in range(8):
        tries.append((times_as_fast(lambda _: CEXT.nms(boxes, scores, .5)),
                      times_as_fast(lambda _: hashlib.sha256(block).digest())))
        if tries[-1][0] > 1.2: return
    if sum(control > 1.4 for _, control in tries) < 3: pytest.skip(f'other programs use the cores: {tries}')
    raise AssertionError(f'times as fast with eight threads, and hashing beside it: {tries}')


@pytest.mark.skipif(not os.environ.get('CNNBOOK_SANITIZED'), reason='for make sanitize')
def test_fault_63_the_sanitizers_are_in():
    with open(CEXT.__file__, 'rb') as f: built = f.read()
    assert b'__asan_' in built and b'__ubsan_' in built and 'sanitize' in CEXT.__file__


@needs_cext
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_fault_62_a_forked_process_can_call_it():
    boxes, scores = skewed(np.random.default_rng(8), 500, 'even'), np.arange(500.)
    right = CEXT.nms(boxes, scores, .3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)                  # newer Pythons warn of forks with threads
        child = os.fork()
    if not child: os._exit(not np.array_equal(CEXT.nms(boxes, scores, .3), right))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_cext
@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs /proc')
def test_fault_62_memory_stays_flat():
    pages = lambda: int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')
    boxes = skewed(np.random.default_rng(9), 300, 'even')
    quads, scores = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]], np.ones(300)

    def calls(n):
        for _ in range(n):
            CEXT.nms(boxes, scores, .3), CEXT.quad_nms(quads, scores, .3), CEXT.lanms(quads, scores, .3)
            with pytest.raises(ValueError): CEXT.lanms(quads, -scores, .3)

    calls(100)
    before = pages()
    calls(1500)                                                              # 6000 calls of 300 rows
    assert pages() - before < 6e6                                            # one leaked list a call would be 14 MB
