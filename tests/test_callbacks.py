"Callbacks of a run: what a cell cannot say (faults by number, brute force, another process, Lightning)."
import os
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cnnbook.callbacks import (
    CSVLogger,
    EarlyStopping,
    LearningRateMonitor,
    LivePlot,
    MemoryMonitor,
    ModelCheckpoint,
    UpdateRatio,
)
from cnnbook.checkpoint import load_checkpoint, save_checkpoint
from cnnbook.events import Callback
from cnnbook.loop import spirals
from cnnbook.trainer import Trainer

LOSS = nn.CrossEntropyLoss()
ONE_USER = Path('/proc/self/uid_map').exists() and Path('/proc/self/uid_map').read_text().split()[2:] == ['1']


def batches(n=40, size=16, seed=0):
    x, y = spirals(n, seed=seed)
    return list(zip(x.split(size), y.split(size)))


def fit(*callbacks, epochs=4, seed=0, schedule=None, trainer=None, **more):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(.2), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    run = Trainer(max_epochs=epochs, callbacks=callbacks, enable_progress_bar=False, **(trainer or {}))
    run.fit(model, batches(), batches(seed=1), optimizer, LOSS, schedule and schedule(optimizer), **more)
    return model, run


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
def files(folder): return sorted(p.name for p in Path(folder).iterdir() if not p.name.startswith('.'))


class Losses(Callback):
    "Validation losses that are given, not made."
    def __init__(self, losses): self.losses = losses
    def on_validation_end(self, trainer, pl_module):
        trainer.callback_metrics['valid_loss'] = torch.tensor(self.losses[trainer.current_epoch])


class Stop(Callback):
    "Ctrl-C after a step."
    def __init__(self, step): self.step = step
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step: raise KeyboardInterrupt


def python(code, *args, **more):
    return subprocess.run([sys.executable, '-c', textwrap.dedent(code), *map(str, args)], capture_output=True,
                          text=True, timeout=120, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **more)


# Saving that fails

def test_fault_23_a_full_disk_costs_a_save_and_not_the_run(tmp_path):
    run = python('''
        import resource, signal, sys, warnings
        sys.path.insert(0, 'tests')
        from test_callbacks import *
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        class Full(Callback):       # no file may grow beyond 4 kB from the second epoch to the fourth
            def on_train_epoch_start(self, trainer, pl_module):
                limit = 4096 if trainer.current_epoch in (1, 2, 3) else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        folder = Path(sys.argv[1])
        class Look(Callback):
            seen = []
            def on_train_epoch_start(self, trainer, pl_module):
                self.seen.append(files(folder) if folder.exists() else [])
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always')
            model, run = fit(Full(), Look(), ModelCheckpoint(folder), epochs=6)
        first = ['epoch=0-step=3.ckpt', 'last.ckpt']
        assert Look.seen == [[], first, first, first, first, ['epoch=4-step=15.ckpt', 'last.ckpt']], Look.seen
        words = [str(w.message) for w in heard]
        assert len(words) == 3 and all('training goes on' in w and 'MB needed' in w for w in words), words
        assert load_checkpoint(folder/'last.ckpt')['global_step'] == 18 and not list(folder.glob('*part*'))
        ''', tmp_path/'run', cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr


def test_fault_24_a_folder_that_cannot_be_used_is_refused_before_the_first_epoch(tmp_path):
    (tmp_path/'file').write_text('mine')
    seen = []
    class Epochs(Callback):
        def on_train_epoch_start(self, trainer, pl_module): seen.append(trainer.current_epoch)

    for path in (tmp_path/'file', tmp_path/'file'/'below', '/proc/cnnbook'):
        with pytest.raises(OSError, match='expected a folder to write to'): fit(Epochs(), ModelCheckpoint(path))
    assert seen == [] and (tmp_path/'file').read_text() == 'mine'


@pytest.mark.skipif(not hasattr(os, 'fork') or ONE_USER, reason='needs fork and a second user')
def test_fault_24_read_only():
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        closed = Path(home)/'closed'
        closed.mkdir(mode=0o555)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                if os.geteuid() == 0: os.setgroups([]), os.setgid(65534), os.setuid(65534)
                keep = ModelCheckpoint(closed)       # the first that a fit calls; no torch in a forked process
                keep.setup(SimpleNamespace(fast_dev_run=False, callbacks=[keep]), None, 'fit')
            except PermissionError as e: code = 0 if 'expected a folder to write to' in str(e) else 2
            finally: os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and files(closed) == []


def test_fault_24_the_folder_vanishes_in_the_middle(tmp_path):
    class Remove(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2: shutil.rmtree(tmp_path/'run')

    fit(Remove(), ModelCheckpoint(tmp_path/'run', monitor='valid_loss', save_top_k=2), epochs=4)
    assert load_checkpoint(tmp_path/'run'/'last.ckpt')['global_step'] == 12


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'empty', 'error'])
def test_fault_46_an_old_file_goes_only_when_the_new_one_is_whole(tmp_path, monkeypatch, damage):
    real = Trainer.save_checkpoint
    def save(self, path):
        out = real(self, path)
        if self.current_epoch < 2: return out
        if damage == 'error': raise OSError(5, 'Input/output error')
        data = bytearray(Path(path).read_bytes())
        data[len(data)//2] ^= 1
        Path(path).write_bytes({'cut': data[:len(data)//2], 'flipped': data, 'empty': b''}[damage])

    monkeypatch.setattr(Trainer, 'save_checkpoint', save)
    keep = ModelCheckpoint(tmp_path, save_top_k=2)
    with pytest.warns(UserWarning, match='training goes on'): _, run = fit(keep, epochs=5)
    assert files(tmp_path) == ['epoch=0-step=3.ckpt', 'epoch=1-step=6.ckpt', 'last.ckpt']
    for path in (tmp_path/'last.ckpt', run.last_checkpoint): assert load_checkpoint(path)['global_step'] == 6
    assert [Path(p).name for p in keep.best_k_models] == files(tmp_path)[:2] and not list(tmp_path.glob('.*part'))


def test_a_file_that_cannot_be_deleted_is_tried_again(tmp_path, monkeypatch):
    real, blocked = Path.unlink, [True]
    def unlink(self, missing_ok=False):
        if blocked[0] and self.name == 'epoch=0-step=3.ckpt': raise PermissionError(13, 'in use')
        return real(self, missing_ok)

    class Free(Callback):
        def on_train_epoch_start(self, trainer, pl_module): blocked[0] = trainer.current_epoch < 3

    monkeypatch.setattr(Path, 'unlink', unlink)
    fit(Free(), ModelCheckpoint(tmp_path, save_last=False), epochs=3)
    assert files(tmp_path) == ['epoch=0-step=3.ckpt', 'epoch=2-step=9.ckpt']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(Free(), ModelCheckpoint(tmp_path, save_last=False), epochs=4, ckpt_path=tmp_path/'epoch=2-step=9.ckpt')
    assert files(tmp_path) == ['epoch=3-step=12.ckpt']


# What is best

def test_fault_34_nan_first_and_monitor_missing(tmp_path):
    nan = float('nan')
    stop, keep = EarlyStopping(patience=3), ModelCheckpoint(tmp_path, monitor='valid_loss')
    with pytest.warns(UserWarning, match='expected a finite valid_loss, got nan'):
        fit(Losses([nan, nan, 3., 5.]), stop, keep)
    assert keep.best_model_score == stop.best_score == 3. and files(tmp_path) == ['epoch=2-step=9.ckpt', 'last.ckpt']
    for callback in (EarlyStopping('val_loss'), ModelCheckpoint(tmp_path/'x', monitor='val_loss')):
        with pytest.raises(ValueError, match="one of valid_loss, .*train_loss.*, got 'val_loss'"): fit(callback)


@pytest.mark.parametrize('seed', range(30))
def test_top_k_equals_brute_force_also_when_resumed(tmp_path, seed):
    draw = random.Random(seed)
    n, k, mode = draw.randint(1, 14), draw.choice([-1, 0, 1, 2, 3, 5]), draw.choice(['min', 'max'])
    values = [draw.choice([float('nan'), float('inf'), 1., 2., 3., draw.random()*4]) for _ in range(n)]
    new = lambda: ModelCheckpoint(tmp_path, monitor='m', mode=mode, save_top_k=k, save_last=draw.random() < .5)
    fake = SimpleNamespace(fast_dev_run=False, global_step=0, sanity_checking=False, max_steps=-1, max_epochs=n,
                           check_val_every_n_epoch=1, should_stop=False, last_checkpoint=None)
    fake.save_checkpoint = lambda path: save_checkpoint(path, {})
    keep = new()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for fake.current_epoch, v in enumerate(values):
            if fake.current_epoch == 0 or draw.random() < .3:          # a new process
                state = keep.state_dict()
                keep.teardown(fake, None, 'fit')
                keep = new()
                fake.callbacks = [keep]
                keep.setup(fake, None, 'fit')
                if fake.current_epoch: keep.load_state_dict(state)
                keep.on_train_start(fake, None)
            fake.callback_metrics = {'m': v}
            fake.global_step += 3
            keep.on_train_epoch_end(fake, None)
    keep.teardown(fake, None, 'fit')
    sign = 1 if mode == 'min' else -1
    ranked = sorted((i for i, v in enumerate(values) if abs(v) < float('inf')), key=lambda i: (sign*values[i], i))
    ranked = ranked if k == -1 else ranked[:k]
    there = [int(name.split('-')[0][6:]) for name in files(tmp_path) if name != 'last.ckpt']
    assert sorted(there) == sorted(ranked)
    if ranked: assert keep.best_model_score == values[ranked[0]] and keep.kth_value == values[ranked[-1]]


# Runs that go on

@pytest.mark.parametrize('step', [1, 3, 7, 9, 14])
def test_a_broken_run_ends_as_an_unbroken_one(tmp_path, step):
    losses = Losses([3., 2., 2.5, 1., 1.5, 1.2, 2., 2.])
    new = lambda name: (losses, EarlyStopping(patience=3), ModelCheckpoint(
        tmp_path/name, monitor='valid_loss', save_top_k=2, every_n_train_steps=2))
    whole, run = fit(*new('a'), epochs=8)
    fit(*new('b'), Stop(step), epochs=8)
    again, on = fit(*new('b'), epochs=8, ckpt_path='last')
    assert same(whole, again) and on.current_epoch == run.current_epoch == 7
    assert files(tmp_path/'a') == files(tmp_path/'b')
    a, b = run.callbacks[1].state_dict(), on.callbacks[1].state_dict()
    assert {k: v for k, v in a.items() if k != 'best_weights'} == {k: v for k, v in b.items() if k != 'best_weights'}


def test_a_folder_that_has_moved(tmp_path):
    new = lambda name: ModelCheckpoint(tmp_path/name, monitor='valid_loss', save_top_k=2)
    fit(Losses([3., 2., 1.]), new('old'), epochs=3)
    (tmp_path/'old').rename(tmp_path/'moved')
    fit(Losses([3., 2., 1., 4., .5]), keep := new('moved'), epochs=5, ckpt_path=tmp_path/'moved'/'last.ckpt')
    assert files(tmp_path/'moved') == ['epoch=2-step=9.ckpt', 'epoch=4-step=15.ckpt', 'last.ckpt']
    assert not (tmp_path/'old').exists()
    assert keep.best_model_path == str(tmp_path/'moved'/'epoch=4-step=15.ckpt')


def test_fault_41_the_cell_is_run_twice(tmp_path):
    stop, keep, log = EarlyStopping(patience=9), ModelCheckpoint(tmp_path/'c'), CSVLogger(tmp_path/'logs')
    watch = [LearningRateMonitor(every_n_steps=1), UpdateRatio(1), MemoryMonitor(1), LivePlot()]
    callbacks = [stop, keep, *watch]
    rows = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model, run = fit(*callbacks, trainer={'logger': log, 'log_every_n_steps': 1})
        kept = [{k: v for k, v in r.items() if k != 'memory_process'} for r in log.metrics]
        rows.append((kept, [len(w.rows) for w in watch[:3]], stop.best_score, stop.wait_count, files(tmp_path/'c')))
    assert rows[0] == rows[1] and rows[0][1] == [12, 12, 12] and len(rows[0][0]) == 12
    assert files(tmp_path/'logs') == ['version_0', 'version_1'] and len(watch[3].steps.xs) == 12


def test_validation_now_and_then(tmp_path):
    losses = [9., 3., 9., 4., 9., 5., 9., 6.]                 # every second one is seen
    stop, keep = EarlyStopping(patience=2), ModelCheckpoint(tmp_path, monitor='valid_loss', save_top_k=-1)
    _, run = fit(Losses(losses), stop, keep, epochs=8, trainer={'check_val_every_n_epoch': 2})
    assert stop.best_epoch == 1 and run.current_epoch == 6
    assert files(tmp_path) == ['epoch=1-step=6.ckpt', 'epoch=3-step=12.ckpt', 'epoch=5-step=18.ckpt', 'last.ckpt']


# Clocks and neighbours

def test_fault_45_the_wall_clock_goes_backwards(tmp_path, monkeypatch):
    now = iter(range(10**9, 0, -10_000))
    monkeypatch.setattr(time, 'time', lambda: next(now))
    fit(keep := ModelCheckpoint(tmp_path, train_time_interval=60, save_top_k=-1), epochs=3)
    assert len(keep.best_k_models) == 3 and load_checkpoint(tmp_path/'last.ckpt')['global_step'] == 9


def test_fault_45_two_runs_in_one_second_and_in_one_folder(tmp_path):
    code = '''
        import sys
        from types import SimpleNamespace
        from cnnbook.callbacks import CSVLogger, ModelCheckpoint
        print('ready', flush=True)
        sys.stdin.readline()
        CSVLogger(sys.argv[1]).log_metrics({'loss': 1.}, 1)
        keep = ModelCheckpoint(sys.argv[2])
        keep.setup(SimpleNamespace(fast_dev_run=False, callbacks=[keep]), None, 'fit')
        print('held', flush=True)
        sys.stdin.readline()
        '''
    def start(name):
        return subprocess.Popen([sys.executable, '-c', textwrap.dedent(code), tmp_path/'logs', tmp_path/name],
                                text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                cwd=Path(__file__).parent.parent, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    fit(ModelCheckpoint(tmp_path/'a'))
    one, two = start('a'), start('b')
    try:
        for p in (one, two): assert p.stdout.readline() == 'ready\n', p.stderr.read()
        for p in (one, two): print(file=p.stdin, flush=True)
        for p in (one, two): assert p.stdout.readline() == 'held\n', p.stderr.read()
        assert files(tmp_path/'logs') == ['version_0', 'version_1']
        before = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'a').glob('*.ckpt')}
        with pytest.raises(ValueError, match=f'expected one run at a time, got .*run {one.pid} on'):
            fit(ModelCheckpoint(tmp_path/'a'))
        assert {p.name: p.stat().st_mtime_ns for p in (tmp_path/'a').glob('*.ckpt')} == before
    finally:
        for p in (one, two): p.communicate('\n', timeout=60)
    with pytest.warns(UserWarning, match='earlier run'): fit(ModelCheckpoint(tmp_path/'a'))       # free again


def test_the_lock_is_freed_after_an_error(tmp_path):
    class Broken(Callback):
        def on_train_epoch_end(self, trainer, pl_module): raise RuntimeError('broken')

    for _ in range(2):
        with pytest.raises(RuntimeError, match='broken'): fit(ModelCheckpoint(tmp_path), Broken())
    fit(ModelCheckpoint(tmp_path))


# Lightning

def in_lightning(folder, *callbacks, epochs=6, losses=None, logger=False, ckpt_path=None):
    lightning = pytest.importorskip('lightning')

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(.2), nn.Linear(8, 3))
        def configure_optimizers(self): return torch.optim.SGD(self.net.parameters(), .1, momentum=.9)
        def training_step(self, batch, i):
            value = LOSS(self.net(batch[0]), batch[1])
            self.log('train_loss', value, on_step=False, on_epoch=True)
            return value
        def validation_step(self, batch, i):
            value = LOSS(self.net(batch[0]), batch[1])
            value = torch.tensor(losses[self.current_epoch]) if losses else value
            self.log('valid_loss', value, batch_size=len(batch[0]))

    loader = lambda seed: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*spirals(40, seed=seed)), 16,
                                                      generator=torch.Generator())
    run = lightning.Trainer(accelerator='cpu', max_epochs=epochs, callbacks=list(callbacks), logger=logger,
                            log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False,
                            enable_model_summary=False, num_sanity_val_steps=1, default_root_dir=folder)
    module = Module()
    run.fit(module, loader(0), loader(1), ckpt_path=ckpt_path)
    return module.net, run


@pytest.mark.filterwarnings('ignore')
def test_lightning_runs_the_same_callbacks(tmp_path):
    losses = [3., 2., 2.5, 1., 1.5, 1.2, 2., 2.]
    new = lambda name: [EarlyStopping(patience=3), LearningRateMonitor(every_n_steps=1), MemoryMonitor(2),
                        UpdateRatio(2), LivePlot(),
                        ModelCheckpoint(tmp_path/name, monitor='valid_loss', save_top_k=2)]
    ours, theirs = new('ours'), new('theirs')
    fit(Losses(losses), *ours, epochs=8)
    net, run = in_lightning(tmp_path, *theirs, losses=losses, epochs=8)
    assert files(tmp_path/'ours') == files(tmp_path/'theirs')
    for a, b in zip(ours[1:4], theirs[1:4]):
        assert [r['step'] for r in a.rows] == [r['step'] for r in b.rows] and len(a.rows) in (21, 10)
    assert ours[1].rows == theirs[1].rows and ours[4].steps.xs == theirs[4].steps.xs
    for name in ('best_score', 'best_epoch', 'wait_count', 'stopped_epoch'):
        assert getattr(ours[0], name) == getattr(theirs[0], name)
    a, b = ours[-1].state_dict(), theirs[-1].state_dict()
    assert a['best_model_score'] == b['best_model_score'] and a['kth_value'] == b['kth_value']
    kept = torch.load(theirs[-1].best_model_path, weights_only=False)['state_dict']
    assert all(torch.equal(v, net.state_dict()[k[4:]]) for k, v in kept.items())     # the best, restored


@pytest.mark.filterwarnings('ignore')
def test_lightning_resumes_their_state(tmp_path):
    losses = [3., 2., 2.5, 1., 1.5, 1.2, 2., 2.]
    new = lambda name: [EarlyStopping(patience=3), ModelCheckpoint(tmp_path/name, monitor='valid_loss', save_top_k=2)]
    whole, run = in_lightning(tmp_path, *new('a'), losses=losses, epochs=8)
    in_lightning(tmp_path, *new('b'), losses=losses, epochs=3)
    again, on = in_lightning(tmp_path, *new('b'), losses=losses, epochs=8, ckpt_path=tmp_path/'b'/'last.ckpt')
    assert files(tmp_path/'a') == files(tmp_path/'b') and on.global_step == run.global_step == 21
    assert on.callbacks[0].best_epoch == run.callbacks[0].best_epoch == 3


@pytest.mark.filterwarnings('ignore')
def test_lightning_tells_our_loggers(tmp_path):
    log = CSVLogger(tmp_path, 'lightning')
    in_lightning(tmp_path, LearningRateMonitor(every_n_steps=1), epochs=2, logger=log)
    rows = log.metrics
    assert [r['lr-SGD'] for r in rows if 'lr-SGD' in r] == [.1]*6 and sum('valid_loss' in r for r in rows) == 2


def test_lightning_names_of_the_state(tmp_path):
    lightning = pytest.importorskip('lightning')
    theirs = set(lightning.pytorch.callbacks.ModelCheckpoint(tmp_path).state_dict())
    assert theirs <= set(ModelCheckpoint(tmp_path).state_dict())
    assert {'wait_count', 'stopped_epoch', 'best_score'} <= set(EarlyStopping().state_dict())
