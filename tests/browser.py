"""A headless Chromium, driven over its own pipe (`--remote-debugging-pipe`): no further package, no port."""

import base64, json, os, select, shutil, subprocess, tempfile, time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--remote-debugging-pipe',
         '--no-first-run', '--disable-background-networking', '--window-size=1280,1000')


class Browser:
    "One page; what it asks for is kept in `requests`, what it complains about in `complaints`"

    def __init__(self):
        self.home, self.last, self.buffer, self.requests, self.complaints = tempfile.mkdtemp(), 0, b'', [], []
        its_in, self.out = os.pipe()
        self.back, its_out = os.pipe()
        os.set_inheritable(its_in, True)
        os.set_inheritable(its_out, True)
        line = f'exec "$0" "$@" 3<&{its_in} 4>&{its_out}'
        self.process = subprocess.Popen(
            ['bash', '-c', line, CHROMIUM, *FLAGS, f'--user-data-dir={self.home}', 'about:blank'], close_fds=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(its_in)
        os.close(its_out)
        self.session = None
        page = next(t for t in self.ask('Target.getTargets')['targetInfos'] if t['type'] == 'page')
        self.session = self.ask('Target.attachToTarget', targetId=page['targetId'], flatten=True)['sessionId']
        for domain in ('Page', 'Network', 'Runtime', 'Log'):
            self.ask(f'{domain}.enable')

    def __enter__(self): return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.back)
        shutil.rmtree(self.home, ignore_errors=True)

    def ask(self, method, **params):
        "One command and its result; events that come in between are noted"
        self.last += 1
        message = dict(id=self.last, method=method, params=params)
        if self.session: message['sessionId'] = self.session
        os.write(self.out, json.dumps(message).encode() + b'\0')
        while True:
            answer = self.next_message()
            if answer.get('id') == self.last:
                assert 'error' not in answer, answer
                return answer['result']
            self.note(answer)

    def next_message(self, seconds=60):
        end = time.monotonic() + seconds
        while b'\0' not in self.buffer:
            assert select.select([self.back], [], [], max(0, end - time.monotonic()))[0], 'the browser is silent'
            self.buffer += os.read(self.back, 1 << 20)
        message, _, self.buffer = self.buffer.partition(b'\0')
        return json.loads(message)

    def note(self, event):
        "Keep what the page asks for, and its errors"
        p = event.get('params', {})
        if event.get('method') == 'Network.requestWillBeSent': self.requests.append(p['request']['url'])
        if event.get('method') == 'Runtime.exceptionThrown': self.complaints.append(p['exceptionDetails']['text'])
        if event.get('method') == 'Log.entryAdded': self.complaints.append(p['entry']['text'])

    def open(self, url):
        self.ask('Page.navigate', url=url)
        self.wait(f'location.href == {url!r} && document.readyState == "complete"')

    def js(self, code):
        "Value of an expression on the page"
        answer = self.ask('Runtime.evaluate', expression=code, returnByValue=True)
        assert 'exceptionDetails' not in answer, (code, answer)
        return answer['result'].get('value')

    def wait(self, code, seconds=60):
        "Until an expression is true"
        end = time.monotonic() + seconds
        while not self.js(f'!!({code})'):
            assert time.monotonic() < end, f'not in {seconds} s: {code}\n{self.js("document.body?.innerText")}'
            time.sleep(.1)

    def type(self, selector, text):
        "In place of what stands in a field"
        self.wait(f'document.querySelector({selector!r})')
        self.js(f'document.querySelector({selector!r}).select()')
        self.ask('Input.insertText', text=text)

    def click(self, selector):
        "With the mouse, in the middle of an element"
        where = f'document.querySelector({selector!r})'
        self.wait(where)
        self.js(f'{where}.scrollIntoView({{block: "center"}})')
        x, y = self.js(f'(r => [r.x + r.width/2, r.y + r.height/2])({where}.getBoundingClientRect())')
        for kind in ('mousePressed', 'mouseReleased'):
            self.ask('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

    def screenshot(self, file):
        "The whole page, to look at"
        size = self.ask('Page.getLayoutMetrics')['cssContentSize']
        clip = dict(x=0, y=0, width=size['width'], height=size['height'], scale=1)
        shot = self.ask('Page.captureScreenshot', captureBeyondViewport=True, clip=clip)
        Path(file).write_bytes(base64.b64decode(shot['data']))
