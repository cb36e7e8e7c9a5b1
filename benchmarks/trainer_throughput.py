"""Images a second while the 16-32-64 CIFAR net trains: `Trainer` with bf16-mixed, channels_last and batches of 128
against the plain loop in float32 with batches of 20. One thread, medians of alternating rounds, random images. On a CPU
without bfloat16 units `Trainer` computes in float32 and says so; what bfloat16 would cost there is measured as well.

    python benchmarks/trainer_throughput.py   exit code 1 if below 3 times (1 where the CPU has no bfloat16 units)
"""
import statistics
import sys
import time
import warnings

import torch
from torch import nn

from cnnbook.device import describe
from cnnbook.trainer import Trainer

IMAGES, ROUNDS = 1280, 5
LOSS = nn.CrossEntropyLoss()


def make():
    torch.manual_seed(0)
    conv = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*conv(3, 16), *conv(16, 32), *conv(32, 64), nn.Flatten(), nn.Dropout(.25),
                          nn.Linear(64*4*4, 512), nn.ReLU(), nn.Dropout(.25), nn.Linear(512, 10))
    return model, torch.optim.SGD(model.parameters(), .01, momentum=.9)


def batches(size):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(IMAGES, 3, 32, 32, generator=g), torch.arange(IMAGES) % 10
    return list(zip(x.split(size), y.split(size)))


def plain(data, half=None):
    model, optimizer = make()
    if half: model = model.to(memory_format=torch.channels_last)
    for x, y in data:
        if half: x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast('cpu', half or torch.bfloat16, enabled=half is not None): value = LOSS(model(x), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def trained(data):
    model, optimizer = make()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                     # it says that it computes in float32
        trainer = Trainer(precision='bf16-mixed', channels_last=True, enable_progress_bar=False)
        trainer.fit(model, data, None, optimizer, LOSS)


def main():
    threads, units = torch.get_num_threads(), describe().cpu_bf16
    torch.set_num_threads(1)
    small, large = batches(20), batches(128)
    sides = {'plain loop, float32, batch 20': lambda: plain(small),
             'Trainer, bf16-mixed, batch 128': lambda: trained(large),
             'plain loop, float32, batch 128': lambda: plain(large)}
    rates = {name: [] for name in sides}
    try:
        for run in sides.values(): run()
        for _ in range(ROUNDS):
            for name, run in sides.items():
                started = time.perf_counter()
                run()
                rates[name].append(IMAGES/(time.perf_counter() - started))
        started = time.perf_counter()
        plain(large[:2], torch.bfloat16)
        forced = 256/(time.perf_counter() - started)
    finally: torch.set_num_threads(threads)
    base, ours, same = rates.values()
    times = lambda them: round(statistics.median(b/a for a, b in zip(them, ours)), 2)
    figures = {f'{name}, images/s': round(statistics.median(v)) for name, v in rates.items()}
    figures |= {'bfloat16 by autocast whatever the CPU, images/s': round(forced), 'CPU has bfloat16 units': str(units),
                'Trainer: times the plain loop of batch 20': times(base),
                'Trainer: times the plain loop of batch 128': times(same)}
    for key, value in figures.items(): print(f'{key}: {value}', flush=True)
    return figures


def too_slow(figures):
    "The claim, if it does not hold."
    least = 3 if figures['CPU has bfloat16 units'] == 'True' else 1
    return [k for k in figures if k.endswith('batch 20') and k.startswith('Trainer:') and figures[k] < least]


if __name__ == '__main__':
    short = too_slow(main())
    for key in short: print(f'{key}: too slow')
    sys.exit(1 if short else 0)
