"""A loss or a method in a user's own file: trained by name, resumed only if it is the same, and never run unasked."""

import json, re
import pytest
from sid_lsg_nb.cli import main
from sid_lsg_nb.core import InputError
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.trainer import train

LOSS = '''
from pathlib import Path
with (Path(__file__).parent / 'runs.txt').open('a') as f: f.write('x')

def plain(e):
    return ((e.y_real - e.y_fake) * (e.y_fake3 - e.x_g)).flatten(1).sum(1)
'''
SHORT = dict(device='cpu', max_train_images=16, total_batch_size=8, sample_every=0, n_eval=0, log_every=8)


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder of one's own, with a loss in it"
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.py').write_text(LOSS)
    return tmp_path


def rows(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def numbers(folder):
    return [{k: v for k, v in row.items() if k != 'img_per_s'} for row in rows(folder)]


def said(capsys, *argv):
    "Exit status, and what the command says"
    code = main(list(argv))
    out = capsys.readouterr()
    return code, out.out + out.err


def test_a_loss_from_a_file_is_trained_and_resumed(place, capsys):
    "The same formula as sid's gives the same numbers; the run keeps the file, and goes on with no other"
    ours = train(Config(**SHORT, out='ours', method='mine.py:plain'))
    assert numbers(ours) == numbers(train(Config(**SHORT, out='sid')))
    kept = json.loads((ours / 'config.json').read_text())
    assert kept['method'] == 'mine.py:plain' and re.fullmatch('[0-9a-f]{64}', kept['method_sha256'])
    assert (ours / 'method.py').read_text() == LOSS
    go_on = ('distill', '--resume', 'ours', '--max-train-images', '24')
    assert said(capsys, *go_on, '--method', 'ours/method.py:plain')[0] == 0 and rows(ours)[-1]['nimg'] == 24
    (place / 'mine.py').write_text(LOSS + '# another')
    code, text = said(capsys, *go_on, '--max-train-images', '32', '--method', 'mine.py:plain')
    assert code == 2 and text.count('\n') == 1 and 'has changed since the run began' in text
    with pytest.raises(InputError, match='has changed since'):
        train(Config(**SHORT | dict(max_train_images=32), resume='ours', method='mine.py:plain'))
    assert 'name it on this line: --method ours/method.py:plain' in said(capsys, *go_on)[1]
    assert '`method.py:plain`' in (ours / 'generator' / 'README.md').read_text()


def test_nobody_elses_file_is_run(place, capsys):
    "A folder that names a file is looked at, drawn from, scored and exported: the file stays where it is"
    run = train(Config(**SHORT, out='theirs', method='mine.py:plain'))
    (place / 'runs.txt').unlink()
    (place / 'mine.py').write_text(LOSS + '# not yet seen')
    (run / 'method.py').write_text(LOSS)
    for argv in (
        ('status', 'theirs'), ('sample', 'theirs', 'a cat', '--out', 'drawn'), ('export', 'theirs', '--to', 'card'),
        ('evaluate', 'theirs', '--n', '10'), ('compare', 'theirs', '--out', 'page.html')):
        code, text = said(capsys, *argv)
        assert code == 0, text
    for argv in (('--resume', 'theirs'), ('--config', 'theirs/config.json'), ('--resume', 'theirs', '--help')):
        code, text = 0, ''
        try:
            code, text = said(capsys, 'distill', *argv)
        except SystemExit:
            assert '--help' in argv
        assert '--help' in argv or (code == 2 and 'if you trust it, name it on this line' in text)
    assert not (place / 'runs.txt').exists()


@pytest.mark.parametrize(
    'text, name, word',
    [
        ('', 'mine.py:lost', "has no 'lost'"), ('', 'gone.py:plain', 'cannot be read'),
        ('x = 3', 'mine.py:x', 'neither a loss'),
        ('def mean(e): return e.x_g.mean()', 'mine.py:mean', 'not a number for each'),
        ('def mixed(e):\n    x = e.x_g.flatten(1).sum(1)\n    return x - x.mean()', 'mine.py:mixed', 'mixes pictures'),
        ('1/0', 'mine.py:plain', 'ZeroDivisionError')])
def test_what_is_no_loss_is_told_in_one_line(place, capsys, text, name, word):
    "And no run folder is left"
    (place / 'mine.py').write_text(LOSS + text)
    code, told = said(capsys, 'distill', '--method', name, '--device', 'cpu', '--out', 'run')
    assert code == 2 and word in told and told.count('\n') == 1 and not (place / 'run').exists()
