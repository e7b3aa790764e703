"""Rerankers for other frameworks, each of one file that imports its framework: LangChain, LlamaIndex, Haystack.

from m0kit.integrations.langchain import M0kitRerank      # m0kit[langchain]
from m0kit.integrations.llama_index import M0kitRerank    # m0kit[llama-index]
from m0kit.integrations.haystack import M0kitRanker       # m0kit[haystack]

They add no work of their own to `Reranker`, in whose process they run: documents in, the best first, images as images.
"""
