"""Trackers tried for real, offline: trackio's database in a folder, Weights & Biases in the run folder. (TensorBoard
is tried in the chapter of the log.)"""

import importlib.util, json, os, subprocess, sys
import pytest

ROWS = [dict(nimg=160 * i, fisher=10 * (1 - 0.6**i), loss=0.1 * (-1) ** i) for i in range(1, 21)]
SEND = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
from sid_lsg_nb.training.config import Config
from sid_lsg_nb.training.distributed import Distributed
from sid_lsg_nb.training.log import tracker
to, folder, first, rest, end = json.loads(sys.argv[1])
t = tracker(to, asdict(Config()), Path(folder), Distributed('cpu'), first)
for row in rest: t.log(row)
if end: t.end()
else: os._exit(9)  # as a kill would
"""
READ = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
runs = [*trackio.Api().runs('sid-lsg-nb')]
print(json.dumps([[r.name, r.config['seed'], SQLiteStorage.get_logs('sid-lsg-nb', r.name, run_id=r.id)] for r in runs]))
"""

def needs(package: str):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f'pip install {package}')

def run_python(code: str, *args: str, status: int = 0, **env: str) -> str:
    "What the program printed last, in a Python of its own; an exit status that is not `status` fails"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(('TRACKIO_', 'WANDB_'))}
    done = subprocess.run(
        [sys.executable, '-c', code, *args], capture_output=True, text=True, env=kept | env
    )
    assert done.returncode == status, done.stderr
    return done.stdout.strip().rpartition('\n')[2]

def test_trackio_equals_the_log_after_a_kill(tmp_path):
    needs('trackio')
    env = dict(TRACKIO_DIR=str(tmp_path / 'trackio'))
    one, other = tmp_path / 'a/run', tmp_path / 'b/run'  # of one name, in two places
    for folder in (one, other):
        folder.mkdir(parents=True)
    run_python(SEND, json.dumps(['trackio', str(other), [], ROWS[:3], True]), **env)
    run_python(SEND, json.dumps(['trackio', str(one), [], ROWS[:9], False]), status=9, **env)
    run_python(SEND, json.dumps(['trackio', str(one), ROWS[:5], ROWS[5:], True]), **env)
    runs = json.loads(run_python(READ, **env))
    assert len(runs) == len({name for name, _, _ in runs}) == 2
    assert all(name.startswith('run-') and seed == 0 for name, seed, _ in runs)
    for seen, rows in zip(sorted((r[2] for r in runs), key=len), (ROWS[:3], ROWS)):
        assert [l['step'] for l in seen] == [r['nimg'] for r in rows]
        assert [(l['fisher'], l['loss']) for l in seen] == [(r['fisher'], r['loss']) for r in rows]

def test_wandb_offline_stays_in_the_run_folder(tmp_path):
    needs('wandb')
    env = dict(WANDB_MODE='offline', WANDB_SILENT='true')
    for first, rest in (([], ROWS[:8]), (ROWS[:5], ROWS[5:])):
        run_python(SEND, json.dumps(['wandb', str(tmp_path), first, rest, True]), **env)
    files = sorted(tmp_path.glob('wandb/offline-run-*/run-*.wandb'))
    assert len({f.stem for f in files}) == 1  # one id: wandb joins them
    assert b'fisher' in files[-1].read_bytes() and b'3200' in files[-1].read_bytes()
