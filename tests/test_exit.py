"How a process of several ends: with its own status, everything written, and no teardown of Python after that."

import os, subprocess, sys
import pytest

PROGRAM = '''
import atexit, os, sys
from sid_lsg_nb import cli

class Thread:  # what a thread of a process group does when it meets Python's teardown
    def __del__(self, abort=os.abort):
        abort()

cli.left_over = Thread()
atexit.register(print, 'handler ran')
cli.read_command = lambda argv: argv
cli.command_of = lambda args: lambda args: print('work done', *args, end=' ') or {raised}
sys.argv = ['sid-lsg', 'status', 'x']
sys.exit(cli.main())
'''

def ended(world, raised='None'):
    "Status and output of a command in a process whose teardown aborts"
    return subprocess.run(
        [sys.executable, '-c', PROGRAM.replace('{raised}', raised)],
        env=os.environ | dict(WORLD_SIZE=str(world)),
        capture_output=True,
        text=True,
    )

@pytest.mark.parametrize('raised,status', [('None', 0), ("(_ for _ in ()).throw(cli.RunError('no'))", 1)])
def test_one_of_several_ends_with_its_status_and_output(raised, status):
    done = ended(2, raised)
    assert done.returncode == status, done.stderr
    assert done.stdout == 'work done status x handler ran\n' and ('no' in done.stderr) == bool(status)

def test_a_process_alone_is_torn_down_as_python_does():
    assert ended(1).returncode == -6  # so the two above would fail without `end_process`
