"""Chat templates are programs of whoever made the checkpoint: they run in a process of their own, with bounds.

    text = render(template, messages=[...], add_generation_prompt=True, bos_token="<s>", ...)

Jinja's sandbox keeps a template away from Python, not from an endless loop or a string of ten gigabytes. So a second process
renders: 512 MB of memory, no further files, sockets or processes, and a second of processor time for a conversation. It is
started by the first call, answers in well under a millisecond, and ends with this process.
"""

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import threading

MAX_SECONDS = 1.0           # of processor time, for one conversation
PATIENCE = 60               # seconds; a machine may be busy with other things
MAX_BYTES = 512 << 20       # of the process that renders
MAX_TEXT = 16 << 20         # characters of a rendered conversation

_worker = None              # (process id of its owner, process)
_lock = threading.Lock()


def render(template, **names):
    """The text a template makes of these names, which must be json; ValueError with the template's or the sandbox's reason."""
    request = json.dumps({"template": template, "names": names}).encode() + b"\n"
    with _lock:             # answers come in the order of requests, so no other may come between
        text, error = _ask(request)
    if error:
        raise ValueError(error)
    return text


def _ask(request):
    global _worker
    if _worker is None or _worker[0] != os.getpid() or _worker[1].poll() is not None:       # a fork must not share its parent's pipes
        process = subprocess.Popen([sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(process.kill)
        _worker = os.getpid(), process
    process, answer = _worker[1], b""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.flush()
        if select.select([process.stdout], [], [], PATIENCE)[0]:
            answer = process.stdout.readline()
    except OSError:
        pass                # it is gone
    except BaseException:   # Ctrl-C: its answer would be taken for that to the next request
        process.kill()
        process.wait()
        raise
    if not answer:
        process.kill()
        raise ValueError(f"the chat template of this tokenizer did not come to an end over one conversation: stopped after {MAX_SECONDS} s of work "
                         f"(exit code {process.wait()}); choose a built-in one by chat_format")
    return json.loads(answer)


# -- the other process ----------------------------------------------------------------------------------------------


def environment():
    """Jinja as chat templates expect it. The sandbox keeps a template from a checkpoint away from Python."""
    import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks assistant text in some templates; here it is only text."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    result = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    result.filters["tojson"] = tojson
    result.globals["raise_exception"] = raise_exception
    result.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    datetime.datetime.now().strftime("%c")     # reads the time zone while files can still be opened
    return result


def _answer(compiled, template, names):
    try:
        compiled = compiled(template)
    except MemoryError:
        raise
    except Exception as e:
        return None, f"the chat template of this tokenizer is not valid jinja: {e}"
    try:
        text = compiled.render(**names)
    except Exception as e:
        reason = "it needs too much memory" if isinstance(e, MemoryError) else str(e) or type(e).__name__
        return None, f"the chat template of this tokenizer refuses these messages: {reason[:500]}"
    if len(text) > MAX_TEXT:
        return None, f"the chat template of this tokenizer makes {len(text)} characters of one conversation, more than {MAX_TEXT}"
    return text, None


def _serve():
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the owner, at whose end the input ends
    compiled = functools.lru_cache(maxsize=4)(environment().from_string)
    for faulty in ("{% if %}", "{{ raise_exception('x') }}", "{{ a.b.c }}"):
        _answer(compiled, faulty, {})                   # what jinja imports to explain an error
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)        # its signal ends the process, whatever it is doing
        answer = _answer(compiled, request["template"], request["names"])
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.path.pop(0)         # this folder, whose modules have names that others have too
    _serve()
