"""A negative prompt takes the place of every empty one: of the null that guidance asks, and of a prompt that is dropped.

The references are the stock pipelines with `negative_prompt`, and a run without one, to the bit."""

import json
import pytest
import torch
from sid_lsg_nb.cli import main
from sid_lsg_nb.commands.sources import make_sampler, open_source
from sid_lsg_nb.core import InputError, cond_slice, max_abs, noise_for
from sid_lsg_nb.teachers.edm import save_edm, tiny_edm
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.testing import open_stock, tiny_flux, tiny_pipeline, tiny_pixart, tiny_qwen_image, tiny_sana, tiny_sd3
from sid_lsg_nb.testing import tiny_sdxl, tiny_z_image
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.trainer import train

TEXT, PROMPTS = 'the green shoe', ['a red cat', 'the blue dog']
MAKE = dict(
    sd=tiny_pipeline, sdxl=tiny_sdxl, pixart=tiny_pixart, sd3=tiny_sd3, sana=tiny_sana, flux=tiny_flux,
    qwen_image=tiny_qwen_image, z_image=tiny_z_image)

@pytest.fixture(scope='module', params=MAKE)
def family(request, tmp_path_factory):
    return request.param, MAKE[request.param](tmp_path_factory.mktemp(request.param))

def same(a, b): return a.keys() == b.keys() and all(max_abs(v, b[k]) < 1e-5 for k, v in a.items())

def test_it_stands_for_every_empty_prompt_and_for_no_other(family):
    name, folder = family
    text = open_teacher(folder).text
    null, said = text.null(), text([*PROMPTS, ''])
    assert same(null, cond_slice(said, slice(2, 3)))
    text.set_negative_prompt(TEXT)
    away, now = text.null(), text([*PROMPTS, ''])
    assert same(away, cond_slice(now, slice(2, 3))) and not same(away, null)
    assert same(cond_slice(said, slice(2)), cond_slice(now, slice(2)))
    if name != 'sana': assert same(away, text([TEXT]))  # SANA reads it without its instruction
    text.set_negative_prompt(type(text).negative_prompt)
    assert same(text.null(), null)

def encoded(name, pipe):
    "What the stock pipeline makes of a negative prompt, one tensor of each kind"
    if name in ('sd', 'pixart'):
        more = dict(device='cpu', num_images_per_prompt=1) if name == 'sd' else dict(clean_caption=False)
        out = pipe.encode_prompt('a cat', do_classifier_free_guidance=True, negative_prompt=TEXT, **more)
        return [out[1]] if name == 'sd' else [out[2], out[3]]
    if name == 'sdxl': return pipe.encode_prompt('a cat', negative_prompt=TEXT)[1::2]
    if name == 'flux': return pipe.encode_prompt(TEXT, None)[:2]
    return pipe.encode_prompt(TEXT)[:1]

@pytest.mark.parametrize('family', ['sd', 'sdxl', 'pixart', 'flux', 'qwen_image'], indirect=True)
def test_the_stock_pipeline_encodes_the_same(family):
    name, folder = family
    teacher, pipe = open_teacher(folder), open_stock(folder)
    teacher.set_negative_prompt(TEXT)
    with torch.no_grad(): theirs = encoded(name, pipe)
    ours = list(teacher.text.null().values())
    for a, b in zip(theirs, ours): assert max_abs(a, b[:, :a.shape[1]]) == 0

@pytest.mark.parametrize('family', ['sd3', 'sana', 'z_image'], indirect=True)
def test_guided_pictures_are_the_stock_pipelines(family):
    name, folder = family
    teacher, pipe = open_teacher(folder), open_stock(folder)
    z, kappa = noise_for([1, 2], teacher.latent_shape), 4.5
    side = {} if name == 'sd3' else {k: teacher.latent_shape[1]*2 for k in ('height', 'width')}
    square = dict(use_resolution_binning=False) if name == 'sana' else {}
    scale = kappa - 1 if name == 'z_image' else kappa
    drawn = lambda: teacher.sample(z, teacher.text(PROMPTS), teacher.text.null(), kappa, 3)
    before = drawn()
    teacher.set_negative_prompt(TEXT)
    theirs = pipe(
        list(PROMPTS), negative_prompt=[TEXT]*2, latents=z, num_inference_steps=3, guidance_scale=scale,
        output_type='latent', **side, **square).images
    assert max_abs(drawn(), theirs) < 1e-4*theirs.abs().max() and max_abs(before, theirs) > 1e-3

# ---- a run

def run(out, **more):
    small = dict(
        device='cpu', max_train_images=16, total_batch_size=4, micro_batch=2, log_every=4, n_eval=0, sample_every=0,
        checkpoint_every=8, proportion_empty_prompts=.5, lr_scheduler='constant', teacher_steps=2)
    train(Config(**small | dict(out=str(out)) | more))
    return [json.loads(line)['loss'] for line in (out/'log.jsonl').read_text().splitlines()]

def test_a_run_keeps_it_and_goes_on_exactly(tmp_path):
    plain, away = run(tmp_path/'plain'), run(tmp_path/'away', negative_prompt=TEXT)
    assert len(away) == 4 and plain != away
    assert json.loads((tmp_path/'away/config.json').read_text())['negative_prompt'] == TEXT
    run(tmp_path/'part', negative_prompt=TEXT, max_train_images=8)
    with pytest.raises(InputError, match='another negative_prompt'):
        run(tmp_path/'part', resume=str(tmp_path/'part'))
    assert run(tmp_path/'part', resume=str(tmp_path/'part'), negative_prompt=TEXT) == away

def test_a_teacher_of_classes_refuses_it(tmp_path, capsys):
    folder = save_edm(tiny_edm(classes=10).denoiser.net, tmp_path/'edm')
    line = ['distill', '--teacher', str(folder), '--out', str(tmp_path/'run'), '--device', 'cpu', '--dry-run']
    assert main([*line, '--negative-prompt', TEXT]) == 2
    assert 'cannot stand for none; leave --negative-prompt away' in capsys.readouterr().err

def test_a_teacher_is_drawn_with_it_and_a_student_is_not():
    source = open_source('embedded')
    pictures = {t: make_sampler(source, 'cpu', steps=2, kappa=3., negative_prompt=t) for t in ('', TEXT)}
    drawn = {t: draw(['a 3d fox on a white background'], [0]) for t, (draw, _) in pictures.items()}
    assert max_abs(drawn[''], drawn[TEXT]) > 1e-3 and f'away from {TEXT!r}' in pictures[TEXT][1]
    with pytest.raises(InputError, match='add --kappa, or leave it away'):
        make_sampler(source, 'cpu', steps=2, negative_prompt=TEXT)
