"""The whole loop with a small random teacher of every family: trained, saved in its family's way, opened again, drawn.

Not one line of the loop knows a family. Everything that may learn has moved, what may not has not, the teacher is
what it was, nothing was skipped, all numbers are finite; and stock diffusers draws with the saved folder what the
generator draws."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, Flux2KleinPipeline, FluxPipeline, QwenImagePipeline
from diffusers import UNet2DConditionModel, UNet2DModel
from sid_lsg_nb.core import max_abs, noise_for, rng
from sid_lsg_nb.data.prompt_stream import PromptStream, text_batches
from sid_lsg_nb.method.guidance import Kappa
from sid_lsg_nb.method.optim import EMA, make_adam
from sid_lsg_nb.method.rollout import one_step
from sid_lsg_nb.method.methods import Recipe, make_method
from sid_lsg_nb.method.steps import Learner, Networks, distill
from sid_lsg_nb.teachers.edm import edm_teacher, save_edm, tiny_edm
from sid_lsg_nb.teachers.edm_networks import wrap_unet2d
from sid_lsg_nb.teachers.registry import open_student, open_teacher
from sid_lsg_nb.teachers.student import save_student
from sid_lsg_nb.teachers.qwen_image import UNHEARD
from sid_lsg_nb.testing import tiny_flux, tiny_flux2, tiny_pipeline, tiny_pixart, tiny_qwen_image, tiny_sana, tiny_sd3
from sid_lsg_nb.testing import tiny_sdxl, tiny_vae, tiny_z_image

PROMPTS = ['a red cat', 'the blue dog on a shoe', 'an apple', 'the green apple']
SID_DIT = dict(
    alpha=1.0,
    loss_weight='1-t',
    timestep_sampling='logit-normal',
    fake_loss_weight='velocity',
    t_min=0.001,
    t_max=0.999,
)
SID_EDM = dict(alpha=1.2, timestep_sampling_fake='edm', fake_loss_weight='edm')

# ---- the teachers

def edit(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))

def tiny_sd21(folder, **scheduler):
    "Stable Diffusion 2.1 at 768 pixels: v-prediction, latents of 96x96, little attention (which takes time)"
    folder = Path(tiny_pipeline(folder, 'v_prediction', seed=4))
    edit(folder / 'scheduler/scheduler_config.json', **scheduler)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        unet = UNet2DConditionModel(
            sample_size=96,
            layers_per_block=1,
            block_out_channels=(4, 8, 8, 8),
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=(1, 2, 2, 2),
            use_linear_projection=True,
            down_block_types=(*('DownBlock2D',) * 3, 'CrossAttnDownBlock2D'),
            up_block_types=('CrossAttnUpBlock2D', *('UpBlock2D',) * 3),
        )
    vae = AutoencoderKL.from_config(tiny_vae().config, mid_block_add_attention=False)
    for name, part in dict(unet=unet, vae=vae).items():
        shutil.rmtree(folder / name)
        part.save_pretrained(folder / name)
    return open_teacher(folder)

def tiny_unet2d(folder):
    "diffusers' own U-Net with ten classes inside EDM's preconditioning"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
            up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
            norm_num_groups=4,
            attention_head_dim=8,
            num_class_embeds=10,
        )
    return edm_teacher(wrap_unet2d(unet))

def opened(make, **options):
    return lambda folder: open_teacher(make(folder, **options))

def edm(arch='ddpmpp', classes=0):
    return lambda folder: open_teacher(save_edm(tiny_edm(arch, classes).denoiser.net, folder))

@dataclass(frozen=True)
class Case:
    make: Callable  # folder -> teacher
    kappa: Kappa = Kappa.lsg(1.5)
    recipe: dict = field(default_factory=dict)
    lr: float = 1e-3
    iterations: int = 3
    batch: int = 4
    micro: int = 2
    call: dict = field(
        default_factory=dict
    )  # what stock diffusers is told, besides one step without guidance
    stock: bool = True  # does stock diffusers open the student?
    pack: Callable = lambda z: z  # latents as the stock pipeline takes them
    unpack: Callable = lambda z: z  # and back

SQUARE = dict(use_resolution_binning=False)
ZERO_SNR = dict(rescale_betas_zero_snr=True, timestep_spacing='trailing')
SMALL = dict(kappa=Kappa.lsg(2.0), iterations=2, batch=1, micro=1)
FLUX = dict(
    call=dict(guidance_scale=3.5), pack=lambda z: FluxPipeline._pack_latents(z, *z.shape),
    unpack=lambda z: FluxPipeline._unpack_latents(z, 8, 8, 1))
QWEN = dict(
    call=dict(true_cfg_scale=1), pack=lambda z: QwenImagePipeline._pack_latents(z, *z.shape),
    unpack=lambda z: QwenImagePipeline._unpack_latents(z, 8, 8, 1)[:, :, 0])
BATCH_NORM = [v.view(1, -1, 1, 1) for v in (torch.linspace(-.5, .5, 16), torch.sqrt(torch.linspace(.5, 2., 16) + 1e-4))]
FLUX2 = dict(
    call=dict(guidance_scale=0),
    unpack=lambda z: (Flux2KleinPipeline._patchify_latents(z) - BATCH_NORM[0])/BATCH_NORM[1])
CASES = {
    'sd': Case(opened(tiny_pipeline)),
    'sd21': Case(tiny_sd21, **SMALL),
    'sd21-zero-snr': Case(
        lambda folder: tiny_sd21(folder, **ZERO_SNR), **SMALL, recipe=dict(loss_weight='snr')
    ),
    'sdxl': Case(opened(tiny_sdxl)),
    'pixart-alpha': Case(opened(tiny_pixart), call=SQUARE),
    'pixart-sigma': Case(opened(tiny_pixart, kind='PixArtSigmaPipeline'), call=SQUARE),
    'sd3': Case(opened(tiny_sd3)),
    'sd3-sid-dit': Case(opened(tiny_sd3), Kappa.lsg(4.5), SID_DIT, lr=1e-4),
    'sana': Case(opened(tiny_sana), call=SQUARE),
    'sana-sid-dit': Case(opened(tiny_sana), Kappa.lsg(4.5), SID_DIT, lr=1e-4, call=SQUARE),
    'sana-1.5': Case(opened(tiny_sana, qk_norm='rms_norm_across_heads'), Kappa.lsg(4.5), SID_DIT, lr=1e-4, call=SQUARE),
    'flux': Case(opened(tiny_flux), Kappa.lsg(4.5), SID_DIT, lr=1e-4, **FLUX),
    'flux2-klein': Case(opened(tiny_flux2), Kappa.lsg(4.5), SID_DIT, lr=1e-4, **FLUX2),
    'qwen-image': Case(opened(tiny_qwen_image), Kappa.lsg(4.5), SID_DIT, lr=1e-4, **QWEN),
    'z-image': Case(opened(tiny_z_image), Kappa.lsg(4.5), SID_DIT, lr=1e-4, call=dict(guidance_scale=0)),
    'edm': Case(edm(classes=10), Kappa(), stock=False),
    'edm-no-classes': Case(edm(), Kappa(), SID_EDM, lr=1e-4, iterations=4, stock=False),
    'edm-ncsnpp': Case(edm('ncsnpp', 10), Kappa(), SID_EDM, lr=1e-4, iterations=4, stock=False),
    'edm-unet2d': Case(tiny_unet2d, Kappa(), SID_EDM, lr=1e-4, iterations=4, stock=False),
}

# ---- the loop

def train(case, teacher):
    "A few iterations -> both learners, the average, and what each iteration said"
    lo, hi = teacher.schedule.default_range
    recipe = Recipe(kappa=case.kappa, **dict(t_min=lo, t_max=hi, t_init=teacher.default_t_init) | case.recipe)
    teacher.check_guidance(recipe.kappa)
    teacher.check_t_init(recipe.t_init)

    def learner():
        net = teacher.denoiser.copy()
        return Learner(net, make_adam([p for p in net.parameters() if p.requires_grad], lr=case.lr))

    fake, gen = learner(), learner()
    ema, prompts = EMA(gen.net, halflife=4), teacher.prompts if teacher.brings_prompts else PROMPTS
    batches = text_batches(PromptStream(prompts, 0), teacher.text, case.batch, case.micro, 0.5, rng(3))
    nets = Networks(teacher.denoiser, dict(fake=fake, generator=gen), teacher.text.null())
    states = distill(nets, make_method(recipe), batches, teacher.latent_shape, rng=rng(1), ema=ema)
    said = [s for _, s in zip(range(case.iterations), states)]
    return SimpleNamespace(fake=fake.net, gen=gen.net, ema=ema.net, said=said, recipe=recipe, prompts=prompts)

@pytest.fixture(scope='module', params=CASES)
def trained(request, tmp_path_factory):
    case, tmp = CASES[request.param], tmp_path_factory.mktemp(request.param)
    teacher = case.make(tmp / 'teacher')
    before = {k: v.clone() for k, v in teacher.denoiser.state_dict().items()}
    run = train(case, teacher)
    run.name, run.case, run.tmp, run.teacher, run.before = request.param, case, tmp, teacher, before
    return run

def test_nothing_is_skipped(trained):
    for s in trained.said:
        assert all(v.isfinite() for v in s.logs.values())
        assert s.logs['norm_fake'] > 0 and s.logs['norm'] > 0 and s.logs['fisher'] > 0
        assert [float(s.logs[k]) for k in ('skipped_fake', 'skipped', 'dropped_fake', 'dropped')] == [0.0] * 4
    assert trained.said[-1].nimg == trained.case.iterations * trained.case.batch

def test_all_that_may_learn_moves(trained):
    for net in (trained.fake, trained.gen):
        for k, p in net.named_parameters():
            assert (max_abs(p, trained.before[k]) > 1e-6) == p.requires_grad, k
    assert any(max_abs(p, trained.before[k]) > 1e-6 for k, p in trained.ema.named_parameters())

def test_teacher_stays(trained):
    for k, v in trained.teacher.denoiser.state_dict().items():
        assert torch.equal(v, trained.before[k]), k

def test_what_cannot_learn(trained):
    "What makes an answer that the last block of SD3, Qwen-Image throws away; the map of EDM's augment labels; no other"
    still = [k for k, p in trained.gen.named_parameters() if torch.equal(p, trained.before[k])]
    assert still == [k for k, p in trained.fake.named_parameters() if torch.equal(p, trained.before[k])]
    block = 'net.transformer_blocks.1.attn.'
    want = [block + 'add_q_proj.weight', block + 'add_q_proj.bias'] if trained.name.startswith('sd3') else []
    if trained.name == 'qwen-image':
        unheard = tuple(f'net.transformer_blocks.1.{part}.' for part in UNHEARD)
        want = [k for k in trained.before if k.startswith(unheard)]
    song = trained.name.startswith('edm') and trained.name != 'edm-unet2d'
    assert still == (['net.model.map_augment.weight'] if song else want)

def test_variance_rows_stay(trained):
    "The loss never sees the channels of PixArt's last layer that make the variance; channels run fastest there"
    if not trained.name.startswith('pixart'):
        pytest.skip('no variance')
    variance = torch.arange(2 * 2 * 8) % 8 >= 4
    for net in (trained.fake, trained.gen):
        for k, v in net.state_dict().items():
            if 'proj_out' not in k:
                continue
            moved = (v - trained.before[k]).abs().reshape(len(v), -1).amax(1)
            assert (moved > 0).tolist() == (~variance).tolist()

def test_the_average_is_saved_and_draws(trained):
    folder, t_init = trained.tmp / 'student', trained.recipe.t_init
    save_student(trained.teacher, trained.ema, folder, t_init)
    student, two = open_student(folder), trained.prompts[:2] * (2 // len(trained.prompts[:2]))
    pictures, four = student(two, [5, 6]), student(two, [5, 6], steps=4)
    assert pictures.shape[:2] == (2, 3) and pictures.isfinite().all() and four.isfinite().all()
    z = noise_for([5, 6], trained.teacher.latent_shape)
    with torch.no_grad():
        ours = one_step(trained.ema, z, trained.teacher.text(two), t_init)
    want = trained.teacher.decode(ours)
    assert pictures.shape == want.shape and max_abs(pictures, want) < 1e-5

def test_stock_diffusers_draws_what_the_generator_draws(trained):
    if not trained.case.stock:
        pytest.skip('saved in a format of its own')
    t, gen, t_init = trained.teacher, trained.gen, trained.recipe.t_init
    two, z = list(trained.prompts[:2]), noise_for([7, 8], t.latent_shape)
    pipe = DiffusionPipeline.from_pretrained(save_student(t, gen, trained.tmp / 'stock', t_init))
    pipe.set_progress_bar_config(disable=True)
    one = dict(latents=trained.case.pack(z), num_inference_steps=1, guidance_scale=0, output_type='latent')
    side = (
        {k: t.image_size[0] if getattr(t, 'image_size', None) else t.latent_shape[1] * pipe.vae_scale_factor for k in ('height', 'width')}
        if trained.case.call
        else {}
    )
    given = list(two)  # Z-Image's pipeline writes into it
    theirs = trained.case.unpack(pipe(prompt=given, **one | side | trained.case.call).images)
    with torch.no_grad():
        ours, untrained = (one_step(net, z, t.text(two), t_init) for net in (gen, t.denoiser))
    assert max_abs(theirs, ours) < 1e-5 * ours.abs().max() and max_abs(ours, untrained) > 1e-4

def test_teacher_draws_with_guidance(trained):
    t, two = trained.teacher, trained.prompts[:1] * 2
    kappa = 3.0 if trained.case.stock else 1.0
    many = t.sample(noise_for([3, 4], t.latent_shape), t.text(two), t.text.null(), kappa, 4)
    assert many.isfinite().all()
