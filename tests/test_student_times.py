"""Lists of times of one's own, and shifted ones, for generators of several steps: trained, kept with the generator, and
drawn by the package and by stock diffusers."""

import json
from dataclasses import replace
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from sid_lsg_nb.core import InputError, max_abs, noise_for
from sid_lsg_nb.export.space import app_text
from sid_lsg_nb.method.rollout import few_steps
from sid_lsg_nb.teachers.edm import save_edm, tiny_edm
from sid_lsg_nb.teachers.registry import family_of, open_student, open_teacher
from sid_lsg_nb.teachers.student import few_step_scheduler
from sid_lsg_nb.testing import open_stock, step_noises, tiny_pipeline, tiny_sd3
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.job import setup
from sid_lsg_nb.training.trainer import train

TIMES = dict(table=(600, 450, 100), flow=(1.0, 0.8, 0.25), edm=(500.0, 300.0, 10.0))

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('times')
    tiny_pipeline(home / 'table')
    tiny_sd3(home / 'flow')
    save_edm(tiny_edm(classes=4).denoiser.net, home / 'edm')
    (home / 'p.txt').write_text('a red cat\na blue dog\na green apple\n')
    return home

def config_of(home, teacher, **more):
    own = dict(
        teacher=str(home / teacher), prompts='' if teacher == 'edm' else str(home / 'p.txt'), device='cpu',
        total_batch_size=4, max_train_images=8, sample_every=4, log_every=4, teacher_steps=2, n_eval=0)
    if teacher == 'edm':
        own |= dict(kappa=1.0)
    return Config(**own | more)

@pytest.fixture(scope='module', params=[*TIMES])
def run(home, request):
    name = request.param
    out = home / f'{name}-run'
    train(config_of(home, name, student_times=tuple(map(float, TIMES[name])), out=str(out)))
    return name, out

def test_it_is_trained_and_kept(home, run):
    name, out = run
    kept = json.loads((out / 'config.json').read_text())
    assert (kept['student_steps'], kept['t_init'], tuple(kept['student_times'])) == (3, TIMES[name][0], TIMES[name])
    file = 'config.json' if name == 'edm' else 'model_index.json'
    index = json.loads((out / 'generator' / file).read_text())
    assert tuple(index['times' if name == 'edm' else '_times']) == TIMES[name]
    assert family_of(out / 'generator').student_start(out / 'generator').times == TIMES[name]

def test_the_student_draws_at_them(run):
    name, out = run
    student, words, seeds = open_student(out), ['a red cat', 'a blue dog'], [3, 4]
    if name == 'edm':
        words = ['0', '1']
    teacher = open_teacher(str(out / 'generator'))
    z = noise_for(seeds, teacher.latent_shape)
    if name == 'edm':
        zs = [noise_for([s + 1_000_003 * k for s in seeds], teacher.latent_shape) for k in range(3)]
    else:
        zs = step_noises(z, [s + 1_000_003 for s in seeds], 3)
    with torch.no_grad():
        by_hand = teacher.decode(few_steps(teacher.denoiser, zs, teacher.text(words), TIMES[name]))
    assert max_abs(student(words, seeds, 3), by_hand) < 1e-4
    linear = [TIMES[name][0] * k / 3 for k in (3, 2, 1)]
    linear = [round(t) for t in linear] if name == 'table' else linear
    with torch.no_grad():
        other = teacher.decode(few_steps(teacher.denoiser, zs, teacher.text(words), linear))
    assert max_abs(other, by_hand) > 1e-3

def test_stock_diffusers_draws_at_them(home, run):
    name, out = run
    if name != 'table':
        return
    pipe = open_stock(out / 'generator')
    times = json.loads((out / 'generator/model_index.json').read_text())['_times']
    pipe.scheduler = few_step_scheduler(pipe.scheduler, times[0])
    z = noise_for([3], (4, 8, 8)) * (1 - pipe.scheduler.alphas_cumprod[times[0]])**0.5
    images = pipe(
        ['a red cat'], latents=z, timesteps=times, guidance_scale=0, output_type='pt',
        generator=[torch.Generator().manual_seed(3 + 1_000_003)]).images * 2 - 1
    assert max_abs(images, open_student(out)(['a red cat'], [3], 3)) < 1e-4
    start = family_of(out / 'generator').student_start(out / 'generator')
    assert 'timesteps=[600, 450, 100]' in app_text(out / 'generator', start, 'x', 3, ['a cat'])

def test_shifted_ones(home):
    times = lambda teacher, **more: setup(config_of(home, teacher, student_steps=4, **more)).method.rollout.times
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    found = times('flow', student_shift=3.0)
    assert found == pytest.approx(scheduler.sigmas[:4].tolist(), abs=1e-6)
    assert times('table', student_shift=3.0, t_init=600) == (600, 540, 450, 300)
    assert times('table', t_init=600) == (600, 450, 300, 150)

def test_what_cannot_be(home, run):
    name, out = run
    table = lambda *times, **more: setup(config_of(home, 'table', student_times=times, **more))
    for wrong, said in (
        (lambda: table(600.0, 600.0), 'must fall'), (lambda: table(600.0, 0.0), 'above 0'),
        (lambda: table(600.0, 300.0, t_init=500), 'fall from t_init, 500'),
        (lambda: table(600.5, 300.0), 'whole numbers'),
        (lambda: table(600.0, 300.0, student_steps=3), 'names 2 times'),
        (lambda: setup(config_of(home, 'table', student_steps=2, student_shift=0.0)), 'above 0'),
        (lambda: train(replace(config_of(home, name, student_times=(TIMES[name][0], TIMES[name][2])), resume=str(out))),
         'student')):
        with pytest.raises(InputError, match=said):
            wrong()
