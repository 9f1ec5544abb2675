"One step, two steps and the teacher's many on a Stable Diffusion network, against diffusers"
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from sid_lsg_nb.core import max_abs, rng
from sid_lsg_nb.method.rollout import few_steps, one_step, teacher_sample
from sid_lsg_nb.teachers.stable_diffusion import load_sd
from sid_lsg_nb.testing import tiny_pipeline

PROMPTS = ['a red cat', 'the blue shoe', '']

@pytest.fixture(scope='module', params=['epsilon', 'v_prediction'])
def teacher(request, tmp_path_factory):
    return load_sd(tiny_pipeline(tmp_path_factory.mktemp(request.param), request.param))

@pytest.fixture(scope='module')
def noises(teacher): return torch.randn(4, 3, *teacher.latent_shape, generator=rng(0))

@pytest.fixture(scope='module')
def cond(teacher): return teacher.text(PROMPTS)

def test_one_step_is_what_diffusers_gets_from_a_noised_zero_latent(teacher, noises, cond):
    x_g, t = one_step(teacher.denoiser, noises[0], cond, 625), torch.full((3,), 625)
    assert max_abs(few_steps(teacher.denoiser, noises[:1], cond, [625]), x_g) == 0
    x_t = teacher.pipe.scheduler.add_noise(torch.zeros_like(noises[0]), noises[0], t)
    assert max_abs(teacher.denoiser(x_t, t, cond), x_g) < 1e-5

def test_two_steps_by_hand(teacher, noises, cond):
    first, t = one_step(teacher.denoiser, noises[0], cond, 625), torch.full((3,), 312)
    a, s = teacher.schedule.levels(t, first)
    second = teacher.denoiser(a*first + s*noises[1], t, cond)
    assert max_abs(second, few_steps(teacher.denoiser, noises[:2], cond, [625, 312])) < 1e-5

def test_as_many_noises_as_times(teacher, noises, cond):
    with pytest.raises(ValueError): few_steps(teacher.denoiser, noises[:2], cond, [625])

def test_the_gradient_reaches_every_weight(teacher, noises, cond):
    student = teacher.denoiser.copy()
    one_step(student, noises[0], cond, 625).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.net.parameters())

def stock_latents(teacher, z, kappa, steps):
    "The same from diffusers' pipeline"
    pipe = StableDiffusionPipeline.from_pretrained(teacher.path, safety_checker=None)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, latents=z, guidance_scale=kappa, num_inference_steps=steps, output_type='latent').images

@pytest.mark.parametrize('kappa, steps', [(1., 5), (3., 5), (7.5, 25)])
def test_many_steps_are_those_of_the_stock_pipeline(teacher, noises, cond, kappa, steps):
    ours = teacher_sample(teacher, noises[0], cond, teacher.text.null(), kappa, steps)
    assert max_abs(ours, stock_latents(teacher, noises[0], kappa, steps)) < 1e-4
    assert not ours.requires_grad

def test_guidance_acts(teacher, noises, cond):
    weak, strong = (teacher_sample(teacher, noises[0], cond, teacher.text.null(), k, 5) for k in (1., 3.))
    assert max_abs(weak, strong) > .01
