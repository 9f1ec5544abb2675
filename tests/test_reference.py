"""The SiD-LSG losses a second time, the way the published code writes them, on tiny random U-Nets.

Nothing of the package is used on the reference's side: levels from the betas, guidance and loss in the network's own
space (epsilon or v), x_0 = (x_t - sigma_t eps)/alpha_t, weight 1/clip(mean|x_g - y_real|, 1e-5), float64 throughout.
Both sides must agree in every per-sample loss and in every parameter's gradient.
"""

from types import SimpleNamespace
import pytest
import torch
from diffusers import UNet2DConditionModel
from sid_lsg_nb.teachers.base import Denoiser
from sid_lsg_nb.method.methods import Recipe, make_method
from sid_lsg_nb.method.rollout import Draw
from sid_lsg_nb.method.steps import Batch, Learner, Networks, Update, fake_losses, generator_grad
from sid_lsg_nb.method.guidance import Kappa
from sid_lsg_nb.method.schedule import DiscreteSchedule

B, T_INIT, TOLERANCE = 3, 625, 1e-9
ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
KAPPAS = [
    (1.0, 1.0, 1.0, 1.0),
    (2.0, 2.0, 2.0, 2.0),
    (1.0, 1.0, 1.0, 3.0),
    (0.5, 1.0, 1.0, 1.0),
    (1.3, 2.0, 0.7, 3.1),
]

# --- the reference
def levels(t):
    return (v[t].reshape(-1, 1, 1, 1) for v in (ABAR.sqrt(), (1 - ABAR).sqrt()))

def to_eps(kind, out, x_t, t):  # epsilon of whatever the network predicts
    a, s = levels(t)
    return out if kind == 'epsilon' else a * out + s * x_t

def guided_out(net, x_t, t, text, empty, kappa):  # two separate forwards, in the network's own space
    cond = net(x_t, t, encoder_hidden_states=text).sample
    uncond = net(x_t, t, encoder_hidden_states=empty.expand_as(text)).sample
    return uncond + kappa * (cond - uncond)

def x0_of(kind, net, x_t, t, text, empty, kappa):
    a, s = levels(t)
    return (x_t - s * to_eps(kind, guided_out(net, x_t, t, text, empty, kappa), x_t, t)) / a

def images(kind, net, z, text):
    t = torch.full((len(z),), T_INIT)
    _, s = levels(t)
    return x0_of(kind, net, s * z, t, text, text[:1], 1.0)

def official_fake(kind, w, kappa1):  # per sample: ||eps_hat - eps||^2, or ||v_hat - v||^2 SNR/(SNR+1)
    a, s = levels(w.noise.t)
    x_g = images(kind, w.generator, w.noise.z, w.text).detach()
    out = guided_out(w.fake, a * x_g + s * w.noise.eps, w.noise.t, w.text, w.empty, kappa1)
    if kind == 'epsilon':
        return ((out - w.noise.eps) ** 2).sum((1, 2, 3))
    snr = a**2 / s**2
    return ((out - (a * w.noise.eps - s * x_g)) ** 2 * snr / (snr + 1)).sum((1, 2, 3))

def official_generator(kind, w, kappas, alpha, weighted=True):
    _, k2, k3, k4 = kappas
    a, s = levels(w.noise.t)
    x_g = images(kind, w.generator, w.noise.z, w.text)
    x_t = a * x_g + s * w.noise.eps
    real = x0_of(kind, w.teacher, x_t, w.noise.t, w.text, w.empty, k4)
    fake2, fake3 = (x0_of(kind, w.fake, x_t, w.noise.t, w.text, w.empty, k) for k in (k2, k3))
    d = real - fake2
    loss = d * ((real - x_g) - alpha * d) + d * (
        fake3 - fake2
    )  # the second term is 0 in the published code, where kappa2 = kappa3
    factor = (x_g - real).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5).detach()
    return (loss / factor if weighted else loss).sum((1, 2, 3))

def official_family(
    kind, w, kappas, method, weight, d=None, score=False
):  # SIM with d'(y) by autograd of d in float64, Fisher, Diff-Instruct; any weight of the levels
    _, k2, k3, k4 = kappas
    a, s = levels(w.noise.t)
    x_g = images(kind, w.generator, w.noise.z, w.text)
    x_t = a * x_g + s * w.noise.eps
    if method == 'di':
        x_t = x_t.detach()  # the whole of Diff-Instruct
    real = x0_of(kind, w.teacher, x_t, w.noise.t, w.text, w.empty, k4)
    fake2, fake3 = (x0_of(kind, w.fake, x_t, w.noise.t, w.text, w.empty, k) for k in (k2, k3))
    if (
        method == 'sim'
    ):  # scores are (a y - x_t)/s^2; the theorem's line is -d'(S_fake - S_real)^T (S_fake3 - S_conditional)
        score_of = (lambda v: (a * v - x_t) / s**2) if score else (lambda v: v)
        y = score_of(fake2) - score_of(real)
        (slope,) = torch.autograd.grad(sum(d(v) for v in y), y, create_graph=True)
        loss = -slope * (score_of(fake3) - score_of(x_g))
    else:
        loss = (real - fake2) * (fake3 - x_g) + (0.5 * (real - fake2) ** 2 if method == 'fisher' else 0.0)
    return (weight(a, s, x_g, real) * loss).sum((1, 2, 3))

# --- three networks, prompts, noise
def tiny_unet(seed):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
    ).double()

@pytest.fixture(scope='module')
def world():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    noise = Draw(z=draw(B, 4, 8, 8), eps=draw(B, 4, 8, 8), t=torch.tensor([20, 431, 979]))
    return SimpleNamespace(
        teacher=tiny_unet(1),
        fake=tiny_unet(2),
        generator=tiny_unet(3),
        text=draw(B, 5, 8),
        empty=draw(1, 5, 8),
        noise=noise,
    )

def ours(world, kind):  # the package's view of the same networks
    schedule = DiscreteSchedule(ABAR, kind)
    teacher, fake, generator = (Denoiser(n, schedule) for n in (world.teacher, world.fake, world.generator))
    learners = dict(fake=Learner(fake, None), generator=Learner(generator, None))
    return (
        Networks(teacher, learners, dict(encoder_hidden_states=world.empty)),
        Batch(dict(encoder_hidden_states=world.text)),
        world.noise,
    )

def method(kappas=(1.0, 1.0, 1.0, 1.0), **kw):
    return make_method(Recipe(kappa=Kappa(*kappas), t_init=T_INIT, **kw))

def our_fake(m, world, kind):
    return fake_losses(m, *ours(world, kind))

def our_generator(m, world, kind):
    return generator_grad(m, Update(('generator',)), *ours(world, kind))[0]

def slopes(losses, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), list(net.parameters()))])

def gap(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()

def agree(a, b, net):
    assert a.shape == (B,)
    assert ((a - b) / b).abs().max() < TOLERANCE  # each sample on its own
    assert gap(slopes(a, net), slopes(b, net)) < TOLERANCE

# --- the tests
@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('kappa1', [1.0, 0.5, 2.0, 4.5])
def test_fake_loss(world, kind, kappa1):
    agree(
        our_fake(method((kappa1, 1.0, 1.0, 1.0)), world, kind), official_fake(kind, world, kappa1), world.fake
    )

@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('alpha', [0.0, 0.5, 1.0, 1.2])
@pytest.mark.parametrize('kappas', KAPPAS, ids=str)
def test_generator_loss(world, kind, alpha, kappas):
    agree(
        our_generator(method(kappas, alpha=alpha), world, kind),
        official_generator(kind, world, kappas, alpha),
        world.generator,
    )

D = {
    'l2': lambda y: (y**2).sum(),
    'huber:0.05': lambda y: ((y**2).sum() + 0.05**2 * y.numel()).sqrt(),
    'huber-abs:3': lambda y: ((y**2).sum() + 9).sqrt() - 3,
    'p:1.7': lambda y: (y.abs() ** 1.7).sum(),
    'p:3': lambda y: (y.abs() ** 3).sum(),
}
W = {
    'none': lambda a, s, x, r: 1.0,
    'l1': lambda a, s, x, r: (1 / (x - r).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5)).detach(),
    'snr': lambda a, s, x, r: a**2 / s**2,
    '1-t': lambda a, s, x, r: 1 / (1 + s / a),
    'edm': lambda a, s, x, r: a**2 / s**2 + 4,
}

@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('space', ['x0', 'score'])
@pytest.mark.parametrize('distance', list(D))
def test_sim_with_any_distance(world, kind, space, distance):
    agree(
        our_generator(
            method(KAPPAS[-1], method='sim', distance=distance, space=space, loss_weight='none'), world, kind
        ),
        official_family(kind, world, KAPPAS[-1], 'sim', W['none'], D[distance], space == 'score'),
        world.generator,
    )

@pytest.mark.parametrize('weight', list(W))
@pytest.mark.parametrize('name', ['fisher', 'sim', 'di'])
def test_methods_and_weights(world, name, weight):
    agree(
        our_generator(
            method(KAPPAS[-1], method=name, distance='huber-abs:3', loss_weight=weight), world, 'epsilon'
        ),
        official_family('epsilon', world, KAPPAS[-1], name, W[weight], D['huber-abs:3']),
        world.generator,
    )

@pytest.mark.parametrize('weight', ['none', 'snr', '1-t', 'edm'])
def test_weights_of_the_fake(world, weight):
    a, s = levels(world.noise.t)
    official = (
        official_fake('epsilon', world, 2.0) * (s**2 / a**2)[:, 0, 0, 0] * W[weight](a, s, 0, 0).reshape(-1)
        if weight != 'none'
        else official_fake('epsilon', world, 2.0) * (s**2 / a**2)[:, 0, 0, 0]
    )
    agree(
        our_fake(method((2.0, 1.0, 1.0, 1.0), fake_loss_weight=weight), world, 'epsilon'),
        official,
        world.fake,
    )

@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
def test_unweighted(world, kind):
    agree(
        our_generator(method(KAPPAS[-1], loss_weight='none'), world, kind),
        official_generator(kind, world, KAPPAS[-1], 1.0, weighted=False),
        world.generator,
    )

def test_no_gradient_reaches_teacher_and_fake(world):
    for n in (world.teacher, world.fake):
        n.requires_grad_(False)
    our_generator(method(KAPPAS[-1]), world, 'epsilon').sum().backward()
    try:
        assert all(p.grad is None for n in (world.teacher, world.fake) for p in n.parameters())
        assert all(p.grad is not None for p in world.generator.parameters())
    finally:
        for n in (world.teacher, world.fake, world.generator):
            n.requires_grad_(True)
            n.zero_grad(set_to_none=True)

@pytest.mark.parametrize('swap', [(1, 2), (1, 3), (2, 3)])
def test_the_reference_can_tell_kappas_apart(world, swap):
    kappas = list(KAPPAS[-1])
    i, j = swap
    kappas[i], kappas[j] = kappas[j], kappas[i]
    assert (
        gap(
            our_generator(method(kappas), world, 'epsilon'),
            official_generator('epsilon', world, KAPPAS[-1], 1.0),
        )
        > 1e-3
    )
