"""Writes sid_lsg_nb/conformance/*.json: inputs, losses and exact gradients of the published losses, for any code base.

    python nbs/recipes/conformance_kit.py

numpy alone. Values come from formulas written out below, not from the package's losses: those are tested against the files.
Networks are exact denoisers of Gaussians, y = offset + slope*x_t, so that every derivative can be written down.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
import numpy as np

FOLDER = Path(__file__).parents[2] / 'sid_lsg_nb' / 'conformance'
WORLDS = {  # data N(mu1, s1^2), generator mu2 + s2 z, levels a and s
    'A': dict(mu1=1.0, s1=0.5, mu2=0.0, s2=1.0, a=1.0, s=1.0),
    'B': dict(mu1=1.0, s1=1.0, mu2=0.0, s2=0.1, a=1.0, s=0.5),
    'C': dict(mu1=0.7, s1=0.9, mu2=-0.3, s2=0.5, a=0.8, s=0.6),
}


@dataclass
class Points:
    "Noised samples and their denoisers; all arrays broadcast to x, whose first axis counts samples"

    x: np.ndarray  # the generator's samples
    eps: np.ndarray
    a: np.ndarray  # levels
    s: np.ndarray
    real: tuple  # offset and slope of the teacher
    fake: tuple
    fake3: tuple  # of the fake inside the residual

    def answer(self, net):
        return net[0] + net[1] * (self.a * self.x + self.s * self.eps)


def total(x):  # [B, ...] -> [B, 1, ...]
    return x.sum(tuple(range(1, x.ndim)), keepdims=True)


def denoiser(mu, std, a, s):  # of N(mu, std^2)
    slope = a * std**2 / (a**2 * std**2 + s**2)
    return mu * (1 - a * slope), slope


# ---- one formula for all: L = omega (A r + beta delta^2), with A = delta, or delta over a norm


@dataclass
class Loss:
    "A published loss; the fields below the line make the mistakes"

    beta: float = 0.0  # of SiD: 1 - alpha
    c: float | None = None  # of SIM's pseudo-Huber distance; None: no norm
    scale: float = 1.0  # 2 for SIM with the squared distance
    score: bool = False  # is SIM's distance measured between scores?
    weighted: bool = False  # by 1/mean|x_g - y_real|
    teacher: float = 1.0  # is there a path through x_t in the teacher? (0 or 1)
    fake: float = 1.0
    delta: float = 1.0  # ... in both networks inside delta
    residual: float = 1.0  # ... in the fake inside r
    norm: float = 1.0  # ... through SIM's norm
    weight_path: float = 0.0  # ... through the weight
    norm_over: str = 'sample'  # or element, batch
    weight_over: str = 'sample'  # or batch


def over(how, x, mean=False):
    "The sum of x over a sample, or one of the wrong things"
    if how == 'element':
        return x
    if how == 'batch':
        return np.full_like(x, x.mean() if mean else x.sum())
    return total(x) / (x[0].size if mean else 1)


def parts(p, loss):
    "What value and gradient are made of: delta, r, unit, norm, weight"
    y_real, y_fake, y_fake3 = (p.answer(net) for net in (p.real, p.fake, p.fake3))
    delta, r = y_real - y_fake, y_fake3 - p.x
    unit = p.a / p.s**2 if loss.score else np.ones_like(p.a)
    norm = np.ones_like(p.x) if loss.c is None else np.sqrt(over(loss.norm_over, (unit * delta) ** 2) + loss.c**2)
    weight = 1 / over(loss.weight_over, np.abs(p.x - y_real), mean=True) if loss.weighted else np.ones_like(p.x)
    return delta, r, unit, norm, weight


def value(p, loss):  # [B]
    delta, r, unit, norm, weight = parts(p, loss)
    each = loss.scale * unit**2 * delta * r / norm + loss.beta * delta**2
    return total(weight * each).reshape(len(p.x))


def gradient(p, loss):  # of the sum over samples, at x: as x
    delta, r, unit, norm, weight = parts(p, loss)
    slopes = loss.teacher * p.real[1] - loss.fake * p.fake[1]
    to_delta = loss.delta * p.a * slopes  # d delta/dx, at each element
    to_r = loss.residual * loss.fake * p.a * p.fake3[1] - 1
    k = loss.scale * unit**2
    grad = k * (to_delta * r + delta * to_r) / norm + 2 * loss.beta * delta * to_delta
    if loss.c is not None:
        inner = over(loss.norm_over, k * delta * r / norm**3)
        grad = grad - loss.norm * unit**2 * delta * to_delta * inner
    grad = weight * grad
    if loss.weight_path:
        unweighted = total(k * delta * r / norm + loss.beta * delta**2)
        away = np.sign(p.x - p.answer(p.real)) * (1 - loss.teacher * p.a * p.real[1]) / p.x[0].size
        grad = grad - loss.weight_path * weight**2 * away * unweighted
    return grad


# ---- which losses, and which mistakes

NO_PATH = dict(teacher=0.0, fake=0.0)
OF_PATHS = {
    'the teacher is asked without a graph': dict(teacher=0.0),
    'the fake is asked without a graph': dict(fake=0.0),
    'both networks are asked without a graph': NO_PATH,
    'x_t is detached inside delta': dict(delta=0.0),
}
OF_NORM = {
    'the norm of the distance is detached': dict(norm=0.0),
    'the norm is taken element by element': dict(norm_over='element'),
    'the norm is taken over the batch': dict(norm_over='batch'),
}
OF_WEIGHT = {
    'the weight carries gradient': dict(weight_path=1.0),
    'the weight is one number for the batch': dict(weight_over='batch'),
}
SID = 'omega [delta^T (y_fake - x_g) + (1 - alpha) ||delta||^2], delta = y_real - y_fake; gradient through both networks'
SIM = "-d'(y)^T (unit y_fake - unit x_g), y = unit (y_fake - y_real); gradient through both networks, and inside d'"
DI = '(y_fake - y_real)^T x_g, through the bare x_g alone'


def sid(alpha, weighted=False):
    name = f'sid alpha={alpha:g}' + (' weight=l1' if weighted else '')
    options = dict(alpha=alpha, weight='l1' if weighted else 'none')
    wrong = OF_PATHS | (OF_WEIGHT if weighted else {})
    return name, 'sid', options, SID, '2404.04057', Loss(beta=1 - alpha, weighted=weighted), wrong


def sim(distance, c=None, score=False):
    name = f'sim {distance}' + (f' c={c:g}' if c else '') + (' score' if score else '')
    options = dict(distance=distance, space='score' if score else 'x0') | (dict(c=c) if c else {})
    wrong = OF_PATHS | (OF_NORM if c else {})
    loss = Loss(c=c, scale=1.0 if c else 2.0, score=score)
    return name, 'sim', options, SIM, '2410.16794', loss, wrong


FISHER = ('fisher', 'fisher', {}, 'half the slope of E||y_real - y_fake||^2, the fake following the generator',
          '2404.04057', Loss(beta=0.5), OF_PATHS)
WITH_PATH = {'gradient flows through the networks': dict(teacher=1.0, fake=1.0)}
DIFF_INSTRUCT = ('di', 'di', {}, DI, '2305.18455', Loss(**NO_PATH), WITH_PATH)
DMD = ('dmd', 'dmd', dict(weight='l1'), f'{DI}; divided by mean |x_g - y_real| of the sample', '2311.18828',
       Loss(**NO_PATH, weighted=True), WITH_PATH | OF_WEIGHT)
LISTED = [sid(0.0), sid(0.5), sid(1.0), sid(1.2), FISHER, sim('squared'), sim('huber', 1.0), sim('huber', 3.0, True),
          DIFF_INSTRUCT]

# ---- pictures: three samples of three channels of 3 x 3, each at its own level; a gradient at every element


def pictures():
    g = np.random.default_rng(0)
    x, eps = (np.round(g.normal(size=(3, 3, 3, 3)), 3) for _ in range(2))
    a, s = (np.array(v).reshape(3, 1, 1, 1) for v in ([0.8, 1.0, 0.3], [0.6, 2.5, 0.7]))  # VP, EDM, flow
    nets = [denoiser(mu, std, a, s) for mu, std in ((0.7, 0.9), (-0.3, 0.5), (-0.1, 0.6))]
    return Points(x, eps, a, s, nets[0], nets[1], nets[1]), nets[2]


def entry(listed, p, signs=True):
    name, loss, options, equation, paper, right, wrong = listed
    found = gradient(p, right)
    mistakes = {why: gradient(p, replace(right, **changes)) for why, changes in wrong.items()}
    if signs:
        mistakes['the sign is turned'] = -found
    told = loss not in ('di', 'dmd')  # of these the papers define the gradient alone
    return dict(
        name=name, loss=loss, options=options, equation=equation, paper=paper, value=value(p, right) if told else None,
        gradient=found, mistakes={k: v for k, v in mistakes.items() if not np.allclose(v, found)})


def fake_entry(p):
    "The fake's denoising loss: its gradient at the fake's own answer"
    snr, error = (p.a / p.s) ** 2, p.answer(p.fake) - p.x
    across = 2 * snr.reshape(3) * error  # [3] beside [3, 3, 3, 3]: numpy and torch spread it over the last axis
    mistakes = {
        'the SNR is spread over the last axis, not the samples': across,
        'the SNR is that of the other way round': 2 * error / snr,
        'the weight is left out': 2 * error,
        'the sign is turned': -2 * snr * error,
    }
    equation = 'SNR ||y_fake - x_g||^2, SNR = (alpha_t/sigma_t)^2; the gradient is that at y_fake'
    return dict(
        name='fake weight=snr', loss='fake', options=dict(weight='snr'), equation=equation, paper='2406.01561',
        value=total(snr * error**2).reshape(3), gradient=2 * snr * error, mistakes=mistakes)


def two_scales(p, other):
    "SiD with two guidance scales: the residual reads another answer of the fake"
    name, *rest = sid(1.0)
    made = entry((name + ' y_fake3', *rest), replace(p, fake3=other))
    made['options'] = made['options'] | dict(y_fake3=True)
    made['equation'] = made['equation'].replace('(y_fake -', '(y_fake3 -')
    made['mistakes']['y_fake stands in the residual, too'] = gradient(p, rest[4])
    return made


def file_of_pictures():
    p, other = pictures()
    inputs = dict(x_g=p.x, eps=p.eps, alpha_t=p.a.reshape(3), sigma_t=p.s.reshape(3))
    for name, net in dict(real=p.real, fake=p.fake, fake3=other).items():
        inputs |= {f'{name}_offset': net[0].reshape(3), f'{name}_slope': net[1].reshape(3)}
    rows = [entry(row, p) for row in [*LISTED, sid(1.0, True), sid(1.2, True), DMD]]
    about = ('x_t = alpha_t x_g + sigma_t eps and y = offset + slope x_t, numbers per sample. value: the loss of each '
             'sample; gradient: of their sum at x_g, with the paths that the equation names')
    return dict(format=1, about=about, inputs=inputs, cases=[*rows, two_scales(p, other), fake_entry(p)])


# ---- Gaussians: expectations over start noise and noise, and their slopes in the generator's mean and width

NODES = np.arange(-8, 8.25, 0.5)
WEIGHTS = np.exp(-(NODES**2) / 2) / np.exp(-(NODES**2) / 2).sum()


def variances(w):
    "Of the noised data and of the noised generator"
    return [w['a'] ** 2 * w[name] ** 2 + w['s'] ** 2 for name in ('s1', 's2')]


def closed(w, listed):
    "Value, d/dmu2 and d/ds2 by formula; None where there is no value"
    _, name, options, *_, loss, _ = listed
    (v1, v2), a, s, s2, gap = variances(w), w['a'], w['s'], w['s2'], w['mu1'] - w['mu2']
    d, x0 = v1 - v2, s**4 / a**2  # from scores to denoisers
    divergence = x0 * (d**2 / (v1**2 * v2) + a**2 * gap**2 / v1**2)
    if name == 'fisher':  # half the slope of the divergence itself
        return divergence / 2, -x0 * a**2 * gap / v1**2, -x0 * a**2 * s2 * d * (v1 + v2) / (v1**2 * v2**2)
    if name == 'di':  # the slope of the KL divergence, times sigma^2/alpha^2
        return None, -(s**2) * gap / v1, -(s**2) * s2 * d / (v1 * v2)
    if loss.c is not None:
        return (0.0, *sim_slopes(w, loss, v1, v2, gap))
    alpha, k = options.get('alpha', 1.0), loss.scale * s**4 / (v1**2 * v2)
    to_mu, to_s = -gap * (v1 - 2 * (1 - alpha) * d), -2 * s2 * d / v2 * (alpha * v1 + (1 - alpha) * v2)
    return (1 - alpha) * divergence, k * to_mu, k * to_s


def sim_slopes(w, loss, v1, v2, gap):
    "SIM's slopes: a one-dimensional integral over u = x_t - alpha_t mu2 ~ N(0, v2)"
    q = np.linspace(-9, 9, 20_001)
    p, u = np.exp(-(q**2) / 2), q * v2**0.5
    unit = 1.0 if loss.score else w['s'] ** 2 / w['a']
    y = -unit * (u * (1 / v2 - 1 / v1) + w['a'] * gap / v1)
    slope = unit * y / np.sqrt(y**2 + loss.c**2) * p / p.sum()
    return w['a'] / v2 * slope.sum(), 2 * w['a'] ** 2 * w['s2'] / v2**2 * (u * slope).sum()


def expectation(each, z, weights):  # of gradients at x_g
    return np.array([(weights * each).sum(), (weights * z * each).sum()])


def gaussian_entry(name, w, listed):
    "One row: the formula's values, held against a sum over 33 x 33 nodes; mistakes by that sum"
    z, eps = (v.reshape(-1, 1) for v in np.meshgrid(NODES, NODES, indexing='ij'))
    weights = np.outer(WEIGHTS, WEIGHTS).reshape(-1, 1)
    a, s = np.array([[w['a']]]), np.array([[w['s']]])
    nets = denoiser(w['mu1'], w['s1'], a, s), denoiser(w['mu2'], w['s2'], a, s)
    p = Points(w['mu2'] + w['s2'] * z, eps, a, s, *nets, nets[1])
    row = entry(listed, p)
    mean, *slopes = closed(w, listed)
    sums = expectation(row['gradient'], z, weights)
    assert np.allclose(sums, slopes, rtol=0, atol=1e-9), (name, row['name'], sums, slopes)
    assert mean is None or abs((weights[:, 0] * row['value']).sum() - mean) < 1e-9, (name, row['name'])
    mistakes = {why: expectation(each, z, weights) for why, each in row['mistakes'].items()}
    one_number = 'the norm is taken over the batch'  # a batch is no part of an expectation
    mistakes = {k: v for k, v in mistakes.items() if k != one_number and not np.allclose(v, slopes, atol=1e-6)}
    return row | dict(name=f'{name} {row["name"]}', world=name, value=mean, gradient=slopes, mistakes=mistakes)


def file_of_gaussians():
    p = {name: w for name, w in WORLDS.items()}
    worlds = {name: dict(mu2=w['mu2'], s2=w['s2'], alpha_t=w['a'], sigma_t=w['s']) for name, w in p.items()}
    for name, w in p.items():
        for role, net in dict(real=denoiser(w['mu1'], w['s1'], w['a'], w['s']),
                              fake=denoiser(w['mu2'], w['s2'], w['a'], w['s'])).items():
            worlds[name] |= {f'{role}_offset': net[0], f'{role}_slope': net[1]}
    about = ('Data and generator are Gaussians of one dimension: x_g = mu2 + s2 z, x_t = alpha_t x_g + sigma_t eps, '
             'y = offset + slope x_t. value: the expected loss over z and eps; gradient: its slopes in mu2 and s2, the '
             'networks held fixed. z and eps run over all pairs of nodes; the weight of a pair is the product of its two')
    rows = [gaussian_entry(name, w, listed) for name, w in p.items() for listed in LISTED]
    return dict(format=1, about=about, nodes=NODES, weights=WEIGHTS, worlds=worlds, cases=rows)


# ---- files


def plain(x):
    "Arrays to lists, floats to twelve digits"
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, np.ndarray):
        return plain(x.tolist())
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    return float(f'{x:.12g}') if isinstance(x, float) else x


def made():
    "The files by name"
    return {'pictures.json': plain(file_of_pictures()), 'gaussians.json': plain(file_of_gaussians())}


if __name__ == '__main__':
    FOLDER.mkdir(exist_ok=True)
    for name, content in made().items():
        cases = content.pop('cases')
        head, rows = json.dumps(content), ',\n'.join(json.dumps(case) for case in cases)
        (FOLDER / name).write_text(f'{head[:-1]}, "cases": [\n{rows}\n]}}\n', encoding='utf-8')
        print(f'{name}: {len(cases)} cases, {(FOLDER / name).stat().st_size / 1000:.0f} kB')
