"""From a checkpoint and adapters to an artifact, in bounded memory."""

import logging

from m0kit.quiet import silence

silence()
# PEFT imports bitsandbytes where that is installed, which then says on some CPUs that a product nobody asks for here
# will be slow.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
