"""Errors of the store; a fault of the disk is never taken for a missing artifact."""


class StorageError(Exception):
    """The store cannot be read or written: disk full, no permission, a damaged artifact in use."""


class UnwritableStoreError(StorageError):
    """The cache folder cannot be created or written."""


class MissingArtifactError(StorageError):
    """No artifact with this key is in the store."""
