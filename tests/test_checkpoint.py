"""Checkpoints and run folders under fire: faults 22-27, 31, 32, 45 and 48, with real kills, limits and rights."""
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cnnbook
from cnnbook.checkpoint import (
    CheckpointError,
    DamagedError,
    load_checkpoint,
    newest_checkpoint,
    random_state,
    run_lock,
    save_checkpoint,
    set_random_state,
    verify_weights,
)
from cnnbook.disk import PART

posix = pytest.mark.skipif(os.name == 'nt', reason='POSIX signals, limits and rights')


FORKS = '''
import json, os, sys, traceback
import cnnbook.checkpoint
for line in sys.stdin:
    code, args, out, env = json.loads(line)
    if run := os.fork():
        print(run, flush=True)
        print(os.waitpid(run, 0)[1], flush=True)
        continue
    for number, name in ((1, 'out'), (2, 'err')): os.dup2(os.open(f'{out}/{name}', os.O_CREAT | os.O_WRONLY), number)
    sys.argv, status = ['', *args], 1
    os.environ.update(env)
    try:
        exec(code, {'__name__': '__main__'})
        status = 0
    except BaseException: traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)
'''


class Forks:
    "Runs code in processes of their own, forked from one that has imported torch already: an import takes seconds."
    def __init__(self):
        self.server = subprocess.Popen([sys.executable, '-c', FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})

    def start(self, code, *args, **env):
        self.out = Path(tempfile.mkdtemp())
        os.chmod(self.out, 0o755)
        print(json.dumps([code, [str(a) for a in args], str(self.out), env]), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def wait(self):
        "The status of the process, and what it wrote."
        status = int(self.server.stdout.readline())
        out, err = ((self.out/name).read_text() for name in ('out', 'err'))
        shutil.rmtree(self.out)
        return status, out, err

    def run(self, code, *args, **env):
        self.start(code, *args, **env)
        return self.wait()[1:]

    def close(self):
        self.server.communicate()


@pytest.fixture(scope='module')
def forks():
    with contextlib.closing(Forks()) as f: yield f


def equal(a, b):
    "The same types and values, NaN equal to itself."
    if isinstance(a, torch.Tensor):
        return type(b) is torch.Tensor and a.dtype == b.dtype and a.shape == b.shape and repr(a) == repr(b)
    if type(a) is not type(b): return False
    if isinstance(a, dict): return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return repr(a) == repr(b)


def sealed(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


LEAVES = [lambda r: r.choice([None, True, False, 0, -1, 2**31, -2**63, 2**64, 2**1998, -2**1998]),
          lambda r: r.choice([0., -0., 1e-320, float('inf'), float('nan'), r.random()]),
          lambda r: r.choice(['', 'a', 'ä\n', '\U0001F600', '\ud800', 'x'*70_000]),
          lambda r: torch.randn(r.choice([(), (0,), (3,), (2, 0, 1), (2, 2)])).to(
              r.choice([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8,
                        torch.bool]))]


def nested(r, depth):
    "Random plain data."
    kind = r.randrange(4) if depth else 3
    if kind == 3: return r.choice(LEAVES)(r)
    items = [nested(r, depth - 1) for _ in range(r.randrange(5))]
    return [items, tuple(items), {r.choice([i, f'k{i}', -i - 2**40]): v for i, v in enumerate(items)}][kind]


def test_random_plain_data_comes_back_as_it_was(tmp_path):
    r = random.Random(0)
    for _ in range(100):
        state = {'a': nested(r, 4), 1: nested(r, 2)}
        got = load_checkpoint(save_checkpoint(tmp_path/'a.ckpt', state))
        assert got.pop('cnnbook_format') == 1 and got.pop('cnnbook_version') == cnnbook.__version__
        assert equal(state, got)


LOOP = '''
import sys, torch
from cnnbook.checkpoint import save_checkpoint
n = int(sys.argv[2])
while True:
    n += 1
    save_checkpoint(sys.argv[1], {'n': n, 'w': torch.full((300_000,), float(n))})
'''


def kill_rounds(forks, folder, rounds):
    "Kill a process that saves in a loop; the file must be whole each time, and never older than before."
    r, path, last, during = random.Random(0), folder/'a.ckpt', 0, 0
    save_checkpoint(path, {'n': 0, 'w': torch.zeros(300_000)})
    for _ in range(rounds):
        run = forks.start(LOOP, path, last)
        time.sleep(r.random()*.2)
        os.kill(run, signal.SIGKILL)
        assert forks.wait() == (int(signal.SIGKILL), '', '')
        state = load_checkpoint(path)
        assert state['n'] >= last and bool((state['w'] == state['n']).all()) and len(state['w']) == 300_000
        last, left = state['n'], [p for p in folder.iterdir() if p.name.endswith(PART)]
        during += len(left)
        for p in left: p.unlink()
        assert [p.name for p in folder.iterdir()] == ['a.ckpt']
    return last, during


@posix
def test_fault_22_killed_in_mid_save(forks, tmp_path):
    kill_rounds(forks, tmp_path, 3)


@posix
@pytest.mark.slow
def test_fault_22_killed_in_mid_save_fifty_times(forks, tmp_path):
    last, during = kill_rounds(forks, tmp_path, 50)
    assert last > 3 and during > 5                           # the kills did come in the middle of a save


LIMITED = '''
import json, resource, sys, torch
from cnnbook.checkpoint import load_checkpoint, save_checkpoint
path, said = sys.argv[1] + '/a.ckpt', []
save_checkpoint(path, {'n': 1, 'w': torch.ones(100_000)})
for limit in (400_000, 200_000, 4096, 100, 1, 0):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for name in ('a.ckpt', 'new.ckpt'):
        try: save_checkpoint(f'{sys.argv[1]}/{name}', {'n': 2, 'w': torch.ones(100_000)})
        except OSError as e: said.append((e.errno, str(e), type(e.__cause__).__name__))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert load_checkpoint(path)['n'] == 1
save_checkpoint(path, {'n': 3})
print(json.dumps(said))
'''


@posix
def test_fault_23_disk_full(forks, tmp_path):
    import errno
    out, err = forks.run(LIMITED, tmp_path)
    assert err == ''
    said = json.loads(out)
    assert len(said) == 12 and {s[0] for s in said} == {errno.EFBIG} and {s[2] for s in said} == {'OSError'}
    for _, old, _ in said[::2]:
        assert f'cannot save {tmp_path}/a.ckpt: 0.5 MB needed, ' in old
        assert 'MB free; the previous checkpoint is kept' in old
    for _, new, _ in said[1::2]: assert 'new.ckpt: 0.5 MB needed, ' in new and 'nothing was written' in new
    assert [p.name for p in tmp_path.iterdir()] == ['a.ckpt'] and load_checkpoint(tmp_path/'a.ckpt')['n'] == 3


READ_ONLY = '''
import os, sys
from cnnbook.checkpoint import load_checkpoint, save_checkpoint
path = sys.argv[1] + '/shut/a.ckpt'
save_checkpoint(path, {'n': 1})                           # whatever Python imports late is imported now
load_checkpoint(path)
os.chmod(path, 0o644)
os.chmod(sys.argv[1] + '/shut', 0o555)
try:
    if os.geteuid() == 0: os.setegid(65534), os.seteuid(65534)
except OSError: sys.exit('no other user here')           # in a user namespace of one
for name in ('shut/a.ckpt', 'shut/new/b.ckpt'):
    try: save_checkpoint(f'{sys.argv[1]}/{name}', {'n': 2})
    except PermissionError as e: print(e)
print(load_checkpoint(path)['n'])
'''


def test_fault_23_the_first_error_is_told_and_all_bytes_are_counted():
    "torch's C++ would bury an error that our write raises; Ctrl-C comes through as well."
    from cnnbook.checkpoint import _Digest

    class Broken:
        def __init__(self, error): self.error = error
        def write(self, data): raise self.error
    for error in (OSError(28, 'full'), KeyboardInterrupt(), MemoryError()):
        out = _Digest(Broken(error))
        torch.save({'w': torch.zeros(1000)}, out)
        assert out.error is error and out.count > 4000


@posix
def test_fault_24_read_only_folder(forks):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        out, err = forks.run(READ_ONLY, folder)
        os.chmod(f'{folder}/shut', 0o755)
        if 'no other user here' in err: pytest.skip('root of a namespace without other users')
        assert err == ''
        old, new, n = out.splitlines()
        assert f'cannot save {folder}/shut/a.ckpt: Permission denied; the previous checkpoint is kept' in old
        assert f'cannot save {folder}/shut/new/b.ckpt: Permission denied; nothing was written' in new and n == '1'


def test_fault_24_folder_gone_and_links(tmp_path):
    path = save_checkpoint(tmp_path/'run'/'a.ckpt', {'n': 1})
    shutil.rmtree(path.parent)
    assert load_checkpoint(save_checkpoint(path, {'n': 2}))['n'] == 2           # the folder is made again
    with pytest.raises(IsADirectoryError, match='cannot save .*run: this is a folder'): save_checkpoint(path.parent, {})
    if os.name == 'nt': return
    (tmp_path/'last.ckpt').symlink_to(path)
    save_checkpoint(tmp_path/'last.ckpt', {'n': 3})
    assert (tmp_path/'last.ckpt').is_symlink() and load_checkpoint(path)['n'] == 3
    assert stat.S_ISREG(path.lstat().st_mode)


def test_fault_25_a_thousand_flips_and_cuts(tmp_path):
    path, r = tmp_path/'net.ckpt', random.Random(0)
    state = {'w': torch.arange(50.), 'epoch': 3, 'names': ['a', 'b'], 'best': .5}
    data = save_checkpoint(path, state).read_bytes()
    assert len(data) < 3000
    flips = [r.randrange(8*len(data)) for _ in range(700)]
    hurt = [data[:b//8] + bytes([data[b//8] ^ 1 << b % 8]) + data[b//8 + 1:] for b in flips]
    hurt += [data[:r.randrange(len(data))] for _ in range(150)] + [data[r.randrange(1, len(data)):] for _ in range(50)]
    hurt += [data + r.randbytes(r.randrange(1, 99)) for _ in range(50)]
    cuts = [sorted(r.sample(range(len(data) + 1), 2)) for _ in range(50)]
    hurt += [data[:a] + bytes(b - a) + data[b:] for a, b in cuts]               # a hole, as after a power cut
    hurt = [h for h in hurt if h != data]
    assert len(hurt) > 990
    for h in hurt:
        path.write_bytes(h)
        with pytest.raises(DamagedError, match='net.ckpt is (damaged|not a cnnbook)') as e: load_checkpoint(path)
        assert '\n' not in str(e.value)
    path.write_bytes(data)
    assert equal(load_checkpoint(path)['w'], state['w'])


def test_fault_25_torch_reads_ours_and_every_bit_counts(tmp_path):
    path = save_checkpoint(tmp_path/'a.ckpt', {'w': torch.arange(3)})
    data = path.read_bytes()
    assert equal(torch.load(path, weights_only=True)['w'], torch.arange(3))
    for bit in range(8*(len(data) - 60), 8*len(data)):                         # all of the last 60 bytes
        path.write_bytes(data[:bit//8] + bytes([data[bit//8] ^ 1 << bit % 8]) + data[bit//8 + 1:])
        with pytest.raises(DamagedError): load_checkpoint(path)


def test_fault_25_falls_back_to_the_newest_whole_one(tmp_path, capsys):
    for n in range(5): save_checkpoint(tmp_path/f'{n}.ckpt', {'global_step': n})
    for n, data in ((4, b''), (3, (tmp_path/'3.ckpt').read_bytes()[:-9])): (tmp_path/f'{n}.ckpt').write_bytes(data)
    (tmp_path/'9.ckpt').write_bytes(sealed({'cnnbook_format': 999, 'cnnbook_version': '2', 'global_step': 9}))
    (tmp_path/'folder.ckpt').mkdir()
    save_checkpoint(tmp_path/'odd.ckpt', {'global_step': 'many'})
    path, state = newest_checkpoint(tmp_path)
    assert path.name == '2.ckpt' and state['global_step'] == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith('passed over: ') for line in lines)
    for name in ('3.ckpt', '4.ckpt', '9.ckpt'): assert sum(name in line for line in lines) == 1


HOSTILE = '''
import os, sys
from cnnbook.checkpoint import CheckpointError, load_checkpoint
for name in sys.argv[1:]:
    try: load_checkpoint(name)
    except CheckpointError as e: print(e)
'''


@posix
def test_fault_26_hostile_pickle(forks, tmp_path):
    "Also when the environment asks torch to trust every file."
    class Run:
        def __init__(self, f, *args): self.call = f, args
        def __reduce__(self): return self.call
    mark = tmp_path/'it-ran'
    leave = f'open({str(mark)!r}, "w")'
    calls = [Run(os.system, f'echo > {mark}'), Run(eval, leave), Run(exec, leave), Run(open, str(mark), 'w'),
             Run(subprocess.run, ['touch', str(mark)]), Run(Path.touch, mark)]
    for i, call in enumerate(calls):
        state = {'cnnbook_format': 1, 'w': torch.ones(2), 'x': call}
        (tmp_path/f'{i}.ckpt').write_bytes(sealed(state))
    import pickle
    bare = pickle.dumps(calls[0], protocol=2)                                   # no zip at all, but a correct digest
    (tmp_path/'6.ckpt').write_bytes(bare + hashlib.sha256(bare).digest())
    names = [tmp_path/f'{i}.ckpt' for i in range(7)]
    out, err = forks.run(HOSTILE, *names, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD='1')
    assert err == '' and not mark.exists()
    lines = out.splitlines()
    assert len(lines) == 7 and all(f'{n} refused: not a plain-data checkpoint' in s for n, s in zip(names, lines))
    assert all('trust' not in s and 'weights_only' not in s for s in lines)  # no advice to open it after all


def test_fault_26_the_words_of_the_unpickler_are_chained(tmp_path):
    import pickle
    (tmp_path/'a.ckpt').write_bytes(sealed({'cnnbook_format': 1, 'best': np.float64(.5)}))
    with pytest.raises(CheckpointError, match='a.ckpt refused: not a plain-data') as e:
        load_checkpoint(tmp_path/'a.ckpt')
    assert not isinstance(e.value, DamagedError) and isinstance(e.value.__cause__, pickle.UnpicklingError)


def test_fault_27_converted_or_refused_at_save(tmp_path):
    path = save_checkpoint(tmp_path/'a.ckpt', {'best': np.float64(.5), 'data': Path('x/y'), 'a': np.arange(3)})
    got = load_checkpoint(path)
    assert type(got['best']) is float and got['data'] == str(Path('x/y')) and equal(got['a'], torch.arange(3))
    before = path.read_bytes()
    model = nn.Linear(1, 1)
    bad = [lambda: 0, {1}, b'', object(), model, model.parameters(), torch.Generator(), complex(1), 1 << 3000, Path,
           np.array([object()]), np.ma.masked_array([1, 2], [0, 1]),
           torch.ones(2).to_sparse(), torch.ones(1, device='meta'), range(3), slice(1)]
    for value in bad:
        with pytest.raises(TypeError, match=r"state\['deep'\]\[1\]\['x'\]: expected"):
            save_checkpoint(path, {'deep': [0, {'x': value}]})
    assert path.read_bytes() == before
    for kind in (np.int8, np.uint64, np.float16, np.float32, np.bool_):
        one = load_checkpoint(save_checkpoint(path, {'v': kind(1), 'a': np.ones((2, 1), kind)}))
        assert one['v'] == 1 and one['a'].numpy().dtype == kind and one['a'].shape == (2, 1)


def test_fault_31_other_versions(tmp_path):
    path = tmp_path/'a.ckpt'
    words = rf'a.ckpt: written by cnnbook 3.0 \(format 999\); you have {cnnbook.__version__} \(format 1\)'
    newer = {'cnnbook_format': 999, 'cnnbook_version': '3.0'}
    for state, text in [(newer, words), ({'w': 1}, 'the key cnnbook_format'),
                        ({'cnnbook_format': 0}, 'got 0'), ({'cnnbook_format': True}, 'got True'), ([], 'got None')]:
        path.write_bytes(sealed(state))
        with pytest.raises(CheckpointError, match=text) as e: load_checkpoint(path)
        assert 'a.ckpt' in str(e.value)


def test_state_dicts_of_many_kinds_of_layer_load_strictly(tmp_path):
    "A state dict comes back as an ordinary dict, without the versions that torch notes in it."
    make = lambda: nn.ModuleList([
        nn.BatchNorm2d(3), nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.GroupNorm(1, 3),
        nn.LSTM(2, 3, 2), nn.MultiheadAttention(4, 2), nn.TransformerEncoderLayer(4, 2), nn.Embedding(5, 2),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Conv2d(1, 1, 1)])
    model, other = make(), make()
    other.append(nn.Linear(1, 1))
    other[-1].weight = other[-1].bias = nn.Parameter(torch.ones(1, 1))         # tied
    both = {'m': model.state_dict(), 'tied': other[-1].state_dict()}
    state = load_checkpoint(save_checkpoint(tmp_path/'a.ckpt', both))
    verify_weights(model, state['m'])
    make().load_state_dict(state['m'])
    assert all(torch.equal(v, state['m'][k]) for k, v in model.state_dict().items())
    assert state['tied']['weight'].data_ptr() == state['tied']['bias'].data_ptr()
    deep = 'bottom'
    for _ in range(100): deep = [deep]
    assert equal(load_checkpoint(save_checkpoint(tmp_path/'a.ckpt', {'deep': deep}))['deep'], deep)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA here')
def test_fault_32_cuda_to_cpu_and_back(tmp_path):
    torch.rand(1, device='cuda')
    path = save_checkpoint(tmp_path/'a.ckpt', {'w': torch.arange(5., device='cuda'), 'r': random_state()})
    for device, kind in ((None, 'cpu'), ('cuda', 'cuda'), ('cuda:0', 'cuda')):
        state = load_checkpoint(path, device)
        assert state['w'].device.type == kind and state['w'].tolist() == [0, 1, 2, 3, 4]
        set_random_state(state['r'])                                            # wherever its tensors have come to
        first = torch.rand(2, device='cuda')
        set_random_state(state['r'])
        assert torch.equal(first, torch.rand(2, device='cuda'))
    code = ('import sys; from cnnbook.checkpoint import load_checkpoint, set_random_state; '
            's = load_checkpoint(sys.argv[1]); set_random_state(s["r"]); print(s["w"].device)')
    hidden = subprocess.run([sys.executable, '-c', code, str(path)], capture_output=True, text=True,
                            env=os.environ | {'CUDA_VISIBLE_DEVICES': ''})
    assert (hidden.stdout, hidden.stderr) == ('cpu\n', '')


def test_fault_32_a_device_that_is_not_there(tmp_path):
    path = save_checkpoint(tmp_path/'a.ckpt', {'w': torch.ones(1)})
    for device in ('cuda:99', 'nonsense'):
        words = f'device: expected one that works, got {device}'
        with pytest.raises(ValueError, match=words): load_checkpoint(path, device)


PEAK = '''
import re, sys, torch
from cnnbook.checkpoint import load_checkpoint, save_checkpoint

def more(f):
    "MB of memory that f needs at its worst, beyond what was there before."
    with open('/proc/self/clear_refs', 'w') as file: file.write('5')             # the peak begins anew
    status = lambda name: int(re.search(name + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1])/1000
    before, kept = status('VmRSS'), f()
    return status('VmHWM') - before

save_checkpoint(sys.argv[1], {'w': torch.ones(10)})
load_checkpoint(sys.argv[1])
w = torch.ones(15_000_000)
print(more(lambda: save_checkpoint(sys.argv[1], {'w': w})), more(lambda: load_checkpoint(sys.argv[1])))
'''


@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='needs /proc of Linux')
def test_no_second_copy_in_memory(forks, tmp_path):
    "60 MB of weights: saving takes next to nothing more, loading takes them once."
    out, err = forks.run(PEAK, tmp_path/'a.ckpt')
    save, load = map(float, out.split())
    assert err == '' and save < 20 and 50 < load < 80, out


HOLD = '''
import sys, time
from cnnbook.checkpoint import run_lock
with run_lock(sys.argv[1]):
    open(sys.argv[2], 'w').close()
    time.sleep(60)
'''


@posix
def test_fault_45_two_runs_in_one_folder(forks, tmp_path):
    import platform
    run, end = forks.start(HOLD, tmp_path/'run', tmp_path/'held'), time.monotonic() + 30
    while not (tmp_path/'held').exists() and time.monotonic() < end: time.sleep(.01)
    (tmp_path/'link').symlink_to(tmp_path/'run')
    for folder in (tmp_path/'run', tmp_path/'link'):
        who = f'got {folder}, where run {run} on {platform.node()} writes since 20'
        with pytest.raises(ValueError, match=f'folder: expected one run at a time, {who}'):
            with run_lock(folder): pass
    with run_lock(tmp_path/'other'): pass
    os.kill(run, signal.SIGKILL)
    assert forks.wait()[0] == int(signal.SIGKILL)
    with run_lock(tmp_path/'run'):                                              # freed by the kill
        with pytest.raises(ValueError, match=f'where run {os.getpid()} on'):
            with run_lock(tmp_path/'link'): pass


@posix
def test_fault_45_a_worker_left_behind_does_not_hold_the_folder(tmp_path):
    with run_lock(tmp_path):
        worker = os.fork()
        if worker == 0:
            time.sleep(30)
            os._exit(0)
    try:
        with run_lock(tmp_path): pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_fault_45_threads_are_two_runs_as_well(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def enter():
        with run_lock(tmp_path): return True
    with ThreadPoolExecutor(1) as pool:
        with run_lock(tmp_path), pytest.raises(ValueError, match='one run at a time'): pool.submit(enter).result()
        assert pool.submit(enter).result()


def test_random_state_through_a_file(tmp_path):
    def draw(): return random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.randn(3).tolist()
    was = random_state()
    try:
        for seed in range(3):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            for _ in range(seed): draw()                                        # gauss and randn hold a number back
            path = save_checkpoint(tmp_path/'a.ckpt', {'random': random_state()})
            first = [draw(), draw()]
            set_random_state(load_checkpoint(path)['random'])
            assert [draw(), draw()] == first
    finally: set_random_state(was)


def test_fault_48_weights_that_do_not_fit():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    good = {k: v.clone() for k, v in model.state_dict().items()}
    n, nan = len(good), torch.full((2,), torch.nan)
    verify_weights(model, good)
    first = 'missing: 0.weight, 0.bias, 1.weight, ...'
    cases = [({f'module.{k}': v for k, v in good.items()}, f'got 0 of {n}; {first}; unexpected: '
              "module.0.weight, module.0.bias, module.1.weight, ...; take 'module.' off the names"),
             ({f'net.{k}': v for k, v in good.items()}, f'{first}; unexpected: net.0.weight'),
             ({}, f'got 0 of {n}; {first}'),
             (good | {'2.weight': torch.zeros(5, 4)},
              f'got {n - 1} of {n}; expected shape: 2.weight (2, 4) got (5, 4)'),
             ({k: v for k, v in good.items() if k != '1.running_var'}, f'got {n - 1} of {n}; missing: 1.running_var'),
             (good | {'2.bias': nan}, f'got {n - 1} of {n}; NaN: 2.bias'),
             (good | {'2.bias': 3}, '2.bias (2,) got None'),
             (good | {'2.bias': nan, '0.bias': torch.zeros(1), 'x': nan},
              f'got {n - 2} of {n}; unexpected: x; expected shape: 0.bias (4,) got (1,); NaN: 2.bias')]
    for state, words in cases:
        with pytest.raises(ValueError) as e: verify_weights(model, state)
        assert words in str(e.value), str(e.value)
        with pytest.raises(ValueError, match=f'of {n} in some.ckpt; '): verify_weights(model, state, 'some.ckpt')
    assert all(torch.equal(v, good[k]) for k, v in model.state_dict().items())
    with pytest.raises(TypeError, match='state_dict: expected dict, got NoneType'): verify_weights(model, None)
