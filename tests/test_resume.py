"Runs that stop and go on: bit for bit, in a new process, after signals, with workers that die, by the faults' numbers."
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cnnbook.feed
from cnnbook.checkpoint import load_checkpoint
from cnnbook.data import Augment, Loader
from cnnbook.events import Callback
from cnnbook.feed import Feed
from cnnbook.loop import spirals
from cnnbook.resume import restore_schedule
from cnnbook.trainer import Trainer
from cnnbook.world import shapes

LOSS = nn.CrossEntropyLoss()


def batches(n=40, size=8, seed=0):
    x, y = spirals(n, seed=seed)
    return list(zip(x.split(size), y.split(size)))


def make(seed=0, outputs=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, outputs))
    return model, torch.optim.SGD(model.parameters(), .1, momentum=.9)


class Saving(Callback):
    "Every step and every epoch into a file of its own."
    runs_last = True
    def __init__(self, folder): self.folder = folder
    def save(self, trainer, name): trainer.save_checkpoint(self.folder/f'{name}.ckpt')
    def on_train_batch_end(self, trainer, *args): self.save(trainer, f'step{trainer.global_step:02}')
    def on_train_epoch_end(self, trainer, *args): self.save(trainer, f'epoch{trainer.current_epoch}')


def flat(model): return torch.cat([t.double().flatten() for t in model.state_dict().values()])


# --- 28: exact resume ---

SCRIPT = '''
import json, random, sys
from pathlib import Path
import numpy as np
import torch
from torch import nn
from cnnbook.events import Callback
from cnnbook.loop import spirals
from cnnbook.trainer import Trainer
sys.path.insert(0, {tests!r})
from test_resume import Saving

class Jittered(torch.utils.data.Dataset):
    "Each sample is moved at random, by all three generators."
    x, y = spirals(40)
    def __len__(self): return 40
    def __getitem__(self, i):
        return self.x[i] + .1*torch.randn(2) + .1*random.random() + .1*float(np.random.rand()), self.y[i]

class Stop(Callback):
    def on_train_batch_end(self, trainer, *args): trainer.should_stop = trainer.global_step == int(sys.argv[4])

def go(workers, folder, ckpt_path=None, own=False, callbacks=(), accumulate=1):
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(.3), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, .2, total_steps=15)
    generator = torch.Generator().manual_seed(7) if own else None
    loader = torch.utils.data.DataLoader(Jittered(), 8, shuffle=True, num_workers=workers, generator=generator)
    check = torch.utils.data.DataLoader(Jittered(), 20, num_workers=workers)
    trainer = Trainer(max_epochs=3, callbacks=callbacks, accumulate_grad_batches=accumulate)
    history = trainer.fit(model, loader, check, optimizer, nn.CrossEntropyLoss(), schedule, ckpt_path=ckpt_path)
    rows = [[r['train_loss'], r['valid_loss'], r['lr']] for r in history]
    return torch.cat([t.double().flatten() for t in model.state_dict().values()]).tolist(), rows

if __name__ == '__main__':
    folder, workers, own = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == 'own'
    if sys.argv[4] == 'whole':
        whole = go(workers, folder, own=own, callbacks=[Saving(folder)])
        (folder/'whole.json').write_text(json.dumps(whole))
    else:
        whole = json.loads((folder/'whole.json').read_text())
        for name in sys.argv[4:]:
            torch.rand(3); random.random(); np.random.rand()
            got = go(workers, folder, folder/(name + '.ckpt'), own)
            print(name, 'equal' if json.loads(json.dumps(got)) == whole else 'DIFFERENT')
'''


def run(script, *args, cwd=None):
    done = subprocess.run([sys.executable, str(script), *map(str, args)], capture_output=True, text=True, timeout=300,
                          cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize('workers, own', [(0, 'global'), (0, 'own'), (2, 'global'), (2, 'own')])
def test_fault_28_exact_in_a_new_process_from_any_step(tmp_path, workers, own):
    script = tmp_path/'run.py'
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__)))
    run(script, tmp_path, workers, own, 'whole')
    elsewhere = tmp_path/'elsewhere'
    elsewhere.mkdir()
    names = ['step01', 'step05', 'epoch0', 'step07', 'step10', 'epoch1', 'step15', 'step07']   # 5: an edge; 7: twice
    if workers == 0: names += [f'step{k:02}' for k in range(1, 16)]
    out = run(script, tmp_path, workers, own, *names, cwd=elsewhere)
    assert [line for line in out.splitlines() if line.startswith(('step', 'epoch'))] == [f'{n} equal' for n in names]


def test_fault_28_our_loader_with_augmentation_and_accumulation(tmp_path):
    images = shapes(50, size=16)

    def go(ckpt_path=None, callbacks=()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10), nn.Dropout(.2))
        optimizer = torch.optim.Adam(model.parameters(), .01)
        loader = Loader(images, 8, Augment(flip=True, shift=1), shuffle=True, seed=3)
        trainer = Trainer(max_epochs=2, callbacks=callbacks, accumulate_grad_batches=3)
        return trainer.fit(model, loader, None, optimizer, LOSS, ckpt_path=ckpt_path).column('train_loss'), flat(model)

    class AtSteps(Saving):
        def on_train_batch_end(self, trainer, *args):
            if trainer.at_boundary: super().on_train_batch_end(trainer)
            else:
                with pytest.raises(ValueError, match='between two steps'): trainer.save_checkpoint(tmp_path/'no.ckpt')

    losses, weights = go(callbacks=[AtSteps(tmp_path)])
    assert sorted(p.stem for p in tmp_path.iterdir()) == ['epoch0', 'epoch1', *(f'step0{k}' for k in range(1, 7))]
    for path in sorted(tmp_path.iterdir()):
        again = go(path)
        assert again[0] == losses and torch.equal(again[1], weights), path


# --- 29, 30: another run, a finished run ---

@pytest.mark.parametrize('change, words', [
    (dict(outputs=4), r'state_dict: expected.*4.weight'), (dict(size=10), 'batches: expected 5'),
    (dict(n=36), 'samples: expected 40, as in .*step02.ckpt, got 36'),
    (dict(adam=True), 'optimizer: expected SGD, as in .*step02.ckpt, got Adam'),
    (dict(schedule=True), 'scheduler: expected None'),
    (dict(accumulate=2), 'accumulate_grad_batches: expected 1')])
def test_fault_29_another_run_is_named_and_nothing_changes(tmp_path, change, words):
    def go(ckpt_path=None, outputs=3, size=8, n=40, adam=False, schedule=False, accumulate=1, callbacks=()):
        model, optimizer = make(outputs=outputs)
        if adam: optimizer = torch.optim.Adam(model.parameters())
        before = flat(model)
        loader = DataLoader(TensorDataset(*spirals(n)), size)
        trainer = Trainer(max_epochs=2, callbacks=callbacks, accumulate_grad_batches=accumulate)
        try: trainer.fit(model, loader, None, optimizer, LOSS, lr_scheduler.StepLR(optimizer, 1) if schedule else None,
                         ckpt_path=ckpt_path)
        finally: changed.append(not torch.equal(before, flat(model)))

    changed, path = [], tmp_path/'step02.ckpt'
    go(callbacks=[Saving(tmp_path)])
    was = path.read_bytes()
    with pytest.raises(ValueError, match=words): go(path, **change)
    assert changed == [True, False] and path.read_bytes() == was


def test_fault_30_finished_and_extended(tmp_path, capsys):
    def go(epochs, ckpt_path=None, callbacks=(), kind=None):
        model, optimizer = make()
        schedule = kind(optimizer, epochs) if kind else None
        trainer = Trainer(max_epochs=epochs, callbacks=callbacks)
        return trainer.fit(model, batches(), None, optimizer, LOSS, schedule, ckpt_path=ckpt_path), flat(model)

    _, weights = go(3, callbacks=[Saving(tmp_path)])
    capsys.readouterr()
    rows, again = go(3, tmp_path/'epoch2.ckpt')
    assert 'already done: 3 of 3 epochs' in capsys.readouterr().out and len(rows) == 3 and torch.equal(weights, again)
    unbroken = go(5)
    rows, longer = go(5, tmp_path/'epoch2.ckpt')
    assert torch.equal(longer, unbroken[1]) and rows.column('epoch') == [0, 1, 2, 3, 4]
    for kind in (lambda o, n: lr_scheduler.OneCycleLR(o, .1, total_steps=5*n), lambda o, n: lr_scheduler.StepLR(o, 2),
                 lambda o, n: lr_scheduler.CosineAnnealingLR(o, n),
                 lambda o, n: lr_scheduler.LambdaLR(o, lambda s: 1 - s/n)):
        go(3, callbacks=[Saving(tmp_path)], kind=kind)
        whole, rows = go(6, kind=kind)[0], go(6, tmp_path/'epoch1.ckpt', kind=kind)[0]
        assert rows.column('lr')[2:] == pytest.approx(whole.column('lr')[2:], rel=1e-5)    # the longer one, from here


def test_fault_30_every_schedule_goes_on_where_it_stood():
    def schedules(o):
        yield lr_scheduler.StepLR(o, 3)
        yield lr_scheduler.MultiStepLR(o, [2, 7])
        yield lr_scheduler.ExponentialLR(o, .9)
        yield lr_scheduler.CosineAnnealingLR(o, 10)
        yield lr_scheduler.CosineAnnealingWarmRestarts(o, 4)
        yield lr_scheduler.OneCycleLR(o, .1, total_steps=12)
        yield lr_scheduler.CyclicLR(o, .01, .1, 3)
        yield lr_scheduler.LambdaLR(o, lambda s: 1/(1 + s))
        warm, fall = lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, .8)
        yield lr_scheduler.SequentialLR(o, [warm, fall], [3])
        yield lr_scheduler.ReduceLROnPlateau(o, patience=1)

    def new(k):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], .1, momentum=.9)
        return optimizer, next(itertools.islice(schedules(optimizer), k, None))

    for k in range(10):
        def step(o, s):
            o.step()
            s.step(*([1.] if isinstance(s, lr_scheduler.ReduceLROnPlateau) else []))
            return o.param_groups[0]['lr']

        (o, s), rates = new(k), []
        for at in range(10):
            if at == 5: kept = json.loads(json.dumps(o.state_dict()['param_groups'])), s.state_dict()
            rates.append(step(o, s))
        o2, s2 = new(k)
        o2.load_state_dict({'state': {}, 'param_groups': kept[0]})
        restore_schedule(s2, kept[1])
        assert [step(o2, s2) for _ in range(5)] == rates[5:], type(s).__name__


def test_damaged_checkpoint_falls_back_to_the_newest_whole_one(tmp_path, capsys):
    model, optimizer = make()
    Trainer(max_epochs=2, callbacks=Saving(tmp_path)).fit(model, batches(), None, optimizer, LOSS)
    weights, bad = flat(model), tmp_path/'step09.ckpt'
    for later in ('step10', 'epoch1'): (tmp_path/f'{later}.ckpt').unlink()
    data = bytearray(bad.read_bytes())
    data[len(data)//2] ^= 1
    bad.write_bytes(data)
    again, optimizer = make()
    Trainer(max_epochs=2).fit(again, batches(), None, optimizer, LOSS, ckpt_path=bad)
    said = capsys.readouterr().out
    assert 'step09.ckpt is damaged' in said and 'step08.ckpt (epoch 1, step 8) instead' in said
    assert torch.equal(flat(again), weights) and bad.read_bytes() == data
    fresh, optimizer = make()
    trainer = Trainer(max_epochs=2, default_root_dir=tmp_path/'new')
    trainer.fit(fresh, batches(), None, optimizer, LOSS, ckpt_path='last')
    assert 'the run begins anew' in capsys.readouterr().out and torch.equal(flat(fresh), weights)
    with pytest.raises(FileNotFoundError):
        Trainer().fit(fresh, batches(), None, optimizer, LOSS, ckpt_path=tmp_path/'x.ckpt')


# --- 33: numbers that are none ---

class Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return g*float('nan')


def test_fault_33_nan_only_in_gradients_stops_before_the_step():
    model, optimizer = make()
    model.insert(2, type('S', (nn.Module,), {'forward': lambda self, x: Spoil.apply(x)})())
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match='gradient: .*epoch 0, step 0, lr 0.1; first not finite: gradient of 0.weight'):
        Trainer().fit(model, batches(), None, optimizer, LOSS)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize('where', ['buffer', 'last weight'])
def test_fault_33_nan_elsewhere_never_reaches_a_checkpoint(tmp_path, where):
    class Poison(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 7:
                (pl_module[1].running_var if where == 'buffer' else pl_module[4].bias.data)[0] = float('nan')

    model, optimizer = make()
    named = '1.running_var' if where == 'buffer' else '4.bias'
    with pytest.raises(ValueError, match=f'weights: expected a finite number, got nan in epoch 1, step 7.*{named}'):
        Trainer(max_epochs=2, callbacks=[Poison(), Saving(tmp_path)]).fit(model, batches(), None, optimizer, LOSS)
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == 'step06.ckpt'
    assert all(t.isfinite().all() for t in load_checkpoint(tmp_path/'step06.ckpt')['state_dict'].values())


# --- 35, 36: signals ---

class Signal(Callback):
    def __init__(self, hook, numbers, at): self.at, self.n = at, 0; setattr(self, hook, lambda *a: self.send(numbers))
    def send(self, numbers):
        self.n += 1
        if self.n == self.at:
            for number in numbers: os.kill(os.getpid(), number)


@pytest.fixture
def plain_signals():
    was = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    for n, h in was.items(): signal.signal(n, h)


class SaveAtTheEnd(Callback):
    runs_last = True
    def __init__(self, folder): self.path = folder/'last.ckpt'
    def on_exception(self, trainer, pl_module, exception):
        if trainer.at_boundary: trainer.save_checkpoint(self.path)


@pytest.mark.parametrize('hook, at', [('on_before_backward', 3), ('on_validation_batch_end', 2),
                                      ('on_train_batch_end', 5), ('on_train_epoch_end', 1),
                                      ('on_before_optimizer_step', 6)])
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_fault_35_36_the_first_signal_waits_for_the_step(tmp_path, plain_signals, capsys, hook, at, number):
    def go(callbacks=(), ckpt_path=None):
        model, optimizer = make()
        loader = DataLoader(TensorDataset(*spirals(40)), 8, shuffle=True, num_workers=2 if callbacks else 0)
        trainer = Trainer(max_epochs=2, callbacks=callbacks)
        ended = None
        check = DataLoader(TensorDataset(*spirals(40)), 20)
        try: trainer.fit(model, loader, check, optimizer, LOSS, ckpt_path=ckpt_path)
        except SystemExit as e: ended = e.code
        return trainer, flat(model), ended

    _, weights, _ = go()
    trainer, _, ended = go([Signal(hook, [number], at), SaveAtTheEnd(tmp_path)])
    out = capsys.readouterr().out
    assert trainer.interrupted and ended == (143 if number == signal.SIGTERM else None)
    where = f'in epoch {trainer.current_epoch} after step {trainer.global_step}'
    assert f"{where}; resume with ckpt_path='{tmp_path}" in out
    assert multiprocessing.active_children() == []
    assert torch.equal(go(ckpt_path=tmp_path/'last.ckpt')[1], weights)


def test_fault_35_the_second_interrupt_is_obeyed_at_once(plain_signals, tmp_path):
    model, optimizer = make()
    trainer = Trainer(callbacks=[Signal('on_before_backward', [signal.SIGINT]*2, 2), SaveAtTheEnd(tmp_path)])
    trainer.fit(model, batches(), None, optimizer, LOSS)
    assert trainer.interrupted and trainer.global_step == 1 and not trainer.at_boundary and not list(tmp_path.iterdir())
    assert len(Trainer(max_epochs=2).fit(model, batches(), None, optimizer, LOSS)) == 2


def test_fault_35_in_a_thread_signals_are_left_alone():
    model, optimizer = make()
    rows = []
    thread = threading.Thread(target=lambda: rows.extend(Trainer().fit(model, batches(), None, optimizer, LOSS)))
    thread.start()
    thread.join(60)
    assert len(rows) == 1


# --- 37: out of memory ---

class Narrow(nn.Module):
    "A net that has room for `room` samples while it trains."
    kept = []
    def __init__(self, net, room, error=None, evaluating=False):
        super().__init__()
        self.net, self.room, self.evaluating = net, room, evaluating
        self.error = error or RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')
    def forward(self, x):
        h = self.net[0](x)
        self.kept.append(weakref.ref(h))
        if len(x) > self.room and (self.training != self.evaluating): raise type(self.error)(*self.error.args)
        return self.net[1:](h)


def narrow_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def doubles(n=40, size=32): return [(x.double(), y) for x, y in batches(n, size)]


OutOfMemory = getattr(torch, 'OutOfMemoryError', torch.cuda.OutOfMemoryError)


@pytest.mark.parametrize('error', [
    RuntimeError('CUDA out of memory'), RuntimeError('NvMapMemAllocInternalTagged: error 12'), MemoryError('no'),
    RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'), OutOfMemory('CUDA out of memory')])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_fault_37_halved_and_the_same_step(capsys, error, accumulate):
    def go(room):
        net = Narrow(narrow_net(), room, error)
        optimizer = torch.optim.SGD(net.parameters(), .1, momentum=.9)
        trainer = Trainer(max_epochs=3, accumulate_grad_batches=accumulate)
        rows = trainer.fit(net, doubles(), doubles(), optimizer, LOSS)
        return trainer, rows, flat(net)

    Narrow.kept.clear()
    roomy, tight = go(1000), go(8)
    out = capsys.readouterr().out
    assert '2 parts of 16' in out and '4 parts of 8' in out and out.count('out of memory') == 2
    assert torch.allclose(roomy[2], tight[2], atol=1e-13) and roomy[0].global_step == tight[0].global_step
    assert roomy[1].column('train_loss') == pytest.approx(tight[1].column('train_loss'), abs=1e-12)
    assert tight[0].state.parts == 4 and all(ref() is None for ref in Narrow.kept)


def test_fault_37_the_same_random_numbers_as_from_the_start(capsys):
    def go(parts, room):
        net = Narrow(narrow_net(), room)
        net.net.insert(1, nn.Dropout(.5))
        trainer = Trainer(max_epochs=2)
        class Begin(Callback):
            def on_train_start(self, trainer, pl_module): trainer.state.parts = parts
        trainer.callbacks.append(Begin())
        torch.manual_seed(1)
        trainer.fit(net, doubles(), None, torch.optim.SGD(net.parameters(), .1), LOSS)
        return flat(net)

    assert torch.equal(go(4, 1000), go(1, 8))


def test_fault_37_one_sample_too_many_is_a_clean_end(capsys):
    net = Narrow(narrow_net(), 0)
    before = flat(net)
    with pytest.raises(MemoryError, match='expected room for one sample at a time'):
        Trainer().fit(net, doubles(), None, torch.optim.SGD(net.parameters(), .1), LOSS)
    assert torch.equal(before, flat(net)) and all(ref() is None for ref in Narrow.kept)


def test_fault_37_evaluation_does_not_shrink_training(capsys):
    net = Narrow(narrow_net(), 8, evaluating=True)
    trainer = Trainer(max_epochs=2)
    rows = trainer.fit(net, doubles(), doubles(), torch.optim.SGD(net.parameters(), .1), LOSS)
    assert trainer.state.parts == 1 and capsys.readouterr().out.count('out of memory') == 2
    net.room = 1000
    assert Trainer().validate(net, doubles(), LOSS)['valid_loss'] == pytest.approx(rows[-1]['valid_loss'], abs=1e-12)


# --- 38, 39, 40: workers ---

class Breaks(Dataset):
    "Sample 13 does something bad."
    def __init__(self, how, n=40): self.how, self.n, (self.x, self.y) = how, n, spirals(n)
    def __len__(self): return self.n
    def __getitem__(self, i):
        if i == 13:
            if self.how == 'raises': raise OSError('image file is truncated')
            if self.how == 'exits': os._exit(1)
            if self.how == 'killed': os.kill(os.getpid(), signal.SIGKILL)
            if self.how == 'hangs': time.sleep(60)
        return self.x[i], self.y[i]


@pytest.mark.parametrize('how, workers, words', [
    ('raises', 0, r'train: batch \d, sample 13: OSError: image file is truncated'),
    ('raises', 2, r'train: batch \d, sample 13: OSError: image file is truncated'),
    ('exits', 2, r'train: a worker died, waiting for batch \d \(samples .*13'),
    ('killed', 2, r'train: a worker died, waiting for batch \d \(samples '),
    ('hangs', 1, r'a worker hangs or is too slow: .*timed out after 2 seconds waiting for batch \d \(samples .*13')])
def test_fault_38_a_worker_that_breaks_names_the_sample(how, workers, words):
    model, optimizer = make()
    loader = DataLoader(Breaks(how), 8, shuffle=True, num_workers=workers, timeout=2 if how == 'hangs' else 0)
    started = time.time()
    with pytest.raises(RuntimeError, match=words): Trainer().fit(model, loader, None, optimizer, LOSS)
    assert time.time() - started < 60 and multiprocessing.active_children() == []
    good = DataLoader(Breaks(''), 8, num_workers=workers)
    assert len(Trainer().fit(model, good, good, optimizer, LOSS)) == 1


def test_fault_38_a_loader_without_a_limit_is_lent_one():
    loader = DataLoader(Breaks(''), 20, num_workers=1)
    it = Feed(loader).epoch()
    next(it)
    assert loader.timeout == 0
    it.close()
    assert multiprocessing.active_children() == []
    with cnnbook.feed._patience(loader): assert loader.timeout == cnnbook.feed.PATIENCE < 60
    assert loader.timeout == 0


def test_fault_39_shared_memory_too_small():
    code = '''
        import torch
        from torch import nn
        from cnnbook.trainer import Trainer
        class Big(torch.utils.data.Dataset):
            def __len__(self): return 64
            def __getitem__(self, i): return torch.zeros(3, 64, 64), 0
        torch.multiprocessing.set_sharing_strategy('file_system')
        model = nn.Sequential(nn.Flatten(), nn.Linear(3*64*64, 2))
        loader = torch.utils.data.DataLoader(Big(), 32, num_workers=1)
        Trainer().fit(model, loader, None, torch.optim.SGD(model.parameters(), .1), nn.CrossEntropyLoss())
    '''
    inner = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$0" -c "$1"'
    command = ['unshare', '-rm', 'sh', '-c', inner, sys.executable, textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if 'unshare' in done.stderr or 'mount' in done.stderr: pytest.skip('no mount namespaces here')
    said = 'train: shared memory too small for workers (/dev/shm has 0.1 MB): num_workers=0'
    assert said in done.stderr, done.stderr[-2000:]


def test_fault_40_a_class_of_the_notebook_cannot_be_spawned():
    code = '''
        import torch
        from torch import nn
        from cnnbook.trainer import Trainer
        class Mine(torch.utils.data.TensorDataset): pass
        data = Mine(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
        loader = torch.utils.data.DataLoader(data, 2, num_workers=1, multiprocessing_context='spawn')
        model = nn.Linear(2, 2)
        Trainer().fit(model, loader, None, torch.optim.SGD(model.parameters(), .1), nn.CrossEntropyLoss())
    '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert 'train: expected a data set that workers can import (start method spawn), got Mine' in done.stderr
    assert 'move the class into a .py file, or num_workers=0' in done.stderr


# --- 42, 44 ---

def test_fault_42_one_sample_and_batch_norm():
    model, optimizer = make()
    with pytest.raises(ValueError, match='expected at least 2 samples at a time for batch norm, got 1: drop_last'):
        Trainer().fit(model, batches(17, 8), None, optimizer, LOSS)


def test_fault_44_deterministic_names_the_operation_and_is_put_back():
    class Unpool(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 2)
        def forward(self, x):
            y, where = nn.functional.max_pool2d(x, 2, return_indices=True)
            return self.head(nn.functional.max_unpool2d(y, where, 2).flatten(1))

    data = [(torch.rand(4, 1, 4, 4), torch.arange(4) % 2)]
    model = Unpool()
    optimizer = torch.optim.SGD(model.parameters(), .1)
    with pytest.raises(RuntimeError, match='max_unpooling2d'):
        Trainer(deterministic=True).fit(model, data, None, optimizer, LOSS)
    assert not torch.are_deterministic_algorithms_enabled() and 'CUBLAS_WORKSPACE_CONFIG' not in os.environ
    assert len(Trainer().fit(model, data, None, optimizer, LOSS)) == 1
