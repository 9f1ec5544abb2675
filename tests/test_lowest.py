"""The lower bounds of settings.ini: read as constraints, and enough to import everything and to train. The
workflow runs this file with each requirement at its bound."""

import importlib, pkgutil, subprocess, sys
from pathlib import Path
import pytest
import sid_lsg_nb
from lowest import lowest

HERE = Path(__file__).parent

def test_bounds_become_constraints():
    assert lowest('torch>=2.6 scipy>=1.11,<1.18 a-b_c>=0.24') == ['torch==2.6', 'scipy==1.11', 'a-b_c==0.24']
    for bad in ('torch', 'torch<3', 'torch==2.6'):
        with pytest.raises(ValueError, match='no lower bound'):
            lowest(bad)

def test_the_script_lists_all_requirements():
    said = subprocess.run(
        [sys.executable, HERE / 'lowest.py'], capture_output=True, text=True, check=True
    ).stdout.split()
    line = next(
        l
        for l in (HERE.parent / 'settings.ini').read_text(encoding='utf-8').splitlines()
        if l.startswith('requirements = ')
    )
    assert len(said) == len(line.split()) - 2 and all('==' in s for s in said)

def test_every_module_imports():
    for m in pkgutil.walk_packages(sid_lsg_nb.__path__, 'sid_lsg_nb.'):
        importlib.import_module(m.name)

def test_two_iterations_leave_a_student(tmp_path, monkeypatch):
    from sid_lsg_nb.training.config import Config
    from sid_lsg_nb.teachers.registry import open_student
    from sid_lsg_nb.training.trainer import train

    monkeypatch.chdir(tmp_path)
    run = train(
        Config(max_train_images=8, total_batch_size=4, n_eval=0, teacher_steps=2, device='cpu', out='run')
    )
    picture = open_student(run)(['a 3d fox on a white background'])
    assert (
        picture.shape[:2] == (1, 3) and picture.isfinite().all() and (run / 'generator/README.md').is_file()
    )
