"""What the chapter's cells do not say of `cnnbook.formats`: every damage, old and new pickles, and the real files."""
import os
import pickle
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from cnnbook import formats
from cnnbook.formats import read_cifar, read_idx, write_idx

CHECKS = [formats.check_header, formats.check_byte_order, formats.check_plane_index, formats.check_names]
FAILS = (ValueError, pickle.UnpicklingError)


def batch(n=2, protocol=4, **more):
    rows = np.arange(n*3072).astype(np.uint8).reshape(n, 3072)
    return pickle.dumps({'labels': [k % 10 for k in range(n)], 'data': rows, **more}, protocol=protocol)


def python2(n=1):
    "A batch as Python 2 and the numpy of that time wrote it: text and bytes alike, protocol 2."
    text = lambda s: b'U' + bytes([len(s)]) + s
    body = bytes(range(256))*12*n
    kind = (b'cnumpy\ndtype\n' + text(b'u1') + b'K\0K\1\x87R(K\3' + text(b'|')
            + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb')
    array = (b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85' + text(b'b') + b'\x87R(K\1K' + bytes([n])
             + b'M\0\x0c\x86' + kind + b'\x89T' + struct.pack('<i', len(body)) + body + b'tb')
    return b'\x80\2}(' + text(b'labels') + b'](' + b'K\7'*n + b'e' + text(b'data') + array + b'u.'


@pytest.mark.parametrize('shape', [(1,), (5,), (3, 4), (2, 3, 4), (2, 1, 5, 3), (1,)*8, (300, 2)])
def test_idx_round_trip(tmp_path, shape):
    x = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_idx(tmp_path/'x', x)
    assert torch.equal(read_idx(str(tmp_path/'x')), x) and os.listdir(tmp_path) == ['x']
    if len(shape) <= 3:
        assert torch.equal(torchvision.datasets.mnist.read_sn3_pascalvincent_tensor(str(tmp_path/'x')), x)
    read_idx(tmp_path/'x').zero_()                       # may be written to, and the file stays
    assert torch.equal(read_idx(tmp_path/'x'), x)


def test_idx_every_cut_and_every_change_of_the_header(monkeypatch):
    raw = bytes([0, 0, 8, 3]) + struct.pack('>III', 2, 2, 3) + bytes(range(12))
    monkeypatch.setattr(formats, 'Path', lambda b: types.SimpleNamespace(name='f', read_bytes=lambda: b))
    read = read_idx                                      # of bytes now, so that 4,000 files need no disk
    assert read(raw).shape == (2, 2, 3)
    bad = [raw[:k] for k in range(len(raw))]
    bad += [raw[:at] + bytes([v]) + raw[at + 1:] for at in range(16) for v in range(256) if v != raw[at]]
    bad += [b'\0\0\x08' + bytes([n]) + b'\xff'*4*n for n in (0, 1, 9, 255)]
    bad += [b'\0\0\x08\4' + struct.pack('>IIII', 0, *[2**32 - 1]*3), b'\0\0\x08\1\0\0\0\0']
    for b in bad:
        with pytest.raises(ValueError, match='f: expected an idx file of bytes, got .*byte|one of'): read(b)


@pytest.mark.parametrize('name', [*formats._OTHERS.values()])
def test_idx_other_types_are_named(tmp_path, name):
    number = {v: k for k, v in formats._OTHERS.items()}[name]
    (tmp_path/'x').write_bytes(bytes([0, 0, number, 1, 0, 0, 0, 1]) + bytes(np.dtype(name).itemsize))
    read = torchvision.datasets.mnist.read_sn3_pascalvincent_tensor(str(tmp_path/'x'))
    assert read.dtype == getattr(torch, name)            # the number means that type to others as well
    with pytest.raises(ValueError, match=f'got one of {name} '): read_idx(tmp_path/'x')


def test_write_idx_takes_any_layout_and_leaves_nothing_behind(tmp_path):
    x = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    for same in (x.permute(1, 2, 0), x[:, ::2], x[:1].expand(3, 3, 4), x.flip(0)):
        write_idx(tmp_path/'x', same)
        assert torch.equal(read_idx(tmp_path/'x'), same)
    for bad in (torch.tensor(3, dtype=torch.uint8), x.float(), x[:0], [1, 2]):
        with pytest.raises((TypeError, ValueError), match='x: expected'): write_idx(tmp_path/'y', bad)
    assert os.listdir(tmp_path) == ['x']


@pytest.mark.parametrize('protocol', [3, 4])
def test_cifar_of_python_3(tmp_path, protocol):
    (tmp_path/'b').write_bytes(batch(3, protocol, filenames=['ä.png', b'x'], batch_label=None))
    x, y = read_cifar(tmp_path/'b')
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.uint8 and y.tolist() == [0, 1, 2] and y.dtype == torch.int64
    assert torch.equal(x.flatten(), torch.arange(3*3072).to(torch.uint8)) and x.add_(1).shape == x.shape


def test_cifar_of_python_2(tmp_path):
    (tmp_path/'b').write_bytes(python2(3))
    x, y = read_cifar(str(tmp_path/'b'))
    with open(tmp_path/'b', 'rb') as f: theirs = pickle.load(f, encoding='latin1')        # our own file
    assert torch.equal(x.flatten(1), torch.from_numpy(theirs['data'])) and y.tolist() == [7]*3
    assert x[1, 2, 31, 31] == 255


def test_cifar_names_that_are_refused(tmp_path):
    codecs, newest = batch(protocol=2), batch(protocol=5)
    long = b'\x80\4\x8c\xff' + b'\x1b'*255 + b'\x8c\1x\x93.'
    for raw, words in [(codecs, '_codecs.encode'), (newest, r'_frombuffer'), (long, r'got \\x1b'),
                       (b'cbuiltins\neval\n(S"1"\ntR.', 'builtins.eval'), (b'(S"true"\nios\nsystem\n.', 'os.system'),
                       (b'\x80\4\x8c\5numpy\x8c\x11ndarray.__class__\x93.', r'numpy.ndarray.__class__')]:
        (tmp_path/'b').write_bytes(raw)
        with pytest.raises(pickle.UnpicklingError, match=f'^b: refused: .*{words}.*; nothing was run$') as e:
            read_cifar(tmp_path/'b')
        assert len(str(e.value)) < 200


def test_a_hostile_file_changes_nothing_for_the_next(tmp_path):
    note = b'cnumpy\ndtype\n'
    kept = dict(vars(formats._Note))
    for raw in [note + b'}S"given"\nI5\nsb.', note + b'N}S"state"\nI5\ns\x86b.', note + b')\x81.',
                b'\x80\2' + note + b'(I1\nI2\ntR.', b'}S"data"\n' + note + b'sS"labels"\n]s.',
                b'}S"data"\n' + note + b')RsS"labels"\n]s.',
                b'Pid\n.', b'\x82\1.', b'\x80\5\x97.', b'.', b'0.', b'\x80\x09N.', b'']:
        (tmp_path/'b').write_bytes(raw)
        with pytest.raises(FAILS, match='^b: '): read_cifar(tmp_path/'b')
    assert dict(vars(formats._Note)) == kept and formats._Note.given == ()
    (tmp_path/'b').write_bytes(batch())
    assert len(read_cifar(tmp_path/'b')[0]) == 2


@pytest.mark.parametrize('raw', [batch(1), python2()], ids=['python3', 'python2'])
def test_cifar_cut_or_flipped_anywhere_reads_or_says_so(tmp_path, raw):
    body = raw.index(bytes(range(250)))
    program = [k for k in range(len(raw)) if not body + 20 < k < body + 3000]
    rng, ok = np.random.default_rng(0), 0
    for k in program:
        for bad in (raw[:k], raw[:k] + bytes([raw[k] ^ rng.integers(1, 256)]) + raw[k + 1:]):
            (tmp_path/'b').write_bytes(bad)
            try: x, y = read_cifar(tmp_path/'b')
            except FAILS as e: assert str(e).startswith('b: ') and len(str(e)) < 250
            else: ok += x.shape[1:] == (3, 32, 32) and len(x) == len(y)
    assert ok                                            # a changed pixel or label is no damage that can be seen


@pytest.mark.skipif(sys.platform != 'linux', reason='needs RLIMIT_AS')
def test_a_damaged_number_takes_no_gigabytes(tmp_path):
    (tmp_path/'b').write_bytes(b'\x80\2Nr\xff\xff\xff\x7f.')
    code = ('import resource, sys; from cnnbook.formats import read_cifar\n'
            'resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))\n'
            'try: read_cifar(sys.argv[1])\nexcept ValueError as e: print(e)\n'
            'high = [w.split()[1] for w in open("/proc/self/status") if w.startswith("VmHWM")]\n'  # ru_maxrss
            'print(int(high[0]) < 2_000_000)')                                                # holds the parent's too
    out = subprocess.run([sys.executable, '-c', code, tmp_path/'b'], capture_output=True, text=True, timeout=60)
    assert out.stdout == 'b: expected the keys data and labels, got no dictionary\nTrue\n', out


def test_missing_file_is_an_ordinary_error(tmp_path):
    for read in (read_idx, read_cifar):
        with pytest.raises(FileNotFoundError): read(tmp_path/'none')


@pytest.mark.parametrize('check', CHECKS, ids=lambda c: c.__name__)
def test_checks_accept_their_solution_and_name_the_mistake(check):
    assert check.judge(check.solution)
    for answer, words in check.wrong:
        verdict = check.judge(answer)
        assert verdict.passed is False and words in verdict.message, verdict


@pytest.mark.real
@pytest.mark.skipif(not os.environ.get('CNNBOOK_DATA'), reason='CNNBOOK_DATA is not set')
def test_real_files_equal_torchvision():
    root = Path(os.environ.get('CNNBOOK_DATA', ''))
    for name in ('MNIST', 'FashionMNIST'):
        theirs = getattr(torchvision.datasets, name)(root, train=True, download=False)
        images, labels = (root/name/'raw'/f'train-{kind}-ubyte' for kind in ('images-idx3', 'labels-idx1'))
        assert images.stat().st_size == 47_040_016
        x, y = read_idx(images), read_idx(labels)
        assert x.shape == (60_000, 28, 28) and torch.equal(x[[0, -1]], theirs.data[[0, -1]])
        assert torch.equal(y.long(), theirs.targets)
    theirs = torchvision.datasets.CIFAR10(root, train=False, download=False)
    x, y = read_cifar(root/'cifar-10-batches-py'/'test_batch')
    assert x.shape == (10_000, 3, 32, 32) and y.tolist() == theirs.targets
    for k in (0, -1): assert np.array_equal(x[k].permute(1, 2, 0).numpy(), theirs.data[k])
    with pytest.raises(ValueError, match='got label_names, num_cases_per_batch, num_vis'):
        read_cifar(root/'cifar-10-batches-py'/'batches.meta')
