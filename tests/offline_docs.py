"""Render the processed notebooks to a browsable site, or to README.md, without the quarto binary.

nbdev's own preprocessing (`proc_nbs`: show_doc, hidden cells, doc links), then pandoc from `pypandoc_binary`.
From the repository root, with the package installed (`pip install -e .`):

  python tests/offline_docs.py            # the site in _docs/; fails on broken links and anchors and on saved errors
  python tests/offline_docs.py --readme   # README.md from nbs/index.ipynb"""
import argparse, json, re, shutil, sys
from base64 import b64decode
from importlib.metadata import entry_points
from pathlib import Path
import pypandoc, yaml
from nbdev.config import get_config
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs

OPTION = re.compile(r'^#\|\s*([\w-]+)\s*:\s*(.*)$')
PICTURES = {'image/png': 'png', 'image/jpeg': 'jpg', 'image/svg+xml': 'svg'}
PAGE = '''<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title} – {site}</title>
<meta name="description" content="{lead}"><link rel="stylesheet" href="site.css"></head><body><nav>{nav}</nav><main><h1>{title}</h1><p class="lead">{lead}</p>{body}</main></body></html>'''
CSS = '''body{display:flex;margin:0;font:16px/1.6 system-ui}nav{min-width:14rem;padding:1.5rem;background:#f6f6f8}nav a{display:block}main{max-width:52rem;padding:1.5rem 2rem;min-width:0}
pre{overflow:auto;padding:.7rem;background:#f6f6f8}pre.output{background:none;border-left:3px solid #ccc}img{max-width:100%}table{border-collapse:collapse}td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd}
div[class^=callout]{border-left:4px solid #47a;padding:.2rem 1rem;background:#f2f7fc}
'''

# ---- one processed notebook to markdown

def options(code):
    "Split leading `#| key: value` lines from `code`"
    opts, rest = {}, code.splitlines()
    while rest and rest[0].startswith('#|'):
        if m := OPTION.match(rest[0]): opts[m[1]] = m[2].strip()
        rest.pop(0)
    return opts, '\n'.join(rest)

def fenced(text): return '```{.output}\n' + text.rstrip() + '\n```'

def save_picture(data, mime, path):
    "Write one picture of a cell output to `path`"
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ''.join(data[mime])
    if path.suffix == '.svg': path.write_text(body, encoding='utf-8')
    else: path.write_bytes(b64decode(body))

def output_md(o, stem, spot, out, caption=''):
    "Markdown for one cell output; its picture goes to `out/<stem>_files`"
    if o['output_type'] == 'stream': return None if o['name'] == 'stderr' else fenced(''.join(o['text']))
    if o['output_type'] == 'error': sys.exit(f'{stem}: {spot} holds an error output: {o["ename"]}')
    data = o['data']
    for mime, ext in PICTURES.items():
        if mime in data:
            path = out/f'{stem}_files'/f'{spot}.{ext}'
            save_picture(data, mime, path)
            return f'![{caption}]({path.relative_to(out).as_posix()})'
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    if 'text/html' in data: return '```{=html}\n' + ''.join(data['text/html']) + '\n```'
    return fenced(''.join(data.get('text/plain', '')))

def code_md(cell, stem, i, out):
    "Markdown pieces of code cell number `i`"
    opts, code = options(''.join(cell['source']))
    if opts.get('include') == 'false': return []
    shown = [f'```python\n{code}\n```'] if code.strip() and opts.get('echo') != 'false' else []
    outputs = [] if opts.get('output') == 'false' else cell.get('outputs', [])
    made = [output_md(o, stem, f'cell-{i}-output-{j}', out, opts.get('fig-cap', '')) for j, o in enumerate(outputs)]
    return shown + [m for m in made if m]

def nb2md(path, out):
    "Front matter and markdown body of one processed notebook"
    nb, front, body = json.loads(path.read_text(encoding='utf-8')), {}, []
    for i, c in enumerate(nb['cells']):
        s = ''.join(c.get('source') or '')
        if c['cell_type'] == 'raw' and s.startswith('---'): front = yaml.safe_load(s.strip().strip('-')) or {}
        elif c['cell_type'] == 'markdown': body.append(s)
        elif c['cell_type'] == 'code': body += code_md(c, path.stem, i, out)
    return front, '\n\n'.join(body) + '\n'

def pandoc(text, to, *args): return pypandoc.convert_text(text, to, format='markdown-yaml_metadata_block-smart', extra_args=list(args))

# ---- README.md

def page_name(nb): return re.sub(r'^\d+[a-zA-Z0-9]*_', '', nb.name.lower()).removesuffix('.ipynb') + '.html'

def repo_links(md, cfg):
    "Links of the docs, rewritten to files of the repository: doc pages and notebooks, pictures, files named by their address"
    made_by = {page_name(p): p.name for p in cfg.nbs_path.glob('*.ipynb')}
    base = re.escape(f'{cfg.doc_host}{cfg.doc_baseurl}/')
    md = re.sub(rf'\]\({base}([\w.-]+\.html)(?:#[^)]*)?\)', lambda m: f'](nbs/{made_by[m[1]]})' if m[1] in made_by else m[0], md)
    md = md.replace(f']({cfg.git_url}/blob/{cfg.branch}/', '](')
    return re.sub(r'\]\((?=images/|recipes/|[\w-]+\.ipynb)', '](nbs/', md)

def write_readme(cfg, cache):
    "README.md from the processed index notebook"
    front, md = nb2md(cache/cfg.readme_nb, cache)
    if f'{Path(cfg.readme_nb).stem}_files/' in md: sys.exit('index.ipynb shows a picture as cell output: save it in nbs/images and link it')
    note = f'<!-- made from nbs/{cfg.readme_nb} by tests/offline_docs.py: edit there -->'
    md = re.sub(r'<!-- WARNING: THIS FILE WAS AUTOGENERATED.*?-->', note, md)
    head = f"# {front.get('title', cfg.title)}\n\n" + (f"> {front['description']}\n\n" if front.get('description') else '')
    text = pandoc(head + repo_links(md, cfg), 'gfm', '--wrap=preserve')
    (cfg.config_path/'README.md').write_text(text.rstrip() + '\n', encoding='utf-8')

# ---- the site

def merge(a, b):
    "Nested dict `b` laid over `a`"
    for k, v in b.items(): a[k] = merge(a.get(k) or {}, v) if isinstance(v, dict) else v
    return a

def site_config(cache):
    "The root `_quarto.yml` as staged by nbdev, merged with its metadata-files"
    cfg = yaml.safe_load((cache/'_quarto.yml').read_text(encoding='utf-8'))
    for f in cfg.get('metadata-files', []):
        if (cache/f).exists(): cfg = merge(cfg, yaml.safe_load((cache/f).read_text(encoding='utf-8')))
    return cfg

def flatten(items):
    "Files named by the sidebar, in its order"
    for o in items:
        if isinstance(o, str): yield o
        else:
            if 'href' in o: yield o['href']
            yield from flatten(o.get('contents', []))

def write_css(out):
    "Our own style and pandoc's colours for code"
    page = pandoc('```python\nx=1\n```', 'html', '--standalone', '-M', 'title=x')
    style = re.search(r'<style>(.*?)</style>', page, re.S)[1].splitlines()
    (out/'site.css').write_text(CSS + '\n'.join(l for l in style if 'code' in l and '{' in l and '}' in l), encoding='utf-8')

def page_body(md, base, pages):
    "HTML of one page, its links to notebooks turned into links to pages"
    body = pandoc(md, 'html5', '--mathml', '--wrap=preserve')
    if base: body = body.replace(f'href="{base}/', 'href="')
    return re.sub(r'href="([^":#]+\.ipynb)', lambda m: f'href="{pages.get(Path(m[1]).name, m[1])}', body)

def write_pages(cache, out, website):
    "One HTML file per notebook of the sidebar; returns how many"
    docs = [(cache/o, *nb2md(cache/o, out)) for o in flatten(website['sidebar']['contents'])]
    name = {p: front.get('output-file', p.stem + '.html') for p, front, _ in docs}
    pages, base = {p.name: n for p, n in name.items()}, website.get('site-url', '').rstrip('/')
    for p, front, md in docs:
        nav = ''.join(f'<a href="{name[o]}"{" aria-current=page" if o == p else ""}>{f.get("title", o.stem)}</a>' for o, f, _ in docs)
        html = PAGE.format(title=front.get('title', p.stem), lead=front.get('description', ''), site=website['title'], nav=nav, body=page_body(md, base, pages))
        (out/name[p]).write_text(html, encoding='utf-8')
    return len(docs)

def local_links(page):
    "Links and pictures of a page that stay on the site"
    text = page.read_text(encoding='utf-8')
    return [u for u in re.findall(r'(?:href|src)="([^"]+)"', text) if not re.match(r'^[a-z]+:', u)]

def copy_linked(out, nbs):
    "Files beside the notebooks that a page links to (pictures, recipes) go along"
    for page in out.glob('*.html'):
        for u in local_links(page):
            file = u.partition('#')[0]
            if file and not (out/file).exists() and (nbs/file).is_file():
                (out/file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(nbs/file, out/file)

def broken_links(out):
    "Local links, pictures and anchors of the site that lead nowhere, one line each"
    bad = []
    for page in sorted(out.glob('*.html')):
        for u in local_links(page):
            file, _, anchor = u.partition('#')
            target = out/file if file else page
            if not target.exists(): bad.append(f'{page.name}: broken link {u}')
            elif anchor and target.suffix == '.html' and f'id="{anchor}"' not in target.read_text(encoding='utf-8'): bad.append(f'{page.name}: broken anchor {u}')
    return bad

def write_site(cfg, cache, out):
    "The whole site in `out`"
    website = site_config(cache)['website']
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_css(out)
    n = write_pages(cache, out, website)
    copy_linked(out, cfg.nbs_path)
    if bad := broken_links(out): sys.exit('\n'.join(bad))
    print(f'{n} pages, no broken link')

# ---- both

def stage(cfg):
    "Notebooks processed by nbdev into `_proc`, with the sidebar and the root `_quarto.yml`"
    sys.path.insert(0, str(cfg.config_path))
    if not any(o.name == cfg.lib_path.name for o in entry_points(group='nbdev')): sys.exit("doc links need the package: pip install -e '.[dev]'")
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__(file_re=r'\.(?:ipynb|qmd)$')
    cache = proc_nbs(force=True)
    if (cfg.config_path/'_quarto.yml').read_text() != (cache/'_quarto.yml').read_text(): sys.exit('nbs/_quarto.yml is not the root _quarto.yml (a symlink lost in the clone?)')
    return cache

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--readme', action='store_true')
    ap.add_argument('--out', type=Path)
    a, cfg = ap.parse_args(), get_config()
    cache = stage(cfg)
    if a.readme: write_readme(cfg, cache)
    else: write_site(cfg, cache, (a.out or cfg.doc_path).absolute())

if __name__ == '__main__': main()
