"""Convolution arithmetic against torch's own layers: thousands of random arguments, the impossible ones included."""
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cnnbook.conv import (
    conv2d,
    conv_matrix,
    im2col,
    image_filters,
    n_params,
    out_size,
    same_padding,
    stacked_field,
    transpose_out_size,
)

POOLS = {2: (F.max_pool2d, F.avg_pool2d), 1: (F.max_pool1d, F.avg_pool1d), 3: (F.max_pool3d, F.avg_pool3d)}
CONVS = {1: (F.conv1d, F.conv_transpose1d), 2: (F.conv2d, F.conv_transpose2d), 3: (F.conv3d, F.conv_transpose3d)}


def sizes_or_none(f, *args, **options):
    "The output size of a layer or of our formula, None where it refuses."
    try: out = f(*args, **options)
    except (ValueError, RuntimeError): return None
    return tuple(out.shape[2:]) if isinstance(out, torch.Tensor) else out


def some_arguments(r, axes):
    pick = lambda low, high: tuple(r.randint(low, high) for _ in range(axes))
    return pick(1, 16 if axes < 3 else 8), pick(1, 6), pick(1, 4), pick(0, 3), pick(1, 3), pick(0, 3)


@pytest.mark.parametrize('axes, rounds', [(1, 800), (2, 2400), (3, 300)])
@pytest.mark.parametrize('kind', ['conv', 'transposed', 'max', 'avg'])
def test_sizes_and_refusals_are_those_of_torch(kind, axes, rounds):
    r, refused = random.Random(axes), 0
    for _ in range(rounds//4 if kind != 'max' else rounds):
        size, kernel, stride, padding, dilation, end = some_arguments(r, axes)
        ceil, x, w = r.random() < .5, torch.zeros(1, 1, *size), torch.zeros(1, 1, *kernel)
        conv, transposed = CONVS[axes]
        largest, mean = POOLS[axes]
        if kind == 'avg': dilation = (1,)*axes                                   # it has none
        if kind == 'transposed':
            ours = sizes_or_none(transpose_out_size, size, kernel, stride, padding, end, dilation)
            theirs = sizes_or_none(transposed, x, w, None, stride, padding, end, 1, dilation)
        elif kind == 'conv':
            ours = sizes_or_none(out_size, size, kernel, stride, padding, dilation)
            theirs = sizes_or_none(conv, x, w, None, stride, padding, dilation)
        else:
            ours = sizes_or_none(out_size, size, kernel, stride, padding, dilation, ceil)
            if any(2*p > f for p, f in zip(padding, kernel)): ours = None        # pooling's own rule
            if kind == 'avg' and axes == 3 and any(f > n for f, n in zip(kernel, size)): ours = None  # its own rule
            theirs = (sizes_or_none(largest, x, kernel, stride, padding, dilation, ceil) if kind == 'max' else
                      sizes_or_none(mean, x, kernel, stride, padding, ceil))
        assert ours == theirs, (size, kernel, stride, padding, dilation, end, ceil)
        refused += ours is None
    assert refused > 20


@pytest.mark.parametrize('bad', [{'kernel': 0}, {'stride': 0}, {'padding': -1}, {'dilation': 0}])
def test_what_torch_refuses_whatever_the_size(bad):
    given = {'size': 9, 'kernel': 3} | bad
    with pytest.raises(ValueError, match=f'{next(iter(bad))}: expected at least'): out_size(**given)
    size, options = given.pop('size'), {k: v for k, v in given.items() if k != 'kernel'}
    with pytest.raises(RuntimeError): F.conv2d(torch.zeros(1, 1, size, size), torch.zeros(1, 1, *[given['kernel']]*2),
                                               **options)


def test_numbers_come_back_as_they_went_in():
    assert type(out_size(np.int64(9), 3)) is int and out_size([9, 8], 3) == (7, 6) == out_size(torch.Size([9, 8]), 3)
    assert transpose_out_size((4,), 2, 2) == (8,) and same_padding((3, 5)) == (1, 2)
    for bad in (True, 3., '3', None, (3, .5), ()):
        with pytest.raises(TypeError, match='kernel: expected a whole number'): out_size(9, bad)


def test_same_padding_keeps_the_size_wherever_torch_can():
    for kernel in range(1, 12):
        for dilation in range(1, 5):
            try: padding = same_padding(kernel, dilation)
            except ValueError: assert dilation*(kernel - 1) % 2
            else: assert out_size(50, kernel, 1, padding, dilation) == 50


def test_way_back_leads_to_the_old_size():
    "Each input size that gives `out` is reached by one output_padding below the stride."
    for n in range(8, 40):
        for kernel, stride, padding in ((3, 1, 1), (3, 2, 1), (4, 2, 1), (5, 3, 0), (7, 4, 3)):
            back = transpose_out_size(out_size(n, kernel, stride, padding), kernel, stride, padding)
            assert 0 <= n - back < stride


def test_parameters_are_those_of_real_layers():
    r = random.Random(0)
    for _ in range(200):
        groups = r.randint(1, 4)
        c, k = groups*r.randint(1, 9), groups*r.randint(1, 9)
        kernel, bias = r.choice([r.randint(1, 7), (r.randint(1, 7), r.randint(1, 7))]), r.random() < .5
        for layer in (nn.Conv2d, nn.ConvTranspose2d):
            with torch.device('meta'): real = layer(c, k, kernel, bias=bias, groups=groups)
            assert n_params(c, k, kernel, bias, groups) == sum(p.numel() for p in real.parameters())
    assert n_params(4, 6, (3, 3, 3)) == sum(p.numel() for p in nn.Conv3d(4, 6, 3).parameters())
    for bad in ((3, 6), (6, 3)):
        with pytest.raises(ValueError, match='groups: expected a divisor'): n_params(*bad, 3, groups=2)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_our_convolution_is_torchs(dtype):
    r, g = random.Random(1), torch.Generator().manual_seed(0)
    for _ in range(50):
        groups = r.randint(1, 3)
        c, k, (kernel, stride, padding, dilation) = groups*r.randint(1, 3), groups*r.randint(1, 3), [
            (r.randint(low, high), r.randint(low, high)) for low, high in ((1, 4), (1, 3), (0, 3), (1, 2))]
        x, w, b = (torch.randn(s, generator=g, dtype=dtype) for s in (
            (r.randint(1, 3), c, r.randint(7, 12), r.randint(7, 12)), (k, c//groups, *kernel), (k,)))
        torch.testing.assert_close(conv2d(x, w, b, stride, padding, dilation, groups),
                                   F.conv2d(x, w, b, stride, padding, dilation, groups), rtol=1e-4, atol=1e-4)
        assert torch.equal(im2col(x, kernel, stride, padding, dilation), F.unfold(x, kernel, dilation, padding, stride))


def test_gradients_go_through_our_convolution():
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 5, 6), (3, 2, 3, 2), (3,)))
    assert torch.autograd.gradcheck(lambda *t: conv2d(*t, stride=(2, 1), padding=1), (x, w, b))


def test_no_image_is_fine_too():
    assert conv2d(torch.zeros(0, 3, 5, 5), torch.zeros(2, 3, 3, 3)).shape == (0, 2, 3, 3)


def test_matrix_and_its_transpose():
    r, g = random.Random(2), torch.Generator().manual_seed(0)
    for _ in range(200):
        f, s, p, d = r.randint(1, 5), r.randint(1, 4), r.randint(0, 3), r.randint(1, 3)
        n = r.randint(max(1, d*(f - 1) + 1 - 2*p), 25)
        k, x = torch.randn(f, generator=g), torch.randn(n, generator=g)
        m = conv_matrix(k, n, s, p, d)
        torch.testing.assert_close(m@x, F.conv1d(x.view(1, 1, n), k.view(1, 1, f), None, s, p, d).flatten())
        y = torch.randn(len(m), generator=g)
        back = (len(m) - 1)*s + d*(f - 1) + 1 - 2*p
        if n - back >= max(s, d) or back < 1: continue                           # torch's layer cannot reach this n
        torch.testing.assert_close(m.T@y, F.conv_transpose1d(y.view(1, 1, -1), k.view(1, 1, f), None, s, p, n - back, 1,
                                                             d).flatten())
    assert conv_matrix(torch.tensor([1., 2.]), 5).shape == (4, 5)                # (N - k + 1) x N


def test_stacked_field_is_where_the_gradient_is():
    r = random.Random(3)
    for _ in range(60):
        layers = [(r.randint(1, 5), r.randint(1, 2), r.randint(0, 2), r.randint(1, 2)) for _ in range(r.randint(1, 4))]
        x = torch.zeros(1, 1, 200, requires_grad=True)
        y = x
        for f, s, p, d in layers: y = F.conv1d(y, torch.ones(1, 1, f), None, s, p, d)
        at = y.shape[2]//2
        y[0, 0, at].backward()
        seen = x.grad.flatten().nonzero().flatten()
        size, step, first = stacked_field(layers)
        assert (seen[0], seen[-1]) == (first + at*step, first + at*step + size - 1), layers


def test_image_filters_come_along(): assert image_filters().bias.tolist() == [0, 128]
