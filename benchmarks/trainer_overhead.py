"""What three callbacks and logging add to a step of the plain loop: `Trainer`, Lightning's Trainer and fastai's Learner
on one tiny net, one thread, medians of paired runs. fastai needs another fastcore than nbdev: it runs with the Python
named by $CNNBOOK_FASTAI. What is not installed is left out, and said.

    python benchmarks/trainer_overhead.py     exit code 1 if `Trainer` adds over 45 %, or over a sixth of a peer's share
"""
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import torch
from torch import nn

MOST, TIMES = 45, 6              # percent that may be added; times less than each peer
STEPS, ROUNDS = 1500, 7
LOSS = nn.CrossEntropyLoss()


class Loader:
    "A list of batches; Lightning takes a bare list for a list of loaders."
    def __init__(self, batches): self.batches = batches
    def __len__(self): return len(self.batches)
    def __iter__(self): return iter(self.batches)


def batches():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(STEPS*32, 2, generator=g), torch.arange(STEPS*32) % 3
    return Loader(list(zip(x.split(32), y.split(32))))


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))
    return model, torch.optim.SGD(model.parameters(), .1)


def plain(data):
    model, optimizer = make()
    total = 0.
    for x, y in data:
        value = LOSS(model(x), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        total += value.item()*len(x)
    return total


def listening(base, hooks):
    "A callback of `base` that counts in these hooks."
    def count(self, *args, **more): self.n = getattr(self, 'n', 0) + 1
    return type('Counting', (base,), {name: count for name in hooks})()


HOOKS = ('on_train_batch_start', 'on_before_optimizer_step', 'on_train_batch_end')


def ours(data):
    from cnnbook.callbacks import CSVLogger
    from cnnbook.events import Callback
    from cnnbook.trainer import Trainer
    model, optimizer = make()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(callbacks=[listening(Callback, [h]) for h in HOOKS], logger=CSVLogger(folder),
                          enable_progress_bar=False)
        trainer.fit(model, data, None, optimizer, LOSS)


def lightning(data):
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.optimizer = make()

        def configure_optimizers(self): return self.optimizer
        def training_step(self, batch, i):
            value = LOSS(self.net(batch[0]), batch[1])
            self.log('train_loss', value, on_step=True, on_epoch=True, batch_size=len(batch[0]))
            return value

    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(max_epochs=1, callbacks=[listening(L.Callback, [h]) for h in HOOKS], logger=CSVLogger(folder),
                  accelerator='cpu', enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                  ).fit(Module(), data)


def fastai(data):
    from fastai.callback.core import Callback
    from fastai.callback.progress import CSVLogger
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    model, _ = make()
    hooks = ('before_batch', 'before_step', 'after_batch')
    cbs = [type(f'Count{k}', (Callback,), {h: lambda self: setattr(self, 'n', getattr(self, 'n', 0) + 1)})()
           for k, h in enumerate(hooks)]
    with tempfile.TemporaryDirectory() as folder:
        loaders = DataLoaders(data, Loader(data.batches[:1]))
        learner = Learner(loaders, model, LOSS, lr=.1, path=folder, cbs=[*cbs, CSVLogger()])
        with learner.no_bar(), learner.no_logging(): learner.fit(1)


def pairs(run, data):
    "Seconds a step of the plain loop and of `run`, alternating."
    def seconds(f):
        started = time.perf_counter()
        f(data)
        return (time.perf_counter() - started)/STEPS
    for f in (plain, run): f(data)
    return [(seconds(plain), seconds(run)) for _ in range(ROUNDS)]


def peer(name, python=sys.executable):
    "The pairs of one side, measured in a process of its own; None if it is not installed there."
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run([python, __file__, name], capture_output=True, text=True, env=env)
    if done.returncode: print(f'{name} left out: {done.stderr.strip().splitlines()[-1]}')
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main():
    figures, added = {}, {}
    sides = {'Trainer': ('ours', sys.executable), 'Lightning': ('lightning', sys.executable),
             'fastai': ('fastai', os.environ.get('CNNBOOK_FASTAI', sys.executable))}
    for name, (side, python) in sides.items():
        measured = peer(side, python)
        if measured is None: continue
        base = statistics.median(a for a, _ in measured)
        added[name] = statistics.median(b - a for a, b in measured)
        share = 100*statistics.median((b - a)/a for a, b in measured)
        figures |= {f'{name}: plain loop, us a step': round(base*1e6),
                    f'{name}: added, us a step': round(added[name]*1e6),
                    f'{name}: added, % of the plain loop': round(share, 1)}
        print(f'{name}: plain {base*1e6:.0f} us, {added[name]*1e6:.0f} us added ({share:.0f} %)', flush=True)
    figures |= {f'{name}: times as much as Trainer adds': round(added[name]/added['Trainer'], 1)
                for name in added if name != 'Trainer'}
    return figures


def too_slow(figures):
    "The claims that do not hold."
    return [k for k, v in figures.items() if k == 'Trainer: added, % of the plain loop' and v > MOST or
            'times as much' in k and v < TIMES]


if __name__ == '__main__':
    if sys.argv[1:]:
        torch.set_num_threads(1)
        warnings.simplefilter('ignore')
        logging.disable(logging.INFO)
        print(json.dumps(pairs(globals()[sys.argv[1]], batches())))
    else:
        short = too_slow(figures := main())
        for key in short: print(f'{key}: got {figures[key]}')
        sys.exit(1 if short else 0)
