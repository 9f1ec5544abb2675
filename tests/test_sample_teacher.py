"""`sid-lsg sample TEACHER --kappa`: a teacher's pictures in a folder, as a discriminator or a score takes them."""

import numpy as np
import torch
from PIL import Image
from sid_lsg_nb.cli import main
from sid_lsg_nb.core import to_uint8
from sid_lsg_nb.data.images import images_from_folder
from sid_lsg_nb.data.real_images import encode_folder
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.training.drawing import many_step_draw

PROMPTS = ['a flat rose', 'a 3d fox on a white background', 'a flat laughing face on a black background']

def said(capsys, *words):
    "What the command complains of"
    assert main([*map(str, words)])
    return capsys.readouterr().err

def test_the_pictures_are_the_teachers(tmp_path):
    (tmp_path / 'p.txt').write_text('\n'.join(PROMPTS) + '\n')
    out, words = tmp_path / 'drawn', ['--steps', '3', '--seed', '5', '--batch', '2', '--device', 'cpu']
    main(['sample', 'embedded', '--prompts', str(tmp_path / 'p.txt'), '--kappa', '1.5', '--out', str(out), *words])
    teacher = open_teacher('embedded')
    with torch.no_grad():
        wanted = to_uint8(many_step_draw(teacher, 1.5, 3)(PROMPTS, [5, 6, 7]))
    found = [np.asarray(Image.open(out / f'0000{i}.png')) for i in range(3)]
    assert max(abs(a.astype(int) - b.astype(int)).max() for a, b in zip(found, wanted)) <= 1
    assert images_from_folder(out).n == 3 and len(encode_folder(teacher, out)) == 3  # the sheet is none of them

def test_guidance_leads_away_from_words(tmp_path):
    for name, more in (('plain', []), ('away', ['--negative-prompt', 'a flat rose'])):
        main([
            'sample', 'embedded', PROMPTS[1], '--kappa', '3', '--steps', '2', '--device', 'cpu',
            '--out', str(tmp_path / name), *more])
    a, b = (np.asarray(Image.open(tmp_path / name / '00000.png')).astype(int) for name in ('plain', 'away'))
    assert abs(a - b).max() > 3

def test_what_cannot_be(tmp_path, capsys):
    out = ['--out', tmp_path / 'none', '--device', 'cpu']
    assert 'guidance is inside it' in said(capsys, 'sample', 'shipped', PROMPTS[0], '--kappa', 2, *out)
    assert 'finite number' in said(capsys, 'sample', 'embedded', PROMPTS[0], '--kappa', -1, *out)
    assert 'at least 1' in said(capsys, 'sample', 'shipped', PROMPTS[0], '--steps', 0, *out)
    assert not (tmp_path / 'none').exists()
