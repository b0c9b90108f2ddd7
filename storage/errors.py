"""Errors of the store; a fault of the disk or of the network is never taken for a missing artifact."""


class StorageError(Exception):
    """The store cannot be read or written: disk full, no permission, a damaged artifact in use."""


class UnwritableStoreError(StorageError):
    """The cache folder cannot be created or written."""


class MissingArtifactError(StorageError):
    """No artifact with this key is in the store."""


class RemoteError(StorageError):
    """The remote cache does not answer, refuses, or is none."""


class RemoteSettingsError(RemoteError):
    """The remote cache is not set up, or not for what is asked of it."""
