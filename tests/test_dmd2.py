"""DMD2 (`--method dmd2`): several updates of the fake before each of the
generator, and a discriminator with weights of its own. Its gradient in closed form, both sides of its adversary by
hand, and the real trainer."""

import json
from dataclasses import replace
import numpy as np
import pytest
import torch
from PIL import Image
from forks import Forked, finish, start_ranks
from torch import nn
from torch.nn.functional import logsigmoid
from sid_lsg_nb.core import max_abs, rng
from sid_lsg_nb.method.adversary import Adversary, Head
from sid_lsg_nb.method.gaussians import CASE_A, CASE_B, CASE_C, di_grad, gauss_hermite
from sid_lsg_nb.method.guidance import Kappa
from sid_lsg_nb.method.methods import Recipe, make_method
from sid_lsg_nb.method.optim import make_adam
from sid_lsg_nb.method.rollout import Draw
from sid_lsg_nb.method.steps import Batch, Learner, Networks, Update, run_update, split_noise
from sid_lsg_nb.training.checkpoint import load_checkpoint
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.job import iterate, setup
from sid_lsg_nb.training.trainer import train

NOW = Adversary(layer='enc', weight_generator=0.01, weight_discriminator=0.7, start=0)
RECIPE = Recipe('dmd2', kappa=Kappa(), adversary=NOW, loss_weight='none', fake_updates=5)
FAKE, GENERATOR = Update(('fake', 'discriminator')), Update(('generator',))

# ---- in closed form

class Levels:
    "A schedule of one noise level; the generator starts from pure noise"

    def __init__(self, alpha, sigma):
        self.a, self.s = alpha, sigma

    def alpha(self, t):
        return torch.where(t == 625, 0.0, torch.tensor(self.a, dtype=torch.float64))

    def sigma(self, t):
        return torch.where(t == 625, 1.0, torch.tensor(self.s, dtype=torch.float64))

    def add_noise(self, x, eps, t):
        return self.alpha(t)[:, None] * x + self.sigma(t)[:, None] * eps

    def sample_time(self, n, *_, **__):
        return torch.full((n,), 500)


class Answer(nn.Module):
    "A network that answers by a function of x_t and of its parameters"

    def __init__(self, f, schedule, **parameters):
        super().__init__()
        self.f, self.schedule = f, schedule
        for k, v in parameters.items():
            self.register_parameter(k, nn.Parameter(torch.tensor(v, dtype=torch.float64)))

    def forward(self, x_t, _t, _cond):
        return self.f(self, x_t)


def learner(net):
    return Learner(net, make_adam(net.parameters(), lr=1e-3))

@pytest.mark.parametrize('case', [CASE_A, CASE_B, CASE_C], ids='ABC')
def test_the_distribution_matching_gradient(case):
    """E[(S_fake - S_real)^T dx_t/dtheta] sigma^2/alpha^2 of two Gaussians, by exact quadrature over z and eps; the
    closed form is that of chapter 02, which is the slope of the KL divergence"""
    s = Levels(case.alpha_t, case.sigma_t)
    real, fake = Answer(lambda n, x: case.y_real(x), s), Answer(lambda n, x: case.y_fake(x) + 0 * n.w, s, w=0.0)
    gen = Answer(lambda n, x: n.mu + n.std * x, s, mu=case.mu2, std=case.s2)
    points, weights = gauss_hermite(8, 2)
    method = make_method(replace(RECIPE, adversary=replace(NOW, start=1)))  # the adversary has not begun
    draw = Draw(points[:, :1], points[:, 1:], torch.full((64,), 500))
    nets = Networks(real, dict(fake=learner(fake), generator=learner(gen), discriminator=learner(Head(1))), {})
    losses, _ = method.losses(GENERATOR, nets, Batch(dict(x=torch.zeros(64, 1))), draw)
    found = torch.autograd.grad((losses * weights).sum(), [gen.mu, gen.std])
    x_t = case.alpha_t * (case.mu2 + case.s2 * points[:, 0]) + case.sigma_t * points[:, 1]
    score = lambda mu, v: -(x_t - case.alpha_t * mu) / v  # of N(alpha mu, v)
    pull = case.sigma_t**2 / case.alpha_t * (score(case.mu2, case.v2) - score(case.mu1, case.v1))
    by_scores = [(weights * pull).sum(), (weights * pull * points[:, 0]).sum()]
    for a, b, c in zip(found, di_grad(case), by_scores):
        assert abs(a - b) < 1e-12 and abs(a - c) < 1e-12

# ---- the adversary by hand

class Small(nn.Module):
    "A network with a layer that can be read, asked like a denoiser"

    def __init__(self, seed, schedule):
        super().__init__()
        torch.manual_seed(seed)
        self.enc, self.out = nn.Conv2d(3, 6, 3, padding=1).double(), nn.Conv2d(6, 3, 1).double()
        self.schedule = schedule

    def forward(self, x_t, _t, _cond):
        return self.out(torch.tanh(self.enc(x_t)))


class Pictures(Levels):
    def add_noise(self, x, eps, t):
        return self.alpha(t)[:, None, None, None] * x + self.sigma(t)[:, None, None, None] * eps


SCHEDULE = Pictures(0.8, 0.6)
REAL = torch.randn(4, 3, 5, 5, generator=rng(1), dtype=torch.float64)
COND = dict(x=torch.zeros(4, 1))

def networks():
    torch.manual_seed(5)
    head = Head(6).double()
    teacher, fake, gen = (Small(i, SCHEDULE) for i in range(3))
    return Networks(teacher, dict(fake=learner(fake), generator=learner(gen), discriminator=learner(head)), {})

def noise(method, update):
    return method.draw(update, (4, 3, 5, 5), SCHEDULE, rng(2), torch.float64)

def logits_by_hand(nets, x):
    h = nets['fake'].net.enc(x)
    w1, b1, w2, b2 = nets['discriminator'].net.parameters()
    a = torch.einsum('bchw,kc->bkhw', h, w1) + b1[:, None, None]
    return (torch.einsum('bkhw,ok->bohw', a * a.sigmoid(), w2) + b2).flatten(1)

def test_what_fake_and_head_learn():
    "Denoising, and telling real from made at the same t with the same noise; the value, and every weight's gradient"
    method, nets = make_method(RECIPE), networks()
    d = noise(method, FAKE)
    assert method.updates(0)[:-1] == [FAKE] * 5 and method.data(FAKE) == ('cond', 'real')
    ours, _ = method.losses(FAKE, nets, Batch(COND, REAL), d)
    x_g = nets['generator'].net(d.z, None, None).detach()
    x_t, r_t = (0.8 * x + 0.6 * d.eps for x in (x_g, REAL))
    told = logsigmoid(logits_by_hand(nets, r_t)).mean(1) + logsigmoid(-logits_by_hand(nets, x_t)).mean(1)
    y_fake = nets['fake'].net(x_t, None, None)
    theirs = (0.8 / 0.6) ** 2 * ((y_fake - x_g) ** 2).sum((1, 2, 3)) - 0.7 * told / 2
    weights = [p for role in FAKE.trains for p in nets[role].net.parameters()]
    assert max_abs(ours, theirs) < 1e-12 * theirs.abs().max()
    for a, b in zip(*(torch.autograd.grad(x.mean(), weights) for x in (ours, theirs))):
        assert max_abs(a, b) < 1e-12 * max(1, b.abs().max())

def test_what_the_generator_learns():
    "Diff-Instruct's gradient at x_g and the reward's, through the frozen fake and head, which learn nothing"
    method, nets = make_method(RECIPE), networks()
    d, gen = noise(method, GENERATOR), nets['generator'].net
    x_g = gen(d.z, None, None)
    x_t = 0.8 * x_g + 0.6 * d.eps
    y_real, y_fake = (n(x_t, None, None).detach() for n in (nets.teacher, nets['fake'].net))
    reward = -logsigmoid(logits_by_hand(nets, x_t)).mean(1)
    theirs = ((y_fake - y_real) * x_g).sum((1, 2, 3)) + 0.01 * 75 * reward
    wanted = torch.autograd.grad(theirs.mean(), list(gen.parameters()))
    before = [p.clone() for role in FAKE.trains for p in nets[role].net.parameters()]
    found, step = [], nets['generator'].step
    nets['generator'].step = lambda: (found.extend(p.grad.clone() for p in gen.parameters()), step())[1]
    run_update(method, GENERATOR, nets, [Batch(COND)], [d])
    for a, b in zip(found, wanted):
        assert max_abs(a, b) < 1e-12 * max(1, b.abs().max())
    after = [p for role in FAKE.trains for p in nets[role].net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))

@pytest.mark.parametrize('update', [FAKE, GENERATOR], ids=['fake', 'generator'])
def test_a_batch_may_be_cut_anywhere(update):
    "Four pictures at once, two and two, one by one: the same row of the log"
    method, rows = make_method(RECIPE), []
    whole = noise(method, update)
    for sizes in ([4], [2, 2], [1] * 4):
        ends = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        batches = [Batch(dict(x=COND['x'][e]), REAL[e]) for e in ends]
        rows.append(run_update(method, update, networks(), batches, split_noise(whole, sizes)))
    for row in rows[1:]:
        assert all(abs(row[k] - v) <= 1e-12 * max(1, abs(v)) for k, v in rows[0].items())

# ---- the real trainer

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with real pictures"
    folder, g = tmp_path_factory.mktemp('dmd2'), np.random.default_rng(0)
    (folder / 'real').mkdir()
    for k in range(24):
        Image.fromarray(g.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / 'real' / f'{k:02d}.png')
    return folder

def config(place, **k):
    base = dict(
        method='dmd2', real_images=str(place / 'real'), fake_updates=3, freeze_generator_until=0,
        gan_start=8,
        device='cpu', lr_scheduler='constant',
        total_batch_size=8, max_train_images=32, sample_every=0, checkpoint_every=16, log_every=8,
        n_eval=0, checkpoints_total_limit=4)
    return Config(**base | k)

def state(folder, nimg):
    return load_checkpoint(folder / 'checkpoints' / f'{nimg:012d}')

def tensors(tree):
    if torch.is_tensor(tree):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [t for v in branches for t in tensors(v)]

def test_it_is_trained_and_goes_on_bit_for_bit(place):
    "Checkpoint, resume, log: the trainer knows the roles by the method alone"
    whole = train(config(place, out=str(place / 'whole')))
    part = train(config(place, out=str(place / 'part'), max_train_images=16))
    train(config(place, resume=str(part)))
    a, b = state(whole, 32), state(part, 32)
    assert {'fake', 'generator', 'discriminator', 'opt_discriminator', 'ema'} <= {*a}
    del a['torch'], b['torch']  # of this Python, whatever it drew before; nothing in a run draws from it
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert len(pairs) > 100 and all(torch.equal(x, y) for x, y in pairs)
    first = state(whole, 16)
    for role in ('fake', 'generator', 'discriminator'):
        assert any(not torch.equal(x, y) for x, y in zip(tensors(first[role]), tensors(a[role])))
    rows = [json.loads(line) for line in (whole / 'log.jsonl').read_text().splitlines()]
    assert [r['nimg'] for r in rows] == [8, 16, 24, 32] and {'loss', 'loss_fake', 'norm_fake', 'fisher'} <= {*rows[0]}
    assert json.loads((whole / 'config.json').read_text())['fake_updates'] == 3
    assert (whole / 'generator' / 'unet').is_dir()

def test_micro_batches_equal_whole_batches(place):
    "In the real trainer, to the rounding of float32: weights move by 1e-4 in a step, and differ by far less"
    jobs = [setup(config(place, micro_batch=m, lr=1e-6, lr_fake=1e-6)) for m in (8, 2)]
    states = [next(iterate(job)) for job in jobs]
    for k, v in states[0].logs.items():
        assert abs(states[1].logs[k] - v) <= 1e-4 * max(1.0, abs(v)), k
    norms = [[float(s.logs[k]) for k in ('norm', 'norm_fake')] for s in states]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)

def test_two_processes_are_one(place):
    "Fake and head learn from one backward in each process, their gradients are averaged: the numbers of one"
    options = '''--method dmd2 --real-images real --fake-updates 2 --freeze-generator-until 0
        --gan-start 8 --device cpu --total-batch-size 8 --micro-batch 2 --max-train-images 16 --sample-every 0
        --n-eval 0 --log-every 8'''
    words = ['-m', 'sid_lsg_nb.cli', 'distill', *options.split(), '--out']
    logs = {}
    for out, n in (('two', 2), ('one', 1)):
        started = start_ranks([*words, out], [place]*n) if n > 1 else [Forked([*words, out], place)]
        for status, _, err in finish(started): assert status == 0, err
        logs[out] = [json.loads(line) for line in (place / out / 'log.jsonl').read_text().splitlines()]
    for a, b in zip(logs['two'], logs['one'], strict=True):
        a, b = ({k: v for k, v in row.items() if k != 'img_per_s'} for row in (a, b))
        assert a == pytest.approx(b, rel=1e-4)

def test_several_updates_of_the_fake(place):
    "Each has its own prompts, pictures and noise; the log averages them; images are counted once per iteration"
    job = setup(config(place, fake_updates=3))
    seen, losses, original = [], [], job.method.losses
    def watched(update, nets, batch, draw):
        found = original(update, nets, batch, draw)
        seen.append((update.trains[0], draw.z, batch.real, batch.cond))
        losses.append(float(found[0].detach().mean()))
        return found
    object.__setattr__(job.method, 'losses', watched)
    s = next(iterate(job))
    assert [role for role, *_ in seen] == ['fake'] * 3 + ['generator'] and s.nimg == 8
    for i in range(3):
        assert not torch.equal(seen[i][1], seen[i + 1][1])
        assert any(not torch.equal(v, seen[i + 1][3][k]) for k, v in seen[i][3].items())
    assert not torch.equal(seen[0][2], seen[1][2]) and seen[3][2] is None
    assert float(s.logs['loss_fake']) == pytest.approx(sum(losses[:3]) / 3, rel=1e-5)
    assert job.stream.position == 4 * 8 and job.real.stream.position == 3 * 8

def test_real_pictures_are_asked_for(place):
    with pytest.raises(ValueError, match='--real-images FOLDER'):
        train(config(place, real_images='', out=str(place / 'no')))
    assert not (place / 'no').exists()
