"""The start of scripts whose forked children kill themselves in the middle of their work, before any file operation."""

PRELUDE = """
import os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from m0kit_export.export import export_artifact, quantize_artifact
from m0kit_quant.recipe import Recipe

count, limit = 0, None

def watch(event, _):
    global count
    if limit is not None and event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod"):
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)

def operations(work, kill_at=10**9):
    \"\"\"Run `work`, killed before file operation number `kill_at`; returns how many there were.\"\"\"
    global limit, count
    count, limit = 0, kill_at
    work()
    limit = None
    return count

def exit_code(work, kill_at):
    \"\"\"Of a child that does `work` and is killed so.\"\"\"
    pid = os.fork()
    if pid == 0:
        operations(work, kill_at)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
