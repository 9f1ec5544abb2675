"""Processes that do not each import the library anew: a server that has imported it forks them.

They are processes of their own in all else: pid, signals, folder, environment, output, exit handlers and exit status.
How the command starts from nothing and how Python is torn down needs `subprocess`: each file that forks has such a run
too."""

import atexit, faulthandler, importlib, json, os, select, signal, socket, subprocess, sys, tempfile, threading
import time, traceback
from functools import cache
from pathlib import Path

# ---- the server

PRELOAD = (
    'sid_lsg_nb.cli sid_lsg_nb.training.trainer sid_lsg_nb.metrics.protocols sid_lsg_nb.testing open_clip cleanfid.fid '
    'matplotlib.figure matplotlib.backends.backend_agg torch.distributed.fsdp torch._dynamo '
    'torch.distributed.checkpoint'
).split()

def keep(told, *fds):
    "Fork, and stay between the server and the process: tell its pid and, when it has ended, its status. False: in it"
    pid = os.fork()
    if pid == 0:
        return False
    for fd in fds:
        os.close(fd)
    os.write(told, f'{pid}\n'.encode())
    os.write(told, f'{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n'.encode())
    os._exit(0)

def serve(control):
    "Fork for each message until nobody is left who sends one; in a forked process: what it was asked for"
    kept = 0
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1, 4)
        while kept and os.waitpid(-1, os.WNOHANG if message else 0)[0]:
            kept -= 1
        if not message:
            return None
        if os.fork() == 0:
            control.close()
            request, out, err, told = fds
            keep(told, request, out, err)
            os.dup2(out, 1)
            os.dup2(err, 2)
            asked = json.loads(os.pread(request, 1 << 20, 0))
            for fd in fds:
                os.close(fd)
            return asked
        kept += 1
        for fd in fds:
            os.close(fd)

def server(fd):
    "Import, fork; in a forked process: run the command and end"
    for name in PRELOAD:
        importlib.import_module(name)
    tasks = Path('/proc/self/task').glob('*/comm')
    threads = [name for f in tasks if not (name := f.read_text()).startswith('jemalloc')]  # it minds forks by itself
    assert len(threads) < 2, f'a process with threads must not fork: {threads}'
    asked = serve(socket.socket(fileno=fd))
    if asked is None:
        return
    status = 1
    try:
        status = run(asked)
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
    end(status or 0)

def run(asked):
    "Be the process that was asked for; if it crashes outside Python it says where it was"
    faulthandler.enable()
    os.chdir(asked['cwd'])
    os.environ.clear()
    os.environ.update(asked['env'])
    how, what, *words = asked['words']
    sys.argv = [what if how == '-m' else how, *words]
    if how == '-m':
        return importlib.import_module(what).main()
    exec(compile(what, '<string>', 'exec'), {'__name__': '__main__'})

def end(status):
    "As Python ends, but for freeing, page by page, what the processes share"
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)

# ---- its clients

def clean_env(**more):
    "This process's environment, for a process of a run"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    return env | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', MPLBACKEND='agg') | more

@cache
def control():
    "The socket to the server, which starts at the first use"
    ours, its = socket.socketpair()
    path = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    program = f'import forks; forks.server({its.fileno()})'
    process = subprocess.Popen(
        [sys.executable, '-c', program], env=clean_env(PYTHONPATH=path), pass_fds=[its.fileno()],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    its.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours

class Forked:
    "A forked process, with the methods of `subprocess.Popen` that tests use"

    def __init__(self, words, cwd, env=None):
        self.out, self.err, request = (tempfile.TemporaryFile() for _ in range(3))
        request.write(json.dumps(dict(words=[*map(str, words)], cwd=str(cwd), env=env or clean_env())).encode())
        request.flush()
        heard, told = os.pipe()
        socket.send_fds(control(), [b'.'], [request.fileno(), self.out.fileno(), self.err.fileno(), told])
        os.close(told)
        request.close()
        self.heard, self.returncode = os.fdopen(heard), None
        self.pid = int(self.heard.readline())

    def poll(self, seconds=0):
        "The exit status, minus the signal that ended it, or None while it runs"
        if self.returncode is None and select.select([self.heard], [], [], seconds)[0]:
            self.returncode = int(self.heard.readline())
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=600):
        "Standard output and error, when it has ended; raises `TimeoutError` if it does not"
        if self.poll(timeout) is None:
            self.kill()
            raise TimeoutError(f'{self.pid} did not end within {timeout} s')
        for file in (self.out, self.err):
            file.seek(0)
        return tuple(f.read().decode(errors='replace') for f in (self.out, self.err))

def start_ranks(words, cwds, env=None, local=True):
    """The processes of one run, as `torchrun` starts them (it is the store that they meet at): one per folder, with
    `words` or, per process, a list of its own; `local`: on one machine"""
    from torch.distributed import TCPStore

    n, store = len(cwds), TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    words = words if isinstance(words[0], list) else [words]*n
    place = lambda k: dict(
        RANK=str(k), WORLD_SIZE=str(n), LOCAL_RANK=str(k*local), LOCAL_WORLD_SIZE=str(n if local else 1),
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE='True',
        TORCHELASTIC_RESTART_COUNT='0', TORCHELASTIC_RUN_ID='tests')
    ranks = [Forked(words[k], cwd, (env or clean_env()) | place(k)) for k, cwd in enumerate(cwds)]
    ranks[0].store = store  # lives as long as they do
    return ranks

def finish(processes, seconds=600):
    "`(status, output, error)` of each, when all have ended; at the latest then they are killed"
    end = time.monotonic() + seconds
    try:
        said = [p.communicate(max(0, end - time.monotonic())) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, said)]
