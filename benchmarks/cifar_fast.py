"""Real CIFAR-10 on a CPU: FastNet with the fast recipe, asked once and in six views (flips and shifts).

Everything was chosen on validation images; the test set is read once a seed. Where the CPU computes in bfloat16 faster
than in float32 (`CNNBOOK_BF16=1`), the same recipe in `bf16-mixed`.
"""
import os
import statistics
from dataclasses import replace

import torch
from cifar import parts, percent, run

from cnnbook.cifar import RECIPES


def main(seeds=(0, 1, 2)):
    precision = 'bf16-mixed' if os.environ.get('CNNBOOK_BF16') else '32'
    data, recipe = parts(), replace(RECIPES['fast'], precision=precision)
    runs = [run(recipe, *data, seed) for seed in seeds]
    return {'threads': torch.get_num_threads(), 'precision': precision, 'epochs': recipe.epochs,
            'test accuracy, %': percent(runs, 'test'),
            'test accuracy with flips and shifts at test time, %': percent(runs, 'views'),
            'median of these, %': round(100*statistics.median(r['views'] for r in runs), 2),
            'validation accuracy, %': percent(runs, 'valid'),
            'median seconds': round(statistics.median(r['seconds'] for r in runs), 1)}


if __name__ == '__main__':
    print(main())
