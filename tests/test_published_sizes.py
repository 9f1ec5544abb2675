"""The published sizes by name and by where they are published, and the sizes of folders: weights counted on the meta
device, against numbers that others state or that follow from the shapes of the files, and against open teachers."""

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, Gemma2Config, Gemma2Model, T5Config, T5EncoderModel
from sid_lsg_nb.cli import default_preset, main
from sid_lsg_nb.teachers.registry import model_shapes, open_teacher, published_models
from sid_lsg_nb.teachers.sdxl import CLIP_G
from sid_lsg_nb.teachers.stable_diffusion import CLIP_L, SD_VAE
from sid_lsg_nb.testing import tiny_flux, tiny_pipeline, tiny_pixart, tiny_qwen_image, tiny_sana, tiny_sd3, tiny_sdxl
from sid_lsg_nb.testing import tiny_flux2, tiny_z_image
from sid_lsg_nb.training.presets import HUB_PRESET

MILLIONS = {
    'sd15': 859.5, 'sd21-base': 865.9, 'sdxl': 2567.5, 'pixart-512': 610.9, 'pixart-1024': 611.3,
    'pixart-sigma-1024': 610.9, 'sd3-medium': 2028.3, 'sd35-medium': 2243.2, 'sd35-large': 8056.6,
    'sana-600m-512': 591.7, 'sana-600m': 591.7, 'sana-1.6b': 1604.5, 'sana-1.5-1.6b': 1604.6, 'sana-1.5-4.8b': 4721.8,
    'flux1-dev': 11901.4, 'flux1-schnell': 11891.2, 'qwen-image': 20430.4,
    'flux2-klein-base-4b': 3875.5, 'flux2-klein-base-9b': 9078.6, 'z-image': 6154.9}

def count(net) -> float:  # in millions
    return sum(p.numel() for p in net.parameters())/1e6

def on_meta(make):
    with torch.device('meta'): return make()

@pytest.mark.parametrize('name', MILLIONS)
def test_a_published_size_is_counted_and_its_network_takes_what_is_fed(name):
    shapes = model_shapes(name)
    d = on_meta(shapes.build)
    assert round(count(d), 1) == MILLIONS[name]
    assert model_shapes(shapes.hub_id) is shapes
    said = {k: torch.empty(1, *s, device='meta') for k, s in shapes.cond.items()}
    x = torch.empty(1, *shapes.latent, device='meta')
    if name == 'z-image': return  # its lists have lengths, which the meta device does not know
    assert d.predict(x, torch.ones(1, device='meta'), said).shape[2:] == x.shape[2:]

def test_all_published_sizes_are_in_the_list():
    assert set(MILLIONS) == set(published_models()) and default_preset('owner/name') == HUB_PRESET
    for name, family in published_models().items():
        if family.published[name].hub_id:
            assert default_preset(family.published[name].hub_id) == family.default_preset

@pytest.mark.parametrize('name, billions', [('sd3-medium', 2.08), ('sd35-medium', 2.47), ('sd35-large', 8.15)])
def test_stable_diffusion_3_with_its_table_of_positions(name, billions):
    "The published files hold that table, too: 2, 2.5 and 8.1 billion numbers, as their makers say"
    d = on_meta(model_shapes(name).build)
    assert round(count(d)/1e3 + d.net.pos_embed.pos_embed.numel()/1e9, 2) == billions

@pytest.mark.parametrize('name', [n for n in MILLIONS if n.startswith('sana')])
def test_sana_by_hand(name):
    c = model_shapes(name).config
    w, m, text = 32*c['num_attention_heads'], 80*c['num_attention_heads'], 2304
    attention = 3*w*w + w*w + w  # three maps without a bias, one with
    cross, norms = 4*(w*w + w), 4*w if c.get('qk_norm') else 0
    mix = (w*2*m + 2*m) + (9*2*m + 2*m) + m*w  # to twice the width, over neighbours, and back
    time = (256*w + w) + (w*w + w) + (6*w*w + 6*w)
    ends = (32*w + w) + time + (text*w + w) + (w*w + w) + w + 2*w + (32*w + 32)
    assert count(on_meta(model_shapes(name).build))*1e6 == c['num_layers']*(attention + cross + norms + mix + 6*w) + ends

def test_the_parts_around():
    "Text encoders and VAEs from their published configs"
    t5 = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                  feed_forward_proj='gated-gelu')
    clips = [CLIPTextConfig(**CLIP_L | dict(projection_dim=768)), CLIPTextConfig(**CLIP_G)]
    t5, small, large, gemma = map(count, on_meta(lambda: [
        T5EncoderModel(t5), *map(CLIPTextModelWithProjection, clips), Gemma2Model(Gemma2Config())]))
    wide = dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    four, sixteen, deep = map(count, on_meta(lambda: [
        AutoencoderKL(**SD_VAE), AutoencoderKL(**SD_VAE | wide),
        AutoencoderDC(
            encoder_block_types=('ResBlock',)*3 + ('EfficientViTBlock',)*3, encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
            encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), upsample_block_type='interpolate',
            decoder_block_types=('ResBlock',)*3 + ('EfficientViTBlock',)*3, decoder_layers_per_block=(3,)*6,
            decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), downsample_block_type='conv')]))
    want = dict(
        sdxl=(small + large - .589824, four), sd3=(small + large + t5, sixteen), pixart=(t5, four), sana=(gemma, deep))
    for name in MILLIONS:
        for family, (text, vae) in want.items():
            if name.startswith(family):
                shapes = model_shapes(name)
                assert (shapes.text, shapes.vae) == (round(text, 1), round(vae, 1)), name

TINY = dict(sd=tiny_pipeline, sdxl=tiny_sdxl, pixart=tiny_pixart, sd3=tiny_sd3, sana=tiny_sana, flux=tiny_flux,
            flux2=tiny_flux2, qwen=tiny_qwen_image, z=tiny_z_image,
            sana15=lambda folder: tiny_sana(folder, qk_norm='rms_norm_across_heads'),
            sigma=lambda folder: tiny_pixart(folder, kind='PixArtSigmaPipeline'))

@pytest.mark.parametrize('family', TINY)
def test_a_folder_is_counted_as_the_open_teacher_is(family, tmp_path):
    folder = TINY[family](tmp_path/'teacher')
    shapes, t = model_shapes(str(folder)), open_teacher(folder)
    assert count(shapes.build()) == count(t.denoiser.net) and shapes.latent == t.latent_shape
    read = sum(count(m) for k, m in t.pipe.components.items() if k.startswith('text_encoder'))
    if family != 'qwen': assert shapes.text == pytest.approx(read)  # its file holds two tied weights once
    assert shapes.vae == pytest.approx(sum(v.numel() for v in t.pipe.vae.state_dict().values())/1e6)
    cond = {k: tuple(v.shape[1:]) for k, v in t.text(['a red cat']).items()}
    short = dict(sd=16, sdxl=16).get(family)  # tokenizers of twins are shorter than the published
    if family == 'z': cond.pop('encoder_attention_mask')  # without one all places are text
    if family == 'sd3': assert shapes.cond.keys() == cond.keys()
    elif short: assert {k: s if len(s) == 1 else (77, *s[1:]) for k, s in cond.items()} == shapes.cond
    else: assert shapes.cond == cond

@pytest.mark.parametrize('teacher', ['stabilityai/stable-diffusion-3.5-large', 'PixArt-alpha/PixArt-XL-2-512x512'])
def test_a_dry_run_knows_it_without_a_file(teacher, capsys, tmp_path):
    (tmp_path/'p.txt').write_text('a red cat\n')
    line = f'distill --teacher {teacher} --prompts {tmp_path}/p.txt --out {tmp_path}/out --device cpu --dry-run'
    assert main(line.split()) in (0, None)
    said = capsys.readouterr().out
    assert 'memory per process' in said and f'preset: "{default_preset(teacher)}"' in said
