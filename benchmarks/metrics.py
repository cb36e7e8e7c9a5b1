"""Confusion matrix and per-class precision, recall and F1 of 100,000 labels of ten classes: cnnbook, scikit-learn and,
where it is installed, torchmetrics. One thread, medians of alternating rounds; each side gets labels in its own kind of
array.

    python benchmarks/metrics.py        exit code 1 if less than 25 and 15 times as fast as scikit-learn
"""
import statistics
import sys
import time
from importlib.util import find_spec

import numpy as np
import torch
from sklearn import metrics as sk

from cnnbook.metrics import Confusion, confusion_matrix, f1, precision, recall

N, K = 100_000, 10
FLOORS = {'confusion matrix': 25, 'per-class P/R/F1': 15}   # times as fast as scikit-learn


def labels(seed=0):
    "Predicted and true labels, 80 % right."
    rng = np.random.default_rng(seed)
    target = rng.integers(0, K, N)
    return np.where(rng.random(N) < .8, target, rng.integers(0, K, N)), target


def ours(pred, target):
    p, t = torch.tensor(pred), torch.tensor(target)

    def scores():
        c = Confusion(confusion_matrix(p, t, K))
        return torch.stack([c.precision(), c.recall(), c.f_beta()])

    three = lambda: torch.stack([f(p, t, K) for f in (precision, recall, f1)])   # three calls, three matrices
    return {'confusion matrix': lambda: confusion_matrix(p, t, K), 'per-class P/R/F1': scores,
            'per-class P/R/F1 by three calls': three}


def scikit_learn(pred, target):
    scores = lambda: np.stack(sk.precision_recall_fscore_support(target, pred)[:3])
    return {'confusion matrix': lambda: sk.confusion_matrix(target, pred), 'per-class P/R/F1': scores}


def torchmetrics(pred, target):
    from torchmetrics.functional import classification as tm
    p, t = torch.tensor(pred), torch.tensor(target)
    each = tm.multiclass_precision, tm.multiclass_recall, tm.multiclass_f1_score
    scores = lambda: torch.stack([f(p, t, K, average=None) for f in each])
    return {'confusion matrix': lambda: tm.multiclass_confusion_matrix(p, t, K), 'per-class P/R/F1': scores}


def clock(work):
    "Milliseconds of one call, the mean of several that take at least 20 ms together."
    start, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start < .02:
        work()
        calls += 1
    return 1000*(time.perf_counter() - start)/calls


def measure(rounds):
    sides = {'cnnbook': ours, 'scikit-learn': scikit_learn}
    if find_spec('torchmetrics'): sides['torchmetrics'] = torchmetrics
    jobs = {(name, job): work for name, side in sides.items() for job, work in side(*labels()).items()}
    for (name, job), work in jobs.items():                                  # the same answers, or no race
        job = job.removesuffix(' by three calls')
        if not np.allclose(work(), jobs['scikit-learn', job](), rtol=0, atol=1e-6):
            raise SystemExit(f'{name}: another {job} than scikit-learn')
    times = [{key: clock(work) for key, work in jobs.items()} for _ in range(rounds)]
    figures = {f'{job}: {name}, ms': round(statistics.median(t[name, job] for t in times), 3) for name, job in jobs}
    for job in [job for name, job in jobs if name == 'cnnbook']:
        for peer in [s for s in sides if s != 'cnnbook']:
            ratios = [t[peer, job.removesuffix(' by three calls')]/t['cnnbook', job] for t in times]
            figures[f'{job}: times as fast as {peer}'] = round(statistics.median(ratios), 1)
            print(f'{job}: {statistics.median(ratios):.1f} times as fast as {peer} '
                  f'({min(ratios):.1f} to {max(ratios):.1f} in {rounds} rounds)', flush=True)
    return figures


def main(rounds=9):
    "The figures as a dict, measured on one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: return measure(rounds)
    finally: torch.set_num_threads(threads)


def too_slow(figures):
    "The claims that do not hold."
    return [job for job, floor in FLOORS.items() if figures[f'{job}: times as fast as scikit-learn'] < floor]


if __name__ == '__main__':
    short = too_slow(main())
    for job in short: print(f'{job}: expected at least {FLOORS[job]}')
    sys.exit(1 if short else 0)
