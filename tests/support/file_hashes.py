"""Hashes of the weights in folders that tests compare."""

from undo_core.io.files import hash_file


def weight_hashes(folder):
    """Hashes of the safetensors files under ``folder``, by relative path."""
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*.safetensors"))}
