"Files and folders that are replaced, with the writer killed at every line: something whole is always there."

import os, subprocess, sys
import pytest
import torch
from sid_lsg_nb import core
from sid_lsg_nb.training.checkpoint import checkpoints, load_latest, numbered_folders, save_checkpoint
from sid_lsg_nb.core import atomic_file, atomic_folder, clean_up
from sid_lsg_nb.export.formats import write_safetensors

TRACED = core.__file__, checkpoints.__code__.co_filename, sys.modules['shutil'].__file__

@pytest.fixture(autouse=True)
def synced(monkeypatch):
    "Paths that were forced to the disk; a kill does not need it, and a busy disk takes its time"
    paths, real = [], os.fsync
    monkeypatch.setattr(
        os,
        'fsync',
        lambda fd: paths.append(os.readlink(f'/proc/self/fd/{fd}')) if sys.platform == 'linux' else real(fd),
    )
    return paths

def killed_at(line, work):
    "Run `work` in a child that ends, as by kill -9, before its line number `line`; False when it came to its end"
    if (pid := os.fork()) == 0:
        seen = 0

        def count(frame, event, _):
            nonlocal seen
            if frame.f_code.co_filename not in TRACED:
                return None
            if event == 'line':
                if seen == line:
                    os._exit(9)
                seen += 1
            return count

        try:
            sys.settrace(count)
            work()
            sys.settrace(None)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9

def at_every_line(work, check, every=1):
    "Kill at line 0, 1, 2, ..., look at what is there each time"
    line = 0
    while killed_at(line, work):
        check(line)
        line += every
    return line

def pair(folder, version):
    with atomic_folder(folder) as new:
        for name in 'ab':
            (new / name).write_text(version)

@pytest.mark.parametrize('exchange', [True, False])
def test_a_folder_replaced(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(core, '_exchange', lambda a, b: False)
    home = tmp_path / 'student'
    pair(home, 'old')
    gone = 0

    def check(line):
        nonlocal gone
        gone += not home.exists()
        if not exchange:
            clean_up(tmp_path)  # what the next writer does first
        versions = {(home / name).read_text() for name in 'ab'}
        assert len(versions) == 1 and versions <= {'old', 'new'}, line
        pair(home, 'old')
        assert [p.name for p in tmp_path.iterdir()] == ['student'], 'debris of the killed'

    assert at_every_line(lambda: pair(home, 'new'), check, every=1 + exchange) > 30
    assert (gone == 0) == (exchange and sys.platform == 'linux'), gone

def test_a_checkpoint_of_the_same_name(tmp_path):
    old, new = dict(x=torch.zeros(9)), dict(x=torch.ones(9))
    save_checkpoint(tmp_path, 7, old)
    save_checkpoint(tmp_path, 8, old)

    def check(line):
        path, state = load_latest(tmp_path)
        assert path.name == f'{8:012d}' and len(set(state['x'].tolist())) == 1, line
        assert len(checkpoints(tmp_path)) == 2

    assert at_every_line(lambda: save_checkpoint(tmp_path, 8, new), check, every=5) > 60

def test_one_more_checkpoint_than_is_kept(tmp_path):
    for n in (1, 2):
        save_checkpoint(tmp_path, n, dict(n=n))

    def check(line):
        assert load_latest(tmp_path)[1]['n'] in (2, 3) and len(checkpoints(tmp_path)) >= 1

    at_every_line(lambda: save_checkpoint(tmp_path, 3, dict(n=3), keep=1), check, every=7)

def test_what_another_process_is_writing_stays(tmp_path):
    "A live process's temporary folder, another machine's, and a dead one's"
    sleeper = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    live, other, left = (
        tmp_path / f'.{5:012d}.{h}.{pid}-0.tmp'
        for h, pid in ((core._HOST, sleeper.pid), ('elsewhere', dead.pid), (core._HOST, dead.pid))
    )
    for f in (live, other, left):
        f.mkdir()
    save_checkpoint(tmp_path, 6, dict(n=6))
    sleeper.communicate(b'\n')
    assert live.exists() and other.exists() and not left.exists()

def strange(root):
    "Things that are no checkpoints of ours, by name"
    made = dict(
        empty='999999999',
        letters='12x',
        arabic='٣٣٣',
        text='888888888',
        other='777777777',
        moved='666666666',
        torn='555555555',
    )
    for k, name in made.items():
        (root / name).mkdir() if k != 'text' else (root / name).write_text('a file')
    (root / made['other'] / 'notes.md').write_text('mine')
    whole = checkpoints(root)[0]
    for k in ('moved', 'torn'):
        for f in whole.iterdir():
            (root / made[k] / f.name).write_bytes(f.read_bytes()[: None if k == 'moved' else -9])
    return set(made.values())

@pytest.mark.parametrize('keep', [1, 2])
def test_strangers_are_not_counted_nor_touched(tmp_path, keep):
    for n in (1, 2):
        save_checkpoint(tmp_path, n, dict(n=n, x=torch.ones(3)), keep)
    names = strange(tmp_path)
    before = {p: p.stat().st_mtime_ns for name in names for p in (tmp_path / name).rglob('*')}
    assert {p.name for p in checkpoints(tmp_path)} == {f'{n:012d}' for n in (1, 2)[-keep:]} and len(
        numbered_folders(tmp_path)
    ) > keep
    with pytest.warns(UserWarning, match='is left alone'):
        assert load_latest(tmp_path)[1]['n'] == 2
    save_checkpoint(tmp_path, 3, dict(n=3), keep)
    assert {p.name for p in checkpoints(tmp_path)} == {f'{n:012d}' for n in (2, 3)[-keep:]}
    assert before == {p: p.stat().st_mtime_ns for p in before} and all((tmp_path / n).exists() for n in names)

def test_a_stranger_with_the_name_that_is_needed(tmp_path, capsys):
    (tmp_path / f'{3:012d}').mkdir()
    (tmp_path / f'{3:012d}/notes.md').write_text('mine')
    save_checkpoint(tmp_path, 3, dict(n=3))
    assert (
        load_latest(tmp_path)[1]['n'] == 3
        and (tmp_path / f'{3:012d}.not-a-checkpoint-1/notes.md').read_text() == 'mine'
    )
    assert 'not-a-checkpoint-1' in capsys.readouterr().out

@pytest.mark.skipif(sys.platform != 'linux', reason='/proc tells which file a descriptor is')
def test_all_is_forced_to_the_disk_before_and_after_the_rename(tmp_path, synced):
    for version in ('old', 'new'):
        synced.clear()
        pair(tmp_path / 'student', version)
        assert [p.rsplit('/', 1)[-1].split('.')[0] for p in synced[:2]] in (
            ['a', 'b'],
            ['b', 'a'],
        ) and '.student.' in synced[2]
        assert synced[3:] == [str(tmp_path)]

@pytest.mark.parametrize('mask', [0o022, 0o027, 0o077, 0o002])
def test_modes_are_what_the_umask_says(tmp_path, mask):
    old = os.umask(mask)
    try:
        save_checkpoint(tmp_path / 'checkpoints', 1, dict(x=torch.ones(3)))
        with atomic_file(tmp_path / 'single.safetensors') as f:
            os.close(os.open(f, os.O_CREAT | os.O_WRONLY, 0o600))
        write_safetensors(dict(x=torch.ones(3)), tmp_path / 'exported.safetensors')
    finally:
        os.umask(old)
    for p in (p for p in tmp_path.rglob('*')):
        assert p.stat().st_mode & 0o777 == (0o777 if p.is_dir() else 0o666) & ~mask, p
