"""On a GPU text encoders with billions of weights are bfloat16: they say almost the same, are counted so, and a student
is saved in one number format all the same."""

import pytest
import torch
from diffusers import DiffusionPipeline
from sid_lsg_nb.teachers.base import in_format
from sid_lsg_nb.teachers.registry import family_of, model_shapes, open_student, published_models
from sid_lsg_nb.teachers.student import save_student
from sid_lsg_nb.testing import tiny_flux, tiny_flux2, tiny_pipeline, tiny_pixart, tiny_qwen_image, tiny_sana, tiny_sd3
from sid_lsg_nb.testing import tiny_sdxl, tiny_z_image

LARGE = {  # the parts that are halved
    tiny_pixart: ['text_encoder'], tiny_sd3: ['text_encoder_3'], tiny_flux: ['text_encoder_2'],
    tiny_flux2: ['text_encoder'], tiny_qwen_image: ['text_encoder'], tiny_z_image: ['text_encoder'],
    tiny_sana: ['text_encoder']}
SMALL = tiny_pipeline, tiny_sdxl

def opened(folder, device):
    "On the CPU, in the formats that it would have on a device"
    family = family_of(folder)
    pipe = family.read(folder, folder, family.part_dtypes(torch.float32, device))
    return family.from_pipeline(pipe, folder)

def formats(teacher): return {k: next(m.parameters()).dtype for k, m in teacher.modules().items()}

@pytest.mark.parametrize('make', [*LARGE, *SMALL])
def test_only_large_encoders_are_halved_and_only_on_a_gpu(make, tmp_path):
    folder = make(tmp_path/'teacher')
    there, here = (formats(opened(folder, device)) for device in ('cuda:0', 'cpu'))
    assert {k for k, v in there.items() if v == torch.bfloat16} == {*LARGE.get(make, [])}
    assert {*here.values()} == {torch.float32} and here.keys() == there.keys()

@pytest.mark.parametrize('make', LARGE)
def test_what_they_say_is_float32_and_nearly_the_same(make, tmp_path):
    folder = make(tmp_path/'teacher')
    half, whole = (opened(folder, device).text(['a red cat', '']) for device in ('cuda', 'cpu'))
    assert half.keys() == whole.keys()
    for k, v in whole.items():
        assert half[k].dtype == v.dtype and half[k].shape == v.shape
        if v.is_floating_point(): assert (half[k] - v).abs().max() <= .06*v.abs().max(), k  # bf16 keeps 8 bits

@pytest.mark.parametrize('make', LARGE)
def test_a_student_is_saved_in_the_format_of_its_network(make, tmp_path):
    folder = make(tmp_path/'teacher')
    teacher = opened(folder, 'cuda')
    save_student(teacher, teacher.denoiser, tmp_path/'student', teacher.default_t_init)
    assert {*formats(teacher).values()} == {torch.float32, torch.bfloat16}  # as it was
    pipe = DiffusionPipeline.from_pretrained(tmp_path/'student')
    parts = {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    assert {p.dtype for m in parts.values() for p in m.parameters()} == {torch.float32}
    name, = LARGE[make]
    kept = dict(getattr(teacher.pipe, name).named_parameters())
    assert all(torch.equal(p, kept[k].float()) for k, p in parts[name].named_parameters())
    assert open_student(tmp_path/'student')(['a red cat'], [3]).isfinite().all()

def test_a_copy_in_another_format_is_one():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).bfloat16()
    net[1].weight = net[0].weight  # tied, as embeddings are
    net.register_buffer('places', torch.arange(3))
    net.dtype = torch.bfloat16
    new = in_format(net, torch.float32)
    assert in_format(net, torch.bfloat16) is net and {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert new[0].weight is new[1].weight and new[0].weight.dtype == torch.float32 and new.places.dtype == torch.int64
    for k, v in net.state_dict().items(): assert torch.equal(new.state_dict()[k], v.to(new.state_dict()[k].dtype)), k

@pytest.mark.parametrize('make', [*LARGE, *SMALL])
def test_a_folder_counts_them_so(make, tmp_path):
    folder = make(tmp_path/'teacher')
    teacher, shapes = opened(folder, 'cuda'), model_shapes(folder)
    parts = [m for k, m in teacher.pipe.components.items() if k.startswith('text_encoder') and m is not None]
    held = sum(p.nbytes for m in parts for p in m.parameters())
    if make is not tiny_qwen_image: assert shapes.text_bytes == pytest.approx(held, abs=8)  # tied: once in its file
    assert bool(shapes.text_half) == (make in LARGE)

@pytest.mark.parametrize('name', published_models())
def test_published_sizes_count_them_so(name):
    shapes, family = model_shapes(name), published_models()[name]
    clips = {'sd3': 123.65 + 694.66, 'sd35': 123.65 + 694.66, 'flux1': 123.06}  # CLIP-L and CLIP-G, in millions
    small = next((v for k, v in clips.items() if name.startswith(k)), 0.)
    want = shapes.text - small if family.large_text_encoders else 0.
    assert shapes.text_half == pytest.approx(want, abs=.1)
