"""All methods together: figures in a loop, odd names, odd images, and one source for what is offered twice."""
import gc
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from test_occlusion import pixels, small

import cnnbook.attribution as a
import cnnbook.gradients
import cnnbook.occlusion
import cnnbook.saliency
import cnnbook.sanity
from cnnbook.trace import no_trace


def test_what_is_offered_twice_is_one():
    for module in (cnnbook.gradients, cnnbook.occlusion, cnnbook.sanity):
        for name in {'saliency', 'smooth_grad', 'guided_backprop', 'grad_cam', 'integrated_gradients', 'show_map',
                     'occlusion', 'pointing_game', 'deletion_curve', 'insertion_curve', 'randomized', 'map_similarity'}:
            if hasattr(module, name): assert getattr(a, name) is getattr(module, name) and name in a.__all__


def test_all_that_is_offered_is_there():
    assert all(hasattr(a, name) for name in a.__all__) and {'max_patches', 'class_image', 'cam_layer'} < set(a.__all__)


def test_importing_draws_no_number_and_needs_no_display():
    code = ('import torch; s = torch.get_rng_state(); import cnnbook.attribution, sys; '
            'assert torch.equal(s, torch.get_rng_state()) and "matplotlib.pyplot" not in sys.modules; '
            'import torch.nn as nn; from cnnbook.attribution import compare_attributions as f, saliency; '
            'f(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), torch.rand(1, 3, 4, 4), methods={"s": saliency})')
    env = {'PYTHONPATH': str(Path(a.__file__).parent.parent), 'PATH': '', 'HOME': '/nowhere', 'MPLBACKEND': 'agg'}
    subprocess.run([sys.executable, '-c', code], check=True, env=env, timeout=60)


def test_fault_54_a_wrong_layer_lists_the_right_ones():
    model, x = small(), pixels(2, 3, 9, 9)
    with no_trace(model, x), pytest.raises(ValueError, match='layer: expected one of .*0.*nope'):
        a.compare_attributions(model, x, methods=a.attributions('nope'))


def test_fault_55_odd_images_in_a_figure():
    model, x = small(), torch.full((1, 3, 9, 9), .3)
    methods = a.attributions('0', n=2, steps=2, window=3, stride=3)
    fig = a.compare_attributions(model, x, methods=methods)                     # one colour: a map of zeros is a map
    assert len(fig.axes) == 7
    with pytest.raises(ValueError, match='finite numbers'): a.compare_attributions(model, x*float('nan'))
    with pytest.raises(TypeError, match='x: expected floats'): a.compare_attributions(model, x.byte())
    for channels in (1, 2, 5):
        fig = a.compare_attributions(small(channels), pixels(2, channels, 9, 9), 1, {'s': a.saliency})
        assert len(fig.axes) == 4 and plt.get_fignums() == []


def test_fault_56_names_that_look_like_code():
    model, x = small(), pixels(1, 3, 9, 9)
    name = '<script>alert(1)</script> $x_{'
    a.compare_attributions(model, x, methods={name: a.saliency}, titles=[name]).canvas.draw()
    html = a.scorecard(model, x, x[:, 0] > 0, {name: a.saliency}, seeds=1)._repr_html_()
    assert '<script>' not in html and '&lt;script&gt;' in html


def resident():
    gc.collect()
    return int(Path('/proc/self/statm').read_text().split()[1])*4096/2**20      # MB


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads /proc')
def test_fault_56_a_hundred_figures():
    model, x = small(), pixels(1, 3, 32, 32)
    methods, sizes = a.attributions('0', n=2, steps=2, window=16, stride=16), []
    for k in range(100):
        a.compare_attributions(model, x, methods=methods).canvas.draw()
        if k in (20, 99): sizes.append(resident())
    assert plt.get_fignums() == [] and sizes[1] - sizes[0] < 20


def test_the_table_is_the_same_twice():
    model, x = small(), pixels(4, 3, 12, 12)
    cards = [a.scorecard(model, x, x[:, 0] > 0, a.attributions('0', n=2, steps=2, window=4), few=2, seeds=2)
             for _ in range(2)]
    for name, s in cards[0].items():
        other = cards[1][name]
        assert (s.points, s.deletion, s.insertion, s.alike, s.points_new) == (
            other.points, other.deletion, other.insertion, other.alike, other.points_new)
        assert len(s.alike) == 2 and all(-1 <= v <= 1 for v in s.alike)
