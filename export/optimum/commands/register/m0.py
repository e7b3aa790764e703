"""`optimum-cli export m0 -m CHECKPOINT out/`: m0kit's exporter under the roof and the option names of optimum.

Owns those names and nothing else. optimum finds this file by its folder, a namespace package that several
distributions share: there must be no `__init__.py` in it or above it. It is loaded at every start of
`optimum-cli`, so what is heavy is imported in `run`.
"""

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "nf4")  # m0kit.precision.SCHEMES, without importing m0kit


class M0ExportCommand(BaseOptimumCLICommand):
    """Export jina-reranker-m0 with LoRA adapters to an m0kit artifact."""

    COMMAND = CommandInfo("m0", "Export jina-reranker-m0, with LoRA adapters merged, to ONNX for m0kit.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options; optimum calls this."""
        parser.add_argument("-m", "--model", required=True, help="Checkpoint: a folder or a hub id.")
        parser.add_argument("output", type=Path, help="Folder to write.")
        parser.add_argument(
            "--adapter",
            action="append",
            default=[],
            metavar="PATH[:WEIGHT]",
            help="LoRA adapter to merge; several are merged in the order given.",
        )
        parser.add_argument(
            "--dtype", choices=_PRECISIONS, default="fp32", help="How weights are stored (default: fp32)."
        )
        parser.add_argument("--revision", help="Branch, tag or commit, when the model is a hub id.")
        parser.add_argument("--cache_dir", type=Path, help="Where downloads are kept.")
        parser.add_argument("--overwrite", action="store_true", help="Replace the artifact that is there.")

    def run(self) -> None:
        """Export; an error becomes one line and an exit code, as in `m0kit export`."""
        from m0kit.terminal import run

        if code := run(self._export):
            raise SystemExit(code)

    def _export(self) -> None:
        from m0kit_export.adapter import AdapterSpec
        from m0kit_export.cli import describe
        from m0kit_export.export import export_artifact
        from m0kit_quant.recipe import Recipe

        args = self.args
        manifest = export_artifact(
            args.model,
            args.output,
            adapters=[AdapterSpec.parse(adapter) for adapter in args.adapter],
            recipe=Recipe.default(args.dtype),
            revision=args.revision,
            cache_dir=args.cache_dir,
            overwrite=args.overwrite,
        )
        describe(args.output, manifest, as_json=False)


REGISTER_COMMANDS = [(M0ExportCommand, ExportCommand)]
