"""Runs the clients of one environment on what stdin asks, and prints what came of it. Knows nothing of m0kit.

A line of JSON asks: {"client": "cohere-v2", "url", "key", "model", "query", "documents"}. A line of JSON answers:
{"results": [{"index", "score", "text"?}]}, or {"error": {"class", "text"}} as a user of the client sees it.
"""

import json
import os
import sys
import traceback

# Who phones home, or waits for an answer from elsewhere, does not do so here.
os.environ.update({
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
})  # fmt: skip


def answer(clients):
    """clients: functions by their names, of url, key, model, query and documents."""
    out, sys.stdout = sys.stdout, sys.stderr  # clients print what they like
    for line in sys.stdin:
        asked = json.loads(line)
        client = clients[asked.pop("client")]
        try:
            results = [dict(zip(("index", "score", "text"), one, strict=False)) for one in client(**asked)]
            found = {"results": results}
        except Exception as error:
            traceback.print_exc()
            kind = type(error)
            found = {"error": {"class": f"{kind.__module__.partition('.')[0]}.{kind.__name__}", "text": str(error)}}
        print(json.dumps(found), file=out, flush=True)
