"""A run brings each part of its teacher to the device when and in the number format in which it will live there, out of
the files one tensor at a time. All numbers are those of a run whose teacher was opened whole."""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from forks import Forked, finish
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from sid_lsg_nb.commands.convert import export_to
from sid_lsg_nb.commands.options import Export
from sid_lsg_nb.data import prompts as prompt_files
from sid_lsg_nb.data import text_cache
from sid_lsg_nb.data.prompts import open_prompts
from sid_lsg_nb.method.methods import make_method
from sid_lsg_nb.teachers.int8 import block_linears
from sid_lsg_nb.teachers.loading import weights_in_files
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.teachers.student import save_student
from sid_lsg_nb.testing import tiny_flux, tiny_pipeline, tiny_pixart, tiny_qwen_image, tiny_sana, tiny_sd3, tiny_sdxl
from sid_lsg_nb.testing import tiny_z_image
from sid_lsg_nb.training.config import Config, resolve, settings_of
from sid_lsg_nb.training.job import iterate, open_on_all_ranks, place_text, setup, with_times
from sid_lsg_nb.training.memory import INT8_ROOM, LoraView, MemorySettings, plain_copy, teacher_bytes
from sid_lsg_nb.training.networks import build_networks

# ---- the same numbers

def weights_file(folder):
    file, = (f for part in ('unet', 'transformer') for f in Path(folder, part).glob('*.safetensors'))
    return file

def halved(folder):
    "A teacher whose network lies in float16, as many are published"
    tiny_pipeline(folder)
    file = weights_file(folder)
    save_file({k: v.half() for k, v in load_file(file).items()}, file, dict(format='pt'))
    return folder

def in_bin(folder):
    "A teacher whose network's files cannot be read tensor by tensor: it is opened whole"
    tiny_pipeline(folder)
    file = weights_file(folder)
    torch.save(load_file(file), file.with_suffix('.bin'))
    file.unlink()
    return folder

SIDA = dict(real_images='real', freeze_generator_until=0, gan_start=0)
CASES = {
    'fp32': (tiny_pipeline, {}),
    'bf16': (tiny_pipeline, dict(mixed_precision='bf16', offload=('vae', 'ema'))),
    'pure bf16': (tiny_pipeline, dict(weight_dtype='bf16')),
    'shared, bf16': (tiny_pipeline, dict(lora='both', mixed_precision='bf16')),
    'shared, float16 files, bf16': (halved, dict(lora='both', mixed_precision='bf16')),
    'the fake alone, fp16': (tiny_pipeline, dict(lora='fake', mixed_precision='fp16')),
    'the generator alone': (tiny_pipeline, dict(lora='generator', mixed_precision='bf16')),
    '.bin, shared, bf16': (in_bin, dict(lora='both', mixed_precision='bf16')),
    '.bin, pure bf16': (in_bin, dict(weight_dtype='bf16')),
    'bundled, bf16': (None, dict(mixed_precision='bf16', t_init=None)),
    'SDXL, prompts encoded before': (tiny_sdxl, dict(cache_text=True, lora='both', mixed_precision='bf16')),
    'PixArt, real pictures': (tiny_pixart, SIDA),
    'SD3': (tiny_sd3, dict(mixed_precision='bf16', channels_last=False, gradient_checkpointing=True)),
    'SANA': (tiny_sana, dict(lora='fake')), 'FLUX.1': (tiny_flux, dict(lora='both')),
    'Qwen-Image': (tiny_qwen_image, dict(cache_text=True)), 'Z-Image, real pictures': (tiny_z_image, SIDA)}

@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with prompts and real pictures, where encoded prompts are kept, too"
    monkeypatch.chdir(tmp_path)
    here = prompt_files.cached_assets_path
    monkeypatch.setattr(
        prompt_files, 'cached_assets_path', lambda *names, assets_dir: here(*names, assets_dir=tmp_path/'cache'))
    Path('p.txt').write_text('a red cat\nthe blue dog\nan apple\n')
    Path('real').mkdir()
    random = np.random.default_rng(0)
    for i in range(4): Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(f'real/{i}.png')
    return tmp_path

def play(opened=None, **more):
    "Three iterations: everything that has numbers, and the fingerprint"
    known = dict(teacher='teacher', prompts='p.txt', device='cpu', total_batch_size=2, micro_batch=1, lr=1e-3,
                 lr_fake=1e-3, max_train_images=6, lora_rank=2, kappa=1.5, seed=5)
    job = setup(Config(**known | more), teacher=opened)
    for s in iterate(job):
        if s.nimg >= 6: break
    nets = dict(teacher=job.teacher.denoiser, **{f'ema {i}': e.net for i, e in enumerate((job.ema, *job.more_emas))})
    states = {k: n.state_dict() for k, n in nets.items()}
    for role, learner in job.nets.learners.items():
        states |= {role: learner.net.state_dict(), f'moments of {role}': {
            f'{i} {k}': v for i, s in enumerate(learner.optimizer.state.values()) for k, v in s.items()}}
    return job, {k: {n: v.clone() for n, v in s.items()} for k, s in states.items()}

@pytest.mark.parametrize('case', CASES)
def test_a_run_is_the_same_as_one_whose_teacher_was_opened_whole(place, case):
    make, more = CASES[case]
    teacher = make(place/'teacher') if make else 'embedded'
    more = more | dict(teacher=str(teacher))
    (job, lazy), (whole_job, whole) = play(**more), play(open_teacher(teacher), **more)
    assert job.teacher_sha == whole_job.teacher_sha and lazy.keys() == whole.keys()
    for role, state in whole.items():
        assert state.keys() == lazy[role].keys() and (state or 'teacher' in role or more.get('lora')), role
        for k, v in state.items(): assert v.dtype == lazy[role][k].dtype and torch.equal(v, lazy[role][k]), (role, k)
    assert not any(p.is_meta for net in job.teacher.modules().values() for p in net.parameters())

STARTS = (
    ('lora', 'none'), ('lora', 'both'), ('student', 'fake'),
    ('student/unet/diffusion_pytorch_model.safetensors', 'none'))

@pytest.mark.parametrize('init, lora', STARTS)
def test_a_generator_that_does_not_begin_as_the_teacher(place, init, lora):
    "A LoRA's factors, the teacher's weights with them, a student's folder and its file"
    tiny_pipeline('teacher')
    job, _ = play(lora='both')
    save_student(job.teacher, plain_copy(job.ema.net), 'student', job.t_init)
    export_to(Export('student', to='lora', base='teacher', device='cpu', rank=2, out='lora'))
    more = dict(init=init, lora=lora, t_init=625, mixed_precision='bf16')
    (_, lazy), (_, whole) = play(**more), play(open_teacher('teacher'), **more)
    for role, state in whole.items():
        for k, v in state.items(): assert torch.equal(v, lazy[role][k]), (role, k)

# ---- what goes to the device

class Device(TorchDispatchMode):
    "Counts bytes that live on the meta device because somebody moved them there; it stands for a GPU"

    def __init__(self):
        super().__init__()
        self.sizes, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, given = func(*args, **kwargs), [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        cast = func.overloadpacket == torch.ops.aten._to_copy and given[0].is_meta  # of one that waits in its files
        moved = str(kwargs.get('device')) == 'meta' and not cast
        made_of = any(t.is_meta and t.untyped_storage()._cdata in self.sizes for t in given)
        if moved or made_of:
            for t in tree_leaves(out): self.add(t.untyped_storage()) if torch.is_tensor(t) and t.is_meta else None
        return out

    def add(self, storage):
        if storage._cdata in self.sizes: return
        self.sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most = max(self.most, self.held)

    @property
    def held(self): return sum(self.sizes.values())

def nbytes(*modules):
    "Of all their tensors, each counted once"
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.nbytes for t in tensors.values())

META = torch.device('meta')
ALONE = SimpleNamespace(device=META, run_on_all=lambda f: f(), require_same=lambda words: None)

def opened():
    "The teacher as `setup` opens it"
    with weights_in_files(): return open_teacher('teacher')

def settings(**more):
    return settings_of(resolve(Config(teacher='teacher', prompts='p.txt', device='cpu', **more), 1))

WIDTHS = {  # bytes per weight of the network: its own formats, and those of what learns
    ('none', 'no'): 4 + 4 + 4, ('none', 'bf16'): 2 + 4 + 4, ('fake', 'bf16'): 2 + 4, ('generator', 'bf16'): 2 + 4,
    ('both', 'bf16'): 2, ('both', 'no'): 4}

@pytest.mark.parametrize('make', [tiny_pipeline, tiny_sd3, in_bin])
@pytest.mark.parametrize('lora, precision', WIDTHS)
def test_networks_reach_the_device_in_the_format_that_they_keep(place, make, lora, precision):
    make(place/'teacher')
    s = settings(lora=lora, mixed_precision=precision, lora_rank=1)
    teacher = opened()
    method, net = make_method(with_times(s.recipe, teacher), teacher.latent_shape), teacher.denoiser
    weights = sum(p.numel() for p in net.parameters())
    with Device() as device: frozen, learning = build_networks(s.networks, teacher, method, device=META)
    thin = nbytes(*(n.net.own for n in learning.values() if isinstance(n.net, LoraView)))
    wholes = {getattr(n.net, 'base', n.net) for n in (frozen, *learning.values())}
    tables = sum(b.nbytes for m in wholes for b in m.buffers())
    assert device.most == device.held == WIDTHS[lora, precision]*weights + thin + tables

@pytest.mark.parametrize('lora', ['none', 'both'])
def test_a_teacher_in_8_bits_is_there_in_more_one_layer_at_a_time(place, lora):
    tiny_sd3('teacher')
    s, teacher = settings(lora=lora, int8_teacher=True, lora_rank=1), opened()
    method, net = make_method(with_times(s.recipe, teacher), teacher.latent_shape), teacher.denoiser.net
    own = teacher_bytes(net, MemorySettings(int8_teacher=True)) + net.pos_embed.pos_embed.nbytes
    largest = max(m.weight.numel() for m in block_linears(net).values())
    with Device() as device: _, learning = build_networks(s.networks, teacher, method, device=META)
    held = own + nbytes(*(n.net.own if lora == 'both' else n for n in learning.values()))
    assert device.held == held < device.most <= held + INT8_ROOM*largest

@pytest.mark.parametrize('offload', [(), ('vae',)])
def test_the_text_encoder_visits_the_device_and_the_vae_stays_away(place, offload, monkeypatch):
    "With `cache_text` it is there while it encodes, and never in a second run; what stays was moved once"
    tiny_sdxl('teacher')
    held = []
    def write(file, prompts, encode):
        held.append(device.held)
        np.save(file, np.zeros(len(prompts), [('encoder_hidden_states', '<f4', (1, 16))]))
    to = torch.nn.Module.to
    def back(m, *where):  # numbers do not come back from this device
        return m.to_empty(device='cpu') if where == ('cpu',) and next(m.parameters()).is_meta else to(m, *where)
    monkeypatch.setattr(text_cache, 'write_records', write)
    monkeypatch.setattr(torch.nn.Module, 'to', back)
    teacher = open_teacher('teacher')
    vae = 0 if offload else nbytes(teacher.vae)
    text = nbytes(*(m for k, m in teacher.pipe.components.items() if k.startswith('text_encoder') and m is not None))
    for cache, during, then in ((True, [vae + text]*2, vae), (True, [], vae), (False, [], vae + text)):
        held.clear()
        s, teacher = settings(cache_text=cache, offload=offload).teacher, opened()
        with Device() as device:
            teacher, _ = open_on_all_ranks(s, ALONE, teacher)
            teacher = place_text(s, teacher, open_prompts('p.txt'), META)
            assert (held, device.held) == (during, then) and device.most == max([then, *during])
        assert teacher.device.type == 'meta' and teacher.vae.device.type == ('cpu' if offload else 'meta')

# ---- how much memory it takes

PEAK = """
import ctypes, gc, json, re, sys
from dataclasses import replace
from pathlib import Path
from sid_lsg_nb.teachers.registry import model_shapes, open_teacher
from sid_lsg_nb.training.config import Config, resolve
from sid_lsg_nb.training.job import setup
from sid_lsg_nb.training.memory import MemorySettings, host_budget, setup_budget

ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed is given back, and not kept for later

def memory(word): return int(re.search(rf'{word}:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])*1024

config = Config(teacher='teacher', prompts='p.txt', device='cpu', total_batch_size=2, micro_batch=1, max_train_images=8,
                **dict(mixed_precision='bf16', lora_rank=4) | json.loads(sys.argv[2]))
setup(replace(config, teacher='small', lora='none'))  # what libraries take at their first use is not counted
gc.collect()
Path('/proc/self/clear_refs').write_text('5')
before = memory('VmRSS')
job = setup(config, teacher=open_teacher('teacher') if sys.argv[1] == 'whole' else None)
peak, shapes = memory('VmHWM') - before, model_shapes('teacher')
weights = [p.numel() for p in shapes.build().parameters()]
settings = MemorySettings.of(resolve(config, 1), guided=True)
counted = max(setup_budget(shapes, settings).values()) + host_budget(shapes, settings)['then'] + 4*max(weights)
print(json.dumps(dict(peak=peak, counted=counted, weights=sum(weights))))
"""

def measured(how, **more):
    "A set-up's worst moment; what is counted for device and host, with the largest tensor; weights of the network"
    process = Forked(['-c', PEAK, how, json.dumps(more)], Path.cwd())
    (status, out, err), = finish([process], 120)
    assert status == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])

@pytest.fixture
def large(place):
    "92 million weights, and a small network of the same kind"
    for folder in ('small', 'teacher'): tiny_sd3(folder)
    config = SD3Transformer2DModel.load_config('teacher/transformer')
    more = dict(num_layers=10, attention_head_dim=64, num_attention_heads=8, caption_projection_dim=512)
    SD3Transformer2DModel.from_config(config, **more).save_pretrained('teacher/transformer')

reads_proc = pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='reads /proc')

@reads_proc
def test_a_shared_network_is_never_there_in_float32(large):
    lazy, whole = (measured(how, lora='both') for how in ('lazy', 'whole'))
    assert lazy['peak'] < 2.5*lazy['weights']  # two bytes of bf16, one tensor, and no copy of four bytes
    assert whole['peak'] > 4*whole['weights']  # so that a copy in float32 would be seen

@reads_proc
@pytest.mark.parametrize('more', [
    dict(lora='both'), dict(lora='fake'), dict(offload=('vae', 'ema')), dict(mixed_precision='no', weight_dtype='bf16'),
    dict(lora='both', int8_teacher=True)])
def test_a_dry_run_counts_the_set_up(large, more):
    said = measured('lazy', **more)
    print(said['peak']/said['counted'])
    assert .85 < said['peak']/said['counted'] < 1.15
