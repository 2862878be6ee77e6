"""The small networks: shapes, and that they are pure functions under every transform."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from metacal import nets

NETWORKS = {
    "encoder": (lambda: nets.ConvEncoder(1, width=8, dim=5), (6, 1, 8, 8)),
    "encoder, stem_stride=1": (lambda: nets.ConvEncoder(2, width=8, dim=5, stem_stride=1), (6, 2, 8, 8)),
    "mlp": (lambda: nets.MLP([4, 6, 6, 3]), (6, 4)),
    "mlp, layer": (lambda: nets.MLP([4, 6, 6, 3], norm="layer"), (6, 4)),
    "mlp, batch": (lambda: nets.MLP([4, 6, 6, 3], norm="batch"), (6, 4)),
    "mlp, linear": (lambda: nets.MLP([4, 3], norm="batch"), (6, 4)),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    """A float64 network, its params, an input and a direction for the params."""
    make, shape = NETWORKS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().double()
        x = torch.randn(shape, dtype=torch.float64)
        params = {name: p.detach().clone() for name, p in net.named_parameters()}
        direction = {name: torch.randn_like(p) for name, p in params.items()}
    return net, params, x, direction


def loss_of(net: nn.Module, x: torch.Tensor):
    return lambda params: (functional_call(net, params, (x,)) + 0.3).pow(3).mean()


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3)])
def test_encoder_takes_digits_mnist_and_cifar(size, channels):
    encoder = nets.ConvEncoder(channels, width=8, dim=7)
    assert encoder.dim == 7
    z = encoder(torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(0)))
    assert z.shape == (3, 7)
    assert z.std(0).min() > 0  # the 1 x 1 maps that 8 x 8 images end in are not normalised away


def test_encoder_equals_its_layers_written_out():
    net = nets.ConvEncoder(1, width=8, dim=5).double()
    x = torch.randn(3, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    params = dict(net.named_parameters())
    assert [tuple(p.shape) for p in params.values() if p.ndim == 4] == [(8, 1, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3)]
    maps = x
    for layer in (0, 3, 6):
        maps = nn.functional.conv2d(maps, params[f"body.{layer}.weight"], stride=2, padding=1)
        b, c, h, w = maps.shape
        groups = maps.reshape(b, c // 8, 8 * h * w)
        maps = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        maps = maps.reshape(b, c, h, w).clamp(min=0)
    expected = maps.mean((2, 3)) @ params["head.weight"].T + params["head.bias"]
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)


def test_leading_axes_are_batch_axes(case):
    net, _, x, _ = case
    views = x.unflatten(0, (3, 2))
    torch.testing.assert_close(net(views), net(x).unflatten(0, (3, 2)), rtol=1e-12, atol=1e-13)
    assert net(views).shape == (3, 2, net.dim)


def test_no_sample_sees_another_except_through_batch_norm(case):
    net, _, x, _ = case
    alone = torch.cat([net(x[:3]), net(x[3:])])
    normed = any(isinstance(module, nn.BatchNorm1d) for module in net.modules())
    assert torch.allclose(net(x), alone, rtol=1e-10, atol=1e-12) != normed


def test_is_deterministic_and_keeps_no_state(case):
    net, _, x, _ = case
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert not list(net.buffers())
    assert torch.equal(net(x), net(x))
    assert torch.equal(net(x), net.eval()(x))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_one_seed_gives_one_network():
    def weights():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return torch.cat([p.flatten() for p in (*nets.ConvEncoder(1, 8, 4).parameters(), *nets.MLP([4, 4, 2]).parameters())])

    assert torch.equal(weights(), weights())


def test_vmap_over_stacked_params_equals_a_loop(case):
    net, params, x, direction = case
    second = {name: params[name] + 0.1 * direction[name] for name in params}
    stacked = {name: torch.stack([params[name], second[name]]) for name in params}
    inputs = torch.stack([x, x.flip(0) + 0.5])

    def gradient_and_product(params, x):
        return jvp(grad(loss_of(net, x)), (params,), (direction,))

    batched = vmap(gradient_and_product)(stacked, inputs)
    torch.testing.assert_close(
        vmap(lambda p, x: functional_call(net, p, (x,)))(stacked, inputs),
        torch.stack([functional_call(net, p, (x,)) for p, x in zip((params, second), inputs, strict=True)]),
        rtol=1e-11, atol=1e-13,
    )  # fmt: skip
    for i, each in enumerate((params, second)):
        one = gradient_and_product(each, inputs[i])
        for got, expected in zip(batched, one, strict=True):
            torch.testing.assert_close({name: got[name][i] for name in got}, expected, rtol=1e-9, atol=1e-11)


def test_second_order_products_agree_and_equal_central_differences(case):
    net, params, x, direction = case
    loss = loss_of(net, x)
    gradient, product = jvp(grad(loss), (params,), (direction,))
    by_reverse = vjp(grad(loss), params)[1](direction)[0]
    torch.testing.assert_close(product, by_reverse, rtol=1e-9, atol=1e-11)
    assert max(value.abs().max() for value in product.values()) > 1e-3

    h = 1e-6
    ahead, behind = ({name: params[name] + s * h * direction[name] for name in params} for s in (1, -1))
    slope = sum((gradient[name] * direction[name]).sum() for name in params)
    torch.testing.assert_close(slope, (loss(ahead) - loss(behind)) / (2 * h), rtol=1e-6, atol=1e-8)
    up, down = grad(loss)(ahead), grad(loss)(behind)
    differences = {name: (up[name] - down[name]) / (2 * h) for name in params}
    torch.testing.assert_close(product, differences, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
def test_mlp_layers(norm):
    kinds = [type(layer).__name__ for layer in nets.MLP([4, 6, 3], norm=norm).layers]
    between = {None: [], "layer": ["LayerNorm"], "batch": ["BatchNorm1d"]}[norm]
    assert kinds == ["Linear", *between, "ReLU", "Linear"]


def test_bad_sizes_are_named():
    for width in (0, -8, 12):
        with pytest.raises(ValueError, match=rf"`width` should be a positive multiple of 8.*got {width}"):
            nets.ConvEncoder(width=width)
    for sizes in ([4], [], [4, 0, 2]):
        with pytest.raises(ValueError, match=r"`sizes` should hold at least an input and an output size"):
            nets.MLP(sizes)
    with pytest.raises(ValueError, match=r'`norm` should be None, "layer" or "batch", got \'group\''):
        nets.MLP([4, 2], norm="group")
