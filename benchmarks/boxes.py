"""Suppression of boxes and quads: `cnnbook.boxes` against torchvision's NMS and against `lanms-neo` 1.0.2 (MIT, from
PyPI), a packaged form of the locality-aware NMS that EAST came with. One thread, processor time, medians of alternating
rounds; the rows and quads kept are compared before times are.

Dense: text lines whose every fourth pixel gives a quad with noise of a pixel, row by row, as a text detector does.
Sparse: quads or boxes that hardly overlap, so that nearly all are kept.

    pip install lanms-neo            needs a C++ compiler; CNNBOOK_PEERS=FOLDER names a folder where it lies
    python benchmarks/boxes.py       exit code 1 if it is slower than claimed
"""
import os
import statistics
import sys
import time

import numpy as np
import torch
import torchvision

from cnnbook.boxes import lanms, load_cext, nms

if os.environ.get('CNNBOOK_PEERS'): sys.path.append(os.environ['CNNBOOK_PEERS'])
try:
    from lanms import merge_quadrangle_n9 as peer_lanms
except ImportError:
    peer_lanms = None

FLOORS = {'lanms, dense 1k': 15, 'lanms, dense 10k': 30, 'lanms, dense 50k': 80, 'lanms, sparse 1k': 2000,
          'nms, sparse 10k': 50, 'nms, sparse 50k': 200, 'nms, dense 1k': 1}    # times as fast as the peer


def dense_quads(n, seed=0):
    "n quads in pixel order: lines of text, each with about 250 answers."
    r = np.random.default_rng(seed)
    lines, quads, places = -(-n//250), [], []
    columns = max(1, int(np.sqrt(lines/4)))
    for k in range(lines):
        w, h, angle = r.uniform(150, 250), r.uniform(50, 70), r.uniform(-.15, .15)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        corner = np.array([k % columns*320, k//columns*130]) + r.uniform(0, 20, 2)
        pixels = np.stack(np.meshgrid(np.arange(.1*w, .9*w, 4), np.arange(.15*h, .85*h, 4)), -1).reshape(-1, 2)
        quad = np.array([(0, 0), (w, 0), (w, h), (0, h)]) @ turn + corner
        quads.append(quad + r.normal(0, 1, (len(pixels), 4, 2)))
        places.append(pixels @ turn + corner)
    quads, places = np.concatenate(quads), np.concatenate(places)
    order = np.lexsort((places[:, 0], places[:, 1]//4))
    picked = np.sort(r.permutation(len(order))[:n])
    return quads[order][picked].astype(np.float32), r.uniform(.8, 1, len(picked)).astype(np.float32)


def sparse_quads(n, seed=0):
    r = np.random.default_rng(seed)
    side = int(np.ceil(np.sqrt(n)))
    place = np.stack([np.arange(n) % side, np.arange(n)//side], 1)*100. + r.uniform(0, 20, (n, 2))
    quads = np.array([(0, 0), (60, 10), (55, 40), (-5, 30)]) + place[:, None] + r.normal(0, 2, (n, 4, 2))
    return quads.astype(np.float32), r.uniform(.5, 1, n).astype(np.float32)


def sparse_boxes(n, seed=0):
    r = np.random.default_rng(seed)
    corner = r.uniform(0, 60*np.sqrt(n), (n, 2))
    boxes = np.hstack([corner, corner + r.uniform(10, 50, (n, 2))])
    return boxes.astype(np.float32), (r.permutation(n)/n).astype(np.float32)


def dense_boxes(n, seed=0):
    r = np.random.default_rng(seed)
    corner = r.uniform(0, 500, (n//50, 2))
    truth = np.hstack([corner, corner + r.uniform(30, 120, (n//50, 2))])
    boxes = truth.repeat(50, 0) + r.normal(0, 2, (n, 4))
    return boxes.astype(np.float32), (r.permutation(n)/n).astype(np.float32)


def same_quads(quads, scores, found):
    "The peer counts in ten-thousandths of a pixel: equal means within a hundredth."
    ours, sums = lanms(quads, scores, .2)
    theirs = found[np.lexsort(found[:, :2].T)]
    ours, sums = (x[np.lexsort(ours[:, 0].T)] for x in (ours, sums))
    if len(ours) != len(theirs): raise SystemExit(f'lanms keeps {len(ours)} quads, the peer {len(theirs)}')
    if abs(ours.reshape(-1, 8) - theirs[:, :8]).max() > .01: raise SystemExit('not the same quads')
    if not np.allclose(sums, theirs[:, 8], rtol=1e-4): raise SystemExit('not the same scores')
    return len(ours)


def tasks():
    "Name -> (ours, the peer's, how many are kept, rounds)."
    if peer_lanms:
        for name, (q, s), rounds in (('lanms, dense 1k', dense_quads(1000), 15),
                                     ('lanms, dense 10k', dense_quads(10_000), 9),
                                     ('lanms, dense 50k', dense_quads(50_000), 5),
                                     ('lanms, sparse 1k', sparse_quads(1000), 5)):
            table = np.hstack([q.reshape(-1, 8), s[:, None]])
            kept = same_quads(q, s, peer_lanms(table, .2))
            yield name, (lambda q=q, s=s: lanms(q, s, .2)), (lambda t=table: peer_lanms(t, .2)), kept, rounds
    for name, (b, s), rounds in (('nms, sparse 10k', sparse_boxes(10_000), 7),
                                 ('nms, sparse 50k', sparse_boxes(50_000), 3),
                                 ('nms, dense 1k', dense_boxes(1000), 21)):
        tb, ts = torch.from_numpy(b), torch.from_numpy(s)
        theirs = lambda tb=tb, ts=ts: torchvision.ops.nms(tb, ts, .5)
        rows = nms(tb, ts, .5)
        if not torch.equal(rows, theirs()): raise SystemExit(f'{name}: not the same rows')
        yield name, (lambda tb=tb, ts=ts: nms(tb, ts, .5)), theirs, len(rows), rounds


def seconds(f, times=1):
    "Mean processor time of a call."
    start = time.process_time()
    for _ in range(times): f()
    return (time.process_time() - start)/times


def measure():
    figures = {'peer of lanms': 'lanms-neo' if peer_lanms else 'not installed: pip install lanms-neo'}
    for name, ours, theirs, kept, rounds in tasks():
        for _ in range(3): ours()
        mine, peer = zip(*((seconds(ours, 5), seconds(theirs)) for _ in range(rounds)))
        ratios = [b/a for a, b in zip(mine, peer)]
        figures |= {f'{name}: kept by both': kept, f'{name}: cnnbook, ms': round(1000*statistics.median(mine), 3),
                    f'{name}: peer, ms': round(1000*statistics.median(peer), 2),
                    f'{name}: times as fast': round(statistics.median(ratios), 1),
                    f'{name}: times, least to most': f'{min(ratios):.1f} to {max(ratios):.1f}'}
        print(*(f'{k}: {v}' for k, v in figures.items() if k.startswith(name)), sep='\n', flush=True)
    return figures


def main():
    "The figures as a dict, measured on one thread."
    if load_cext()[0] is None: raise SystemExit(f'the C++ part is not built: {load_cext()[1]}')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: return measure()
    finally: torch.set_num_threads(threads)


def too_slow(figures):
    "The claims that do not hold."
    return [f'{name}: {figures[key]} times; expected at least {floor}' for name, floor in FLOORS.items()
            if (key := f'{name}: times as fast') in figures and figures[key] < floor]


if __name__ == '__main__':
    short = too_slow(main())
    for line in short: print(line)
    sys.exit(1 if short else 0)
