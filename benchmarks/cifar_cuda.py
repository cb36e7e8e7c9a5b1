"""The fast recipe on an NVIDIA GPU, to 94 % of CIFAR-10's test set, beside airbench94 on the same GPU.

    python benchmarks/cifar_cuda.py [FOLDER OF AN AIRBENCH CHECKOUT] [EPOCHS]

A GPU has the room that the recipe's small network and batches leave: here the network is wider, the batches are larger,
and so the steps fewer and longer.

airbench94 (Keller Jordan) is no part of this project: without a checkout of it only our own figures are given, and
without a CUDA GPU none.
"""
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from cnnbook.cifar import RECIPES, train_cifar
from cnnbook.data import Loader, load
from cnnbook.fastnet import view_logits

WIDE = {'widths': (64, 256, 256), 'epochs': 8, 'batch_size': 2000, 'filter_lr': .24}


def ours(seeds=(0, 1, 2, 3, 4), epochs=None, precision='bf16-mixed'):
    "[(seconds of training, test accuracy, the same with flips and shifts)] of the fast recipe; one warm-up run before."
    train, test = load('cifar10', download=False), load('cifar10', train=False, download=False)
    recipe = replace(RECIPES['fast'], precision=precision, **WIDE | ({} if epochs is None else {'epochs': epochs}))
    train_cifar(recipe, train, epochs=1, seed=99, device='cuda')
    found = []
    for seed in seeds:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model, _, scale = train_cifar(recipe, train, seed=seed, device='cuda')
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start, *judge(model.eval(), scale, test)))
        print(f'ours, seed {seed}: {found[-1][0]:.2f} s, {found[-1][1]:.2%}, with views {found[-1][2]:.2%}', flush=True)
    return found


@torch.inference_mode()
def judge(model, scale, test):
    "(accuracy, accuracy with flips and shifts at test time)."
    plain = views = 0
    for x, y in Loader(test, 2000, transform=scale, device='cuda'):
        plain += (model(x).argmax(1) == y).sum().item()
        views += (view_logits(model, x, shift=1).argmax(1) == y).sum().item()
    return plain/len(test), views/len(test)


def airbench(folder, script='airbench94.py'):
    "What airbench94 says of itself on this GPU: {'accuracy', 'seconds'} of its last lines, as text."
    path = Path(folder)/script
    if not path.is_file(): raise SystemExit(f'folder: expected a checkout of airbench with {script}, got {folder}')
    start = time.perf_counter()
    out = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=1200)
    if out.returncode: raise SystemExit(f'{script} failed:\n{out.stderr[-2000:]}')
    rows = [[float(v) for v in re.findall(r'\d+\.\d+', line)] for line in out.stdout.splitlines() if 'eval' in line]
    print(out.stdout[-1500:])
    return {'airbench94, mean accuracy with its views': round(statistics.mean(r[-2] for r in rows), 4),
            'airbench94, median seconds': round(statistics.median(r[-1] for r in rows), 2),
            'airbench94, runs': len(rows), 'airbench94, seconds in all': round(time.perf_counter() - start)}


def main(folder='', epochs=None):
    if not torch.cuda.is_available(): return {'not run': 'no CUDA GPU here'}
    runs = ours(epochs=epochs)
    percent = lambda k: ', '.join(f'{100*r[k]:.2f}' for r in runs)
    figures = {'GPU': torch.cuda.get_device_name(), 'fast recipe, test accuracy, %': percent(1),
               'the same with flips and shifts, %': percent(2),
               'median seconds of training': round(statistics.median(r[0] for r in runs), 2)}
    if not folder: return figures | {'airbench94': 'not run: no checkout given'}
    peer = airbench(folder)
    ratio = figures['median seconds of training']/peer['airbench94, median seconds']
    return figures | peer | {'ours / airbench94, time': round(ratio, 2)}


if __name__ == '__main__':
    print(main(*sys.argv[1:2], **({'epochs': int(sys.argv[2])} if len(sys.argv) > 2 else {})))
