"""Runs Python scripts without importing torch for each: the processes of a request are forks of this one, which has
imported the modules that its command line names.

Reads requests from stdin, one JSON list a line with an object per process: {"argv", "env", "cwd", "out", "err"}, the
last two paths of files. They run at the same time. Answers with the list of their exit codes when all have ended.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import sys
import threading
import traceback


def script(argv, env, cwd, out, err):
    """What `python argv` does, from the imports of this process on."""
    for fd, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if fd else os.O_RDONLY, 0o600), fd)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.stdin = os.fdopen(0)  # the parent has read from the one it made
    sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(argv[0]))
    code = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as left:
        code = left.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    # what Python does at its end, less the freeing of all that was imported, which takes more than a second
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def main():
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        pids = []
        for process in json.loads(line):
            pids.append(os.fork())
            if not pids[-1]:
                return script(**process)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
