"""A run that goes on from a student (`--init`): of every family, from every form, in slices, after a break."""

import copy
import json
import shutil
from dataclasses import replace
import pytest
import torch
from diffusers import PixArtTransformer2DModel, StableDiffusionPipeline
from forks import finish, start_ranks
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from sid_lsg_nb.core import InputError, max_abs, noise_for, rng
from sid_lsg_nb.export.initial_weights import find_start, initial_weights, lora_factors, start_time
from sid_lsg_nb.export.lora import save_lora
from sid_lsg_nb.method.methods import make_method
from sid_lsg_nb.teachers.edm import save_edm, tiny_edm
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.teachers.student import save_student
from sid_lsg_nb.testing import tiny_flux, tiny_pipeline, tiny_pixart, tiny_qwen_image, tiny_sana, tiny_sd3, tiny_sdxl
from sid_lsg_nb.testing import tiny_z_image
from sid_lsg_nb.training.checkpoint import checkpoints, load_checkpoint
from sid_lsg_nb.training.config import Config, recipe_of, settings_of
from sid_lsg_nb.training.networks import build_networks
from sid_lsg_nb.training.run_folder import config_from_dict, saved_config
from sid_lsg_nb.training.trainer import train
from test_readme import forge

PROMPTS = 'a red cat\na blue dog\na green apple\n'
FAMILIES = dict(
    sd=tiny_pipeline, sdxl=tiny_sdxl, pixart=tiny_pixart, sd3=tiny_sd3, sana=tiny_sana, flux=tiny_flux,
    qwen_image=tiny_qwen_image, z_image=tiny_z_image, edm=lambda folder: save_edm(tiny_edm().denoiser.net, folder))

def moved(teacher, size=0.01):
    "A copy of a teacher's network with other weights"
    net = teacher.denoiser.copy()
    for i, p in enumerate(net.parameters()):
        p.data += size * torch.randn(p.shape, generator=rng(i))
    return net

def made(folder, make=tiny_pipeline, t_init=None):
    "A teacher, a student in a run's folder, and its network"
    make(folder / 'teacher')
    (folder / 'run').mkdir()
    teacher = open_teacher(folder / 'teacher')
    net = moved(teacher)
    save_student(teacher, net, folder / 'run' / 'generator', t_init)
    return teacher, net

def built(teacher, **options):
    "What learns in a run"
    config = Config(**options)
    return build_networks(settings_of(config).networks, teacher, make_method(recipe_of(config, 625)))[1]

def apart(net, other):
    own = other.state_dict()
    return max(max_abs(v, own[k]) for k, v in net.state_dict().items())

@pytest.mark.parametrize('family', FAMILIES)
def test_the_generator_begins_as_the_student_and_the_fake_as_the_teacher(tmp_path, family):
    teacher, net = made(tmp_path, FAMILIES[family])
    assert start_time(str(tmp_path / 'run')) in (pytest.approx(teacher.default_t_init), None)
    learning = built(teacher, init=str(tmp_path / 'run'))
    assert apart(learning['generator'].net, net.net) == 0
    assert apart(learning['fake'].net, teacher.denoiser.net) == 0
    assert apart(net.net, teacher.denoiser.net) > 1e-3

def test_a_lora_in_the_names_of_peft(tmp_path):
    "PixArt's pipeline has no `load_lora_weights`: peft reads it, as it would for anybody"
    teacher, _ = made(tmp_path, tiny_pixart)
    save_lora(teacher, tmp_path / 'run', tmp_path / 'lora', rank=1_000, dtype=torch.float32)
    stock = PixArtTransformer2DModel.from_pretrained(tmp_path / 'teacher' / 'transformer')
    stock = PeftModel.from_pretrained(stock, tmp_path / 'lora').merge_and_unload()
    generator = built(teacher, init=str(tmp_path / 'lora'))['generator']
    assert apart(generator.net, stock) < 1e-6 < 1e-3 < apart(generator.net, teacher.denoiser.net)
    (tmp_path / 'other').mkdir()
    other = open_teacher(tiny_sd3(tmp_path / 'other'))
    with pytest.raises(InputError, match='is no LoRA of teacher'):
        initial_weights(find_start(str(tmp_path / 'lora')), other)

def asked(net, teacher):
    z, cond = noise_for(range(2), teacher.latent_shape), teacher.text(['a red cat', 'an apple'])
    with torch.no_grad():
        return net(z, torch.full((2,), 500), cond)

@pytest.mark.parametrize('lora', ['generator', 'both'])
def test_a_generator_that_is_a_lora_begins_as_one(tmp_path, monkeypatch, lora):
    "It answers as a network with that LoRA folded in, though its rank is higher"
    teacher, _ = made(tmp_path)
    save_lora(teacher, tmp_path / 'run', tmp_path / 'lora', rank=2, dtype=torch.float32)
    init = str(tmp_path / 'lora')
    merged = built(open_teacher(tmp_path / 'teacher'), init=init)['generator']
    wide = open_teacher(tmp_path / 'teacher')
    with monkeypatch.context() as m:
        m.setattr(type(wide.denoiser), 'lora_targets', tuple(lora_factors(find_start(init), teacher)))
        generator = built(wide, init=init, lora=lora, lora_rank=4)['generator']
        with pytest.raises(InputError, match='give --lora-rank 2'):
            built(open_teacher(tmp_path / 'teacher'), init=init, lora=lora, lora_rank=1)
    want, got, plain = (asked(n, teacher) for n in (merged, generator, teacher.denoiser))
    assert max_abs(got, want) < 1e-5 < 1e-3 < max_abs(want, plain)
    with pytest.raises(InputError, match='is no LoRA, and a generator with --lora'):
        built(open_teacher(tmp_path / 'teacher'), init=str(tmp_path / 'run'), lora=lora)

def test_a_lora_of_other_layers_than_those_that_learn(tmp_path):
    teacher, _ = made(tmp_path)
    save_lora(teacher, tmp_path / 'run', tmp_path / 'lora', rank=2, dtype=torch.float32)
    with pytest.raises(InputError, match='which --lora does not'):
        built(open_teacher(tmp_path / 'teacher'), init=str(tmp_path / 'lora'), lora='both', lora_rank=4)

def test_a_dora(tmp_path):
    "Folded in as stock diffusers folds it in; as two factors it cannot be had"
    teacher, _ = made(tmp_path)
    net = copy.deepcopy(teacher.denoiser.net)
    net.add_adapter(LoraConfig(r=2, target_modules=['to_q', 'to_v'], use_dora=True, init_lora_weights='gaussian'))
    for i, (name, p) in enumerate(net.named_parameters()):
        if 'lora' in name:
            p.data += 0.1 * torch.randn(p.shape, generator=rng(i))
    StableDiffusionPipeline.save_lora_weights(tmp_path / 'dora', get_peft_model_state_dict(net))
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / 'teacher', safety_checker=None)
    stock.load_lora_weights(tmp_path / 'dora')
    stock.fuse_lora()
    stock.unload_lora_weights()
    path = find_start(str(tmp_path / 'dora'))
    generator = built(teacher, init=str(tmp_path / 'dora'))['generator']
    assert apart(generator.net, stock.unet) < 1e-6 < 1e-3 < apart(generator.net, teacher.denoiser.net)
    with pytest.raises(InputError, match='is a DoRA'):
        lora_factors(path, open_teacher(tmp_path / 'teacher'))

def test_a_student_and_a_fake_that_is_a_lora(tmp_path):
    teacher, net = made(tmp_path)
    learning = built(teacher, init=str(tmp_path / 'run'), lora='fake', lora_rank=2)
    assert apart(learning['generator'].net, net.net) == 0

def run_of(tmp_path, **options):
    (tmp_path / 'p.txt').write_text(PROMPTS)
    return Config(
        teacher=str(tmp_path / 'teacher'), prompts=str(tmp_path / 'p.txt'), init=str(tmp_path / 'run'), device='cpu',
        total_batch_size=4, micro_batch=4, max_train_images=16, checkpoint_every=4, checkpoints_total_limit=9, lr=1e-3,
        lr_fake=1e-3, sample_every=0, log_every=4, teacher_steps=2, **options)

def test_a_run_rests_then_learns_and_goes_on_without_the_student(tmp_path):
    "The time is the student's; the fake learns first; after a break the student is not read again"
    _, net = made(tmp_path, t_init=500)
    begun = net.state_dict()
    config = run_of(tmp_path, out=str(tmp_path / 'whole'), freeze_generator_until=8)
    train(config)
    log = (tmp_path / 'whole/log.jsonl').read_text()
    assert train(replace(config, resume='latest')) == tmp_path / 'whole'  # the same command again: nothing to do
    assert (tmp_path / 'whole/log.jsonl').read_text() == log
    shutil.copytree(tmp_path / 'whole', tmp_path / 'on')
    train(replace(config, resume='latest', max_train_images=20, out=str(tmp_path / 'on')))
    saved = saved_config(tmp_path / 'whole')
    assert (saved.t_init, saved.init, saved.freeze_generator_until) == (500, config.init, 8)
    states = {int(p.name): load_checkpoint(p) for p in checkpoints(tmp_path / 'whole/checkpoints')}
    still = {n: max(max_abs(v, s['generator'][k]) for k, v in begun.items()) for n, s in states.items()}
    assert [still[n] == 0 for n in (4, 8, 12, 16)] == [True, True, False, False]
    fake = {n: s['fake']['net.conv_in.weight'] for n, s in states.items()}
    assert max_abs(fake[4], fake[8]) > 1e-5

    broken = tmp_path / 'broken'
    shutil.copytree(tmp_path / 'whole', broken)
    shutil.rmtree(broken / 'generator')
    for n in (12, 16):
        shutil.rmtree(broken / f'checkpoints/{n:012d}')
    shutil.rmtree(tmp_path / 'run')
    train(replace(saved, out='', resume=str(broken)))
    last = load_checkpoint(checkpoints(broken / 'checkpoints')[0])
    for role in ('generator', 'fake', 'ema'):
        assert all(torch.equal(v, states[16][role][k]) for k, v in last[role].items())
    with pytest.raises(InputError, match='cannot resume with another init'):
        train(replace(saved, out='', resume=str(broken), init='shipped'))
    with pytest.raises(InputError, match='--init .* does not exist'):
        train(replace(config, out=str(tmp_path / 'new')))

def test_a_tenth_of_the_run_unless_something_else_is_said(tmp_path):
    made(tmp_path)
    config = run_of(tmp_path, out=str(tmp_path / 'out'), dry_run=False)
    config = replace(config, max_train_images=40, checkpoint_every=0)
    train(config)
    assert saved_config(tmp_path / 'out').freeze_generator_until == 4

def test_the_old_name_of_a_setting_is_known():
    "Runs that began before the setting was about more than real pictures"
    found = config_from_dict(dict(gan_freeze_generator_until=7), 'config.json')
    assert found.freeze_generator_until == 7

SLICED = """
import json
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.distributed import Distributed, gather_full
from sid_lsg_nb.training.job import setup
from sid_lsg_nb.teachers.registry import open_student
processes = Distributed('cpu')
config = Config(
    teacher='teacher', prompts='p.txt', init={init!r}, device='cpu', total_batch_size=4, max_train_images=8, fsdp=True)
job = setup(config, processes)
nets = dict(generator=job.nets.learners['generator'].net, ema=job.ema.net, fake=job.nets.learners['fake'].net)
whole = {{k: gather_full(n.net.state_dict()) for k, n in nets.items()}}
told = None
if processes.is_main:
    student = open_student('run').pipe.unet.state_dict()
    told = {{k: max(float((v - student[n]).abs().max()) for n, v in w.items()) for k, w in whole.items()}}
    print(json.dumps(told))
processes.close()
"""

def test_each_process_reads_its_slices_of_the_student(tmp_path):
    made(tmp_path)
    (tmp_path / 'p.txt').write_text(PROMPTS)
    ranks = start_ranks(['-c', SLICED.format(init='run')], [tmp_path] * 2)
    (status, out, err), (status2, _, err2) = finish(ranks, 200)
    assert (status, status2) == (0, 0), err[-3000:] + err2[-3000:]
    told = json.loads(out.splitlines()[-1])
    assert told['generator'] == told['ema'] == 0 and told['fake'] > 1e-3

def test_an_official_file_of_edm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = open_teacher(FAMILIES['edm'](tmp_path / 'teacher'))
    net = moved(teacher)
    forge(net.net, tmp_path / 'official.pkl')
    assert apart(built(teacher, init=str(tmp_path / 'official.pkl'))['generator'].net, net.net) == 0

def test_a_file_and_slices(tmp_path):
    teacher, net = made(tmp_path)
    torch.save(dict(ema=net.net), tmp_path / 'official.pt')
    with pytest.raises(InputError, match='give one, or leave --fsdp away'):
        built(teacher, init=str(tmp_path / 'official.pt'), fsdp=True)
