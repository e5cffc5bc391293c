"""A pruned model as files that run without this package, and the models that come in from folders."""

from prunepass.export.folder import check_folder, export

__all__ = ["check_folder", "export"]
