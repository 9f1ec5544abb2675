"""Spaces as the hub runs them: the script is started, and draws with a student of every family."""

import importlib.util, os, re, subprocess, sys, time, urllib.request
from importlib.util import find_spec
import numpy as np
import pytest
from sid_lsg_nb.core import InputError, to_uint8
from sid_lsg_nb.export.space import write_space
from sid_lsg_nb.teachers.edm import tiny_edm
from sid_lsg_nb.teachers.registry import open_student, open_teacher
from sid_lsg_nb.teachers.student import save_student
from sid_lsg_nb.testing import tiny_pipeline, tiny_pixart, tiny_sana, tiny_sd3, tiny_sdxl

WITHOUT = None if find_spec('gradio') else 'gradio is not installed: pip install -e .[demo]'
if WITHOUT and os.environ.get('CI'):
    raise RuntimeError(f'{WITHOUT}, and in CI nothing is skipped')
pytestmark = pytest.mark.skipif(bool(WITHOUT), reason=str(WITHOUT))

MAKERS = dict(sd=tiny_pipeline, sdxl=tiny_sdxl, pixart=tiny_pixart, sd3=tiny_sd3, sana=tiny_sana)

def student_of(family, folder):
    "A saved student of a family, in miniature"
    teacher = tiny_edm(classes=10) if family == 'edm' else open_teacher(MAKERS[family](folder / 'teacher'))
    return save_student(teacher, teacher.denoiser, folder / 'student')

def started(app):
    "The module of a Space"
    spec = importlib.util.spec_from_file_location('app', app)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

@pytest.mark.parametrize('family, steps, stock', [
    ('sd', 1, True), ('sd', 2, True), ('sdxl', 1, True), ('sdxl', 2, True), ('pixart', 1, True), ('pixart', 2, True),
    ('sd3', 1, True), ('sd3', 2, False), ('sana', 1, True), ('edm', 1, False)])
def test_a_space_draws_what_the_student_draws(family, steps, stock, tmp_path):
    folder = student_of(family, tmp_path)
    assert write_space(folder, tmp_path / 'space', steps=steps) is stock
    app, student = started(tmp_path / 'space' / 'app.py'), open_student(folder)
    word = 'cat' if family == 'edm' else 'a red cat'
    drawn = np.asarray(app.draw(word, 5))
    off = np.abs(drawn.astype(int) - to_uint8(student([word], [5], steps))[0].astype(int))
    assert drawn.ndim == 3 and off.max() == 0
    assert (np.asarray(app.draw(word, 6)) != drawn).any()

def test_a_word_that_is_no_class_is_told_on_the_page(tmp_path):
    import gradio

    write_space(student_of('edm', tmp_path), tmp_path / 'space')
    with pytest.raises(gradio.Error, match='is no class of this teacher'):
        started(tmp_path / 'space' / 'app.py').draw('spaceship', 0)

def test_a_button_of_the_page_draws(tmp_path):
    write_space(student_of('sd', tmp_path), tmp_path / 'space', title="A 'title'\nof two lines")
    app = started(tmp_path / 'space' / 'app.py')
    wired = [f for f in app.demo.fns.values() if f.api_name == 'draw']
    assert [f.fn for f in wired] == [app.draw] and app.TITLE == "A 'title'\nof two lines"
    assert {t[1] for t in wired[0].targets} == {'click', 'submit'}

def test_the_script_serves_its_page_without_the_package(tmp_path):
    "In a folder of its own, where a module of the package's name refuses to be imported"
    write_space(student_of('sd', tmp_path), tmp_path / 'space')
    (tmp_path / 'space' / 'sid_lsg_nb.py').write_text("raise SystemExit('the package was asked for')")
    env = os.environ | dict(GRADIO_SERVER_NAME='127.0.0.1', GRADIO_ANALYTICS_ENABLED='False', PYTHONUNBUFFERED='1')
    log = tmp_path / 'said.txt'
    with open(log, 'w') as out:
        process = subprocess.Popen([sys.executable, 'app.py'], cwd=tmp_path / 'space', env=env, stdout=out, stderr=out)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r'http://127\.0\.0\.1:\d+', log.read_text())):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(.1)
        with urllib.request.urlopen(found[0], timeout=30) as page:
            assert page.status == 200 and 'One-step student' in page.read().decode()
    finally:
        process.kill()
        process.wait()

def test_a_folder_that_holds_other_things_stays(tmp_path):
    (tmp_path / 'space').mkdir()
    (tmp_path / 'space' / 'mine.txt').write_text('mine')
    with pytest.raises(InputError, match='exists; give another folder'):
        write_space(student_of('sd', tmp_path), tmp_path / 'space')
    assert [f.name for f in (tmp_path / 'space').iterdir()] == ['mine.txt']

def test_a_student_of_another_size_draws_at_it(tmp_path):
    teacher = open_teacher(tiny_sdxl(tmp_path / 'teacher'))
    teacher.set_size(24, 16)
    folder = save_student(teacher, teacher.denoiser, tmp_path / 'student')
    assert write_space(folder, tmp_path / 'space') is True
    drawn = np.asarray(started(tmp_path / 'space' / 'app.py').draw('a red cat', 5))
    assert drawn.shape == (24, 16, 3) and (drawn == to_uint8(open_student(folder)(['a red cat'], [5]))[0]).all()
