"""Exact AUROC, average precision and ROC curve of a million scores, negative ones and ties among them: `cnnbook.curves`
against scikit-learn and torchmetrics. One thread, medians of alternating rounds.

The claim is for float32 scores with ties, what a network gives. float64 without a single tie is measured beside it:
twice the bytes to move and a million thresholds to write down, so the ratio of the ROC curve is smaller there.

    python benchmarks/curves.py        exit code 1 if it is slower than claimed; torchmetrics is optional
"""
import statistics
import sys
import time

import numpy as np
import torch
from sklearn import metrics as sk

from cnnbook.curves import auroc, average_precision, roc_curve

try:
    from torchmetrics.functional import classification as tm
except ImportError:
    tm = None

FLOORS = {'scikit-learn': 8, 'torchmetrics': 6}     # times as fast, for float32
N = 1_000_000


def data(dtype, digits, seed=0):
    "Scores of two overlapping classes, three in ten positive; rounded they have ties."
    rng = np.random.default_rng(seed)
    target = (rng.random(N) < .3).astype(np.int64)
    scores = rng.standard_normal(N) + 1.2*target
    return (scores if digits is None else scores.round(digits)).astype(dtype), target


def tasks(scores, target):
    """For each figure: ours and the peers', ready to be called. torchmetrics takes a sigmoid of scores outside of 0..1,
    which can make ties; its times stand, its figures are not compared."""
    s, t = torch.from_numpy(scores), torch.from_numpy(target)
    ours = {'AUROC': lambda: auroc(s, t), 'average precision': lambda: average_precision(s, t),
            'ROC curve': lambda: roc_curve(s, t)}
    peers = {'AUROC': {'scikit-learn': lambda: sk.roc_auc_score(target, scores)},
             'average precision': {'scikit-learn': lambda: sk.average_precision_score(target, scores)},
             'ROC curve': {'scikit-learn': lambda: sk.roc_curve(target, scores, drop_intermediate=False)}}
    if tm:
        peers['AUROC']['torchmetrics'] = lambda: tm.binary_auroc(s, t, validate_args=False)
        peers['average precision']['torchmetrics'] = lambda: tm.binary_average_precision(s, t, validate_args=False)
        peers['ROC curve']['torchmetrics'] = lambda: tm.binary_roc(s, t, validate_args=False)
    return ours, peers


def same(scores, target):
    "The figures must be equal before times are compared."
    pairs = [(auroc(scores, target), sk.roc_auc_score(target, scores)),
             (average_precision(scores, target), sk.average_precision_score(target, scores))]
    for got, want in pairs:
        if abs(got - want) > 1e-7: raise SystemExit(f'not the same figure: {got} and {want}')
    ours, theirs = roc_curve(scores, target), sk.roc_curve(target, scores, drop_intermediate=False)
    for got, want in zip((ours.fpr, ours.tpr, ours.thresholds), theirs):
        if not np.allclose(got, want, rtol=0, atol=1e-7): raise SystemExit('not the same curve')


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def measure(rounds):
    figures = {}
    for name, dtype, digits in (('float32', np.float32, 5), ('float64', np.float64, None)):
        scores, target = data(dtype, digits)
        same(scores, target)
        ours, peers = tasks(scores, target)
        for task, mine in ours.items():
            sides = {'cnnbook': mine, **peers[task]}
            for f in sides.values(): f()                                       # once to warm up
            took = [{side: seconds(f) for side, f in sides.items()} for _ in range(rounds)]
            key = f'{task} of 1e6 {name}'
            figures[f'{key}: cnnbook, ms'] = round(1000*statistics.median(r['cnnbook'] for r in took), 1)
            for side in peers[task]:
                ratios = [r[side]/r['cnnbook'] for r in took]
                figures |= {f'{key}: {side}, ms': round(1000*statistics.median(r[side] for r in took), 1),
                            f'{key}: times as fast as {side}': round(statistics.median(ratios), 1),
                            f'{key}: times, least to most, {side}': f'{min(ratios):.1f} to {max(ratios):.1f}'}
            print(*(f'{k}: {v}' for k, v in figures.items() if k.startswith(key)), sep='\n', flush=True)
    return figures


def main(rounds=7):
    "The figures as a dict, measured on one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: return measure(rounds)
    finally: torch.set_num_threads(threads)


def too_slow(figures):
    "The claims that do not hold."
    return [f'{k}: {v}' for side, floor in FLOORS.items() for k, v in figures.items()
            if k.endswith(f'float32: times as fast as {side}') and v < floor]


if __name__ == '__main__':
    short = too_slow(main())
    for line in short: print(f'{line}; expected at least {FLOORS}')
    sys.exit(1 if short else 0)
