"""Fine-tunes that were published as a transformer alone: with the base's folder they are the teacher they were"""

import re
import pytest
import torch
from sid_lsg_nb.core import InputError, max_abs, rng
from sid_lsg_nb.export.original_layouts import Z_IMAGE_PARTS, sd3_transformer_layout, transformer_layout
from sid_lsg_nb.teachers.lone_network import PREFIX, assemble_teacher
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.testing import tiny_flux, tiny_flux2, tiny_sana, tiny_sd3, tiny_z_image
from safetensors.torch import save_file

def tuned_and_base(make, folder):
    "A teacher whose weights were moved, and the folder of the one that it came from"
    make(folder/'base')
    teacher, random = open_teacher(folder/'base'), rng(0)
    with torch.no_grad():
        for p in teacher.denoiser.parameters(): p.add_(.1*torch.randn(p.shape, generator=random))
    return teacher, folder/'base'

def asked(teacher):
    "What a network says to noise"
    cond = teacher.text(['a red cat', 'a blue dog'])
    x = torch.randn(2, *teacher.latent_shape, generator=rng(1))
    with torch.no_grad(): return teacher.denoiser.predict(x, torch.tensor([.3, .8]), cond)

LAYOUTS = {  # FLUX.1's names are read by diffusers at that model's own width only
    tiny_sd3: sd3_transformer_layout, tiny_z_image: lambda net: transformer_layout(net, Z_IMAGE_PARTS, swapped=())}

@pytest.mark.parametrize('make', LAYOUTS)
def test_names_of_the_original_code(make, tmp_path):
    "The network alone, and in a file with other parts"
    teacher, base = tuned_and_base(make, tmp_path)
    alone = {k: v.clone().contiguous() for k, v in LAYOUTS[make](teacher.denoiser.net).items()}
    assert alone.keys() != teacher.denoiser.net.state_dict().keys()
    if make is tiny_z_image: alone['norm_final.weight'] = torch.ones(7)  # as published: no one asks it
    more = {PREFIX + k: v for k, v in alone.items()} | {'text_encoders.x.weight': torch.ones(3), 'vae.y': torch.ones(3)}
    for name, tensors in dict(alone=alone, more=more).items():
        save_file(tensors, tmp_path/f'{name}.safetensors')
        made = open_teacher(assemble_teacher(tmp_path/f'{name}.safetensors', base, tmp_path/name))
        assert max_abs(asked(made), asked(teacher)) == 0
        assert max_abs(asked(made), asked(open_teacher(base))) > 1e-3

@pytest.mark.parametrize('make', [tiny_flux, tiny_flux2, tiny_sana])
def test_names_of_diffusers(make, tmp_path):
    teacher, base = tuned_and_base(make, tmp_path)
    save_file({k: v.contiguous() for k, v in teacher.denoiser.net.state_dict().items()}, tmp_path/'net.safetensors')
    made = open_teacher(assemble_teacher(tmp_path/'net.safetensors', base, tmp_path/'made'))
    assert max_abs(asked(made), asked(teacher)) == 0

def test_a_file_alone_says_what_to_do(tmp_path):
    teacher, _ = tuned_and_base(tiny_flux, tmp_path)
    save_file({k: v.contiguous() for k, v in teacher.denoiser.net.state_dict().items()}, tmp_path/'fox.safetensors')
    with pytest.raises(InputError) as said: open_teacher(tmp_path/'fox.safetensors')
    assert re.search(r'sid-lsg assemble \S+fox.safetensors --base BASE --out FOLDER', str(said.value))

def test_another_model_is_refused(tmp_path):
    "A file of one family with the base of another, and of a longer model"
    teacher, _ = tuned_and_base(tiny_flux, tmp_path/'flux')
    save_file({k: v.contiguous() for k, v in teacher.denoiser.net.state_dict().items()}, tmp_path/'flux.safetensors')
    for make in (tiny_sd3, tiny_z_image):
        make(base := tmp_path/make.__name__)
        with pytest.raises(InputError, match='numbers, and the .* Give the folder of its own base'):
            assemble_teacher(tmp_path/'flux.safetensors', base, tmp_path/'out')
    longer = {k: v.contiguous() for k, v in teacher.denoiser.net.state_dict().items()}
    first = [k for k in longer if k.startswith('transformer_blocks.0.')]
    longer |= {k.replace('.0.', '.7.', 1): longer[k].clone() for k in first}
    save_file(longer, tmp_path/'longer.safetensors')
    with pytest.raises(InputError, match='holds [0-9,]+ numbers, and the FluxTransformer2DModel there [0-9,]+; is it'):
        assemble_teacher(tmp_path/'longer.safetensors', tmp_path/'flux/base', tmp_path/'out')
    assert not (tmp_path/'out').exists()
