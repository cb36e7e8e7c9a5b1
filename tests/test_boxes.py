"""Boxes at the border to C++: faults 60, 61, 62 and 64, on the compiled version and on its twin in Python."""
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnbook.boxes import box_iou, load_cext
from cnnbook.iou import box_iou_numpy

ROOT = Path(__file__).parent.parent
CEXT, REASON = load_cext()
needs_cext = pytest.mark.skipif(CEXT is None, reason=f'C++ part not available ({REASON})')
VERSIONS = [pytest.param(getattr(CEXT, 'box_iou', None), id='cpp', marks=needs_cext),
            pytest.param(box_iou_numpy, id='numpy')]
PLAIN = np.array([[0, 0, 4, 4], [2, 1, 6, 4], [4, 0, 8, 4], [3, 3, 3, 3], [1, 0, 7, 2]], np.float64)


def by_loops(a, b):
    "The definition, pair by pair, in Python's own floats."
    out = np.zeros((len(a), len(b)))
    for i, p in enumerate(np.asarray(a, np.float64).tolist()):
        for j, q in enumerate(np.asarray(b, np.float64).tolist()):
            common = max(0., min(p[2], q[2]) - max(p[0], q[0])) * max(0., min(p[3], q[3]) - max(p[1], q[1]))
            union = (p[2] - p[0])*(p[3] - p[1]) + (q[2] - q[0])*(q[3] - q[1]) - common
            out[i, j] = common/union if union > 0 else 0.
    return out


def some_boxes(r, n):
    "n boxes of many kinds: small and large, far off, on a grid (so that edges touch), without width or area."
    corner = r.uniform(-100, 100, (n, 2)) * 10.**r.integers(-3, 6, (n, 1))
    sides = r.uniform(0, 50, (n, 2)) * 10.**r.integers(-3, 4, (n, 1)) * r.choice([0, 1, 1, 1, 1], (n, 2))
    boxes = np.hstack([corner, corner + sides])
    return np.where(r.random((n, 1)) < .5, np.round(boxes/10), boxes)


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def struct_field(x):
    "The boxes as a field of packed records: the step from row to row is no multiple of the item size."
    records = np.zeros(len(x), np.dtype([('flag', 'i1'), ('box', 'f8', 4), ('label', 'i2')]))
    records['box'] = x
    assert records['box'].strides[0] % 8
    return records['box']


LAYOUTS = {
    'contiguous': lambda x: x.copy(),
    'every second row': lambda x: np.repeat(x, 2, axis=0)[::2],
    'every second column': lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    'reversed': lambda x: x[::-1].copy()[::-1],
    'Fortran': np.asfortranarray,
    'read-only': read_only,
    'broadcast': lambda x: np.broadcast_to(x[:1], (3, 4)),
    'struct field': struct_field,
    'unaligned': lambda x: np.frombuffer(b'.' + x.tobytes(), np.uint8)[1:].view(np.float64).reshape(x.shape),
    'longdouble': lambda x: x.astype(np.longdouble),
} | {kind: (lambda x, kind=kind: x.astype(kind)) for kind in
     ('f8', 'f4', 'f2', '>f8', '>f4', '>f2', 'i8', 'i4', '>i4', 'i2', 'i1', 'u8', 'u4', 'u1', '>u2')}


@pytest.mark.parametrize('iou', VERSIONS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_fault_60_layouts(iou, layout):
    x = LAYOUTS[layout](PLAIN)
    before, plain = x.tobytes(), np.array(x, np.float64)
    single = x.dtype.kind == 'f' and x.itemsize <= 4
    for got in (iou(x, PLAIN), iou(PLAIN, x).T):
        assert got.dtype == np.float64 and np.array_equal(got, by_loops(plain, PLAIN))
    both = iou(x, x)
    assert both.dtype == (np.float32 if single else np.float64) and both.dtype.isnative
    assert np.array_equal(both, by_loops(plain, plain).astype(both.dtype))
    assert x.tobytes() == before


@pytest.mark.parametrize('iou', VERSIONS)
@pytest.mark.parametrize('bad', [
    PLAIN.astype(complex), PLAIN.astype('>c8'), PLAIN.astype(object), PLAIN > 0, PLAIN.astype('U8'), PLAIN.astype('S8'),
    PLAIN.astype('M8[s]'), PLAIN.astype('m8[s]'), np.zeros(3, [('x', 'f8', 4)])], ids=lambda x: str(x.dtype))
def test_fault_60_other_kinds_are_refused(iou, bad):
    for a, b, name in ((bad, PLAIN, 'a'), (PLAIN, bad, 'b')):
        with pytest.raises(TypeError) as e: iou(a, b)
        assert str(e.value) == f'{name}: expected an array of int or float, got {bad.dtype}'


@pytest.mark.parametrize('iou', VERSIONS)
@pytest.mark.parametrize('shape', [(3, 5), (4,), (0,), (), (3, 4, 1), (4, 3), (0, 5)])
def test_fault_60_other_shapes_are_refused(iou, shape):
    for a, b, name in ((np.zeros(shape), PLAIN, 'a'), (PLAIN, np.zeros(shape), 'b')):
        with pytest.raises(ValueError) as e: iou(a, b)
        assert str(e.value) == f'{name}: expected shape (N, 4), got {shape}'


@pytest.mark.parametrize('iou', VERSIONS)
def test_fault_60_no_rows(iou):
    none = np.zeros((0, 4))
    assert iou(none, PLAIN).shape == (0, 5) and iou(PLAIN, none).shape == (5, 0) and iou(none, none).shape == (0, 0)
    assert iou(none.astype('f4'), none.astype('f4')).dtype == np.float32


@pytest.mark.parametrize('iou', VERSIONS)
@pytest.mark.parametrize('box, words', [
    ((0, np.nan, 1, 1), 'expected finite coordinates up to 1e150, got nan in row 2'),
    ((0, 0, np.inf, 1), 'expected finite coordinates up to 1e150, got inf in row 2'),
    ((-np.inf, 0, 1, 1), 'expected finite coordinates up to 1e150, got -inf in row 2'),
    ((0, 0, 1, 1e200), 'expected finite coordinates up to 1e150, got 1e+200 in row 2'),
    ((9, 0, np.nan, -np.inf), 'expected finite coordinates up to 1e150, got nan in row 2'),     # the first in the row
    ((5, 0, 3, 2), 'expected x1 <= x2 and y1 <= y2, got (5.0, 0.0, 3.0, 2.0) in row 2'),
    ((0, .1, 1, -.3), 'expected x1 <= x2 and y1 <= y2, got (0.0, 0.1, 1.0, -0.3) in row 2')])
def test_fault_61_values_name_row_and_value(iou, box, words):
    bad = np.vstack([PLAIN[:2], [box], [(7, 7, np.nan, -7)]])            # row 2 comes first, row 3 is not reached
    with pytest.raises(ValueError) as e: iou(bad, bad)
    assert str(e.value) == f'a: {words}'
    with pytest.raises(ValueError) as e: iou(PLAIN, bad)
    assert str(e.value) == f'b: {words}'


@pytest.mark.parametrize('iou', VERSIONS)
def test_fault_61_values_that_are_boxes(iou):
    huge = np.array([[-3e38, -3e38, 3e38, 3e38], [0, 0, 3e38, 3e38]], np.float32)
    assert np.allclose(iou(huge, huge), [[1, .25], [.25, 1]])
    limit = np.array([[-1e150, -1e150, 1e150, 1e150]])
    assert iou(limit, limit)[0, 0] == 1
    flat = np.array([[1, 1, 1, 1], [0, 0, 2, 0], [0, 0, 0, 2], [0, 0, 2, 2], [-0., -0., 0., 0.]])
    table = iou(flat, flat)
    assert table[3, 3] == 1 and table.sum() == 1                          # whatever has no area: 0, and never NaN
    minus = np.array([[-4, -4, 0, 0]])
    assert iou(minus, minus - 2)[0, 0] == 4/28


@needs_cext
def test_both_versions_are_equal_to_the_bit():
    r = np.random.default_rng(0)
    for round in range(300):
        a, b = (some_boxes(r, int(r.integers(0, 30))) for _ in 'ab')
        if round % 3 == 1: a, b = (np.sort(x.astype('f4').reshape(-1, 2, 2), axis=1).reshape(-1, 4) for x in (a, b))
        table = CEXT.box_iou(a, b)
        assert table.dtype == box_iou_numpy(a, b).dtype and np.array_equal(table, box_iou_numpy(a, b))
        assert np.array_equal(table, CEXT.box_iou(b, a).T) and (table >= 0).all() and (table <= 1).all()
        if round % 10 == 0: assert np.array_equal(table, by_loops(a, b).astype(table.dtype))
        assert np.array_equal(np.diag(CEXT.box_iou(a, a)), np.prod((a[:, 2:] - a[:, :2]).astype('f8'), 1) > 0)


@pytest.mark.parametrize('kind',
                         [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8])
def test_tensors_in_tensors_out(kind):
    x = torch.tensor(PLAIN).to(kind)
    got = box_iou(x, x)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == (torch.float32 if kind.is_floating_point and kind != torch.float64 else torch.float64)
    assert torch.equal(got, torch.tensor(by_loops(PLAIN, PLAIN)).to(got.dtype))
    y = torch.tensor(PLAIN, requires_grad=True)
    assert not box_iou(y.t().contiguous().t(), y).requires_grad and y.grad is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA here')
def test_tensors_stay_on_their_device():
    x = torch.tensor(PLAIN, device='cuda')
    assert box_iou(x, x).device == x.device and np.array_equal(box_iou(x, x).cpu(), by_loops(PLAIN, PLAIN))
    with pytest.raises(ValueError, match='b: expected the device of a, cuda:0, got cpu'): box_iou(x, x.cpu())


def test_lists_and_mixed_kinds():
    assert np.array_equal(box_iou(PLAIN.tolist(), PLAIN), by_loops(PLAIN, PLAIN))
    with pytest.raises(ValueError, match='b: expected shape .N, 4., got a ragged list') as e:
        box_iou(PLAIN, [[0, 0, 1], [1]])
    assert e.value.__cause__ is not None
    with pytest.raises(TypeError, match='b: expected the kind of a, Tensor, got list'):
        box_iou(torch.tensor(PLAIN), [[0, 0, 1, 1]])
    with pytest.raises(TypeError, match='a: expected an array of int or float, got object'): box_iou(None, PLAIN)
    with pytest.raises(TypeError, match='a: expected an array of int or float, got bool'):
        box_iou(torch.ones(2, 4) > 0, torch.ones(2, 4))


@needs_cext
def test_fault_62_threads_and_lifetimes():
    r = np.random.default_rng(0)
    boxes, stop, odd = np.hstack([x := r.uniform(0, 99, (200, 2)), x + 9]), threading.Event(), []
    fixed = boxes.copy()
    right = by_loops(fixed[:40], fixed[:40])

    def churn():
        while not stop.is_set():
            boxes[:, 2:] += 1
            boxes[:, 2:] -= 1

    def work():
        for _ in range(150):
            table = CEXT.box_iou(boxes, boxes)                            # changes meanwhile: any good table will do
            if not ((table >= 0) & (table <= 1)).all(): odd.append('out of range')
            if not np.array_equal(CEXT.box_iou(fixed[:40], fixed[:40]), right): odd.append('wrong')
            try: CEXT.box_iou(fixed, fixed*np.nan)
            except ValueError: continue
            odd.append('no error')

    threads = [threading.Thread(target=f) for f in (churn, *[work]*7)]
    for t in threads: t.start()
    for t in threads[1:]: t.join()
    stop.set()
    threads[0].join()
    assert not odd
    table = CEXT.box_iou(fixed[:40].copy(), fixed[:40].copy())             # the inputs are gone now
    gc.collect()
    assert np.array_equal(table, right) and table.flags.owndata and table.flags.writeable


@needs_cext
def test_fault_62_memory_stays_flat():
    pages = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    if not Path('/proc/self/statm').exists(): pytest.skip('needs /proc')
    x, bad = np.tile(PLAIN, (20, 1)), np.full((100, 4), np.nan)

    def calls(n):
        for _ in range(n):
            CEXT.box_iou(x, x)
            with pytest.raises(ValueError): CEXT.box_iou(x, bad)

    calls(300)
    before = pages()
    calls(3000)
    assert pages() - before < 8e6                                          # one leaked table a call would be 240 MB


SCRIPT = '''
import json, sys, warnings
import cnnbook
warnings.simplefilter('always')
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    from cnnbook.boxes import box_iou, lanms, load_cext, nms, quad_iou, quad_nms
    imported = len(caught)
    table = [box_iou([[0, 0, 4, 4]], [[2, 1, 6, 4]]).tolist() for _ in range(3)]
    boxes, scores = [[0, 0, 4, 4], [1, 0, 5, 4], [9, 9, 12, 12]], [.5, 1, 2]
    quads = [[[a, b], [c, b], [c, d], [a, d]] for a, b, c, d in boxes]
    others = [nms(boxes, scores, .3).tolist(), quad_nms(quads, scores, .3).tolist(), quad_iou(quads, quads)[0].tolist(),
              *[x.tolist() for x in lanms(quads, scores, .3)]]
try: box_iou([[5, 0, 3, 2]], [[0, 0, 1, 1]])
except ValueError as e: error = str(e)
print(json.dumps(dict(home=cnnbook.__file__, imported=imported, table=table, error=error, others=others,
                      built=load_cext()[0] is not None,
                      said=[(str(w.message), w.category.__name__, w.filename) for w in caught])))
'''


def run_copy(folder, name, content):
    "Run SCRIPT in a fresh interpreter on a copy of the package whose compiled part is this file, or missing."
    package = folder/'cnnbook'
    shutil.copytree(ROOT/'cnnbook', package, ignore=shutil.ignore_patterns('*.so', '*.pyd', '__pycache__'))
    if name: (package/name).write_text(content)
    env = os.environ | {'PYTHONPATH': str(folder), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', SCRIPT], cwd=folder, env=env, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert Path(said['home']).parent == package
    return said


@pytest.mark.parametrize('name, content, words', [
    ('', '', f'not built for Python {sys.version_info.major}.{sys.version_info.minor}'),
    (f'_cext{EXTENSION_SUFFIXES[0]}', 'this is text, not a library\n'*50, 'ImportError'),
    ('_cext.py', 'box_area = None\n', 'built from older sources')], ids=['missing', 'text', 'older'])
def test_fault_64_without_the_compiled_part(tmp_path, name, content, words):
    said = run_copy(tmp_path, name, content)
    assert said['imported'] == 0 and not said['built']                     # importing is quiet, the first call speaks
    [(message, kind, file)] = said['said']                                 # and only the first
    assert message.startswith('C++ part not available (') and message.endswith('); using slow Python version')
    assert words in message and '\n' not in message and kind == 'RuntimeWarning'
    assert file == '<string>'                                              # the warning points at the caller's line
    assert said['table'] == [[[6/22]]]*3
    left = 2/3                                                             # (1*.5 + 2*1)/(.5 + 1) less one
    square = lambda x, y, side: [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]
    assert said['others'] == [[2, 1], [2, 1], [1, .6, 0], [square(9, 9, 3), square(left, 0, 4)], [2, 1.5]]
    assert said['error'] == 'a: expected x1 <= x2 and y1 <= y2, got (5.0, 0.0, 3.0, 2.0) in row 0'


@pytest.mark.parametrize('required', ['0', '1'])
def test_fault_64_without_a_compiler_the_build_says_what_to_install(tmp_path, required):
    for name in ('setuptools', 'pybind11'): pytest.importorskip(name)
    env = os.environ | {'CC': 'no-such-compiler', 'CXX': 'no-such-compiler', 'CNNBOOK_REQUIRE_CEXT': required}
    done = subprocess.run([sys.executable, 'setup.py', 'build_ext', '--force', '--build-temp', str(tmp_path/'temp'),
                           '--build-lib', str(tmp_path/'lib')], cwd=ROOT, env=env, capture_output=True, text=True)
    assert 'apt-get install g++ python3-dev' in done.stdout + done.stderr
    assert (done.returncode != 0) == (required == '1') and not list(tmp_path.rglob('_cext*'))


@needs_cext
def test_nothing_is_said_when_it_is_built():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert box_iou([[0, 0, 4, 4]], [[2, 1, 6, 4]])[0, 0] == 6/22


def test_the_chapter_quotes_the_sources():
    chapter = json.loads((ROOT/'nbs'/'21_boxes.ipynb').read_text(encoding='utf-8'))
    prose = '\n'.join(''.join(c['source']) for c in chapter['cells'] if c['cell_type'] == 'markdown')
    sources = '\n'.join(p.read_text(encoding='utf-8') for p in (ROOT/'cext').iterdir())
    quotes = re.findall(r'```cpp\n(.*?)```', prose, re.DOTALL)
    assert len(quotes) >= 4
    for quote in quotes: assert quote in sources, quote


def test_geometry_knows_nothing_of_python():
    for path in (ROOT/'cext').iterdir():
        if path.name != 'bind.cpp':
            assert not re.search(r'pybind|Python\.h|PyObject', path.read_text(encoding='utf-8')), path.name


@pytest.mark.skipif(not shutil.which('g++'), reason='no g++ here')
def test_the_compiler_has_nothing_to_say():
    pybind11 = pytest.importorskip('pybind11')
    import sysconfig
    includes = ['-I', str(ROOT/'cext'), '-isystem', pybind11.get_include(), '-isystem',
                sysconfig.get_paths()['include']]
    if not Path(sysconfig.get_paths()['include'], 'Python.h').exists(): pytest.skip('no Python.h here')
    strict = '-std=c++17 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror -fsyntax-only -fvisibility=hidden'
    done = subprocess.run(['g++', *strict.split(), *includes, *map(str, sorted((ROOT/'cext').glob('*.cpp')))],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
