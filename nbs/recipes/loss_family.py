"""The comparison that the story of the loss family shows.

    python nbs/recipes/loss_family.py          # both parts
    python nbs/recipes/loss_family.py edge     # one of them: board or edge

board: every member at every learning rate from every seed on five bells in the plane, many runs at once as one stack of small
networks. edge: at the one learning rate where members part, forty fresh seeds, with one member more. Writes curves, samples,
machine, date and minutes to nbs/images/loss_family.json. Nothing is typed in by hand.
"""

import json, sys, time
from datetime import date
from pathlib import Path
import torch
from embedded_run import machine
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from sid_lsg_nb.core import rng
from sid_lsg_nb.method.gaussians import GaussianMixture
from sid_lsg_nb.method.losses import Estimates, fake_loss
from sid_lsg_nb.method.methods import Recipe, make_method
from sid_lsg_nb.method.schedule import DiscreteSchedule

IMAGES = Path(__file__).parent.parent / 'images'
MEMBERS = {
    'SiD 0.5': Recipe(alpha=0.5),
    'SiD 1': Recipe(),
    'SiD 1.2': Recipe(alpha=1.2),
    'SiD 1, no weight': Recipe(loss_weight='none'),
    'DI': Recipe(method='di'),
    'SIM, c0 = 0.03': Recipe(method='sim', distance='huber:0.03', loss_weight='none'),
    'SIM, c0 = 0.3': Recipe(method='sim', distance='huber:0.3', loss_weight='none'),
}
EDGE_MEMBERS, EDGE_LR, EDGE_SEEDS = (
    MEMBERS | {'SIM, c0 = 0.3, weighted': Recipe(method='sim', distance='huber:0.3')},
    1e-2,
    range(10, 50),
)
LRS, SEEDS, ITERS, BATCH = [3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 1.7e-2, 3e-2], 10, 2000, 128
betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
schedule = DiscreteSchedule(torch.cumprod(1 - betas, 0))  # Stable Diffusion's levels
angles = torch.arange(5) * 2 * torch.pi / 5 + 0.3
world = GaussianMixture(
    torch.tensor([1.0, 1, 1, 1, 2]),
    1.3 * torch.stack([angles.cos(), angles.sin()], 1),
    torch.tensor([0.15, 0.25, 0.15, 0.25, 0.3]),
)

class Points(nn.Module):
    """A small denoiser of points: x_t and its levels in, x0 out; the skip leaves to the network what noise has
    destroyed"""

    def __init__(self, width=64):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x_t, a, s):  # [B,2], [B,1], [B,1]
        r = (s / a).log()
        place, level = (
            [x_t, *(f(k * x_t) for k in (2, 4) for f in (torch.sin, torch.cos))],
            [r, *(f(k * r) for k in (1, 2) for f in (torch.sin, torch.cos)), s],
        )
        return a * x_t + s * self.net(torch.cat([*place, *level], -1))


blank = Points()

def ask(params, x_t, a, s):  # parameters stacked to [R, ...]; [R,B,2], [R,B,1], [R,B,1] -> [R,B,2]
    "R networks at once, each on its own points"
    return vmap(lambda p, *args: functional_call(blank, p, args))(params, x_t, a, s)

def adam(params, grads, state, k, lr):  # lr: a number, or [R] one per run; k counts from 1
    "One step of Adam(0, .999), eps 1e-8, with a learning rate for every run"
    with torch.no_grad():
        for name, g in zip(params, grads):
            v = state.setdefault(name, torch.zeros_like(g))
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            step = g / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
            params[name] -= step * (lr if isinstance(lr, float) else lr.view(-1, *[1] * (g.ndim - 1)))

def draw(rngs, B):  # one generator per seed -> z, eps [S,B,2], a, s [S,B,1]
    z, eps = (torch.stack([torch.randn(B, 2, generator=g) for g in rngs]) for _ in range(2))
    t = torch.stack([schedule.sample_time(B, generator=g) for g in rngs])
    return z, eps, schedule.alpha(t).float()[..., None], schedule.sigma(t).float()[..., None]

def starts(
    seeds, steps=1500, B=256
):  # parameters [S, ...] of networks fitted to the exact teacher; the mean square misfit in units of sigma_t
    nets = []
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(Points())
    params, state, rngs = stack_module_state(nets)[0], {}, [rng(100 + seed) for seed in seeds]
    for k in range(1, steps + 1):
        _, eps, a, s = draw(rngs, B)
        x_t = a * torch.stack([world.sample(B, g)[0] for g in rngs]) + s * eps
        y = world.denoise(x_t.flatten(0, 1), a.flatten(0, 1), s.flatten(0, 1)).view_as(x_t)
        misfit = (((ask(params, x_t, a, s) - y) / s) ** 2).mean((1, 2))
        grads = torch.autograd.grad(misfit.sum(), list(params.values()))
        adam(params, grads, state, k, 2e-3 * (1 - 0.99 * k / steps))
    return params, misfit.detach()


t_init = torch.tensor([schedule.sigma_to_t(2.5)])
a0, s0 = schedule.alpha(t_init).float().view(1, 1, 1), schedule.sigma(t_init).float().view(1, 1, 1)

def make(params, z):  # [R,B,2] start noise -> points of R generators
    return ask(params, s0 * z, a0.expand(*z.shape[:2], 1), s0.expand(*z.shape[:2], 1))

def losses(recipes, x_g, x_t, a, s, fake):  # all [R,B,.]; runs in blocks, one block per recipe -> [R,B]
    "What each recipe says about its own runs; kappa = 1"
    y_real = world.denoise(x_t.flatten(0, 1), a.flatten(0, 1), s.flatten(0, 1)).view_as(x_t)
    y_fake = ask(fake, x_t, a, s)
    out = []
    for recipe, *block in zip(recipes, *(v.chunk(len(recipes)) for v in (x_g, y_real, y_fake, a, s))):
        x, real, fk, al, sg = (v.flatten(0, 1) for v in block)
        (term,) = make_method(recipe).terms
        out.append(term(Estimates(x, real, fk, fk, al[:, 0], sg[:, 0])).view(len(block[0]), -1))
    return torch.cat(out)

def train(
    recipes, lrs, seeds, iters, B=BATCH, halflife=50, look=100
):  # yields (iteration, averaged parameters [R, ...]), R = recipes x lrs x seeds
    "Fake step, generator step, average; every run of one seed sees the same random numbers"
    runs = (len(recipes), len(lrs), len(seeds))
    R, lr = runs[0] * runs[1] * runs[2], torch.tensor(lrs).view(1, -1, 1).expand(runs).reshape(-1)
    spread = lambda v: v.expand(*runs[:2], *v.shape).flatten(0, 2)  # [S, ...] -> [R, ...]
    start, _ = starts(seeds)
    copies = lambda: {k: spread(p.detach()).clone().requires_grad_() for k, p in start.items()}
    fake, gen, avg, memory, rngs = copies(), copies(), copies(), ({}, {}), [rng(seed) for seed in seeds]
    fixed = lambda params: {k: p.detach() for k, p in params.items()}
    for k in range(iters + 1):
        if k % look == 0:
            yield k, fixed(avg)
        z, eps, a, s = map(spread, draw(rngs, B))
        with torch.no_grad():
            x_g = make(gen, z)
        loss = (
            fake_loss(
                ask(fake, a * x_g + s * eps, a, s).flatten(0, 1), x_g.flatten(0, 1), ((a / s) ** 2).flatten()
            )
            .view(R, B)
            .mean(1)
        )
        adam(fake, torch.autograd.grad(loss.sum(), list(fake.values())), memory[0], k + 1, lr)
        z, eps, a, s = map(spread, draw(rngs, B))
        x_g = make(gen, z)
        loss = losses(recipes, x_g, a * x_g + s * eps, a, s, fixed(fake)).mean(1)
        adam(gen, torch.autograd.grad(loss.sum(), list(gen.values())), memory[1], k + 1, lr)
        with torch.no_grad():
            for name, p in avg.items():
                p.lerp_(gen[name], 1 - 0.5 ** (1 / halflife))
        if k == iters:
            return

def exact_quantiles(n, directions):  # [A,2] -> [A,n]
    """Where the i-th of n points of the world should lie along each direction: the exact distribution of a projection is a
    mixture of normals"""
    x = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    m, s = (directions @ world.means.T).double(), world.stds.double()
    F = (world.weights.double() * torch.special.ndtr((x[None, :, None] - m[:, None]) / s)).sum(-1)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    k = torch.searchsorted(F, u.expand(len(F), n).contiguous()).clamp(1, len(x) - 1)
    lo, hi = F.gather(1, k - 1), F.gather(1, k)
    return (x[k - 1] + (x[1] - x[0]) * (u - lo) / (hi - lo).clamp(min=1e-300)).float()

def sliced(points, turns=24):  # [R,n,2] -> [R]
    """Sliced 2-Wasserstein distance to the exact world: root mean square of the distances between sorted points
    and exact quantiles, over directions"""
    phi = torch.arange(turns) * torch.pi / turns
    directions = torch.stack([phi.cos(), phi.sin()], 1)
    q = exact_quantiles(points.shape[1], directions)
    return torch.stack([(((p @ directions.T).T.sort(1).values - q) ** 2).mean().sqrt() for p in points])

def bells(points):  # [R,n,2] -> [R,5]
    "Share of the points that lie nearest to each bell, in units of the bell's width"
    d = ((points[:, :, None] - world.means) ** 2).sum(-1) / world.stds**2
    return torch.stack([torch.bincount(k, minlength=5) / len(k) for k in d.argmin(-1)])

def histogram(points, cells=36, bound=2.4):  # [n,2] -> counts [cells][cells], first index y from above
    "Counts for a picture; points outside are left out"
    i = ((points + bound) / (2 * bound) * cells).floor()
    inside = ((i >= 0) & (i < cells)).all(1)
    x, y = i[inside].long().T
    return torch.bincount((cells - 1 - y) * cells + x, minlength=cells**2).view(cells, cells).tolist()

def whole(v):
    return (
        [whole(w) for w in v] if isinstance(v, list) else round(v, 4) if v < 1e6 else 1e6
    )  # nan and inf become 1e6 as well

def group(members, lrs, seeds, n, tick):  # -> curves [M,K,S,T], end points [M,K,S,n,2], looks
    "All members and learning rates from a few seeds: few enough to stay in the processor's cache"
    recipes, curves, looks, z = list(members.values()), [], [], torch.randn(1, n, 2, generator=rng(9))
    shape = (len(recipes), len(lrs), len(seeds))
    for k, params in train(recipes, lrs, seeds, ITERS):
        with torch.no_grad():
            points = make(params, z.expand(shape[0] * shape[1] * shape[2], -1, -1))
        looks.append(k)
        curves.append(sliced(points).view(shape))
    print('seeds', *seeds, f'{time.time() - tick:.0f} s', flush=True)
    return torch.stack(curves, -1), points.view(*shape, n, 2), looks

def board(n, tick, pictures=(1e-3, 1e-2, 3e-2), at_once=2):  # -> what the file holds at its top level
    "Every member at every learning rate from every seed, with shares of the bells and pictures"
    curves, points, looks = zip(
        *(group(MEMBERS, LRS, range(i, min(i + at_once, SEEDS)), n, tick) for i in range(0, SEEDS, at_once))
    )
    curves, points = torch.cat(curves, 2), torch.cat(points, 2)
    shares = bells(points.nan_to_num(99.0).flatten(0, 2)).view(*points.shape[:3], 5)
    floor = sliced(torch.stack([world.sample(n, rng(50 + i))[0] for i in range(20)]))
    drawn = {
        name: {f'{lr:g}': histogram(points[m, LRS.index(lr), 0]) for lr in pictures}
        for m, name in enumerate(MEMBERS)
    }
    return dict(
        members=list(MEMBERS),
        lrs=LRS,
        seeds=SEEDS,
        iters=ITERS,
        batch=BATCH,
        n=n,
        looks=looks[0],
        curves=whole(curves.tolist()),
        floor=whole(floor.tolist()),
        shares=whole(shares.tolist()),
        drawn=drawn,
        world=histogram(world.sample(n, rng(60))[0]),
    )

def edge(n, tick, at_once=10):  # -> what the file holds under 'edge'
    "One learning rate, one member more, forty fresh seeds"
    curves = torch.cat(
        [
            group(EDGE_MEMBERS, [EDGE_LR], EDGE_SEEDS[i : i + at_once], n, tick)[0]
            for i in range(0, len(EDGE_SEEDS), at_once)
        ],
        2,
    )[:, 0]
    return dict(
        members=list(EDGE_MEMBERS),
        lr=EDGE_LR,
        seeds=[EDGE_SEEDS[0], EDGE_SEEDS[-1]],
        curves=whole(curves.tolist()),
    )

def main(parts, n=4000):
    "Train, score at every look, write; a part that is not asked for stays as the file has it"
    torch.set_num_threads(1)
    path = IMAGES / 'loss_family.json'
    result = json.loads(path.read_text()) if path.exists() else {}
    for part in parts:
        tick = time.time()
        found = dict(board=board, edge=edge)[part](n, tick)
        found = (
            dict(
                machine=machine(), date=date.today().isoformat(), minutes=round((time.time() - tick) / 60, 1)
            )
            | found
        )
        result = (
            found | {k: v for k, v in result.items() if k == 'edge'}
            if part == 'board'
            else result | dict(edge=found)
        )
    IMAGES.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, separators=(',', ':')) + '\n')


if __name__ == '__main__':
    main(sys.argv[1:] or ['board', 'edge'])
