"""Hand-made filters against scipy, and the frequency response against filtering itself."""
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from cnnbook.kernels import box, gaussian, gray, high_pass, image_filters, on_channel, response, sobel, spectrum


def test_the_first_layer_number_by_number():
    layer = image_filters()
    assert layer.weight.shape == (2, 3, 3, 3) and layer.bias.tolist() == [0, 128]
    wanted = torch.zeros(2, 3, 3, 3)
    wanted[0, :, 1, 1] = torch.tensor([.3, .6, .1])
    wanted[1, 2] = torch.tensor([[1., 2, 1], [0, 0, 0], [-1, -2, -1]])
    assert torch.equal(layer.weight, wanted)
    x = torch.zeros(1, 3, 3, 3)
    x[0, 2, 0], x[0, 0, 1, 1] = 10, 100                              # blue on top, one red pixel in the middle
    assert layer(x)[0, :, 1, 1].tolist() == pytest.approx([30, 128 + 40])


def test_torch_slides_without_turning():
    g = torch.Generator().manual_seed(0)
    for f in (1, 3, 5, 7):
        x, k = torch.rand(20, 17, generator=g).double(), torch.rand(f, f, generator=g).double()
        ours = F.conv2d(F.pad(x[None, None], (f//2,)*4), k[None, None])[0, 0].numpy()
        np.testing.assert_allclose(ours, ndimage.correlate(x.numpy(), k.numpy(), mode='constant'), atol=1e-9)
        if f > 1: assert np.abs(ours - ndimage.convolve(x.numpy(), k.numpy(), mode='constant')).max() > .01


@pytest.mark.parametrize('torchs, scipys', [('zeros', 'constant'), ('reflect', 'mirror'), ('replicate', 'nearest'),
                                            ('circular', 'wrap')])
def test_borders_are_those_of_scipy(torchs, scipys):
    g = torch.Generator().manual_seed(1)
    x, k = 255*torch.rand(1, 3, 24, 31, generator=g), torch.randn(5, 5, generator=g)
    ours = image_filters(k, bias=0, padding_mode=torchs)(x)[0, 0].numpy()
    grey = (x[0]*gray()).sum(0).double().numpy()
    np.testing.assert_allclose(ours, ndimage.correlate(grey, k.double().numpy(), mode=scipys), atol=.01)


@pytest.mark.parametrize('sigma', [.4, 1, 1.7, 3])
def test_gaussian_is_that_of_scipy(sigma):
    dot = np.zeros((31, 31))
    dot[15, 15] = 1
    k, r = gaussian(sigma), len(gaussian(sigma))//2
    theirs = ndimage.gaussian_filter(dot, sigma, radius=r)[15 - r:16 + r, 15 - r:16 + r]
    np.testing.assert_allclose(k.numpy(), theirs, atol=1e-6)
    assert k.sum() == pytest.approx(1, abs=1e-5) and high_pass(k).sum().abs() < 1e-5


def test_sobel_is_scipys_with_the_other_sign():
    x = np.random.default_rng(0).integers(0, 256, (12, 13)).astype(np.float32)
    for vertical in (False, True):
        ours = F.conv2d(torch.from_numpy(x)[None, None], sobel(vertical)[None, None])[0, 0].numpy()
        np.testing.assert_array_equal(ours, -ndimage.sobel(x, axis=int(vertical))[1:-1, 1:-1])


@pytest.mark.parametrize('kernel', [box(3), box(7), gaussian(1.3), high_pass(gaussian(2.)), sobel()])
@pytest.mark.parametrize('size', [(32, 32), (33, 40)])
def test_spectrum_times_response(kernel, size):
    x, r = torch.rand(size, generator=torch.Generator().manual_seed(2)), len(kernel)//2
    out = F.conv2d(F.pad(x[None, None], (r,)*4, mode='circular'), kernel[None, None])[0, 0]
    torch.testing.assert_close(spectrum(out), spectrum(x)*response(kernel, size), rtol=1e-4, atol=1e-5)
    assert response(kernel, size)[size[0]//2, size[1]//2] == pytest.approx(abs(kernel.sum().item()), abs=1e-5)


def test_sizes_mix_in_one_layer():
    g = torch.Generator().manual_seed(3)
    x = 255*torch.rand(2, 3, 20, 22, generator=g)
    parts = gray(), on_channel(sobel(), 0), gaussian(1.5), torch.rand(3, 1, 7, generator=g)
    together = image_filters(*parts)(x)
    for i, part in enumerate(parts):
        torch.testing.assert_close(together[:, i:i + 1], image_filters(part)(x), atol=.01, rtol=0)


@pytest.mark.parametrize('bad', [torch.ones(3), torch.ones(4, 4), torch.ones(2, 3, 3), torch.ones(1, 3, 3, 3)])
def test_other_shapes_are_refused(bad):
    with pytest.raises(ValueError, match=r'filters\[0\]: expected shape'): image_filters(bad)
