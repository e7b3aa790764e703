"""From a checkpoint and adapters to an artifact, in bounded memory."""
