"""What leaves the package, for every family: read back by stock diffusers alone, it draws what the saved student draws.

Each family's small random teacher is trained for two steps with `--lora both`; what the command prints to use an export
is run as it stands."""

import contextlib
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.torch import load_file
from sid_lsg_nb.commands.convert import export_to
from sid_lsg_nb.commands.options import Export
from sid_lsg_nb.core import InputError, max_abs, noise_for
from sid_lsg_nb.export.lora import KOHYA, save_lora
from sid_lsg_nb.teachers.registry import FAMILIES, family_of, open_student
from sid_lsg_nb.teachers.student import save_student
from sid_lsg_nb.testing import tiny_flux, tiny_flux2, tiny_pipeline, tiny_pixart, tiny_qwen_image, tiny_sana, tiny_sd3
from sid_lsg_nb.testing import tiny_sdxl, tiny_z_image
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.job import iterate, setup
from sid_lsg_nb.training.memory import plain_copy

RANK, PROMPTS = 3, ['a red cat', 'the blue dog on a shoe']

@dataclass(frozen=True)
class Case:
    make: Callable  # folder -> a random teacher's
    pipeline: str  # class of diffusers
    call: dict = field(default_factory=dict)  # of the stock pipeline, besides what its folder says
    pack: Callable = lambda z: z  # latents as the stock pipeline takes them
    kohya: bool = True  # does stock diffusers read kohya's file at the size of the twin?

SQUARE = dict(use_resolution_binning=False)

def pack(z): return diffusers.FluxPipeline._pack_latents(z, *z.shape)

CASES = {
    'sd': Case(tiny_pipeline, 'StableDiffusionPipeline'),
    'sdxl': Case(tiny_sdxl, 'StableDiffusionXLPipeline'),
    'pixart': Case(tiny_pixart, 'PixArtAlphaPipeline', SQUARE | dict(clean_caption=False)),
    'sd3': Case(tiny_sd3, 'StableDiffusion3Pipeline'),
    'sana': Case(tiny_sana, 'SanaPipeline', SQUARE),
    'flux': Case(tiny_flux, 'FluxPipeline', pack=pack, kohya=False),
    'flux2': Case(tiny_flux2, 'Flux2KleinPipeline'),
    'qwen-image': Case(tiny_qwen_image, 'QwenImagePipeline', pack=pack),
    'z-image': Case(tiny_z_image, 'ZImagePipeline'),
}

def test_no_family_is_left_out():
    able = {k for k, family in FAMILIES.items() if 'lora' in family.exports} - {'PixArtSigmaPipeline'}
    assert {case.pipeline for case in CASES.values()} == able

@pytest.fixture(scope='module', params=CASES)
def trained(request, tmp_path_factory):
    "Two steps of a run whose generator and fake are LoRAs, and what stock diffusers draws with the student"
    case, tmp = CASES[request.param], tmp_path_factory.mktemp(request.param)
    case.make(tmp / 'teacher')
    (tmp / 'prompts.txt').write_text('\n'.join(PROMPTS))
    job = setup(Config(teacher=str(tmp / 'teacher'), prompts=str(tmp / 'prompts.txt'), device='cpu', lora='both',
                       lora_rank=RANK, total_batch_size=4, lr=3e-3, lr_fake=3e-3, ema_halflife=2))
    for _, state in zip(range(2), iterate(job)): assert all(v.isfinite().all() for v in state.logs.values())
    save_student(job.teacher, plain_copy(job.ema.net), tmp / 'student', job.settings.recipe.t_init)
    latent = open_student(tmp / 'student').latent_shape
    call = family_of(tmp / 'student').student_start(tmp / 'student').call | case.call

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        z = noise_for([7, 8], latent).to(next(pipe.vae.parameters()).dtype)
        options = dict(latents=case.pack(z), output_type='pt') | call
        return pipe(prompt=list(PROMPTS), **options).images.float()  # Z-Image's pipeline writes into the list

    pipe = DiffusionPipeline.from_pretrained(tmp / 'student')
    return SimpleNamespace(tmp=tmp, draw=draw, pictures=draw(pipe), case=case)

def export(trained, to, run='student', **options):
    with contextlib.redirect_stdout(io.StringIO()):
        return export_to(Export(str(trained.tmp / run), to, device='cpu' if to == 'lora' else 'auto', **options))

def typed(said):
    "What the printed lines open, as they stand, up to the picture"
    names = {}
    exec('\n'.join(said[1:]).split('; image')[0], names)
    return names['pipe']

# ---- a LoRA

def test_lora_on_the_base_draws_what_the_student_draws(trained):
    said = export(trained, 'lora', dtype='fp32', rank=RANK, base=str(trained.tmp / 'teacher'))
    assert f'rank {RANK};' in said[0] and ' 0.00% of the squared change' in said[0]
    pipe = typed(said)
    assert max_abs(trained.draw(pipe), trained.pictures) < 5e-6
    without = DiffusionPipeline.from_pretrained(trained.tmp / 'teacher', scheduler=pipe.scheduler)
    assert max_abs(trained.draw(without), trained.pictures) > 1e-3

def test_kohya_file_draws_the_same_or_is_refused(trained):
    base, student, out = (str(trained.tmp / k) for k in ('teacher', 'student', 'with-kohya'))
    write = lambda: save_lora(base, student, out, RANK, torch.float32, kohya=True)
    if trained.case.pipeline not in KOHYA:
        with pytest.raises(InputError, match='leave --kohya away'): write()
        return
    write()
    if not trained.case.kohya: return  # read at its real width only: see the last test
    pipe = DiffusionPipeline.from_pretrained(base, scheduler=DiffusionPipeline.from_pretrained(student).scheduler)
    pipe.load_lora_weights(out, weight_name='kohya.safetensors')
    assert max_abs(trained.draw(pipe), trained.pictures) < 5e-6

# ---- 16 bits

@pytest.mark.parametrize('to, dtype, far', [('fp16', torch.float16, 2e-2), ('bf16', torch.bfloat16, 1e-1)])
def test_small_files_are_enough(trained, to, dtype, far):
    copy = shutil.copytree(trained.tmp / 'student', trained.tmp / f'lean-{to}')
    said = export(trained, to, run=copy.name)
    for big in copy.rglob('*model.safetensors'): big.unlink()
    pipe = typed(said)
    assert next(pipe.vae.parameters()).dtype == dtype
    assert max_abs(trained.draw(pipe), trained.pictures) < far
    with pytest.raises(InputError, match='no weights of its'): export(trained, to, run=copy.name)

# ---- kohya's names of families whose networks diffusers reads at their real width only

def flux_net():
    "FLUX.1's real width, one block of each kind, without weights"
    with torch.device('meta'): return diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)

def qwen_net():
    return diffusers.QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, in_channels=16,
        out_channels=4, axes_dims_rope=(4, 6, 6))

def z_image_net():
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[64, 64, 64])

def random_lora(net, skip=()):
    "A LoRA of rank 2 on every linear layer"
    g, state = torch.Generator().manual_seed(0), {}
    for name, m in net.named_modules():
        if not isinstance(m, torch.nn.Linear) or name in skip: continue
        out, inner = m.weight.shape
        state[f'{name}.lora_A.weight'] = torch.randn(2, inner, generator=g)
        state[f'{name}.lora_B.weight'] = torch.randn(out, 2, generator=g)
    return state

def products(state):
    "What each layer gets, a few columns of it"
    names = {k.removeprefix('transformer.').rpartition('.lora_')[0]: k.rpartition('.lora_')[0] for k in state}
    return {n: state[f'{k}.lora_B.weight'] @ state[f'{k}.lora_A.weight'][:, :8] for n, k in names.items()}

NETS = {
    'FluxPipeline': (flux_net, '_convert_kohya_flux_lora_to_diffusers'),
    'QwenImagePipeline': (qwen_net, '_convert_non_diffusers_qwen_lora_to_diffusers'),
    'ZImagePipeline': (z_image_net, '_convert_non_diffusers_z_image_lora_to_diffusers'),
}

@pytest.mark.parametrize('skip', [(), ('to_k',)])
@pytest.mark.parametrize('pipeline', NETS)
def test_diffusers_own_converter_leads_back(pipeline, skip):
    make, converter = NETS[pipeline]
    if not hasattr(theirs, converter): pytest.skip(f'this diffusers has no {converter}')
    net = make()
    state = random_lora(net, [n for n, _ in net.named_modules() if n.endswith(skip or '-')])
    back = products(getattr(theirs, converter)(KOHYA[pipeline](state, net)))
    want = products(state)
    assert set(back) >= set(want) and all(max_abs(back[k], want[k]) < 1e-4 for k in want)
    assert all(back[k].abs().max() == 0 for k in set(back) - set(want))

# ---- one file

def open_file(trained, file):
    "What `from_single_file` makes of it"
    kind, folder = getattr(diffusers, trained.case.pipeline), trained.tmp / 'student'
    pipe = kind.from_single_file(file, config=str(folder), local_files_only=True)
    for part in pipe.components.values(): part.eval() if isinstance(part, torch.nn.Module) else None
    return pipe

def count_numbers(tensors): return sum(v.numel() for v in tensors.values())

def test_one_file_draws_the_same_or_is_refused(trained):
    file = trained.tmp / 'one.safetensors'
    write = lambda: export(trained, 'single-file', out=str(file), dtype='fp32', title='One')
    none = 'no from_single_file in diffusers'
    refused = {'pixart': none, 'sana': none, 'flux2': none, 'qwen-image': none, 'sd3': 'not the identity'}
    why = next((words for make, words in refused.items() if CASES[make] is trained.case), '')
    if why:
        with pytest.raises(InputError, match=why): write()
        assert not file.exists()
        return
    said = write()
    kind = trained.case.pipeline
    if kind in ('FluxPipeline', 'ZImagePipeline'):  # read at the real width only, or part by part (its own chapter)
        assert 'ManualSigmas "1, 0"' in said[1] and ('FluxGuidance' in said[1]) == (kind == 'FluxPipeline')
        parts = open_student(trained.tmp / 'student').pipe.components.values()
        networks = [p.state_dict() for p in parts if isinstance(p, torch.nn.Module)]
        assert count_numbers(load_file(file)) == sum(map(count_numbers, networks))
        return
    assert 'ManualSigmas "2.5' in said[1]
    assert max_abs(trained.draw(open_file(trained, file)), trained.pictures) < 5e-6
