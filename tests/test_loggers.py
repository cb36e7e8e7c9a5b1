"Loggers: files read back by the programs that they are for, and what a cell cannot do to a disk."
import csv
import os
import random
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from cnnbook.loggers import CSVLogger, read_metrics
from cnnbook.loop import spirals
from cnnbook.trainer import Trainer


def batches(n=40, size=16, seed=0):
    x, y = spirals(n, seed=seed)
    return list(zip(x.split(size), y.split(size)))


def fit(logger, epochs=3, **more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    run = Trainer(max_epochs=epochs, logger=logger, log_every_n_steps=2, enable_progress_bar=False, hparams={'lr': .1})
    run.fit(model, batches(), batches(seed=1), torch.optim.SGD(model.parameters(), .1), nn.CrossEntropyLoss(), **more)
    return model, run


@pytest.mark.parametrize('seed', range(20))
def test_csv_random_rows_are_read_back(tmp_path, seed):
    draw, step, told = random.Random(seed), 0, {}
    names = ['loss', 'a,b', 'with "quotes"', 'ümlaut', 'lr-SGD/pg1']
    log = CSVLogger(tmp_path, version='one')
    for _ in range(40):
        step += draw.choice([0, 1, 7])
        row = {n: draw.choice([draw.random()*10**draw.randint(-9, 9), draw.randint(-5, 5), float('inf')])
               for n in draw.sample(names, draw.randint(1, 3))}
        log.log_metrics(row, step)
        told.setdefault(step, {'step': step}).update(row)
        if draw.random() < .1:                       # another process goes on, perhaps from an earlier step
            step = max(0, step - draw.choice([0, 5]))
            told = {s: r for s, r in told.items() if s < step + 1}
            log, step = CSVLogger(tmp_path, version='one'), step + 1
            log.log_metrics({'loss': 1}, step)
            told = {s: r for s, r in told.items() if s < step} | {step: {'step': step, 'loss': 1}}
    assert log.metrics == list(told.values()) == read_metrics(log.path)
    with open(log.path, newline='', encoding='utf-8') as f: widths = {len(r) for r in csv.reader(f)}
    assert len(widths) == 1


def test_csv_no_half_line_is_left_on_a_full_disk(tmp_path):
    run = subprocess.run([sys.executable, '-W', 'error::DeprecationWarning', '-c', textwrap.dedent('''
        import resource, signal, sys, warnings
        from cnnbook.loggers import CSVLogger
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log = CSVLogger(sys.argv[1])
        for step in range(3): log.log_metrics({'loss': 1/3}, step)
        size = log.path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, resource.RLIM_INFINITY))
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always')
            log.log_metrics({'loss': 1/3}, 3)              # a longer line than there is room for
            log.log_metrics({'loss': 1/3, 'new': 1}, 4)    # a new file
        assert log.path.stat().st_size == size and len(heard) == 2 and not list(log.log_dir.glob('.*'))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,)*2)
        log.log_metrics({'loss': 1/3, 'new': 1}, 5)
        assert [r['step'] for r in log.metrics] == [0, 1, 2, 5] and log.metrics[-1]['new'] == 1
        '''), tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_csv_of_a_run_is_its_history(tmp_path):
    log = CSVLogger(tmp_path)
    _, run = fit(log)
    rows = [r for r in log.metrics if 'valid_loss' in r]
    for row, mine in zip(run.history, rows):
        assert all(mine[k] == v for k, v in row.items() if k != 'seconds') and mine['step'] == 3*(row['epoch'] + 1)
    assert [r['step'] for r in log.metrics if 'train_loss_step' in r] == [2, 4, 6, 8]


def accumulated(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_reads_back_a_run_that_goes_on(tmp_path):
    pytest.importorskip('tensorboard')
    from cnnbook.boards import TensorBoardLogger
    log = TensorBoardLogger(tmp_path, version='mine')
    model, run = fit(log)
    with_graph = TensorBoardLogger(tmp_path, 'graph')
    with_graph.log_graph(model, torch.zeros(2, 2))
    with_graph.log_image('dots', torch.zeros(1, 5, 7, dtype=torch.uint8), 3)
    with_graph.finalize('success')
    seen = accumulated(with_graph.log_dir)
    assert (seen.Images('dots')[0].width, seen.Images('dots')[0].height) == (7, 5)
    assert sum('Linear' in n.name for n in seen.Graph().node) >= 4
    assert 'hparams/text_summary' in accumulated(log.log_dir).Tags()['tensors']
    again = TensorBoardLogger(tmp_path, version='mine')
    again.log_metrics({'valid_loss': 7.}, 6)                     # what was at 6 and later never was
    again.finalize('success')
    assert [(e.step, e.value) for e in accumulated(log.log_dir).Scalars('valid_loss')] == [
        (3, pytest.approx(run.history[0]['valid_loss'])), (6, 7.)]


def wandb_records(path):
    "Records of a .wandb file: LevelDB's log format, blocks of 32 kB, after a head of 7 bytes."
    from wandb.proto import wandb_internal_pb2
    data, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7: at += left; continue
        _, n, kind = struct.unpack('<IHB', data[at:at + 7])
        parts.append(data[at + 7:at + 7 + n])
        at += 7 + n
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b''.join(parts))
            yield record
            parts = []


def test_wandb_offline_without_a_network(tmp_path):
    pytest.importorskip('wandb')
    code = '''
        import sys
        sys.path.insert(0, 'tests')
        from test_loggers import *
        from cnnbook.boards import WandbLogger
        log = WandbLogger(sys.argv[1], name='spiral')
        fit(log)
        log.log_image('dots', torch.zeros(3, 4, 6), 9)
        log.finalize('success')
        '''
    home = {f'WANDB_{n}_DIR': str(tmp_path/n) for n in ('CACHE', 'CONFIG', 'DATA', 'ARTIFACT')}
    cut = ['unshare', '-rn']                                    # a process that has no network, where that can be had
    if not shutil.which('unshare') or subprocess.run([*cut, 'true']).returncode: cut = []
    run = subprocess.run([*cut, sys.executable, '-c', textwrap.dedent(code), tmp_path/'run'], capture_output=True,
                         text=True, timeout=100, cwd=Path(__file__).parent.parent,
                         env={**os.environ, **home, 'HOME': str(tmp_path)})
    assert run.returncode == 0, run.stderr
    path, = (p for p in (tmp_path/'run').rglob('*.wandb') if p.stat().st_size > 3000)
    rows = [{'/'.join(i.nested_key) or i.key: i.value_json for i in r.history.item} for r in wandb_records(path)
            if r.WhichOneof('record_type') == 'history']
    steps = {int(r['_step']): r for r in rows}
    assert list(steps) == [2, 3, 4, 6, 8, 9] and float(steps[9]['valid_loss']) > 0 and 'train_loss_step' in steps[2]
    assert 'offline' in str(path)
