"""Pictures of any size and shape: every family that can draws, distils and saves at the size it is told.

The reference is the stock pipeline, called with the same height and width: it knows what else depends on them, such as
SDXL's six numbers, PixArt's resolution, and the times that a flow's scheduler shifts."""

import json
from dataclasses import dataclass, replace
import pytest
import torch
from sid_lsg_nb.commands.compare import choose_teacher
from sid_lsg_nb.commands.options import Compare
from sid_lsg_nb.commands.sources import ImageSource, at_size, make_sampler, open_model
from sid_lsg_nb.core import InputError, max_abs, noise_for
from sid_lsg_nb.method.rollout import one_step
from sid_lsg_nb.teachers.base import vae_shrink
from sid_lsg_nb.teachers.edm import save_edm, tiny_edm
from sid_lsg_nb.teachers.registry import family_of, model_shapes, open_student, open_teacher
from sid_lsg_nb.teachers.student import save_student
from sid_lsg_nb.testing import open_stock, tiny_flux, tiny_pipeline, tiny_pixart, tiny_qwen_image, tiny_sana, tiny_sd3
from sid_lsg_nb.testing import tiny_sdxl, tiny_z_image
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.trainer import train

PROMPTS = ['a red cat', 'the blue dog']

@dataclass(frozen=True)
class Case:
    make: object  # folder -> folder
    odd: tuple  # sides that do not divide, the multiple, and the nearest that do
    latents: object = None  # as the stock pipeline takes them
    size: tuple = (24, 16)

def packed(z): return z.reshape(len(z), 4, 6, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(len(z), 24, 16)

CASES = {
    'sd': Case(tiny_pipeline, (17, 8, '16 and 24')),
    'sdxl': Case(tiny_sdxl, (17, 8, '16 and 24')),
    'pixart': Case(tiny_pixart, (18, 8, '16 and 24')),
    'sd3': Case(tiny_sd3, (18, 4, '16 and 20')),
    'sana': Case(tiny_sana, (33, 32, '32 and 64'), size=(64, 32)),
    'flux': Case(tiny_flux, (18, 4, '16 and 20'), packed),
    'qwen-image': Case(tiny_qwen_image, (18, 4, '16 and 20'), packed),
    'z-image': Case(tiny_z_image, (18, 4, '16 and 20')),
}

@pytest.fixture(scope='module', params=CASES)
def sized(request, tmp_path_factory):
    "A teacher told another size, its case, and where it is"
    case, tmp = CASES[request.param], tmp_path_factory.mktemp(request.param)
    teacher = open_teacher(case.make(tmp/'teacher'))
    teacher.set_size(*case.size)
    return teacher, case, tmp

def test_the_latents_have_that_shape(sized):
    teacher, case, tmp = sized
    assert teacher.latent_shape[1:] == tuple(s//2 for s in case.size)
    assert teacher.decode(torch.zeros(1, *teacher.latent_shape)).shape[2:] == case.size
    side, step, near = case.odd
    with pytest.raises(InputError, match=f'height {side} must be a multiple of {step} .* nearest are {near}'):
        teacher.set_size(side, case.size[1])
    assert teacher.image_size == case.size

def test_a_saved_student_keeps_it_and_stock_diffusers_draws_the_same(sized):
    teacher, case, tmp = sized
    folder = save_student(teacher, teacher.denoiser, tmp/'student')
    student, z = open_student(folder), noise_for([3, 4], teacher.latent_shape)
    assert student.latent_shape == teacher.latent_shape
    call = family_of(folder).student_start(folder).call
    assert (call['height'], call['width']) == case.size
    stock = open_stock(folder)
    given = case.latents(z) if case.latents else z
    theirs = stock(list(PROMPTS), latents=given, output_type='pt', **call).images.float()*2 - 1
    mine = student(PROMPTS, [3, 4])
    assert theirs.shape[2:] == case.size and max_abs(mine, theirs) < 1e-5
    with torch.no_grad(): y = one_step(teacher.denoiser, z, teacher.text(PROMPTS), teacher.default_t_init)
    assert max_abs(teacher.decode(y), theirs) < 1e-5
    four = student(PROMPTS, [3, 4], steps=4)
    assert four.shape == mine.shape and max_abs(four, mine) > 1e-4
    student.set_size(*reversed(case.size)) # drawn at another size than it was made for
    assert student(PROMPTS, [3, 4]).shape[2:] == tuple(reversed(case.size))
    with pytest.raises(InputError, match='must be a multiple of'): student.set_size(case.odd[0], case.size[1])

def test_the_size_of_the_embedding_is_told(tmp_path):
    "SDXL and PixArt at 1024 pixels: another size is another condition, also of the empty prompt"
    xl = open_teacher(tiny_sdxl(tmp_path/'xl'))
    before = xl.text.null()['time_ids']
    xl.set_size(24, 16)
    assert xl.text.null()['time_ids'].tolist() == [[24, 16, 0, 0, 24, 16]]
    assert before.tolist() == [[16, 16, 0, 0, 16, 16]]
    big = open_teacher(tiny_pixart(tmp_path/'big', sample_size=128, use_additional_conditions=True))
    assert big.text.null()['resolution'].tolist() == [[256, 256]]
    big.set_size(24, 16)
    assert big.text.null()['resolution'].tolist() == [[24, 16]] and big.text.null()['aspect_ratio'].tolist() == [[1.5]]

def test_a_network_of_one_size_says_so(tmp_path):
    folder = save_edm(tiny_edm().denoiser.net, tmp_path/'edm')
    with pytest.raises(InputError, match='one size only'): open_teacher(folder).set_size(16, 16)

def run(out, **more):
    small = dict(
        device='cpu', max_train_images=8, total_batch_size=4, micro_batch=2, log_every=4, n_eval=0, sample_every=0,
        checkpoint_every=4, lr=1e-4, teacher_steps=2)
    train(Config(**small | dict(out=str(out), prompts=str(out.parent/'prompts.txt')) | more))
    return [json.loads(line) for line in (out/'log.jsonl').read_text().splitlines()]

def test_a_run_at_a_size_goes_on_exactly_and_its_card_says_the_call(tmp_path):
    (tmp_path/'prompts.txt').write_text('a red cat\nthe blue dog\nan apple\nthe green shoe\n')
    of = dict(
        teacher=tiny_flux(tmp_path/'flux'), preset='flux-sid-dit', height=24, width=16, embedded_guidance=2.,
        guidance='lsg', kappa=1.5, t_init=1., loss_weight='1-t', fake_loss_weight='velocity')
    whole = run(tmp_path/'whole', **of)
    run(tmp_path/'part', **of | dict(max_train_images=4, lr_scheduler='constant'))
    rows = run(tmp_path/'part', resume=str(tmp_path/'part'), **of | dict(lr_scheduler='constant'))
    with pytest.raises(InputError, match='another height'):
        run(tmp_path/'part', resume=str(tmp_path/'part'), **of | dict(height=16))
    straight = run(tmp_path/'straight', **of | dict(lr_scheduler='constant'))
    assert [r['loss'] for r in rows] == [r['loss'] for r in straight] and len(whole) == 2
    student = open_student(tmp_path/'whole')
    assert student.latent_shape == (4, 12, 8) and student.teacher.text.guidance == 2.
    card = (tmp_path/'whole/generator/README.md').read_text()
    assert 'num_inference_steps=1, guidance_scale=2.0, height=24, width=16)' in card
    assert all(f'{line}' in card for line in ('height: 24', 'width: 16', 'guidance_scale: 2.0'))

def test_other_numbers_for_a_guidance_as_input_are_refused(tmp_path):
    (tmp_path/'prompts.txt').write_text('a red cat\n'*8)
    with pytest.raises(InputError, match='takes no guidance as an input'):
        run(tmp_path/'sd', teacher=tiny_pipeline(tmp_path/'teacher'), embedded_guidance=3.)
    with pytest.raises(InputError, match='give both, or neither'): run(tmp_path/'half', height=16)

def test_memory_is_counted_at_the_size():
    whole = model_shapes('flux1-dev')
    assert whole.at_size(512, 768).latent == (16, 64, 96)
    assert vae_shrink({}) == 8 and vae_shrink(dict(block_out_channels=[1, 2])) == 2
    shapes = model_shapes('embedded')
    assert shapes.at_size(32, 48).latent[1:] == (32//shapes.shrink, 48//shapes.shrink)

def test_what_draws_can_be_told_a_size_and_a_teacher_takes_that_of_its_run(tmp_path):
    folder = tiny_flux(tmp_path/'teacher')
    run = ImageSource('student', 'run', 'run', config=Config(teacher=folder, height=24, width=16, embedded_guidance=2.))
    teacher, how = choose_teacher(Compare((), teacher='run', teacher_steps=2), run)
    assert teacher.teacher_of is run.config and how['steps'] == 2
    model = open_model(teacher, 'cpu')
    assert model.latent_shape == (4, 12, 8) and model.text.guidance == 2.
    named, _ = choose_teacher(Compare((), teacher=folder), run)
    assert named.teacher_of is None and open_model(named, 'cpu').latent_shape == (4, 8, 8)
    draw, words = make_sampler(replace(teacher, teacher_of=None), 'cpu', steps=2, kappa=1., size=(16, 32))
    assert draw(['a red cat'], [0]).shape == (1, 3, 16, 32) and words.endswith('16x32 pixels')
    assert at_size(model, None, None) is model
    with pytest.raises(InputError, match='give both'): at_size(model, 16, None)
    with pytest.raises(InputError, match='draws at one size'): at_size(object(), 16, 16)
