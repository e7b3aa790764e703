"""m0kit: score (query, document) pairs with an exported jina-reranker-m0, without PyTorch.

from m0kit import Reranker

reranker = Reranker.load("m0-fp32")
scores = reranker.score([("slm markdown", Path("page.png")), ("slm markdown", "some text")])
"""

from m0kit.errors import M0kitError
from m0kit.quiet import silence
from m0kit.reading.pdf import PdfPage, pdf_pages
from m0kit.reranker import Reranker
from m0kit.scoring.schedule import Result

silence()

__version__ = "0.1.0"
__all__ = ["M0kitError", "PdfPage", "Reranker", "Result", "__version__", "pdf_pages"]
