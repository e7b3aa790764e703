"""How the tests of benchmarks run a command. Not a test file."""

from click.testing import CliRunner, Result

from m0kit_parity.bench.commands import bench


def invoke(*arguments: object) -> Result:
    """`m0kit bench …`, which must succeed."""
    done = CliRunner().invoke(bench, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done
