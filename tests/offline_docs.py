"""Render the processed notebooks to a browsable site, or to README.md, without the quarto binary.

nbdev's own preprocessing (`proc_nbs`: show_doc, hidden cells, doc links), then pandoc from `pypandoc_binary`.
From the repository root, with the package installed (`pip install -e .`):

  python tests/offline_docs.py             # the site in _docs/; fails on broken links, broken anchors, saved errors
  python tests/offline_docs.py --readme    # README.md from nbs/index.ipynb; with --out FOLDER the site, too
  python tests/offline_docs.py --sidebar   # nbs/sidebar.yml, after a notebook was added, moved or renamed
  python tests/offline_docs.py --house     # the same and the map: nbs/map.qmd, picture, tables of CONTRIBUTING.md"""
import argparse, html, json, os, re, shutil, sys
from base64 import b64decode
from importlib.metadata import entry_points
from pathlib import Path
import pypandoc, yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
import house_map

OPTION = re.compile(r'^#\|\s*([\w-]+)\s*:\s*(.*)$')
PICTURES = {'image/png': 'png', 'image/jpeg': 'jpg', 'image/svg+xml': 'svg'}
PAGE = '''<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title} – {site}</title>
<meta name="description" content="{lead}"><link rel="stylesheet" href="{css}"></head>
<body><nav>{nav}</nav><main><h1>{title}</h1><p class="lead">{lead}</p>{body}</main></body></html>'''
CSS = '''body{display:flex;margin:0;font:16px/1.6 system-ui}
nav{width:16rem;flex:none;padding:1.5rem;background:#f6f6f8}nav a{display:block}
nav h2{font-size:1rem;margin:1.2rem 0 0}nav p{font-size:.8rem;line-height:1.3;margin:0 0 .3rem;color:#555}
main{max-width:52rem;padding:1.5rem 2rem;min-width:0}
pre{overflow:auto;padding:.7rem;background:#f6f6f8}pre.output{background:none;border-left:3px solid #ccc}
img{max-width:100%}table{border-collapse:collapse}td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd}
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
    "Markdown for one cell output; its picture goes to `<stem>_files` in the page's folder `out`"
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
    if opts.get('code-fold') == 'true': shown = ['<details><summary>Code</summary>', *shown, '</details>']
    outputs = [] if opts.get('output') == 'false' else cell.get('outputs', [])
    caption = opts.get('fig-cap', '')
    made = [output_md(o, stem, f'cell-{i}-output-{j}', out, caption) for j, o in enumerate(outputs)]
    return shown + [m for m in made if m]

def nb2md(path, out):
    "Front matter and markdown body of one processed notebook; its pictures go to the folder `out`"
    nb, front, body = json.loads(path.read_text(encoding='utf-8')), {}, []
    for i, c in enumerate(nb['cells']):
        s = ''.join(c.get('source') or '')
        if c['cell_type'] == 'raw' and s.startswith('---'): front = yaml.safe_load(s.strip().strip('-')) or {}
        elif c['cell_type'] == 'markdown': body.append(s)
        elif c['cell_type'] == 'code': body += code_md(c, path.stem, i, out)
    return front, '\n\n'.join(body) + '\n'

def qmd2md(path):
    "Front matter and markdown body of a page without cells"
    _, front, body = path.read_text(encoding='utf-8').split('---\n', 2)
    return yaml.safe_load(front), body

def page2md(path, out): return nb2md(path, out) if path.suffix == '.ipynb' else qmd2md(path)

def pandoc(text, to, *args):
    "Markdown converted by pandoc"
    return pypandoc.convert_text(text, to, format='markdown-yaml_metadata_block-smart', extra_args=list(args))

# ---- README.md

def folder(page): return page.rpartition('/')[0]

def page_name(nb):
    "Page of a notebook, both relative to where notebooks and pages lie: nbdev keeps the folder, not the number"
    return (nb.parent/re.sub(r'^\d+[a-zA-Z0-9]*_', '', nb.name.lower())).with_suffix('.html').as_posix()

def repo_links(md, cfg):
    "Links of the docs, rewritten to files of the repository: pages, notebooks, pictures, files named by address"
    nbs = (p.relative_to(cfg.nbs_path) for p in cfg.nbs_path.rglob('*.ipynb'))
    made_by, base = {page_name(p): p.as_posix() for p in nbs}, re.escape(f'{cfg.doc_host}{cfg.doc_baseurl}/')
    to_repo = lambda m: f'](nbs/{made_by[m[1]]})' if m[1] in made_by else m[0]
    md = re.sub(rf'\]\({base}([\w./-]+\.html)(?:#[^)]*)?\)', to_repo, md)
    md = md.replace(f']({cfg.git_url}/blob/{cfg.branch}/', '](')
    return re.sub(r'\]\((?!nbs/)(?=images/|recipes/|[\w/-]+\.(?:ipynb|qmd))', '](nbs/', md)

def write_readme(cfg, cache):
    "README.md from the processed index notebook"
    front, md = nb2md(cache/cfg.readme_nb, cache)
    if f'{Path(cfg.readme_nb).stem}_files/' in md:
        sys.exit('index.ipynb shows a picture as cell output: save it in nbs/images and link it')
    note = f'<!-- made from nbs/{cfg.readme_nb} by tests/offline_docs.py: edit there -->'
    md = re.sub(r'<!-- WARNING: THIS FILE WAS AUTOGENERATED.*?-->', note, md)
    lead = f"> {front['description']}\n\n" if front.get('description') else ''
    head = f"# {front.get('title', cfg.title)}\n\n{lead}"
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
        else: yield from flatten(o.get('contents', []))

def write_css(out):
    "Our own style and pandoc's colours for code"
    page = pandoc('```python\nx=1\n```', 'html', '--standalone', '-M', 'title=x')
    style = re.search(r'<style>(.*?)</style>', page, re.S)[1].splitlines()
    rules = [line for line in style if 'code' in line and '{' in line and '}' in line]
    (out/'site.css').write_text(CSS + '\n'.join(rules), encoding='utf-8')

def from_page(target, page): return os.path.relpath(target, folder(page) or '.').replace(os.sep, '/')

def within(page, link): return os.path.normpath(os.path.join(folder(page), link)).replace(os.sep, '/')

def page_body(md, page, base, pages):
    "HTML of one page; its links to notebooks and to pages by address turned into links from here to pages"
    body = pandoc(md, 'html5', '--mathml', '--wrap=preserve')
    if base: body = re.sub(rf'href="{re.escape(base)}/([^"]*)"', lambda m: f'href="{from_page(m[1], page)}"', body)
    def to_page(m):
        there = pages.get(within(page, m[1]))
        return f'href="{from_page(there, page)}' if there else m[0]
    return re.sub(r'href="([^":#]+\.(?:ipynb|qmd))', to_page, body)

def nav_html(items, page, pages, titles):
    "The side bar as one page shows it: sections, their one line, links to the other pages"
    out = []
    for o in items:
        if isinstance(o, str):
            here = ' aria-current=page' if pages[o] == page else ''
            out.append(f'<a href="{from_page(pages[o], page)}"{here}>{html.escape(titles[o])}</a>')
        elif 'section' in o:
            out += [f'<h2>{html.escape(o["section"])}</h2>', nav_html(o['contents'], page, pages, titles)]
        else: out.append(f'<p>{html.escape(o["text"])}</p>')
    return ''.join(out)

def write_pages(cache, out, website):
    "One HTML file per file that the sidebar names, in the same folder; returns how many"
    contents, base = website['sidebar']['contents'], website.get('site-url', '').rstrip('/')
    docs = {o: page2md(cache/o, out/folder(o)) for o in flatten(contents)}
    pages = {o: within(o, front.get('output-file', Path(o).stem + '.html')) for o, (front, _) in docs.items()}
    titles = {o: front.get('title', Path(o).stem) for o, (front, _) in docs.items()}
    for o, (front, md) in docs.items():
        page, file = pages[o], out/pages[o]
        text = PAGE.format(title=titles[o], lead=front.get('description', ''), site=website['title'],
                           css=from_page('site.css', page), nav=nav_html(contents, page, pages, titles),
                           body=page_body(md, page, base, pages))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding='utf-8')
    return len(docs)

def local_links(page):
    "Links and pictures of a page that stay on the site"
    text = page.read_text(encoding='utf-8')
    return [u for u in re.findall(r'(?:href|src)="([^"]+)"', text) if not re.match(r'^[a-z]+:', u)]

def copy_linked(out, nbs):
    "Files beside the notebooks that a page links to (pictures, recipes) go along"
    for page in sorted(out.rglob('*.html')):
        for u in local_links(page):
            file = within(page.relative_to(out).as_posix(), u.partition('#')[0])
            if not file.startswith('..') and not (out/file).exists() and (nbs/file).is_file():
                (out/file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(nbs/file, out/file)

def broken_link(out, page, link):
    "What is wrong with one local link of `page`, a path below `out`; None if it holds"
    file, _, anchor = link.partition('#')
    place = within(page, file) if file else page
    target = out/place
    if place.startswith('..') or not target.is_file(): return f'{page}: broken link {link}'
    if anchor and target.suffix == '.html' and f'id="{anchor}"' not in target.read_text(encoding='utf-8'):
        return f'{page}: broken anchor {link}'

def broken_links(out):
    "Local links, pictures and anchors of the site that lead nowhere, one line each"
    pages = {p.relative_to(out).as_posix(): p for p in sorted(out.rglob('*.html'))}
    return [bad for page, p in pages.items() for u in local_links(p) if (bad := broken_link(out, page, u))]

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

# ---- all of it

def stage(cfg):
    "Notebooks processed by nbdev into `_proc`, with the sidebar and the root `_quarto.yml`"
    sys.path.insert(0, str(cfg.config_path))
    if not any(o.name == cfg.lib_path.name for o in entry_points(group='nbdev')):
        sys.exit("doc links need the package: pip install -e '.[dev]'")
    refresh_quarto_yml()
    if (cfg.nbs_path/'sidebar.yml').read_text(encoding='utf-8') != house_map.sidebar(cfg.config_path):
        sys.exit('nbs/sidebar.yml is not of these notebooks: run python tests/offline_docs.py --house')
    cache = proc_nbs(force=True)
    if (cfg.config_path/'_quarto.yml').read_text() != (cache/'_quarto.yml').read_text():
        sys.exit('nbs/_quarto.yml is not the root _quarto.yml (a symlink lost in the clone?)')
    return cache

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ('--readme', '--sidebar', '--house'): ap.add_argument(name, action='store_true')
    ap.add_argument('--out', type=Path)
    a, cfg = ap.parse_args(), get_config()
    if a.house: house_map.write_map(cfg.config_path)
    elif a.sidebar: house_map.write_sidebar(cfg.config_path)
    else:
        cache = stage(cfg)
        if a.readme: write_readme(cfg, cache)
        if a.out or not a.readme: write_site(cfg, cache, (a.out or cfg.doc_path).absolute())

if __name__ == '__main__': main()
