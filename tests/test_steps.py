"""The two turns and the loop on small random U-Nets in double precision, against formulas written out in epsilon space.

Three different networks, so that no accident of equality hides a mistake; double precision, so that a difference is
not rounding."""

import copy, re
from dataclasses import replace
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from sid_lsg_nb.core import cond_map, cond_slice, max_abs, rng, sum_per_sample
from sid_lsg_nb.method.adversary import Adversary, Discriminator
from sid_lsg_nb.method.gaussians import ExactDenoiser, GaussianMixture
from sid_lsg_nb.method.guidance import Kappa, predict_guided
from sid_lsg_nb.method.losses import Distance, Estimates, l1_weight
from sid_lsg_nb.method.methods import Recipe, make_method
from sid_lsg_nb.method.optim import make_adam
from sid_lsg_nb.method.rollout import Draw, generate
from sid_lsg_nb.method.schedule import DiscreteSchedule, FlowSchedule
from sid_lsg_nb.method.sequential import SavedTensorMemory, generator_grad_sequential
from sid_lsg_nb.method.steps import (
    Batch, Learner, Networks, Update, distill, fake_losses, generator_grad, run_update, split_noise)
from sid_lsg_nb.teachers.stable_diffusion import UNetDenoiser

FAKE, GENERATOR = Update(('fake',)), Update(('generator',))
SD = DDIMScheduler(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, clip_sample=False)
SCHEDULE, ABAR = DiscreteSchedule.from_scheduler(SD), SD.alphas_cumprod.double()
KAPPAS = Kappa(1, 2.0, 1.3, 3.0)
GRADIENTS = [generator_grad, generator_grad_sequential]

def name(what):
    "Of a case, the same in every process: no address of an object in it"
    if isinstance(what, dict):
        return ','.join(f'{k}={name(v)}' for k, v in what.items()) or 'plain'
    return getattr(what, '__name__', None) or re.sub(r' at 0x\w+', '', str(what))

def tiny_denoiser(seed):
    torch.manual_seed(seed)
    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, attention_head_dim=8, down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'), cross_attention_dim=16)
    return UNetDenoiser(net.double(), SCHEDULE)


TEACHER, FAKE_NET, GEN_NET = (tiny_denoiser(s) for s in (1, 2, 3))
TEACHER.requires_grad_(False)
words = lambda n, seed: dict(
    encoder_hidden_states=torch.randn(n, 5, 16, generator=rng(seed), dtype=torch.float64)
)
COND, NULL, OTHER = words(3, 5), words(1, 6), words(3, 7)
REAL = torch.randn(3, 4, 8, 8, generator=rng(8), dtype=torch.float64)

# ---- tools

def method(**k):
    return make_method(Recipe(**k))

def draw(m, seed=7, n=3):
    return m.draw(GENERATOR, (n, 4, 8, 8), SCHEDULE, rng(seed), torch.float64)

NOISE = draw(method())

def learner(net, lr=1e-3, **k):
    net = copy.deepcopy(net)
    return Learner(net, make_adam(net.parameters(), lr=lr), **k)

def networks(teacher=TEACHER, fake=FAKE_NET, gen=GEN_NET, **k):
    return Networks(teacher, dict(fake=learner(fake, **k), generator=learner(gen, **k)), NULL)

def batches(sizes, cond=COND, real=None):
    ends = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    return [Batch(cond_slice(cond, s), None if real is None else real[s]) for s in ends]

def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])

def weights(nets):
    return flat(p.detach() for role in ('fake', 'generator') for p in nets[role].net.parameters())

def grads(losses, net):
    return flat(torch.autograd.grad(losses.mean(), list(net.parameters()), retain_graph=True))

def close(a, b, tolerance):
    assert max_abs(a, b) < tolerance * b.abs().max()

def collected(m, nets, draws=(NOISE,), given=None):
    "The generator's gradient that an update is about to apply, and its row of the log"
    found, gen = [], nets['generator']
    step = gen.step

    def look(*others):
        found.append(flat(p.grad for p in gen.net.parameters()))
        return step(*others)

    gen.step = look
    row = run_update(m, GENERATOR, nets, given or [Batch(COND)], list(draws))
    return found[0], row

def in_one_graph(m, nets, d=NOISE):
    "The generator's gradient by plain autograd, with nothing cut or frozen"
    losses, _ = generator_grad(replace(m, gradient=generator_grad), GENERATOR, nets, Batch(COND), d)
    return grads(losses, nets['generator'].net)

def chains():
    "A draw for every step of a chain of four with fresh noise, and one with fixed noise"
    found, g = {}, rng(8)
    while len(found) < 5:
        for how in ('fresh', 'fixed'):
            d = method(student_steps=4, renoise=how).draw(GENERATOR, (3, 4, 8, 8), SCHEDULE, g, torch.float64)
            if how == 'fresh' or d.k == 2:
                found.setdefault((how, d.k), d)
    return found

CHAINS = chains()

# ---- the official form, in epsilon space

def levels(t):
    return tuple(v[:, None, None, None] for v in (ABAR[t] ** 0.5, (1 - ABAR[t]) ** 0.5))

def picture_by_hand(d, stop=True):
    "What a chain of up to four steps draws; with one step, G(z)"
    x, times = torch.zeros(3, 4, 8, 8).double(), (625, 469, 312, 156)
    for i, t in enumerate(times[: d.k + 1]):
        a, s = ABAR[t] ** 0.5, (1 - ABAR[t]) ** 0.5
        x_t = a * (x.detach() if stop else x) + s * (d.z if i == 0 else d.renoise[:, i - 1])
        x = (x_t - s * GEN_NET.net(x_t, torch.tensor([t] * 3), COND['encoder_hidden_states'])[0]) / a
    return x

def eps_by_hand(net, x_t, t, kappa):
    c, u = COND['encoder_hidden_states'], NULL['encoder_hidden_states'].expand(3, 5, 16)
    e_c, e_u = net.net(x_t, t, c)[0], net.net(x_t, t, u)[0]
    return e_u + kappa * (e_c - e_u)

def official_fake_loss(kappa1, d=NOISE):
    a, s = levels(d.t)
    x_g = picture_by_hand(d).detach()
    return ((eps_by_hand(FAKE_NET, a * x_g + s * d.eps, d.t, kappa1) - d.eps) ** 2).sum((1, 2, 3))

def official_generator_loss(kappa, alpha, d=NOISE):
    a, s = levels(d.t)
    x_g = picture_by_hand(d)
    x_t = a * x_g + s * d.eps
    real, fake = ((x_t - s * eps_by_hand(net, x_t, d.t, kappa)) / a for net in (TEACHER, FAKE_NET))
    w = (x_g - real).abs().mean((1, 2, 3), keepdim=True).clip(1e-5).detach()
    return ((real - fake) * ((real - x_g) - alpha * (real - fake)) / w).sum((1, 2, 3))

def plain_networks():  # the very networks of the formulas, not copies
    return Networks(
        TEACHER,
        {k: Learner(n, make_adam(n.parameters())) for k, n in (('fake', FAKE_NET), ('generator', GEN_NET))}, NULL)

@pytest.mark.parametrize('how, k', CHAINS)
def test_a_chain_is_the_loop_written_out(how, k):
    "In value and in the gradient of every weight; leaving the stop-gradient away would be seen"
    d, eye = CHAINS[how, k], torch.randn(3, 4, 8, 8, generator=rng(9), dtype=torch.float64)
    ours, theirs = (
        generate(method(student_steps=4, renoise=how).rollout, GEN_NET, COND, d), picture_by_hand(d))
    slope, wanted, loose = (grads(x * eye, GEN_NET) for x in (ours, theirs, picture_by_hand(d, stop=False)))
    close(ours, theirs, 1e-9)
    close(slope, wanted, 1e-9)
    assert (max_abs(loose, wanted) > 1e-3 * wanted.abs().max()) == (k > 0)

@pytest.mark.parametrize('kappa1', [1.0, 0.5, 2.0])
def test_the_fake(kappa1):
    ours = fake_losses(method(kappa=Kappa(kappa1, 1, 1, 1)), plain_networks(), Batch(COND), NOISE)
    close(ours, official_fake_loss(kappa1), 1e-9)
    close(grads(ours, FAKE_NET), grads(official_fake_loss(kappa1), FAKE_NET), 1e-9)
    assert all(
        g is None for g in torch.autograd.grad(ours.sum(), list(GEN_NET.parameters()), allow_unused=True)
    )

@pytest.mark.parametrize('how, k', CHAINS)
def test_the_fake_on_a_chain(how, k):
    m = method(kappa=Kappa.lsg(2.0), student_steps=4, renoise=how)
    close(
        fake_losses(m, plain_networks(), Batch(COND), CHAINS[how, k]), official_fake_loss(2.0, CHAINS[how, k]),
        1e-9)

@pytest.mark.parametrize('kappa, alpha', [(1.0, 1.0), (2.0, 1.0), (1.5, 0.5), (4.5, 1.2)])
def test_the_generator(kappa, alpha):
    ours, _ = generator_grad(
        method(kappa=Kappa.lsg(kappa), alpha=alpha), GENERATOR, plain_networks(), Batch(COND), NOISE
    )
    official = official_generator_loss(kappa, alpha)
    close(ours, official, 1e-9)
    close(grads(ours, GEN_NET), grads(official, GEN_NET), 1e-9)

def test_guidance_up_to_a_time():
    "Every row has the scale of its own time, in the fake's loss and the generator's, in value and gradient"
    bound = NOISE.t.float().median().item()
    acts = levels(NOISE.t)[0].new_tensor([2.0 if t < bound else 1.0 for t in NOISE.t])
    assert acts.unique().numel() == 2
    kappa, m = acts[:, None, None, None], method(kappa=Kappa.lsg(2.0), guidance_t_max=bound)
    ours = fake_losses(m, plain_networks(), Batch(COND), NOISE)
    close(ours, official_fake_loss(kappa), 1e-9)
    close(grads(ours, FAKE_NET), grads(official_fake_loss(kappa), FAKE_NET), 1e-9)
    ours, _ = generator_grad(m, GENERATOR, plain_networks(), Batch(COND), NOISE)
    official = official_generator_loss(kappa, 1.0)
    close(ours, official, 1e-9)
    close(grads(ours, GEN_NET), grads(official, GEN_NET), 1e-9)
    assert max_abs(ours, official_generator_loss(2.0, 1.0)) > 1e-3 * ours.abs().max()

@pytest.mark.parametrize('how, k', CHAINS)
def test_the_generator_on_a_chain(how, k):
    m, d = method(kappa=Kappa.lsg(2.0), student_steps=4, renoise=how), CHAINS[how, k]
    ours, official = (
        generator_grad(m, GENERATOR, plain_networks(), Batch(COND), d)[0], official_generator_loss(2.0, 1.0, d))
    close(ours, official, 1e-9)
    close(grads(ours, GEN_NET), grads(official, GEN_NET), 1e-9)

def test_a_teacher_that_flows():
    "SiD-DiT's settings on exact points: 1-t, and the velocity's weight, written out"
    mixtures = [([[1.0], [-1.0]], 0.3), ([[0.2]], 0.6)]
    exact = [
        GaussianMixture(
            torch.ones(len(m)).double(), torch.tensor(m).double(), torch.full((len(m),), s).double()
        )
        for m, s in mixtures
    ]
    maker = nn.Linear(1, 1).double()

    class Maker(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.schedule = maker, FlowSchedule()

        def forward(self, x_t, _t, _cond):
            return self.net(x_t)

    m = method(
        kappa=Kappa(), loss_weight='1-t', timestep_sampling='logit-normal', fake_loss_weight='velocity', t_min=0.02,
        t_max=0.98, t_init=2.5 / 3.5)
    real, fake = (ExactDenoiser(b, FlowSchedule()) for b in exact)
    gen = Maker()
    nets = Networks(real, dict(fake=Learner(fake, None), generator=Learner(gen, None)), {})
    d = m.draw(GENERATOR, (64, 1), FlowSchedule(), rng(8), torch.float64)
    t, batch = d.t.double()[:, None], Batch({})
    x = maker(2.5 / 3.5 * d.z)
    x_t = (1 - t) * x + t * d.eps
    y_real, y_fake = (b.denoise(x_t, 1 - t, t) for b in exact)
    assert (
        max_abs(
            generator_grad(m, GENERATOR, nets, batch, d)[0], ((1 - t) * (y_real - y_fake) * (y_fake - x))[:, 0])
        < 1e-6
    )
    velocity = lambda y: (x_t - y) / t  # eps - x0, with eps = (x_t - (1 - t) x0)/t
    assert max_abs(fake_losses(m, nets, batch, d), ((velocity(y_fake) - (d.eps - x)) ** 2)[:, 0]) < 1e-5

# ---- one gradient, two ways

OWN = Distance(lambda y: sum_per_sample((1 + y**2).log()))
MEMBERS = [
    dict(kappa=Kappa(), alpha=0.7), dict(kappa=Kappa.lsg(1.5), alpha=0.7), dict(alpha=0.7),
    dict(method='fisher', loss_weight='none'), dict(method='di'),
    *(dict(method='sim', distance=d, loss_weight='none') for d in ('l2', 'huber', 'p:1.7', OWN)),
    dict(loss_weight='1-t'), dict(method='di', loss_weight='snr'),
    dict(method='sim', space='score', distance='huber-abs:1', loss_weight='none')]

@pytest.mark.parametrize('what', MEMBERS, ids=name)
def test_sequential_and_plain_are_autograd(what):
    m = method(**dict(kappa=KAPPAS) | what)
    truth = in_one_graph(m, networks())
    assert truth.abs().max() > 1e-6
    for gradient in GRADIENTS:
        close(collected(replace(m, gradient=gradient), networks())[0], truth, 1e-10)

@pytest.mark.parametrize('how, k', list(CHAINS)[-3:])
def test_sequential_and_plain_along_a_chain(how, k):
    m, d = method(kappa=KAPPAS, student_steps=4, renoise=how), CHAINS[how, k]
    truth = in_one_graph(m, networks(), d)
    for gradient in GRADIENTS:
        close(collected(replace(m, gradient=gradient), networks(), [d])[0], truth, 1e-10)

@pytest.mark.parametrize('gradient', GRADIENTS)
def test_diff_instruct_by_hand(gradient):
    "Both networks under no_grad, and -sg[delta]^T x_g"
    nets = networks()
    x_g = generate(method().rollout, nets['generator'].net, COND, NOISE)
    x_t = SCHEDULE.add_noise(x_g, NOISE.eps, NOISE.t)
    with torch.no_grad():
        (y_real,) = predict_guided(TEACHER, x_t, NOISE.t, COND, NULL, 3.0)
        (y_fake,) = predict_guided(FAKE_NET, x_t, NOISE.t, COND, NULL, 2.0)
        w = l1_weight(Estimates(x_g, y_real, y_fake, y_fake, None, None))
    wanted = grads(w * sum_per_sample((y_fake - y_real) * x_g), nets['generator'].net)
    close(collected(method(kappa=KAPPAS, method='di', gradient=gradient), networks())[0], wanted, 1e-10)

def peak(gradient, checkpointing):
    nets = networks()
    for d in (TEACHER, nets['fake'].net, nets['generator'].net):
        (d.net.enable_gradient_checkpointing if checkpointing else d.net.disable_gradient_checkpointing)()
    memory = SavedTensorMemory(TEACHER, nets['fake'].net, nets['generator'].net)
    with memory:
        run_update(method(kappa=Kappa.lsg(2.0), gradient=gradient), GENERATOR, nets, [Batch(COND)], [NOISE])
    TEACHER.net.disable_gradient_checkpointing()
    return memory.peak

def test_what_sequential_and_checkpointing_save():
    plain, sequential, checkpointing, both = (peak(g, c) for c in (False, True) for g in GRADIENTS)
    assert sequential < 0.6 * plain and checkpointing < 0.7 * plain and both < 0.7 * sequential

# ---- what an iteration costs

def ledger(run, nets):
    """Forward equivalents by the rule: samples forward, and again for each backward, twice through a network that
    learns"""
    units, backward = 0, []

    def count(net, args, out):
        nonlocal units
        units += len(args[0])
        rows = len(args[0]) * (2 if any(p.requires_grad for p in net.parameters()) else 1)
        if out[0].requires_grad:
            out[0].register_hook(lambda g: backward.append(rows))

    hooks = [d.net.register_forward_hook(count) for d in (TEACHER, nets['fake'].net, nets['generator'].net)]
    run()
    for h in hooks:
        h.remove()
    return (units + sum(backward)) / 3  # three prompts

def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()

@pytest.mark.parametrize(
    'by_rule, what',
    [
        (11, dict(kappa=Kappa())), (18, {}), (13, dict(kappa=Kappa.long(2.0))), (14, dict(method='di')),
        (9, dict(kappa=Kappa(), method='di')), (21, dict(gradient=generator_grad_sequential))],
    ids=name)
def test_what_an_iteration_costs(by_rule, what):
    "In forwards of one network: by calls, and by PyTorch's count of operations"

    def iteration():
        m, nets = method(**what), networks()
        return lambda: [run_update(m, u, nets, [Batch(COND)], [NOISE]) for u in (FAKE, GENERATOR)], nets

    with torch.no_grad():
        one = flops(lambda: GEN_NET(NOISE.z, NOISE.t, COND))
    assert ledger(*iteration()) == by_rule
    assert abs(flops(iteration()[0]) / one / by_rule - 1) < 0.1

def count_samples(net, run):
    seen = []
    h = net.register_forward_pre_hook(lambda _m, a: seen.append(len(a[0])))
    run()
    h.remove()
    return seen

@pytest.mark.parametrize(
    'who, kappas, samples',
    [
        ('fake', {}, [3]), ('fake', dict(kappa2=2.0, kappa3=1.5), [6]),
        ('teacher', dict(kappa2=2.0, kappa3=1.5), [3]), ('generator', dict(kappa4=4.5), [3])])
def test_two_scales_of_the_fake_cost_one_forward(who, kappas, samples):
    net = dict(fake=FAKE_NET, teacher=TEACHER, generator=GEN_NET)[who].net
    m = method(kappa=Kappa(**kappas))
    assert (
        count_samples(net, lambda: generator_grad(m, GENERATOR, plain_networks(), Batch(COND), NOISE))
        == samples
    )

@pytest.mark.parametrize('k', range(4))
def test_only_the_last_question_has_a_graph(k):
    seen, d = [], CHAINS['fresh', k]
    h = GEN_NET.net.register_forward_pre_hook(lambda _m, _a: seen.append(torch.is_grad_enabled()))
    generate(method(student_steps=4).rollout, GEN_NET, COND, d)
    h.remove()
    assert seen == [False] * k + [True]

# ---- an update

def test_gradients_stay_out_of_the_frozen():
    nets = networks()
    collected(method(), nets)
    assert all(p.grad is None for net in (TEACHER, nets['fake'].net) for p in net.parameters())
    assert all(p.requires_grad for p in nets['fake'].net.parameters())
    assert not any(p.requires_grad for p in TEACHER.parameters())

def both_turns(m, nets, sizes, d=NOISE):
    rows = [run_update(m, u, nets, batches(sizes), split_noise(d, sizes)) for u in (FAKE, GENERATOR)]
    return rows, weights(nets)

@pytest.mark.parametrize('sizes', [[1, 1, 1], [2, 1]])
@pytest.mark.parametrize(
    'what', [{}, dict(student_steps=4), dict(student_steps=4, gradient=generator_grad_sequential)], ids=name
)
def test_micro_batches_change_nothing(sizes, what):
    m, before = method(**what), weights(networks())
    d = CHAINS['fresh', 2] if m.rollout.times[1:] else NOISE
    (whole, p), (cut, q) = both_turns(m, networks(), [3], d), both_turns(m, networks(), sizes, d)
    assert max_abs(p, before) > 9e-4 and max_abs(p, q) < 1e-6
    for a, b in zip(whole, cut):
        for k in ('loss', 'norm'):
            assert abs(a[k] - b[k]) < 1e-9 * abs(a[k])

class Broken(nn.Module):
    "A denoiser that answers `value` for its sample number `row`"

    def __init__(self, d, row, value):
        super().__init__()
        self.d, self.schedule, self.row, self.value = d, d.schedule, row, value

    def forward(self, x_t, t, cond):
        y = self.d(x_t, t, cond)
        return y * torch.where(torch.arange(len(y)) == self.row, self.value, 1.0)[:, None, None, None]

def rows_of(d, keep):
    return Draw(d.z[keep], d.eps[keep], d.t[keep])

@pytest.mark.parametrize('gradient', GRADIENTS)
@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_a_broken_picture_is_left_out(value, gradient):
    "The step is the step of the two others, divided by three all the same; the accident is counted"
    m, keep = method(kappa=Kappa(), gradient=gradient), torch.tensor([0, 2])
    got, row = collected(m, networks(Broken(TEACHER, 1, value)))
    wanted, _ = collected(m, networks(), [rows_of(NOISE, keep)], [Batch(cond_map(lambda v: v[keep], COND))])
    close(got, wanted * 2 / 3, 1e-12)
    assert (int(row['dropped']), float(row['skipped'])) == (1, 0.0)
    assert row['loss'].isfinite() and row['fisher'].isfinite() and row['norm'] > 0

@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_the_fake_learns_from_the_pictures_that_are_whole(value):
    "A picture that the generator broke counts as one that was not there; an infinite gradient still skips the step"
    found, m, keep = {}, method(), torch.tensor([0, 2])
    cases = (
        ('hurt', Broken(GEN_NET, 1, value), NOISE, COND),
        ('well', GEN_NET, rows_of(NOISE, keep), cond_slice(COND, keep)),
    )
    for case, gen, d, cond in cases:
        nets = networks(gen=gen)
        fake, step = nets['fake'], nets['fake'].step
        fake.step = lambda: (found.update({case: flat(p.grad for p in fake.net.parameters())}), step())[1]
        found[case, 'row'] = run_update(m, FAKE, nets, [Batch(cond)], [d])
    close(found['hurt'], found['well'] * 2 / 3, 1e-12)
    row = found['hurt', 'row']
    assert (int(row['dropped']), float(row['skipped'])) == (1, 0.0) and row['loss'].isfinite()

def test_a_broken_step_is_skipped():
    "When the network that learns breaks: weights and second moments stay, bit for bit"
    m, nets = method(kappa=Kappa()), networks()
    fake = nets['fake']
    state = lambda: flat(
        [weights(nets), *(v.flatten().double() for s in fake.optimizer.state.values() for v in s.values())]
    )
    fake.train, old = Broken(fake.net, 0, torch.inf), state()
    row = run_update(m, FAKE, nets, [Batch(COND)], [NOISE])
    assert (int(row['dropped']), float(row['skipped']), float(row['norm'])) == (1, 1.0, 0.0) and torch.equal(
        state(), old
    )
    fake.train = fake.net
    row = run_update(m, FAKE, nets, [Batch(COND)], [NOISE])
    assert float(row['skipped']) == 0.0 and max_abs(state(), old) > 1e-4

def test_clipping():
    """With epsilon far above the gradient Adam is plain descent: the step shows the clipped gradient, the log the
    whole one"""
    moved = []
    for clip in (None, 1e-3):
        net = copy.deepcopy(GEN_NET)
        l = Learner(net, make_adam(net.parameters(), lr=1.0, eps=1e9), clip=clip)
        old = flat(p.detach().clone() for p in net.parameters())
        l.objective(torch.stack([p.sum() * k for k, p in enumerate(net.parameters(), 1)]), 1).backward()
        norm = l.step().norm
        moved.append((1e9 * (old - flat(p.detach() for p in net.parameters())).abs().max().item(), norm))
    assert [m for m, _ in moved] == pytest.approx([len(list(GEN_NET.parameters())), 1e-3], rel=1e-4)
    assert moved[0][1] == moved[1][1]

def scaled(scale=None):
    nets = [copy.deepcopy(n).float() for n in (FAKE_NET, GEN_NET)]
    scaler = lambda: torch.amp.GradScaler('cpu', init_scale=scale) if scale else None
    l, r = (Learner(n, make_adam(n.parameters(), lr=1e-3), scaler=scaler()) for n in nets)
    return Networks(copy.deepcopy(TEACHER).float(), dict(fake=l, generator=r), NULL)

def test_a_scale_of_the_loss():
    "1,024 changes nothing but rounding; an absurd one overflows, and each step is skipped and its scale halved"
    before, plain = weights(scaled()), both_turns(method(), scaled(), [3])[1]
    assert max_abs(both_turns(method(), scaled(1024.0), [3])[1], plain) < 1e-7
    nets = scaled(2.0**126)
    rows, after = both_turns(method(), nets, [3])
    assert [float(r['skipped']) for r in rows] == [1.0, 1.0] and max_abs(after, before) == 0
    assert [nets[k].scaler.get_scale() for k in ('fake', 'generator')] == [2.0**125] * 2

@pytest.mark.parametrize('scale', [1.0, 1024.0, 65536.0])
def test_the_norm_is_not_the_scaled_one(scale):
    line = nn.Linear(1, 1, bias=False)
    l = Learner(
        line, torch.optim.SGD(line.parameters(), 1.0), scaler=torch.amp.GradScaler('cpu', init_scale=scale)
    )
    l.objective(line(torch.tensor([[3.0]])).flatten(), 1).backward()  # d/dw of w*3
    assert float(l.step().norm) == 3.0

def two_lines(*gradients, scale=None):
    "Two networks of one weight that learn from one backward; what is left of them, and how the step went"
    nets = [nn.Linear(1, 1, bias=False) for _ in gradients]
    for n in nets:
        nn.init.ones_(n.weight)
    scaler = torch.amp.GradScaler('cpu', init_scale=scale) if scale else None
    first, second = (
        Learner(n, make_adam(n.parameters(), lr=0.1), scaler=s) for n, s in zip(nets, (scaler, None))
    )
    first.objective(sum(n.weight * g for n, g in zip(nets, gradients)), 1).backward()
    done = first.step(second)
    return [n.weight.item() for n in nets], float(done.norm), float(done.skipped)

@pytest.mark.parametrize('scale', [None, 8.0])
def test_two_roles_of_one_update(scale):
    "One norm over both; an infinite gradient of one holds both back"
    left, norm, skipped = two_lines(3.0, 4.0, scale=scale)
    assert left == pytest.approx([0.9, 0.9]) and (norm, skipped) == (5.0, 0.0)
    assert two_lines(3.0, torch.inf, scale=scale) == ([1.0, 1.0], 0.0, 1.0)

class Waits(TorchDispatchMode):
    "Counts operations that need a number from the device"

    ASKS = [getattr(torch.ops.aten, k).default for k in ('_local_scalar_dense', 'nonzero', 'masked_select')]

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masked or func in self.ASKS:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))

def test_the_counter_counts():
    with Waits() as waits:
        torch.ones(3).sum().item(), torch.ones(3)[torch.ones(3) > 0]
    assert len(waits.seen) == 2

@pytest.mark.parametrize(
    'what, scale',
    [
        ({}, None), (dict(gradient=generator_grad_sequential), None), ({}, 1024.0), (dict(student_steps=4), None)],
    ids=name)
def test_no_turn_waits_for_the_device(what, scale):
    m = method(**what)
    with Waits() as waits:
        both_turns(m, scaled(scale) if scale else networks(), [2, 1], draw(m, 8))
    assert waits.seen == []

# ---- the loop

def loop_by_hand(iters, kappa, lr=1e-4, B=2):
    "`torch.optim.Adam`, the official formulas, the random numbers in the same order"
    T, F, G = (copy.deepcopy(n.net) for n in (TEACHER, GEN_NET, GEN_NET))
    g, opts = rng(11), [torch.optim.Adam(n.parameters(), lr=lr, betas=(0.0, 0.999), eps=1e-8) for n in (F, G)]
    c, u = COND['encoder_hidden_states'][:B], NULL['encoder_hidden_states'].expand(B, 5, 16)

    def x0(net, x, t, k=None):
        (a, s), e = levels(t), net(x, t, c)[0]
        if k is not None:
            e0 = net(x, t, u)[0]
            e = e0 + k * (e - e0)
        return (x - s * e) / a

    for i in range(2 * iters):
        z, eps = (torch.randn(B, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
        t, t0 = torch.randint(20, 980, (B,), generator=g), torch.full((B,), 625)
        x_g = x0(G, levels(t0)[1] * z, t0)
        x_g = x_g if i % 2 else x_g.detach()
        a, s = levels(t)
        x_t = a * x_g + s * eps
        fake = x0(F, x_t, t, kappa)
        if i % 2:
            real = x0(T, x_t, t, kappa)
            loss = (
                (real - fake) * (fake - x_g) / (x_g - real).abs().mean((1, 2, 3), keepdim=True).detach()
            ).sum() / B
        else:
            loss = ((a / s * (fake - x_g)) ** 2).sum() / B
        for n in (F, G):
            n.zero_grad()
        loss.backward()
        opts[i % 2].step()
    return [flat(p.detach() for p in n.parameters()) for n in (F, G)]

@pytest.mark.parametrize('kappa', [1.0, 2.0])
def test_the_loop_by_hand(kappa):
    "A dozen iterations against a loop that shares no line with ours"
    nets, start = networks(fake=GEN_NET, lr=1e-4), flat(p.detach() for p in GEN_NET.parameters())
    loop = distill(
        nets, method(kappa=Kappa.lsg(kappa)), lambda _update: batches([2]), (4, 8, 8), rng=rng(11),
        dtype=torch.float64)
    for _ in zip(range(12), loop):
        pass
    for role, theirs in zip(('fake', 'generator'), loop_by_hand(12, kappa)):
        ours = flat(p.detach() for p in nets[role].net.parameters())
        assert max_abs(ours, start) > 5e-4 and max_abs(ours, theirs) < 1e-9

def test_several_fake_updates():
    "Three of the fake's, each on data and noise of its own, before one of the generator's; its row is their mean"
    seen, nets, m = [], networks(), method(fake_updates=3)

    def data(update):
        seen.append(update.trains[0])
        return batches([2])

    s = next(distill(nets, m, data, (4, 8, 8), rng=rng(11), dtype=torch.float64))
    assert seen == ['fake', 'fake', 'fake', 'generator'] and s.nimg == 2
    hand, g, losses = networks(), rng(11), []
    for update in m.updates(0):
        d = m.draw(update, (2, 4, 8, 8), SCHEDULE, g, torch.float64)
        losses.append(run_update(m, update, hand, batches([2]), [d])['loss'])
    assert torch.equal(weights(nets), weights(hand)) and len({l.item() for l in losses}) == 4
    assert (
        s.logs['loss_fake'].item() == pytest.approx(sum(losses[:3]).item() / 3)
        and s.logs['loss'] == losses[3]
    )

def test_what_a_person_is_shown():
    s = next(
        distill(
            networks(), method(), lambda _update: batches([2, 1]), (4, 8, 8), rng=rng(11), dtype=torch.float64
        )
    )
    shown = s.show()
    assert list(shown) == ['x_g', 'y_real', 'y_fake'] and all(
        v.shape == (1, 4, 8, 8) and not v.requires_grad for v in shown.values()
    )

# ---- the adversary

def mid(net, x, t, text):
    "The U-Net as far as its middle block, channels averaged"
    emb, h = net.time_embedding(net.time_proj(t).to(x.dtype)), net.conv_in(x)
    for block in net.down_blocks:
        h = (
            block(h, emb, encoder_hidden_states=text)
            if getattr(block, 'has_cross_attention', False)
            else block(h, emb)
        )[0]
    return net.mid_block(h, emb, encoder_hidden_states=text).mean(1)

def bce(l, y):
    return binary_cross_entropy_with_logits(l, torch.full_like(l, y), reduction='none').mean((1, 2))

EARLY = Adversary(start=0)
BOLD = replace(EARLY, weight_generator=100.0, share=0.4)  # strong enough to be seen

def test_what_the_discriminator_reads():
    with Discriminator().capture_features(FAKE_NET) as found:
        FAKE_NET(REAL, NOISE.t, COND)
    by_hand = mid(FAKE_NET.net, REAL, NOISE.t, COND['encoder_hidden_states']).flatten(1)
    assert max_abs(Discriminator().logits(None, found[-1], 3), by_hand) < 1e-10
    FAKE_NET(REAL, NOISE.t, COND)
    assert len(found) == 1  # outside it is deaf

@pytest.mark.parametrize('texts', [OTHER, None], ids=['own texts', "the batch's"])
@pytest.mark.parametrize('kappa', [Kappa(), Kappa.lsg(2.0), Kappa.zero()], ids=name)
def test_the_discriminators_loss(kappa, texts):
    "Plain, guided (a doubled batch) and blind: value, and the gradient of every weight"
    m, nets = method(kappa=kappa, adversary=EARLY), plain_networks()
    ours, net = fake_losses(m, nets, Batch(COND, REAL, texts), NOISE), FAKE_NET.net
    a, s = levels(NOISE.t)
    x_g = picture_by_hand(NOISE).detach()
    x_t, r_t = (a * x + s * NOISE.eps for x in (x_g, REAL))
    c, u = COND['encoder_hidden_states'], NULL['encoder_hidden_states'].expand(3, 5, 16)
    made_by, real_by = (u, u) if kappa.unconditional_fake else (c, (texts or COND)['encoder_hidden_states'])
    sigma = (s / a).flatten()
    edm = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    eps = eps_by_hand(FAKE_NET, x_t, NOISE.t, kappa.kappa1)
    told = bce(mid(net, r_t, NOISE.t, real_by), 1.0) + bce(mid(net, x_t, NOISE.t, made_by), 0.0)
    theirs = ((eps - NOISE.eps) ** 2).sum((1, 2, 3)) + edm * told / 2
    close(ours, theirs, 1e-9)
    close(grads(ours, FAKE_NET), grads(theirs, FAKE_NET), 1e-9)
    assert (ours - fake_losses(method(kappa=kappa), nets, Batch(COND), NOISE)).min() > 0.1

def adversarial_gradient(kappa):
    "By plain autograd through the formula: the mixture's gradient, the score's alone, and the mixture"
    nets = plain_networks()
    losses, e = generator_grad(method(kappa=kappa), GENERATOR, nets, Batch(COND), NOISE)
    x_t = SCHEDULE.add_noise(e.x_g, NOISE.eps, NOISE.t)
    text = (
        NULL['encoder_hidden_states'].expand(3, 5, 16)
        if kappa.unconditional_fake
        else COND['encoder_hidden_states']
    )
    said = mid(FAKE_NET.net, x_t, NOISE.t, text).clamp(-10, 10)
    omega = 1 / (e.x_g - e.y_real).detach().abs().mean((1, 2, 3))
    told = bce(said, 1.0)  # of each picture
    mixture = 0.6 * losses + 0.4 * 100 * told * omega * 256
    return grads(mixture, GEN_NET), grads(losses, GEN_NET), mixture.mean()

@pytest.mark.parametrize('gradient', GRADIENTS)
@pytest.mark.parametrize('kappa', [Kappa(), KAPPAS, Kappa.zero()], ids=name)
def test_the_generators_reward(kappa, gradient):
    "In one graph and network by network; before its time, the score alone; nothing reaches the fake's weights"
    wanted, alone, loss = adversarial_gradient(kappa)
    nets = networks()
    got, row = collected(method(kappa=kappa, gradient=gradient, adversary=BOLD), nets)
    close(got, wanted, 1e-9)
    assert abs(row['loss'] - loss) < 1e-9 * abs(loss) and all(
        p.grad is None for p in nets['fake'].net.parameters()
    )
    close(
        collected(method(kappa=kappa, gradient=gradient, adversary=replace(BOLD, start=1)), networks())[0], alone,
        1e-12)
    assert max_abs(wanted, 0.6 * alone) > 0.1 * (0.6 * alone).abs().max()

@pytest.mark.parametrize('gradient', GRADIENTS)
@pytest.mark.parametrize('options', [dict(), dict(method='sim'), dict(adversary=BOLD)], ids=name)
def test_no_picture_of_a_micro_batch_reads_another(options, gradient):
    "Four pictures at once, two and two, or one by one: the same gradient, loss and log"
    m, four = method(kappa=KAPPAS, gradient=gradient, **options), words(4, 9)
    whole = m.draw(GENERATOR, (4, 4, 8, 8), SCHEDULE, rng(3), torch.float64)
    cut = lambda sizes: collected(m, networks(), split_noise(whole, sizes), batches(sizes, four))
    wanted, told = cut([4])
    for sizes in ([2, 2], [1, 1, 1, 1]):
        got, row = cut(sizes)
        close(got, wanted, 1e-11)
        assert all(abs(row[k] - told[k]) <= 1e-11 * abs(told[k]) for k in told)

def test_the_reward_along_a_chain():
    m = method(kappa=Kappa(), student_steps=3, adversary=BOLD)
    d = next(d for i in range(20) if (d := draw(m, i)).k == 2)
    a, b = (collected(replace(m, gradient=g), networks(), [d])[0] for g in GRADIENTS)
    close(a, b, 1e-9)

@pytest.mark.parametrize('gradient', GRADIENTS)
def test_a_broken_picture_is_left_out_of_the_reward(gradient):
    m, keep = method(kappa=Kappa(), gradient=gradient, adversary=BOLD), torch.tensor([0, 2])
    hurt, _ = collected(m, networks(Broken(TEACHER, 1, torch.nan)))
    well, _ = collected(m, networks(), [rows_of(NOISE, keep)], [Batch(cond_slice(COND, keep))])
    close(hurt, well * 2 / 3, 1e-10)

def trace(iters=6, **options):
    "Weights of fake and generator after each iteration of two pictures"
    nets, seen, g = networks(), [], rng(1)
    real = lambda: torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64)
    data = lambda update: [Batch(cond_slice(COND, slice(0, 2)), real() if 'fake' in update.trains else None)]
    m = method(kappa=Kappa(), freeze_generator_until=4, adversary=Adversary(**options))
    for _, s in zip(range(iters), distill(nets, m, data, (4, 8, 8), rng=rng(11), dtype=torch.float64)):
        seen.append(
            [flat(p.detach().clone() for p in nets[k].net.parameters()) for k in ('fake', 'generator')]
        )
    return seen

def test_the_clock():
    "The generator is frozen until the first mark, the fake is not; after the second, and not before, the reward acts"
    pushed, calm = (trace(start=8, weight_generator=w) for w in (0.3, 0.0))
    start = flat(p.detach() for p in GEN_NET.parameters())
    assert [max_abs(s[1], start) == 0 for s in pushed] == [True, True, False, False, False, False]
    assert max_abs(pushed[0][0], flat(p.detach() for p in FAKE_NET.parameters())) > 1e-4
    far = [max_abs(a[1], b[1]) for a, b in zip(pushed, calm)]
    assert max(far[:4]) == 0 < far[4]

def test_real_pictures_of_another_shape():
    m = method(kappa=Kappa(), adversary=EARLY)
    assert m.data(FAKE) == ('cond', 'real') and m.data(GENERATOR) == ('cond',)
    with pytest.raises(ValueError, match='do not fit'):
        fake_losses(m, networks(), Batch(COND, REAL[:1]), NOISE)
