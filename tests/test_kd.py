"""Trajectory regression (`--method kd`): the teacher's path is diffusers' own; a run without a fake trains, goes on and
is gone on from."""

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace
import pytest
import torch
from diffusers import DDIMScheduler
from sid_lsg_nb.commands.doctor import check_up
from sid_lsg_nb.core import InputError, max_abs, rng
from sid_lsg_nb.method.guidance import predict_guided
from sid_lsg_nb.method.methods import Recipe, make_method
from sid_lsg_nb.method.rollout import Draw
from sid_lsg_nb.method.steps import Batch, Networks
from sid_lsg_nb.method.trajectories import path_end
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.testing import tiny_pipeline, tiny_sd3
from sid_lsg_nb.training.checkpoint import checkpoints, load_checkpoint
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.job import iterate, setup
from sid_lsg_nb.training.run_folder import saved_config
from sid_lsg_nb.training.trainer import train

@pytest.fixture(scope='module')
def bundled():
    return open_teacher('embedded')

@pytest.mark.parametrize('kappa', [1.0, 1.5])
def test_the_path_is_that_of_diffusers(bundled, kappa):
    ddim = DDIMScheduler.from_config(bundled.pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(10)  # a step of 100
    z, times = torch.randn(2, *bundled.latent_shape, generator=rng(3)), [600, 500, 400, 300]
    cond, null = bundled.text(['a 3d fox on a white background', 'a flat rose']), bundled.text.null()
    x = z * bundled.schedule.sigma(torch.tensor([600]))
    for time in times:
        t = torch.full((2,), time)
        with torch.no_grad():
            (y,) = predict_guided(bundled.denoiser, x, t, cond, null, kappa)
        out = ddim.step(bundled.schedule.from_x0(y, x, t), time, x)
        x = out.prev_sample
    found = path_end(bundled.denoiser, z, cond, null, times, kappa)
    assert max_abs(found, out.pred_original_sample) < 1e-5 < 0.1 < max_abs(found, z)
    unguided = path_end(bundled.denoiser, z, cond, null, times, kappa, t_max=0)
    assert max_abs(unguided, path_end(bundled.denoiser, z, cond, null, times)) < 1e-5

def test_a_row_that_is_not_finite_stays_alone(bundled):
    z = torch.randn(2, *bundled.latent_shape, generator=rng(3))

    class Broken(type(bundled.denoiser)):
        def forward(self, x_t, t, cond):
            return super().forward(x_t, t, cond) * torch.tensor([1, math.nan]).repeat(len(t) // 2)[:, None, None, None]

    generator = bundled.denoiser.copy()
    nets = Networks(
        Broken(bundled.denoiser.net, bundled.schedule),
        dict(generator=SimpleNamespace(net=generator, train=generator)), bundled.text.null())
    method = make_method(Recipe('kd', t_init=600, regression_steps=2))
    batch = Batch(bundled.text(['a flat rose'] * 2))
    losses, _ = method.losses(None, nets, batch, Draw(z, z, torch.full((2,), 600)))
    assert losses.isfinite().tolist() == [True, False]
    losses[0].backward()
    assert all(p.grad.isfinite().all() for p in generator.parameters() if p.grad is not None)

def test_the_generator_comes_nearer_to_the_ends_of_the_paths(bundled):
    job = setup(Config(method='kd', device='cpu', regression_steps=4, max_train_images=160, kappa=1.0))
    assert [*job.nets.learners] == ['generator']
    losses = [float(s.logs['loss']) for _, s in zip(range(10), iterate(job))]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    shown = job.method.show(job.nets, Batch(bundled.text(['a flat rose'])), job.method.draw(
        None, (1, *bundled.latent_shape), bundled.schedule, rng(1)))
    assert {*shown} == {'x_g', 'y_real'}

def test_a_run_goes_on_and_is_gone_on_from(tmp_path):
    tiny_pipeline(tmp_path / 'teacher')
    (tmp_path / 'p.txt').write_text('a red cat\na blue dog\na green apple\n')
    config = Config(
        teacher=str(tmp_path / 'teacher'), prompts=str(tmp_path / 'p.txt'), method='kd', regression_steps=2,
        out=str(tmp_path / 'kd'), device='cpu', total_batch_size=4, max_train_images=12, checkpoint_every=4,
        checkpoints_total_limit=9, lr=1e-3, sample_every=4, log_every=4, teacher_steps=2)
    train(config)
    whole = load_checkpoint(checkpoints(tmp_path / 'kd/checkpoints')[0])
    broken = tmp_path / 'broken'
    shutil.copytree(tmp_path / 'kd', broken)
    shutil.rmtree(broken / 'generator')
    for n in (8, 12):
        shutil.rmtree(broken / f'checkpoints/{n:012d}')
    train(replace(saved_config(broken), out='', resume=str(broken)))
    again = load_checkpoint(checkpoints(broken / 'checkpoints')[0])
    assert again['roles'] == ['generator']
    assert all(torch.equal(v, again['generator'][k]) for k, v in whole['generator'].items())
    job = setup(replace(config, method='sid', init=str(tmp_path / 'kd'), out=''))
    assert {*job.nets.learners} == {'fake', 'generator'} and job.method.freeze_generator_until == 1
    with pytest.raises(InputError, match='no fake to look at'):
        check_up(setup(config))

@pytest.mark.parametrize('method', ['kd', 'lcm', 'scm'])
def test_it_begins_where_the_paths_do(tmp_path, method):
    start = lambda teacher, **more: setup(Config(
        teacher=str(teacher), prompts=str(tmp_path / 'p.txt'), device='cpu', total_batch_size=4, max_train_images=8,
        method=method, **more)).t_init
    (tmp_path / 'p.txt').write_text('a red cat\na blue dog\n')
    assert (start(tiny_pipeline(tmp_path / 'sd')), start(tmp_path / 'sd', t_init=600)) == (999, 600)
    assert start(tiny_sd3(tmp_path / 'flow')) == 1.0
    assert setup(Config(method='sid', device='cpu', max_train_images=160)).t_init == 625
