"""Maps of what matters: `cnnbook.attribution` against captum on a ResNet-18 with images of 224 pixels and random
weights. Occlusion with 49 windows of 32 pixels, plain and in pieces (`nearby_occlusion` up to `layer1`), against captum
as it comes (one window a pass) and with the best of several batch sizes; Grad-CAM of the last stage, enlarged to the
image, against captum's `LayerGradCam` with its `interpolate`. One thread, processor time, medians of rounds in turns;
the maps are compared before times are.

    pip install captum                    in the extra `peers`
    python benchmarks/attribution.py      exit code 1 if it is slower than claimed
"""
import os
import statistics
import sys
import time
from functools import partial

import torch
import torchvision

from cnnbook.attribution import grad_cam, occlusion
from cnnbook.device import describe
from cnnbook.nearby import nearby_occlusion

ROUNDS = int(os.environ.get('ROUNDS', 5))
SIZES = 4, 8, 16                           # covered images in a pass that captum is tried with
FLOORS = {'occlusion: times as fast': 1.1, 'occlusion in pieces: times as fast': 1.5,
          'occlusion in bf16: times as fast': 4, 'Grad-CAM: times as fast': 1}


def seconds(f):
    "Processor time of a call."
    start = time.process_time()
    f()
    return time.process_time() - start


def compare(ours, peer, rounds=ROUNDS):
    "Median ms of both, and the median ratio, of alternating rounds."
    ours(), peer()
    mine, theirs = zip(*((seconds(ours), seconds(peer)) for _ in range(rounds)))
    ratios = [b/a for a, b in zip(mine, theirs)]
    return 1000*statistics.median(mine), 1000*statistics.median(theirs), statistics.median(ratios), min(ratios)


def same(name, ours, theirs, tolerance=1e-4):
    if (gap := (ours - theirs).abs().max().item()) > tolerance: raise SystemExit(f'{name}: maps differ by {gap:.1e}')
    return gap


def note(figures, name, peer, times):
    mine, theirs, ratio, least = times
    figures |= {f'{name}: cnnbook, ms': round(mine, 1), f'{name}: {peer}, ms': round(theirs, 1),
                f'{name}: times as fast': round(ratio, 2), f'{name}: least of the rounds': round(least, 2)}
    print(*(f'{k}: {v}' for k, v in figures.items() if k.startswith(f'{name}:')), sep='\n', flush=True)


def measure():
    from captum.attr import LayerAttribution, LayerGradCam, Occlusion
    torch.manual_seed(0)
    model, x, target = torchvision.models.resnet18(weights=None).eval(), torch.randn(1, 3, 224, 224), 5
    figures, peer = {}, Occlusion(model)
    ours = partial(occlusion, model, x, target, 32, 32, 0., overhang=False)
    theirs = partial(peer.attribute, x, (3, 32, 32), (3, 32, 32), baselines=0, target=target)
    figures['occlusion: largest difference'] = same('occlusion', ours(), theirs()[:, 0])
    note(figures, 'occlusion', 'captum', compare(ours, theirs))

    pieces = partial(nearby_occlusion, model, x, 'layer1', target, 32, 32, 0., overhang=False)
    figures['occlusion in pieces: largest difference'] = same('occlusion in pieces', pieces(), theirs()[:, 0])
    note(figures, 'occlusion in pieces', 'captum', compare(pieces, theirs))

    best = min(SIZES, key=lambda n: min(seconds(partial(theirs, perturbations_per_eval=n)) for _ in range(2)))
    figures['occlusion against the best of captum: its perturbations_per_eval'] = best
    note(figures, 'occlusion against the best of captum', 'captum',
         compare(ours, partial(theirs, perturbations_per_eval=best)))

    if describe().cpu_bf16:
        half = partial(ours, precision='bf16-mixed')
        score = model(x)[0, target].abs().detach()     # the map is a difference of two scores, each of 8 bits
        same('occlusion in bf16', half()/score, ours()/score, .05)
        maps = torch.stack([half().flatten(), ours().flatten()])
        figures['occlusion in bf16: correlation of the maps'] = round(torch.corrcoef(maps)[0, 1].item(), 3)
        note(figures, 'occlusion in bf16', 'captum', compare(half, theirs))
    else: figures['occlusion in bf16'] = 'not measured: this processor computes in 32 bits only'

    layer = LayerGradCam(model, model.layer4)
    cam = partial(grad_cam, model, x, target, 'layer4')
    captum_cam = lambda: LayerAttribution.interpolate(layer.attribute(x, target, relu_attributions=True), (224, 224),
                                                      'bilinear').detach()[:, 0]
    figures['Grad-CAM: largest difference'] = same('Grad-CAM', cam(), captum_cam())
    note(figures, 'Grad-CAM', 'captum', compare(cam, captum_cam, 3*ROUNDS))
    return figures


def main():
    "The figures as a dict, measured on one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: return measure()
    finally: torch.set_num_threads(threads)


def too_slow(figures):
    "The claims that do not hold."
    return [f'{name}: {figures[name]}; expected at least {floor}' for name, floor in FLOORS.items()
            if figures.get(name, floor) < floor]


if __name__ == '__main__':
    short = too_slow(main())
    for line in short: print(line)
    sys.exit(1 if short else 0)
