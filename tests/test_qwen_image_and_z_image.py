"""Qwen-Image, Z-Image and FLUX.2-klein from the command line: a small random teacher is distilled, alone and with LoRA, and a dry run
counts its memory."""

import json
import pytest
import torch
from sid_lsg_nb.cli import main
from sid_lsg_nb.commands.bench import random_teacher
from sid_lsg_nb.core import InputError, max_abs
from sid_lsg_nb.teachers.registry import model_shapes, open_student, open_teacher
from sid_lsg_nb.testing import open_stock, tiny_flux2, tiny_qwen_image, tiny_z_image

FAMILIES = dict(qwen_image=tiny_qwen_image, z_image=tiny_z_image, flux2_klein=tiny_flux2)
LINE = """--max-train-images 8 --total-batch-size 4 --micro-batch 2 --log-every 4 --sample-every 4 --checkpoint-every 4
--teacher-steps 2 --lr 1e-4 --lr-fake 1e-4 --student-steps 1 --device cpu --mixed-precision no""".split()

@pytest.fixture(scope='module', params=FAMILIES)
def line(request, tmp_path_factory):
    "The beginning of a command, and a folder to work in"
    tmp = tmp_path_factory.mktemp(request.param)
    (tmp/'prompts.txt').write_text('a red cat\nthe blue dog\nan apple\nthe green shoe\n')
    teacher = FAMILIES[request.param](tmp/'teacher')
    return tmp, ['distill', '--teacher', teacher, '--prompts', str(tmp/'prompts.txt'), *LINE]

@pytest.mark.parametrize('how', ['plain', 'lora'])
def test_it_distils_and_stock_diffusers_opens_the_result(line, how):
    tmp, words = line
    lora = ['--lora', 'both', '--lora-rank', '2'] if how == 'lora' else []
    assert main([*words, *lora, '--out', str(tmp/how)]) in (0, None)
    rows = [json.loads(row) for row in (tmp/how/'log.jsonl').read_text().splitlines()]
    assert len(rows) == 2 and all(r['norm'] > 0 and r['norm_fake'] > 0 for r in rows)
    drawn = open_student(tmp/how)(['a red cat', 'the blue dog'], [1, 2])
    assert drawn.shape == (2, 3, 16, 16) and drawn.isfinite().all()
    before, after = open_teacher(tmp/'teacher').denoiser.net, open_stock(tmp/how/'generator').transformer
    moved = {k for k, p in after.named_parameters() if max_abs(p, before.get_parameter(k)) > 1e-7}
    layers = open_teacher(tmp/'teacher').denoiser.lora_targets
    assert moved and (how == 'plain' or all(k.removesuffix('.weight').endswith(layers) for k in moved))
    card = (tmp/how/'generator/README.md').read_text()
    assert 'num_inference_steps=1, ' in card and 'height=16, width=16' in card

def test_a_dry_run_counts_its_memory(line, capsys):
    tmp, words = line
    assert main([*words, '--out', str(tmp/'dry'), '--dry-run']) in (0, None)
    said = capsys.readouterr().out
    assert 'memory per process, counted from shapes' in said and not (tmp/'dry').exists()
    counted = model_shapes(str(tmp/'teacher')).build()
    net = open_teacher(tmp/'teacher').denoiser.net
    assert sum(p.numel() for p in counted.parameters()) == sum(p.numel() for p in net.parameters())

@pytest.mark.parametrize('name, millions', [('qwen-image', 20430.4), ('z-image', 6154.9)])
def test_the_published_sizes_are_known(name, millions):
    with torch.device('meta'): n = sum(p.numel() for p in model_shapes(name).build().parameters())
    assert round(n/1e6, 1) == millions and model_shapes(model_shapes(name).hub_id) is model_shapes(name)
    with pytest.raises(InputError, match='count its memory from shapes, with --memory'):
        random_teacher(f'random-{name}', 'cpu')
