"A run is never lost: torn files, full disks, signals at any time, closing steps that fail, the same command again."

import errno, json, os, shutil, signal, subprocess, sys
from dataclasses import replace
import pytest
import torch
from safetensors.torch import load_file
from sid_lsg_nb.training import checkpoint, job, log as watch, resume, scores, stop_signals, trainer
from sid_lsg_nb.training.checkpoint import checkpoints
from sid_lsg_nb.commands.convert import Export, export_to
from sid_lsg_nb.core import InputError, RunError
from sid_lsg_nb.testing import tiny_pipeline
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.commands.status import status
from sid_lsg_nb.training.trainer import train

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with a random teacher, a list of prompts, and a run of 24 images that nobody disturbed"
    folder = tmp_path_factory.mktemp('home')
    tiny_pipeline(folder / 'teacher')
    (folder / 'words.txt').write_text(
        'a red cat on a blue background\nthe green apple\na photo of a dog with a shoe\n'
    )
    train(replace(config(folder), out=str(folder / 'whole')))
    return folder

def config(home, **more):
    return replace(
        Config(
            teacher=str(home / 'teacher'),
            prompts=str(home / 'words.txt'),
            max_train_images=24,
            total_batch_size=4,
            log_every=8,
            sample_every=0,
            checkpoint_every=8,
            n_eval=0,
            teacher_steps=2,
            device='cpu',
        ),
        **more,
    )

@pytest.fixture
def run(home, tmp_path):
    "A copy of the run, as if it had died after 16 of 24 images"
    shutil.copytree(home / 'whole', tmp_path / 'run')
    shutil.rmtree(checkpoints(tmp_path / 'run/checkpoints')[0])
    shutil.rmtree(tmp_path / 'run/generator')
    (tmp_path / 'run/closing.json').unlink()
    return tmp_path / 'run'

def weights(folder):
    return load_file(next((folder / 'generator/unet').glob('*.safetensors')))

def same(a, b):
    return all(torch.equal(x, weights(b)[k]) for k, x in weights(a).items())

def rows(folder):
    return [
        {k: v for k, v in json.loads(l).items() if k != 'img_per_s'}
        for l in (folder / 'log.jsonl').read_text().splitlines()
    ]

TORN = {
    'log.jsonl': lambda f: open(f, 'ab').write(b'{"nimg": 68, "lo'),
    'config.json': lambda f: os.truncate(f, 40),
    'prompts.json': lambda f: f.write_bytes(b'\0' * 99),
}

@pytest.mark.parametrize('name', TORN)
def test_a_torn_file_costs_nothing(home, run, name, capsys):
    TORN[name](run / name)
    assert 'Traceback' not in status(run)
    train(config(home, resume=str(run)))
    assert same(run, home / 'whole') and rows(run) == rows(home / 'whole')
    assert name == 'prompts.json' or name in capsys.readouterr().out
    assert (
        json.loads((run / 'prompts.json').read_text())['sha256']
        and json.loads((run / 'config.json').read_text())['max_train_images'] == 24
    )

def test_the_checkpoints_alone_are_enough(home, run):
    for p in run.iterdir():
        p.name == 'checkpoints' or (shutil.rmtree(p) if p.is_dir() else p.unlink())
    train(config(home, resume=str(run)))
    assert same(run, home / 'whole')

@pytest.mark.parametrize('name,text', [('log.jsonl', '{"nimg": 68, "lo'), ('scores.json', '[{"na')])
def test_a_card_is_made_without_a_torn_file(home, tmp_path, name, text, capsys):
    shutil.copytree(home / 'whole', tmp_path / 'run')
    (tmp_path / 'run' / name).open('a' if name == 'log.jsonl' else 'w').write(text)
    export_to(Export(run=str(tmp_path / 'run'), to='card'))
    assert name == 'log.jsonl' or name in capsys.readouterr().out

@pytest.mark.parametrize('what', ['checkpoint', 'log'])
def test_a_full_disk_and_then_room(home, tmp_path, monkeypatch, what):
    full = OSError(errno.ENOSPC, 'No space left on device')
    real, calls = checkpoint.write_tensors, []

    def write_tensors(file, *a):
        calls.append(file)
        sha = real(file, *a)
        if len(calls) == 2:
            os.truncate(file, 100)
            raise full
        return sha

    def fsync(fd):
        calls.append(os.readlink(f'/proc/self/fd/{fd}'))
        if calls[-1].endswith('log.jsonl') and sum(c == calls[-1] for c in calls) == 2:
            raise full

    if what == 'checkpoint':
        monkeypatch.setattr(checkpoint, 'write_tensors', write_tensors)
    else:
        monkeypatch.setattr(watch.os, 'fsync', fsync)
    with pytest.raises(RunError, match='free some space'):
        train(config(home, out=str(tmp_path / 'run')))
    monkeypatch.undo()
    assert all(json.loads(l) for l in (tmp_path / 'run/log.jsonl').read_text().splitlines())
    train(config(home, out=str(tmp_path / 'run'), resume='latest'))
    assert same(tmp_path / 'run', home / 'whole') and rows(tmp_path / 'run') == rows(home / 'whole')

def hit(monkeypatch, where, name, *signals):
    "Send signals the next time that a function is called, before it does its work"
    real = getattr(where, name)

    def work(*a, **k):
        monkeypatch.setattr(where, name, real)
        for s in signals:
            signal.raise_signal(s)
        return real(*a, **k)

    monkeypatch.setattr(where, name, work)

@pytest.mark.parametrize('where, when', [(resume, 'setup'), (resume, 'state_of'), (trainer, 'save_student')])
def test_signals_at_any_time_leave_a_checkpoint(home, tmp_path, monkeypatch, where, when):
    monkeypatch.setattr(stop_signals, 'is_interactive', lambda: False)  # a batch job
    asked = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGHUP
    hit(monkeypatch, where, when, *asked)
    train(config(home, out=str(tmp_path / 'run')))
    assert checkpoints(tmp_path / 'run/checkpoints')
    train(config(home, out=str(tmp_path / 'run'), resume='latest'))
    assert same(tmp_path / 'run', home / 'whole')

def test_the_checkpoint_comes_before_pictures(home, tmp_path, monkeypatch):
    order = []

    def note(where, name):
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *a: (order.append(name), real(*a))[1])

    note(resume, 'save_checkpoint'), note(trainer, 'curves'), note(trainer, 'save_student')
    hit(monkeypatch, trainer, 'iterate', signal.SIGTERM)
    train(config(home, out=str(tmp_path / 'run'), checkpoint_every=0))
    assert order[0] == 'save_checkpoint' and 'save_student' in order

def broken(*_, **__):
    raise ZeroDivisionError('float division by zero')

@pytest.mark.parametrize('name', ['save_student', 'write_card', 'curves'])
def test_what_comes_after_training_does_not_cost_the_run(home, tmp_path, monkeypatch, name, capsys):
    folder = tmp_path / 'run'
    with monkeypatch.context() as m:
        m.setattr(trainer, name, broken)
        if name == 'curves':
            train(config(home, out=str(folder)))
        else:
            with pytest.raises(RunError, match='--resume'):
                train(config(home, out=str(folder)))
    said = capsys.readouterr().out
    assert 'ZeroDivisionError' in said and (name == 'curves' or 'repeat it with' in said)
    assert int(checkpoints(folder / 'checkpoints')[0].name) == 24 and (folder / 'generator').exists() == (
        name != 'save_student'
    )
    train(config(home, resume=str(folder)))
    assert same(folder, home / 'whole') and (folder / 'generator/README.md').exists()

def test_a_sheet_that_cannot_be_drawn_does_not_cost_the_run(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scores, 'save_grid', broken)
    train(config(home, out=str(tmp_path / 'run'), sample_every=8))
    assert 'a sheet failed (ZeroDivisionError' in capsys.readouterr().out and same(
        tmp_path / 'run', home / 'whole'
    )

def test_the_same_command_again(home, tmp_path, monkeypatch, capsys):
    again = config(home, out=str(tmp_path / 'run'), resume='latest')
    folder = train(again)
    capsys.readouterr()
    with monkeypatch.context() as m:
        m.setattr(job, 'open_teacher', broken)
        assert train(again) == folder  # at once: nothing is opened
    assert 'is finished' in capsys.readouterr().out
    train(replace(again, max_train_images=32))
    assert rows(folder)[-1]['nimg'] == 32
    for name in ('checkpoints', 'generator'):
        shutil.rmtree(folder / name)
    (folder / 'closing.json').unlink()
    train(again)
    assert same(folder, home / 'whole')  # no checkpoint was reached

def test_content_makes_a_run_the_same_not_its_path(home, run, tmp_path):
    shutil.copytree(home / 'teacher', tmp_path / 't')
    shutil.copy(home / 'words.txt', tmp_path / 'w.txt')
    moved = config(home, resume=str(run), teacher=str(tmp_path / 't'), prompts=str(tmp_path / 'w.txt'))
    file = next((tmp_path / 't/unet').glob('*.safetensors'))
    good = file.read_bytes()
    file.write_bytes(good[:-8] + bytes(8))
    with pytest.raises(InputError, match='is another than when this run began'):
        train(moved)
    file.write_bytes(good)
    index = tmp_path / 't/scheduler/scheduler_config.json'
    text = index.read_text()
    index.write_text(json.dumps(json.loads(text) | dict(beta_end=0.013)))
    with pytest.raises(InputError, match='is another than when this run began'):
        train(moved)
    index.write_text(text)
    (tmp_path / 'w.txt').write_text('a red cat\n')
    with pytest.raises(InputError, match='prompts have changed'):
        train(moved)
    shutil.copy(home / 'words.txt', tmp_path / 'w.txt')
    train(moved)
    assert same(run, home / 'whole')

def test_two_processes_never_share_a_folder(home, run):
    hold = (
        'import sys, time; from filelock import FileLock; l = FileLock(sys.argv[1]); l.acquire(); print("held", '
        'flush=True); sys.stdin.read()'
    )
    p = subprocess.Popen(
        [sys.executable, '-c', hold, str(run / '.lock')],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    p.stdout.readline()
    with pytest.raises(InputError, match='another process is at work'):
        train(config(home, resume=str(run)))
    p.communicate('')
    train(config(home, resume=str(run)))

def test_zero_means_never(home, tmp_path):
    folder = train(config(home, out=str(tmp_path / 'run'), sample_every=0, checkpoint_every=0, log_every=0))
    assert [p.name for p in checkpoints(folder / 'checkpoints')] == [f'{24:012d}'] and not list(
        (folder / 'samples').iterdir()
    )
    assert len(rows(folder)) == 1 and same(folder, home / 'whole')
