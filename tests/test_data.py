"""What a cell of chapter 01 cannot say: other processes, other worker counts, the network off."""
import os
import shutil
import subprocess
import sys

import pytest
import torch
from gate import ROOT

from cnnbook.data import Augment, Images, Loader, load, shapes, split

CHILD = '''
import hashlib
from cnnbook.data import Augment, Loader, shapes
loader = Loader(shapes(300), 64, Augment(flip=True, shift=2, rotate=10), shuffle=True, seed=3)
loader.set_epoch(2)
print(hashlib.sha256(b''.join(x.numpy().tobytes() + y.numpy().tobytes() for x, y in loader)).hexdigest())
'''


def test_fault_15_labels():
    x = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    for y, kind, words in ((torch.tensor([0, 5, 1]), ValueError, 'got 5 at index 1'),
                           (torch.tensor([0, -1, 1]), ValueError, 'got -1 at index 1'),
                           (torch.eye(3, 2), TypeError, 'int64'), (torch.eye(3, 2).long(), ValueError, 'shape'),
                           (torch.tensor([0., 1, 1]), TypeError, 'int64'),
                           (torch.full((3,), -100), ValueError, 'got -100 at index 0')):
        with pytest.raises(kind, match=words): Images(x, y, ('a', 'b'), 'test')


def test_fault_18_offline_and_nothing_cached(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv('CNNBOOK_OFFLINE')
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    images = load('mnist', root=tmp_path)
    assert 'stand-in for MNIST' in images.source and 'could not be downloaded' in capsys.readouterr().out
    with pytest.raises(OSError, match='offline') as e: load('mnist', root=tmp_path, download=True)
    assert 'sha256' in str(e.value) and str(tmp_path) in str(e.value)
    assert not list(tmp_path.rglob('*-ubyte'))


def test_fault_20_parts_share_nothing():
    world = shapes(400)
    parts = split(world, (.6, .2, .2), seed=1, stratify=True)
    seen = [{img.numpy().tobytes() for img in p.x} for p in parts]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 400


def test_fault_21_same_stream_in_another_process():
    runs = {subprocess.run([sys.executable, '-c', CHILD], capture_output=True, text=True, check=True,
                           env=dict(os.environ, OMP_NUM_THREADS=str(threads))).stdout for threads in (1, 2)}
    scope = {}
    exec(CHILD.replace('print(', 'digest = ('), scope)
    assert runs == {scope['digest'] + '\n'}


def test_loader_leaves_global_random_state_alone():
    before = torch.get_rng_state()
    list(Loader(shapes(50), 16, Augment(flip=True), shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not shutil.which('unshare') or os.getuid() != 0, reason='needs unshare as root')
def test_chapters_run_with_the_network_off(tmp_path):
    "The data chapters in a process that has no network at all, with no data anywhere."
    import gate
    copy = gate.copy_project(ROOT, tmp_path/'book')
    shutil.copytree(ROOT/'data', copy/'data', ignore=lambda d,
                    names: [n for n in names if n not in ('README.md', 'manifest.json')])
    env = {k: v for k, v in os.environ.items() if k not in ('CNNBOOK_OFFLINE', 'CNNBOOK_DATA')}
    env |= {'PYTHONPATH': str(copy), 'HOME': str(tmp_path), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
    code = ('from cnnbook.data import load\nfor name in ("mnist", "fashion_mnist", "cifar10"):\n'
            '    source = load(name, train=False).source\n    assert "stand-in" in source, source\n    print(source)')
    run = subprocess.run(['unshare', '-rn', sys.executable, '-c', code], capture_output=True, text=True, env=env,
                         cwd=copy)
    assert run.returncode == 0 and run.stdout.count('stand-in') >= 3, run.stderr
    test = [os.path.join(os.path.dirname(sys.executable), 'nbdev_test'), '--n_workers', '0', '--path']
    for name in ('01_data.ipynb', '07_mlp.ipynb'):
        run = subprocess.run(['unshare', '-rn', *test, f'nbs/{name}'], capture_output=True, text=True, env=env,
                             cwd=copy)
        assert run.returncode == 0, run.stderr[-3000:]
