"""The pages as people use them: one is served, a browser opens it, types a prompt and presses the button."""

import http.client, json, os, re, signal, subprocess, sys, threading, time
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
import pytest
from PIL import Image
from browser import CHROMIUM, Browser
from sid_lsg_nb.core import InputError
from sid_lsg_nb.teachers.registry import open_teacher
from sid_lsg_nb.teachers.student import save_student
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.run_folder import run_folder

WITHOUT = None if find_spec('gradio') else 'gradio is not installed: pip install -e .[demo]'
if WITHOUT and os.environ.get('CI'):
    raise RuntimeError(f'{WITHOUT}, and in CI nothing is skipped')
pytestmark = pytest.mark.skipif(bool(WITHOUT), reason=str(WITHOUT))
in_browser = pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium')

@contextmanager
def served(folder, *words):
    "The address of a page, while the command that serves it runs in a folder"
    log = folder / 'said.txt'
    with open(log, 'w') as out:
        command = [sys.executable, '-m', 'sid_lsg_nb.cli', *words, '--no-browser']
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r'http://127\.0\.0\.1:(\d+)/', log.read_text())):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(.1)
        yield int(found[1])
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()

def get(port, path, method='GET', host=None, body=None):
    "Status and text; the path is sent as it stands"
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader('Host', host or f'127.0.0.1:{port}')
    connection.putheader('Content-Length', str(len(body or b'')))
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.read().decode('utf-8', 'replace')

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run that has ended: its generator is the bundled teacher's network as it was"
    folder = run_folder(Config(out=str(tmp_path_factory.mktemp('work') / 'runs' / 'a-run')))
    teacher = open_teacher()
    save_student(teacher, teacher.denoiser, folder / 'generator', teacher.default_t_init)
    return folder

@pytest.fixture(scope='module')
def port(run):
    with served(run.parent.parent, 'demo', '--n', '1', '--device', 'cpu') as port:
        yield port

def test_no_file_of_the_machine_is_served(port, run):
    assert get(port, '/')[0] == get(port, '/config')[0] == 200
    files = ['/etc/passwd', str(run / 'config.json'), 'runs/a-run/config.json', '../' * 9 + 'etc/passwd', run.parent]
    asked = [f'/gradio_api/{route}{file}' for route in ('file=', 'file/', 'proxy=') for file in files]
    asked += ['/gradio_api/file=%2e%2e/%2e%2e/etc/passwd', '/assets/../../../etc/passwd', '/static/%2e%2e/app.py']
    asked += [f'/gradio_api/file=http://127.0.0.1:{port}/config', '/gradio_api/file=file:///etc/passwd']
    told = {path: get(port, path) for path in asked}
    assert {status for status, _ in told.values()} == {404}
    assert not any('root:' in text or 'teacher' in text for _, text in told.values())

def test_nothing_is_taken_in_and_no_other_name_is_answered(port):
    assert get(port, '/gradio_api/upload', 'POST', body=b'x')[0] == 404
    assert get(port, '/', host=f'localhost:{port}')[0] == 200
    assert get(port, '/', host=f'elsewhere.example:{port}')[0] == 404

def test_a_port_that_is_taken_is_told_in_one_line(port):
    from sid_lsg_nb.commands.demo import load_gradio, serve

    with load_gradio().Blocks() as page:
        pass
    with pytest.raises(InputError, match=f'no page can be served at port {port}.*; give another --port'):
        serve(page, SimpleNamespace(port=port, browser=False, share=False))

@in_browser
def test_a_prompt_is_typed_and_two_pictures_come(port):
    with Browser() as page:
        page.open(f'http://127.0.0.1:{port}/')
        page.wait('document.querySelector("#answer article")')
        page.type('#prompt textarea', 'a 3d fox on a white background')
        page.click('#draw')
        page.wait('document.querySelectorAll("#answer img").length == 2 && !document.querySelector("#answer .waits")')
        assert page.js('[...document.querySelectorAll("#answer img")].every(i => i.naturalWidth == 32)')
        said = page.js('document.querySelector("#answer").innerText')
        teacher = r'the bundled teacher\s+25 steps, kappa 1.5\s+[\d.]+ m?s a picture'
        assert re.search(teacher + r'\s+a-run\s+one step\s+[\d.]+ m?s a picture', said), said
        shown = page.js('document.querySelector("#answer img").src')
        page.click('#again')
        page.wait(f'document.querySelectorAll("#answer img").length == 2 && !document.querySelector("#answer .waits") '
                  f'&& document.querySelector("#answer img").src != {shown!r}')
        page.type('#prompt textarea', ' ')
        page.click('#draw')
        page.wait('document.body.innerText.includes("type a prompt first")')
        elsewhere = [r for r in page.requests if not r.startswith((f'http://127.0.0.1:{port}/', 'data:'))]
        assert page.requests and not elsewhere
        assert not page.complaints

@contextmanager
def watched(folder):
    "The address of a page on a run, served from this process"
    from sid_lsg_nb.commands.demo import serve, watch_page

    page = watch_page(folder, every=1)
    serving = threading.Thread(target=serve, args=(page, SimpleNamespace(port=None, browser=False, share=False)))
    serving.start()
    try:
        end = time.monotonic() + 60
        while not getattr(page, 'server_port', None):
            assert serving.is_alive() and time.monotonic() < end
            time.sleep(.1)
        yield page.server_port
    finally:
        page.close()
        serving.join(30)

def line(nimg, **more):
    return json.dumps(dict(nimg=nimg, loss=-.1, norm=2., fisher=3., img_per_s=40.) | more) + '\n'

@in_browser
def test_a_run_is_followed_from_before_it_begins(tmp_path):
    folder = tmp_path / 'a-run'
    with watched(folder) as port, Browser() as page:
        page.open(f'http://127.0.0.1:{port}/')
        page.wait('document.body.innerText.includes("Waiting for a run")')
        run_folder(Config(max_train_images=8_000, out=str(folder)))
        page.wait('document.body.innerText.includes("begun; nothing logged yet")')
        (folder / 'log.jsonl').write_text(line(800) + line(1600) + '{"nimg": 2400, "lo')
        page.wait('document.body.innerText.includes("1,600 of 8,000") && document.querySelector("#curves svg")')
        Image.new('RGB', (64, 64), 'red').save(folder / 'samples' / '000002400.png')
        (folder / 'log.jsonl').write_text(line(800) + line(1600) + line(2400, alarm=['norm']))
        page.wait('document.body.innerText.includes("2,400 of 8,000") && document.querySelector("#sheets img")')
        said = page.js('document.body.innerText')
        assert '30.0%, running' in said and 'alarm on 1 line(s), the last at 2,400 images' in said
        assert not [r for r in page.requests if not r.startswith((f'http://127.0.0.1:{port}/', 'data:'))]
        assert not page.complaints
