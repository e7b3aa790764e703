"""Scoring over HTTP, in the forms that clients of other rerankers speak. Needs the extra `serve`."""
