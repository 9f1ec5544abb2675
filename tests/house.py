"""The rules of the house. Each check takes the root of a tree and returns its complaints, one line each; none runs or imports what it reads.

`test_house.py` holds this repository to them and shows that each can fail."""
import ast, json, re, shlex, sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions

LIB, MAX_LINES, MAX_KB, MAX_EMBEDDED_MB = 'sid_lsg_nb', 40, 600, 12
NUMBER, DEFAULT_EXP = re.compile(r'\d+'), re.compile(r'^#\|\s*default_exp\s+(\S+)', re.M)
MACHINE_PATH = re.compile(r'(?<![\w.])/(?:home|root|Users|work|mnt)/\S{1,40}')
TEXT = {'.py', '.md', '.ipynb', '.ini', '.yml', '.yaml', '.toml', '.txt', '.cfg', '.cff', '.in', '.css', '.json', '.sh'}
EMBEDDED = ['NOTICE', 'prompts.txt', 'world.json', 'reference.safetensors', 'scorer/open_clip_model.safetensors', 'teacher/model_index.json',
            *(f'teacher/{d}/diffusion_pytorch_model.safetensors' for d in ('unet', 'vae')), 'teacher/text_encoder/model.safetensors', 'teacher/tokenizer/merges.txt']

# ---- reading a tree

def notebooks(root):
    "Notebooks that nbdev sees: not hidden, not drafts"
    return sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root/'nbs').parts))

def modules(root): return sorted(p for p in (root/LIB).rglob('*.py') if not p.name.startswith('_modidx'))

def scripts(root):
    "Python that is not exported: tests, recipes, benchmarks"
    return sorted(p for d in ('tests', 'nbs', 'benchmarks') for p in (root/d).rglob('*.py') if '.ipynb_checkpoints' not in p.parts)

def cells(nb): return [''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']

def parse_cell(code):
    "Syntax tree of a cell, its magics left out"
    return ast.parse('' if code.lstrip().startswith('%%') else re.sub(r'^(\s*)[%!].*$', r'\1pass', code, flags=re.M))

def trees(root):
    "`(place, syntax tree)` of every module, script and notebook cell"
    for f in [*modules(root), *scripts(root)]: yield f.relative_to(root), ast.parse(f.read_text(encoding='utf-8'))
    for nb in notebooks(root):
        for code in cells(nb): yield nb.relative_to(root), parse_cell(code)

# ---- notebooks

def odd_notebooks(root, at_least=15):
    "Too few notebooks, or a mark that makes nbdev_test pass without running them"
    nbs = notebooks(root)
    few = [f'nbs: {len(nbs)} notebooks, {at_least} or more expected'] if len(nbs) < at_least else []
    marks = [f'{p.relative_to(root)}: nbdev_test skips this folder and says nothing' for p in sorted((root/'nbs').rglob('.notest'))]
    return few + marks + [c for nb in nbs for c in bad_notebook(root, nb)]

def bad_notebook(root, nb):
    "Not JSON, too heavy, or with a saved error"
    name, kb = nb.relative_to(root), nb.stat().st_size/1024
    try: doc = json.loads(nb.read_text(encoding='utf-8'))
    except ValueError as e: return [f'{name}: not valid JSON ({e})']
    heavy = [f'{name}: {kb:.0f} kB, at most {MAX_KB}'] if kb > MAX_KB else []
    outputs = [o for c in doc['cells'] for o in c.get('outputs', [])]
    return heavy + [f'{name}: saved error output {o.get("ename")}' for o in outputs if o['output_type'] == 'error']

# ---- the ladder

def rooms(root):
    "Module -> number of the notebook that makes it"
    found = {}
    for nb in notebooks(root):
        if n := NUMBER.match(nb.name):
            for m in DEFAULT_EXP.findall('\n'.join(cells(nb))): found.setdefault(m, int(n[0]))
    return found

def inner_imports(tree):
    "Names of the package's modules that a syntax tree imports"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from (a.name.split('.')[1] for a in n.names if a.name.startswith(LIB + '.'))
        elif isinstance(n, ast.ImportFrom):
            module = f'{LIB}.{n.module or ""}'.rstrip('.') if n.level else n.module
            if module == LIB: yield from (a.name for a in n.names)
            elif module.startswith(LIB + '.'): yield module.split('.')[1]

def climbs(place, tree, number, own, numbers):
    "Imports of modules that are not below `number`"
    names = sorted(m for m in set(inner_imports(tree)) if m in numbers and m not in own and numbers[m] >= number)
    return [f'{place}: imports {m} of notebook {numbers[m]:02d}, not below {number:02d}' for m in names]

def ladder(root):
    "Modules and notebooks import only modules of lower notebooks"
    numbers, out = rooms(root), []
    for m, n in numbers.items():
        f = root/LIB/f'{m}.py'
        out += climbs(f.relative_to(root), ast.parse(f.read_text(encoding='utf-8')), n, [m], numbers) if f.exists() else [f'{f.relative_to(root)}: missing, run nbdev_export']
    for nb in notebooks(root):
        if n := NUMBER.match(nb.name):
            own = DEFAULT_EXP.findall('\n'.join(cells(nb)))
            for code in cells(nb): out += climbs(nb.relative_to(root), parse_cell(code), int(n[0]), own, numbers)
    return list(dict.fromkeys(out))

def strays(root):
    "Modules that no notebook makes; an `__init__` that holds more than the version"
    made = {*rooms(root), '__init__'}
    out = [f'{p.relative_to(root)}: no notebook makes it' for p in modules(root) if p.stem not in made]
    init = ast.parse((root/LIB/'__init__.py').read_text(encoding='utf-8'))
    return out + [f'{LIB}/__init__.py: imports something' for n in ast.walk(init) if isinstance(n, (ast.Import, ast.ImportFrom))]

# ---- code

def long_functions(root):
    "Functions over `MAX_LINES` lines in modules and scripts"
    return [f'{p.relative_to(root)}:{n.lineno}: {n.name} has {size} lines, at most {MAX_LINES}'
            for p in [*modules(root), *scripts(root)] for n in ast.walk(ast.parse(p.read_text(encoding='utf-8')))
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and (size := n.end_lineno - n.lineno + 1) > MAX_LINES]

def is_unsafe(call):
    "Does this call unpickle what may come from elsewhere?"
    name, given = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
    unpickles = re.search(r'(?:^|\.)(?:pickle|dill|joblib|cloudpickle)\.loads?$', name)
    return bool(unpickles) or (name.endswith('torch.load') and given.get('weights_only') != 'True') or given.get('allow_pickle') == 'True'

def unsafe_loads(root):
    "`torch.load` without `weights_only=True`, and unpickling, anywhere"
    return [f'{place}:{n.lineno}: {ast.unparse(n)[:60]} unpickles' for place, tree in trees(root) for n in ast.walk(tree) if isinstance(n, ast.Call) and is_unsafe(n)]

def outer_imports(tree):
    "Top-level packages that a module imports when it is imported"
    for n in tree.body:
        if isinstance(n, ast.Import): yield from (a.name.split('.')[0] for a in n.names)
        elif isinstance(n, ast.ImportFrom) and not n.level: yield n.module.split('.')[0]

def norm(name): return re.sub(r'[-_.]+', '-', name).lower()

def unstated(root):
    "Packages that the library imports and settings.ini does not require"
    cp = ConfigParser(delimiters=['='])
    cp.read(root/'settings.ini', encoding='utf-8')
    stated = {norm(re.match(r'[\w.-]+', r)[0]) for r in shlex.split(cp['DEFAULT']['requirements'])}
    tops = {t for p in modules(root) for t in outer_imports(ast.parse(p.read_text(encoding='utf-8')))} - {LIB} - set(sys.stdlib_module_names)
    known = packages_distributions()
    return [f'settings.ini: {t} is imported by the library and not required' for t in sorted(tops) if not stated & {norm(d) for d in known.get(t, [t])}]

# ---- files

def texts(root):
    "Text files of the house"
    skip = {'.git', '_proc', '_docs', 'runs', 'build', 'dist', 'shared', 'venv', '.venv', '.ci-venv', '__pycache__'}
    tops = [p for p in root.iterdir() if p.name not in skip and p.suffix != '.egg-info']
    files = (f for p in tops for f in ([p] if p.is_file() else p.rglob('*')))
    return sorted(f for f in files if f.is_file() and (f.suffix in TEXT or f.parent.name == '.ci') and not skip & set(f.relative_to(root).parts))

def machine_paths(root):
    "Paths of somebody's machine in a text file"
    found = ((p, MACHINE_PATH.search(p.read_text(encoding='utf-8', errors='ignore'))) for p in texts(root))
    return [f'{p.relative_to(root)}: names a path of a machine, {m[0]}' for p, m in found if m]

def embedded_files(root): return {p.relative_to(root).as_posix(): p.stat().st_size for p in (root/LIB/'embedded').rglob('*') if p.is_file() and p.suffix != '.pyc'}

def embedded_gaps(sizes, packed):
    "`sizes` of the bundled files against the names `packed` in a wheel or sdist"
    lacks = [f'embedded/{f}: not in the tree' for f in EMBEDDED if f'{LIB}/embedded/{f}' not in sizes]
    left = [f'{f}: not in the package' for f in sorted(sizes) if f not in packed]
    mb = sum(sizes.values())/1e6
    return lacks + left + ([f'embedded: {mb:.1f} MB, at most {MAX_EMBEDDED_MB}'] if mb > MAX_EMBEDDED_MB else [])
