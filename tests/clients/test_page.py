"""docs/clients.md tells what the last run saw, with the lines that were run, of the versions that are pinned."""

import json

from tests.clients.gather import CLIENTS, NAME_NO_MODEL, STATUSES
from tests.clients.page import HIDDEN, PAGE, SEEN, make, sentence, version_of


def test_the_page_is_that_of_the_last_run() -> None:
    assert PAGE.read_text("utf-8") == make(), "make clients writes it again"


def test_the_last_run_was_of_these_clients_and_their_pinned_versions() -> None:
    seen = json.loads(SEEN.read_text("utf-8"))
    assert {client: told["version"] for client, told in seen.items()} == {c: version_of(c) for c in CLIENTS}


def test_every_client_ranked_and_every_error_was_read() -> None:
    for client, told in json.loads(SEEN.read_text("utf-8")).items():
        assert told["text"] is True
        for status in STATUSES:
            if status == "404" and client in NAME_NO_MODEL:
                continue
            shows = sentence(client, status)[:20] in told[status]["text"]
            assert shows != (status in HIDDEN.get(client, ())), f"{client}: {status}"
