"""Filters, maps and snapshots: every filter of ResNet-50, faults 24 and 53-56, torchvision's networks, flat memory."""
import gc
import io
import os
import subprocess
import sys
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from cnnbook.capacity import summary
from cnnbook.filters import FilterSnapshots, class_filters, film, snapshot_files
from cnnbook.pictures import (
    draw_pictures,
    feature_maps,
    filter_cells,
    gabor,
    get_plot_dimensions,
    mosaic,
    pick_convs,
    plot_feature_maps,
    plot_filters,
    scale_signed,
)
from cnnbook.resnet import resnet50
from cnnbook.trainer import Trainer


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 1),
                         nn.MaxPool2d(3), nn.Flatten(), nn.Linear(24, 5))


def image(size=8): return torch.rand(3, size, size, generator=torch.Generator().manual_seed(1))


# -- E1: every filter, whatever the number --

def test_the_grid_is_the_smallest_nearly_square_one():
    for n in list(range(1, 500)) + [2**20, 2**20 + 1, 10**12 - 1]:
        r, c = get_plot_dimensions(n)
        assert r*c >= n > (r - 1)*c and 0 <= c - r <= 1
    for bad in (0, -1, 2.5, True, '3', None):
        with pytest.raises(ValueError, match='n: expected a whole number'): get_plot_dimensions(bad)


def test_every_filter_of_resnet50_is_drawn():
    torch.manual_seed(0)
    model = resnet50(num_classes=10)
    fig, drawn = plot_filters(model, size=.8), 0
    convs = pick_convs(model)
    assert len(fig.axes) == len(convs) == 53 and plt.get_fignums() == []
    for ax, (name, conv) in zip(fig.axes, convs.items()):
        shown, w = torch.as_tensor(np.ma.filled(ax.images[0].get_array(), np.nan)), conv.weight.detach()
        scale = (w if w.shape[2:] == (1, 1) or name == 'conv1' else w.mean(1)).abs().max()
        if w.shape[2:] == (1, 1):
            torch.testing.assert_close(shown.float(), w[:, :, 0, 0]/scale)
            drawn += len(shown)
            continue
        columns = get_plot_dimensions(len(w))[1]
        h = w.shape[2]
        for k in range(len(w)):                                    # each cell where it belongs
            r, c = k//columns*(h + 1), k % columns*(h + 1)
            cell = shown[r:r + h, c:c + h].float()
            want = (w[k].permute(1, 2, 0)/scale/2 + .5) if name == 'conv1' else w[k].mean(0)/scale
            torch.testing.assert_close(cell[..., :3] if name == 'conv1' else cell, want, rtol=1e-5, atol=1e-6)
            drawn += 1
    assert drawn == sum(c.out_channels for c in convs.values()) == 26_560
    assert 'matrix' not in fig.axes[0].get_title() and 'colour' in fig.axes[0].get_title()


@pytest.mark.parametrize('seed', range(3))
def test_mosaic_equals_a_loop(seed):
    rng = np.random.default_rng(seed)
    n, h, w, columns = (int(v) for v in rng.integers(1, 9, 4))
    cells = torch.from_numpy(rng.normal(size=(n, h, w)))
    want = torch.full((-(-n//columns)*(h + 1), columns*(w + 1)), torch.nan, dtype=torch.float64)
    for k in range(n): want[k//columns*(h + 1):, k % columns*(w + 1):][:h, :w] = cells[k]
    torch.testing.assert_close(mosaic(cells, columns), want[:-1, :-1], rtol=0, atol=0, equal_nan=True)


def test_grouped_grey_and_named_layers():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 5), nn.Conv2d(3, 2, 3))
    texts = [ax.get_title().split('\n')[1] for ax in plot_filters(model).axes]
    assert texts == ['4 filters 3 x 3', '4 filters 3 x 3', '3 filters 5 x 5, mean of 4 inputs',
                     '2 filters 3 x 3, mean of 3 inputs']          # three inputs, but no colours: not the first layer
    assert len(plot_filters(model, ['0', '2'], per_filter=True, cmap='RdBu').axes) == 2
    assert plot_filters(model[0]).axes[0].get_title().startswith('(model)')
    assert filter_cells(torch.zeros(2, 3, 1, 5))[0].shape == (2, 1, 5)


def test_weights_in_other_types():
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        assert len(plot_filters(small().to(kind)).axes) == 2
    assert scale_signed(torch.tensor([1e-42, -2e-42])[None]).min() == -1      # denormal numbers
    assert gabor(5, 1., 3.).dtype == torch.float32


# -- E2: maps equal the capacity table, for networks of other hands --

@pytest.mark.parametrize('name', ['resnet18', 'squeezenet1_1', 'mobilenet_v3_small', 'densenet121'])
def test_shapes_equal_the_capacity_table(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    maps = feature_maps(model, image(64))
    table = {v.name: v.output for v in summary(model, (3, 64, 64)).layers}
    assert {n: tuple(t.shape) for n, t in maps.items()} == {n: s for n, s in table.items() if len(s) == 3}
    assert name != 'resnet18' or 'layer1.0.relu#2' in maps


def test_class_filters_split_the_score():
    model, x = small().eval(), image()
    for _ in range(3):
        rows, seen = class_filters(model, x, '4'), feature_maps(model, x, '4')['4']
        torch.testing.assert_close((rows*seen).sum((1, 2, 3)) + model[6].bias.detach(), model(x[None])[0].detach())
        x = x.flip(1) + .1
    with torch.inference_mode(): torch.testing.assert_close(class_filters(model, x, '4'), rows)


# -- fault 24: the folder --

def fit(path, epochs=2, **more):
    torch.manual_seed(0)
    model, g = small(), torch.Generator().manual_seed(0)
    data = [(torch.rand(4, 3, 8, 8, generator=g), torch.arange(4)) for _ in range(3)]
    trainer = Trainer(max_epochs=epochs, callbacks=[FilterSnapshots(path, **more)], enable_progress_bar=False)
    trainer.fit(model, data, None, torch.optim.SGD(model.parameters(), .1), nn.CrossEntropyLoss())
    return model


def test_fault_24_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='folder: expected a folder to write to'): fit(tmp_path/'file')
    with pytest.raises(ValueError, match="layer: expected one of 0, 3, got '9'"): fit(tmp_path/'x', layers=['9'])
    if os.getuid() == 0 or os.name == 'nt': return                             # root writes anywhere
    (tmp_path/'closed').mkdir(mode=0o555)
    with pytest.raises(PermissionError): fit(tmp_path/'closed')


def test_fault_24_the_disk_fails_in_mid_run(tmp_path, monkeypatch):
    import cnnbook.filters as module
    calls = []

    def failing(path, state):
        calls.append(path.name)
        if len(calls) == 2: raise OSError(28, 'No space left on device')
        return saved(path, state)

    saved = module.save_checkpoint
    monkeypatch.setattr(module, 'save_checkpoint', failing)
    with pytest.warns(UserWarning, match='no snapshot of epoch 1, training goes on'): model = fit(tmp_path, 3)
    assert list(snapshot_files(tmp_path)) == [0, 2, 3] and film(tmp_path).epochs == (0, 2, 3)
    assert torch.equal(film(tmp_path).filters[-1], model[0].weight)
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith('filters-')]


def test_a_damaged_snapshot_is_named_and_a_layer_of_choice(tmp_path):
    fit(tmp_path/'a', layers='3')
    assert film(tmp_path/'a').layer == '3' and film(tmp_path/'a').filters.shape == (3, 6, 4, 1, 1)
    (tmp_path/'a'/'filters-x.pt').write_text('not one of them')
    assert list(snapshot_files(tmp_path/'a')) == [0, 1, 2]
    part = snapshot_files(tmp_path/'a')[1]
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match='filters-0001.pt'): film(tmp_path/'a')


# -- faults 53 to 56 --

def test_fault_54_names_and_layers_without_maps():
    model, x = small(), image()
    for look in (feature_maps, class_filters, lambda model, x, name: plot_filters(model, name)):
        with pytest.raises(ValueError, match='expected one of 0, '): look(model, x, '9')
    with pytest.raises(ValueError, match='maps come from 0, 1, 2, 3, 4'): feature_maps(model, x, ['0', '6'])
    with pytest.raises(ValueError, match='maps'): class_filters(model, x, '6')
    with pytest.raises(ValueError, match='expected layers that give maps'): feature_maps(nn.Flatten(), x)
    frozen = small().requires_grad_(False)
    torch.testing.assert_close(class_filters(frozen, x, '4'), class_filters(small(), x, '4'))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *frozen.modules()])


def test_fault_55_odd_maps_and_images():
    with warnings.catch_warnings():
        warnings.simplefilter('error')                                         # no division by zero, no empty slice
        for t in (torch.zeros(2, 3, 3), torch.full((1, 4, 4), 7.), torch.ones(5, 1, 1), -torch.ones(2, 2, 2)):
            fig = plot_feature_maps({'map': t}, per_map=True)
            shown = fig.axes[0].images[0].get_array()
            assert -1 <= float(shown.min()) <= float(shown.max()) <= 1
            fig.savefig(io.BytesIO())
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="maps.'a'.: expected finite numbers, got 1 others"):
            plot_feature_maps({'a': torch.tensor([[[1., bad]]])})
    broken = small()
    broken[0].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match='0.weight: expected finite'): plot_filters(broken)
    with pytest.raises(TypeError, match='expected floats'): feature_maps(small(), (image()*255).byte())
    with pytest.raises(TypeError, match='expected floats'): feature_maps(small(), image().numpy())
    with pytest.raises(ValueError, match='channels first'): feature_maps(small(), image().permute(1, 2, 0))
    with pytest.raises(ValueError, match='expected one image'): feature_maps(small(), torch.rand(0, 3, 8, 8))


def test_fault_56_a_hundred_figures_stay_flat_and_closed():
    code = ('import gc, resource, torch, matplotlib.pyplot as plt; from torch import nn\n'
            'from cnnbook.pictures import feature_maps, plot_feature_maps, plot_filters\n'
            'model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)); x = torch.rand(3, 8, 8)\n'
            'rss = lambda: int(open("/proc/self/statm").read().split()[1])*4096/1e6\n'
            'def one(): plot_filters(model, "0"); plot_feature_maps(feature_maps(model, x, "0"))\n'
            'for _ in range(10): one()\n'
            'gc.collect(); before = rss()\n'
            'for _ in range(50): one()\n'
            'gc.collect(); print(rss() - before, plt.get_fignums())')
    if not os.path.exists('/proc/self/statm'): pytest.skip('no /proc here')
    env = {k: v for k, v in os.environ.items() if k not in ('DISPLAY', 'WAYLAND_DISPLAY', 'MPLBACKEND')}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    grown, fignums = done.stdout.split(maxsplit=1)
    assert float(grown) < 20 and fignums.strip() == '[]', done.stdout          # 100 figures of 0.5 MB would be 50


def test_fault_56_odd_names_are_only_text():
    model = nn.Sequential()
    model.add_module('<script>$x_', nn.Conv2d(3, 2, 3))
    fig = plot_filters(model)
    fig.savefig(io.BytesIO())                                                  # as a formula, '$x_' would be an error
    assert fig.axes[0].get_title().startswith('<script>$x_')
    before = plt.get_fignums()
    with pytest.raises(ValueError): draw_pictures([('', torch.zeros(2, 2), 0)], cmap='no such map')
    gc.collect()
    assert plt.get_fignums() == before
