"""What can go wrong with a store. Every message says what was expected, what was found, and the command that mends it."""


class StoreError(Exception):
    """A store cannot be used as asked. The command-line programs print the message and exit with 2."""


class FingerprintMismatch(StoreError):
    """The store belongs to another teacher, tokenizer, corpus or row building; the message names the field that differs."""


class MissingFeature(StoreError):
    """A requested feature is neither stored nor derivable; the message holds the dump command that would add it."""


class CorruptShard(StoreError):
    """A committed file is missing, truncated or fails its checksum."""


class StoreBusy(StoreError):
    """Another process is writing to the store."""
