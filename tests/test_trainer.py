"The loop, its events and the trainer: what a cell cannot say (another process, another library, every hook)."
import inspect
import os
import signal
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

import cnnbook.trainer
from cnnbook.events import HOOKS, Callback, Evaluator
from cnnbook.loop import fit_plain, plot_history, spirals
from cnnbook.trainer import Trainer

LOSS = nn.CrossEntropyLoss()


def batches(n=40, size=16, seed=0):
    x, y = spirals(n, seed=seed)
    return list(zip(x.split(size), y.split(size)))


def make(seed=0, **more):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(.2), nn.Linear(8, 3))
    return model, torch.optim.SGD(model.parameters(), .1, momentum=.9, **more)


def recorder(base=Callback):
    events = []
    note = lambda name: lambda self, trainer, pl_module, *args, **more: events.append(name)
    return type('Recorder', (base,), {name: note(name) for name in HOOKS})(), events


def raising(hook, error, at=0):
    class Raising(Callback):
        calls = 0

    def act(self, *args, **more):
        self.calls += 1
        if self.calls > at: raise error

    setattr(Raising, hook, act)
    return Raising()


# The plain loop is the measure

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_bit_equal_to_the_plain_loop(dtype):
    train, valid = ([(x.to(dtype), y) for x, y in batches(seed=s)] for s in (0, 1))
    model, optimizer = make()
    rows = fit_plain(model.to(dtype), train, valid, optimizer, LOSS, epochs=4)
    again, optimizer = make()
    history = Trainer(max_epochs=4).fit(again.to(dtype), train, valid, optimizer, LOSS)
    assert history.column('train_loss') == [r['train_loss'] for r in rows]
    assert history.column('valid_loss') == [r['valid_loss'] for r in rows]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_data_loader_with_workers_and_sampler():
    class Sampler(torch.utils.data.SequentialSampler):
        epochs = []
        def set_epoch(self, epoch): self.epochs.append(epoch)

    data = torch.utils.data.TensorDataset(*spirals(40))
    loader = torch.utils.data.DataLoader(data, batch_size=16, sampler=Sampler(data), num_workers=1,
                                         generator=torch.Generator())       # else it draws from the global one
    model, optimizer = make()
    history = Trainer(max_epochs=2).fit(model, loader, loader, optimizer, LOSS)
    again, optimizer = make()
    assert Sampler.epochs == [0, 1]
    plain = Trainer(max_epochs=2).fit(again, batches(), None, optimizer, LOSS)
    assert history.column('train_loss') == plain.column('train_loss')


@pytest.mark.parametrize('x, y, out, loss, names', [
    (torch.randn(6, 3, 4, 4), torch.randint(0, 5, (6, 4, 4)), nn.Conv2d(3, 5, 1), LOSS, ['loss', 'acc']),
    (torch.randn(6, 3), torch.randn(6, 2), nn.Linear(3, 2), nn.MSELoss(), ['loss']),
    (torch.randn(6, 3), torch.rand(6, 2), nn.Linear(3, 2), nn.BCEWithLogitsLoss(), ['loss']),
    (torch.randn(6, 3), torch.randn(6, 2).softmax(1), nn.Linear(3, 2), LOSS, ['loss']),
    (torch.randn(6, 3), torch.arange(6) % 2, nn.Linear(3, 2), nn.CrossEntropyLoss(reduction='sum'), ['loss', 'acc'])])
def test_kinds_of_targets(x, y, out, loss, names):
    result = Evaluator().validate(out, [(x[:4], y[:4]), (x[4:], y[4:])], loss)
    assert list(result) == [f'valid_{n}' for n in names]
    whole = loss(out(x), y).item()/(6 if loss.reduction == 'sum' else 1)
    assert result['valid_loss'] == pytest.approx(whole, rel=1e-5)
    Trainer().fit(out, [(x, y)], None, torch.optim.SGD(out.parameters(), .01), loss)


# Faults

@pytest.mark.parametrize('bad, words', [
    (torch.tensor([0, 3]), 'got 3 at index 1'), (torch.tensor([-1, 0]), 'got -1 at index 0'),
    (torch.tensor([0., 1.]), 'got torch.float32'), (torch.tensor([0, 1], dtype=torch.int32), 'got torch.int32'),
    (torch.tensor([[1, 0, 0], [0, 1, 0]]), 'one-hot'), (torch.tensor([-100, -100]), 'got only -100')])
def test_fault_15_bad_labels_are_named_and_nothing_is_learnt(bad, words):
    model, optimizer = make()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match='labels: .*' + words):
        Trainer().fit(model, [(torch.randn(2, 2), bad)], None, optimizer, LOSS)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_fault_15_an_ignored_batch_does_not_spoil_the_mean():
    model, _ = make()
    x, y = batches()[0]
    alone = Evaluator().validate(model, [(x, y)], LOSS)
    assert Evaluator().validate(model, [(x, y), (x, torch.full_like(y, -100))], LOSS) == alone


@pytest.mark.parametrize('spoil', ['inputs', '0.weight', 'rate'])
def test_fault_33_not_finite_names_the_first(spoil):
    model, optimizer = make()
    data = batches()
    if spoil == 'inputs': data[1][0][3, 0] = float('inf')
    if spoil == '0.weight': model[0].weight.data[0, 0] = float('nan')
    if spoil == 'rate': optimizer.param_groups[0]['lr'] = 1e38
    named = {'inputs': 'step 1, .*the inputs', '0.weight': 'step 0, .*0.weight', 'rate': '.*lr 1e[+]38'}[spoil]
    with pytest.raises(ValueError, match='loss: expected a finite number.*epoch 0, ' + named):
        Trainer(max_epochs=3).fit(model, data, None, optimizer, LOSS)
    model, optimizer = make()
    data = batches()
    data[1][0][3, 0] = float('nan')
    history = Trainer(terminate_on_nan=False).fit(model, data, None, optimizer, LOSS)
    assert history[0]['train_loss'] != history[0]['train_loss']            # asked not to stop: NaN is shown, not hidden


FIT_HOOKS = [h for h in HOOKS if not any(w in h for w in ('test', 'predict', 'sanity', 'checkpoint', 'exception'))]


@pytest.mark.parametrize('hook', FIT_HOOKS)
@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError('disk full')])
def test_fault_35_broken_off_in_any_hook(hook, error):
    model, optimizer = make()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    rec, events = recorder()
    trainer = Trainer(max_epochs=2, callbacks=[raising(hook, error), rec])
    if isinstance(error, KeyboardInterrupt): trainer.fit(model, batches(), batches(), optimizer, LOSS)
    else:
        with pytest.raises(OSError, match='disk full'): trainer.fit(model, batches(), batches(), optimizer, LOSS)
    assert trainer.interrupted and events[-1] == 'on_exception' and events.count('on_exception') == 1
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()
    del trainer.callbacks[0]
    assert len(trainer.fit(model, batches(), batches(), optimizer, LOSS)) == 2 and not trainer.interrupted


def test_fault_35_a_real_interrupt(tmp_path):
    script = tmp_path/'run.py'
    script.write_text('''
import signal, torch
signal.signal(signal.SIGINT, signal.default_int_handler)      # ignored where the tests run in the background
from torch import nn
from cnnbook.events import Callback
from cnnbook.trainer import Trainer
class Ready(Callback):
    def on_train_epoch_end(self, trainer, pl_module): print('epoch', trainer.current_epoch, flush=True)
model, was = nn.Linear(2, 3), signal.getsignal(signal.SIGINT)
data = [(torch.randn(8, 2), torch.randint(0, 3, (8,)))]*20
trainer = Trainer(max_epochs=10**6, callbacks=Ready())
history = trainer.fit(model, data, None, torch.optim.SGD(model.parameters(), .1), nn.CrossEntropyLoss())
assert trainer.interrupted and len(history) >= 2 and signal.getsignal(signal.SIGINT) is was
print('after:', len(history))
''')
    env, pipe = os.environ | {'OMP_NUM_THREADS': '1'}, subprocess.PIPE
    run = subprocess.Popen([sys.executable, str(script)], stdout=pipe, stderr=pipe, text=True, env=env)
    try:
        while 'epoch 1' not in run.stdout.readline(): assert run.poll() is None, run.stderr.read()
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 0 and 'stopped in epoch' in out and 'after:' in out and 'Traceback' not in err


@pytest.mark.parametrize('verb', ['validate', 'test', 'predict'])
def test_fault_35_looking_passes_the_interrupt_on(verb):
    model, _ = make()
    hook = f"on_{'validation' if verb == 'validate' else verb}_batch_end"
    args = () if verb == 'predict' else (LOSS,)
    evaluator = Evaluator(callbacks=raising(hook, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): getattr(evaluator, verb)(model, batches(), *args)
    assert model.training and torch.is_grad_enabled()


def test_fault_41_the_cell_run_twice():
    model, optimizer = make()
    rec, events = recorder()
    trainer = Trainer(max_epochs=2, callbacks=rec)
    first = trainer.fit(model, batches(), batches(), optimizer, LOSS)
    n = len(events)
    second = trainer.fit(model, batches(), batches(), optimizer, LOSS)
    assert second.column('epoch') == [0, 1] == first.column('epoch') and events[:n] == events[n:]
    assert second is not first and trainer.global_step == 6 and second[0]['train_loss'] < first[0]['train_loss']


@pytest.mark.parametrize('data', [[], torch.utils.data.DataLoader(torch.arange(3), 8, drop_last=True)])
def test_fault_42_nothing_to_learn_from(data):
    model, optimizer = make()
    rec, events = recorder()
    trainer = Trainer(callbacks=rec)
    for train, valid, name in (data, batches(), 'train'), (batches(), data, 'valid'):
        with pytest.raises(ValueError, match=name + ': expected at least one batch, got 0'):
            trainer.fit(model, train, valid, optimizer, LOSS)
    assert events == []                                                    # before anything was announced


def test_fault_42_a_loader_that_lies_about_its_length():
    class Lying(list):
        def __iter__(self): return iter(())

    model, optimizer = make()
    with pytest.raises(ValueError, match='train: expected at least one'):
        Trainer().fit(model, Lying([1]), None, optimizer, LOSS)


def test_fault_43_same_seed_same_weights_and_no_number_drawn():
    weights = []
    for before in (0, 5):
        torch.rand(before)
        model, optimizer = make()
        Trainer(max_epochs=2).fit(model, batches(), batches(), optimizer, LOSS)
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*weights)
    net = nn.Linear(2, 3)                                                  # no dropout: training draws no number at all
    state = torch.get_rng_state()
    Trainer().fit(net, batches(), batches(), torch.optim.SGD(net.parameters(), .1), LOSS)
    assert torch.equal(torch.get_rng_state(), state)


# What is left behind

def test_no_graph_is_kept():
    class Kept:
        alive = weakref.WeakSet()
        def __init__(self, t): self.t = t.detach(); Kept.alive.add(self)

    model, optimizer = make()
    trainer, counts = Trainer(max_epochs=2), []

    class Count(Callback):
        def on_train_batch_start(self, *args): counts.append(len(Kept.alive))

    trainer.callbacks.append(Count())
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda k: k.t):
        trainer.fit(model, batches(400), batches(), optimizer, LOSS)
    assert max(counts[2:]) <= counts[1] and len(Kept.alive) == 0


def test_no_warning_no_output_no_open_figure(capsys):
    import matplotlib.pyplot as plt
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model, optimizer = make()
        trainer = Trainer(max_epochs=2)
        trainer.fit(model, batches(), batches(), optimizer, LOSS, OneCycleLR(optimizer, .1, total_steps=6))
        plot_history(trainer.history)
    assert plt.get_fignums() == [] and capsys.readouterr() == ('', '')


def slow_clock(monkeypatch):
    ticks = iter(range(0, 10**6, 3))
    monkeypatch.setattr(cnnbook.trainer.time, 'perf_counter', lambda: next(ticks))


def test_progress_bar_only_in_a_long_fit(monkeypatch, capsys):
    slow_clock(monkeypatch)                                                # three seconds pass between two looks
    model, optimizer = make()
    Trainer(max_epochs=2).fit(model, batches(), None, optimizer, LOSS)
    shown = capsys.readouterr().err
    assert '/6' in shown and shown.endswith('\r')                          # it was there, and it is wiped away
    Trainer(max_epochs=2, enable_progress_bar=False).fit(model, batches(), None, optimizer, LOSS)
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('end', ['full', 'stop', 'error'])
def test_progress_bar_in_a_notebook_is_closed(monkeypatch, end):
    from tqdm.notebook import tqdm
    bars = []
    monkeypatch.setattr(cnnbook.trainer, 'tqdm', lambda **kw: bars.append(tqdm(**kw, display=False)) or bars[-1])
    slow_clock(monkeypatch)

    class End(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = end == 'stop'
            if end == 'error' and trainer.global_step == 2: raise OSError

    model, optimizer = make()
    try: Trainer(max_epochs=2, callbacks=End()).fit(model, batches(), None, optimizer, LOSS)
    except OSError: pass
    assert len(bars) == 1 and bars[0].container.children[1].bar_style != 'danger'


# Lightning

def in_lightning(loss=LOSS):
    lightning = pytest.importorskip('lightning')

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make()[0]

        def forward(self, x): return self.net(x)
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .1, momentum=.9)
        def training_step(self, batch, i): return loss(self(batch[0]), batch[1])
        def noted(self, name, x, y): self.log(name, loss(self(x), y), batch_size=len(x))
        def validation_step(self, batch, i): self.noted('valid_loss', *batch)
        def test_step(self, batch, i): self.noted('test_loss', *batch)
        def predict_step(self, batch, i): return self(batch[0])

    def trainer(**more):
        more = {'logger': False, 'enable_checkpointing': False, 'num_sanity_val_steps': 0} | more
        return lightning.Trainer(accelerator='cpu', enable_progress_bar=False, enable_model_summary=False, **more)

    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*spirals(40)), batch_size=16)
    return lightning, Module(), trainer, loader


@pytest.mark.filterwarnings('ignore')
def test_lightning_announces_the_same_hooks():
    _, module, trainer, loader = in_lightning()
    theirs, heard = recorder()
    run = trainer(max_epochs=2, callbacks=[theirs])
    run.fit(module, loader, loader)
    run.validate(module, loader, verbose=False)
    run.test(module, loader, verbose=False)
    run.predict(module, loader)
    ours, events = recorder()
    model, optimizer = make()
    run = Trainer(max_epochs=2, callbacks=ours)
    run.fit(model, loader, loader, optimizer, LOSS)
    run.validate(model, loader, LOSS)
    run.test(model, loader, LOSS)
    run.predict(model, loader)
    assert events == heard and len(events) > 60


@pytest.mark.filterwarnings('ignore')
def test_lightning_after_an_error():
    _, module, trainer, loader = in_lightning()
    theirs, heard = recorder()
    run = trainer(max_epochs=2, callbacks=[raising('on_after_backward', OSError(), at=1), theirs])
    with pytest.raises(OSError): run.fit(module, loader)
    ours, events = recorder()
    model, optimizer = make()
    run = Trainer(max_epochs=2, callbacks=[raising('on_after_backward', OSError(), at=1), ours])
    with pytest.raises(OSError): run.fit(model, loader, None, optimizer, LOSS)
    assert events == heard and events[-1] == 'on_exception'


@pytest.mark.filterwarnings('ignore')
def test_lightning_a_callback_with_state_runs_under_both(tmp_path):
    class Best(Callback):
        def __init__(self): self.loss, self.steps = float('inf'), []
        def on_validation_end(self, trainer, pl_module):
            self.loss = min(self.loss, float(trainer.callback_metrics['valid_loss']))
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert float(outputs['loss']) > 0
            self.steps.append((trainer.current_epoch, trainer.global_step, trainer.num_training_batches))
        def state_dict(self): return {'loss': self.loss}
        def load_state_dict(self, state_dict): self.loss = state_dict['loss']

    _, module, trainer, loader = in_lightning()
    theirs, ours = Best(), Best()
    more = {'max_epochs': 2, 'default_root_dir': tmp_path, 'enable_checkpointing': True}
    trainer(callbacks=[theirs], **more).fit(module, loader, loader)
    model, optimizer = make()
    Trainer(max_epochs=2, callbacks=ours).fit(model, batches(), batches(), optimizer, LOSS)
    assert ours.steps == theirs.steps and theirs.loss < float('inf') and ours.loss < float('inf')
    loaded = Best()                                                        # its state went through a checkpoint
    path = next(tmp_path.rglob('*.ckpt'))
    trainer(callbacks=[loaded], **more).fit(module, loader, loader, ckpt_path=path)
    assert loaded.loss == pytest.approx(theirs.loss)


def test_lightning_has_the_same_hooks_and_arguments():
    lightning = pytest.importorskip('lightning')
    theirs = {n for n in dir(lightning.Callback) if n.startswith('on_') or n in ('setup', 'teardown')}
    assert theirs == set(HOOKS)
    plain = lambda f: [(p.name, p.default) for p in inspect.signature(f).parameters.values()]
    for name in HOOKS: assert plain(getattr(Callback, name)) == plain(getattr(lightning.Callback, name)), name


def test_lightning_callbacks_run_here():
    lightning = pytest.importorskip('lightning')

    class Theirs(lightning.Callback):
        n = 0
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx): self.n += 1

    theirs = Theirs()
    model, optimizer = make()
    Trainer(callbacks=theirs).fit(model, batches(), batches(), optimizer, LOSS)
    assert theirs.n == 3
