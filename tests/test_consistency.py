"""Consistency along the teacher's path (`--method lcm`, `--method scm`): its step is diffusers' own, its derivative
that of differences, on networks of every kind of time; runs train, go on, and are several processes."""

import json
import shutil
from dataclasses import replace
import pytest
import torch
from diffusers import DDIMScheduler
from forks import Forked, finish, start_ranks
from safetensors.torch import load_file
from sid_lsg_nb.commands.doctor import check_up
from sid_lsg_nb.core import InputError, max_abs, rng
from sid_lsg_nb.method.guidance import Kappa, predict_guided
from sid_lsg_nb.method.methods import Recipe, make_method
from sid_lsg_nb.method.rollout import Draw, one_step
from sid_lsg_nb.method.steps import Batch, Networks
from sid_lsg_nb.method.trajectories import along_path, path_end
from sid_lsg_nb.teachers.edm import tiny_edm
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.testing import tiny_pipeline, tiny_sd3
from sid_lsg_nb.training.checkpoint import checkpoints, load_checkpoint
from sid_lsg_nb.training.config import Config, check
from sid_lsg_nb.training.job import iterate, setup
from sid_lsg_nb.training.run_folder import saved_config
from sid_lsg_nb.training.trainer import train

PROMPTS = ['a 3d fox on a white background', 'a flat rose'] * 4

@pytest.fixture(scope='module')
def bundled():
    return open_teacher('embedded')

class Alone:
    "A learner that only answers"

    def __init__(self, net):
        self.net = self.train = net

@pytest.mark.parametrize('kappa', [1.0, 1.5])
def test_the_step_is_that_of_diffusers(bundled, kappa):
    method = make_method(Recipe('lcm', kappa=Kappa.long(kappa), t_init=600, regression_steps=6))
    nets = Networks(bundled.denoiser, dict(generator=Alone(bundled.denoiser)), bundled.text.null())
    z, eps = torch.randn(2, 8, *bundled.latent_shape, generator=rng(3))
    t = torch.tensor([600, 600, 500, 400, 400, 300, 200, 100])
    batch, draw = Batch(bundled.text(PROMPTS)), Draw(z, eps, t)
    with torch.no_grad():
        answer, goal = method.pair(bundled.denoiser, nets, batch, draw)
        x_g = one_step(bundled.denoiser, z, batch.cond, 600)
    ddim = DDIMScheduler.from_config(bundled.pipe.scheduler.config, clip_sample=False, set_alpha_to_one=True)
    ddim.set_timesteps(10)  # a step of 100
    for i, time in enumerate(t.tolist()):
        cond = {k: v[i:i + 1] for k, v in batch.cond.items()}
        x = ddim.add_noise(x_g[i:i + 1], eps[i:i + 1], t[i:i + 1])
        if time == 600:
            x = z[i:i + 1] * bundled.schedule.sigma(t[:1]).float()
        with torch.no_grad():
            (y,) = predict_guided(bundled.denoiser, x, t[i:i + 1], cond, nets.null, kappa)
            out = ddim.step(bundled.schedule.from_x0(y, x, t[i:i + 1]), time, x)
            last = time == 100
            below = out.pred_original_sample if last else bundled.denoiser(out.prev_sample, t[i:i + 1] - 100, cond)
            own = bundled.denoiser(x, t[i:i + 1], cond)
        assert max_abs(goal[i:i + 1], below) < 2e-5 and max_abs(answer[i:i + 1], own) < 2e-5
    assert max_abs(goal, answer) > 0.05

def twin(kind, folder):
    "A denoiser in float64 whose times are real numbers, or a table's; a point, its change, a time, a prompt"
    teacher = {
        'flow': lambda: open_teacher(tiny_sd3(folder)), 'edm': lambda: tiny_edm(classes=4),
        'table': lambda: open_teacher(tiny_pipeline(folder))}[kind]()
    net = teacher.denoiser.double()
    x, x_dot = torch.randn(2, 2, *teacher.latent_shape, generator=rng(1), dtype=torch.float64)
    words = teacher.prompts[:2] if kind == 'edm' else ['a red cat', 'a blue dog']
    cond = {k: v.double() if v.is_floating_point() else v for k, v in teacher.text(words).items()}
    t = torch.tensor(dict(flow=[.3, .9], edm=[200., 500.], table=[100, 600])[kind])
    return net, x, x_dot, t if kind == 'table' else t.double(), cond

@pytest.mark.parametrize('kind', ['flow', 'edm', 'table'])
def test_the_derivative_is_that_of_differences(tmp_path, kind):
    net, x, x_dot, t, cond = twin(kind, tmp_path / 'twin')
    exact = kind != 'table'
    h, near = (1e-4, 5e-3) if kind == 'flow' else (1e-4, 1e-5)  # diffusers makes the waves of 1000 t in float32
    found = along_path(net, x, x_dot, t, cond, exact)
    with torch.no_grad():
        up, down = (net(x + k * x_dot, t + k if exact else t, cond) for k in (h, -h))
        still = [net(x + k * x_dot, t, cond) for k in (h, -h)]
    scale = found.abs().max()
    assert max_abs(found, (up - down) / (2 * h)) < near * scale
    if exact:  # the time's part is there
        assert max_abs(found, (still[0] - still[1]) / (2 * h)) > 2 * near * scale

def test_levels_have_their_own_slopes():
    schedule, t = tiny_edm(classes=4).denoiser.schedule, torch.tensor([10., 500., 800.]).double()
    alpha_dot, sigma_dot = schedule.slopes(t)
    assert max_abs(sigma_dot, (schedule.sigma(t + 1e-3) - schedule.sigma(t - 1e-3)) / 2e-3) < 1e-7
    assert alpha_dot.abs().max() == 0

def test_a_table_does_not_know_its_time(bundled):
    "Cosines with how the answer changes over twenty rows of the path: of the exact derivative, and of `scm`'s"
    t = torch.tensor([100, 200, 300, 400, 500, 600]).repeat_interleave(8)
    cond = bundled.text(PROMPTS * 6)
    z, eps = torch.randn(2, 48, *bundled.latent_shape, generator=rng(5))
    net, schedule = bundled.denoiser, bundled.schedule
    method = make_method(Recipe('scm', kappa=Kappa(), t_init=625))
    with torch.no_grad():
        x = schedule.add_noise(one_step(net, z, cond, 625), eps, t)
        y = net(x, t, cond)
        a, s = schedule.levels(t, x)
        split = y, (x - a * y) / s
        stretch = [net(schedule.add_noise(*split, t + k), t + k, cond) for k in (10, -10)]
        ours = y - method.goal(net, schedule, y, x, t, *split, cond)
    a_dot, s_dot = (v.float().view(-1, 1, 1, 1) for v in schedule.slopes(t))
    x_dot = a_dot * split[0] + s_dot * split[1]

    class RealTimes:  # the same network, its levels held: `to_x0` by hand
        def __call__(self, x_t, time, c):
            return (x_t - sigma(time) * net.net(x_t, time, **c, return_dict=False)[0]) / alpha(time)

    def lines(level, slope):
        "A level near a row, as a function of a real time"
        return lambda time: (level(t).float() + slope * (time - t)).view(-1, 1, 1, 1)

    alpha, sigma = (lines(f, v.flatten()) for f, v in ((schedule.alpha, a_dot), (schedule.sigma, s_dot)))
    exact = along_path(RealTimes(), x, x_dot, t.float(), cond)
    cosine = lambda v: torch.cosine_similarity(v.flatten(1), (stretch[0] - stretch[1]).flatten(1)).mean()
    print(f'cosine of the exact derivative {cosine(exact):.2f}, of the difference in time {cosine(ours):.2f}')
    assert cosine(exact) < 0.4 and cosine(ours) > cosine(exact) + 0.2

@pytest.mark.parametrize('method', ['lcm', 'scm'])
def test_the_generator_comes_nearer_to_the_ends_of_the_paths(bundled, method):
    job = setup(Config(method=method, device='cpu', max_train_images=640, kappa=1.0, t_init=625))
    assert [*job.nets.learners] == ['generator']
    z, cond, null = torch.randn(8, *bundled.latent_shape, generator=rng(9)), bundled.text(PROMPTS), bundled.text.null()
    ends = path_end(bundled.denoiser, z, cond, null, [*range(625, 0, -25)])

    def away():
        with torch.no_grad():
            return (one_step(job.ema.net, z, cond, 625) - ends).abs().mean()

    before = away()
    for _, _state in zip(range(24), iterate(job)):
        pass
    print(f'{method}: {before:.3f} to {away():.3f}')
    assert away() < 0.9 * before
    shown = job.method.show(job.nets, Batch(cond), job.method.draw(
        None, z.shape, bundled.schedule, rng(1)))
    assert {*shown} == {'x_g', 'y_real'}

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('consistency')
    tiny_pipeline(home / 'table')
    tiny_sd3(home / 'flow')
    (home / 'p.txt').write_text('a red cat\na blue dog\na green apple\n')
    return home

def config_of(home, teacher, **more):
    own = dict(
        teacher=str(home / teacher), prompts=str(home / 'p.txt'), device='cpu', total_batch_size=4, max_train_images=12,
        checkpoint_every=4, checkpoints_total_limit=9, lr=1e-3, sample_every=0, log_every=4, teacher_steps=2, n_eval=0,
        regression_steps=4, kappa=1.5)
    return Config(**own | more)

@pytest.mark.parametrize('method', ['lcm', 'scm'])
@pytest.mark.parametrize('teacher', ['table', 'flow'])
def test_a_run_goes_on(home, method, teacher):
    whole, broken = home / f'{method}-{teacher}', home / f'{method}-{teacher}-broken'
    train(config_of(home, teacher, method=method, student_steps=2, out=str(whole)))
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / 'generator')
    for n in (8, 12):
        shutil.rmtree(broken / f'checkpoints/{n:012d}')
    train(replace(saved_config(broken), out='', resume=str(broken)))
    a, b = (load_checkpoint(checkpoints(f / 'checkpoints')[0]) for f in (whole, broken))
    assert a['roles'] == ['generator'] and a['nimg'] == b['nimg'] == 12
    assert all(torch.equal(v, b['generator'][k]) for k, v in a['generator'].items())

@pytest.mark.parametrize('method', ['lcm', 'scm'])
def test_two_processes_are_one(home, method):
    "Copies of a table's network, slices of a flow's"
    for teacher, more in (('table', []), ('flow', ['--fsdp'])):
        words = (
            f'-m sid_lsg_nb.cli distill --teacher {teacher} --prompts p.txt --method {method} --kappa 1.5 '
                '--regression-steps 4 --micro-batch 2 --total-batch-size 8 --max-train-images 24 --log-every 8 '
                '--sample-every 0 --lr 1e-3 --checkpoint-every 0 --n-eval 0 --device cpu --out').split()
        ranks = [
            Forked([*words, f'one-{method}-{teacher}'], home),
            *start_ranks([*words, f'two-{method}-{teacher}', *more], [home] * 2)]
        for status, _out, err in finish(ranks):
            assert status == 0, err[-3000:]
        one, two = ([
            json.loads(line) for line in (home / f'{n}-{method}-{teacher}/log.jsonl').read_text().splitlines()]
            for n in ('one', 'two'))
        assert len(one) == len(two) == 3
        for a, b in zip(one, two):
            assert all(a[k] == pytest.approx(b[k], rel=2e-2) for k in ('loss', 'norm')), (teacher, a, b)

def test_a_lora_learns_it(home):
    train(config_of(home, 'table', method='scm', lora='both', lora_rank=4, out=str(home / 'lora')))
    rows = [json.loads(line) for line in (home / 'lora/log.jsonl').read_text().splitlines()]
    assert all(r['dropped'] == r['skipped'] == 0 for r in rows)
    new, old = (load_file(home / f / 'unet/diffusion_pytorch_model.safetensors') for f in ('lora/generator', 'table'))
    changed = [k for k in old if max_abs(new[k], old[k]) > 1e-5]
    assert changed and all('attn' in k or 'ff' in k or 'proj' in k or 'conv' in k for k in changed)

def test_what_does_not_go_together(home):
    with pytest.raises(InputError, match='forward mode'):
        check(config_of(home, 'table', method='scm', compile=True))
    check(config_of(home, 'table', method='lcm', compile=True))
    with pytest.raises(InputError, match='no fake to look at'):
        check_up(setup(config_of(home, 'table', method='lcm')))
