"""One .safetensors or .ckpt file in the layout of the original code.

What our export writes is read back to the bit, what is not whole is refused in one line, and the table of published
models fits the published sizes."""

import json
from types import SimpleNamespace
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from sid_lsg_nb.core import InputError, max_abs, noise_for
from sid_lsg_nb.export.formats import save_single_file, unet_key, vae_key
from sid_lsg_nb.teachers import single_file as S
from sid_lsg_nb.teachers.stable_diffusion import StableDiffusionTeacher, load_sd
from sid_lsg_nb.teachers.loading import find_class, load_part_config
from sid_lsg_nb.teachers.registry import known_single_file_models
from sid_lsg_nb.teachers.student import save_student

KNOWN = known_single_file_models()

@pytest.fixture(scope='module')
def bundled(tmp_path_factory):
    "The bundled teacher, and the same as one file"
    tmp, teacher = tmp_path_factory.mktemp('single'), load_sd()
    out = save_student(teacher, teacher.denoiser, tmp / 'student')
    file = save_single_file(out, tmp / 'one.safetensors', torch.float32)
    return SimpleNamespace(teacher=teacher, tmp=tmp, file=file, state=load_file(file))

# ---- out and in again

@pytest.mark.parametrize('kind', ['safetensors', 'ckpt'])
def test_round_trip_to_the_bit(bundled, kind):
    teacher, file = bundled.teacher, bundled.file
    if kind == 'ckpt':
        file = bundled.tmp / 'one.ckpt'
        torch.save(dict(state_dict=bundled.state, global_step=7, epoch=1), file)
    again = StableDiffusionTeacher.from_pipeline(S.open_single_file(file, KNOWN), file)
    z, t = noise_for([1, 2], teacher.latent_shape), torch.tensor([625, 20])
    cond = teacher.text(['a 3d fox on a white background', ''])
    assert max_abs(again.denoiser(z, t, cond), teacher.denoiser(z, t, cond)) == 0
    words, same = (t.text(['a 3d fox', ''])['encoder_hidden_states'] for t in (teacher, again))
    assert max_abs(same, words) == 0
    assert max_abs(again.decode(z), teacher.decode(z)) == 0
    assert max_abs(again.schedule.alphas, teacher.schedule.alphas) == 0

    light = StableDiffusionTeacher.from_pipeline(S.open_single_file(file, KNOWN, weights=False), file, 'meta')
    assert light.device.type == 'meta' and light.latent_shape == teacher.latent_shape

def test_header_says_the_prediction(bundled):
    assert S.read_single_file(bundled.file)[1]['modelspec.prediction_type'] == 'epsilon'
    assert S.open_single_file(bundled.file, KNOWN, 'v_prediction').scheduler.config.prediction_type == 'v_prediction'

# ---- what cannot be opened

def without(prefix):
    return lambda s: [s.pop(k) for k in list(s) if k.startswith(prefix)]

def replaced(key, *shape):
    return lambda s: s.update({key: torch.zeros(*shape)})

@pytest.mark.parametrize(
    'change, words',
    [
        (without('model.diffusion_model.'), ['no U-Net']),
        (without('first_stage_model.'), ['no VAE']),
        (without('cond_stage_model.'), ['no text encoder']),
        (replaced(S.FIRST_KEY, 96, 9, 3, 3), ['takes 9 channels']),
        (replaced(S.CONTEXT_KEY, 96, 1280), ['1280', 'none of']),
        (replaced(S.LABELS_KEY, 8, 8), ['with labels']),
        (without('model.diffusion_model.out.2'), ['lacks 2 of', 'conv_out']),
        (without('first_stage_model.decoder.conv_in'), ['of the vae']),
    ],
)
def test_changed_file_is_refused(bundled, change, words):
    "In one line, the same with and without weights"
    changed, said = dict(bundled.state), []
    change(changed)
    save_file(changed, bundled.tmp / 'changed.safetensors')
    for weights in (False, True):
        with pytest.raises(InputError) as e:
            S.open_single_file(bundled.tmp / 'changed.safetensors', KNOWN, weights=weights)
        said.append(str(e.value))
    assert said[0] == said[1] and all(w in said[0] for w in words) and '\n' not in said[0], said[0]

def test_cut_file_is_refused(bundled):
    (bundled.tmp / 'cut.safetensors').write_bytes(bundled.file.read_bytes()[:5000])
    with pytest.raises(InputError, match='cannot be read'):
        S.open_single_file(bundled.tmp / 'cut.safetensors', KNOWN)

# ---- the published sizes, in shapes on the meta device

LABEL_KEYS = {'add_embedding.linear_1': 'label_emb.0.0', 'add_embedding.linear_2': 'label_emb.0.2'}

def original_key(key, unet):
    "Name of a U-Net's tensor in the original code"
    attends = [b.startswith('CrossAttn') for b in unet.config.up_block_types]
    labels = (f'{new}.{key.rsplit(".", 1)[1]}' for old, new in LABEL_KEYS.items() if key.startswith(old))
    return next(labels, None) or unet_key(key, unet.config.layers_per_block, attends)

def file_of(model):
    "Names and shapes of a whole file of this model (without SDXL's second text encoder), and its networks"
    with torch.device('meta'):
        unet = UNet2DConditionModel(**model.unet)
        vae = AutoencoderKL(**{k: v for k, v in model.vae.items() if k[:1] != '_'})
    file = {f'model.diffusion_model.{original_key(k, unet)}': v for k, v in unet.state_dict().items()}
    file |= {f'first_stage_model.{vae_key(k, 4)}': v for k, v in vae.state_dict().items()}
    return file | {'cond_stage_model.x': torch.empty(1, device='meta')}, dict(unet=unet, vae=vae)

SIZES = {
    'Stable Diffusion 1.x': (859_520_964, 64),
    'Stable Diffusion 2.x': (865_910_724, 96),
    'SDXL': (2_567_463_684, 128),
}

@pytest.mark.parametrize('name', SIZES)
def test_published_sizes(name, tmp_path):
    model, (size, side) = KNOWN[name], SIZES[name]
    shapes, made = file_of(model)
    assert sum(p.numel() for p in made['unet'].parameters()) == size
    assert S.detect_model(shapes, KNOWN, name) is model
    S.check_tensors(made, shapes, name)
    S.write_configs(model, tmp_path / 'configs', 'v_prediction')
    assert json.loads((tmp_path / 'configs/unet/config.json').read_text())['sample_size'] == side
    kinds = {k: find_class(v[0]) for k, v in model.layout.parts.items() if k.startswith('text')}
    folders = {k: tmp_path / 'configs' / k for k in kinds}
    with torch.device('meta'):
        texts = {k: kind(load_part_config(folders[k], kind, name)) for k, kind in kinds.items()}
    if name == 'SDXL':
        assert sum(p.numel() for p in texts['text_encoder_2'].parameters()) == 694_659_840

def test_every_model_has_its_size():
    assert {*KNOWN} == {*SIZES, 'bundled'}

def test_prediction():
    "A file of Stable Diffusion 2.x must say it; a marker that trainers of SDXL leave is read"
    with pytest.raises(InputError, match='--prediction-type epsilon'):
        S.detect_prediction_type(KNOWN['Stable Diffusion 2.x'], {}, {}, 'x')
    header = {'modelspec.prediction_type': 'v'}
    assert S.detect_prediction_type(KNOWN['Stable Diffusion 2.x'], {}, header, 'x') == 'v_prediction'
    assert S.detect_prediction_type(KNOWN['SDXL'], {'v_pred': 0}, {}, 'x') == 'v_prediction'
