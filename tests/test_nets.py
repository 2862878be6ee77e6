"""The small networks: shapes, and that they are pure functions under every transform."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap

import metacal
from metacal import adjoints, nets, objectives, optim, tc2, tree
from problems import close, derivative, leaf_grads

NETWORKS = {
    "encoder": (lambda: nets.ConvEncoder(1, width=8, dim=5), (6, 1, 8, 8)),
    "encoder, stem_stride=1": (lambda: nets.ConvEncoder(2, width=8, dim=5, stem_stride=1), (6, 2, 8, 8)),
    "mlp": (lambda: nets.MLP([4, 6, 6, 3]), (6, 4)),
    "mlp, layer": (lambda: nets.MLP([4, 6, 6, 3], norm="layer"), (6, 4)),
    "mlp, batch": (lambda: nets.MLP([4, 6, 6, 3], norm="batch"), (6, 4)),
    "mlp, linear": (lambda: nets.MLP([4, 3], norm="batch"), (6, 4)),
    "prototypes": (lambda: nets.Prototypes(4, 3), (6, 4)),
    "vit": (lambda: nets.ViT(2, patch=4, dim=8, depth=2, heads=2), (6, 2, 8, 12)),
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


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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
    with pytest.raises(ValueError, match=r"`dim_in` and `k` should be at least 1, got 0 and 3"):
        nets.Prototypes(0, 3)
    with pytest.raises(ValueError, match=r'`norm` should be "batch" or "group", got None'):
        nets.ResNet18(norm=None)
    with pytest.raises(ValueError, match=r"`in_channels` should be at least 1, got 0"):
        nets.ResNet18(0)
    with pytest.raises(ValueError, match=r"should be positive"):
        nets.ViT(depth=0)
    for dim, heads in ((10, 2), (16, 3)):
        with pytest.raises(ValueError, match=rf"`dim` should be a multiple of 4 \(positions\) and of heads = {heads}, got {dim}"):
            nets.ViT(dim=dim, heads=heads)
    with pytest.raises(ValueError, match=r"patches of 4 x 4 tile, got \(2, 1, 10, 8\)"):
        nets.ViT(1, dim=8, depth=1, heads=2)(torch.zeros(2, 1, 10, 8))
    with pytest.raises(ValueError, match=r"`visible` should be a share of the patches, in \(0, 1\), got 1.0"):
        nets.MaskedAutoencoder(nets.ViT(1, dim=8, depth=1, heads=2), visible=1.0)
    with pytest.raises(ValueError, match=r"`dim` should be a multiple of 4 \(positions\) and of heads = 3, got 8"):
        nets.MaskedDecoder(8, 16, dim=8)
    small = nets.MaskedAutoencoder(nets.ViT(1, dim=8, depth=1, heads=2), 1, visible=0.1, dim=8, heads=2)
    with pytest.raises(ValueError, match=r"`x` should be images of at least 2 patches, one to see and one to predict, got 1"):
        small(torch.zeros(1, 1, 4, 4), nets.random_order(1, patches=1))
    assert small(torch.zeros(1, 1, 8, 8), nets.random_order(1, patches=4)).tokens.shape == (1, 1, 8)  # at least one


# --- prototypes and transformers ---------------------------------------------------------------------------------------


def test_prototypes_are_cosines_and_finite_at_zero():
    head, z = nets.Prototypes(4, 3).double(), torch.randn(5, 2, 4, dtype=torch.float64)
    expected = nn.functional.cosine_similarity(z[:, :, None], head.weight[None, None], dim=-1)
    torch.testing.assert_close(head(z), expected, rtol=1e-10, atol=1e-12)
    zero = torch.zeros(4, dtype=torch.float64)
    product = jvp(grad(lambda z: head(z).sum()), (zero,), (torch.ones_like(zero),))
    assert all(each.isfinite().all() for each in product)


def test_vit_equals_torch_transformer_layers():
    """The blocks against nn.TransformerEncoderLayer, an independent implementation, with the same weights."""
    net = nets.ViT(2, patch=4, dim=8, depth=2, heads=2).double()
    x = torch.randn(3, 2, 8, 12, dtype=torch.float64)
    # Patches by unfolding: channels first, then rows, as ours.
    tokens = net.embed(nn.functional.unfold(x, 4, stride=4).mT)
    for i in range(6):  # two rows of three patches
        row, column = divmod(i, 3)
        angles = [(where, 10_000 ** -(j / 1)) for where in (row, column) for j in range(2)]
        sines = [f(where * frequency) for where in (row, column) for f in (math.sin, math.cos) for _, frequency in angles[:2]]
        tokens[:, i] += torch.tensor(sines)
    for block in net.blocks:
        layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True).double()
        with torch.no_grad():
            for ours, theirs in (
                (block.qkv.weight, layer.self_attn.in_proj_weight),
                (block.qkv.bias, layer.self_attn.in_proj_bias),
                (block.out.weight, layer.self_attn.out_proj.weight),
                (block.out.bias, layer.self_attn.out_proj.bias),
                (block.mlp[0].weight, layer.linear1.weight),
                (block.mlp[0].bias, layer.linear1.bias),
                (block.mlp[2].weight, layer.linear2.weight),
                (block.mlp[2].bias, layer.linear2.bias),
            ):
                theirs.copy_(ours)
        tokens = layer(tokens)
    torch.testing.assert_close(net(x), net.norm(tokens).mean(1), rtol=1e-6, atol=1e-7)  # our positions are float32
    assert net.dim == 8


def test_vit_tiny_has_its_published_size():
    count = sum(p.numel() for p in nets.ViT().parameters())
    # DeiT-Ti has 5.7 million with 16 x 16 patches, a class token, learned positions and a classifier.
    blocks = 12 * (12 * 192**2 + 13 * 192)
    assert count == blocks + 192 * (3 * 16) + 192 + 2 * 192


def test_positions_tell_patches_apart_and_pooling_does_not_need_an_order():
    where = nets.vit.positions(5, 7, 16)
    distances = torch.cdist(where, where) + 10 * torch.eye(35)
    assert distances.min() > 0.1
    torch.testing.assert_close(where.square().sum(-1), torch.full((35,), 8.0))


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_attention_is_differentiated_through_an_inner_run(mode, float64):
    """Inner steps on a ViT with a learned input scale, against plain autograd through the same steps."""
    torch.manual_seed(0)
    f = metacal.functional(nets.ViT(1, patch=4, dim=8, depth=1, heads=2))
    x, query = torch.randn(2, 3, 1, 8, 8)

    def loss(params, h, x):
        return (f.apply(params, x * h) + 0.3).pow(3).mean()

    h, start = torch.tensor(1.3), leaf_grads(f.params)
    h_leaf, params = h.clone().requires_grad_(), start
    for _ in range(2):
        params = tree.axpy(-0.1, derivative(loss(params, h_leaf, x), params, create_graph=True), params)
    expected, d_start = derivative(loss(params, h_leaf, query), (h_leaf, start))
    solver = metacal.descent(loss, optim.sgd(0.1))
    hg = metacal.hypergradient(loss, solver, adjoints.Unrolled(mode=mode))(solver.init(f.params, h), h, metacal.repeat(x, 2), query)
    close(hg.hparams, expected)
    close(hg.params, d_start)


def test_the_autoencoder_sees_only_visible_patches():
    torch.manual_seed(0)
    net = nets.MaskedAutoencoder(nets.ViT(1, patch=2, dim=8, depth=1, heads=2), 1, visible=0.5, dim=8, depth=1, heads=2).double()
    x, order = torch.randn(3, 2, 1, 4, 8, dtype=torch.float64), nets.random_order(3, 2, patches=8)
    p, target, tokens = net(x, order)
    assert (p.shape, target.shape, tokens.shape) == ((3, 2, 4, 4), (3, 2, 4, 4), (3, 2, 4, 8))
    cut = nn.functional.unfold(x.flatten(0, 1), 2, stride=2).mT.reshape(3, 2, 8, 4)
    # Other pixels in the masked patches change the truth and nothing else.
    changed = cut.scatter_add(2, order[..., 4:, None].expand(3, 2, 4, 4), torch.ones(3, 2, 4, 4, dtype=torch.float64))
    other = nn.functional.fold(changed.flatten(0, 1).mT, (4, 8), 2, stride=2).reshape(x.shape)
    again = net(other, order)
    torch.testing.assert_close(again.p, p, rtol=0, atol=0)
    torch.testing.assert_close(again.target, target + 1)
    for i in range(3):
        for k, patch in enumerate(order[i, 1, 4:]):
            assert torch.equal(target[i, 1, k], cut[i, 1, patch])
    # The masks' order within visible and within masked patches is only a relabelling.
    shuffled = torch.cat([order[..., [2, 0, 3, 1]], order[..., [7, 5, 4, 6]]], -1)
    torch.testing.assert_close(net(x, shuffled).p, p[:, :, [3, 1, 0, 2]], rtol=1e-6, atol=1e-8)
    doubled = net(x, order, calibrate=lambda tokens: 2 * tokens)
    torch.testing.assert_close(doubled.tokens, 2 * tokens)
    assert not torch.allclose(doubled.p, p)
    assert torch.equal(nets.random_order(5, patches=9).sort(-1).values, torch.arange(9).expand(5, 9))


# --- ResNet-18 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nets.ResNet18(2)


def test_resnet_has_the_cifar_stem_and_nothing_else_changed(resnet):
    from torchvision.models import resnet18

    ours, theirs = dict(nets.ResNet18().named_parameters()), dict(resnet18().named_parameters())
    shapes = {f"body.{name}": p.shape for name, p in theirs.items() if not name.startswith("fc.")}
    assert {name: p.shape for name, p in ours.items()} == {**shapes, "body.conv1.weight": (64, 3, 3, 3)}
    assert sum(p.numel() for p in ours.values()) == 11_168_832  # torchvision's 11,689,512 less fc's 513,000 and the stem's 7,680
    maps = []
    with torch.no_grad():
        resnet.body.layer4.register_forward_hook(lambda *args: maps.append(args[2].shape))
        assert resnet.eval()(torch.zeros(3, 2, 2, 32, 32)).shape == (3, 2, resnet.dim) == (3, 2, 512)
    assert maps == [(6, 512, 4, 4)]  # no max-pool, stride 1: 32 / 8
    resnet.body.layer4._forward_hooks.clear()
    resnet.train()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnet_has_second_derivatives_and_runs_tasks_together(norm):
    torch.manual_seed(0)
    net = nets.ResNet18(1, norm=norm).double()
    f = metacal.functional(net, batch_norm="batch")
    # The first block's weights only: 11 million are many for a test.
    moving = {name: p for name, p in f.params.items() if "layer1.0" in name}
    direction = {name: 1e-2 * torch.randn_like(p) for name, p in moving.items()}
    x = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)

    def loss(part, x):
        return (f.apply({**f.params, **part}, x) + 0.3).pow(2).mean()

    def gradient_and_product(x):
        return jvp(grad(lambda part: loss(part, x)), (moving,), (direction,))

    batched = vmap(gradient_and_product)(x)
    for i in range(2):
        for got, expected in zip(batched, gradient_and_product(x[i]), strict=True):
            close({name: leaf[i] for name, leaf in got.items()}, expected, 1e-9)
    gradient, product = gradient_and_product(x[0])
    by_reverse = vjp(grad(lambda part: loss(part, x[0])), moving)[1](direction)[0]
    close(product, by_reverse, 1e-9)
    h = 1e-6
    slope = sum((gradient[name] * direction[name]).sum() for name in moving)
    ahead, behind = (loss(tree.axpy(s * h, direction, moving), x[0]) for s in (1, -1))
    torch.testing.assert_close(slope, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)


def test_resnet_batch_norm_as_carry_is_a_plain_torch_loop(float64):
    torch.manual_seed(0)
    net = nets.ResNet18(1)
    f = metacal.functional(net)
    batches = list(torch.randn(2, 4, 1, 8, 8))

    def objective(params, hparams, x, carry):
        out, carry = f.apply(params, x, carry=carry)
        return (out + 0.3).square().mean(), carry

    solver = metacal.descent(objective, optim.sgd(0.1), carry=f.buffers)
    final = metacal.run(solver, solver.init(f.params, {}), {}, batches)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        (net(x) + 0.3).square().mean().backward()
        optimizer.step()
    close(final.params, dict(net.named_parameters()), 1e-10)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(final.carry[name], buffer, rtol=1e-10, atol=1e-12)
    assert final.carry["body.bn1.num_batches_tracked"] == 2
    # Evaluation reads the running statistics: an image's representation is its own.
    f.write(final.params, final.carry)
    net.eval()
    alone, together = f.apply(final.params, batches[0][:1], carry=final.carry)[0], f.apply(final.params, batches[0], carry=final.carry)[0]
    torch.testing.assert_close(alone, together[:1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [lambda: nets.ResNet18(1), lambda: nets.ViT(1, dim=12, depth=1)], ids=["resnet", "vit"])
def test_tc2_trains_the_encoders(make):
    torch.manual_seed(0)
    encoder = make()
    net = tc2.network(encoder, objectives.SimCLR(), dim=encoder.dim, d=8, hidden=8)
    problem = tc2.Problem(net, objectives.SimCLR(), tc2.Networks(n_f=4, hidden=8), num_tasks=2)
    method = tc2.paper(problem, optim.adam(1e-3), optim.adam(1e-3))
    state, metrics = method.step(method.init(), torch.rand(4, 4, 1, 8, 8))
    assert metrics["first_bad_step"] == -1
    assert all(leaf.isfinite().all() for leaf in tree.leaves(state.theta))


# --- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("make", [nets.ResNet18, lambda: nets.ViT(depth=2), lambda: nets.ConvEncoder(3)], ids=["resnet", "vit", "conv"])
def test_channels_last_and_bfloat16_on_cuda(make):
    torch.manual_seed(0)
    net = make()
    reference = metacal.functional(net.double().cuda(), batch_norm="batch")
    x = torch.randn(16, 3, 32, 32, dtype=torch.float64, device="cuda")

    def gradient(f, x, dtype):
        params = leaf_grads(tree.to(f.params, dtype))
        value = (f.apply(params, x.to(dtype)).double() + 0.3).square().mean()
        return value.item(), derivative(value, params)

    value, expected = gradient(reference, x, torch.float64)
    last = metacal.functional(net.to(memory_format=torch.channels_last), batch_norm="batch")
    convolutions = [p for p in last.params.values() if p.ndim == 4 and p.shape[1] > 1 and p.shape[-1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    again, found = gradient(last, x.contiguous(memory_format=torch.channels_last), torch.float64)
    assert again == pytest.approx(value, rel=1e-10)
    close(found, expected, 1e-8)
    rounded, found = gradient(last, x.contiguous(memory_format=torch.channels_last), torch.bfloat16)
    assert rounded == pytest.approx(value, rel=0.05)
    flat = [torch.cat([leaf.double().flatten() for leaf in tree.leaves(each)]) for each in (found, expected)]
    assert nn.functional.cosine_similarity(*flat, dim=0) > 0.95
